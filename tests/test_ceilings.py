"""Ceilings against brute force on small games, and against the published table on the dense benchmark."""

import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from appa_secure.ceilings import _maximin, ceiling, frontier, group_distributions, share_of_gain
from appa_secure.ceilings.answers import Answers
from appa_secure.ceilings.listed import Listed, Orders
from appa_secure.config import compose
from appa_secure.data import GroupData, Question, Survey, load
from appa_secure.errors import DataError
from appa_secure.rewards import KINDS, score, task_of

DPA = [kind for kind in KINDS if task_of(kind) == "dpa"]
LISTED = [kind for kind in KINDS if task_of(kind) != "dpa"]


def game(seed, sizes, groups):
    """Questions with uneven ordinals, and random distributions with some options nobody chose."""
    rng = np.random.default_rng(seed)
    questions, truth = [], {}
    for index, count in enumerate(sizes):
        options = tuple(f"o{k}" for k in range(count))
        ordinals = tuple(np.cumsum(rng.uniform(0.2, 2, count)))
        questions.append(Question(f"q{index}", "?", options, ordinals))
        weights = rng.dirichlet(np.full(count, 0.7), size=groups)
        weights[rng.random(weights.shape) < 0.15] = 0
        weights[:, 0] += 1e-3
        truth[f"q{index}"] = weights / weights.sum(axis=1, keepdims=True)
    return questions, truth


def rewards(kind, question, target, answers):
    """(G, N) rewards of N answers to one question."""
    answers = np.atleast_2d(answers)
    ordinals = np.tile(question.ordinals, (len(answers), 1))
    return np.array([score(kind, answers, np.tile(row, (len(answers), 1)), ordinals) for row in target])


def listed(kind, count):
    """Every option, or every ranking."""
    return np.eye(count) if kind == "choice" else np.array(list(itertools.permutations(range(count))), float)


def simplex(count, parts):
    points = [c for c in itertools.product(range(parts + 1), repeat=count) if sum(c) == parts]
    return np.array(points) / parts


@pytest.mark.parametrize("kind", DPA)
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5))
def test_no_answer_on_a_grid_beats_a_ceiling_of_distributions(kind, seed, groups):
    questions, truth = game(seed, [2, 3], groups)
    result = ceiling(kind, questions, truth)
    tables = [rewards(kind, q, truth[q.qid], simplex(len(q.options), 30)) for q in questions]
    grid_average = np.mean([table.mean(axis=0).max() for table in tables])
    pairs = 0.5 * (tables[0][:, :, None] + tables[1][:, None, :])  # (G, N0, N1)
    grid_maximin = pairs.min(axis=0).max()
    grid_question = np.mean([table.min(axis=0).max() for table in tables])
    grid_pooled = np.mean([table.mean(axis=0).max() for table in tables])
    average, maximin, question_min = result["avg"], result["min"], result["question_min"]
    assert grid_average - 1e-9 <= average["upper"] <= average["avg"] + 1e-5
    assert average["avg"] == pytest.approx(np.mean(average["per_group"]))
    assert grid_maximin - 1e-7 <= maximin["upper"] <= maximin["min"] + 1e-5
    assert maximin["min"] >= average["min"] - 1e-5
    assert maximin["min"] <= grid_maximin + 0.05  # and the grid is not far below: the ceiling is reachable
    assert sum(maximin["weights"]) == pytest.approx(1)
    assert grid_question - 1e-7 <= question_min["upper"] <= question_min["reached"] + 2e-6
    assert question_min["reached"] <= grid_question + 0.05
    assert question_min["min"] >= question_min["reached"] - 1e-7
    pooled = result["pooled"]  # everybody was asked everything
    assert grid_pooled - 1e-9 <= pooled["upper"] <= pooled["reached"] + 1e-5
    assert pooled["avg"] == pytest.approx(average["avg"], abs=1e-5)


