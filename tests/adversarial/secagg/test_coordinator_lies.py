"""A dishonest coordinator lies about rosters, keys, dropouts, layouts: refused by name, or noise."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from appa_secure.secagg import (
    Aborted,
    Aggregate,
    BadSignature,
    BelowThreshold,
    BothShareKinds,
    ClientMachine,
    ClientPolicy,
    CohortTooSmall,
    EpochReady,
    IdentityKey,
    Layout,
    OutOfOrder,
    PolicyViolation,
    ReleaseRefused,
    ReplayedRound,
    Segment,
    UnknownParty,
    WrongEpoch,
    WrongRoster,
)
from appa_secure.secagg.wire import BUNDLE, parse, seal
from tests.secagg.world import CONTEXT, LAYOUT, SESSION, World, reseal, seeded


def bundles(world: World) -> dict[str, bytes]:
    message = world.proposal()
    return {name: client.open_epoch(message) for name, client in world.clients.items()}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"threshold": 1}, PolicyViolation),  # a share would be the secret
        ({"threshold": 3}, PolicyViolation),  # a majority, but below this client's two thirds
        ({"threshold": 6}, PolicyViolation),
        ({"ring_bits": 32}, PolicyViolation),
        ({"ring_bits": 1}, PolicyViolation),  # a modulus of 2 would make all masks vanish
        ({"rounds": 0}, PolicyViolation),
        ({"rounds": 100_000}, PolicyViolation),
        ({"coordinator_key": bytes(32)}, PolicyViolation),  # everybody would know the reply keys
        ({"clients": ["site-00", "site-01"], "threshold": 2}, CohortTooSmall),
        ({"clients": ["site-01", "site-02", "site-03", "site-04"]}, PolicyViolation),  # without the receiver
        ({"clients": ["site-00", "site-00", "site-01", "site-02"]}, PolicyViolation),
        ({"clients": ["nobody", "site-00", "site-01", "site-02", "site-03"]}, UnknownParty),
    ],
)
def test_weak_proposals_are_refused_before_any_key_is_made(changes, error) -> None:
    world = World(5, min_cohort=3)
    asked: list[int] = []
    client = world.clients["site-00"]
    client._rng = lambda n: asked.append(n) or bytes(n)
    with pytest.raises(error) as caught:
        client.open_epoch(world.proposal(**changes))
    assert caught.value.sender == "coordinator"
    assert (asked, client.state.value) == ([], "idle")


def test_an_invented_peer_is_refused() -> None:
    world = World(4)
    sent = bundles(world)
    fake = IdentityKey.generate(seeded("fake"))
    copy = parse(sent["site-01"], "site-01")
    invented = reseal(copy, copy.body, fake, sender="zombie")
    with pytest.raises(WrongRoster, match="zombie"):
        world.clients["site-00"].deal_shares(
            world.request("roster", 0, {"bundles": [*sent.values(), invented]})
        )


@pytest.mark.parametrize("field", ["encryption_key", "mask_keys", "commitments"])
def test_a_swapped_key_is_refused(field: str) -> None:
    """The man in the middle: the coordinator puts its own keys into a real client's bundle."""
    world = World(4)
    sent = bundles(world)
    envelope = parse(sent["site-02"], "site-02")
    swapped = reseal(
        envelope, {**envelope.body, field: bytes(len(envelope.body[field]))}, IdentityKey.generate()
    )
    message = world.request("roster", 0, {"bundles": [*list(sent.values())[:2], swapped, sent["site-03"]]})
    client = world.clients["site-00"]
    before = client.export_state()
    with pytest.raises(BadSignature) as caught:
        client.deal_shares(message)
    assert caught.value.sender == "site-02"
    assert client.export_state() == before


def test_bundles_of_another_epoch_or_proposal_are_refused() -> None:
    world = World(4)
    sent = bundles(world)
    for message in (world.proposal(threshold=4), world.proposal()):
        other = ClientMachine(
            "site-03", world.identities["site-03"], world.directory, world.policy, seeded("other")
        ).open_epoch(message)
        roster = world.request("roster", 0, {"bundles": [*list(sent.values())[:3], other]})
        if message == world.proposal():
            world.clients["site-00"].deal_shares(roster)  # same proposal, fresh keys: a restarted client
        else:
            with pytest.raises(WrongRoster, match="another proposal"):
                world.clients["site-00"].deal_shares(roster)


def test_own_bundle_cannot_be_replaced_or_left_out() -> None:
    world = World(4)
    sent = bundles(world)
    with pytest.raises(WrongRoster, match="does not hold the bundle"):
        world.clients["site-00"].deal_shares(world.request("roster", 0, {"bundles": list(sent.values())[1:]}))


