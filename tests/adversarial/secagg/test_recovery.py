"""Lies about dropped parties' masks: the sum stays exact and the liar is named. Mixed partitions open nothing."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from appa_secure.secagg import (
    Aggregate,
    BelowThreshold,
    ClientMachine,
    CoordinatorMachine,
    EpochReady,
    IdentityKey,
    OutOfOrder,
    dealing,
    opening,
    policy,
)
from appa_secure.secagg.graph import Sharing
from appa_secure.secagg.graph import sparse as real_sparse
from appa_secure.secagg.opening import Opening
from appa_secure.secagg.schedule import ANSWER_KEY, MASK_KEY, SEED, answer_key
from appa_secure.secagg.shamir import pack
from appa_secure.secagg.wire import named_sender, parse
from tests.secagg.world import CONTEXT, LAYOUT, World, reseal, seeded

GONE = "site-07"


def world_with_a_dropout() -> World:
    world = World(8)
    world.setup()
    world.silent = {"round": {GONE}}
    return world


def check_exact(world: World, outcome: object, culprits: tuple[str, ...]) -> None:
    assert isinstance(outcome, Aggregate), outcome
    assert outcome.culprits == culprits
    np.testing.assert_array_equal(outcome.ring_sum, world.ring_sum(outcome.contributors))


def test_recovery_needs_no_key_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_with_a_dropout()
    monkeypatch.setattr(opening, "agree", lambda *_: pytest.fail("key agreement on the round's path"))
    monkeypatch.setattr(opening, "x25519_public", lambda *_: pytest.fail("public key on the round's path"))
    check_exact(world, world.round(1), ())


def test_a_survivor_that_falls_silent_does_not_stop_recovery() -> None:
    world = world_with_a_dropout()
    world.silent["unmask"] = {"site-00"}
    outcome = world.round(1)
    check_exact(world, outcome, ())
    assert "site-00" in outcome.contributors


def test_a_survivor_that_lies_about_a_pair_seed_is_named() -> None:
    world = world_with_a_dropout()

    def lie(name, envelope):
        if envelope.type != "answer" or name != "site-02":
            return envelope.raw
        return world.reseal(envelope, {**envelope.body, "checks": bytes(16)})

    world.inbound = lie
    check_exact(world, world.round(1), ("site-02",))


@pytest.mark.parametrize("how", ["unreadable", "other seeds"])
def test_a_dropped_party_that_sealed_wrong_pair_seeds_is_named(how: str, monkeypatch) -> None:
    world = World(8)
    honest = dealing.seal_pair_seeds

    def seal(epoch, transcript, client, seeds):
        if client != GONE:
            return honest(epoch, transcript, client, seeds)
        table = honest(epoch, transcript, client, seeds ^ np.uint8(1))
        return bytes(len(table)) if how == "unreadable" else table

    monkeypatch.setattr(dealing, "seal_pair_seeds", seal)
    world.setup()
    world.silent = {"round": {GONE}}
    check_exact(world, world.round(1), (GONE,))


def test_an_answer_sealed_under_another_key_is_named_and_survived() -> None:
    world = world_with_a_dropout()

    def lie(name, envelope):
        if envelope.type != "answer" or name != "site-02":
            return envelope.raw
        seeds = bytes(len(envelope.body["seeds"]))
        return world.reseal(envelope, {**envelope.body, "seeds": seeds})

    world.inbound = lie
    check_exact(world, world.round(1), ("site-02",))


def test_a_dropped_party_that_shared_another_key_than_its_own_is_named(monkeypatch) -> None:
    """Its shares give a key, but not the one its peers masked with: the round ends with its name."""
    world = World(8)
    honest = dealing.bundle_body

    def bundle(parameters, client, private, secrets):
        body = honest(parameters, client, private, secrets)
        if client == GONE:
            other = secrets.copy()
            other[:, MASK_KEY, 5] ^= 1
            body["mask_keys"] = honest(parameters, client, private, other)["mask_keys"]
        return body

    monkeypatch.setattr(dealing, "bundle_body", bundle)
    world.setup()
    world.silent = {"round": {GONE}}
    outcome = world.round(1)
    assert (outcome.code, outcome.culprits) == ("BadShare", (GONE,))


LIES = st.tuples(st.sampled_from(["shares", "checks", "seeds"]), st.integers(0, 10**4), st.integers(1, 255))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_lies_in_answers_never_change_a_sum_or_accuse_the_honest(data: st.DataObject) -> None:
    """Any liars flip any bytes of their answers: the exact sum, or an abort; nobody else is accused."""
    n = data.draw(st.integers(4, 9), label="n")
    world = World(n, rounds=1, seed=n)
    gone = data.draw(st.sets(st.sampled_from(world.names), max_size=n // 4), label="gone")
    lies = data.draw(st.dictionaries(st.sampled_from(world.names), LIES, max_size=n // 2), label="lies")
    world.setup()
    world.silent = {"round": gone}

    def lie(name, envelope):
        if envelope.type != "answer" or name not in lies:
            return envelope.raw
        field, position, flip = lies[name]
        value = bytearray(envelope.body[field])
        if value:
            value[position % len(value)] ^= flip
        return world.reseal(envelope, {**envelope.body, field: bytes(value)})

    world.inbound = lie
    outcome = world.round(1)
    if isinstance(outcome, Aggregate):
        np.testing.assert_array_equal(outcome.ring_sum, world.ring_sum(outcome.contributors))
        assert set(outcome.contributors) == set(world.names) - gone
    else:
        assert outcome.code == "BelowThreshold"
    accused = {fault.party for fault in outcome.faults if fault.kind == "misbehaviour"}
    assert accused <= lies.keys() - gone
    if isinstance(outcome, Aggregate) and len(accused) < len(lies.keys() - gone):
        unnamed = lies.keys() - gone - accused
        assert not gone
        assert all(
            lies[name][0] == "checks" for name in unnamed
        )  # without dropped parties there are none to falsify


@pytest.fixture
def sparse(monkeypatch: pytest.MonkeyPatch) -> Sharing:
    """Six holders each: the degrees that real bounds ask for need more clients than a test should have."""
    sharing = Sharing(degree=6, threshold=4, quorum=36, acks=30, smallest_group=2, corrupt=4)
    monkeypatch.setattr(policy, "COMPLETE_UP_TO", 10)
    monkeypatch.setattr(policy, "sparse", lambda n: sharing)
    return sharing


def test_two_partitions_on_a_sparse_graph_do_not_isolate_a_party(sparse: Sharing) -> None:
    """The victim's holders hear that nobody dropped out, everybody else that all the victim's peers did. So the
    first give shares of its seed, the others the mask keys of all its peers: everything that hides its vector.
    But whoever is called dropped elsewhere cannot be read here."""
    world = World(60, rounds=1, seed="isolate")
    world.setup()
    for name, message in world.coordinator.begin_round(1, CONTEXT, LAYOUT).outbound.items():
        world.answer(name, message)
    epoch, names = world.coordinator._epoch, list(world.names)
    graph = epoch.graph
    away = {v: {*graph.peers[v], v, *graph.holders[v]} for v in names}
    victim = max(names, key=lambda v: min(len(set(graph.holders[p]) - away[v]) for p in graph.peers[v]))
    peers, near = list(graph.peers[victim]), set(graph.holders[victim])
    rest = [name for name in names if name not in peers]

    def ask(told: list[str], survivors: list[str], dropped: list[str]) -> dict[str, np.ndarray]:
        """The shares in clear that the parties in `told` give for this partition."""
        view = Opening(
            epoch.roster, graph, epoch.transcript, 1, tuple(survivors), tuple(dropped), epoch.digests, {}
        )
        request = world.request("unmask", 1, {"survivors": survivors, "dropped": dropped})
        return {name: view.check(parse(world.clients[name].unmask(request), name)) for name in told}

    first = ask(sorted(near), names, [])
    second = ask([name for name in rest if name not in near], rest, peers)
    view = Opening(epoch.roster, graph, epoch.transcript, 1, tuple(names), (), epoch.digests, {})
    keys, _ = view._reconstruct(dict.fromkeys(peers, MASK_KEY), second)
    assert keys.keys() == set(peers)  # the attack has the mask keys of all the victim's peers,
    assert len(first) >= sparse.threshold  # and enough holders of its seed have answered,
    readable = {
        name
        for name in first
        if name in view._reconstruct({name: ANSWER_KEY}, first if name in peers else {**first, **second})[0]
    }
    assert len(readable) < sparse.threshold  # but too few of their answers can be read
    assert not readable & keys.keys()


def test_seed_shares_travel_under_the_senders_own_answer_key_only() -> None:
    world = World(5)
    world.setup()
    held = {name: client._epoch.held[0, :, SEED].copy() for name, client in world.clients.items()}
    own = {name: client._epoch.secrets[0, ANSWER_KEY].tobytes() for name, client in world.clients.items()}
    answers = {}

    def note(name, envelope):
        if envelope.type == "answer":
            answers[name] = envelope
        return envelope.raw

    world.inbound = note
    check_exact(world, world.round(1), ())
    epoch = world.coordinator._epoch
    for name, answer in answers.items():
        assert not any(pack(share) in answer.raw for share in held[name])
        key = answer_key(own[name], epoch.transcript, epoch.parameters, name, 1)
        sealed = answer.body["seeds"]
        assert ChaCha20Poly1305(key).decrypt(bytes(12), sealed, None) == pack(held[name])
        foreign = [own[other] for other in world.names if other != name]
        for secret in (bytes(32), *foreign):  # what else the coordinator may know or open
            key = answer_key(secret, epoch.transcript, epoch.parameters, name, 1)
            with pytest.raises(InvalidTag):
                ChaCha20Poly1305(key).decrypt(bytes(12), sealed, None)


def test_a_table_row_is_opened_by_the_mask_key_of_its_round_only(monkeypatch) -> None:
    world, keys = World(5), {}
    honest = dealing.seal_pair_seeds

    def seal(epoch, transcript, client, seeds):
        keys[client] = [secrets[MASK_KEY].tobytes() for secrets in epoch.secrets]
        return honest(epoch, transcript, client, seeds)

    monkeypatch.setattr(dealing, "seal_pair_seeds", seal)
    world.setup()
    epoch = world.coordinator._epoch
    for name, client in world.clients.items():
        for r, seeds in enumerate(client._epoch.pair_seeds, start=1):
            view = Opening(
                epoch.roster, epoch.graph, epoch.transcript, r, world.names, (), epoch.digests, epoch.tables
            )
            assert view._open_row(name, keys[name][r - 1]) == [seed.tobytes() for seed in seeds]
            for key in (bytes(32), keys[name][r % 3], *(keys[n][r - 1] for n in world.names if n != name)):
                assert view._open_row(name, key) == []


def test_nobody_answers_for_a_round_without_an_upload() -> None:
    world = World(5)
    world.setup()
    client = world.clients["site-00"]
    before = client.export_state()
    with pytest.raises(OutOfOrder):
        client.unmask(world.request("unmask", 1, {"survivors": list(world.names), "dropped": []}))
    assert client.export_state() == before


def test_a_sparse_graph_gives_exact_sums_through_dropouts_and_restarts(sparse: Sharing) -> None:
    world = World(40, rounds=2, seed="sparse")
    world.silent = {"propose": {"site-00"}, "start": {"site-05"}}
    ready = world.setup()
    assert isinstance(ready, EpochReady), ready
    graph = world.coordinator._epoch.graph
    assert {len(holders) for holders in graph.holders.values()} == {7}
    assert max(map(len, graph.peers.values())) < 25  # far from everybody
    world.silent = {"round": {"site-05", "site-11"}, "unmask": {"site-12"}}
    outcome = world.round(1)
    check_exact(world, outcome, ())
    assert set(outcome.dropped) == {"site-05", "site-11"}
    world.coordinator = CoordinatorMachine.restore(world.coordinator.export_state(), world.directory)
    world.clients = {
        name: ClientMachine.restore(
            client.export_state(), name, world.identities[name], world.directory, world.policy
        )
        for name, client in world.clients.items()
    }
    check_exact(world, world.round(2), ())


def test_a_client_hidden_from_its_holders_does_not_upload(sparse: Sharing) -> None:
    """The victim is shown a list of dealers without its own holders, and no packet but its own: it would mask with
    nobody honest, while its holders give its seed away. Only the others' signatures tell it."""
    world = World(40, rounds=1, seed="hidden")
    victim = "site-03"

    def hide(name, envelope):
        if envelope.type == "start" and name == victim:
            strangers = [
                n for n in world.names if n not in set(world.clients[victim]._epoch.holders) - {victim}
            ]
            packets = [raw for raw in envelope.body["packets"] if named_sender(raw, "x") == victim]
            return reseal(envelope, {"dealers": strangers, "packets": packets})
        return envelope.raw

    def keep_quiet(name, envelope):
        return None if name == victim and envelope.type == "ready" else envelope.raw

    world.outbound, world.inbound = hide, keep_quiet
    assert isinstance(world.setup(), EpochReady)
    assert world.clients[victim]._epoch.peers == ()
    epoch = world.clients[victim]._epoch
    body = {"coding": LAYOUT.preflight(len(epoch.dealers)).digest, "context": CONTEXT}
    signed = [name for name in epoch.dealers if name != victim]
    assert len(signed) >= sparse.acks
    for acks in ([], [world.coordinator._epoch.acks[name] for name in signed]):
        reply = parse(world.answer(victim, world.request("round", 1, {**body, "acks": acks})), victim)
        assert (reply.type, reply.body["code"]) == ("refusal", "WrongRoster")


