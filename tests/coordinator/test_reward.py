"""FederatedReward: the numbers a trainer gets are those of the rule, one query per step, whatever happens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from appa_secure.aggregation import AggregationSpec, combine_clear
from appa_secure.errors import PrivacyError, RunError
from appa_secure.messages import REQUESTS, unpack
from appa_secure.privacy.ledger import check_rows
from appa_secure.privacy.output import MECHANISM, plan_output
from appa_secure.records import Journal, RunDir
from appa_secure.tasks import parse, random_answer
from coordinator.predictor import initial_predictor
from coordinator.reward import FederatedReward
from tests.clients.world import World, make_world

SPECS = {
    "average": AggregationSpec(kind="average"),
    "min": AggregationSpec(kind="min"),
    "max": AggregationSpec(kind="max"),
    "weighted": AggregationSpec(tau=1.0),
    "paper": AggregationSpec(variant="paper", tau=1.0),
    "batch": AggregationSpec(fi_scope="batch", fi="cov", tau=0.9),
    "lse": AggregationSpec(kind="lse", a=-4.0),
    "maximin": AggregationSpec(kind="maximin", ramp=2, band=(0.3, 0.9), temperature=0.05),
}
BRANCH = {"average": "mean", "maximin": "weighted"}


def ready(root: Path, **changes: Any) -> World:
    world = make_world(root, **changes)
    world.set_up()
    # A predictor that has opinions: an untrained one predicts almost the same for every group.
    rng = np.random.default_rng(4)
    theta = initial_predictor(world.agreement, 1)
    theta = (theta * 3 + rng.standard_normal(len(theta))).astype("<f4").tobytes()
    for client in world.clients:
        assert world.ask(client, "freeze", parameters=theta).kind == "freeze"
    world.watched.clear()
    return world


def rollouts(world: World, step: int, count: int = 6) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(step)
    qids = [str(q) for q in rng.choice(list(world.agreement.plan.train), count)]
    texts = [random_answer("dpa", len(world.agreement.questions[q].options), rng) for q in qids]
    return qids, texts


def federated(world: World, run: RunDir, **options: Any) -> FederatedReward:
    journal = Journal(run.path("rewards.jsonl"))
    return FederatedReward(
        world.agreement, world.rounds(run), journal, options.pop("penalty", -0.5), **options
    )


def local(world: World, qids: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """(clients, B) each client's own rewards, read inside the clients."""
    answers = [parse(t, world.agreement.questions[q], "dpa") for q, t in zip(qids, texts, strict=True)]
    return np.stack([world.members[c]._targets().score(qids, answers) for c in world.clients])


@pytest.mark.parametrize("name", SPECS)
def test_blind_rewards_are_those_of_the_rule_with_all_rewards_in_one_place(tmp_path: Path, name: str) -> None:
    spec = SPECS[name]
    world = ready(tmp_path, spec=spec)
    history, z, branches = None, None, set()
    with world.run_dir() as run:
        reward = federated(world, run)
        for step in range(1, 6):
            qids, texts = rollouts(world, step)
            found = reward.step(step, qids, texts)
            result, history, _ = combine_clear(spec, local(world, qids, texts), history, z, step=step)
            z = result.z_next
            row = reward.rows[step]["result"]
            # The smooth minimum and maximum are that close to the exact ones; the rest is rounding.
            tolerance = np.log(5) / spec.sharpness + 1e-4 if name in ("min", "max") else 1e-6
            np.testing.assert_allclose(np.array(found, dtype=float), result.rewards, atol=tolerance)
            assert row["fi"] == pytest.approx(result.fi, abs=1e-6)
            assert row["h_mean"] == pytest.approx(result.h_mean, abs=1e-9)
            branches.add(row["branch"])
    assert branches == ({BRANCH.get(name, "lse")} if name != "batch" else branches)


@pytest.mark.parametrize("name", SPECS)
def test_cohort_rewards_are_those_of_the_rule_of_group_means(tmp_path: Path, name: str) -> None:
    """Exactly, also for the minimum and maximum."""
    spec, history, z = SPECS[name], None, None
    world = ready(tmp_path, groups=2, members=3, mode="cohort", release="recover", spec=spec)
    with world.run_dir() as run:
        reward = federated(world, run)
        for step in range(1, 4):
            qids, texts = rollouts(world, step)
            found = reward.step(step, qids, texts)
            means = local(world, qids, texts).reshape(2, 3, -1).mean(axis=1)
            result, history, _ = combine_clear(spec, means, history, z, step=step)
            z = result.z_next
            np.testing.assert_allclose(np.array(found, dtype=float), result.rewards, atol=1e-9)