def test_a_roster_below_threshold_or_cohort_is_refused() -> None:
    world = World(6)
    sent = list(bundles(world).values())
    with pytest.raises(BelowThreshold):
        world.clients["site-00"].deal_shares(world.request("roster", 0, {"bundles": sent[:3]}))
    strict = World(6, min_cohort=6)
    sent = list(bundles(strict).values())
    with pytest.raises(CohortTooSmall):
        strict.clients["site-00"].deal_shares(strict.request("roster", 0, {"bundles": sent[:5]}))


def test_different_rosters_for_different_clients_give_no_sum() -> None:
    """The coordinator hides one dealer from one client: acknowledgements tell; without them, noise."""
    world = World(6)

    def split(name, envelope):
        if envelope.type == "start" and name == "site-00":
            body = {"dealers": envelope.body["dealers"][:5], "packets": envelope.body["packets"][:5]}
            return reseal(envelope, body)
        return envelope.raw

    world.outbound = split
    ready = world.setup()
    assert isinstance(ready, EpochReady)
    assert [(f.party, f.code) for f in ready.faults] == [("site-00", "WrongRoster")]
    outcome = world.round(1)
    refused = {f.party: f for f in outcome.faults if f.kind == "refusal"}
    assert "showed 'site-01' another roster" in refused["site-00"].reason
    # even if site-00 had gone on, its masks are salted with another transcript
    a, b = world.clients["site-00"]._epoch, world.clients["site-01"]._epoch
    assert a.transcript != b.transcript
    assert not np.array_equal(a.pair_seeds[2, 0], b.pair_seeds[2, 0])


def test_a_party_named_in_both_lists_is_refused() -> None:
    world, _ = uploaded()
    client = world.clients["site-00"]
    before = client.export_state()
    message = world.request("unmask", 1, {"survivors": list(world.names), "dropped": ["site-03"]})
    with pytest.raises(BothShareKinds, match="site-03"):
        client.unmask(message)
    assert client.export_state() == before


def test_the_second_share_kind_is_not_obtained_by_asking_again() -> None:
    world, _ = uploaded()
    client, names = world.clients["site-00"], list(world.names)
    first = world.request("unmask", 1, {"survivors": names, "dropped": []})
    second = world.request("unmask", 1, {"survivors": names[:5], "dropped": names[5:]})
    reply = client.unmask(first)
    assert client.unmask(first) == reply  # the identical request: the identical bytes
    with pytest.raises(ReplayedRound):
        client.unmask(second)
    restored = ClientMachine.restore(
        client.export_state(), "site-00", world.identities["site-00"], world.directory, world.policy
    )
    assert restored.unmask(first) == reply
    with pytest.raises(ReplayedRound):
        restored.unmask(second)


@pytest.mark.parametrize(
    ("survivors", "dropped", "error"),
    [
        ([0, 1, 2, 3, 4], [], WrongRoster),  # one party of the roster not mentioned
        ([1, 2, 3, 4, 5], [0], WrongRoster),  # the receiver itself, who uploaded
        ([0, 1, 2], [3, 4, 5], BelowThreshold),
        ([1, 0, 2, 3, 4, 5], [], WrongRoster),
        ([0, 1, 2, 3, 4, 4], [5], WrongRoster),
    ],
)
def test_lies_about_dropouts_are_refused(survivors, dropped, error) -> None:
    world, _ = uploaded()
    pick = [[world.names[i] for i in part] for part in (survivors, dropped)]
    with pytest.raises(error):
        world.clients["site-00"].unmask(
            world.request("unmask", 1, {"survivors": pick[0], "dropped": pick[1]})
        )


def test_conflicting_survivor_sets_never_both_reach_the_threshold() -> None:
    """Half of the clients hear that site-05 survived, half that it dropped: neither secret can be rebuilt."""
    world, _ = uploaded()
    names, t = list(world.names), world.coordinator.parameters.threshold
    alive = world.request("unmask", 1, {"survivors": names, "dropped": []})
    gone = world.request("unmask", 1, {"survivors": names[:5], "dropped": names[5:]})
    kinds = [0, 0]
    for i, name in enumerate(names[:5]):
        world.clients[name].unmask((alive, gone)[i % 2])
        kinds[i % 2] += 1
    assert max(kinds) < t


def test_rounds_cannot_be_replayed_or_reordered() -> None:
    world, step = uploaded(round_id=2)
    client, vector = world.clients["site-00"], world.vectors["site-00"]
    again = step.outbound["site-00"]
    first = client.upload(again, vector, layout=LAYOUT, context=CONTEXT)
    assert client.upload(again, np.zeros(LAYOUT.size), layout=LAYOUT, context=CONTEXT) == first
    body = dict(parse(again, "coordinator").body)
    other = hashlib.sha256(b"other rollouts").digest()
    for round_id in (1, 2):
        request = world.request("round", round_id, {**body, "context": other})
        with pytest.raises(ReplayedRound):
            client.upload(request, vector, layout=LAYOUT, context=other)
    with pytest.raises(OutOfOrder, match="open a new epoch"):
        client.upload(world.request("round", 4, body), vector, layout=LAYOUT, context=CONTEXT)
    with pytest.raises(ReplayedRound):
        client.open_epoch(world.proposal())


