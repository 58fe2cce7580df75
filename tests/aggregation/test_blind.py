"""The secure-sum form equals the clear form, step after step, through fixed-point rounding and dropouts."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appa_secure.aggregation import AggregationSpec, combine, combine_clear, contribution, segments

FLOAT_BITS = 53  # sums come back as float64


def fraction_bits(layout, parties):
    """Per entry, the most fractional bits with which the sum of so many values is exact."""
    bounds = np.concatenate([np.full(size, max(abs(lo), abs(hi))) for _, size, lo, hi in layout])
    return FLOAT_BITS - np.ceil(np.log2(parties * bounds + 1))


def quantised_sum(layout, vectors):
    """Sum of vectors, each rounded to its fixed-point grid."""
    scale = np.exp2(fraction_bits(layout, len(vectors)))
    return sum(np.rint(vector * scale) for vector in vectors) / scale


@st.composite
def runs(draw):
    """A rule, and who takes part with which rewards in 2..5 steps."""
    spec = AggregationSpec(
        kind=draw(st.sampled_from(["average", "appa", "appa", "appa"])),
        variant=draw(st.sampled_from(["weighted", "paper"])),
        tau=draw(st.sampled_from([0.0, 0.95, 0.99, 1.0])),
        temperature=draw(st.sampled_from([0.05, 0.1, 1.0])),
        a=draw(st.sampled_from([-8.0, -1.0, 0.0, 1e-6, 1.0, 8.0])),
        fi=draw(st.sampled_from(["cov2", "cov"])),
        fi_scope=draw(st.sampled_from(["question", "batch"])),
        h0=draw(st.sampled_from([None, 0.5])),
    )
    roster, batch = draw(st.integers(2, 9)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    steps = []
    for _ in range(draw(st.integers(2, 5))):
        spread = draw(st.sampled_from([0.02, 0.2, 1.0]))
        r = np.clip(0.7 + spread * rng.standard_normal((roster, batch)), 0, 1)
        full = draw(st.booleans())
        present = np.arange(roster) if full else np.flatnonzero(rng.random(roster) < 0.7)
        steps.append((r, present if len(present) else np.array([0])))
    return spec, roster, steps


@settings(max_examples=150, deadline=None)
@given(runs())
def test_every_step_of_a_run_equals_the_clear_form(run):
    spec, roster, steps = run
    histories = [None] * roster  # each group's own
    clear = np.full(roster, np.nan)  # the reference server's
    z = z_clear = None
    for r, present in steps:
        layout = segments(spec, r.shape[1])
        vectors = []
        for g in present:
            vector, after = contribution(spec, r[g], histories[g], z, roster)
            histories[g] = after
            vectors.append(vector)
        result = combine(spec, quantised_sum(layout, vectors), r.shape[1], len(present))
        expected, after, alpha = combine_clear(spec, r[present], clear[present], z_clear, roster)
        clear[present] = after
        z, z_clear = result.z_next, expected.z_next

        # The stated bound of Z, which the weights inherit, and the logarithm's slope at a = -8.
        bits = fraction_bits(layout, roster).min()
        weights = 2.0 ** -(bits + 1) * math.exp(1 / spec.temperature) if spec.kind == "appa" else 0.0
        tolerance = 1e-12 + 2 * 2.0**-bits * math.exp(max(-spec.a, 0)) + 2 * weights
        assert result.fi == pytest.approx(expected.fi, abs=1e-6)
        if abs(expected.fi - spec.tau) < 1e-6 or abs(abs(alpha.sum() - 1) - spec.alpha_tolerance) < 5e-7:
            return  # either branch is right here, and the runs may part
        assert result.branch == expected.branch
        np.testing.assert_allclose(result.rewards, expected.rewards, atol=tolerance)
        assert result.h_mean == pytest.approx(expected.h_mean, abs=tolerance)
        assert result.h_jain == pytest.approx(expected.h_jain, abs=tolerance)
        if spec.kind == "appa":
            assert result.z_next == pytest.approx(expected.z_next, rel=1e-9 + 2 * weights)
            assert result.soft_min == pytest.approx(expected.soft_min, abs=tolerance)
            assert result.alpha_sum == pytest.approx(expected.alpha_sum, rel=1e-9 + 2 * weights)
        np.testing.assert_allclose([histories[g] for g in present], after, rtol=0, atol=1e-15)


@settings(max_examples=60, deadline=None)
@given(runs(), st.sampled_from(["min", "max"]), st.floats(0.5, 24))
def test_smooth_min_and_max_keep_their_bound(run, kind, sharpness):
    _, roster, steps = run
    spec = AggregationSpec(kind=kind, sharpness=sharpness)
    for r, present in steps:
        r = r[present]
        vectors = [contribution(spec, row, None, None, roster)[0] for row in r]
        layout = segments(spec, r.shape[1])
        result = combine(spec, quantised_sum(layout, vectors), r.shape[1], len(r))
        bits = fraction_bits(layout, len(r)).min()
        rounding = -math.log1p(-(2.0 ** -(bits + 1))) / sharpness + 1e-12
        bias = math.log(len(r)) / sharpness
        assert rounding < 1e-4
        if kind == "min":
            assert (result.rewards >= r.min(axis=0) - rounding).all()
            assert (result.rewards <= r.min(axis=0) + bias + rounding).all()
        else:
            assert (result.rewards <= r.max(axis=0) + rounding).all()
            assert (result.rewards >= r.max(axis=0) - bias - rounding).all()
        exact, _, _ = combine_clear(spec, r, None)
        assert result.branch == "lse"
        assert exact.branch == kind
        assert result.fi == pytest.approx(exact.fi, abs=1e-9)  # fairness is known under every rule


@given(runs(), st.sampled_from(["average", "min", "max", "appa"]))
def test_every_value_lies_in_the_range_its_segment_promises(run, kind):
    spec, roster, steps = run
    spec = AggregationSpec(kind, spec.variant, spec.tau, spec.temperature, a=spec.a, fi_scope=spec.fi_scope)
    history = z = None
    for r, present in steps:
        layout = segments(spec, r.shape[1])
        low = np.concatenate([np.full(size, lo) for _, size, lo, _ in layout])
        high = np.concatenate([np.full(size, hi) for _, size, _, hi in layout])
        for extreme in (r[0], np.zeros_like(r[0]), np.ones_like(r[0])):
            vector, history = contribution(spec, extreme, history, z, roster)
            assert len(vector) == len(low)
            assert ((vector >= low) & (vector <= high)).all()
        vectors = [contribution(spec, row, None, z, roster)[0] for row in r[present]]
        z = combine(spec, sum(vectors), r.shape[1], len(present)).z_next


def test_layouts_are_as_small_as_the_rule_allows():
    size = lambda **options: sum(entry[1] for entry in segments(AggregationSpec(**options), 64))  # noqa: E731
    assert size(kind="appa") == 3 * 64 + 4
    assert size(kind="appa", fi_scope="batch") == 2 * 64 + 5
    assert size(kind="maximin") == 3 * 64 + 3
    assert size(kind="lse") == 3 * 64 + 2
    assert size(kind="average") == 2 * 64 + 2
    assert size(kind="min", fi_scope="batch") == 2 * 64 + 3
    names = [name for name, *_ in segments(AggregationSpec(), 1)]
    assert names == ["S1", "S2", "E", "Z", "A", "H1", "H2"]


def test_a_dropout_renormalises_weighted_and_sends_paper_to_the_mean():
    r = np.array([[0.2, 0.9], [0.8, 0.4], [0.5, 0.5]])
    h = [0.4, 0.5, 0.6]
    z = sum(math.exp(-x / 0.1) for x in h)
    outcome = {}
    for variant in ("weighted", "paper"):
        spec = AggregationSpec(variant=variant, tau=1.0)
        vectors = [contribution(spec, r[g], h[g], z, 3)[0] for g in (1, 2)]  # group 0 is away
        outcome[variant] = combine(spec, sum(vectors), 2, 2)
    alpha = np.exp(-np.array(h[1:]) / 0.1)
    alpha /= alpha.sum()
    np.testing.assert_allclose(outcome["weighted"].rewards, np.log(alpha @ np.exp(r[1:])), atol=1e-12)
    assert outcome["paper"].branch == "mean"
    np.testing.assert_allclose(outcome["paper"].rewards, r[1:].mean(axis=0))
    assert outcome["paper"].alpha_sum < 0.5


def test_all_zero_rewards_are_fair_and_cost_no_error():
    spec = AggregationSpec()
    vectors = [contribution(spec, np.zeros(3), None, None, 5)[0] for _ in range(5)]
    result = combine(spec, sum(vectors), 3, 5)
    assert (result.fi, result.h_jain, result.h_mean) == (1.0, 1.0, 0.0)
    assert result.rewards.tolist() == [0, 0, 0]


def test_bad_contributions_are_named():
    spec = AggregationSpec()
    good = np.array([0.5, 0.5])
    for args, message in [
        ((spec, np.array([0.5, np.nan]), None, None, 5), r"rewards\[1\] is nan"),
        ((spec, np.array([-0.1]), None, None, 5), r"rewards\[0\] is -0.1"),
        ((spec, np.zeros((2, 2)), None, None, 5), r"vector \(B,\)"),
        ((spec, np.zeros(0), None, None, 5), r"vector \(B,\)"),
        ((spec, good, 1.5, None, 5), "history"),
        ((AggregationSpec(variant="paper"), good, 0.5, 99.0, 5), "z=99"),
        ((spec, good, None, None, 0), "groups"),
    ]:
        with pytest.raises(ValueError, match=message):
            contribution(*args)


def test_impossible_sums_are_named():
    spec = AggregationSpec()
    sums = sum(contribution(spec, np.array([0.5, 0.7]), None, None, 5)[0] for _ in range(5))
    combine(spec, sums, 2, 5)
    for at, value, message in [
        (0, 5.1, "S1"),
        (1, -0.1, "S1"),
        (3, np.nan, "S2"),
        (6, 0.0, "Z"),
        (7, 5.2, "A"),
    ]:
        wrong = sums.copy()
        wrong[at] = value
        with pytest.raises(ValueError, match=f"segment {message}"):
            combine(spec, wrong, 2, 5)
    with pytest.raises(ValueError, match=r"shape \(10,\)"):
        combine(spec, sums[:-1], 2, 5)
    with pytest.raises(ValueError, match="groups"):
        combine(spec, sums, 2, 0)
    with pytest.raises(ValueError, match="at least one rollout"):
        segments(spec, 0)


def test_weighted_takes_nothing_from_the_coordinators_normaliser():
    """Scaling all weights at will would let a coordinator read single groups' rewards off the sums."""
    rewards = np.array([0.2, 0.7])
    honest, _ = contribution(AggregationSpec(), rewards, 0.8, 0.01, 8)
    for lie in (1e-6, 0.5, 7.0, 1e6):
        np.testing.assert_array_equal(contribution(AggregationSpec(), rewards, 0.8, lie, 8)[0], honest)