def test_acknowledgements_must_rule_out_a_second_transcript(sparse: Sharing) -> None:
    """27 of 40 would be two thirds; with colluders signing twice, two transcripts could have as many."""
    world = World(40, rounds=1, seed="acks")
    world.setup()
    step = world.coordinator.begin_round(1, CONTEXT, LAYOUT)
    body = parse(step.outbound["site-03"], "coordinator").body
    for count, accepted in ((sparse.acks - 1, False), (sparse.acks, True)):
        request = world.request("round", 1, {**body, "acks": body["acks"][:count]})
        reply = parse(world.answer("site-03", request), "site-03")
        assert (reply.type == "upload") is accepted
    for n in (101, 1000):
        assert 2 * real_sparse(n).acks > n + n // 5


def test_forged_acknowledgements_do_not_count(sparse: Sharing) -> None:
    """The coordinator knows the transcript, and can write it down in everybody's name."""
    world = World(40, rounds=1, seed="forged")
    world.setup()
    step = world.coordinator.begin_round(1, CONTEXT, LAYOUT)
    body = parse(step.outbound["site-03"], "coordinator").body
    stranger = IdentityKey.generate(seeded("stranger"))
    forged = [
        reseal(ack, ack.body, stranger)
        for ack in (parse(raw, named_sender(raw, "x")) for raw in body["acks"])
    ]
    for acks in (forged, [*body["acks"][: sparse.acks - 1], *forged[sparse.acks - 1 :]]):
        reply = parse(world.answer("site-03", world.request("round", 1, {**body, "acks": acks})), "site-03")
        assert (reply.type, reply.body["code"]) == ("refusal", "BadSignature")