def test_a_round_given_up_can_never_be_opened() -> None:
    world, _ = uploaded(round_id=1)
    client, names = world.clients["site-00"], list(world.names)
    body = {"coding": LAYOUT.preflight(6).digest, "context": CONTEXT, "acks": []}
    client.upload(world.request("round", 2, body), world.vectors["site-00"], layout=LAYOUT, context=CONTEXT)
    with pytest.raises(ReplayedRound):
        client.unmask(world.request("unmask", 1, {"survivors": names, "dropped": []}))
    assert not client._epoch.held[0].any()


def test_messages_of_another_session_or_epoch_are_refused() -> None:
    world, _ = uploaded()
    for session, epoch in ((b"other", 1), (SESSION, 2)):
        body = {"survivors": list(world.names), "dropped": []}
        with pytest.raises(WrongEpoch):
            world.clients["site-00"].unmask(seal("unmask", session, epoch, 1, "coordinator", body, None))


@pytest.mark.parametrize("what", ["layout", "context"])
def test_another_layout_or_context_is_refused_by_the_client_that_sees_it(what: str) -> None:
    world = World(6)
    world.setup()
    if what == "layout":
        world.layouts["site-00"] = Layout((Segment("reward", 4, 0.0, 2.0), LAYOUT.segments[1]))
    else:
        world.contexts["site-00"] = hashlib.sha256(b"other").digest()
    outcome = world.round(1)
    assert isinstance(outcome, Aggregate)
    assert outcome.dropped == ("site-00",)
    expected = "LayoutMismatch" if what == "layout" else "ContextMismatch"
    assert [(f.party, f.code) for f in outcome.faults] == [("site-00", expected)]


def test_different_contexts_for_different_clients_yield_noise() -> None:
    """Model inconsistency: one client works on other rollouts. Masks do not cancel, nothing is learnt."""
    world = World(6)
    world.setup()
    other = hashlib.sha256(b"other").digest()
    world.contexts["site-00"] = other

    def lie(name, envelope):
        if envelope.type == "round" and name == "site-00":
            return reseal(envelope, {**envelope.body, "context": other})
        return envelope.raw

    def cover_up(name, envelope):  # site-00 colludes: it authenticates its upload for the expected context
        if envelope.type == "upload" and name == "site-00":
            return world.reseal(envelope, {**envelope.body, "context": CONTEXT})
        return envelope.raw

    world.outbound, world.inbound = lie, cover_up
    outcome = world.round(1)
    assert isinstance(outcome, Aborted)
    assert outcome.code == "SumOutOfRange"


def test_abort_policy_needs_everybody_at_every_step() -> None:
    world = World(5, release="abort", asked="recover")
    with pytest.raises(PolicyViolation, match="must list all"):
        world.clients["site-00"].open_epoch(world.proposal(clients=list(world.names[:4]), threshold=4))
    sent = list(bundles(world).values())
    with pytest.raises(ReleaseRefused, match="lacks site-04"):
        world.clients["site-00"].deal_shares(world.request("roster", 0, {"bundles": sent[:4]}))


def test_policy_and_threshold_are_validated_locally() -> None:
    from appa_secure.secagg import BadParameters, CoordinatorMachine, threshold_for

    world = World(5)
    for bad in ({"min_cohort": 1}, {"ring_bits": 8}, {"release": "maybe"}, {"threshold_fraction": 0.3}):
        with pytest.raises(BadParameters):
            ClientPolicy(**bad)
    for bad in (
        {"threshold": 2},
        {"threshold": 6},
        {"min_cohort": 6},
        {"clients": ["x", "y"]},
        {"rounds": 0},
    ):
        with pytest.raises(BadParameters):
            CoordinatorMachine(SESSION, world.directory, **{"min_cohort": 2, **bad})
    assert [threshold_for(n) for n in (2, 3, 4, 6, 8, 9)] == [2, 2, 3, 4, 6, 6]
    assert threshold_for(6, 0.667) == 4
    assert threshold_for(4, 0.5) == 3


def test_bundle_from_the_wrong_party_is_refused() -> None:
    world = World(3)
    step = world.coordinator.propose(1)
    reply = world.clients["site-00"].open_epoch(step.outbound["site-00"])
    assert parse(reply, "site-00").type == BUNDLE
    with pytest.raises(Exception, match="names 'site-00' as its sender"):
        world.coordinator.receive("site-01", reply)


def uploaded(round_id: int = 1):
    """A world of six in which every client has uploaded in `round_id`."""
    world = World(6)
    world.setup()
    step = world.coordinator.begin_round(round_id, CONTEXT, LAYOUT)
    for name, message in step.outbound.items():
        world.coordinator.receive(name, world.answer(name, message))
    return world, step