@pytest.mark.parametrize("name", ["min", "weighted", "paper"])
def test_blind_sums_of_those_who_are_left_are_the_rule_of_those_who_are_left(
    tmp_path: Path, name: str
) -> None:
    """With release=recover a step without some groups counts. Who was away comes back with the next keys and its history,
    without the last step before: that it was opened, a group hears with the next step only (decision 21)."""
    spec = SPECS[name]
    world = ready(tmp_path, spec=spec, release="recover")
    history, sure, z, present = np.full(5, np.nan), np.full(5, np.nan), None, set()
    with world.run_dir() as run:
        reward = federated(world, run)
        for step in range(1, 10):
            world.offline = {1: {"g4"}, 6: {"g1"}}.get(step, set())
            qids, texts = rollouts(world, step)
            found = reward.step(step, qids, texts)
            summed = [row for row in run.transcript if row["event"] == "round"][-1]["contributors"]
            here = [i for i, c in enumerate(world.clients) if c in summed]
            present.add(len(here))
            every = local(world, qids, texts)[here]
            sure[here] = history[here]
            result, history[here], _ = combine_clear(spec, every, history[here], z, roster=5)
            history = np.where(np.isin(range(5), here), history, sure)
            z = result.z_next if result.z_next is not None else 1.0
            tolerance = np.log(5) / spec.sharpness + 1e-4 if name == "min" else 1e-6
            np.testing.assert_allclose(np.array(found, dtype=float), result.rewards, atol=tolerance)
            if name != "min":  # paper's weights cannot be put right inside the exponent: mean after a dropout
                assert reward.rows[step]["result"]["branch"] == result.branch
    assert present == {4, 5}


@pytest.mark.parametrize("shape", [{}, {"mode": "cohort", "release": "recover", "groups": 2, "members": 3}])
def test_numbers_that_are_skipped_take_maximin_no_further(tmp_path: Path, shape: dict[str, Any]) -> None:
    """Opened steps count, not what the coordinator calls them."""
    spec = AggregationSpec(kind="maximin", ramp=2, band=(0.3, 0.9))
    world = ready(tmp_path, spec=spec, **shape)
    groups = [world.agreement.groups[c] for c in world.clients]
    history = None
    with world.run_dir() as run:
        reward = federated(world, run)
        for count, step in enumerate((1, 40, 900), start=1):
            found = reward.step(step, *rollouts(world, step))
            every = local(world, *rollouts(world, step))
            means = [
                np.mean([r for r, g in zip(every, groups, strict=True) if g == name], axis=0)
                for name in sorted(set(groups))
            ]
            result, history, _ = combine_clear(spec, np.stack(means), history, step=count)
            np.testing.assert_allclose(np.array(found, dtype=float), result.rewards, atol=1e-6)


def test_blind_and_clear_runs_give_the_same_rewards_to_the_last_bit(tmp_path: Path) -> None:
    found: dict[str, list[Any]] = {}
    for mode in ("blind", "clear"):
        world = ready(tmp_path / mode, mode=mode)
        with world.run_dir() as run:
            reward = federated(world, run)
            found[mode] = [reward.step(s, *rollouts(world, s)) for s in (1, 2, 3)]
            found[mode].append([row["result"] for row in reward.rows.values()])
    assert found["blind"] == found["clear"]


def test_a_cohort_rewards_by_group_means_and_survives_members_who_leave(tmp_path: Path) -> None:
    world = ready(tmp_path, groups=2, members=5, mode="cohort", release="recover")
    spec, history, z = world.agreement.aggregation, None, None
    with world.run_dir() as run:
        reward = federated(world, run)
        for step, gone in ((1, set()), (2, {"g0 #2"}), (3, {"g0 #2", "g1 #0"}), (4, set())):
            world.offline = gone
            # The round goes on without those who are away; they come back with the next key set-up.

            qids, texts = rollouts(world, step)
            found = reward.step(step, qids, texts)
            every = local(world, qids, texts)
            means = np.stack(
                [
                    np.mean(
                        [every[i] for i, c in enumerate(world.clients) if c.startswith(g) and c not in gone],
                        axis=0,
                    )
                    for g in ("g0", "g1")
                ]
            )
            result, history, alpha = combine_clear(spec, means, history, z)
            z = result.z_next
            np.testing.assert_allclose(np.array(found, dtype=float), result.rewards, atol=1e-9)
            row = reward.rows[step]
            assert row["histories"] == pytest.approx(history.tolist(), abs=1e-9)
            assert row["weights"] == pytest.approx(
                dict(zip(("g0", "g1"), alpha.tolist(), strict=True)), abs=1e-9
            )


