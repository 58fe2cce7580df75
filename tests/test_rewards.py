"""Rewards against scalar oracles: scipy where it has one, else plain loops over the definition."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import kendalltau, wasserstein_distance

from appa_secure.rewards import (
    KINDS,
    KL_SMOOTHING,
    Scorer,
    fairness_index,
    score,
    task_of,
)
from appa_secure.tasks import TASKS


def oracle(kind, answer, target, ordinals):
    """One reward by its definition, unpadded."""
    count = len(answer)
    if kind == "js":
        return 1 - jensenshannon(answer, target, base=2) ** 2
    if kind == "wasserstein":
        return 1 - wasserstein_distance(ordinals, ordinals, answer, target) / (ordinals[-1] - ordinals[0])
    if kind == "cosine":
        return float(np.dot(answer, target) / math.sqrt(np.dot(answer, answer) * np.dot(target, target)))
    if kind == "kl":
        p, q = ((1 - KL_SMOOTHING) * x + KL_SMOOTHING / count for x in (answer, target))
        return math.exp(-sum(q[k] * math.log(q[k] / p[k]) for k in range(count)))
    if kind == "borda":
        points = [sum((a > b) + 0.5 * (a == b) for b in answer) - 0.5 for a in answer]
        orders = itertools.permutations(range(count))
        best = max(sum(b * q for b, q in zip(order, target, strict=True)) for order in orders)
        return sum(b * q for b, q in zip(points, target, strict=True)) / best
    if kind == "kendall":
        tau = kendalltau(answer, target).statistic
        return 0.5 if math.isnan(tau) else 0.5 * (1 + tau)
    if kind == "binary":
        return float(target[int(np.argmax(answer))] == max(target))
    assert kind == "choice"
    return target[answer.tolist().index(1.0)]


@st.composite
def cases(draw):
    """A kind and a handful of (answer, target, ordinals) with 2..5 options, zeros and ties included."""
    kind = draw(st.sampled_from(KINDS))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        count = draw(st.integers(2, 5))
        weights = st.lists(st.integers(0, 10), min_size=count, max_size=count).filter(any)
        target = np.array(draw(weights), dtype=float)
        if task_of(kind) == "dpa":
            answer = np.array(draw(weights), dtype=float)
            answer /= answer.sum()
        elif task_of(kind) == "opa":
            answer = np.array(draw(st.permutations(range(count))), dtype=float) / (count - 1)
        else:
            answer = np.eye(count)[draw(st.integers(0, count - 1))]
        steps = draw(st.lists(st.floats(0.1, 3), min_size=count - 1, max_size=count - 1))
        rows.append(
            (answer, target / target.sum(), np.concatenate([[draw(st.floats(-3, 3))], steps]).cumsum())
        )
    return kind, rows


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(0, 2))
def test_rewards_equal_their_definitions_with_and_without_padding(case, extra):
    kind, rows = case
    width = max(len(answer) for answer, _, _ in rows) + extra
    pad = lambda values, fill: np.concatenate([values, np.full(width - len(values), fill)])  # noqa: E731
    expected = [oracle(kind, *row) for row in rows]
    batch = score(
        kind,
        np.array([pad(answer, np.nan) for answer, _, _ in rows]),  # padding is never read
        np.array([pad(target, np.nan) for _, target, _ in rows]),
        np.array([pad(ordinals, np.nan) for _, _, ordinals in rows]),
        np.array([pad(np.ones(len(answer)), 0) for answer, _, _ in rows], dtype=bool),
    )
    np.testing.assert_allclose(batch, expected, atol=1e-9)
    assert ((batch >= 0) & (batch <= 1)).all()

    names = [f"q{index}" for index in range(len(rows))]
    scorer = Scorer(kind, {n: row[1] for n, row in zip(names, rows, strict=True)},
                    {n: row[2] for n, row in zip(names, rows, strict=True)})  # fmt: skip
    order = [*reversed(names), names[0]]
    answers = [*(row[0] for row in reversed(rows)), None]
    fast = scorer.score(order, answers)
    np.testing.assert_array_equal(fast[:-1], batch[::-1])
    assert np.isnan(fast[-1])


@given(cases())
def test_a_perfect_answer_earns_one(case):
    kind, rows = case
    for _, target, ordinals in rows:
        if task_of(kind) == "choice":
            continue
        reward = score(kind, target[None], target[None], ordinals[None])
        flat = kind == "kendall" and len(set(target)) == 1
        assert reward == pytest.approx(0.5 if flat else 1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_fairness_index_is_jains_index_in_square_form(values):
    values = np.array(values)
    squared, plain = fairness_index(values), fairness_index(values, fi="cov")
    if values.max() < 1e-100:  # squares would underflow in the oracle
        return
    assert squared == pytest.approx(values.sum() ** 2 / (len(values) * (values**2).sum()))
    assert plain == pytest.approx(1 / (1 + values.std() / values.mean()))
    assert 0 < squared <= 1
    assert 0 < plain <= 1


def test_fairness_index_of_equal_and_of_zero_scores_is_one():
    assert fairness_index(np.full(8, 0.37)) == pytest.approx(1)
    assert fairness_index(np.zeros(3), fi="cov") == 1


def test_every_kind_belongs_to_a_task():
    assert {task_of(kind) for kind in KINDS} == set(TASKS)


def test_scoring_a_batch_takes_less_than_two_milliseconds():
    rng = np.random.default_rng(0)
    targets = {f"q{index}": rng.dirichlet(np.ones(int(rng.integers(2, 11)))) for index in range(400)}
    ordinals = {qid: tuple(range(len(target))) for qid, target in targets.items()}
    qids = [f"q{index}" for index in rng.integers(400, size=256)]
    for kind in ("wasserstein", "js", "kendall"):
        scorer = Scorer(kind, targets, ordinals)
        answers = [rng.dirichlet(np.ones(len(targets[qid]))) for qid in qids]
        times = []
        for _ in range(10):
            start = time.perf_counter()
            scorer.score(qids, answers)
            times.append(time.perf_counter() - start)
        assert min(times) < 2e-3


P = np.array([[0.5, 0.5]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score("rank", P, P), "reward 'rank' is unknown"),
        (lambda: score("js", P, np.ones((1, 3)) / 3), "must both be"),
        (lambda: score("js", P * 2, P), "answers must be distributions"),
        (lambda: score("js", np.array([[np.nan, 1]]), P), "answers must be finite"),
        (lambda: score("js", P, np.array([[-0.1, 1.1]])), "targets must be distributions"),
        (lambda: score("borda", np.array([[np.inf, 1]]), P), "answers must be finite"),
        (lambda: score("js", P, P, mask=np.array([[True, False]])), "mask must be"),
        (lambda: score("wasserstein", P, P), "needs ordinals"),
        (lambda: score("wasserstein", P, P, np.array([[1, 1]])), "row 0"),
        (lambda: Scorer("wasserstein", {"trust": P[0]}), "question 'trust' has none"),
        (lambda: Scorer("wasserstein", {"trust": P[0]}, {"trust": None}), "question 'trust' has none"),
        (lambda: Scorer("wasserstein", {"trust": P[0]}, {"trust": (2, 1)}), "question 'trust' must be"),
        (lambda: Scorer("wasserstein", {"trust": P[0]}, {"trust": (2, 3, 4)}), "3 ordinals for 2 options"),
        (lambda: Scorer("js", {"trust": P[0] * 3}), "question 'trust' must be distributions"),
        (lambda: Scorer("js", {"trust": P}), "question 'trust' must be a vector"),
        (lambda: Scorer("js", {"a": P[0]}).score(["b"], [P[0]]), "'b' has no target"),
        (lambda: Scorer("js", {"a": P[0]}).score(["a"], [np.ones(3)]), "answer 0 has 3 values"),
        (lambda: Scorer("js", {"a": P[0]}).score(["a"], []), "1 question ids for 0 answers"),
        (lambda: Scorer("js", {"a": P[0]}).score(["a"], [P[0] * np.nan]), "answers must be finite"),
        (lambda: fairness_index([]), "non-empty"),
        (lambda: fairness_index([0.5, -0.1]), "non-empty"),
        (lambda: fairness_index([0.5], fi="gini"), r"aggregation\.fi 'gini'"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_empty_and_all_malformed_batches():
    scorer = Scorer("js", {"a": P[0]})
    assert scorer.score([], []).shape == (0,)
    assert np.isnan(scorer.score(["a", "a"], [None, None])).all()
