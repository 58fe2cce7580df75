"""The statistics of the audit, against exact arithmetic and the special cases that are known by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from appa_secure.audit.bound import SHARES, audit, gaussian_bound, gaussian_epsilon, lower_bound, p_value


def exact(m: int, r: int, v: int, odds: Fraction, delta: Fraction) -> Fraction:
    """Theorem 5.2 of Steinke et al. 2023 term by term; odds = e^epsilon."""
    right = odds / (1 + odds)
    mass = [Fraction(math.comb(r, k)) * right**k * (1 - right) ** (r - k) for k in range(r + 1)]
    tail = sum(mass[v:], Fraction(0))
    worst = max((sum(mass[v - i : v], Fraction(0)) / i for i in range(1, v + 1)), default=Fraction(0))
    return min(tail + 2 * m * delta * worst, Fraction(1))


@given(st.data())
def test_the_p_value_is_the_theorems(data: st.DataObject) -> None:
    m = data.draw(st.integers(1, 30))
    r = data.draw(st.integers(0, m))
    v = data.draw(st.integers(0, r))
    odds = Fraction(data.draw(st.integers(1, 400)), 1)
    delta = Fraction(data.draw(st.integers(0, 100)), 1000)
    found = p_value(m, r, v, math.log(odds), float(delta))
    assert found == pytest.approx(float(exact(m, r, v, odds, delta)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("m", [1, 5, 60, 4000])
def test_perfect_guesses_without_delta(m: int) -> None:
    """All m right has probability (e^eps / (1 + e^eps))^m, so the bound is the log-odds of the m-th root."""
    assert p_value(m, m, m, 0.0, 0.0) == pytest.approx(2.0**-m)
    root = 0.05 ** (1 / m)
    expected = max(0.0, math.log(root / (1 - root)))
    assert lower_bound(m, m, m, 0.0, 0.95) == pytest.approx(expected, abs=2e-6)


def test_at_epsilon_0_delta_is_paid_for_every_canary() -> None:
    """One canary at (0, delta): 1/2 + delta, which is what total variation delta allows a guesser."""
    assert p_value(1, 1, 1, 0.0, 0.25) == pytest.approx(0.5 + 2 * 0.25 * 0.5)
    assert p_value(10, 10, 10, 0.0, 1.0) == 1.0
    assert p_value(50, 0, 0, 3.0, 1e-3) == 1.0  # whoever guesses nothing proves nothing


@given(
    st.integers(1, 300).flatmap(lambda r: st.tuples(st.just(r), st.integers(0, r - 1))),
    st.sampled_from([0.0, 1e-8, 1e-6]),
)
def test_more_right_guesses_prove_more(pair: tuple[int, int], delta: float) -> None:
    r, v = pair
    assert lower_bound(r, r, v, delta, 0.95) <= lower_bound(r, r, v + 1, delta, 0.95) + 1e-6


@given(
    st.integers(1, 300).flatmap(lambda r: st.tuples(st.just(r), st.integers(0, r))),
    st.integers(0, 200),
)
def test_more_delta_more_confidence_and_more_abstentions_prove_less(pair: tuple[int, int], idle: int) -> None:
    r, v = pair
    best = lower_bound(r, r, v, 1e-6, 0.9)
    assert lower_bound(r, r, v, 1e-4, 0.9) <= best + 1e-6
    assert lower_bound(r, r, v, 1e-6, 0.99) <= best + 1e-6
    assert lower_bound(r + idle, r, v, 1e-6, 0.9) <= best + 1e-6


def test_everything_below_the_bound_is_refuted_and_nothing_above() -> None:
    bound = lower_bound(400, 100, 93, 1e-5, 0.95)
    assert all(p_value(400, 100, 93, e, 1e-5) <= 0.05 for e in np.linspace(0, bound, 50))
    assert p_value(400, 100, 93, bound + 1e-3, 1e-5) > 0.05


@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_randomised_response_is_hardly_ever_accused(epsilon: float) -> None:
    """The tightest case: every guess is right with probability e^eps / (1 + e^eps), and the bound may err 1 in 20."""
    rng = np.random.default_rng(5)
    right = 1 / (1 + math.exp(-epsilon))
    wrong = 0
    for _ in range(200):
        coins = rng.random(300) < 0.5
        said = np.where(rng.random(300) < right, coins, ~coins)
        wrong += audit(np.where(said, 1.0, -1.0), coins, 0.0, 0.95, shares=(1.0,)).epsilon > epsilon
    assert wrong <= 20  # P[Binomial(200, 0.05) > 20] < 0.002


def test_it_finds_most_of_what_a_gaussian_mechanism_leaks() -> None:
    """mu = 1 is (4.9, 1e-6)-DP: the bound must be well above 0 and never above that."""
    rng = np.random.default_rng(6)
    coins = rng.random(6000) < 0.5
    found = audit(coins + rng.standard_normal(6000) - 0.5, coins, 1e-6, 0.95)
    assert 1.2 < found.epsilon < 4.9
    assert found.canaries == 6000
    assert found.guesses in {round(6000 * share) for share in SHARES}


def test_the_order_of_equal_scores_knows_nothing_of_the_coins() -> None:
    coins = np.arange(1000) % 2 == 0
    assert audit(np.ones(1000), coins, 0.0, 0.95).epsilon == 0.0


@pytest.mark.parametrize("mu", [0.2, 1.0, 3.0])
def test_epsilon_of_mu_gdp_is_where_its_delta_is(mu: float) -> None:
    """Dong, Roth and Su 2022, corollary 2.13, the other way round; integrated numerically."""
    found = gaussian_epsilon(mu, 1e-5)
    x = np.linspace(-12, 12 + mu, 200_001)
    there, absent = stats.norm.pdf(x, mu), stats.norm.pdf(x)
    delta = np.maximum(there - math.exp(found) * absent, 0.0).sum() * (x[1] - x[0])
    assert delta == pytest.approx(1e-5, rel=1e-3)
    assert gaussian_epsilon(0.0, 1e-5) == 0.0
    assert gaussian_epsilon(1e-6, 1e-5) == 0.0


@pytest.mark.parametrize("mu", [0.0, 0.5, 2.0])
def test_gaussian_clients_are_hardly_ever_accused_of_less_noise(mu: float) -> None:
    """Also where all guesses of a client are right or wrong together, which its own claim does not rule out."""
    rng = np.random.default_rng(8)
    right, wrong = stats.norm.cdf(mu / 2), 0
    for together in (False, True):
        for _ in range(200):
            size = (40, 1) if together else (40, 30)
            wrong += gaussian_bound((rng.random(size) < right).mean(axis=1), 0.95) > mu
    assert wrong <= 34  # P[Binomial(400, 0.05) > 34] < 0.002


def test_half_the_noise_of_many_clients_is_seen() -> None:
    rng = np.random.default_rng(9)
    accuracy = rng.binomial(200, stats.norm.cdf(1.0), size=80) / 200  # mu = 2 where 1 is claimed
    assert 1.5 < gaussian_bound(accuracy, 0.95) < 2.0
    assert gaussian_bound(np.append(accuracy, 0.0), 0.95) == 0.0


def test_refused() -> None:
    with pytest.raises(ValueError, match="need clients"):
        gaussian_bound(np.zeros(0), 0.95)
    with pytest.raises(ValueError, match="correct <= guesses"):
        p_value(5, 6, 1, 0.0, 0.0)
    with pytest.raises(ValueError, match="epsilon >= 0"):
        p_value(5, 5, 1, -1.0, 0.0)
    with pytest.raises(ValueError, match="confidence"):
        lower_bound(5, 5, 5, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"both be \(m,\)"):
        audit(np.zeros(0), np.zeros(0, dtype=bool), 0.0, 0.95)
