"""Systems in a federation: blind equals clear and one calculation in one place, kills, dropouts, refusals."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from appa_secure.agreement import REWARD, SYSTEM
from appa_secure.config import Config
from appa_secure.errors import RunError
from appa_secure.language import pack_policy
from appa_secure.predictor import flatten, unflatten
from appa_secure.systems import SystemSpec, preferences
from appa_secure.tasks import parse, prompt
from clients.tuning import Rollouts, group_weight
from coordinator.maxmin import MaxMinReward, Mixture, drawer, learn_mixture
from coordinator.policies import build_tiny, build_tokenizer, warm_up
from coordinator.predictor import adam, decay, initial_predictor, save_state
from coordinator.rounds import Rounds
from coordinator.sampling import sample
from coordinator.tuning import asked_questions, tune_policy
from tests.clients.drive import refused
from tests.clients.world import EMBEDDING, World, make_questions, make_world

STEPS, PROMPTS, GENERATIONS, TOKENS = 3, 3, 4, 5
POLICIES = ("grdpo", "gripo", "fedrlhf", "sft")


def config(kind: str, **system: Any) -> Config:
    return Config.model_validate(
        {
            "system": {"kind": kind, "rounds": 6, "free_rounds": 2, **system},
            "ppo": {
                "steps": STEPS,
                "prompts_per_step": PROMPTS,
                "generations": GENERATIONS,
                "minibatch_size": 12,
            },
        }
    )


def spec(kind: str, **changes: Any) -> SystemSpec:
    return replace(SystemSpec(kind=kind, generations=GENERATIONS, free_rounds=2), **changes)


def ready(root: Path, kind: str, **changes: Any) -> World:
    """A world in which the align stage may begin; groups whose predictions differ."""
    world = make_world(root, system=spec(kind, **changes.pop("spec", {})), **changes)
    world.set_up()
    rng = np.random.default_rng(5)
    theta = initial_predictor(world.agreement, 1)
    theta = (theta + rng.standard_normal(len(theta))).astype("<f4").tobytes()
    for client in world.clients:
        assert world.ask(client, "freeze", parameters=theta).kind == "freeze"
    return world


@pytest.fixture(scope="module")
def policy() -> tuple[Any, Any]:
    """A tiny policy that mostly writes readable answers, made once; tests take copies of its weights."""
    questions = make_questions(9)
    prompts = [prompt(q, "dpa", "short") for q in questions]
    tokenizer = build_tokenizer(prompts, 80)
    model = build_tiny(tokenizer, 32, 1, 2, seed=1)
    torch.manual_seed(1)
    warm_up(
        model, tokenizer, prompts, lambda rng, i: " ".join(str(rng.randrange(1, 11)) for _ in questions[i].options),
        steps=60, lr=0.01, batch_size=8,
    )  # fmt: skip
    return model, tokenizer


def tune(
    world: World, policy: tuple[Any, Any], record: Callable[..., None] = lambda *_: None, **system: Any
) -> np.ndarray:
    model, tokenizer = copy.deepcopy(policy[0]), policy[1]
    c = config(world.agreement.system.kind, **system)
    with world.run_dir() as run:
        trained = tune_policy(
            c, world.agreement, world.rounds(run), run, model, tokenizer, TOKENS, None, record
        )
    return flatten(trained)


# -- blind, clear, and in one place --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", POLICIES)
def test_blind_and_clear_runs_end_in_the_same_policy_bit_for_bit(tmp_path: Path, policy, kind: str) -> None:
    rows: dict[str, list[dict[str, Any]]] = {"blind": [], "clear": []}
    found = {
        mode: tune(
            ready(tmp_path / mode, kind, mode=mode), policy,
            lambda metrics, row, mode=mode: rows[mode].append({"reward": metrics["reward"], **row["result"]}),
        )
        for mode in rows
    }  # fmt: skip
    np.testing.assert_array_equal(found["blind"], found["clear"])
    assert rows["blind"] == rows["clear"]
    assert len(rows["blind"]) == STEPS
    assert not np.array_equal(found["blind"], flatten(policy[0]))
    assert all(0 < row["reward"] < 1 for row in rows["blind"])
    assert all(0.2 <= row["fi"] <= 1 for row in rows["blind"])


def test_grdpo_in_a_federation_is_grdpo_in_one_place(tmp_path: Path, policy) -> None:
    """With all labels in one place: the same rollouts, weights renormalised in every round, gradient of Σ α_g L_g."""
    world = ready(tmp_path, "grdpo", spec={"clip": 100.0, "eta": 2.0})
    found = tune(world, policy, clip=100.0, eta=2.0)
    model, tokenizer = copy.deepcopy(policy[0]), policy[1]
    c, a = config("grdpo"), world.agreement
    theta = flatten(model)
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    scorers = [world.members[x]._targets() for x in world.clients]
    tuners = [world.members[x]._tuning for x in world.clients]
    alpha = np.ones(5) / 5
    for step in range(1, STEPS + 1):
        qids = asked_questions(a.plan.train, PROMPTS, step, c.seed)
        unflatten(model, theta)
        seed = int(np.random.default_rng([c.seed, 0x7E, step]).integers(2**31))
        drawn = sample(
            model,
            tokenizer,
            [prompt(a.questions[q], "dpa", "short") for q in qids],
            GENERATIONS,
            1.0,
            TOKENS,
            seed,
        )
        every = [q for q in qids for _ in range(GENERATIONS)]
        texts = [t for row in drawn for t in row]
        rollouts = Rollouts(
            every, texts, [parse(t, a.questions[q], "dpa") for q, t in zip(every, texts, strict=True)]
        )
        losses, gradients = [], []
        for scorer, tuner in zip(scorers, tuners, strict=True):
            sent, after = tuner.contribution(theta, rollouts, None, step)
            losses.append(1 + after / 2.0)  # the log-weight of a first round is η·(L - 1)
            gradients.append(sent[:-3] / group_weight(after, a.system))
            assert scorer is tuner.scorer
        assert len({tuple(preferences(s.score(every, rollouts.answers)).tolist()) for s in scorers}) > 1
        alpha = alpha * np.exp(2.0 * np.array(losses))
        alpha /= alpha.sum()
        gradient = alpha @ np.array(gradients)
        theta, m, v = (
            x.astype(np.float32)
            for x in adam(theta, m, v, gradient, step, c.system.server_lr * decay(step, STEPS))
        )
    # Adam divides by gradients' size: where a gradient is next to nothing, rounding decides its sign.
    np.testing.assert_allclose(found, theta, atol=2e-5)
    assert np.ptp(alpha) > 1e-4


def test_rounds_ask_every_question_before_any_again() -> None:
    train = tuple(f"q{i}" for i in range(7))
    asked = [q for step in range(1, 8) for q in asked_questions(train, 3, step, seed=1)]
    for start in (0, 7, 14):
        assert sorted(asked[start : start + 7]) == sorted(train)
    assert asked[:7] != asked[7:14]
    assert asked_questions(train, 20, 1, seed=1)[:7] == asked[:7]


# -- kills and dropouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grdpo", "maxmin"])
def test_a_run_killed_before_and_after_its_state_is_written_ends_the_same(
    tmp_path: Path, policy, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = tune if kind == "grdpo" else mix
    calm = train(ready(tmp_path / "calm", kind), policy)
    world = ready(tmp_path / "killed", kind)
    module = "coordinator.tuning" if kind == "grdpo" else "coordinator.maxmin"
    for call, first in ((2, True), (2, False)):
        left = [call]

        def kill(
            path: Path, arrays: dict[str, np.ndarray], left: list[int] = left, first: bool = first
        ) -> None:
            left[0] -= 1
            if not left[0] and first:
                raise KeyboardInterrupt
            save_state(path, arrays)
            if not left[0]:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.save_state", kill)
            with pytest.raises(KeyboardInterrupt):
                train(world, policy)
        for client in world.clients:
            world.start(client)
    np.testing.assert_array_equal(train(world, policy), calm)
    np.testing.assert_array_equal(train(world, policy), calm)  # and finished stays finished


def test_a_round_that_somebody_missed_is_asked_again(tmp_path: Path, policy) -> None:
    calm = tune(ready(tmp_path / "calm", "grdpo"), policy)
    world = ready(tmp_path / "lossy", "grdpo")
    left = [2]

    def lose(client: str, request: Any) -> bool:
        hit = client == "g1" and request.kind == "tune" and left[0] > 0
        left[0] -= hit
        return hit

    world.lose = lose
    np.testing.assert_array_equal(tune(world, policy), calm)
    assert left == [0]
    world = ready(tmp_path / "gone", "grdpo")
    world.lose = lambda client, request: client == "g1" and request.kind == "tune"
    with pytest.raises(RunError, match="discarded"):
        tune(world, policy)


# -- refusals ------------------------------------------------------------------------------------------------


def tune_body(world: World, size: int, **changes: Any) -> dict[str, Any]:
    body = {
        "session": SYSTEM, "message": b"", "step": 1, "opened": 0, "parameters": bytes(4 * size),
        "questions": ["q3"] * GENERATIONS, "answers": ["1 2"] * GENERATIONS,
    }  # fmt: skip
    return {**body, **changes}


def test_requests_of_another_system_are_refused(tmp_path: Path, policy) -> None:
    score = {
        "session": REWARD,
        "message": b"",
        "step": 1,
        "opened": 0,
        "z": b"",
        "questions": ["q3"],
        "answers": ["1 2"],
    }
    world = ready(tmp_path / "a", "grdpo", mode="clear")
    refused(world.ask("g0", "score", **score), "NotAgreed", "system=grdpo")
    world = ready(tmp_path / "b", "appa", mode="clear")
    refused(world.ask("g0", "tune", **tune_body(world, 1)), "NotAgreed", "system=appa")
    refused(world.ask("g0", "policy", **pack_policy(*policy)), "NotAgreed")
    world = ready(tmp_path / "c", "maxmin", mode="clear")
    refused(world.ask("g0", "policy", **pack_policy(*policy)), "NotAgreed")


def test_the_order_of_requests_is_kept(tmp_path: Path, policy) -> None:
    world, size = ready(tmp_path, "grdpo", mode="clear"), len(flatten(policy[0]))
    refused(world.ask("g0", "tune", **tune_body(world, size)), "RemoteMisbehaviour", "not been sent")
    assert world.ask("g0", "policy", **pack_policy(*policy)).kind == "policy"
    assert world.ask("g0", "tune", **tune_body(world, size)).kind == "tune"
    other = {**pack_policy(*policy), "pad": "other"}
    refused(world.ask("g0", "policy", **other), "OutOfOrder", "reference policy")
    assert world.ask("g0", "tune", **tune_body(world, size, step=2, opened=1)).kind == "tune"
    refused(world.ask("g0", "tune", **tune_body(world, size, step=1, opened=1)), "ReplayedRound")
    refused(world.ask("g0", "tune", **tune_body(world, size, step=4, opened=3)), "RemoteMisbehaviour")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"questions": [], "answers": []}, "at least one question"),
        ({"questions": ["q3"] * 3, "answers": ["1 2"] * 3}, "needs 4 answers"),
        ({"questions": ["q3"] * 3 + ["q4"]}, "one question"),
        ({"questions": ["nobody's"] * 4}, "no question of this survey"),
        ({"answers": ["1 2"] * 3 + ["1 " * 600]}, "characters"),
        ({"parameters": b"1234"}, "bytes"),
    ],
)
def test_malformed_rollouts_are_refused(tmp_path: Path, policy, changes: dict[str, Any], words: str) -> None:
    world = ready(tmp_path, "grdpo", mode="clear")
    world.ask("g0", "policy", **pack_policy(*policy))
    refused(
        world.ask("g0", "tune", **tune_body(world, len(flatten(policy[0])), **changes)), "BadEncoding", words
    )


@pytest.mark.parametrize(
    "changes", [{"config": "{}"}, {"config": "no json"}, {"tokenizer": "{}"}, {"weights": b"1234"}]
)
def test_a_policy_that_cannot_be_read_is_refused(tmp_path: Path, policy, changes: dict[str, Any]) -> None:
    world = ready(tmp_path, "sft", mode="clear")
    reply = world.ask("g0", "policy", **{**pack_policy(*policy), **changes})
    assert reply.kind == "refusal"
    assert "policy" in reply.body["reason"]
    refused(
        world.ask("g0", "tune", **tune_body(world, len(flatten(policy[0])))),
        "RemoteMisbehaviour",
        "not been sent",
    )


def test_unreadable_answers_are_no_pairs_for_reward_models(tmp_path: Path) -> None:
    world = ready(tmp_path, "maxmin", mode="clear")
    body = tune_body(world, 1, questions=["q3"] * 2, answers=["1 2", "one two"])
    refused(world.ask("g0", "tune", **body), "BadEncoding", "readable")


# -- MaxMin --------------------------------------------------------------------------------------------------


def mixture(world: World, policy: tuple[Any, Any]) -> tuple[Mixture, Any]:
    c = config("maxmin", server_lr=0.02)
    draw = drawer(c, world.agreement, *policy, TOKENS)
    with world.run_dir() as run:
        rounds: Rounds = world.rounds(run)
        return learn_mixture(c, world.agreement, rounds, run, draw, EMBEDDING, lambda *_: None), draw


def mix(world: World, policy: tuple[Any, Any]) -> np.ndarray:
    return mixture(world, policy)[0].models


def test_the_mixture_is_the_same_blind_and_clear(tmp_path: Path, policy) -> None:
    blind, clear = (
        mixture(ready(tmp_path / mode, "maxmin", mode=mode), policy)[0] for mode in ("blind", "clear")
    )
    np.testing.assert_array_equal(blind.models, clear.models)
    assert (blind.members, blind.likelihood) == (clear.members, clear.likelihood)
    assert sum(blind.members) == 5
    assert -16 < blind.likelihood < 0


def test_who_chose_which_cluster_at_the_start_is_drawn_in_secret(tmp_path: Path, policy) -> None:
    """From each client's own key: not a function of anything public."""
    world = ready(tmp_path, "maxmin")
    mix(world, policy)
    drawn = {c: world.members[c]._tuning.drawn for c in world.clients}
    assert set(drawn.values()) == {0, 1}
    for client in world.clients:
        world.members[client]._state["noise_key"] = hashlib.sha256(b"other" + client.encode()).digest()
        world.members[client]._tuning = None
        world.ask(client, "tune", **tune_body(world, 1))  # whatever it answers, it has drawn again
    assert {c: world.members[c]._tuning.drawn for c in world.clients} != drawn