def test_a_cohort_with_a_group_below_its_threshold_discards_the_step(tmp_path: Path) -> None:
    world = ready(tmp_path, groups=2, members=3, mode="cohort", release="recover")
    with world.run_dir() as run:
        reward = federated(world, run)
        first = reward.step(1, *rollouts(world, 1))
        world.offline = {"g1 #0"}
        assert reward.step(2, *rollouts(world, 2)) == [None] * 6
        assert "group g1" in reward.rows[2]["reason"]
        assert reward.rows[2]["histories"] == reward.rows[1]["histories"]
        world.offline = set()
        assert None not in reward.step(3, *rollouts(world, 3))
        assert None not in first


def test_a_missing_group_discards_the_step_and_moves_no_history(tmp_path: Path) -> None:
    calm, shaken = (ready(tmp_path / name) for name in ("calm", "shaken"))
    rewards: dict[str, list[Any]] = {}
    for name, world in (("calm", calm), ("shaken", shaken)):
        with world.run_dir() as run:
            reward = federated(world, run)
            rewards[name] = [reward.step(1, *rollouts(world, 1))]
            if name == "shaken":
                for number, phase in ((2, "score"), (3, "secagg")):  # before the upload, and two after theirs
                    world.lose = lambda client, request, kind=phase: (
                        client in ("g2", "g3") and request.kind == kind
                    )
                    before = {c: world.members[c]._state["history"].get("current") for c in world.clients}
                    assert reward.step(number, *rollouts(world, number)) == [None] * 6
                    row = reward.rows[number]
                    assert row["opened"] is False
                    assert row["result"] is None
                    assert "g2" in row["reason"] or "threshold" in row["reason"]
                    after = {c: world.members[c]._state["history"].get("current") for c in world.clients}
                    for client in world.clients:  # at most what step 1 had left pending was committed
                        assert before[client] in (None, after[client])
                world.lose = None
            rewards[name].append(reward.step(4, *rollouts(world, 4)))
            rewards[name].append([reward.rows[4]["result"]])
    assert rewards["calm"] == rewards["shaken"]  # as if steps 2 and 3 had never been


def test_a_group_that_stays_away_stops_the_run_with_its_name(tmp_path: Path) -> None:
    world = ready(tmp_path)
    with world.run_dir() as run:
        reward = federated(world, run)
        world.offline = {"g3"}
        for step in range(1, 5):
            assert reward.step(step, *rollouts(world, step)) == [None] * 6
        with pytest.raises(RunError, match=r"5 alignment steps in a row.*g3"):
            reward.step(5, *rollouts(world, 5))


def test_a_budget_of_clients_that_is_used_up_stops_the_run_and_keeps_what_was_opened(tmp_path: Path) -> None:
    world = ready(tmp_path, release="noise", output=plan_output(20.0, 1e-6, 2, 3, 1))
    with world.run_dir() as run:
        reward = federated(world, run)
        for step in (1, 2):
            assert all(0 <= r <= 1 for r in reward.step(step, *rollouts(world, step)))
        with pytest.raises(PrivacyError, match=r"alignment step 3: .*secagg\.output_epsilon=20\.0"):
            reward.step(3, *rollouts(world, 3))
        assert sorted(reward.rows) == [1, 2]
        paid = check_rows(list(run.output_ledger))
        assert set(paid) == set(world.clients)
        assert 19 < max(paid.values()) <= 20
        # What is known is answered from the journal, without another payment.
        again = federated(world, run)
        assert again.step(2, *rollouts(world, 2)) == reward.step(2, *rollouts(world, 2))
        assert len(run.output_ledger) == 10


def test_a_cohort_pays_once_per_member_and_step(tmp_path: Path) -> None:
    plan = plan_output(50.0, 1e-6, 3, 3, 1)
    world = ready(tmp_path, groups=2, members=5, mode="cohort", release="noise", output=plan)
    with world.run_dir() as run:
        reward = federated(world, run)
        for step in (1, 2):
            world.offline = {"g0 #1"} if step == 2 else set()
            assert all(0 <= r <= 1 for r in reward.step(step, *rollouts(world, step)))
        assert len(run.output_ledger) == 10 + 9
        assert {row["mechanism"] for row in run.output_ledger} == {MECHANISM}


def test_the_penalty_is_on_the_scale_of_the_rules_rewards(tmp_path: Path) -> None:
    """The published formula's rewards are about a fifth of five groups': to write no answer must not pay better."""
    rewards = {}
    for name in ("weighted", "paper"):
        world = ready(tmp_path / name, spec=SPECS[name])
        qids, texts = rollouts(world, 1)
        texts[1] = "no answer"
        with world.run_dir() as run:
            reward = federated(world, run, penalty=0.5)
            rewards[name] = [r for r in reward.step(1, qids, texts) if r is not None]
            row = reward.rows[1]
            scale = row["result"]["scale"]
            assert scale == (1.0 if name == "weighted" else pytest.approx(0.2, abs=1e-6))
            assert rewards[name][1] == 0.5 * scale
    # Unreadable and mean readable answers are in about the same proportion under both.
    shares = {name: r[1] / np.mean(r[:1] + r[2:]) for name, r in rewards.items()}
    assert shares["paper"] == pytest.approx(shares["weighted"], rel=0.1)


