"""The sharing graph: bounds against exact fractions and simulation, uniform choices, both views of the edges."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from appa_secure.secagg import BadParameters, graph
from appa_secure.secagg.graph import (
    SharingGraph,
    both_secrets_failure,
    choose_holders,
    complete,
    correctness_failure,
    log2_tail,
    smallest_group,
    sparse,
)
from appa_secure.secagg.policy import EpochParameters
from tests.secagg.world import names, seeded


def exact_tail(population: int, marked: int, drawn: int, at_least: int) -> Fraction:
    """P[X >= at_least] in integers."""
    ways = sum(
        math.comb(marked, x) * math.comb(population - marked, drawn - x)
        for x in range(max(at_least, 0), min(marked, drawn) + 1)
    )
    return Fraction(ways, math.comb(population, drawn))


@given(st.integers(1, 400), st.data())
def test_tails_are_those_of_exact_arithmetic(population: int, data: st.DataObject) -> None:
    marked = data.draw(st.integers(0, population))
    drawn = data.draw(st.integers(0, population))
    at_least = data.draw(st.integers(-1, drawn + 1))
    exact, got = (
        exact_tail(population, marked, drawn, at_least),
        log2_tail(population, marked, drawn, at_least),
    )
    if exact == 0:
        assert got == -math.inf
    else:
        log2 = math.log2(exact.numerator) - math.log2(exact.denominator)
        assert got == pytest.approx(log2, abs=1e-7)


@pytest.mark.parametrize("n", [101, 150, 300, 1000, 3000])
def test_failure_probabilities_are_below_the_stated_ones(n: int) -> None:
    sharing = sparse(n)
    corrupt, missing = n // 5, n // 10
    k, t = sharing.degree, sharing.threshold
    assert n * exact_tail(n - 1, missing, k, k - t + 1) <= Fraction(1, 2**20)
    both = n * exact_tail(sharing.quorum - 1, corrupt, k, 2 * t - (k + 1))
    small = sum(
        math.comb(n - corrupt, s) * exact_tail(sharing.quorum - 1, s - 1 + corrupt, k, t - 1) ** s
        for s in range(1, sharing.smallest_group if n <= 150 else 40)
    )
    assert both + small <= Fraction(1, 2**40)
    assert sharing.smallest_group > n / 3
    assert sharing.quorum == n - missing


def test_degree_grows_slowly_and_is_no_larger_than_needed() -> None:
    found = {n: sparse(n) for n in (101, 1000, 10_000)}
    assert {n: (s.degree, s.threshold) for n, s in found.items()} == {
        101: (42, 32),
        1000: (152, 114),
        10_000: (202, 151),
    }
    # One holder fewer misses a bound, whatever the threshold.
    k, quorum = found[1000].degree - 1, found[1000].quorum
    assert not any(
        correctness_failure(1000, 100, k, t) <= -20
        and both_secrets_failure(1000, quorum, 200, k, t) <= -41
        and smallest_group(1000, quorum, 200, k, t) > 1
        for t in range(k // 2, k + 1)
    )


def test_assumptions_that_no_graph_meets_are_refused() -> None:
    with pytest.raises(BadParameters, match="40% corrupt and 40% missing"):
        sparse(120, 0.4, 0.4)


def test_small_groups_are_as_rare_as_stated() -> None:
    """Every set of honest parties of a small graph, by brute force: how often one is closed enough to be opened."""
    n, corrupt, degree, threshold, trials = 12, 2, 5, 4, 400
    rng = np.random.default_rng(3)
    honest = range(corrupt, n)
    hits = dict.fromkeys(range(1, 6), 0)
    for _ in range(trials):
        chosen = {i: set(rng.choice([j for j in range(n) if j != i], degree, replace=False)) for i in honest}
        for s in hits:
            hits[s] += any(
                all(len(chosen[i] & ({*group} | set(range(corrupt)))) >= threshold - 1 for i in group)
                for group in combinations(honest, s)
            )
    for s, count in hits.items():
        bound = (
            math.comb(n - corrupt, s) * float(exact_tail(n - 1, s - 1 + corrupt, degree, threshold - 1)) ** s
        )
        assert count / trials <= min(1.0, bound) + 4 * math.sqrt(0.25 / trials)
    assert hits[5] > 0  # the event is there to be found


def test_up_to_a_hundred_everybody_holds_shares_of_everybody() -> None:
    for n, degree in ((3, 2), (100, 99), (101, 42)):
        assert (
            EpochParameters(b"s", 1, tuple(f"{i:04d}" for i in range(n)), n, b"key".ljust(32)).sharing.degree
            == degree
        )
    assert complete(9, 6).threshold == 6
    assert complete(9, 6).smallest_group == 4  # t - c for the largest c with 2t > n + c


def test_holders_are_drawn_uniformly() -> None:
    everybody = names(12)
    draws = 3000
    counts = dict.fromkeys(everybody, 0)
    sets: Counter[tuple[str, ...]] = Counter()
    for i in range(draws):
        holders = choose_holders(everybody, "site-03", 4, seeded(i))
        assert list(holders) == sorted(set(holders))
        assert len(holders) == 5
        sets[holders] += 1
        for name in holders:
            counts[name] += 1
    assert counts.pop("site-03") == draws
    expected = draws * 4 / 11
    assert (
        sum((c - expected) ** 2 / expected for c in counts.values()) < 35
    )  # chi-square, 10 degrees, p = 1e-4
    possible = math.comb(11, 4)  # not only every holder, but every set of them is as likely as any other
    expected = draws / possible
    statistic = sum((sets[s] - expected) ** 2 / expected for s in sets) + (possible - len(sets)) * expected
    assert statistic < chi2.ppf(1 - 1e-4, possible - 1)
    assert choose_holders(everybody, "site-03", 11, seeded(0)) == everybody


def test_both_ends_see_the_same_edges() -> None:
    everybody = names(20)
    holders = {name: choose_holders(everybody, name, 4, seeded(name)) for name in everybody[:17]}
    found = SharingGraph(holders)
    assert found.dealers == everybody[:17]
    for a in found.dealers:
        assert a not in found.peers[a]
        for b in found.peers[a]:
            assert a in found.peers[b]
            assert b in holders[a] or a in holders[b]
        for holder, slot in zip(holders[a], found.slots[found.row[a]], strict=True):
            if holder in found.wards:
                assert found.wards[holder][slot] == a
    assert graph.COMPLETE_UP_TO == 100