def by_descent(kind, question, target):
    """max over answers of the least reward, by scipy's sequential quadratic programming from several starts."""
    count = target.shape[1]

    def slack(x):
        p = np.maximum(x[:-1], 1e-12)
        return rewards(kind, question, target, p / p.sum())[:, 0] - x[-1]

    best = -np.inf
    for start in (target.mean(axis=0), np.full(count, 1 / count), *target):
        p = 0.9 * start + 0.1 / count
        found = minimize(
            lambda x: -x[-1],
            np.append(p, 0.5),
            jac=lambda x: np.append(np.zeros(count), -1.0),
            bounds=[(0, 1)] * (count + 1),
            constraints=[{"type": "ineq", "fun": slack}, {"type": "eq", "fun": lambda x: x[:-1].sum() - 1}],
            method="SLSQP",
            options={"ftol": 1e-12, "maxiter": 300},
        )
        p = np.maximum(found.x[:-1], 0)
        best = max(best, rewards(kind, question, target, p / p.sum()).min())
    return best


@pytest.mark.parametrize("kind", ["js", "kl", "cosine"])
@settings(max_examples=3, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 6))
def test_the_minimum_per_question_is_what_another_solver_finds(kind, seed, groups):
    questions, truth = game(seed, [3, 5], groups)
    found = ceiling(kind, questions, truth)["question_min"]
    expected = np.mean([by_descent(kind, q, truth[q.qid]) for q in questions])
    assert expected - 1e-9 <= found["upper"]
    assert found["reached"] == pytest.approx(expected, abs=2e-4)  # descent stops a little short of a kink
    assert found["upper"] - found["reached"] < 1e-6


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32))
def test_the_linear_program_and_column_generation_agree(seed):
    questions, truth = game(seed, [2, 4, 5, 3], 5)
    program = ceiling("wasserstein", questions, truth)["min"]
    columns = _maximin(Answers("wasserstein", questions, truth))
    assert program["upper"] == pytest.approx(columns["upper"], abs=2e-6)
    assert program["min"] == pytest.approx(program["upper"], abs=1e-6)


@pytest.mark.parametrize("kind", ["wasserstein", "js", "choice"])
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32))
def test_the_frontier_runs_from_the_best_average_to_the_best_worst_group(kind, seed):
    questions, truth = game(seed, [2, 3], 4)
    dials = (0.0, 0.3, 0.8, 1.0)
    points = frontier(kind, questions, truth, dials)
    ends = ceiling(kind, questions, truth)
    assert points[0]["avg"] == pytest.approx(ends["avg"]["avg"], abs=1e-5)
    assert points[-1]["min"] == pytest.approx(ends["min"]["min"], abs=1e-5)
    candidates = simplex if kind != "choice" else (lambda count, _: np.eye(count))
    tables = [rewards(kind, q, truth[q.qid], candidates(len(q.options), 12)) for q in questions]
    pairs = 0.5 * (tables[0][:, :, None] + tables[1][:, None, :])  # (G, N0, N1)
    for point in points:
        d = point["dial"]
        reached = (1 - d) * point["avg"] + d * point["min"]
        assert point["upper"] == pytest.approx(reached, abs=1e-5)
        assert ((1 - d) * pairs.mean(axis=0) + d * pairs.min(axis=0)).max() <= point["upper"] + 1e-7
    averages, worst = [p["avg"] for p in points], [p["min"] for p in points]
    assert all(a >= b - 1e-5 for a, b in itertools.pairwise(averages))
    assert all(a <= b + 1e-5 for a, b in itertools.pairwise(worst))


def test_bad_dials_are_refused():
    questions, truth = game(1, [2], 2)
    with pytest.raises(DataError, match="dials"):
        frontier("js", questions, truth, [1.5])
    with pytest.raises(DataError, match="question"):
        frontier("js", [], {})


