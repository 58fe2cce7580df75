"""Measuring against true distributions: scores by hand, malformed answers, strangers' rows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from appa_secure.messages import Message
from appa_secure.secagg.errors import BadEncoding
from appa_secure.tasks import answer_text
from coordinator.evaluate import Evaluator, Truth, win_rates
from tests.clients.world import World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), groups=3, questions=6)


def replies(world: World, predicted: Any = None) -> dict[str, Message]:
    """True distributions of every group; g2 was not asked q1."""
    out = {}
    for client in world.clients:
        known = {q: world.groups[client].distribution(q).tolist() for q in world.agreement.questions}
        if client == "g2":
            del known["q1"]
        body = {
            "distributions": json.dumps(known).encode(),
            "predictions": json.dumps(known if predicted is None else predicted).encode(),
        }
        out[client] = Message("truth", body)
    return out


def evaluator(world: World, found: dict[str, Message]) -> Evaluator:
    return Evaluator(world.agreement, Truth.gather(world.agreement, found), "short", 50, 1)


def test_scores_are_rewards_against_each_groups_own_truth(world: World) -> None:
    qids = ["q0", "q1", "q0"]
    answers = [np.full(len(world.agreement.questions[q].options), 1.0) for q in qids]
    answers = [a / a.sum() for a in answers]
    table = evaluator(world, replies(world)).scores(qids, [*answers[:2], None])
    for group, row in table.items():
        for i, q in enumerate(qids[:2]):
            if (group, q) == ("g2", "q1"):
                assert np.isnan(row[i])  # no answers of that group, no score
                continue
            question = world.agreement.questions[q]
            position = np.asarray(question.ordinals)
            moved = np.abs(np.cumsum(answers[i] - world.groups[group].distribution(q)))[:-1] @ np.diff(
                position
            )
            assert row[i] == pytest.approx(1 - moved / np.ptp(position))
        assert row[2] == 0.0  # malformed


def test_a_step_is_summarised_over_groups(world: World) -> None:
    answer = np.array([1.0] + [0.0] * (len(world.agreement.questions["q0"].options) - 1))
    judge = evaluator(world, replies(world))
    found = judge.step(["q0"], [answer])
    values = [float(row[0]) for row in judge.scores(["q0"], [answer]).values()]
    assert list(found["per_group"].values()) == values
    assert found["avg"] == pytest.approx(np.mean(values))
    assert found["min"] == min(values)
    assert found["fairness_index"] == pytest.approx(sum(values) ** 2 / (3 * sum(v * v for v in values)))


def test_predictions_are_measured_for_their_group_and_as_one_for_all(world: World) -> None:
    qids = ["q0", "q2"]
    exact = evaluator(world, replies(world)).predictor(qids)
    assert exact["own"]["avg"] == pytest.approx(1.0)
    assert exact["shared"]["avg"] < 0.999  # groups differ, so no shared answer is right for all
    one = {q: [1.0] + [0.0] * (len(v.options) - 1) for q, v in world.agreement.questions.items()}
    alike = evaluator(world, replies(world, predicted=one)).predictor(qids)
    truth = {g: {q: world.groups[g].distribution(q) for q in qids} for g in world.clients}
    for group, by in truth.items():  # scipy's Jensen-Shannon distance is the root of the divergence in nats
        distances = [jensenshannon(p, one[q]) for q, p in by.items()]
        assert alike["pluralllm"]["per_group"][group] == pytest.approx(1 - np.mean(distances))
    assert alike["own"]["per_group"] == pytest.approx(alike["shared"]["per_group"])


def test_policies_are_measured_over_all_their_samples(world: World) -> None:
    judge = evaluator(world, replies(world))
    found = judge.policy(lambda prompts, n: [["no answer"] * n for _ in prompts], ["q0", "q2"], 3)
    assert found["malformed"] == 1.0
    assert found["avg"] == found["min"] == 0.0
    assert found["ci95"] == {"avg": [0.0, 0.0], "min": [0.0, 0.0]}


@pytest.mark.parametrize("field", ["distributions", "predictions"])
@pytest.mark.parametrize(
    "sent", [b"no json", b"[]", b'{"q0": 3}', b'{"q0": [1.0]}', b'{"strange": [0.5, 0.5]}']
)
def test_other_rows_are_refused_with_their_sender(world: World, field: str, sent: bytes) -> None:
    found = replies(world)
    found["g1"] = Message("truth", {**found["g1"].body, field: sent})
    with pytest.raises(BadEncoding, match=rf"^g1: truth\.{field}"):
        Truth.gather(world.agreement, found)


def test_win_rates_count_every_pair_of_answers() -> None:
    """Against loops; ties count half, and questions a group was not asked do not count."""
    rng = np.random.default_rng(5)
    scores, reference = (rng.integers(0, 4, (3, 5, size)) / 4.0 for size in (4, 6))
    scores[1, 2] = reference[1, 2] = np.nan
    expected = []
    for g in range(3):
        per_question = [
            np.mean([1.0 if s > r else 0.5 if s == r else 0.0 for s in scores[g, q] for r in reference[g, q]])
            for q in range(5)
            if (g, q) != (1, 2)
        ]
        expected.append(np.mean(per_question))
    assert win_rates(scores, reference).tolist() == pytest.approx(expected)
    assert win_rates(reference, scores).tolist() == pytest.approx([1 - x for x in expected])
    assert win_rates(scores, scores).tolist() == pytest.approx([0.5, 0.5, 0.5])


def test_a_policy_is_held_against_its_reference_question_by_question(world: World) -> None:
    """A policy that answers what g0 thinks wins over one that cannot be read, and over g1's answers with g0 alone."""
    judge, qids = evaluator(world, replies(world)), ["q0", "q2"]

    def said(group: str) -> list[list[str]]:
        shares = [world.groups[group].distribution(q) for q in qids]
        return [[answer_text(np.rint(10 * p / p.max()).astype(int).tolist(), "dpa")] * 2 for p in shares]

    g0, g1 = (lambda prompts, n: said("g0")), (lambda prompts, n: said("g1"))
    unreadable = judge.policy(g0, qids, 2, reference=lambda prompts, n: [["?"] * n for _ in prompts])
    assert unreadable["win_rate"]["avg"] == unreadable["win_rate"]["min"] == 1.0
    rates = judge.policy(g0, qids, 2, reference=g1)["win_rate"]
    assert list(rates["per_group"]) == ["g0", "g1", "g2"]
    assert rates["per_group"]["g0"] > 0.5 > rates["per_group"]["g1"]
    assert rates["min"] == min(rates["per_group"].values())
    assert rates["avg"] == pytest.approx(np.mean(list(rates["per_group"].values())))
    assert "win_rate" not in judge.policy(g0, qids, 2)
