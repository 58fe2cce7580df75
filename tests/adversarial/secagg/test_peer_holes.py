"""Holes that were demonstrated in a widely used implementation of SecAgg+, tried on ours.

Every attack is carried out as far as the protocol lets it; where possible the same attack succeeds on something weaker
(a control), so that its failure here says something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from appa_secure.secagg import (
    Aborted,
    Aggregate,
    BothShareKinds,
    ClientMachine,
    EpochReady,
    Headroom,
    IdentityKey,
    Layout,
    LayoutMismatch,
    PolicyViolation,
    ProtocolError,
    ReplayedRound,
    Segment,
    SumOutOfRange,
    UnknownParty,
    WrongEpoch,
)
from appa_secure.secagg.masks import apply_masks, mask_key
from appa_secure.secagg.wire import Envelope, parse, peek
from tests.secagg.world import CONTEXT, LAYOUT, World, reseal, seeded

VICTIM = "site-02"


def uploaded(world: World, round_id: int = 1) -> dict[str, bytes]:
    """Every client's upload, received by the coordinator."""
    step = world.coordinator.begin_round(round_id, CONTEXT, world.layout)
    uploads = {name: world.answer(name, message) for name, message in step.outbound.items()}
    for name, upload in uploads.items():
        assert upload is not None
        world.coordinator.receive(name, upload)
    return {name: upload for name, upload in uploads.items() if upload is not None}


# -- pairwise seeds of 28 bits or fewer into MT19937: the last mask of a round is brute-forced


def small_seeds(size: int) -> Iterator[np.ndarray]:
    """First words of the masks that seeds of few bits give, in both generators."""
    for seed in range(2**11):
        yield np.random.RandomState(seed).randint(0, 2**32, size, dtype=np.uint64)
        stream = np.zeros(size, np.uint64)
        apply_masks(stream, [mask_key(seed.to_bytes(32, "big"), 1, bytes(32), CONTEXT)], [])
        yield stream


def test_masks_are_not_found_by_trying_seeds() -> None:
    """All parties but the victim and one more collude: what protects the victim is a self-mask and one pairwise mask."""
    world = World(3)
    world.setup()
    upload = parse(uploaded(world)[VICTIM], VICTIM)
    encoded = world.layout.preflight(3).encode(world.vectors[VICTIM])
    masks = (
        np.frombuffer(upload.body["vector"], "<u8") - encoded
    )  # as if the victim's vector were guessed right
    assert not any((candidate[:2] == masks[:2]).all() for candidate in small_seeds(2))
    folded = np.random.RandomState(1234).randint(0, 2**32, 6, dtype=np.uint64)
    assert any((candidate[:2] == folded[:2]).all() for candidate in small_seeds(2))


def test_every_bit_of_a_seed_counts() -> None:
    """Nothing folds a seed on its way into the keystream: each of its 256 bits changes the mask."""
    seen = set()
    for bit in range(-1, 256):
        seed = (1 << bit if bit >= 0 else 0).to_bytes(32, "little")
        stream = np.zeros(2, np.uint64)
        apply_masks(stream, [mask_key(seed, 1, bytes(32), CONTEXT)], [])
        seen.add(stream.tobytes())
    assert len(seen) == 257


def test_keys_are_not_found_by_guessing_the_randomness() -> None:
    """A client's public keys are compared with those of weak generators; a client that has one is found."""
    world = World(3)

    def bundle(rng: Callable[[int], bytes] | None) -> bytes:
        identity, more = world.identities[VICTIM], {"rng": rng} if rng else {}
        client = ClientMachine(VICTIM, identity, world.directory, world.policy, **more)
        return client.open_epoch(world.proposal())

    guesses = {bundle(seeded(("weak", i))) for i in range(64)}
    assert bundle(seeded(("weak", 17))) in guesses
    assert bundle(None) not in guesses
    assert bundle(None) != bundle(None)


# -- a client named both active and dropped gives up both secrets


def test_both_secrets_of_a_party_are_never_given() -> None:
    """The coordinator asks everybody everything, in one request and in two, in either order."""
    world = World(7)
    world.setup()
    uploaded(world)
    names, others = list(world.names), [name for name in world.names if name != VICTIM]
    both = world.request("unmask", 1, {"survivors": names, "dropped": [VICTIM]})
    alive = world.request("unmask", 1, {"survivors": names, "dropped": []})
    gone = world.request("unmask", 1, {"survivors": others, "dropped": [VICTIM]})
    answers = {alive: 0, gone: 0}
    for i, name in enumerate(names):
        client = world.clients[name]
        with pytest.raises(BothShareKinds, match=VICTIM):
            client.unmask(both)
        first, second = (alive, gone) if i % 2 or name == VICTIM else (gone, alive)
        client.unmask(first)
        answers[first] += 1
        with pytest.raises(ReplayedRound):
            client.unmask(second)
    assert max(answers.values()) < world.coordinator.parameters.threshold


