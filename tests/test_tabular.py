"""The policy without a model: its answers parse, its gradients are those of their laws, and it finds known optima."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from appa_secure.data import Question
from appa_secure.rewards import Scorer, task_of
from appa_secure.tabular import DECAY, TabularPolicy, schedule, simplex
from appa_secure.tasks import parse

QUESTIONS = {
    f"q{k}": Question(f"q{k}", "?", tuple(f"o{i}" for i in range(k)), tuple(range(k))) for k in (2, 3, 5)
}


@pytest.mark.parametrize("task", ["dpa", "opa", "choice"])
@pytest.mark.parametrize("samples", [1, 2, 4])
def test_every_answer_is_read_as_it_was_meant(task, samples):
    policy = TabularPolicy(QUESTIONS, task, 1000)
    texts, answers = policy.draw(list(QUESTIONS), samples, 0.3, np.random.default_rng(1))
    assert len(texts) == len(answers) == 3 * samples
    for qid, text, answer in zip(np.repeat(list(QUESTIONS), samples), texts, answers, strict=True):
        np.testing.assert_allclose(parse(text, QUESTIONS[qid], task, 1000), answer)


def test_an_answer_as_fine_as_a_language_models_is_refused_beyond_its_weights():
    assert parse("1000 3", QUESTIONS["q2"], "dpa") is None
    assert parse("1001 3", QUESTIONS["q2"], "dpa", 1000) is None
    for text in ("01 3", "+1 3", "1.0 3", "\u0661 3", "10000 1"):
        assert parse(text, QUESTIONS["q2"], "dpa", 1000) is None
    np.testing.assert_allclose(parse("1000 0", QUESTIONS["q2"], "dpa", 1000), [1, 0])


@given(hnp.arrays(np.float64, (3, 4), elements=st.floats(-3, 3)), st.integers(2, 4))
def test_the_projection_is_a_distribution_and_no_other_is_nearer(values, count):
    mask = np.broadcast_to(np.arange(4) < count, values.shape)
    found = simplex(values, mask)
    assert (found >= 0).all()
    assert (found[~mask] == 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1)
    grid = [np.array([*c, *[0] * (4 - count)]) / 10 for c in _compositions(10, count)]
    for row, best in zip(np.where(mask, values, 0.0), found, strict=True):
        assert min(np.linalg.norm(row - g) for g in grid) >= np.linalg.norm(row - best) - 1e-9


def _compositions(total, parts):
    return [c for c in itertools.product(range(total + 1), repeat=parts) if sum(c) == total]


@pytest.mark.parametrize("task", ["opa", "choice"])
def test_score_functions_are_the_gradients_of_the_laws(task):
    policy = TabularPolicy({"q3": QUESTIONS["q3"]}, task, 10)
    policy.values[:] = [[0.4, -0.7, 0.1]]

    def log_probability(values, order):
        odds, left, total = np.exp(values), list(order), 0.0
        for option in order[:1] if task == "choice" else order:
            total += math.log(odds[option] / odds[left].sum())
            left.remove(option)
        return total

    for order in itertools.permutations(range(3)):
        found = policy._score_function(np.array([0]), np.array([[order]]))[0, 0]
        for k in range(3):
            up, down = policy.values[0].copy(), policy.values[0].copy()
            up[k] += 1e-5
            down[k] -= 1e-5
            slope = (log_probability(up, order) - log_probability(down, order)) / 2e-5
            assert found[k] == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "step_size"), [("wasserstein", 0.1), ("js", 0.1), ("borda", 20.0), ("choice", 20.0)]
)
def test_it_finds_the_best_answer_to_one_group(kind, step_size):
    rng = np.random.default_rng(3)
    target = {q: rng.dirichlet(np.full(len(x.options), 0.8)) for q, x in QUESTIONS.items()}
    scorer = Scorer(kind, target, {q: x.ordinals for q, x in QUESTIONS.items()})
    policy, qids, steps = TabularPolicy(QUESTIONS, task_of(kind), 1000), list(QUESTIONS), 200
    asked = [q for q in qids for _ in range(4)]
    for step in range(1, steps + 1):
        factor = schedule(step, steps)
        _, answers = policy.draw(qids, 4, 0.05 * factor, np.random.default_rng(step))
        rewards = scorer.score(asked, answers)
        policy.update(rewards.tolist(), step_size * factor)
    best = {"choice": np.mean([p.max() for p in target.values()])}.get(kind, 1.0)
    assert rewards.mean() > best - 0.02


def test_an_unscored_answer_teaches_nothing_and_a_lone_one_has_no_baseline():
    policy = TabularPolicy(QUESTIONS, "dpa", 1000)
    before = policy.values.copy()
    policy.draw(["q3"], 2, 0.1, np.random.default_rng(1))
    policy.update([None, None], 0.5)
    policy.draw(["q3"], 2, 0.1, np.random.default_rng(1))
    policy.update([0.9, None], 0.5)
    np.testing.assert_allclose(policy.values, before, atol=1e-15)


def test_the_schedule_falls_from_one_to_its_end():
    assert schedule(1, 300) == 1
    assert schedule(300, 300) == pytest.approx(DECAY)
    assert schedule(1, 1) == 1
