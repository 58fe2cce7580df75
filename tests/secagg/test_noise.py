"""Output noise: its exact distribution, its coding, and that an upload carries it and is paid for."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from appa_secure.aggregation import AggregationSpec, contribution, segments
from appa_secure.privacy.output import achieved_multiplier
from appa_secure.secagg import (
    Aggregate,
    BadParameters,
    Coding,
    Headroom,
    Layout,
    OutputNoise,
    Segment,
    SumOutOfRange,
    fewest_honest,
    most_colluders,
    noise,
    threshold_for,
)
from appa_secure.secagg.graph import sparse
from tests.secagg.world import LAYOUT, World, seeded

LAYERS = (Segment("r", 40, 0.0, 1.0), Segment("e", 9, 0.0, math.e - 1), Segment("h", 1, -2.0, 3.0))


def exact(variance: int, reach: int) -> np.ndarray:
    """P[X = -reach .. reach], in floating point and from the definition alone."""
    x = np.arange(-reach, reach + 1)
    weights = np.exp(-(x.astype(float) ** 2) / (2 * variance))
    return weights / weights.sum()


# -- the sampler ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [64, 65, 1000])
def test_samples_are_discrete_gaussian(variance: int) -> None:
    size, reach = 200_000, noise.bound(variance)
    drawn = noise.sample(variance, size, noise.stream(seeded(("chi", variance))(32), 16 * size))
    expected = size * exact(variance, reach)
    seen = np.bincount(drawn + reach, minlength=2 * reach + 1)
    rare = expected < 20  # both tails together make one cell
    statistic = stats.chisquare([*seen[~rare], seen[rare].sum()], [*expected[~rare], expected[rare].sum()])
    assert statistic.pvalue > 1e-3
    # A standard deviation that is 3 % off would be seen.
    wrong = size * exact(round(variance * 1.06), reach)
    assert stats.chisquare(seen[~rare], wrong[~rare] * seen[~rare].sum() / wrong[~rare].sum()).pvalue < 1e-6
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 5 / math.sqrt(size)


@pytest.mark.parametrize("variance", [64, 5000])
def test_the_table_is_within_the_stated_distance_of_the_exact_distribution(variance: int) -> None:
    """In exact rational arithmetic, from exponentials of 120 digits."""
    from decimal import Context, Decimal

    context, wide = Context(prec=120), noise.bound(variance) + 400
    weights = [
        Fraction(context.exp(context.divide(Decimal(-x * x), Decimal(2 * variance))))
        for x in range(-wide, wide + 1)
    ]
    total = sum(weights)
    padded = [bytes(entry).ljust(16, b"\0") for entry in noise._thresholds(variance).tolist()]
    table = [0, *(int.from_bytes(entry, "big") for entry in padded), 2**128]
    assert table == sorted(table)
    distance, reach = Fraction(0), noise.bound(variance)
    for x, weight in zip(range(-wide, wide + 1), weights, strict=True):
        inside = abs(x) <= reach
        drawn = Fraction(table[x + reach + 1] - table[x + reach], 2**128) if inside else Fraction(0)
        distance += abs(drawn - weight / total)
    assert distance / 2 < noise.total_variation(variance) < 2.0**-110


def test_a_lookup_is_the_inverse_of_the_distribution_function() -> None:
    """At and around every threshold, where an off-by-one would sit."""
    table = noise._thresholds(64)
    numbers = [int.from_bytes(bytes(entry).ljust(16, b"\0"), "big") for entry in table.tolist()]
    for at in (0, 1, len(numbers) // 2, len(numbers) - 1):
        for u in (numbers[at] - 1, numbers[at], numbers[at] + 1):
            inside = min(max(u, 0), 2**128 - 1)
            (x,) = noise.sample(64, 1, inside.to_bytes(16, "big"))
            assert x + noise.bound(64) == sum(number <= inside for number in numbers)
    low, high = noise.sample(64, 2, bytes(16) + b"\xff" * 16)
    assert high == noise.bound(64)
    assert -noise.bound(64) <= low < -12.5 * 8  # what has probability below 2^-128 is rounded away


@given(st.binary(min_size=0, max_size=320))
def test_the_same_bytes_are_the_same_noise(data: bytes) -> None:
    size = len(data) // 16
    found = noise.sample(100, size, data[: 16 * size])
    np.testing.assert_array_equal(found, noise.sample(100, size, data[: 16 * size]))
    assert (np.abs(found) <= noise.bound(100)).all()
    if len(data) % 16:
        with pytest.raises(BadParameters, match="bytes for"):
            noise.sample(100, size, data)


@pytest.mark.parametrize("variance", [63, 0, -1, 2**28 + 1])
def test_variances_without_a_table_are_refused(variance: int) -> None:
    with pytest.raises(BadParameters, match="variance"):
        noise.sample(variance, 1, bytes(16))


# -- the coding ----------------------------------------------------------------------------------------------

noises = st.builds(OutputNoise, st.floats(0.05, 100), st.integers(1, 40))


@settings(deadline=None)
@given(noises, st.integers(1, 200), st.sampled_from([32, 64]))
def test_the_noise_reaches_its_multiplier_and_nothing_wraps(
    target: OutputNoise, parties: int, ring_bits: int
) -> None:
    try:
        coding = Layout(LAYERS, ring_bits, target).preflight(parties)
    except Headroom:
        return
    assert achieved_multiplier(coding, target.honest) >= target.multiplier
    assert target.honest * coding.variance >= Fraction(target.multiplier) ** 2 * coding.distance_squared
    # Rounding of all parties is small beside the noise of the honest ones alone.
    assert parties / 2 <= math.sqrt(target.honest * coding.variance) / 8 * (1 + 1e-12)
    for segment, bits in zip(LAYERS, coding.bits, strict=True):
        largest = parties * (math.ceil(max(-segment.lo, segment.hi) * 2**bits) + coding.noise_bound)
        assert largest < 2 ** min(ring_bits - 1, 53)


@settings(deadline=None, max_examples=40)
@given(noises, st.integers(0, 2**32))
def test_two_vectors_of_one_client_are_never_further_apart_than_the_sensitivity(
    target: OutputNoise, seed: int
) -> None:
    coding = Layout(LAYERS, 64, target).preflight(20)
    rng = np.random.default_rng(seed)
    ends = [np.repeat([getattr(s, end) for s in LAYERS], [s.size for s in LAYERS]) for end in ("lo", "hi")]
    inside = [rng.uniform(*ends) for _ in range(2)] + [np.where(rng.random(50) < 0.5, *ends)]
    codes = [coding.encode(vector).view(np.int64) for vector in (*ends, *inside)]
    apart = [int(((a - b).astype(object) ** 2).sum()) for a in codes for b in codes]
    assert max(apart) == coding.distance_squared  # and the ends reach it


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from(["question", "batch"]), st.sampled_from(["appa", "average"]))
def test_real_reward_vectors_are_within_the_sensitivity(seed: int, scope: str, kind: str) -> None:
    spec, rng = AggregationSpec(kind=kind, fi_scope=scope), np.random.default_rng(seed)
    layout = Layout(tuple(Segment(*part) for part in segments(spec, 12)), 64, OutputNoise(5.0, 3))
    coding = layout.preflight(8)
    codes = [
        coding.encode(contribution(spec, rng.choice([0.0, 1.0, rng.random()], 12), h, 1.0, 8)[0])
        for h in (0.0, 1.0, rng.random())
    ]
    for a in codes:
        for b in codes:
            assert int(((a - b).view(np.int64) ** 2).sum()) <= coding.distance_squared


def test_too_much_noise_is_refused_before_anything_is_coded() -> None:
    with pytest.raises(Headroom, match="larger epsilon"):
        Layout(LAYERS, 64, OutputNoise(1e6, 3)).preflight(8)
    with pytest.raises(Headroom, match=r"'r'.*32-bit ring"):
        Layout(LAYERS, 32, OutputNoise(8000.0, 100)).preflight(20_000)  # by its noise alone
    assert Layout(LAYERS, 64, OutputNoise(8000.0, 100)).preflight(20_000).variance < 2**28
    for multiplier, honest in ((0.0, 3), (math.nan, 3), (math.inf, 3), (1.0, 0)):
        with pytest.raises(BadParameters, match="noise"):
            OutputNoise(multiplier, honest)


def test_noise_is_part_of_the_coding_that_masks_are_bound_to() -> None:
    plain = Layout(LAYERS)
    layouts = [plain, *(Layout(LAYERS, 64, OutputNoise(z, k)) for z, k in ((2.0, 3), (2.0, 4), (2.001, 3)))]
    assert len({layout.preflight(8).digest for layout in layouts}) == 4
    for layout in layouts:
        assert Layout.from_description(layout.describe(), 64, layout.describe_noise()) == layout


def test_a_sum_beyond_all_noise_is_still_an_error() -> None:
    coding = Layout(LAYERS, 64, OutputNoise(2.0, 3)).preflight(8)
    top = np.full(50, 5 * (2 * 2 ** max(coding.bits) + coding.noise_bound), "<u8")
    with pytest.raises(SumOutOfRange):
        coding.decode(top, 3)


# -- how many are honest -------------------------------------------------------------------------------------


@given(st.integers(2, 100), st.data())
def test_the_fewest_honest_are_what_every_choice_of_the_adversary_leaves(n: int, data: st.DataObject) -> None:
    t = data.draw(st.integers(n // 2 + 1, n))
    c = data.draw(st.integers(0, most_colluders(n, t)))
    assert 2 * t > n + c
    assert fewest_honest(n, t, "abort", c) == n - c
    # All corrupt clients may be among t survivors.
    assert fewest_honest(n, t, "noise", c) == t - c >= 1
    with pytest.raises(BadParameters, match="colluders"):
        fewest_honest(n, t, "noise", most_colluders(n, t) + 1)


def test_on_a_sparse_graph_it_is_the_smallest_group() -> None:
    t = threshold_for(500)
    assert fewest_honest(500, t, "noise", 100) == sparse(500).smallest_group < 400
    assert most_colluders(500, t) == 100


# -- an upload -----------------------------------------------------------------------------------------------

TARGET = OutputNoise(3.0, 4)
NOISY = Layout(LAYOUT.segments, 64, TARGET)


def world(release: str = "noise", layout: Layout = NOISY, **options: object) -> World:
    return World(6, release=release, layout=layout, **options)  # type: ignore[arg-type]


def noise_in(w: World, total: np.ndarray, contributors: tuple[str, ...]) -> np.ndarray:
    """What is in an opened ring sum beside the encoded vectors, in integers."""
    return (total - w.ring_sum(contributors)).view(np.int64)


@pytest.mark.parametrize("release", ["abort", "noise", "recover"])
def test_the_opened_sum_is_the_vectors_and_everybodys_noise(release: str) -> None:
    w = world(release)
    w.setup()
    outcome = w.round(1)
    assert isinstance(outcome, Aggregate)
    coding: Coding = NOISY.preflight(6)
    found = noise_in(w, outcome.ring_sum, w.names)
    own = [coding.encode(w.vectors[n]) * 0 for n in w.names]
    for ring, name in zip(own, w.names, strict=True):
        coding.add_noise(ring, w.noise_key(name, 1))
    np.testing.assert_array_equal(found, coding.add(own).view(np.int64))
    assert found.any()
    assert (np.abs(outcome.sum - sum(w.vectors.values())) <= coding.error_bound).all()


def test_the_same_upload_has_the_same_bytes_and_another_round_other_noise() -> None:
    w, seen = world(), []
    w.setup()
    w.outbound = lambda name, e: seen.append((name, e.raw)) or e.raw if e.type == "round" else e.raw
    first, second = w.round(1), w.round(2)
    assert isinstance(first, Aggregate)
    assert isinstance(second, Aggregate)
    assert not np.array_equal(first.ring_sum, second.ring_sum)
    paid = dict(w.paid)
    for name, raw in seen[6:]:
        repeated = w.answer(name, raw)
        assert repeated is not None
        assert w.uploads[name] in repeated
    assert w.paid == paid == dict.fromkeys(w.names, 2)  # two rounds, two payments, none for a repetition


def test_a_payment_that_is_refused_leaves_the_round_unused() -> None:
    w = world()
    w.setup()
    before = {name: machine.export_state() for name, machine in w.clients.items()}
    w.broke = True
    assert not isinstance(w.round(1), Aggregate)
    assert before == {name: machine.export_state() for name, machine in w.clients.items()}
    w.broke = False
    assert isinstance(w.round(2), Aggregate)


def test_nothing_is_paid_for_a_request_that_is_refused() -> None:
    w = world()
    w.setup()
    w.contexts["site-02"] = bytes(32)
    w.vectors["site-03"] = w.vectors["site-03"] + 9
    w.round(1)
    assert w.paid == dict.fromkeys(["site-00", "site-01", "site-04", "site-05"], 1)


def test_under_noise_nothing_without_noise_is_summed_and_none_with_too_little() -> None:
    w, me = world(layout=LAYOUT), "site-00"
    w.setup()
    request = w.coordinator.begin_round(1, w.contexts[me], LAYOUT).outbound[me]
    with pytest.raises(BadParameters, match="only vectors with output noise"):
        w.clients[me].upload(request, w.vectors[me], layout=LAYOUT, context=w.contexts[me])
    # 6 clients, threshold 4, one colluder: three honest clients may be all there are.
    for release, honest in (("noise", 3), ("abort", 5)):
        for asked in (honest, honest + 1):
            layout = Layout(LAYOUT.segments, 64, OutputNoise(3.0, asked))
            w = world(release, layout, colluders=1)
            w.setup()
            assert isinstance(w.round(1), Aggregate) == (asked <= honest)


def test_noise_needs_a_key() -> None:
    w = world(colluders=0)
    w.setup()
    step = w.coordinator.begin_round(1, w.contexts["site-00"], NOISY)
    with pytest.raises(BadParameters, match="secret for noise"):
        w.clients["site-00"].upload(
            step.outbound["site-00"], w.vectors["site-00"], layout=NOISY, context=w.contexts["site-00"]
        )


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_the_survivors_noise_reaches_the_target_after_dropouts(gone: int) -> None:
    """Calibrated to the four that the threshold leaves, so two dropouts cost privacy nothing."""
    wide = Layout((Segment("v", 3000, 0.0, 1.0),), 64, OutputNoise(3.0, 4))
    w = World(6, release="noise", layout=wide, colluders=0, rounds=1)
    w.setup()
    w.silent = {"round": set(w.names[:gone])}
    outcome = w.round(1)
    assert isinstance(outcome, Aggregate)
    assert len(outcome.contributors) == 6 - gone
    coding = wide.preflight(6)
    found = noise_in(w, outcome.ring_sum, outcome.contributors).astype(float)
    target = 3.0**2 * coding.distance_squared
    # Sum of squares of 3,000 (almost) normal entries: chi-square.
    lowest = stats.chi2.ppf(1e-4, 3000) / 3000
    assert np.mean(found**2) >= target * lowest
    assert np.mean(found**2) == pytest.approx((6 - gone) * coding.variance, rel=0.12)
