"""Sensitivity by brute force: every data set of a small world, every neighbour of it, the longest move."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appa_secure.data import GroupData, Question, Responses
from appa_secure.data.survey import counts_of
from appa_secure.errors import DataError
from appa_secure.predictor import PreferencePredictor, flatten, unflatten
from appa_secure.privacy import sensitivity
from appa_secure.privacy.noise import sampler
from clients.context import _bounded_counts
from clients.sampling import bounded_answers
from clients.training import LocalTrainer
from tests.clients.world import KEY, SHAPE, make_embeddings, make_plan

QUESTIONS = tuple(Question(f"q{i}", f"Question {i}?", ("no", "yes"), (0, 1)) for i in range(3))
QIDS = [q.qid for q in QUESTIONS]
SIZES = dict.fromkeys(QIDS, 2)
PEOPLE = 2
# What one person can have answered: no, yes or nothing to each of three questions.
ANSWERS = list(itertools.product((None, 0, 1), repeat=3))


def group(answers: tuple[tuple[int | None, ...], ...]) -> GroupData:
    rows = [(p, q, a) for p, given in enumerate(answers) for q, a in enumerate(given) if a is not None]
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    responses = Responses(*columns)
    return GroupData("g", counts_of(QUESTIONS, responses, "g"), responses=responses)


def released(data: GroupData, unit: str, bound: int, key: bytes = KEY) -> np.ndarray:
    asked = {q: k for q, k in SIZES.items() if data.has(q)} if unit == "record" else SIZES
    counts = _bounded_counts(data, asked, unit, bound, key, QIDS)
    return np.concatenate([counts.get(q, np.zeros(2)) for q in QIDS])


def test_histograms_response() -> None:
    moves = []
    for world in itertools.product(ANSWERS, repeat=PEOPLE):
        whole = released(group(world), "response", 1)
        for p, q in itertools.product(range(PEOPLE), range(3)):
            if world[p][q] is not None:
                less = [list(person) for person in world]
                less[p][q] = None
                moves.append(np.linalg.norm(whole - released(group(tuple(map(tuple, less))), "response", 1)))
    assert max(moves) == sensitivity.histograms("response", 1) == 1.0


@pytest.mark.parametrize("bound", [1, 2, 3])
def test_histograms_respondent(bound: int) -> None:
    """Given the others' selection, removing a person takes away what was selected of that person and nothing else.

    The selection is drawn from the secret key, independently per person; a mixture over it keeps the guarantee.
    """
    moves = []
    for world in itertools.product(ANSWERS, repeat=PEOPLE):
        data = group(world)
        alone = [
            released(
                group(tuple(a if i == p else (None,) * 3 for i, a in enumerate(world))), "respondent", bound
            )
            for p in range(PEOPLE)
        ]
        for p, mine in enumerate(alone):
            assert mine.sum() == min(bound, sum(a is not None for a in world[p]))
            assert mine.max(initial=0.0) <= 1.0  # one person, one question: one count
            moves.append(np.linalg.norm(mine))
        assert released(data, "respondent", bound).sum() == sum(one.sum() for one in alone)
    assert max(moves) == pytest.approx(sensitivity.histograms("respondent", bound))
    assert sensitivity.histograms("respondent", bound) == math.sqrt(bound)


def test_histograms_record() -> None:
    """Add/remove one question's distribution; a question without answers counts as not asked."""
    moves = []
    for world in itertools.product(ANSWERS, repeat=PEOPLE):
        whole = released(group(world), "record", 1)
        for q in range(3):
            less = tuple(tuple(None if i == q else a for i, a in enumerate(person)) for person in world)
            moves.append(np.linalg.norm(whole - released(group(less), "record", 1)))
    assert max(moves) == pytest.approx(sensitivity.histograms("record", 1))


def test_the_same_question_twice_is_no_data_set() -> None:
    with pytest.raises(DataError, match="twice"):
        Responses(np.array([7, 7]), np.array([1, 1]), np.array([0, 1]))


