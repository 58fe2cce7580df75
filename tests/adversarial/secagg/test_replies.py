"""Uploads and answers carry a MAC between one client and the coordinator: forged, replayed or misdirected, they count
for nothing, and nobody is blamed for them who did not send them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from appa_secure.secagg import (
    Aggregate,
    BadEncoding,
    BadMac,
    ClientMachine,
    Continue,
    CoordinatorMachine,
    EpochReady,
    IdentityKey,
    PolicyViolation,
    RemoteMisbehaviour,
    WrongEpoch,
    cbor,
    client,
    close_epoch,
    coordinator,
    opening,
)
from appa_secure.secagg.keys import LOW_ORDER, Directory, agree, x25519_public
from appa_secure.secagg.schedule import reply_key
from appa_secure.secagg.wire import Envelope, parse, peek, seal, seal_reply, verify_reply
from tests.secagg.world import CONTEXT, World, reseal, seeded

VICTIM, OTHER = "site-02", "site-03"
KINDS = ("upload", "answer")


def rounds_begun(world: World, kind: str, round_id: int = 1) -> dict[str, Envelope]:
    """The honest replies of `kind`, none of them delivered."""
    step = world.coordinator.begin_round(round_id, CONTEXT, world.layout)
    if kind == "answer":
        for name, message in step.outbound.items():
            world.coordinator.receive(name, world.answer(name, message))
        step = world.coordinator.advance()
        assert isinstance(step, Continue)
    return {name: parse(world.answer(name, message), name) for name, message in step.outbound.items()}


def refused(world: World, message: bytes, error: type[Exception] = BadMac) -> None:
    """Delivered as the victim's: named, not counted, and the genuine reply is taken all the same."""
    settled = dict(world.coordinator._epoch.settled)
    with pytest.raises(error):
        world.coordinator.receive(VICTIM, message)
    assert world.coordinator._epoch.settled == settled


def finish(world: World, kind: str, genuine: dict[str, Envelope]) -> None:
    for name, envelope in genuine.items():
        world.coordinator.receive(name, envelope.raw)
    outcome = world.coordinator.advance()
    while isinstance(outcome, Continue):
        for name, reply in world.exchange(outcome.outbound).items():
            world.coordinator.receive(name, reply)
        outcome = world.coordinator.advance()
    assert isinstance(outcome, Aggregate)
    assert outcome.contributors == world.names
    assert outcome.culprits == ()
    np.testing.assert_array_equal(outcome.ring_sum, world.ring_sum(world.names))


def by_another_client(world: World, envelope: Envelope) -> bytes:
    """Client `OTHER` puts the victim's name on a reply and authenticates it with everything it has."""
    epoch = world.coordinator._epoch
    key = world.clients[OTHER]._epoch.reply_key
    return seal_reply(envelope.type, VICTIM, envelope.body, peek(epoch.outbound[VICTIM]), epoch.context, key)


def by_a_thief_of_the_bundle(world: World, envelope: Envelope) -> bytes:
    """From all that travels in clear: the keys of bundle and proposal, the transcript."""
    epoch = world.coordinator._epoch
    stranger = X25519PrivateKey.from_private_bytes(b"\1" * 32)
    shared = agree(stranger, epoch.roster.bundle(VICTIM).encryption_key)
    key = reply_key(shared, epoch.transcript, epoch.parameters, VICTIM)
    return seal_reply(envelope.type, VICTIM, envelope.body, peek(epoch.outbound[VICTIM]), epoch.context, key)


def with_its_identity(world: World, envelope: Envelope) -> bytes:
    """The victim's long-term key signs no upload: who stole it after the set-up forges nothing in this epoch."""
    return reseal(envelope, envelope.body, world.identities[VICTIM])


def with_a_changed_bit(world: World, envelope: Envelope) -> bytes:
    at = envelope.raw.index(envelope.body["vector" if envelope.type == "upload" else "shares"])
    return envelope.raw[:at] + bytes([envelope.raw[at] ^ 1]) + envelope.raw[at + 1 :]