def test_share_of_gain_is_one_at_the_best_worst_group_and_unknown_where_there_is_nothing_to_gain():
    assert share_of_gain(0.9108, 0.8977, 0.9108) == pytest.approx(1)
    assert share_of_gain(0.8977, 0.8977, 0.9108) == pytest.approx(0)
    assert share_of_gain(0.8977, 0.9, 0.9) is None


@pytest.mark.parametrize("kind", LISTED)
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5))
def test_listed_answers_against_every_pair_of_answers(kind, seed, groups):
    questions, truth = game(seed, [2, 3], groups)
    result = ceiling(kind, questions, truth)
    tables = [rewards(kind, q, truth[q.qid], listed(kind, len(q.options))) for q in questions]
    pairs = 0.5 * (tables[0][:, :, None] + tables[1][:, None, :])
    assert result["avg"]["avg"] == pytest.approx(pairs.mean(axis=0).max())
    assert result["avg"]["upper"] == pytest.approx(result["avg"]["avg"])
    assert result["min"]["min"] >= pairs.min(axis=0).max() - 1e-6  # mixtures reach at least the best pair
    assert result["min"]["upper"] == pytest.approx(result["min"]["min"], abs=2e-6)
    weights = np.array(result["min"]["weights"])
    assert np.einsum("g,gnm->nm", weights, pairs).max() <= result["min"]["upper"] + 1e-9  # the proof holds
    assert result["question_min"]["upper"] == pytest.approx(np.mean([t.min(axis=0).max() for t in tables]))
    assert result["uniform"]["avg"] == pytest.approx(pairs.mean())
    assert result["pooled"]["reached"] == pytest.approx(result["avg"]["avg"])


def test_binary_disagreement_is_settled_by_a_coin():
    """Two groups with opposite favourites: any single answer leaves one at 0, a fair coin gives both 1/2."""
    result = ceiling("binary", [Question("q", "?", ("a", "b"))], {"q": [[1, 0], [0, 1]]})
    assert result["question_min"]["min"] == 0
    assert result["min"]["min"] == pytest.approx(0.5)
    assert result["min"]["weights"] == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("kind", DPA)
def test_groups_that_agree_reach_one(kind):
    questions, truth = game(3, [3, 5], 1)
    truth = {qid: np.repeat(rows, 4, axis=0) for qid, rows in truth.items()}
    result = ceiling(kind, questions, truth)
    for name in ("avg", "min", "mean"):
        assert result[name]["min"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_counts_only_where_it_has_answers(kind):
    """Two groups asked different questions do not conflict, however far apart their distributions are."""
    questions = [Question(f"q{i}", "?", ("a", "b", "c"), (0, 1, 2)) for i in range(3)]
    gone = [np.nan] * 3
    truth = {"q0": [[0.8, 0.2, 0], gone], "q1": [gone, [0, 0.1, 0.9]], "q2": [gone, [0.2, 0.7, 0.1]]}
    alone = [
        ceiling(kind, [questions[0]], {"q0": truth["q0"][:1]})["avg"]["avg"],
        ceiling(kind, questions[1:], {qid: truth[qid][1:] for qid in ("q1", "q2")})["avg"]["avg"],
    ]
    result = ceiling(kind, questions, truth)
    np.testing.assert_allclose(result["avg"]["per_group"], alone, atol=1e-5)
    assert result["min"]["min"] == pytest.approx(min(alone), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_average_aggregation_counts_every_answered_question_alike(kind):
    """One group was asked both questions, the other one of them: there it counts half in the rule and more in Avg AS."""
    questions = [Question(f"q{i}", "?", ("a", "b"), (0, 1)) for i in range(2)]
    truth = {"q0": [[0.9, 0.1], [0.2, 0.8]], "q1": [[0.7, 0.3], [np.nan, np.nan]]}
    result = ceiling(kind, questions, truth)
    candidates = simplex(2, 400) if task_of(kind) == "dpa" else listed(kind, 2)
    first = rewards(kind, questions[0], np.array(truth["q0"]), candidates)
    second = rewards(kind, questions[1], np.array(truth["q1"][:1]), candidates)
    rule = 0.5 * first.mean(axis=0).max() + 0.5 * second[0].max()
    score_ = 0.5 * (0.5 * first[0] + first[1]).max() + 0.25 * second[0].max()
    assert result["pooled"]["reached"] == pytest.approx(rule, abs=1e-4)
    assert result["avg"]["avg"] == pytest.approx(score_, abs=1e-4)
    assert result["pooled"]["avg"] <= result["avg"]["avg"] + 1e-6


@pytest.mark.parametrize("kind", ["borda", "kendall"])
@settings(max_examples=4, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 5))
def test_long_rankings_equal_looking_through_all_of_them(kind, seed, groups):
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 5, (groups, 7)) + 0.0  # ties among them
    target[:, 0] += 1
    target[0] = 1.0  # a group without preferences
    target /= target.sum(axis=1, keepdims=True)
    found, every = Orders(kind, target), Listed(kind, target, listed(kind, 7))
    weights = rng.random(groups)
    assert weights @ found.best(weights) == pytest.approx(weights @ every.best(weights))
    counted = np.arange(groups) != 1
    expected = every.best_worst(counted)[counted].min()
    assert found.best_worst(counted)[counted].min() == pytest.approx(expected)
    np.testing.assert_allclose(found.uniform(), every.uniform(), atol=1e-12)
    order = rng.permutation(7)
    answer = np.empty(7)
    answer[order] = np.arange(6, -1, -1)
    np.testing.assert_allclose(
        found.rewards(order), score(kind, np.tile(answer, (groups, 1)), target), atol=1e-12
    )


