"""Whole epochs: exact sums for any dropouts, clean aborts below threshold, restarts, corrupted shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appa_secure.secagg import (
    Aborted,
    Aggregate,
    ClientMachine,
    Continue,
    CoordinatorMachine,
    CorruptState,
    EpochReady,
    Layout,
    OutOfOrder,
    Segment,
    close_epoch,
    resume,
)
from appa_secure.secagg.schedule import MASK_KEY, SEED
from appa_secure.secagg.shamir import SHARE_BYTES
from appa_secure.secagg.wire import parse
from tests.secagg.world import CONTEXT, LAYOUT, SESSION, World

PHASES = ("propose", "roster", "start", "round", "unmask")


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("ring_bits", [32, 64])
def test_sum_is_exact_without_dropouts(n: int, ring_bits: int) -> None:
    layout = Layout((Segment("a", 3, 0, 1), Segment("b", 2, -5, 2)), ring_bits)
    world = World(n, release="abort", layout=layout)
    assert isinstance(world.setup(), EpochReady)
    for r in (1, 2, 3):
        outcome = world.round(r)
        assert isinstance(outcome, Aggregate), outcome
        assert outcome.contributors == world.names
        assert outcome.faults == ()
        np.testing.assert_array_equal(outcome.ring_sum, world.ring_sum(world.names))
        exact = np.sum(list(world.vectors.values()), axis=0)
        assert np.all(np.abs(outcome.sum - exact) <= layout.preflight(n).error_bound + 1e-12)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_dropout_pattern_gives_the_survivors_sum_or_a_clean_abort(data: st.DataObject) -> None:
    n = data.draw(st.integers(3, 9), label="n")
    world = World(n, rounds=2, seed=n)
    members = st.sets(st.sampled_from(world.names), max_size=max(1, n // 3))
    world.silent = {phase: data.draw(members, label=phase) for phase in PHASES}
    t = world.coordinator.parameters.threshold
    ready = world.setup()
    bundled = set(world.names) - world.silent["propose"]
    dealers = bundled - world.silent["roster"]
    acks = dealers - world.silent["start"]
    if min(len(bundled), len(dealers), len(acks)) < t:
        assert isinstance(ready, Aborted)
        assert ready.code == "BelowThreshold"
        return
    assert isinstance(ready, EpochReady), ready
    assert set(ready.roster) == dealers
    assert set(ready.absent) == set(world.names) - dealers
    # A client that missed `start` holds no shares and can only count as dropped.
    uploaders = acks - world.silent["round"]
    answers = uploaders - world.silent["unmask"]
    for r in (1, 2):
        outcome = world.round(r)
        if len(answers) < t:
            assert isinstance(outcome, Aborted)
            assert outcome.code == "BelowThreshold"
        else:
            assert isinstance(outcome, Aggregate), outcome
            assert set(outcome.contributors) == uploaders
            assert set(outcome.dropped) == dealers - uploaders
            np.testing.assert_array_equal(outcome.ring_sum, world.ring_sum(outcome.contributors))
        parties = {fault.party for fault in outcome.faults}
        heard = answers if len(uploaders) >= t else uploaders
        assert dealers - heard <= parties  # nobody's absence goes unreported


def test_more_than_a_hundred_clients_take_the_sparse_graph() -> None:
    """Real parameters, nothing replaced: 101 clients, ten of them missing in the round."""
    world = World(101, rounds=1, seed="sparse")
    assert isinstance(world.setup(), EpochReady)
    graph = world.coordinator._epoch.graph
    assert {len(holders) for holders in graph.holders.values()} == {43}
    world.silent = {"round": set(world.names[:10])}
    outcome = world.round(1)
    assert isinstance(outcome, Aggregate), outcome
    assert set(outcome.dropped) == set(world.names[:10])
    np.testing.assert_array_equal(outcome.ring_sum, world.ring_sum(outcome.contributors))


def test_a_client_that_returns_takes_part_again() -> None:
    world = World(6)
    world.setup()
    world.silent = {"round": {world.names[2]}}
    first = world.round(1)
    world.silent = {}
    second = world.round(2)
    assert isinstance(first, Aggregate)
    assert isinstance(second, Aggregate)
    assert first.dropped == (world.names[2],)
    assert second.contributors == world.names


def test_a_round_after_an_aborted_one_works() -> None:
    world = World(5)
    world.setup()
    world.silent = {"unmask": set(world.names[:3])}
    assert isinstance(world.round(1), Aborted)
    world.silent = {}
    assert isinstance(world.round(2), Aggregate)


@pytest.mark.parametrize("wrong", [1, 2])
def test_a_corrupted_share_is_pinned_on_its_author_and_survived(wrong: int) -> None:
    world = World(8)
    world.setup()
    culprits = world.names[:wrong]
    world.silent = {"round": {world.names[7]}}

    def corrupt(name, envelope):
        if envelope.type != "answer" or name not in culprits:
            return envelope.raw
        wards = world.coordinator._epoch.graph.wards[name]
        share = bytearray(envelope.body["shares"])
        share[SHARE_BYTES * wards.index(world.names[7]) + 2] ^= 1  # of the dropped party's mask key
        return world.reseal(envelope, {**envelope.body, "shares": bytes(share)})

    world.inbound = corrupt
    outcome = world.round(1)
    if 7 - wrong >= world.coordinator.parameters.threshold:
        assert isinstance(outcome, Aggregate)
        assert outcome.culprits == culprits
        np.testing.assert_array_equal(outcome.ring_sum, world.ring_sum(world.names[:7]))
    else:
        assert isinstance(outcome, Aborted)
        assert outcome.code == "BelowThreshold"
    assert {f.party for f in outcome.faults if f.code == "BadShare"} == set(culprits)


def test_a_dealer_whose_shares_give_no_secret_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(5)
    liar = world.names[1]
    original = world.clients[liar].deal_shares

    def deal(message: bytes) -> bytes:
        world.clients[liar]._epoch.secrets[:, SEED] ^= 1  # shares of other seeds than the committed ones
        reply = original(message)
        world.clients[liar]._epoch.secrets[:, SEED] ^= 1
        return reply

    monkeypatch.setattr(world.clients[liar], "deal_shares", deal)
    assert isinstance(world.setup(), EpochReady)
    outcome = world.round(1)
    assert isinstance(outcome, Aborted)
    assert (outcome.code, outcome.culprits) == ("BadShare", (liar,))


def test_short_answer_is_reported_and_survived() -> None:
    world = World(6)
    world.setup()

    def shorten(name, envelope):
        if envelope.type == "answer" and name == world.names[0]:
            body = {**envelope.body, "shares": envelope.body["shares"][SHARE_BYTES:]}
            return world.reseal(envelope, body)
        return envelope.raw

    world.inbound = shorten
    outcome = world.round(1)
    assert isinstance(outcome, Aggregate)
    assert [(f.party, f.code) for f in outcome.faults] == [(world.names[0], "BadEncoding")]


def test_refusals_travel_with_their_reason() -> None:
    world = World(4, release="abort")
    world.setup()
    world.vectors[world.names[1]] = np.full(LAYOUT.size, 9.0)
    outcome = world.round(1)
    assert isinstance(outcome, Aborted)
    assert [(f.party, f.kind, f.code) for f in outcome.faults] == [(world.names[1], "refusal", "OutOfRange")]
    assert "segment 'reward': 4 value(s)" in outcome.faults[0].reason
    assert "9.0" not in outcome.faults[0].reason  # the reason never quotes a value
    assert world.names[1] in outcome.reason


@pytest.mark.parametrize("crash_at", ["roster", "start", "round", "unmask"])
def test_everybody_may_be_killed_between_any_two_messages(crash_at: str) -> None:
    """Clients and coordinator are rebuilt from their stored states; the same sum comes out, byte for byte."""
    undisturbed, world = World(5), World(5)
    undisturbed.setup()
    expected = undisturbed.round(1)
    assert isinstance(expected, Aggregate)

    def run(start: Continue) -> object:
        outcome: object = start
        while isinstance(outcome, Continue):
            for name, reply in world.exchange(outcome.outbound).items():
                world.coordinator.receive(name, reply)
            if crash_at in set(map(_type, outcome.outbound.values())):
                _restart(world)
                # asked again, every client gives the identical reply
                replies = world.exchange(outcome.outbound)
                assert {
                    name: parse(raw, name).proof for name, raw in replies.items()
                } == world.coordinator._epoch.settled
                assert world.coordinator.pending().outbound == {}
            outcome = world.coordinator.advance()
        return outcome

    assert isinstance(run(world.coordinator.propose(1)), EpochReady)
    outcome = run(world.coordinator.begin_round(1, CONTEXT, LAYOUT))
    assert isinstance(outcome, Aggregate)
    np.testing.assert_array_equal(outcome.ring_sum, expected.ring_sum)
    _restart(world)
    assert isinstance(world.round(2), Aggregate)


def test_resume_asks_only_those_who_have_not_answered() -> None:
    world = World(4)
    world.setup()
    step = world.coordinator.begin_round(1, CONTEXT, LAYOUT)
    first = world.names[0]
    world.coordinator.receive(first, world.answer(first, step.outbound[first]))
    world.coordinator = CoordinatorMachine.restore(world.coordinator.export_state(), world.directory)
    assert set(world.coordinator.pending().outbound) == set(world.names[1:])
    assert isinstance(resume(world.coordinator, world.exchange), Aggregate)


def test_an_upload_is_added_once_whatever_is_sent_again() -> None:
    """Uploads are not kept, so a repetition must be known by its signature, after a restart too."""
    world = World(4)
    world.setup()
    step = world.coordinator.begin_round(1, CONTEXT, LAYOUT)
    for name, message in step.outbound.items():
        reply = world.answer(name, message)
        world.coordinator.receive(name, reply)
        world.coordinator.receive(name, reply)
        world.coordinator = CoordinatorMachine.restore(world.coordinator.export_state(), world.directory)
        world.coordinator.receive(name, reply)
    first = parse(reply, name)
    other = world.reseal(first, {**first.body, "vector": bytes(len(first.body["vector"]))})
    with pytest.raises(OutOfOrder, match="two different replies"):
        world.coordinator.receive(name, other)
    outcome = world.coordinator.advance()
    while isinstance(outcome, Continue):
        for name, reply in world.exchange(outcome.outbound).items():
            world.coordinator.receive(name, reply)
        outcome = world.coordinator.advance()
    assert isinstance(outcome, Aggregate)
    np.testing.assert_array_equal(outcome.ring_sum, world.ring_sum(world.names))


def test_damaged_or_foreign_state_is_refused() -> None:
    world = World(3)
    world.setup()
    a, b = world.names[:2]
    state = world.clients[a].export_state()
    with pytest.raises(CorruptState):
        ClientMachine.restore(state[:-1], a, world.identities[a], world.directory, world.policy)
    with pytest.raises(CorruptState):
        ClientMachine.restore(state, b, world.identities[b], world.directory, world.policy)
    with pytest.raises(CorruptState):
        CoordinatorMachine.restore(world.coordinator.export_state() + b"\0", world.directory)


def test_closing_destroys_secrets_everywhere() -> None:
    world = World(3)
    world.setup()
    epochs = [client._epoch for client in world.clients.values()]
    close_epoch(world.coordinator, world.exchange)
    for epoch, client in zip(epochs, world.clients.values(), strict=True):
        assert not any(secret.any() for secret in (epoch.secrets, epoch.pair_seeds, epoch.held))
        assert client.state.value == "idle"
    assert isinstance(world.setup(2), EpochReady)
    assert world.coordinator.parameters.session == SESSION


def test_used_rounds_leave_no_secrets() -> None:
    world = World(3)
    world.setup()
    world.round(2)
    for client in world.clients.values():
        epoch = client._epoch
        assert not any(a.any() for a in (epoch.secrets[:2], epoch.pair_seeds[:2], epoch.held[:2]))
        assert not epoch.secrets[:, MASK_KEY].any()
        assert epoch.encryption_private == b""
        assert epoch.secrets[2, SEED].any()


def test_machines_and_keys_do_not_print_secrets() -> None:
    world = World(3, seed="repr")
    client = world.clients[world.names[0]]
    client.open_epoch(world.coordinator.propose(1).outbound[world.names[0]])
    text = repr(client) + repr(client._epoch) + repr(world.identities[world.names[0]])
    assert client._epoch.encryption_private.hex() not in text
    assert repr(client._epoch.encryption_private) not in text


def _type(message: bytes) -> str:
    from appa_secure.secagg.wire import peek

    return peek(message).type


def _restart(world: World) -> None:
    world.clients = {
        name: ClientMachine.restore(
            client.export_state(), name, world.identities[name], world.directory, world.policy
        )
        for name, client in world.clients.items()
    }
    world.coordinator = CoordinatorMachine.restore(world.coordinator.export_state(), world.directory)
