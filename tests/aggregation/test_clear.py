"""The clear form against slow loops over the formulas of APPA (arXiv 2604.04261)."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from appa_secure.aggregation import AggregationSpec, combine_clear

rewards = hnp.arrays(np.float64, st.tuples(st.integers(1, 7), st.integers(1, 5)), elements=st.floats(0, 1))


def fairness(columns, form):
    """Mean over columns of 1/(1 + CoV²) or 1/(1 + CoV), one loop per definition."""
    total = 0.0
    for column in columns:
        mean = sum(column) / len(column)
        if mean == 0:
            total += 1.0
            continue
        cov = math.sqrt(sum(((value - mean) / mean) ** 2 for value in column) / len(column))
        total += 1 / (1 + (cov**2 if form == "cov2" else cov))
    return total / len(columns)


def reverse_softmax(histories, temperature):
    terms = [math.exp((1 - h) / temperature) for h in histories]
    return [term / sum(terms) for term in terms]


@given(rewards, st.sampled_from(["cov2", "cov"]), st.sampled_from(["question", "batch"]), st.data())
def test_both_variants_equal_the_formulas(r, form, scope, data):
    groups, batch = r.shape
    h = data.draw(hnp.arrays(np.float64, groups, elements=st.floats(0, 1)))
    tau = data.draw(st.sampled_from([0.0, 0.7, 1.0]))
    a = data.draw(st.sampled_from([-4.0, 0.5, 1.0, 8.0]))
    columns = r.T.tolist() if scope == "question" else [r.mean(axis=1).tolist()]
    fi = fairness(columns, form)
    if abs(fi - tau) < 1e-7:  # which side rounding falls on is no property of the rule
        return
    alpha = reverse_softmax(h, 0.1)
    for variant in ("paper", "weighted"):
        spec = AggregationSpec(variant=variant, a=a, tau=tau, fi=form, fi_scope=scope)
        result, after, used = combine_clear(spec, r, h)
        expected = []
        for i in range(batch):
            if fi >= tau:
                expected.append(sum(r[g, i] for g in range(groups)) / groups)
            elif variant == "paper":
                expected.append(math.log(sum(math.exp(alpha[g] * r[g, i]) for g in range(groups)) / groups))
            else:
                expected.append(math.log(sum(alpha[g] * math.exp(a * r[g, i]) for g in range(groups))) / a)
        np.testing.assert_allclose(result.rewards, expected, atol=1e-12)
        assert result.branch == ("mean" if fi >= tau else "lse")
        assert result.fi == pytest.approx(fi, abs=1e-9)
        np.testing.assert_allclose(used, alpha, rtol=1e-9)
        np.testing.assert_allclose(after, 0.8 * h + 0.2 * r.mean(axis=1), atol=1e-12)
        assert result.z_next == pytest.approx(sum(math.exp(-x / 0.1) for x in after))
        assert after.min() - 1e-9 <= result.soft_min <= after.mean() + 1e-9


@given(rewards, st.floats(-16, 16), st.data())
def test_weighted_stays_between_the_groups_rewards(r, a, data):
    h = data.draw(hnp.arrays(np.float64, len(r), elements=st.floats(0, 1)))
    result, _, _ = combine_clear(AggregationSpec(a=a, tau=1.0), r, h)
    assert (result.rewards >= r.min(axis=0) - 1e-9).all()
    assert (result.rewards <= r.max(axis=0) + 1e-9).all()


@given(rewards, st.sampled_from([1e-3, -1e-3, 1e-8, -1e-8, 1e-300]), st.data())
def test_weighted_tends_to_the_weighted_mean(r, a, data):
    h = data.draw(hnp.arrays(np.float64, len(r), elements=st.floats(0, 1)))
    small, _, alpha = combine_clear(AggregationSpec(a=a, tau=1.0), r, h)
    zero, _, _ = combine_clear(AggregationSpec(a=0.0, tau=1.0), r, h)
    if zero.branch == "lse":
        np.testing.assert_allclose(zero.rewards, alpha @ r, atol=1e-12)
    np.testing.assert_allclose(small.rewards, zero.rewards, atol=abs(a) + 1e-12)


@given(rewards, st.floats(0, 1))
def test_uniform_weights_agree_with_the_mean_to_second_order(r, h):
    spread = 0.5 + 0.01 * (r - 0.5)
    result, _, _ = combine_clear(AggregationSpec(tau=1.0), spread, np.full(len(r), h))
    np.testing.assert_allclose(result.rewards, spread.mean(axis=0), atol=0.01**2 / 8 + 1e-9)


@given(rewards)
def test_average_min_and_max(r):
    for kind, expected in (("average", r.mean(axis=0)), ("min", r.min(axis=0)), ("max", r.max(axis=0))):
        result, after, _ = combine_clear(AggregationSpec(kind=kind), r, None)
        np.testing.assert_allclose(result.rewards, expected, atol=1e-12)
        np.testing.assert_allclose(after, r.mean(axis=1))  # the first mean is the first history
        assert (result.z_next, result.soft_min, result.alpha_sum) == (None, None, None)
        assert result.h_mean == pytest.approx(after.mean())


def test_the_published_formula_drops_by_the_number_of_groups_at_the_switch():
    """The defect that made `weighted` the default: 0.83 becomes about 0.83/8."""
    r = np.full((8, 1), 0.83)
    r[0] = 0.8299
    above, _, _ = combine_clear(AggregationSpec(variant="paper", tau=0.9), r, np.full(8, 0.8))
    below, _, _ = combine_clear(AggregationSpec(variant="paper", tau=1.0), r, np.full(8, 0.8))
    ours, _, _ = combine_clear(AggregationSpec(variant="weighted", tau=1.0), r, np.full(8, 0.8))
    assert above.rewards[0] == pytest.approx(0.83, abs=1e-4)
    assert below.rewards[0] == pytest.approx(0.104, abs=1e-3)
    assert ours.rewards[0] == pytest.approx(0.83, abs=1e-4)


def test_first_step_is_uniform_and_h0_is_an_option():
    r = np.array([[0.2], [0.6]])
    _, after, alpha = combine_clear(AggregationSpec(), r, None)
    assert alpha.tolist() == [0.5, 0.5]
    assert after.tolist() == [0.2, 0.6]
    _, after, alpha = combine_clear(AggregationSpec(h0=1.0), r, None)
    assert alpha.tolist() == [0.5, 0.5]
    assert after == pytest.approx([0.84, 0.92])


def test_without_the_published_normaliser_a_dropout_renormalises_by_itself():
    """A server that holds the histories normalises over who is present; `paper` then needs no fallback."""
    r = np.array([[0.2], [0.9]])
    known, _, alpha = combine_clear(AggregationSpec(variant="paper", tau=1.0), r, np.array([0.5, 0.6]))
    assert alpha.sum() == pytest.approx(1)
    assert known.branch == "lse"
    blind_like, _, alpha = combine_clear(
        AggregationSpec(variant="paper", tau=1.0), r, np.array([0.5, 0.6]), z_prev=0.05, roster=3
    )
    assert alpha.sum() < 1
    assert blind_like.branch == "mean"


@pytest.mark.parametrize(
    ("r", "h", "roster", "message"),
    [
        (np.zeros(3), None, None, r"\(G, B\)"),
        (np.zeros((0, 3)), None, None, r"\(G, B\)"),
        (np.array([[0.5, 1.5]]), None, None, r"rewards\[0, 1\] is 1.5"),
        (np.array([[0.5, np.nan]]), None, None, r"rewards\[0, 1\] is nan"),
        (np.zeros((2, 1)), np.zeros(3), None, "h_prev"),
        (np.zeros((2, 1)), np.array([0.5, 2.0]), None, "history"),
        (np.zeros((2, 1)), None, 1, "roster=1"),
    ],
)
def test_bad_input_is_named(r, h, roster, message):
    with pytest.raises(ValueError, match=message):
        combine_clear(AggregationSpec(), r, h, roster=roster)