@pytest.mark.parametrize("bound", [1, 2])
def test_a_person_in_context_and_training_is_bounded_in_each_and_pays_for_both(bound: int) -> None:
    """Respondents: q0 is context, q1 and q2 train. dpsgd: two mechanisms, each bounded, both on the bill. histogram: one."""
    plan = make_plan(QIDS[1:], QIDS[:1], unit="respondent", answers_per_unit=bound, questions_per_step=1)
    for answered in itertools.product((0, 1), repeat=3):
        data = group((answered, answered))
        context = _bounded_counts(data, {"q0": 2}, "respondent", bound, KEY, QIDS)["q0"]
        training = bounded_answers(data, plan, QIDS, KEY)
        assert context.sum() == 2  # each of the two people once
        assert {len(rows) for rows in training.values()} == {bound}
        assert all(q != "q0" for rows in training.values() for q, _ in rows)
        assert (
            released(data, "respondent", bound).sum() == 2 * bound
        )  # one bound over context and training together
    # A response or a record is in one step per pass; a person with answers everywhere is in every step, and so charged.
    assert [plan.participations(r) for r in (1, 2, 3)] == [1, 2, 3]
    assert [replace(plan, unit="response").participations(r) for r in (1, 2, 3)] == [1, 1, 2]


MODEL = PreferencePredictor(SHAPE)
EMBEDDINGS = make_embeddings(QUESTIONS)
CONTEXT = {"q0": np.array([0.3, 0.7])}
CLIP = 0.2
World = tuple[tuple[int | None, ...], ...]


@cache
def total(world: World, unit: str) -> np.ndarray:
    """Sum of clipped gradients (P,) of a step that draws every unit of `world`."""
    plan = make_plan(
        QIDS[1:], QIDS[:1], unit=unit, answers_per_unit=3, clip=CLIP, sample_rate=1.0, questions_per_step=2
    )
    trainer = LocalTrainer(plan, group(world), EMBEDDINGS, CONTEXT, 5.0, QIDS, KEY)
    asked = [q for q in QIDS[1:] if q in trainer.counts]
    return trainer._clipped_sum(MODEL, asked, trainer._sample(asked, sampler(KEY, "all")))


def neighbours(world: World, unit: str) -> list[World]:
    """Every data set with one unit less."""
    people = range(len(world))

    def without(gone: Callable[[int, int], bool]) -> World:
        return tuple(tuple(None if gone(p, q) else a for q, a in enumerate(world[p])) for p in people)

    if unit == "respondent":
        return [without(lambda p, q, out=out: p == out) for out in people]  # type: ignore[misc]
    if unit == "record":
        # A record is a distribution of its own: what changes it is that nobody answered, not that one person did not.
        return [without(lambda p, q, out=out: q == out) for out in (1, 2)]  # type: ignore[misc]
    return [
        without(lambda p, q, out=(one, two): (p, q) == out)  # type: ignore[misc]
        for one in people
        for two in (1, 2)
        if world[one][two] is not None
    ]


@pytest.mark.parametrize("unit", ["response", "respondent", "record"])
def test_no_unit_moves_a_step_by_more_than_the_clipping_norm(unit: str) -> None:
    """All data sets of two people who answer any of the two training questions, and every neighbour of each."""
    moves = []
    for mine, yours in itertools.combinations_with_replacement(itertools.product((None, 0, 1), repeat=2), 2):
        world = ((0, *mine), (1, *yours))
        moves += [np.linalg.norm(total(world, unit) - total(less, unit)) for less in neighbours(world, unit)]
    assert max(moves) <= sensitivity.gradient_sum(CLIP) * (1 + 1e-4)
    assert max(moves) > 0.9 * CLIP  # the bound is used, so the test would see a missing clip


@settings(max_examples=12, deadline=None)
@given(
    world=st.lists(st.tuples(*[st.sampled_from((None, 0, 1))] * 3), min_size=1, max_size=6).map(tuple),
    unit=st.sampled_from(("response", "respondent", "record")),
    size=st.sampled_from((0.1, 1.0, 10.0)),
    seed=st.integers(0, 5),
)
def test_no_unit_moves_a_step_under_any_parameters(world: World, unit: str, size: float, seed: int) -> None:
    """The coordinator chooses the parameters."""
    rng, start = np.random.default_rng(seed), flatten(MODEL)
    try:
        unflatten(MODEL, (size * rng.standard_normal(len(start))).astype(np.float32))
        whole = total.__wrapped__(world, unit)
        for less in neighbours(world, unit):
            move = np.linalg.norm(whole - total.__wrapped__(less, unit))
            assert move <= sensitivity.gradient_sum(CLIP) * (
                1 + 1e-3
            )  # the others' float32 sums round differently
    finally:
        unflatten(MODEL, start)