@pytest.mark.parametrize("kind", LISTED)
def test_ceilings_of_ten_options_are_certified(kind):
    """All 3,628,800 rankings are never listed."""
    questions, truth = game(0, [10, 2], 3)
    result = ceiling(kind, questions, truth)
    assert result["min"]["upper"] - result["min"]["min"] < 2e-6
    assert result["question_min"]["reached"] <= result["pooled"]["reached"] + 1e-9
    assert result["uniform"]["avg"] <= result["avg"]["avg"]


def test_errors_name_the_question():
    question = Question("trust", "?", ("a", "b"))
    cases = [
        ("js", [], {}, "at least one question"),
        ("js", [question], {}, "'trust' has no true distributions"),
        ("js", [question], {"trust": [[0.2, 0.3, 0.5]]}, "'trust' have shape"),
        ("js", [question], {"trust": [[0.9, 0.3]]}, "'trust' are negative or do not sum to 1"),
        ("js", [question], {"trust": [[np.nan, np.nan]]}, "no group has answers to question 'trust'"),
        ("js", [question], {"trust": [[1, 0], [np.nan, np.nan]]}, "group number 1 has answers to none"),
        ("wasserstein", [question], {"trust": [[1, 0]]}, "'trust' has none"),
    ]
    for kind, questions, truth, message in cases:
        with pytest.raises(DataError, match=message):
            ceiling(kind, questions, truth)
    other = Question("other", "?", ("a", "b"))
    with pytest.raises(DataError, match="'other' has 1 groups"):
        ceiling("js", [question, other], {"trust": [[1, 0], [0, 1]], "other": [[1, 0]]})


def test_distributions_of_a_survey_keep_order_and_gaps():
    questions = (Question("x", "?", ("a", "b")), Question("y", "?", ("a", "b")))
    first = GroupData("first", {"x": np.array([1.0, 3.0]), "y": np.array([2.0, 2.0])})
    second = GroupData("second", {"x": np.array([0.0, 0.0]), "y": np.array([4.0, 0.0])})
    found = group_distributions(Survey("s", questions, (first, second)), ["y", "x"])
    assert list(found) == ["y", "x"]
    np.testing.assert_array_equal(found["y"], [[0.5, 0.5], [1, 0]])
    np.testing.assert_array_equal(found["x"], [[0.25, 0.75], [np.nan, np.nan]])


