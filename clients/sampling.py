"""Which examples a DP-SGD step looks at: a secret Poisson sample of privacy units, contribution-bounded beforehand.

Every unit is drawn independently at the plan's rate. Equal answers are drawn together: how many of the m answers of a
cell (question, option) are in the sample is Binomial(m, rate), which is what m independent draws add up to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from appa_secure.data import GroupData
from appa_secure.privacy.noise import sampler
from appa_secure.privacy.plan import TrainingPlan


@dataclass(frozen=True)
class Examples:
    """What one DP-SGD step looks at.

    question: (n,) index into the step's questions; target: (n, K) distribution over options; multiplicity: (U,) how
    often each unit's clipped gradient counts; units: (U, n), rows are privacy units, columns examples, None for the
    identity.
    """

    question: np.ndarray
    target: np.ndarray
    multiplicity: np.ndarray
    units: np.ndarray | None = None


def responses(
    counts: Mapping[str, np.ndarray],
    questions: Sequence[str],
    rate: float,
    width: int,
    rng: np.random.Generator,
) -> Examples:
    """Units are answers. counts: question -> (K,) answers per option."""
    cells = [(i, k) for i, q in enumerate(questions) for k in range(len(counts[q]))]
    have = np.array([counts[questions[i]][k] for i, k in cells], dtype=np.int64)
    taken = rng.binomial(have, rate)
    keep = np.flatnonzero(taken)
    target = np.zeros((len(keep), width))
    for row, cell in enumerate(keep):
        target[row, cells[cell][1]] = 1.0
    return Examples(np.array([cells[c][0] for c in keep], dtype=np.int64), target, taken[keep])


def records(
    shares: Mapping[str, np.ndarray],
    questions: Sequence[str],
    rate: float,
    width: int,
    rng: np.random.Generator,
) -> Examples:
    """Units are questions' distributions. shares: question -> (K,)."""
    keep = np.flatnonzero(rng.random(len(questions)) < rate)
    target = np.zeros((len(keep), width))
    for row, i in enumerate(keep.tolist()):
        target[row, : len(shares[questions[i]])] = shares[questions[i]]
    return Examples(keep, target, np.ones(len(keep), dtype=np.int64))


def respondents(
    people: Mapping[int, Sequence[tuple[str, int]]],
    questions: Sequence[str],
    rate: float,
    width: int,
    rng: np.random.Generator,
) -> Examples:
    """Units are persons: every person is drawn at `rate`, and owns the cells of their answers in this step."""
    index = {q: i for i, q in enumerate(questions)}
    drawn = [p for p, u in zip(people, rng.random(len(people)), strict=True) if u < rate]
    rows = [[(index[q], k) for q, k in people[p] if q in index] for p in drawn]
    rows = [r for r in rows if r]
    cells = sorted({cell for row in rows for cell in row})
    column = {cell: i for i, cell in enumerate(cells)}
    units, target = np.zeros((len(rows), len(cells)), dtype=np.float32), np.zeros((len(cells), width))
    for i, row in enumerate(rows):
        for cell in row:
            units[i, column[cell]] += 1.0
    for (_, option), i in column.items():
        target[i, option] = 1.0
    return Examples(
        np.array([q for q, _ in cells], dtype=np.int64), target, np.ones(len(rows), dtype=np.int64), units
    )


def bounded_answers(
    data: GroupData, plan: TrainingPlan, question_order: Sequence[str], noise_key: bytes
) -> dict[int, list[tuple[str, int]]]:
    """Each person's training answers, at most plan.answers_per_unit of them (the contribution bound), secretly chosen."""
    assert data.responses is not None
    train = set(plan.train)
    people: dict[int, list[tuple[str, int]]] = {}
    for person, question, option in zip(
        data.responses.respondent.tolist(),
        data.responses.question.tolist(),
        data.responses.option.tolist(),
        strict=True,
    ):
        if question_order[question] in train:
            people.setdefault(person, []).append((question_order[question], option))
    rng = sampler(noise_key, "contribution-bound")
    for person, rows in people.items():
        if len(rows) > plan.answers_per_unit:
            people[person] = [
                rows[i] for i in sorted(rng.choice(len(rows), plan.answers_per_unit, replace=False))
            ]
    return people
