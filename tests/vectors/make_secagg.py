"""Writes tests/vectors/secagg/*.json: known answers and failure cases of secure aggregation.

    PYTHONPATH=. python tests/vectors/make_secagg.py

All randomness is SHAKE-256 of a counter (`tests.secagg.world.seeded`), so running it again writes the same
files. The keys in the vectors are test keys. `known_answers.json` pins the primitives and a whole epoch;
`failures.json` holds, per case, a client's stored state, one coordinator message and the refusal it must lead
to; or the coordinator's stored state and a reply.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from appa_secure.secagg import (
    Aggregate,
    ClientMachine,
    Continue,
    Headroom,
    Layout,
    OutOfRange,
    ProtocolError,
    Segment,
)
from appa_secure.secagg.graph import sparse
from appa_secure.secagg.keys import bind, derive, x25519_public
from appa_secure.secagg.masks import apply_masks, mask_key
from appa_secure.secagg.policy import EpochParameters
from appa_secure.secagg.schedule import (
    KINDS,
    answer_key,
    pair_check,
    pair_seed,
    reply_key,
    secret_commitment,
    self_seed,
    share_context,
    share_digests,
    share_key,
    table_key,
)
from appa_secure.secagg.shamir import SHARE_BYTES, pack, share
from appa_secure.secagg.wire import parse, peek, reply_mac, seal_reply
from tests.secagg.world import CONTEXT, LAYOUT, World, reseal, seeded

HERE = Path(__file__).parent / "secagg"
PROVENANCE = "tests/vectors/make_secagg.py of this repository"


def known_answers() -> dict[str, Any]:
    seed = bytes(range(32))
    masked = np.arange(6, dtype="<u8")
    key = mask_key(seed, 7, b"\1" * 32, b"\2" * 32)
    apply_masks(masked, [key], [])
    dealt = share(np.frombuffer(seed, np.uint8)[None], 3, 5, seeded("vector"))
    coding = LAYOUT.preflight(4)
    vector = [0.0, 1.0, 0.5, 1 / 3, -2.0, 3.0]
    return {
        "provenance": PROVENANCE,
        "bind": {
            "purpose": "test",
            "fields": ["text", 5, "bytes:00ff"],
            "out": bind("test", "text", 5, b"\x00\xff").hex(),
        },
        "derive": {
            "secret": seed.hex(),
            "salt": "aa" * 32,
            "info": "bb",
            "out": derive(seed, b"\xaa" * 32, b"\xbb").hex(),
        },
        "mask": {
            "seed": seed.hex(),
            "round": 7,
            "coding": "01" * 32,
            "context": "02" * 32,
            "key": key.hex(),
            "start": list(range(6)),
            "out": masked.tobytes().hex(),
        },
        "shamir": {"secret": seed.hex(), "threshold": 3, "shares": [pack(row).hex() for row in dealt]},
        "coding": {
            "layout": LAYOUT.describe(),
            "ring_bits": 64,
            "parties": 4,
            "bits": list(coding.bits),
            "digest": coding.digest.hex(),
            "vector": [v.hex() for v in vector],
            "out": coding.encode(np.array(vector)).tobytes().hex(),
        },
        "schedule": key_schedule(),
        "epoch": epoch(),
    }


def key_schedule() -> dict[str, Any]:
    """Every derivation of `appa_secure/secagg/schedule.py` for one set of inputs, and the graph's degrees."""
    p = EpochParameters(b"vector", 3, ("a", "b", "c"), 2, x25519_public(b"\3" * 32), 4, 64)
    secret, transcript, roster = bytes(range(32)), b"\1" * 32, b"\2" * 32
    share_bytes = bytes(SHARE_BYTES) + bytes(range(SHARE_BYTES))
    return {
        "inputs": {
            "session": p.session.hex(), "epoch": 3, "clients": list(p.clients), "threshold": 2, "rounds": 4,
            "ring_bits": 64, "coordinator_key": p.coordinator_key.hex(),
            "round": 2, "secret": secret.hex(), "transcript": transcript.hex(),
            "roster": roster.hex(), "shares": share_bytes.hex(), "payload": "0102", "request": "0304",
            "context": "05" * 32,
        },
        "proposal": p.digest().hex(),
        "commitments": [secret_commitment(p, "a", 2, kind, secret).hex() for kind in range(KINDS)],
        "self_seed": self_seed(secret, transcript, p, "a", 2).hex(),
        "pair_seed": pair_seed(secret, transcript, p, "b", "a", 2).hex(),
        "pair_check": pair_check(secret).hex(),
        "table_key": table_key(secret, transcript, p, "a", 2).hex(),
        "answer_key": answer_key(secret, transcript, p, "a", 2).hex(),
        "reply_key": reply_key(secret, transcript, p, "a").hex(),
        "reply_mac": reply_mac(secret, b"\1\2", b"\3\4", b"\5" * 32).hex(),
        "share_key": share_key(secret, roster, p, "a", "b").hex(),
        "share_context": share_context(p, roster, "a", "b").hex(),
        "share_digests": share_digests(p, "a", "b", share_bytes).hex(),
        "sharing": [[n, sparse(n).degree, sparse(n).threshold, sparse(n).quorum] for n in (101, 300, 1000)],
    }  # fmt: skip


