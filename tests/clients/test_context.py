"""The private context: its sensitivity by brute force, its noise, and that it is never the raw one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from appa_secure.data import GroupData, Responses
from appa_secure.data.survey import counts_of
from appa_secure.privacy.sensitivity import histograms as sensitivity
from clients.context import _bounded_counts, private_histograms, raw_shares, to_simplex
from tests.clients.world import KEY, make_group, make_questions

QUESTIONS = make_questions(8)
QIDS = [q.qid for q in QUESTIONS]
SIZES = {q.qid: len(q.options) for q in QUESTIONS[:5]}


def flat(data: GroupData, unit: str, bound: int = 1, key: bytes = KEY) -> np.ndarray:
    counts = _bounded_counts(data, SIZES, unit, bound, key, QIDS)
    return np.concatenate([counts[q] for q in SIZES])


def without(data: GroupData, keep: np.ndarray) -> GroupData:
    assert data.responses is not None
    left = Responses(
        data.responses.respondent[keep], data.responses.question[keep], data.responses.option[keep]
    )
    return GroupData(data.name, counts_of(QUESTIONS, left, "g"), responses=left)


def test_one_response_moves_the_counts_by_at_most_the_sensitivity() -> None:
    data = make_group("g", QUESTIONS, people=6, answers=8)
    assert data.responses is not None
    moves = [
        np.linalg.norm(
            flat(data, "response") - flat(without(data, np.arange(len(data.responses)) != row), "response")
        )
        for row in range(len(data.responses))
    ]
    assert max(moves) == sensitivity("response", 1) == 1.0


def test_one_record_moves_the_shares_by_at_most_the_sensitivity() -> None:
    data = make_group("g", QUESTIONS)
    extreme = GroupData(
        "g", {q: np.eye(len(c))[0] * 7 for q, c in data.counts.items()}
    )  # as long as a distribution gets
    for group, longest in ((data, 1.0), (extreme, 1.0)):
        whole = {q: group.distribution(q) for q in SIZES}
        np.testing.assert_array_equal(flat(group, "record"), np.concatenate(list(whole.values())))
        assert max(np.linalg.norm(p) for p in whole.values()) <= sensitivity("record", 9) == longest


@pytest.mark.parametrize("bound", [1, 2, 3, 5])
def test_one_respondent_moves_the_counts_by_at_most_the_sensitivity(bound: int) -> None:
    """Others' choice of answers does not depend on the person, so each person alone is what counts."""
    data = make_group("g", QUESTIONS, people=12, answers=8)
    assert data.responses is not None
    moves = []
    for person in range(12):
        alone = flat(without(data, data.responses.respondent == person), "respondent", bound)
        assert alone.sum() == min(bound, 5)  # answers to context questions only, at most `bound`
        assert alone.max() == 1.0  # one per question
        moves.append(np.linalg.norm(alone))
    assert max(moves) == pytest.approx(min(sensitivity("respondent", bound), np.sqrt(5)))
    assert sensitivity("respondent", bound) == pytest.approx(np.sqrt(bound))


def test_who_is_bounded_how_does_not_depend_on_who_else_is_there() -> None:
    """Selections are uniform for every person, with and without another: 2000 keys, one person's answers
    counted.
    """
    data = make_group("g", QUESTIONS, people=3, answers=8)
    assert data.responses is not None
    for keep in (data.responses.respondent == 0, data.responses.respondent <= 2):
        picked = np.zeros(5)
        mine = without(data, keep)
        others = int(np.unique(mine.responses.respondent).size) - 1 if mine.responses is not None else 0
        for i in range(1000):
            counts = _bounded_counts(mine, SIZES, "respondent", 1, i.to_bytes(32, "big"), QIDS)
            picked += [counts[q].sum() for q in SIZES]
        assert picked.sum() == 1000 * (others + 1)
        assert stats.chisquare(picked).pvalue > 1e-4


@pytest.mark.parametrize("unit", ["response", "respondent", "record"])
def test_the_noise_is_gaussian_of_the_stated_size_before_projection(
    unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, seen = make_group("g", QUESTIONS, people=200), []
    monkeypatch.setattr(
        "clients.context.to_simplex", lambda noisy: seen.append(noisy.copy()) or to_simplex(noisy)
    )
    errors = []
    for i in range(300):
        seen.clear()
        private_histograms(data, SIZES, unit, 2, 3.0, i.to_bytes(32, "big"), "run", QIDS)
        errors.append(np.concatenate(seen) - flat(data, unit, 2, i.to_bytes(32, "big")))
    assert stats.kstest(np.concatenate(errors) / 3.0, "norm").pvalue > 1e-4


@pytest.mark.parametrize("unit", ["response", "respondent", "record"])
def test_it_is_a_distribution_and_never_the_raw_one(unit: str) -> None:
    data = make_group("g", QUESTIONS, people=200)
    raw = raw_shares(data, SIZES)
    for i in range(50):
        shares, per_question = private_histograms(
            data, SIZES, unit, 3, 2.0, i.to_bytes(32, "big"), "run", QIDS
        )
        assert list(shares) == list(SIZES)
        for q, p in shares.items():
            assert p.shape == (SIZES[q],)
            assert (p >= 0).all()
            assert p.sum() == pytest.approx(1.0)
            assert not np.array_equal(p, raw[q])
        assert per_question >= 1.0


def test_noise_enters_every_asked_question_and_the_estimated_total() -> None:
    data = make_group("g", QUESTIONS, people=200)
    first, total = private_histograms(data, SIZES, "response", 1, 2.0, KEY, "run", QIDS)
    second, other = private_histograms(data, SIZES, "response", 1, 2.0, bytes(32), "run", QIDS)
    assert all(not np.array_equal(first[q], second[q]) for q in SIZES)
    true = np.mean([data.counts[q].sum() for q in SIZES])
    assert total != other != true
    assert abs(total - true) < 6 * 2.0 * np.sqrt(sum(SIZES.values())) / len(SIZES)
    again, same = private_histograms(data, SIZES, "response", 1, 2.0, KEY, "run", QIDS)
    assert same == total
    assert all(np.array_equal(first[q], again[q]) for q in SIZES)


def test_it_does_not_depend_on_answers_outside_the_context() -> None:
    data = make_group("g", QUESTIONS)
    assert data.responses is not None
    fewer = without(data, data.responses.question < 5)
    for unit in ("response", "record"):
        a, b = (private_histograms(d, SIZES, unit, 1, 2.0, KEY, "run", QIDS)[0] for d in (data, fewer))
        assert all(np.array_equal(a[q], b[q]) for q in SIZES)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=10))
def test_projection_lands_on_the_simplex(values: list[float]) -> None:
    counts = np.array(values)
    p = to_simplex(counts)
    assert (p >= 0).all()
    assert p.sum() == pytest.approx(1.0)
    positive = counts > 0
    if positive.any():
        np.testing.assert_allclose(p[positive], counts[positive] / counts[positive].sum(), rtol=1e-12)
    else:
        np.testing.assert_allclose(p, 1.0 / len(counts))