# -- unauthenticated keys: a server with two invented peers reads a lone client


def test_invented_peers_do_not_surround_a_lone_client() -> None:
    world = World(5, min_cohort=3)
    client = world.clients[VICTIM]
    with pytest.raises(UnknownParty, match="zombie-1"):
        client.open_epoch(world.proposal(clients=[VICTIM, "zombie-1", "zombie-2"], threshold=2))
    # under the names of real clients, with keys of the coordinator's own making
    request = world.proposal()
    own = client.open_epoch(request)
    zombies = []
    for name in world.names:
        key = IdentityKey.generate(seeded(name))
        if name != VICTIM:
            real = parse(world.clients[name].open_epoch(request), name)
            zombies.append(reseal(real, real.body, key))
        else:
            zombies.append(own)
    with pytest.raises(ProtocolError, match="signature"):
        client.deal_shares(world.request("roster", 0, {"bundles": zombies}))


# -- the server dictates modulus, threshold and clipping


@pytest.mark.parametrize(
    "changes",
    [{"ring_bits": 1}, {"ring_bits": 8}, {"ring_bits": 32}, {"threshold": 1}, {"threshold": 2}],
    ids=str,
)
def test_modulus_and_threshold_are_the_clients_own(changes: dict[str, int]) -> None:
    world = World(5)
    with pytest.raises(PolicyViolation):
        world.clients[VICTIM].open_epoch(world.proposal(**changes))


def test_scale_and_clipping_are_the_clients_own() -> None:
    """A round for a layout with a tiny range would make every value clip to one bit: refused, and never encoded."""
    world = World(5)
    world.setup()
    tiny = Layout(tuple(replace(s, lo=0.0, hi=1e-9, min_bits=0) for s in LAYOUT.segments))
    body = {"coding": tiny.preflight(5).digest, "context": CONTEXT, "acks": []}
    client, acks = (
        world.clients[VICTIM],
        peek(world.coordinator.begin_round(1, CONTEXT, LAYOUT).outbound[VICTIM]),
    )
    with pytest.raises(LayoutMismatch):
        client.upload(
            world.request("round", 1, {**body, "acks": acks.body["acks"]}),
            world.vectors[VICTIM], layout=LAYOUT, context=CONTEXT,
        )  # fmt: skip


# -- no round or session binding


def test_an_upload_of_another_round_makes_noise_not_a_sum() -> None:
    """A coordinator that may sign for the victim (it colludes) puts last round's masked vector into this round."""
    world = World(5)
    world.setup()
    assert isinstance(world.round(1), Aggregate)
    old = world.uploads[VICTIM]

    def replay(name: str, envelope: Envelope) -> bytes:
        if (envelope.type, name) == ("upload", VICTIM):
            return world.reseal(envelope, {**envelope.body, "vector": old})
        return envelope.raw

    world.inbound = replay
    outcome = world.round(2)
    assert isinstance(outcome, Aborted)
    assert outcome.code == SumOutOfRange.__name__


def test_messages_of_one_session_do_nothing_in_another() -> None:
    one, two = World(5, seed="one"), World(5, seed="two")
    two.identities, two.directory = one.identities, one.directory
    one.setup()
    two.coordinator = type(two.coordinator)(
        b"another session", one.directory, min_cohort=2, rounds=3, release="recover"
    )
    assert isinstance(two.setup(), EpochReady)
    uploads = uploaded(one)
    two.coordinator.begin_round(1, CONTEXT, LAYOUT)
    with pytest.raises(WrongEpoch):
        two.coordinator.receive(VICTIM, uploads[VICTIM])
    with pytest.raises(WrongEpoch):
        two.clients[VICTIM].unmask(one.request("unmask", 1, {"survivors": list(one.names), "dropped": []}))


# -- sample counts and metrics travel in clear beside the masked vector


def test_an_upload_says_nothing_beside_the_masked_vector() -> None:
    """Clients with the same keys and different inputs send messages that differ in the vector and signature only."""
    seen = []
    for value in (0.0, 1.0):
        world = World(5)
        world.vectors = {name: np.full(LAYOUT.size, value) for name in world.names}
        world.setup()
        seen.append({name: parse(raw, name) for name, raw in uploaded(world).items()})
    for name in seen[0]:
        low, high = seen[0][name], seen[1][name]
        assert len(low.raw) == len(high.raw)
        assert set(low.body) == {"coding", "context", "vector"}
        assert rest(low) == rest(high)
        assert low.body["vector"] != high.body["vector"]


def rest(envelope: Envelope) -> tuple[object, ...]:
    body = {field: value for field, value in envelope.body.items() if field != "vector"}
    return envelope.type, envelope.session, envelope.epoch, envelope.round, envelope.sender, body


