"""The account of output noise: what the formula says, that Opacus composes it, and that brute force agrees."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant
from scipy import special

from appa_secure.privacy.accounting import epsilon
from appa_secure.privacy.output import (
    UNIT,
    achieved_multiplier,
    output_markdown,
    output_statement,
    plan_output,
    std_of_mean,
)
from appa_secure.secagg.fixedpoint import Layout, Segment


def pmf(variance: float, reach: int) -> np.ndarray:
    x = np.arange(-reach, reach + 1)
    weights = np.exp(-(x**2) / (2 * variance))
    return weights / weights.sum()


@pytest.mark.parametrize("honest", [1, 2, 5])
@pytest.mark.parametrize("order", [1.1, 2, 4.5, 20])
def test_no_renyi_divergence_exceeds_the_formulas(honest: int, order: float) -> None:
    """One dimension, by summing over all integers: the sum of k discrete Gaussians, shifted by a client's change."""
    variance, distance, reach = 64, 11, 700
    one = pmf(variance, reach)
    total = one
    for _ in range(honest - 1):
        total = np.convolve(total, one, "same")
    p, q = total[distance:], total[:-distance]
    both = (p > 1e-250) & (q > 1e-250)  # what is left out weighs less than the tolerance below
    terms = order * np.log(p[both]) + (1 - order) * np.log(q[both])
    divergence = float(special.logsumexp(terms)) / (order - 1)
    bits = 4
    layout = Layout((Segment("v", 1, 0.0, distance / 2**bits),))
    coding = type(layout.preflight(1))(layout, honest, (bits,), variance)
    assert coding.distance_squared == distance**2
    e = 1 / achieved_multiplier(coding, honest)
    assert e == pytest.approx(distance / math.sqrt(honest * variance), rel=1e-12)
    assert divergence <= order * e**2 / 2 * (1 + 1e-9)
    assert divergence >= order * e**2 / 2 * 0.99  # and it is no more than it must be


@settings(deadline=None, max_examples=25)
@given(st.floats(0.3, 60), st.integers(1, 400), st.integers(1, 50))
def test_a_plan_costs_its_budget_and_hardly_less(target: float, releases: int, honest: int) -> None:
    plan = plan_output(target, 1e-6, releases, honest, 0)
    book = RDPAccountant()
    book.history = [(plan.multiplier, 1.0, releases)]
    cost = book.get_epsilon(1e-6)
    assert 0.97 * target < cost <= target
    assert cost == epsilon([plan.event] * releases, 1e-6, "rdp")
    assert (plan.budget.unit, plan.budget.epsilon, plan.budget.delta) == (UNIT, target, 1e-6)
    assert (plan.noise.multiplier, plan.noise.honest) == (plan.multiplier, honest)


def test_renyi_accounting_is_not_below_the_exact_privacy_of_the_gaussian_it_stands_for() -> None:
    """The sum's Rényi curve is that of a Gaussian: its ε must not be below the Gaussian's own, by another library."""
    dp_accounting = pytest.importorskip("dp_accounting")
    from dp_accounting.pld import PLDAccountant

    plan = plan_output(8.0, 1e-6, 160, 3, 3)
    book = PLDAccountant()
    book.compose(dp_accounting.GaussianDpEvent(plan.multiplier), 160)
    assert 0.9 * 8.0 < book.get_epsilon(1e-6) <= 8.0


def test_the_noise_on_a_mean_is_what_the_coding_says() -> None:
    coding = Layout((Segment("r", 4, 0.0, 1.0),), 64, plan_output(8.0, 1e-6, 10, 3, 3).noise).preflight(8)
    rings = []
    for client in range(8):
        ring = coding.encode(np.full(4, 0.5))
        coding.add_noise(ring, bytes([client]) * 32)
        rings.append(ring)
    assert std_of_mean(coding, 8) == pytest.approx(math.sqrt(8 * coding.variance) / 8 / 2 ** coding.bits[0])
    off = coding.decode(coding.add(rings), 8) / 8 - 0.5
    assert (np.abs(off) < 5 * std_of_mean(coding, 8)).all()
    assert off.any()
    with pytest.raises(ValueError, match="no output noise"):
        achieved_multiplier(Layout((Segment("r", 4, 0.0, 1.0),)).preflight(8), 8)


def test_the_statement_says_what_holds_for_whom_and_what_does_not() -> None:
    plan = plan_output(8.0, 1e-6, 160, 3, 2)
    layout = Layout((Segment("r", 4, 0.0, 1.0),), 64, plan.noise)
    rows = [{"client": "a", "epsilon": e} for e in (1.0, 2.5)] + [{"client": "b", "epsilon": 2.25}]
    s = output_statement(plan, rows, layout.preflight(8), 8, secure_rng=True)
    assert s["epsilon"] == {"a": 2.5, "b": 2.25}
    text = output_markdown(s)
    for words in (
        "ε ≤ 2.50",
        "at least 3 clients",
        "up to 2 that",
        "budget: ε = 8",
        "The predictor",
        "160 releases",
    ):
        assert words in text
    assert f"standard deviation {s['noise_on_a_mean_reward']:.3g}" in text
    assert "seed" not in text
    assert "run's seed" in output_markdown({**s, "secure_rng": False})