def epoch() -> dict[str, Any]:
    """SHA-256 of every message of a set-up and two rounds of three clients; the third drops out of the second
    round.
    """
    world = World(3, seed="vector", rounds=2)
    messages: list[list[str]] = []

    def record(direction: str) -> Any:
        def seen(name: str, envelope: Any) -> bytes:
            messages.append([direction, name, envelope.type, hashlib.sha256(envelope.raw).hexdigest()])
            return envelope.raw

        return seen

    world.outbound, world.inbound = record("to"), record("from")
    world.setup()
    sums = []
    for round_id, silent in ((1, set()), (2, {"site-02"})):
        world.silent = {"round": silent}
        outcome = world.round(round_id)
        assert isinstance(outcome, Aggregate)
        sums.append(outcome.ring_sum.tobytes().hex())
    return {"clients": 3, "messages": messages, "ring_sums": sums}


def failures() -> dict[str, Any]:
    """Each case: restore the client, call `method` with `message`, expect the named error and an unchanged
    state.
    """
    cases: list[dict[str, Any]] = []

    def case(name: str, client: ClientMachine, method: str, message: bytes) -> None:
        expected = "accepted"
        try:
            attempt(ClientMachine.restore(client.export_state(), *parties(world)), method, message)
        except ProtocolError as error:
            expected = error.code
        state = client.export_state().hex()
        cases.append(
            {"name": name, "method": method, "state": state, "message": message.hex(), "expect": expected}
        )

    world = World(3, seed="failures", rounds=2, min_cohort=3)
    client, names = world.clients["site-00"], list(world.names)
    body = dict(peek(world.proposal()).body)
    case("threshold of one", client, "open_epoch", world.proposal(threshold=1))
    case("low-order coordinator key", client, "open_epoch", world.proposal(coordinator_key=bytes(32)))
    case(
        "unknown party",
        client,
        "open_epoch",
        world.proposal(threshold=3, clients=[*names, "zombie"]),
    )
    case(
        "cohort too small", client, "open_epoch", world.request("propose", 0, {**body, "clients": names[:2]})
    )
    case("trailing byte", client, "open_epoch", world.request("propose", 0, body) + b"\0")
    case("unknown field", client, "open_epoch", world.request("propose", 0, {**body, "clip": 1}))
    case(
        "round before set-up",
        client,
        "unmask",
        world.request("unmask", 1, {"survivors": names, "dropped": []}),
    )
    proposal = world.coordinator.propose(1).outbound["site-00"]
    sent = {name: machine.open_epoch(proposal) for name, machine in world.clients.items()}
    foreign = reseal(
        parse(sent["site-01"], "site-01"), parse(sent["site-01"], "site-01").body, world.identities["site-02"]
    )
    case(
        "bad signature",
        client,
        "deal_shares",
        world.request("roster", 0, {"bundles": [sent["site-00"], foreign, sent["site-02"]]}),
    )
    case(
        "wrong roster",
        client,
        "deal_shares",
        world.request("roster", 0, {"bundles": [sent["site-01"], sent["site-02"]]}),
    )

    world = World(3, seed="failures", rounds=2, min_cohort=2)
    client = world.clients["site-00"]
    world.setup()
    coding = LAYOUT.preflight(3).digest
    case(
        "no acknowledgements",
        client,
        "upload",
        world.request("round", 1, {"coding": coding, "context": CONTEXT, "acks": []}),
    )
    world.round(1)
    request = {"coding": coding, "context": CONTEXT, "acks": []}
    case("replayed round", client, "upload", world.request("round", 1, request))
    case("replayed epoch", client, "open_epoch", world.request("propose", 0, body))
    case("another scale", client, "upload", world.request("round", 2, {**request, "coding": bytes(32)}))
    case("another context", client, "upload", world.request("round", 2, {**request, "context": bytes(32)}))
    case("rounds used up", client, "upload", world.request("round", 3, request))
    case(
        "asked again for other shares",
        client,
        "unmask",
        world.request("unmask", 1, {"survivors": names[:2], "dropped": names[2:]}),
    )
    for name, message in world.coordinator.begin_round(2, CONTEXT, LAYOUT).outbound.items():
        world.answer(name, message)
    case(
        "both share kinds asked",
        client,
        "unmask",
        world.request("unmask", 2, {"survivors": names, "dropped": names[2:]}),
    )
    case(
        "below threshold",
        client,
        "unmask",
        world.request("unmask", 2, {"survivors": names[:1], "dropped": names[1:]}),
    )
    case(
        "party not mentioned",
        client,
        "unmask",
        world.request("unmask", 2, {"survivors": names[:2], "dropped": []}),
    )
    return {
        "provenance": PROVENANCE, "clients": 3, "cases": cases, "replies": reply_failures(), "coding": coding_failures(),
    }  # fmt: skip