def without_a_proof(world: World, envelope: Envelope) -> bytes:
    return envelope.raw[: -len(envelope.proof)] + bytes(len(envelope.proof))


FORGERIES: dict[str, tuple[Callable[[World, Envelope], bytes], type[Exception]]] = {
    "another client": (by_another_client, BadMac),
    "a stranger's key": (by_a_thief_of_the_bundle, BadMac),
    "its identity key": (with_its_identity, BadEncoding),
    "a changed bit": (with_a_changed_bit, BadMac),
    "zeros": (without_a_proof, BadMac),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_reply_does_not_reach_the_sum(kind: str, forgery: str) -> None:
    world = World(6)
    world.setup()
    genuine = rounds_begun(world, kind)
    forge, error = FORGERIES[forgery]
    refused(world, forge(world, genuine[VICTIM]), error)
    finish(world, kind, genuine)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_of_another_round_is_refused(kind: str) -> None:
    """As it was, and with its MAC under a payload that says this round."""
    world = World(6)
    world.setup()
    old = rounds_begun(world, kind, 1)[VICTIM]
    world.coordinator.advance()
    if kind == "answer":
        assert world.coordinator.state.value == "ready"
    genuine = rounds_begun(world, kind, 2)
    refused(world, old.raw, WrongEpoch)
    moved = replace(peek(world.coordinator._epoch.outbound[VICTIM]), round=2)
    payload = parse(seal_reply(kind, VICTIM, old.body, moved, CONTEXT, bytes(32)), VICTIM).payload
    refused(world, cbor.encode([payload, old.proof]))
    finish(world, kind, genuine)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_of_another_epoch_is_refused(kind: str) -> None:
    """Under the key of the epoch before, for this epoch's request; and the old bytes."""
    world = World(6)
    world.setup()
    old = rounds_begun(world, kind)[VICTIM]
    key = world.clients[VICTIM]._epoch.reply_key
    world.coordinator.advance()
    close_epoch(world.coordinator, world.exchange)
    assert isinstance(world.setup(2), EpochReady)
    genuine = rounds_begun(world, kind)
    refused(world, old.raw, WrongEpoch)
    epoch = world.coordinator._epoch
    request = peek(epoch.outbound[VICTIM])
    refused(world, seal_reply(kind, VICTIM, genuine[VICTIM].body, request, CONTEXT, key))
    finish(world, kind, genuine)


def test_an_upload_is_no_answer_and_an_answer_no_upload() -> None:
    """The key is the same for both; the type is in the payload, and the phase takes one."""
    world = World(6)
    world.setup()
    uploads = rounds_begun(world, "upload")
    epoch, key = world.coordinator._epoch, world.clients[VICTIM]._epoch.reply_key
    request = peek(epoch.outbound[VICTIM])
    body = {"shares": b"", "checks": b"", "seeds": b""}
    refused(world, seal_reply("answer", VICTIM, body, request, CONTEXT, key), BadEncoding)
    for name, envelope in uploads.items():
        world.coordinator.receive(name, envelope.raw)
    step = world.coordinator.advance()
    assert isinstance(step, Continue)
    refused(world, uploads[VICTIM].raw, BadEncoding)


def test_no_round_message_is_taken_before_there_is_a_key() -> None:
    """In the set-up, with the empty key, the coordinator takes none."""
    world = World(4)
    world.coordinator.propose(1)
    request = peek(world.coordinator._epoch.outbound[VICTIM])
    body = {"coding": bytes(32), "context": CONTEXT, "vector": b""}
    for key in (b"", bytes(32)):
        refused(world, seal_reply("upload", VICTIM, body, request, CONTEXT, key), BadEncoding)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["payload", "request", "context", "key"])
