"""What follows from the replies of a phase: the messages of the next one, a ready epoch, or an opened sum.

Functions of the epoch's state; `coordinator.CoordinatorMachine` decides when they run and who must have answered.
Messages are by receiver.
"""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from .coordinator_checks import accusations
from .coordinator_store import CoordinatorEpoch
from .errors import BadShare, IllegalEvent
from .fixedpoint import Coding
from .keys import COORDINATOR, agree
from .opening import Opening
from .outcomes import Aggregate, EpochReady, Fault
from .roster import Roster, check_bundle
from .schedule import reply_key
from .wire import CLOSE, PROPOSE, ROSTER, ROUND, START, UNMASK, parse, seal

Messages = dict[str, bytes]


def proposals(epoch: CoordinatorEpoch) -> Messages:
    p = epoch.parameters
    body = {
        "clients": list(p.clients),
        "threshold": p.threshold,
        "rounds": p.rounds,
        "ring_bits": p.ring_bits,
        "coordinator_key": p.coordinator_key,
    }
    return dict.fromkeys(p.clients, _seal(epoch, PROPOSE, 0, body))


def close_notices(epoch: CoordinatorEpoch) -> Messages:
    return dict.fromkeys(epoch.parameters.clients, _seal(epoch, CLOSE, 0, {}))


def rosters(epoch: CoordinatorEpoch) -> Messages:
    """Fix the roster: all bundles that arrived. Raises `BelowThreshold` below the quorum."""
    bundles = [check_bundle(epoch.inbox[name], epoch.parameters) for name in sorted(epoch.inbox)]
    epoch.roster = Roster(epoch.parameters, tuple(bundles))
    message = _seal(epoch, ROSTER, 0, {"bundles": [bundle.raw for bundle in bundles]})
    return dict.fromkeys(epoch.roster.names, message)


def starts(epoch: CoordinatorEpoch) -> Messages:
    """Fix the graph: who dealt, and to whom. Every dealer gets the packets that are for it."""
    dealers = sorted(epoch.inbox)
    packets: dict[str, list[bytes]] = {name: [] for name in roster_of(epoch).names}
    for dealer in dealers:
        holders = []
        for raw in epoch.inbox[dealer].body["packets"]:
            body = parse(raw, dealer).body
            holders.append(body["to"])
            packets[body["to"]].append(raw)
            epoch.digests[dealer, body["to"]] = body["digests"]
        epoch.holders[dealer] = tuple(holders)
    return {name: _seal(epoch, START, 0, {"dealers": dealers, "packets": packets[name]}) for name in dealers}


def keep_setup(epoch: CoordinatorEpoch) -> EpochReady:
    """Keep acknowledgements and tables, agree on the reply key with every dealer: rounds may begin."""
    p, private = epoch.parameters, X25519PrivateKey.from_private_bytes(epoch.private)
    for name in epoch.dealers:
        shared = agree(private, roster_of(epoch).bundle(name).encryption_key)
        epoch.reply_keys[name] = reply_key(shared, epoch.transcript, p, name)
    epoch.private = b""
    for name, envelope in epoch.inbox.items():
        epoch.acks[name], epoch.tables[name] = envelope.body["ack"], envelope.body["table"]
    absent = tuple(name for name in p.clients if name not in epoch.holders)
    culprits, disputes = accusations(epoch)
    faults = tuple(epoch.faults)
    return EpochReady(p.epoch, epoch.dealers, absent, epoch.transcript, faults, culprits, disputes)


def round_requests(epoch: CoordinatorEpoch) -> Messages:
    """The open round's request; with the acknowledgements for those who have not seen them."""
    body: dict[str, Any] = {"coding": coding_of(epoch).digest, "context": epoch.context, "acks": []}
    short = full = _seal(epoch, ROUND, epoch.round, body)
    if len(epoch.confirmed) < len(epoch.dealers):
        body["acks"] = [epoch.acks[name] for name in sorted(epoch.acks)]
        full = _seal(epoch, ROUND, epoch.round, body)
    return {name: short if name in epoch.confirmed else full for name in epoch.dealers}


def unmask_requests(epoch: CoordinatorEpoch, opening: Opening) -> Messages:
    body = {"survivors": list(opening.survivors), "dropped": list(opening.dropped)}
    return dict.fromkeys(opening.survivors, _seal(epoch, UNMASK, epoch.round, body))


def opening_of(epoch: CoordinatorEpoch) -> Opening:
    """The open round, split into the parties that uploaded and those that did not."""
    alive = frozenset(epoch.survivors)
    return Opening(
        roster_of(epoch),
        epoch.graph,
        epoch.transcript,
        epoch.round,
        epoch.survivors,
        tuple(name for name in epoch.dealers if name not in alive),
        epoch.digests,
        epoch.tables,
    )


def open_sum(epoch: CoordinatorEpoch, opening: Opening) -> Aggregate:
    """The sum of the survivors' vectors, from the answers that arrived; whoever is caught is in the faults, also
    when the round fails."""
    coding = coding_of(epoch)
    total = epoch.total if epoch.total is not None else coding.add([])
    try:
        opening.remove_masks(total, coding, epoch.context, epoch.inbox)
    finally:
        epoch.faults += [
            Fault(name, "misbehaviour", BadShare.__name__, f"{name}: {reason}")
            for name, reason in sorted(opening.culprits.items())
        ]
    decoded = coding.decode(total, len(opening.survivors))
    culprits = tuple(sorted(opening.culprits))
    return Aggregate(
        epoch.round, decoded, total, opening.survivors, opening.dropped, culprits, tuple(epoch.faults)
    )


def roster_of(epoch: CoordinatorEpoch) -> Roster:
    if epoch.roster is None:
        raise IllegalEvent("no roster yet")
    return epoch.roster


def coding_of(epoch: CoordinatorEpoch) -> Coding:
    if epoch.layout is None:
        raise IllegalEvent("no round has begun")
    return epoch.layout.preflight(len(epoch.dealers))


def _seal(epoch: CoordinatorEpoch, type_: str, round_id: int, body: dict[str, Any]) -> bytes:
    p = epoch.parameters
    return seal(type_, p.session, p.epoch, round_id, COORDINATOR, body, None)
