"""Members change during alignment: rewards go on as the rule says, for those who take part, also after a kill."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appa_secure.aggregation import AggregationSpec, combine_clear
from appa_secure.agreement import SYSTEM
from appa_secure.errors import ConfigError, RunError
from appa_secure.journal import read_journal
from appa_secure.membership import FILE, Membership, membership_of, next_membership, renewed
from appa_secure.privacy.output import plan_output
from appa_secure.records import RunDir, verify
from appa_secure.systems import SystemSpec
from appa_secure.tasks import parse
from coordinator.reward import FederatedReward
from coordinator.rounds import NotOpened
from tests.clients.operators import Operators, newcomer
from tests.clients.world import World, make_world
from tests.coordinator.test_reward import federated, ready, rollouts

GROUPS = tuple(f"g{i}" for i in range(7))


def begin(root: Path, **changes: Any) -> tuple[World, RunDir]:
    """Seven groups before alignment, the predictor where the pipeline leaves it."""
    world = ready(root, groups=7, min_cohort=5, **changes)
    run = world.run_dir()
    run.path("predictor").mkdir(exist_ok=True)
    theta = np.frombuffer(_parameters(world), "<f4")
    np.save(run.path("predictor") / "parameters.npy", theta)
    return world, run


def _parameters(world: World) -> bytes:
    """What `ready` froze, so that a newcomer gets the same."""
    from coordinator.predictor import initial_predictor

    theta = initial_predictor(world.agreement, 1)
    return (theta * 3 + np.random.default_rng(4).standard_normal(len(theta))).astype("<f4").tobytes()


class Oracle:
    """All rewards in one place: what every step must give, histories beginning again with other parties."""

    def __init__(self, world: World) -> None:
        self.world, self.members = world, tuple(GROUPS)
        self.history: np.ndarray | None = None
        self.z: float | None = None
        self.seen: dict[tuple[str, bytes], int] = {}
        self.period = self.steps = 0

    def parties(self, *names: str) -> None:
        self.members, self.history, self.z, self.period = names, None, None, self.period + 1
        self.steps = 0

    def step(self, qids: Sequence[str], texts: Sequence[str]) -> list[float | None]:
        answers = [
            parse(t, self.world.agreement.questions[q], "dpa") for q, t in zip(qids, texts, strict=True)
        ]
        keys = [(q, a.tobytes()) for q, a in zip(qids, answers, strict=True)]
        new = [i for i, k in enumerate(keys) if self.seen.setdefault(k, self.period) == self.period]
        out: list[float | None] = [None] * len(qids)
        if not new:
            return out
        asked = [qids[i] for i in new], [answers[i] for i in new]
        rewards = np.stack([self.world.members[c]._targets().score(*asked) for c in self.members])
        self.steps += 1
        result, self.history, _ = combine_clear(
            self.world.agreement.aggregation, rewards, self.history, self.z, step=self.steps
        )
        self.z = result.z_next
        for i, value in zip(new, result.rewards.tolist(), strict=True):
            out[i] = value
        return out


def check(found: Sequence[float | None], due: Sequence[float | None]) -> None:
    assert [f is None for f in found] == [d is None for d in due]
    np.testing.assert_allclose(np.array(found, dtype=float), np.array(due, dtype=float), atol=1e-6)


def ledgers(world: World) -> dict[str, list[Any]]:
    return {c: read_journal(world.root / "clients" / c / "ledger.jsonl") for c in world.members}


@pytest.mark.parametrize(
    "spec",
    [
        AggregationSpec(tau=1.0),
        AggregationSpec(variant="paper", tau=1.0),
        AggregationSpec(kind="maximin", ramp=2, band=(0.3, 0.9)),
    ],
    ids=["weighted", "paper", "maximin"],
)
def test_leave_return_with_a_new_key_and_join(tmp_path: Path, spec: AggregationSpec) -> None:
    world, run = begin(tmp_path, spec=spec)
    with run:
        operators, oracle, reward = Operators(world, run), Oracle(world), federated(world, run)
        before = ledgers(world)
        number = 0

        def steps(count: int) -> None:
            nonlocal number
            for _ in range(count):
                number += 1
                check(reward.step(number, *rollouts(world, number)), oracle.step(*rollouts(world, number)))
                assert reward.rows[number]["opened"], reward.rows[number]["reason"]

        steps(2)
        operators.change(leave=["g3"])
        world.offline.add("g3")
        oracle.parties(*(g for g in GROUPS if g != "g3"))
        steps(2)
        operators.change(rotate=["g0"])  # new keys alone: histories and period go on
        steps(2)
        world.offline.clear()
        operators.change(join=["g3"], rotate=["g3"])
        oracle.parties(*GROUPS)
        steps(2)
        assert ledgers(world) == before
        newcomer(world, "g7")
        operators.change(join=["g7"], leave=["g1"])
        oracle.parties(*(g for g in (*GROUPS, "g7") if g != "g1"))
        steps(2)
        events = [row for row in run.transcript if row["event"] == "membership"]
        changes = [(r["version"], r["period"], r["joined"], r["left"], r["rotated"]) for r in events]
        assert changes == [
            (1, 1, [], ["g3"], []), (2, 1, [], [], ["g0"]), (3, 3, ["g3"], [], []), (4, 4, ["g7"], ["g1"], [])
        ]  # fmt: skip
        assert events[-1]["directory"] == operators.current.directory.digest().hex()
        epochs = [set(row["fingerprints"]) for row in run.transcript if row["event"] == "epoch"]
        assert epochs == [
            set(GROUPS), set(GROUPS) - {"g3"}, set(GROUPS) - {"g3"}, set(GROUPS), {*GROUPS, "g7"} - {"g1"}
        ]  # fmt: skip
    verify(tmp_path / "run" / "transcript.jsonl")
    assert {c: rows for c, rows in ledgers(world).items() if c != "g7"} == before
    assert [row["release"] for row in ledgers(world)["g7"]] == [
        "context"
    ]  # it trained nothing and pays for nothing else
    # This world was set up without the pipeline: who returns shows its old, paid row once more, as a run would know it.
    assert [r["client"] for r in read_journal(tmp_path / "run" / "privacy_ledger.jsonl")] == ["g3", "g7"]


def test_sites_that_are_told_before_the_coordinator_finish_the_epoch(tmp_path: Path) -> None:
    world, run = begin(tmp_path)
    with run:
        operators, reward = Operators(world, run), federated(world, run)
        reward.step(1, *rollouts(world, 1))
        news = operators.agree(rotate=["g1"])
        for step, site in enumerate(GROUPS, start=2):
            operators.tell(news, [site], coordinator=False)
            if step < 4:  # four rounds per epoch
                assert None not in reward.step(step, *rollouts(world, step))
        operators.tell(news, [])
        assert None not in reward.step(4, *rollouts(world, 4))
        assert [row["epoch"] for row in run.transcript if row["event"] == "epoch"] == [1, 2]
        assert not [row for row in run.transcript if row["event"] == "abort"]


class Killed(Exception):
    """The whole machine stops."""


def restarted(
    world: World, root: Path, reward: FederatedReward, run: RunDir
) -> tuple[RunDir, FederatedReward]:
    """Everybody comes back with what is on disk."""
    reward.journal.close()
    run.close()
    for client in list(world.members):
        world.start(client)
    run = world.run_dir()
    return run, federated(world, run)


@pytest.mark.parametrize("at", range(1, 10))
def test_a_kill_anywhere_in_a_change_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Exchanges of the step that follows a change: setup, context, freeze of the newcomer, close, three of the set-up,
    upload, answer. The machine stops when half of the clients have answered the one numbered `at`."""
    world, run = begin(tmp_path)
    oracle, reward, operators = Oracle(world), federated(world, run), Operators(world, run)
    check(reward.step(1, *rollouts(world, 1)), oracle.step(*rollouts(world, 1)))
    newcomer(world, "g7")
    operators.change(leave=["g2"], join=["g7"], rotate=["g5"])
    exchange, left = World.exchange, [at]

    def dying(self: World, requests: Mapping[str, bytes]) -> dict[str, bytes]:
        left[0] -= 1
        if left[0] == 0:
            exchange(self, dict(list(requests.items())[: max(1, len(requests) // 2)]))
            raise Killed
        return exchange(self, requests)

    with monkeypatch.context() as patch:
        patch.setattr(World, "exchange", dying)
        with pytest.raises(Killed):
            reward.step(2, *rollouts(world, 2))
    run, reward = restarted(world, tmp_path, reward, run)
    oracle.parties(*(g for g in (*GROUPS, "g7") if g != "g2"))
    with run:
        for step in (2, 3):
            check(reward.step(step, *rollouts(world, step)), oracle.step(*rollouts(world, step)))
        assert [row["version"] for row in run.transcript if row["event"] == "membership"] == [1]
        assert [row["client"] for row in run.ledger] == ["g7"]
    assert len(ledgers(world)["g7"]) == 1


def test_in_a_cohort_members_and_groups_leave(tmp_path: Path) -> None:
    world = ready(tmp_path, groups=3, members=4, mode="cohort", release="recover")
    with world.run_dir() as run:
        operators, reward = Operators(world, run), federated(world, run)
        reward.step(1, *rollouts(world, 1))
        operators.change(leave=["g0 #1", "g2 #0", "g2 #1", "g2 #2", "g2 #3"])
        found = reward.step(2, *rollouts(world, 2))
        assert reward.rows[2]["opened"]
        assert None not in found  # under `recover` differencing is conceded: nothing is left out
        answers = [
            parse(t, world.agreement.questions[q], "dpa") for q, t in zip(*rollouts(world, 2), strict=True)
        ]
        means = [
            np.mean(
                [world.members[c]._targets().score(rollouts(world, 2)[0], answers) for c in names], axis=0
            )
            for names in (("g0 #0", "g0 #2", "g0 #3"), ("g1 #0", "g1 #1", "g1 #2", "g1 #3"))
        ]
        due = combine_clear(world.agreement.aggregation, np.stack(means), None, None)[0].rewards
        np.testing.assert_allclose(np.array(found, dtype=float), due, atol=1e-6)


def test_clear_runs_follow_too_and_give_the_same_rewards(tmp_path: Path) -> None:
    found = {}
    for mode in ("blind", "clear"):
        world, run = begin(tmp_path / mode, mode=mode)
        with run:
            reward = federated(world, run)
            first = reward.step(1, *rollouts(world, 1))
            Operators(world, run).change(leave=["g6"])
            found[mode] = [first, *(reward.step(s, *rollouts(world, s)) for s in (2, 3))]
    assert found["blind"] == found["clear"]


def test_a_newcomer_that_does_not_answer_changes_nothing(tmp_path: Path) -> None:
    world, run = begin(tmp_path)
    with run:
        newcomer(world, "g7")
        reward = federated(world, run)
        Operators(world, run).change(join=["g7"])
        world.offline.add("g7")
        with pytest.raises(RunError, match="no answer to 'setup' from g7: bring the client back"):
            reward.step(1, *rollouts(world, 1))
        assert not [row for row in run.transcript if row["event"] == "membership"]
        world.offline.clear()
        assert None not in reward.step(1, *rollouts(world, 1))


def test_in_a_simulation_with_true_answers_there_is_no_predictor_to_hand_on(tmp_path: Path) -> None:
    world = make_world(tmp_path, groups=7, min_cohort=5, true_rewards=True, truth=True)
    for client in world.clients:
        world.ask(client, "setup", run="test-run", agreement=world.agreement.digest())
    oracle = Oracle(world)
    with world.run_dir() as run:
        operators, reward = Operators(world, run), federated(world, run)
        check(reward.step(1, *rollouts(world, 1)), oracle.step(*rollouts(world, 1)))
        newcomer(world, "g7")
        operators.change(leave=["g2"], join=["g7"])
        oracle.parties(*(g for g in (*GROUPS, "g7") if g != "g2"))
        for step in (2, 3):
            check(reward.step(step, *rollouts(world, step)), oracle.step(*rollouts(world, step)))


def test_members_of_another_system_stay_the_same(tmp_path: Path) -> None:
    """The command and the coordinator refuse, and so does a site that was told otherwise."""
    world = ready(tmp_path, groups=7, min_cohort=5, system=SystemSpec(kind="grdpo"))
    with world.run_dir() as run:
        operators = Operators(world, run)
        news = operators.agree(leave=["g3"])
        with pytest.raises(ConfigError, match="members of system=grdpo stay the same"):
            renewed(world.agreement, news)
        operators.tell(news, ["g1"], coordinator=False)
        payload = {"step": 1, "opened": 0, "parameters": b"", "questions": [], "answers": []}
        found = world.rounds(run).sum(SYSTEM, "tune", payload, world.agreement.system_layout(4))
        assert isinstance(found, NotOpened)
        assert "members of system=grdpo stay the same" in found.reason


# -- the file ------------------------------------------------------------------------------------------------


def test_a_membership_file_is_read_back_and_anything_else_is_named(tmp_path: Path) -> None:
    world = ready(tmp_path)
    news = next_membership(membership_of(world.agreement), 0, leave=["g1"])
    assert Membership.decode(news.encode()) == news
    fields = json.loads(news.encode())
    key = {"group": "g0", "key": "00"}
    for raw in (
        b"", b"[]", b"\xff", json.dumps({**fields, "version": 0}).encode(), json.dumps({**fields, "period": 2}).encode(),
        json.dumps({**fields, "more": 1}).encode(), json.dumps({**fields, "clients": {"g0": key}}).encode(),
        json.dumps({**fields, "clients": {"g0": {"key": "00"}}}).encode(), json.dumps({**fields, "run": 1}).encode(),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=FILE):
            Membership.decode(raw)


def test_a_change_no_site_should_follow_is_refused(tmp_path: Path) -> None:
    world = ready(tmp_path, min_cohort=5)
    a, now = world.agreement, membership_of(world.agreement)
    news = next_membership(now, 0, rotate={"g1": bytes(31) + b"\1"})
    fields = json.loads(news.encode())

    def changed(**other: Any) -> Membership:
        return Membership.decode(json.dumps({**fields, **other}).encode())

    moved = {**fields["clients"], "g0": {**fields["clients"]["g0"], "group": "g9"}}
    fewer = {c: f for c, f in fields["clients"].items() if c != "g0"}
    for wrong, words in (
        (next_membership(now, 0, leave=["g0"]), r"4 parties would be left, secagg.min_cohort=5"),
        (changed(run="another"), "is for run 'another'"),
        (changed(clients=moved), "g0 would change group"),
        (changed(clients=fewer), "other parties begin a new period"),
    ):
        with pytest.raises(ConfigError, match=words):
            renewed(a, wrong)
    with pytest.raises(ConfigError, match="not newer"):
        renewed(renewed(a, news), news)
    twin = {**fields["clients"], "g8": {"group": "g0", "key": "ab" * 32}}
    with pytest.raises(ConfigError, match="two clients share a group"):
        renewed(a, changed(clients=twin, period=1))
    for change, words in (
        ({"leave": ["g9"]}, "leave g9: not a member"), ({}, "nothing to change"),
        ({"join": {"g0": ("g0", bytes(32))}}, "join g0: a member already"),
        ({"leave": ["g0"], "rotate": {"g0": bytes(32)}}, "nothing to change"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            next_membership(now, 0, **change)  # type: ignore[arg-type]


def test_a_newcomer_too_many_for_the_ring_is_refused(tmp_path: Path) -> None:
    """32 bits and exp(-1/0.1) leave room for four parties, not for many more."""
    world = ready(tmp_path, ring_bits=32, spec=AggregationSpec(temperature=0.0721))
    now = membership_of(world.agreement)
    crowd = {f"n{i}": (f"n{i}", i.to_bytes(32, "big")) for i in range(1, 12)}
    with pytest.raises(ConfigError, match="drowns in the rounding"):
        renewed(world.agreement, next_membership(now, 0, join=crowd))


def test_output_noise_that_was_planned_for_more_parties_is_refused(tmp_path: Path) -> None:
    """Seven groups, threshold 5, nobody may collude: five have noise in every sum; of six, four."""
    plan = plan_output(50.0, 1e-6, 10, 5, 0)
    world = ready(tmp_path, groups=7, min_cohort=5, output=plan, release="noise")
    leaves = next_membership(membership_of(world.agreement), 0, leave=["g0"])
    with pytest.raises(ConfigError, match=r"4 honest parties may be left in a sum, .* planned for 5"):
        renewed(world.agreement, leaves)
    renewed(replace(world.agreement, output=plan_output(50.0, 1e-6, 10, 4, 0)), leaves)
