"""Sensitivity by brute force: every data set of a small world, every neighbour of it, the longest move."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from appa_secure.data import GroupData, Question, Responses
from appa_secure.data.survey import counts_of
from appa_secure.errors import DataError
from appa_secure.privacy import sensitivity
from clients.context import _bounded_counts
from tests.clients.world import KEY

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
