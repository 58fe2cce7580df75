"""Clients join, leave and rotate their keys between two epochs of one session; sums go on, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from appa_secure.secagg import (
    Aborted,
    Aggregate,
    BadParameters,
    ClientMachine,
    ClientState,
    CoordinatorMachine,
    CorruptState,
    Directory,
    EpochReady,
    IdentityKey,
    ReplayedRound,
    UnknownParty,
    close_epoch,
)
from appa_secure.secagg.keys import COORDINATOR
from appa_secure.secagg.wire import BODIES, parse, peek, seal
from tests.secagg.world import CONTEXT, LAYOUT, SESSION, World, random_vector, seeded

NEW, LEAVING, ROTATING = "site-new", "site-01", "site-02"


def running(release: str = "abort") -> World:
    """A world of six that has opened a round of its first epoch."""
    world = World(6, release=release)
    world.setup()
    check(world, world.round(1))
    return world


def check(world: World, outcome: object) -> None:
    """The exact sum of the whole roster."""
    assert isinstance(outcome, Aggregate), outcome
    assert outcome.faults == ()
    assert outcome.contributors == world.names == tuple(sorted(world.clients))
    np.testing.assert_array_equal(outcome.ring_sum, world.ring_sum(world.names))


def fresh_key(label: str) -> IdentityKey:
    return IdentityKey.generate(seeded(("fresh", label)))


def change(
    world: World,
    *,
    join: Sequence[str] = (),
    leave: Sequence[str] = (),
    rotate: Sequence[str] = (),
    stale: Sequence[str] = (),
) -> None:
    """Every site but the `stale` ones takes the new directory; the coordinator begins again under the old session."""
    close_epoch(world.coordinator, world.exchange)
    renewed = {name: fresh_key(name) for name in (*join, *rotate)}
    world.identities = {k: v for k, v in {**world.identities, **renewed}.items() if k not in leave}
    world.names = tuple(sorted(world.identities))
    world.directory = Directory({name: world.identities[name].public_bytes() for name in world.names})
    for name in leave:
        del world.clients[name]
    for name, machine in world.clients.items():
        if name not in stale:
            machine.update_directory(world.directory, renewed.get(name))
    for name in join:
        world.clients[name] = ClientMachine(
            name, world.identities[name], world.directory, world.policy, seeded(name)
        )
        world.vectors[name] = random_vector(LAYOUT, name)
        world.layouts[name], world.contexts[name] = LAYOUT, CONTEXT
    world.coordinator = CoordinatorMachine(
        SESSION, world.directory, min_cohort=2, rounds=3, release=world.policy.release
    )


CHANGES = {
    "join": {"join": [NEW]},
    "leave": {"leave": [LEAVING]},
    "rotate": {"rotate": [ROTATING]},
    "all at once": {"join": [NEW], "leave": [LEAVING], "rotate": [ROTATING]},
}


@pytest.mark.parametrize("release", ["abort", "recover"])
@pytest.mark.parametrize("what", CHANGES)
def test_sums_go_on_exactly_after_a_membership_change(what: str, release: str) -> None:
    world = running(release)
    change(world, **CHANGES[what])
    assert isinstance(world.setup(2), EpochReady)
    for round_id in (1, 2):
        check(world, world.round(round_id))
    assert (NEW in world.names, LEAVING in world.names) == (
        "join" in CHANGES[what],
        "leave" not in CHANGES[what],
    )


@pytest.mark.parametrize(
    ("what", "phase", "code"),
    [
        ("join", "bundles", "UnknownParty"),
        ("leave", "bundles", "PolicyViolation"),
        ("rotate", "shares", "BadSignature"),
    ],
)
def test_a_client_that_was_not_updated_refuses(what: str, phase: str, code: str) -> None:
    world = running()
    change(world, **CHANGES[what], stale=["site-00"])
    outcome = world.setup(2)
    assert isinstance(outcome, Aborted)
    assert outcome.phase == phase
    assert [(f.party, f.code) for f in outcome.faults if f.kind == "refusal"] == [("site-00", code)]


def test_a_retired_key_is_not_accepted() -> None:
    """Whoever found the old key cannot take part in its client's name, nor can the client itself go on with it."""
    world = running("recover")
    thief = world.clients[ROTATING]
    change(world, rotate=[ROTATING], stale=[ROTATING])
    assert thief._identity.public_bytes() != world.directory[ROTATING]
    ready = world.setup(2)
    assert isinstance(ready, EpochReady)
    assert ready.absent == (ROTATING,)
    assert (ROTATING, "BadSignature") in [(f.party, f.code) for f in ready.faults]


