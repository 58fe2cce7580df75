"""What the coordinator verifies: what a client's reply says before it counts, naming the sender, and whether enough
clients are left. And whom accusations of the set-up, which it cannot verify, are held against.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from .coordinator_store import CoordinatorEpoch
from .errors import (
    BadEncoding,
    BadShare,
    BelowThreshold,
    CohortTooSmall,
    LayoutMismatch,
    ReleaseRefused,
    WrongRoster,
)
from .fixedpoint import Coding
from .keys import COORDINATOR, KEY_BYTES, Directory
from .opening import TAG_BYTES
from .roster import Roster
from .schedule import KINDS, SHARE_DIGEST_BYTES
from .wire import ACK, PACKET, Envelope, expect, parse, verify


def check_shares(envelope: Envelope, roster: Roster, directory: Directory) -> tuple[str, ...]:
    """The holders that a dealer's packets are for."""
    p, sender = roster.parameters, envelope.sender
    if envelope.body["roster"] != roster.digest():
        raise WrongRoster(sender, "dealt shares for another roster")
    holders = []
    for raw in envelope.body["packets"]:
        packet = parse(raw, sender)
        verify(packet, directory)
        expect(packet, PACKET, p.session, p.epoch)
        if packet.body["roster"] != roster.digest():
            raise WrongRoster(sender, f"packet for '{packet.body['to']:.80}' is for another roster")
        if len(packet.body["digests"]) != SHARE_DIGEST_BYTES * KINDS * p.rounds:
            raise BadEncoding(sender, "packet: wrong number of share digests")
        holders.append(packet.body["to"])
    roster.check_holders(sender, holders)
    return tuple(holders)


def check_ready(envelope: Envelope, epoch: CoordinatorEpoch, directory: Directory) -> None:
    """The acknowledgement of this transcript, and a table of the right size."""
    p, sender = epoch.parameters, envelope.sender
    ack = parse(envelope.body["ack"], sender)
    verify(ack, directory)
    expect(ack, ACK, p.session, p.epoch)
    if ack.body["transcript"] != epoch.transcript:
        raise WrongRoster(sender, "acknowledges another transcript")
    row = KEY_BYTES * len(epoch.graph.peers[sender]) + TAG_BYTES
    if len(envelope.body["table"]) != p.rounds * row:
        raise BadEncoding(sender, "table does not hold one sealed pair seed per peer and round")


def accusations(epoch: CoordinatorEpoch) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """(culprits, disputes) of share packets that did not open, from the refusals of the present phase.

    Only its holder can tell whether a packet opens. More accusers than there are corrupt clients have an honest one among
    them, so whom they accuse is a culprit. Of other accusers and accused one lies: they are paired off, nobody twice
    (player elimination: Hirt, Maurer and Przydatek, ASIACRYPT 2000), so that leaving pairs out costs no more honest
    clients than liars.
    """
    dealers = frozenset(epoch.dealers)
    blamed: dict[str, str] = {}  # accuser -> accused; a client has one say
    for fault in epoch.phase_faults:
        if (
            fault.kind == "refusal"
            and fault.code == BadShare.__name__
            and fault.accused in dealers - {fault.party}
        ):
            blamed.setdefault(fault.party, fault.accused)
    most = max(1, epoch.parameters.sharing.corrupt)
    culprits = {accused for accused, times in Counter(blamed.values()).items() if times > most}
    disputes: list[tuple[str, str]] = []
    out = set(culprits)
    for accuser, accused in sorted(blamed.items()):
        if accuser not in out and accused not in out:
            disputes.append((accuser, accused))
            out |= {accuser, accused}
    return tuple(sorted(culprits)), tuple(disputes)


def check_upload(envelope: Envelope, coding: Coding, context: bytes) -> None:
    """Bound to this round's layout and context, and of its size."""
    body, sender = envelope.body, envelope.sender
    if (body["coding"], body["context"]) != (coding.digest, context):
        raise LayoutMismatch(sender, "upload is bound to another layout or context")
    if len(body["vector"]) != coding.layout.size * coding.layout.ring_bits // 8:
        raise BadEncoding(sender, f"upload has {len(body['vector'])} bytes, not the size of the layout")


def check_parties(
    present: Collection[str],
    expected: Sequence[str],
    what: str,
    threshold: int,
    min_cohort: int,
    complete: bool,
) -> None:
    """Enough clients for the epoch or round to go on; all of them where `complete`."""
    missing = ", ".join(name for name in expected if name not in present)
    if complete and missing:
        raise ReleaseRefused(
            COORDINATOR, f"no {what} from {missing}; under release 'abort' all must take part"
        )
    if len(present) < threshold:
        raise BelowThreshold(
            COORDINATOR,
            f"{what} from {len(present)} clients, the threshold is {threshold}; missing: {missing}",
        )
    if len(present) < min_cohort:
        raise CohortTooSmall(
            COORDINATOR,
            f"{what} from {len(present)} clients, the minimum cohort is {min_cohort}; missing: {missing}",
        )
