"""A client that is killed and started again, anywhere: nothing is paid for or released twice."""

from __future__ import annotations

import hashlib
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appa_secure.aggregation import AggregationSpec, combine
from appa_secure.agreement import REWARD
from appa_secure.messages import REPLIES, Message, unpack
from appa_secure.secagg import cbor
from clients.store import ClientStore
from coordinator.predictor import train_predictor
from tests.clients.drive import (
    ME,
    Ledgered,
    score_body,
    train_request,
    training,
)
from tests.clients.world import World, make_world


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = make_world(tmp_path)
    world.set_up()
    return world


@pytest.mark.parametrize(("unit", "variant"), [("response", "weighted"), ("respondent", "paper")])
def test_a_restart_before_every_message_changes_no_byte_that_matters(
    tmp_path: Path, unit: str, variant: str
) -> None:
    """One federation whose clients are new objects for every message, one undisturbed: same sums, same
    ledgers.
    """

    class Restarting(World):
        def exchange(self, requests: Any) -> dict[str, bytes]:
            for client in requests:
                self.start(client)
            return super().exchange(requests)

        def ask(self, client: str, kind: str, **body: Any) -> Message:
            self.start(client)
            return super().ask(client, kind, **body)

    outcomes = []
    for name, kind in (("calm", World), ("restarting", Restarting)):
        plain = make_world(
            tmp_path / name, questions=14, plan={"unit": unit, "answers_per_unit": 2, "local_steps": 2},
            spec=AggregationSpec(variant=variant),
        )  # fmt: skip
        # q10 sorts before q3 in a reloaded state
        context = ("q10", "q3", "q2")
        rest = tuple(q for q in plain.agreement.questions if q not in context)
        agreement = replace(plain.agreement, plan=replace(plain.agreement.plan, context=context, train=rest))
        world = kind(plain.root, agreement, plain.groups, plain.embeddings, plain.identities)
        for client in world.clients:
            world.start(client)
        world.set_up()
        with world.run_dir() as run:
            theta = train_predictor(agreement, world.rounds(run), run, 1, 3e-3, lambda *_: None)
            for client in world.clients:
                world.ask(client, "freeze", parameters=theta.astype("<f4").tobytes())
            rounds, sums = world.rounds(run), []
            z = None
            for step in (1, 2):
                summed = rounds.sum(
                    REWARD, "score", score_body(world, step, step - 1, z), agreement.reward_layout(2)
                )
                sums.append(summed.sum)  # type: ignore[union-attr]
                z = combine(agreement.aggregation, sums[-1], 2, 5).z_next
            ledger = list(run.ledger)
        predicted = {c: ClientStore(world.root / "clients" / c).load()["predicted"] for c in world.clients}
        outcomes.append((theta, sums, ledger, predicted))
    np.testing.assert_array_equal(outcomes[0][0], outcomes[1][0])
    np.testing.assert_array_equal(outcomes[0][1], outcomes[1][1])
    assert outcomes[0][2] == outcomes[1][2]
    assert outcomes[0][3] == outcomes[1][3]


def test_a_kill_between_paying_and_saving_repeats_the_release_that_was_paid(
    world: World, tmp_path: Path
) -> None:
    raw = train_request(world, training(world))
    client = world.members[ME]
    saved = (tmp_path / "clients" / ME / "state.cbor").read_bytes()

    def killed(state: Any) -> None:
        raise KeyboardInterrupt

    client._store.save = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        client.handle(raw)
    lost = client._state["vector"]["update"]
    assert (tmp_path / "clients" / ME / "state.cbor").read_bytes() == saved
    again = world.start(ME)
    assert unpack(REPLIES, again.handle(raw), ME).kind == "train"
    assert again._state["vector"]["update"] == lost  # the same noise: nothing was released twice
    assert len(Ledgered(tmp_path).rows) == 2


def test_every_answer_is_on_disk_before_it_leaves(world: World, tmp_path: Path) -> None:
    raw = train_request(world, training(world))
    path = tmp_path / "clients" / ME / "state.cbor"
    reply = world.members[ME].handle(raw)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    stored = cbor.decode(path.read_bytes())
    assert stored["answered"]["train"] == [hashlib.sha256(raw).digest(), reply]


def test_a_secret_noise_key_is_drawn_once_and_kept(tmp_path: Path) -> None:
    world = make_world(tmp_path, secure_rng=True)
    keys = {c: world.members[c]._state["noise_key"] for c in world.clients}
    assert len(set(keys.values())) == len(keys)
    world.set_up()
    for client in world.clients:
        assert world.start(client)._state["noise_key"] == keys[client]
    seeded = make_world(tmp_path / "seeded")
    assert seeded.members[ME]._state["noise_key"] == hashlib.sha256(b"noise" + ME.encode()).digest()


def test_a_client_shows_nothing_of_itself(world: World) -> None:
    assert repr(world.members[ME]) == "Client('g0')"