def test_the_reward_of_a_step_is_the_model_under_which_it_fares_worst(tmp_path: Path, policy) -> None:
    world = ready(tmp_path, "maxmin")
    found, draw = mixture(world, policy)
    models = np.stack([found.models[0], -found.models[0]])
    seen: list[Any] = []
    reward = MaxMinReward(
        world.agreement,
        Mixture(models, (3, 2), -0.5),
        world.embeddings,
        draw,
        1,
        lambda *args: seen.append(args),
    )
    qids, texts = ["q3", "q3", "q4", "q5"], ["1 9", "9 1", "1 2 3", "none"]
    values = reward([""] * 4, texts, qids, SimpleNamespace(ppo_step=1))
    answers = [parse(t, world.agreement.questions[q], "dpa") for q, t in zip(qids[:3], texts, strict=False)]
    by_model = reward.rewards(qids[:3], answers)
    worst = by_model.mean(axis=1).argmin()
    np.testing.assert_allclose(values, [*by_model[worst], 0.0])
    assert reward.rows[1]["malformed"] == 1
    assert reward.rows[1]["result"]["branch"] == f"reward model {worst + 1}"
    assert len(seen) == 1
    assert reward([""] * 4, texts, qids, SimpleNamespace(ppo_step=1)) == values
    assert len(seen) == 1


def test_rewards_are_compared_with_the_warmed_up_policys_answers_to_the_same_question(
    tmp_path: Path, policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A constant per question, which Bradley-Terry leaves open, changes nothing; nor does a model's scale."""
    world = ready(tmp_path, "maxmin")
    found, draw = mixture(world, policy)
    plain = MaxMinReward(world.agreement, Mixture(found.models[:1], (5,), -0.5), world.embeddings, draw, 1)
    offset = {q: 7.0 * i for i, q in enumerate(world.agreement.questions)}
    original = MaxMinReward._raw

    def other(self: MaxMinReward, qids: Any, answers: Any) -> np.ndarray:
        return 3.0 * (original(self, qids, answers) + np.array([offset[q] for q in qids]))

    qids, answers = ["q3", "q4"], [np.array([0.1, 0.9]), np.array([0.2, 0.3, 0.5])]
    with monkeypatch.context() as patch:
        patch.setattr(MaxMinReward, "_raw", other)
        there = MaxMinReward(
            world.agreement, Mixture(found.models[:1], (5,), -0.5), world.embeddings, draw, 1
        ).rewards(qids, answers)
    np.testing.assert_allclose(plain.rewards(qids, answers), there, atol=1e-4)