@pytest.fixture(scope="module")
def dense(shared):
    groups = ["Democrat", "Republican", "Independent", "White", "Black", "Hispanic", "Male", "Female"]
    survey = load(
        SimpleNamespace(
            kind="opinionqa",
            path=str(shared / "data" / "opinionqa"),
            groups=groups,
            min_responses=30,
            ordinal_only=True,
        ),
        seed=1,
    )
    return survey, group_distributions(survey, [question.qid for question in survey.questions])


def test_wasserstein_on_the_dense_benchmark(dense):
    survey, truth = dense
    assert len(survey.questions) == 380
    start = time.perf_counter()
    result = ceiling("wasserstein", survey.questions, truth)
    assert time.perf_counter() - start < 20
    table = {name: (entry["avg"], entry["min"]) for name, entry in result.items()}
    assert table["uniform"] == pytest.approx((0.8245, 0.7873), abs=1e-3)
    assert table["avg"] == pytest.approx((0.9495, 0.8977), abs=1e-3)
    assert table["mean"] == pytest.approx((0.9483, 0.8917), abs=1e-3)
    assert table["question_min"] == pytest.approx((0.9442, 0.8996), abs=1e-3)
    # Min AS is the design's; of the many answers that reach it, its table shows one with Avg AS .9438 and the
    # second program finds the best.
    assert table["min"] == pytest.approx((0.9478, 0.9108), abs=1e-3)
    assert result["min"]["upper"] == pytest.approx(result["min"]["min"], abs=1e-6)
    weights = dict(zip((group.name for group in survey.groups), result["min"]["weights"], strict=True))
    assert weights["Democrat"] == pytest.approx(0.48, abs=0.04)
    assert weights["Republican"] == pytest.approx(0.51, abs=0.04)


def test_the_frontier_of_the_dense_benchmark_costs_the_average_little(dense):
    survey, truth = dense
    points = frontier("wasserstein", survey.questions, truth, (0.9, 1.0))
    assert [(p["avg"], p["min"]) for p in points] == [
        pytest.approx((0.9481, 0.9107), abs=1e-3), pytest.approx((0.9478, 0.9108), abs=1e-3),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "wasserstein"])
def test_other_rewards_on_the_dense_benchmark_are_certified(dense, kind):
    survey, truth = dense
    result = ceiling(kind, survey.questions, truth)
    assert result["avg"]["upper"] - result["avg"]["avg"] < 1e-5
    assert result["min"]["upper"] - result["min"]["min"] < 1e-5
    assert result["uniform"]["avg"] < result["min"]["avg"] <= result["avg"]["upper"]
    assert result["avg"]["min"] <= result["min"]["min"] + 1e-6
    assert result["question_min"]["upper"] - result["question_min"]["reached"] < 2e-6
    assert result["question_min"]["reached"] <= result["min"]["upper"] + 1e-6
    assert result["pooled"]["avg"] == pytest.approx(result["avg"]["avg"], abs=2e-6)


def test_countries_that_were_asked_different_questions_have_two_averages(shared):
    """On GlobalOpinionQA the average rule's optimum is not the best Avg AS, and its worst country is worse off."""
    overrides = ["experiment=tabular_globalopinionqa", f"data.path={shared}/data/globalopinionqa"]
    survey = load(compose(overrides).data, seed=1)
    assert max(len(q.options) for q in survey.questions) == 10
    truth = group_distributions(survey, [q.qid for q in survey.questions])
    for kind in ("js", "borda"):
        result = ceiling(kind, survey.questions, truth)
        for name in ("pooled", "question_min"):
            assert result[name]["upper"] - result[name]["reached"] < 2e-6
        assert result["min"]["upper"] - result["min"]["min"] < 2e-6
        assert result["avg"]["avg"] - result["pooled"]["avg"] > 5e-4
        assert result["avg"]["min"] - result["pooled"]["min"] > 5e-3
