"""Curves of membership attacks: area, interval, ties; and what the attack plants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appa_secure.audit.membership import SAMPLES, Target, planted, roc, sampled_shares
from appa_secure.tasks import answer_text
from tests.clients.world import make_group, make_questions, make_world


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_the_area_is_the_share_of_ordered_pairs(rows: list[tuple[int, bool]]) -> None:
    scores, member = np.array([s for s, _ in rows], dtype=float), np.array([m for _, m in rows])
    if member.all() or not member.any():
        with pytest.raises(ValueError, match="members and others"):
            roc(scores, member)
        return
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[member] for b in scores[~member]]
    found = roc(scores, member)
    assert found.auc == pytest.approx(np.mean(pairs))
    area = np.sum(np.diff(found.false) * (found.true[1:] + found.true[:-1]) / 2)
    assert area == pytest.approx(found.auc)
    assert (found.false[-1], found.true[-1]) == (1.0, 1.0)


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    truth, hits = 0.76025, 0  # Phi(1 / sqrt(2))
    for _ in range(300):
        member = np.arange(200) < 100
        found = roc(rng.standard_normal(200) + member, member)
        hits += found.low <= truth <= found.high
    assert hits >= 270  # of 300; 285 are expected


def test_a_language_model_is_read_by_its_mean_answer(tmp_path) -> None:  # type: ignore[no-untyped-def]
    agreement = make_world(tmp_path).agreement
    asked = []

    def generate(prompts: list[str], samples: int) -> list[list[str]]:
        asked.append((len(prompts), samples))
        sizes = [len(agreement.questions[q].options) for q in agreement.plan.train]
        texts = [
            [answer_text([10 * (i == j) for i in range(k)], agreement.task) for j in (0, 0, 1)] for k in sizes
        ]
        return [[*row, "nothing to be read"] for row in texts[:-1]] + [["nothing"]]

    found = sampled_shares(agreement, generate, "short")
    assert asked == [(len(agreement.plan.train), SAMPLES)]
    for q in agreement.plan.train[:-1]:
        np.testing.assert_allclose(found[q][:2], [2 / 3, 1 / 3])
    last = found[agreement.plan.train[-1]]
    np.testing.assert_allclose(last, 1 / len(last))


def test_only_members_and_the_context_are_left(tmp_path) -> None:  # type: ignore[no-untyped-def]
    agreement = make_world(tmp_path).agreement
    group = make_group("g0", make_questions(9))
    members = [Target("g0", "q3", 1, True), Target("g0", "q5", 0, True)]
    data = planted(group, agreement, members)
    for q in agreement.plan.context:
        np.testing.assert_array_equal(data.counts[q], group.counts[q])
    for q in agreement.plan.train:
        wanted = np.zeros(len(group.counts[q]))
        for t in members:
            if t.question == q:
                wanted[t.option] = 1.0
        np.testing.assert_array_equal(data.counts[q], wanted)
    assert data.responses is not None
    assert len(data.responses) == sum(data.counts[q].sum() for q in data.counts)
    assert len(set(data.responses.respondent[-2:])) == 2