def reply_failures() -> list[dict[str, Any]]:
    """Each case: restore the coordinator, take `message` from `sender`, expect the named error."""
    world = World(3, seed="replies", rounds=2)
    world.setup()
    cases: list[dict[str, Any]] = []

    def case(name: str, message: bytes, expect: str, sender: str = "site-00") -> None:
        state = world.coordinator.export_state().hex()
        cases.append(
            {"name": name, "state": state, "sender": sender, "message": message.hex(), "expect": expect}
        )

    def phase(kind: str, outbound: Any) -> None:
        replies = {
            name: parse(world.answer(name, message) or b"", name) for name, message in outbound.items()
        }
        genuine, request = replies["site-00"], peek(outbound["site-00"])
        key = world.clients["site-00"]._epoch.reply_key
        other = seal_reply(
            kind, "site-00", genuine.body, request, CONTEXT, world.clients["site-01"]._epoch.reply_key
        )
        elsewhere = seal_reply(kind, "site-00", genuine.body, request, bytes(32), key)
        unasked = seal_reply(kind, "site-00", genuine.body, replace(request, raw=b"?"), CONTEXT, key)
        late = seal_reply(kind, "site-00", genuine.body, replace(request, round=2), CONTEXT, key)
        case(f"{kind}: accepted", genuine.raw, "accepted")
        case(f"{kind}: bad mac", genuine.raw[:-1] + bytes([genuine.raw[-1] ^ 1]), "BadMac")
        case(f"{kind}: mac of another client", other, "BadMac")
        case(f"{kind}: mac for another request", unasked, "BadMac")
        case(f"{kind}: mac for another context", elsewhere, "BadMac")
        case(f"{kind}: another round", late, "WrongEpoch")
        case(f"{kind}: another sender", genuine.raw, "BadEncoding", sender="site-01")
        signed = reseal(genuine, genuine.body, world.identities["site-00"])
        case(f"{kind}: signed in place of the mac", signed, "BadEncoding")
        for name, envelope in replies.items():
            world.coordinator.receive(name, envelope.raw)

    phase("upload", world.coordinator.begin_round(1, CONTEXT, LAYOUT).outbound)
    step = world.coordinator.advance()
    assert isinstance(step, Continue)
    phase("answer", step.outbound)
    return cases


def coding_failures() -> list[dict[str, Any]]:
    wide = Layout((Segment("reward", 2, 0.0, 1e6),), 32)
    narrow = Layout((Segment("reward", 2, 0.0, 1.0),), 64)
    return [
        {
            "name": "overflow",
            "layout": wide.describe(),
            "ring_bits": 32,
            "parties": 100,
            "vector": [],
            "expect": Headroom.__name__,
        },
        {
            "name": "out of range",
            "layout": narrow.describe(),
            "ring_bits": 64,
            "parties": 3,
            "vector": [(0.5).hex(), (1.5).hex()],
            "expect": OutOfRange.__name__,
        },
    ]


def parties(world: World) -> tuple[Any, ...]:
    return "site-00", world.identities["site-00"], world.directory, world.policy


def attempt(client: ClientMachine, method: str, message: bytes) -> bytes:
    """One step of a failure case, with a valid vector where one is needed."""
    if method == "upload":
        return client.upload(message, np.zeros(LAYOUT.size), layout=LAYOUT, context=CONTEXT)
    step: bytes = getattr(client, method)(message)
    return step


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for name, content in (("known_answers", known_answers()), ("failures", failures())):
        (HERE / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