def test_a_metric_beside_the_vector_is_refused() -> None:
    world = World(5)
    world.setup()

    def talkative(name: str, envelope: Envelope) -> bytes:
        if (envelope.type, name) == ("upload", VICTIM):
            return world.reseal(envelope, {**envelope.body, "samples": 1000})
        return envelope.raw

    world.inbound = talkative
    outcome = world.round(1)
    assert isinstance(outcome, Aggregate)
    assert outcome.dropped == (VICTIM,)
    assert [(f.party, f.code) for f in outcome.faults] == [(VICTIM, "BadEncoding")]


# -- secrets stay in the client's state after the round


def stolen(world: World, state: bytes, upload: bytes, request: bytes) -> np.ndarray | None:
    """What a thief of a client's stored state reads out of its upload: the masks again, over a vector of zeros."""
    client = ClientMachine.restore(state, VICTIM, world.identities[VICTIM], world.directory, world.policy)
    layout = Layout((Segment("zeros", LAYOUT.size, -1.0, 1.0),))
    try:
        again = client.upload(request, np.zeros(layout.size), layout=world.layout, context=CONTEXT)
    except ProtocolError:
        return None
    masked, masks = (np.frombuffer(parse(raw, VICTIM).body["vector"], "<u8") for raw in (upload, again))
    difference = (masked - masks).view("<i8")
    return difference / 2.0 ** np.repeat(
        world.layout.preflight(5).bits, [s.size for s in world.layout.segments]
    )


def test_a_state_stolen_after_the_round_opens_nothing() -> None:
    world = World(5)
    world.setup()
    before = world.clients[VICTIM].export_state()
    request = world.coordinator.begin_round(1, CONTEXT, LAYOUT).outbound[VICTIM]
    upload = world.answer(VICTIM, request)
    assert upload is not None
    control = stolen(world, before, upload, request)
    assert control is not None
    np.testing.assert_allclose(
        control, world.vectors[VICTIM], atol=1e-10
    )  # stolen before the round: all is lost

    after = world.clients[VICTIM].export_state()
    found = stolen(world, after, upload, request)
    assert found is not None
    assert not found.any()  # the stored reply itself: what was sent, and nothing about the masks
    other = world.request("round", 1, {**peek(request).body, "acks": []})
    assert other != request
    assert stolen(world, after, upload, other) is None


# -- one dropout in the first two stages aborts


@pytest.mark.parametrize("phase", ["propose", "roster", "start"])
def test_a_dropout_in_set_up_is_survived(phase: str) -> None:
    world = World(5)
    world.silent = {phase: {VICTIM}}
    assert isinstance(world.setup(), EpochReady)
    outcome = world.round(1)
    assert isinstance(outcome, Aggregate)
    assert set(outcome.contributors) == set(world.names) - {VICTIM}
    np.testing.assert_array_equal(outcome.ring_sum, world.ring_sum(outcome.contributors))


# -- one malformed share crashes the server


@pytest.mark.parametrize(
    "broken",
    [b"", b"\xff" * 36, bytes(36), b"\0", b"\xff" * 36 * 4, b"x" * 100_000],
    ids=[
        "none",
        "not in the field",
        "zeros",
        "one byte",
        "four, not in the field",
        "a hundred thousand bytes",
    ],
)
@pytest.mark.parametrize("which", [0, -1])
def test_a_malformed_share_is_named_and_survived(which: int, broken: bytes) -> None:
    world = World(7)
    world.setup()
    world.silent = {"round": {"site-06"}}
    liar = world.names[0]

    def malformed(name: str, envelope: Envelope) -> bytes:
        if (envelope.type, name) == ("answer", liar):
            field = sorted(envelope.body)[which]
            return world.reseal(envelope, {**envelope.body, field: broken})
        return envelope.raw

    world.inbound = malformed
    outcome = world.round(1)
    assert isinstance(outcome, Aggregate), outcome
    assert liar in {f.party for f in outcome.faults if f.kind == "misbehaviour"}
    np.testing.assert_array_equal(outcome.ring_sum, world.ring_sum(world.names[:6]))


# -- overflow wraps silently at n = 1100


def test_a_sum_of_1100_does_not_wrap() -> None:
    """Every party at the end of its range; where the precision asked for leaves no room, the layout is refused."""
    for parties in (1023, 1100, 5000):
        coding = Layout((Segment("v", 2, -1.0, 1.0),), 32).preflight(parties)
        for extreme in (-1.0, 1.0):
            one = coding.encode(np.full(2, extreme))
            total = one * np.uint32(parties)  # as the ring adds them up
            np.testing.assert_array_equal(coding.decode(total, parties), np.full(2, extreme * parties))
    with pytest.raises(Headroom, match="1100 parties"):
        Layout((Segment("v", 2, -1.0, 1.0, min_bits=22),), 32).preflight(1100)
    assert Layout((Segment("v", 2, -1.0, 1.0, min_bits=22),), 32).preflight(500).bits == (22,)