def test_a_roster_below_the_quorum_is_refused(sparse: Sharing) -> None:
    """Among too few, holders could be picked for their wards: the threshold, 27 of 40, is not enough."""
    world = World(40, rounds=1, seed="quorum")
    requests = world.coordinator.propose(1).outbound
    bundles = [world.answer(name, message) for name, message in requests.items()]
    client = world.clients["site-03"]
    with pytest.raises(BelowThreshold, match="at least 36 are needed"):
        client.deal_shares(world.request("roster", 0, {"bundles": bundles[: sparse.quorum - 1]}))
    assert client.deal_shares(world.request("roster", 0, {"bundles": bundles[: sparse.quorum]}))


def test_holders_are_a_clients_own_choice(sparse: Sharing) -> None:
    """Nothing the coordinator or another client sends decides who holds a client's shares: for one and the same
    roster, the same client draws others each time."""
    world = World(40, rounds=1, seed="choice")
    requests = world.coordinator.propose(1).outbound
    bundles = [world.answer(name, message) for name, message in requests.items()]
    before = world.clients["site-03"].export_state()
    chosen = set()
    for again in range(3):
        client = ClientMachine.restore(
            before, "site-03", world.identities["site-03"], world.directory, world.policy, seeded(again)
        )
        client.deal_shares(world.request("roster", 0, {"bundles": bundles}))
        chosen.add(client._epoch.holders)
    assert len(chosen) == 3


def test_too_few_or_foreign_holders_are_refused(sparse: Sharing) -> None:
    world = World(40, rounds=1, seed="few")

    def cut(name, envelope):
        if envelope.type != "shares" or name != "site-03":
            return envelope.raw
        body = {**envelope.body, "packets": envelope.body["packets"][1:]}
        return world.reseal(envelope, body)

    world.inbound = cut
    ready = world.setup()
    assert isinstance(ready, EpochReady)
    assert [(f.party, f.code) for f in ready.faults] == [("site-03", "WrongRoster")]