def test_an_update_destroys_the_epoch_and_remembers_its_number() -> None:
    """At any moment, a round that is open included: the others open it without this client's answer."""
    world = running("recover")
    step = world.coordinator.begin_round(2, CONTEXT, LAYOUT)
    for name, message in step.outbound.items():
        world.coordinator.receive(name, world.answer(name, message))
    client = world.clients[ROTATING]
    epoch, key = client._epoch, fresh_key(ROTATING)
    assert client.state is ClientState.UPLOADED
    client.update_directory(Directory({**world.directory, ROTATING: key.public_bytes()}), key)
    assert client.state is ClientState.IDLE
    assert not epoch.secrets.any()
    assert not epoch.held.any()
    assert not epoch.pair_seeds.any()
    again = world.proposal()
    with pytest.raises(ReplayedRound):
        client.open_epoch(again)
    restored = ClientMachine.restore(client.export_state(), ROTATING, key, client._directory, world.policy)
    with pytest.raises(ReplayedRound):
        restored.open_epoch(again)


def test_a_stored_client_is_restored_with_what_it_had_and_then_updated() -> None:
    world = running()
    close_epoch(world.coordinator, world.exchange)
    stored, old = world.clients[ROTATING].export_state(), world.identities[ROTATING]
    key = fresh_key(ROTATING)
    directory = Directory({**world.directory, ROTATING: key.public_bytes()})
    with pytest.raises(CorruptState):
        ClientMachine.restore(stored, ROTATING, key, directory, world.policy)
    client = ClientMachine.restore(stored, ROTATING, old, world.directory, world.policy)
    client.update_directory(directory, key)
    assert ClientMachine.restore(client.export_state(), ROTATING, key, directory, world.policy)


def test_an_update_that_does_not_list_the_client_changes_nothing() -> None:
    world = running()
    client = world.clients[ROTATING]
    before, directory = client.export_state(), client._directory
    others = Directory({name: key for name, key in world.directory.items() if name != ROTATING})
    for wrong, identity in ((others, None), (world.directory, fresh_key(ROTATING))):
        with pytest.raises(BadParameters, match=ROTATING):
            client.update_directory(wrong, identity)
    assert (client.export_state(), client._directory) == (before, directory)
    check(world, world.round(2))


SAMPLES = {
    "uint": 4, "text": NEW, "bytes": bytes(32), "bytes:12": bytes(12), "bytes:32": bytes(32), "[text]": [NEW, "site-00"],
    "[bytes]": [],
}  # fmt: skip


@pytest.mark.parametrize("release", ["abort", "recover"])
def test_no_message_updates_a_directory(release: str) -> None:
    """Every type of message, in every state a client can be in: the parties it trusts stay the same."""
    world = running(release)
    for name in ("site-00", "site-03"):
        client = world.clients[name]
        directory, digest = client._directory, client._directory.digest()
        for type_, forms in BODIES.items():
            if name == "site-03":
                client.close_epoch()
            for round_id in (0, 2):
                body = {field: SAMPLES[form] for field, form in forms.items()}
                message = seal(type_, SESSION, 2, round_id, COORDINATOR, body, None)
                reply = world.answer(name, message)
                assert reply is None or parse(reply, name).type == "refusal"
            assert client._directory is directory
            assert client._directory.digest() == digest
    parties = sorted([*world.names, NEW])
    body = {**peek(world.proposal()).body, "clients": parties, "threshold": 5}
    with pytest.raises(UnknownParty, match=NEW):
        world.clients["site-00"].open_epoch(seal("propose", SESSION, 2, 0, COORDINATOR, body, None))