def test_completions_that_are_no_answers_get_the_penalty_and_are_never_sent(tmp_path: Path) -> None:
    world = ready(tmp_path)
    qids, texts = rollouts(world, 1)
    secret = "the completion nobody may see 31337"
    texts[1], texts[4] = secret, texts[4] + " 3 " + secret
    with world.run_dir() as run:
        reward = federated(world, run, penalty=-0.25)
        found = reward.step(1, qids, texts)
        assert found[1] == found[4] == -0.25
        assert reward.rows[1]["malformed"] == 2
        assert all(0 <= found[i] <= 1 for i in (0, 2, 3, 5))
        requests = [unpack(REQUESTS, raw, "test") for _, raw, _ in world.watched]
        scored = [r for r in requests if r.kind == "score"]
        assert len(scored) == 5
        for request in scored:
            assert request.body["answers"] == [texts[i] for i in (0, 2, 3, 5)]
            assert request.body["questions"] == [qids[i] for i in (0, 2, 3, 5)]
        everything = b"".join(raw + (reply or b"") for _, raw, reply in world.watched)
        assert b"31337" not in everything
        assert secret.encode() not in everything
        # A step without a single answer asks nobody.
        world.watched.clear()
        assert reward.step(2, qids, [secret] * 6) == [-0.25] * 6
        assert not world.watched
        assert reward.rows[2]["opened"] is False
        assert None not in reward.step(3, *rollouts(world, 3))
        assert [unpack(REQUESTS, r, "t").body["opened"] for _, r, _ in world.watched if b"answers" in r] == [
            1
        ] * 5


def test_a_step_is_asked_for_once_also_after_a_restart(tmp_path: Path) -> None:
    world = ready(tmp_path)
    with world.run_dir() as run:
        reward = federated(world, run)
        steps = [reward.step(s, *rollouts(world, s)) for s in (1, 2)]
        reward.journal.close()
        world.watched.clear()
        again = federated(world, run)
        assert [again.step(s, *rollouts(world, s)) for s in (1, 2)] == steps
        assert not world.watched
        third = again.step(3, *rollouts(world, 3))
    other = ready(tmp_path / "undisturbed")
    with other.run_dir() as run:
        reward = federated(other, run)
        assert [reward.step(s, *rollouts(other, s)) for s in (1, 2, 3)] == [*steps, third]


def test_a_resumed_run_that_differs_is_stopped_before_it_mixes_two_runs(tmp_path: Path) -> None:
    world = ready(tmp_path)
    with world.run_dir() as run:
        federated(world, run).step(1, *rollouts(world, 1))
        again = federated(world, run)
        qids, texts = rollouts(world, 1)
        with pytest.raises(RunError, match="scored for other rollouts"):
            again.step(1, qids, [*texts[:-1], texts[0]])
        with pytest.raises(RunError, match="scored for other rollouts"):
            again.step(1, list(reversed(qids)), list(reversed(texts)))


def test_the_trainers_call_takes_text_and_chat_and_reads_the_step(tmp_path: Path) -> None:
    world = ready(tmp_path)
    qids, texts = rollouts(world, 1)
    state = SimpleNamespace(ppo_step=1)
    with world.run_dir() as run:
        seen: list[tuple[int, int]] = []
        reward = federated(world, run, seen=lambda step, q, answers, row: seen.append((step, len(answers))))
        plain = reward(prompts=["p"] * 6, completions=texts, qid=qids, trainer_state=state, extra="ignored")
        chats = [[{"role": "assistant", "content": t}] for t in texts]
        assert reward(prompts=["p"] * 6, completions=chats, qid=qids, trainer_state=state) == plain
        assert seen == [(1, 6)]  # once per new step
        assert reward.__name__ == "federated_reward"


def test_nothing_of_one_group_is_kept_in_blind_mode(tmp_path: Path) -> None:
    world = ready(tmp_path)
    with world.run_dir() as run:
        reward = federated(world, run)
        reward.step(1, *rollouts(world, 1))
        row = reward.rows[1]
        assert row["histories"] is None
        assert row["weights"] is None
        written = run.path("rewards.jsonl").read_text()
        for value in local(world, *rollouts(world, 1)).ravel():
            assert repr(float(value))[:12] not in written