def test_the_mac_covers_payload_request_and_context(kind: str, what: str) -> None:
    world = World(4)
    world.setup()
    envelope = rounds_begun(world, kind)[VICTIM]
    epoch = world.coordinator._epoch
    right = {"key": epoch.reply_keys[VICTIM], "request": epoch.outbound[VICTIM], "context": CONTEXT}
    verify_reply(envelope, **right)
    right["payload"] = envelope.payload
    changed = {**right, what: right[what][:-1] + bytes([right[what][-1] ^ 1])}
    envelope = replace(envelope, payload=changed.pop("payload"))
    with pytest.raises(BadMac) as caught:
        verify_reply(envelope, **changed)
    assert caught.value.sender == VICTIM


def test_a_partition_changed_on_the_way_blames_no_client() -> None:
    """The network swaps a survivor and a dropped party in the request to one client, which answers as it was asked: its
    shares would be of the wrong kinds. It counts as absent, not as a liar, and the sum is exact."""
    world = World(7)
    world.setup()
    world.silent = {"round": {"site-06"}}

    def swap(name: str, envelope: Envelope) -> bytes:
        if envelope.type != "unmask" or name != VICTIM:
            return envelope.raw
        survivors = sorted({*envelope.body["survivors"], "site-06"} - {"site-05"})
        return reseal(envelope, {"survivors": survivors, "dropped": ["site-05"]})

    world.outbound = swap
    outcome = world.round(1)
    assert isinstance(outcome, Aggregate)
    assert outcome.culprits == ()
    assert [(f.party, f.code) for f in outcome.faults if f.kind == "misbehaviour"] == [(VICTIM, "BadMac")]
    np.testing.assert_array_equal(outcome.ring_sum, world.ring_sum(world.names[:6]))


def test_the_network_cannot_put_its_own_key_into_the_proposal() -> None:
    """It would share the reply keys. But bundles sign the digest of the proposal they answer."""
    world = World(5)
    own = x25519_public(b"\7" * 32)

    def middle(name: str, envelope: Envelope) -> bytes:
        if envelope.type == "propose" and name == VICTIM:
            return reseal(envelope, {**envelope.body, "coordinator_key": own})
        return envelope.raw

    world.outbound = middle
    ready = world.setup()
    assert isinstance(ready, EpochReady)
    assert ready.absent == (VICTIM,)
    assert [(f.party, f.code) for f in ready.faults] == [(VICTIM, "WrongRoster")]


def test_clients_see_one_coordinator_key() -> None:
    """A coordinator that proposes another key to one client cannot show its bundle to the others, nor theirs to it."""
    world = World(5)
    other = world.clients[OTHER].open_epoch(world.proposal(coordinator_key=x25519_public(b"\7" * 32)))
    sent = [c.open_epoch(world.proposal()) for name, c in world.clients.items() if name != OTHER]
    for name in (VICTIM, OTHER):
        with pytest.raises(RemoteMisbehaviour, match="another proposal"):
            world.clients[name].deal_shares(
                world.request("roster", 0, {"bundles": [*sent[:3], other, sent[3]]})
            )


@pytest.mark.parametrize("key", sorted(LOW_ORDER), ids=lambda key: key.hex()[:6])
def test_a_low_order_key_of_the_coordinator_is_refused_with_the_reason(key: bytes) -> None:
    world = World(4)
    client = world.clients[VICTIM]
    before = client.export_state()
    with pytest.raises(PolicyViolation, match="coordinator_key is a low-order point"):
        client.open_epoch(world.proposal(coordinator_key=key))
    assert client.export_state() == before


def test_reply_keys_differ_between_clients_epochs_and_sessions() -> None:
    keys = set()
    world = World(4)
    for epoch in (1, 2):
        world.setup(epoch)
        held = world.coordinator._epoch.reply_keys
        assert held == {name: machine._epoch.reply_key for name, machine in world.clients.items()}
        keys |= set(held.values())
        close_epoch(world.coordinator, world.exchange)
    p = world.coordinator.parameters
    shared, transcript = b"\3" * 32, b"\4" * 32
    for change in ({}, {"session": b"other"}, {"epoch": 9}):
        for name in (VICTIM, OTHER):
            keys.add(reply_key(shared, transcript, replace(p, **change), name))
    keys.add(reply_key(shared, bytes(32), p, VICTIM))
    assert len(keys) == 8 + 6 + 1


