"""Secure sums as the coordinator gets them: exact, complete or not at all, and all in the transcript."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appa_secure.agreement import PREDICTOR, REWARD
from appa_secure.errors import RunError
from appa_secure.messages import REPLIES, REQUESTS, Message, Refused, digest, pack, unpack
from appa_secure.records import verify
from appa_secure.secagg.errors import BadEncoding, BadShare
from appa_secure.secagg.keys import COORDINATOR
from appa_secure.secagg.wire import START, peek
from clients.client import Client
from clients.store import ClientStore
from coordinator.predictor import initial_predictor
from coordinator.rounds import NotOpened, Rounds, Summed, ask
from tests.clients.drive import score_body
from tests.clients.world import World, make_world


def ready(root: Path, **changes: Any) -> World:
    """A world in which alignment may begin."""
    world = make_world(root, **changes)
    world.set_up()
    theta = initial_predictor(world.agreement, 1).astype("<f4").tobytes()
    for client in world.clients:
        assert world.ask(client, "freeze", parameters=theta).kind == "freeze"
    return world


def reward_sum(world: World, rounds: Rounds, step: int = 1, opened: int = 0) -> Summed | NotOpened:
    return rounds.sum(REWARD, "score", score_body(world, step, opened), world.agreement.reward_layout(2))


def update_sum(world: World, rounds: Rounds, index: int = 0) -> Summed | NotOpened:
    theta = initial_predictor(world.agreement, 1).astype("<f4").tobytes()
    payload = {"round": index, "parameters": theta}
    return rounds.sum(PREDICTOR, "train", payload, world.agreement.predictor_layout)


@pytest.fixture
def vectors(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[np.ndarray]]:
    """What each client put into its sums, as raw float64."""
    seen: dict[str, list[np.ndarray]] = {}
    send = Client._send

    def spy(self: Client, kind: str, body: Any, vector: np.ndarray, layout: Any, noise: Any = None) -> bytes:
        seen.setdefault(self.client_id, []).append(np.array(vector))
        return send(self, kind, body, vector, layout, noise)

    monkeypatch.setattr(Client, "_send", spy)
    return seen


# -- exactness -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring_bits", [32, 64])
def test_blind_and_clear_sums_are_equal_bit_for_bit_and_near_float64(
    tmp_path: Path, vectors: dict[str, list[np.ndarray]], ring_bits: int
) -> None:
    sums: dict[str, list[np.ndarray]] = {}
    for mode in ("blind", "clear"):
        vectors.clear()
        world = make_world(tmp_path / mode, mode=mode, ring_bits=ring_bits)
        world.set_up()
        sums[mode] = []
        with world.run_dir() as run:
            rounds = world.rounds(run)
            for index in range(2):
                found = update_sum(world, rounds, index)
                assert isinstance(found, Summed)
                sums[mode].append(found.sum)
            theta = initial_predictor(world.agreement, 1).astype("<f4").tobytes()
            for client in world.clients:
                world.ask(client, "freeze", parameters=theta)
            for step in (1, 2, 3):
                found = reward_sum(world, rounds, step, step - 1)
                assert isinstance(found, Summed)
                assert found.contributors == world.clients
                sums[mode].append(found.sum)
        layouts = [world.agreement.predictor_layout] * 2 + [world.agreement.reward_layout(2)] * 3
        for number, (total, layout) in enumerate(zip(sums[mode], layouts, strict=True)):
            exact = sum(vectors[c][number] for c in world.clients)
            assert (np.abs(total - exact) <= layout.preflight(5).error_bound * (1 + 1e-9) + 1e-15).all()
    for blind, clear in zip(sums["blind"], sums["clear"], strict=True):
        np.testing.assert_array_equal(blind, clear)


def test_a_cohort_sums_each_groups_members(tmp_path: Path, vectors: dict[str, list[np.ndarray]]) -> None:
    world = ready(tmp_path, groups=2, members=3, mode="cohort", release="recover")
    with world.run_dir() as run:
        rounds = world.rounds(run)
        for group in ("g0", "g1"):
            found = rounds.sum(
                f"reward/{group}", "score", score_body(world), world.agreement.reward_layout(2)
            )
            assert isinstance(found, Summed)
            mine = [vectors[c][0] for c in world.clients if c.startswith(group)]
            np.testing.assert_allclose(found.sum, np.sum(mine, axis=0), atol=1e-12)
            assert found.contributors == tuple(c for c in world.clients if c.startswith(group))


def test_replies_of_the_contributors_come_with_the_sum(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    world.set_up()
    with world.run_dir() as run:
        found = update_sum(world, world.rounds(run))
    assert isinstance(found, Summed)
    assert set(found.replies) == set(world.clients)
    assert all(set(fields) == {"ledger"} for fields in found.replies.values())


# -- dropouts ------------------------------------------------------------------------------------------------


def at(kind: str, client: str, times: int = 1) -> Callable[[str, Message], bool]:
    """Lose the first `times` messages of a kind to one client."""
    left = [times]

    def lose(name: str, request: Message) -> bool:
        hit = name == client and request.kind == kind and left[0] > 0
        left[0] -= hit
        return hit

    return lose


@pytest.mark.parametrize("phase", ["bundle", "shares", "acks", "upload", "unmask"])
def test_under_abort_a_dropout_in_any_phase_opens_nothing_and_the_next_round_works(
    tmp_path: Path, phase: str
) -> None:
    world = ready(tmp_path)
    world.watched.clear()
    with world.run_dir() as run:
        rounds = world.rounds(run)
        last = 1 if phase in ("upload", "unmask") else 0  # the others fail before any step was opened
        if last:
            assert isinstance(reward_sum(world, rounds), Summed)
        skip = {"bundle": 0, "shares": 1, "acks": 2, "upload": 0, "unmask": 0}[phase]
        kind = "score" if phase == "upload" else "secagg"
        seen = [0]

        def lose(client: str, request: Message) -> bool:
            # Shares of four open the sum of five: it takes two who upload and then say no more.
            if request.kind != kind or client not in (("g2", "g3") if phase == "unmask" else ("g2",)):
                return False
            seen[0] += 1
            return seen[0] > skip

        world.lose = lose
        found = reward_sum(world, rounds, 2, last)
        assert isinstance(found, NotOpened)
        assert "g2" in found.reason or phase == "unmask"
        world.lose = None
        again = reward_sum(world, rounds, 3, last)
        assert isinstance(again, Summed)
        assert again.contributors == world.clients
        aborts = [row for row in run.transcript if row["event"] == "abort"]
        assert len(aborts) == 1
        assert "g2" in str(aborts[0]) or "3 answers, the threshold is 4" in str(aborts[0])


def test_one_client_that_falls_silent_after_its_upload_does_not_matter(tmp_path: Path) -> None:
    world = ready(tmp_path)
    with world.run_dir() as run:
        rounds = world.rounds(run)
        assert isinstance(reward_sum(world, rounds), Summed)
        world.lose = at("secagg", "g2")
        found = reward_sum(world, rounds, 2, 1)
        assert isinstance(found, Summed)
        assert found.contributors == world.clients
        world.lose = None
        assert isinstance(reward_sum(world, rounds, 3, 2), Summed)  # and it goes on with the others


def test_under_recover_the_survivors_sum_is_opened(
    tmp_path: Path, vectors: dict[str, list[np.ndarray]]
) -> None:
    world = ready(tmp_path, groups=2, members=5, mode="cohort", release="recover")
    with world.run_dir() as run:
        rounds = world.rounds(run)
        world.lose = at("score", "g0 #1")
        found = rounds.sum("reward/g0", "score", score_body(world), world.agreement.reward_layout(2))
        assert isinstance(found, Summed)
        assert found.dropped == ("g0 #1",)
        there = [c for c in world.clients if c.startswith("g0") and c != "g0 #1"]
        assert found.contributors == tuple(there)
        np.testing.assert_allclose(found.sum, sum(vectors[c][0] for c in there), atol=1e-12)
        world.lose = lambda client, request: client in ("g0 #0", "g0 #1") and request.kind == "score"
        below = rounds.sum("reward/g0", "score", score_body(world, 2), world.agreement.reward_layout(2))
        assert isinstance(below, NotOpened)  # 3 of 5, the threshold is 4


def test_a_client_that_refuses_is_named_with_its_reason(tmp_path: Path) -> None:
    world = ready(tmp_path)
    with world.run_dir() as run:
        rounds = world.rounds(run)
        body = {**score_body(world), "answers": ["not", "readable"]}
        found = rounds.sum(REWARD, "score", body, world.agreement.reward_layout(2))
        assert isinstance(found, NotOpened)
        assert "client 'g0' refused: coordinator: score: not an answer to a question" in found.reason
        (row,) = [r for r in run.transcript if r["event"] == "abort"]
        assert "not an answer to a question" in str(row["faults"])


# -- epochs and the transcript -------------------------------------------------------------------------------


def test_a_new_epoch_begins_when_one_is_used_up_and_numbers_never_repeat(tmp_path: Path) -> None:
    world = ready(tmp_path)  # four rounds per epoch
    with world.run_dir() as run:
        rounds = world.rounds(run)
        for step in range(1, 7):
            assert isinstance(reward_sum(world, rounds, step, step - 1), Summed)
        again = world.rounds(run)  # a coordinator that was restarted and remembers no machine
        assert isinstance(reward_sum(world, again, 7, 6), Summed)
        epochs = [row for row in run.transcript if row["event"] == "epoch"]
        assert [row["epoch"] for row in epochs] == [1, 2, 3]
        opened = [(row["epoch"], row["round"]) for row in run.transcript if row["event"] == "round"]
        assert opened == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1)]
        for row in epochs:
            assert set(row["fingerprints"]) == set(world.clients)


def test_a_round_is_in_the_transcript_with_the_digest_of_every_upload(tmp_path: Path) -> None:
    world = ready(tmp_path)
    world.watched.clear()
    with world.run_dir() as run:
        assert isinstance(reward_sum(world, world.rounds(run)), Summed)
        (row,) = [r for r in run.transcript if r["event"] == "round"]
        (epoch,) = [r for r in run.transcript if r["event"] == "epoch"]
    replies = {c: reply for c, raw, reply in world.watched if reply is not None and b"score" in raw}
    for client in world.clients:
        assert row["messages"][f"upload/{client}"] == hashlib.sha256(replies[client]).hexdigest()
        assert f"answer/{client}" in row["messages"]
    assert row["context"] == digest("score", {"session": REWARD, **score_body(world)}).hex()
    assert row["roster_hash"] == epoch["roster_hash"]
    assert row["contributors"] == list(world.clients)
    assert row["bytes_per_client"] >= 8 * world.agreement.reward_layout(2).size
    assert verify(world.root / "run" / "transcript.jsonl")[0] == 2


def test_clear_rounds_say_that_they_were_not_masked(tmp_path: Path) -> None:
    world = ready(tmp_path, mode="clear")
    with world.run_dir() as run:
        assert isinstance(reward_sum(world, world.rounds(run)), Summed)
        world.offline.add("g1")
        found = reward_sum(world, world.rounds(run), 2, 1)
        assert isinstance(found, NotOpened)
        assert "g1" in found.reason
        (row,) = [r for r in run.transcript if r["event"] == "round"]
    assert row["masked"] is False
    assert row["roster_hash"] == ""


# -- clients that do not behave ------------------------------------------------------------------------------


class Stub:
    """A client that answers every request with the same bytes."""

    def __init__(self, reply: bytes) -> None:
        self.handle = lambda raw: reply


def stubbed(world: World, client: str, reply: bytes) -> World:
    world.members[client] = Stub(reply)  # type: ignore[assignment]
    return world


@pytest.mark.parametrize(
    "reply", [b"", b"\xff", pack(REPLIES, "setup"), pack(REPLIES, "secagg", message=b"junk")]
)
def test_nonsense_from_one_client_opens_nothing_and_is_recorded(tmp_path: Path, reply: bytes) -> None:
    world = ready(tmp_path)
    with world.run_dir() as run:
        found = reward_sum(stubbed(world, "g3", reply), world.rounds(run))
        assert isinstance(found, NotOpened)
        assert "g3" in found.reason
        world.start("g3")
        assert isinstance(reward_sum(world, world.rounds(run)), Summed)


@pytest.mark.parametrize("message", [b"", b"\0" * 7, b"\0" * 8, b"\0" * 8 * 100])
def test_a_clear_vector_of_another_length_is_refused_not_broadcast(tmp_path: Path, message: bytes) -> None:
    world = stubbed(
        ready(tmp_path, mode="clear"), "g3", pack(REPLIES, "score", message=message, ledger=b"[]")
    )
    with world.run_dir() as run, pytest.raises(BadEncoding, match=r"g3: score: \d+ bytes"):
        reward_sum(world, world.rounds(run))


def test_asking_everyone_names_who_refuses_is_silent_or_answers_beside_the_point(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    agreement = world.agreement
    replies = ask(world, "setup", run="test-run", agreement=agreement.digest())
    assert set(replies) == set(world.clients)
    with pytest.raises(Refused, match=r"'g0' refused.*differs") as caught:
        ask(world, "setup", run="test-run", agreement=replace(agreement, min_cohort=2).digest())
    assert (caught.value.client, caught.value.code) == ("g0", "AgreementMismatch")
    world.offline = {"g1", "g4"}
    with pytest.raises(RunError, match="g1, g4: bring the client back"):
        ask(world, "context")
    world.offline = set()
    stubbed(world, "g2", pack(REPLIES, "freeze"))
    with pytest.raises(BadEncoding, match=r"g2.*answered 'context' with 'freeze'"):
        ask(world, "context")


def test_closing_destroys_the_secrets_of_unused_rounds(tmp_path: Path) -> None:
    world = ready(tmp_path)
    with world.run_dir() as run:
        rounds = world.rounds(run)
        assert isinstance(reward_sum(world, rounds), Summed)
        machines = [client._machines[REWARD] for client in world.members.values()]
        assert all(machine._epoch is not None for machine in machines)
        rounds.close()
        assert all(machine._epoch is None for machine in machines)
        stored = ClientStore(tmp_path / "clients" / "g0").load()["machines"][REWARD]
        assert stored == machines[0].export_state()
        assert isinstance(reward_sum(world, rounds, 2, 1), Summed)  # a later sum sets a new epoch up
        assert len([row for row in run.transcript if row["event"] == "epoch"]) == 2


def test_the_transcript_names_culprits_and_pairs_of_which_one_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dealer's packets do not open: one holder says so, which is its word against the dealer's."""
    world = make_world(tmp_path)
    liar, victim = world.clients[:2]
    answer = world.members[liar].handle

    def refusing(raw: bytes) -> bytes:
        """Claims, at the final roster, that the packet of `victim` does not open."""
        message = unpack(REQUESTS, raw, COORDINATOR)
        if message.kind != "secagg" or peek(message.body["message"]).type != START:
            return answer(raw)
        machine = world.members[liar]._machine(message.body["session"])
        error = BadShare(victim, "packet does not open")
        return pack(REPLIES, "secagg", message=machine.refuse(message.body["message"], error))

    world.set_up()
    monkeypatch.setattr(world.members[liar], "handle", refusing)
    with world.run_dir() as run:
        summed = update_sum(world, world.rounds(run))
        aborts = [row for row in run.transcript if row["event"] == "abort"]
    assert isinstance(summed, NotOpened)
    assert f"{liar} or {victim}: one of them lies about a packet" in aborts[0]["faults"]