@pytest.mark.parametrize("kind", KINDS)
def test_reply_keys_survive_a_kill_on_both_sides_and_no_close(kind: str) -> None:
    world = World(5)
    world.setup()
    for phase in ("before", "after"):
        world.clients = {
            name: ClientMachine.restore(
                machine.export_state(), name, world.identities[name], world.directory, world.policy
            )
            for name, machine in world.clients.items()
        }
        world.coordinator = CoordinatorMachine.restore(world.coordinator.export_state(), world.directory)
        if phase == "before":
            genuine = rounds_begun(world, kind)
    finish(world, kind, genuine)
    epochs = [machine._epoch for machine in world.clients.values()]
    key = epochs[0].reply_key
    assert key in world.coordinator.export_state()
    assert repr(key) not in repr(world.coordinator._epoch) + repr(epochs[0])
    close_epoch(world.coordinator, world.exchange)
    assert {epoch.reply_key for epoch in epochs} == {b""}
    assert key not in world.coordinator.export_state()


def test_the_coordinator_draws_a_key_for_every_epoch() -> None:
    """From its random source: two coordinators have two keys, and one has another key in every epoch."""
    keys = set()
    for seed in (1, 2):
        world = World(4, seed=seed)
        for epoch in (1, 2):
            world.setup(epoch)
            keys.add(world.coordinator.parameters.coordinator_key)
            close_epoch(world.coordinator, world.exchange)
    assert len(keys) == 4


def test_the_coordinators_private_key_is_gone_after_the_set_up() -> None:
    world = World(4)
    world.coordinator.propose(1)
    private = world.coordinator._epoch.private
    assert x25519_public(private) == world.coordinator.parameters.coordinator_key
    assert private in world.coordinator.export_state()
    assert repr(private) not in repr(world.coordinator._epoch)
    world = World(4)
    world.setup()
    assert world.coordinator._epoch.private == b""


def test_a_round_needs_no_public_key_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody signs, verifies or agrees on a key, on either side, with dropouts too. (The first round a client sees
    carries the acknowledgements of the set-up, whose signatures it checks then, once.)"""
    world = World(8)
    world.setup()
    assert isinstance(world.round(1), Aggregate)
    world.silent = {"round": {"site-07"}}

    def forbidden(*_: object) -> bytes:
        pytest.fail("a public-key operation on the round's path")

    monkeypatch.setattr(IdentityKey, "sign", forbidden)
    monkeypatch.setattr(Directory, "verifies", forbidden)
    monkeypatch.setattr(opening, "agree", forbidden)
    monkeypatch.setattr(opening, "x25519_public", forbidden)
    monkeypatch.setattr(coordinator, "x25519_public", forbidden)
    monkeypatch.setattr(client, "X25519PrivateKey", forbidden)
    outcome = world.round(2)
    assert isinstance(outcome, Aggregate)
    assert outcome.dropped == ("site-07",)


def test_refusals_stay_signed() -> None:
    """A client without an epoch has no reply key and can still say why it does not take part."""
    world = World(5)
    world.setup()
    world.clients[VICTIM].close_epoch()
    stranger = IdentityKey.generate(seeded("stranger"))
    step = world.coordinator.begin_round(1, CONTEXT, world.layout)
    refusal = parse(world.answer(VICTIM, step.outbound[VICTIM]), VICTIM)
    forged = seal("refusal", refusal.session, refusal.epoch, 1, VICTIM, refusal.body, stranger)
    with pytest.raises(RemoteMisbehaviour, match="signature"):
        world.coordinator.receive(VICTIM, forged)
    world.coordinator.receive(VICTIM, refusal.raw)
    assert (VICTIM, "refusal", "WrongEpoch") in [
        (f.party, f.kind, f.code) for f in world.coordinator._epoch.faults
    ]
