"""What a client verifies before it acts on a coordinator message. Every check raises, naming who is at fault."""

from __future__ import annotations

from collections.abc import Sequence

from .client_store import ClientEpoch
from .errors import (
    BelowThreshold,
    BothShareKinds,
    OutOfOrder,
    ReleaseRefused,
    ReplayedRound,
    WrongRoster,
)
from .keys import COORDINATOR, Directory
from .policy import ClientPolicy
from .roster import Roster, open_bundle
from .wire import ACK, PACKET, Envelope, expect, named_sender, parse, verify


def check_roster(
    envelope: Envelope, epoch: ClientEpoch, client: str, directory: Directory, policy: ClientPolicy
) -> Roster:
    """The roster of verified bundles, this client's own among them."""
    p = epoch.parameters
    bundles = []
    for raw in envelope.body["bundles"]:
        sender = named_sender(raw, COORDINATOR)
        if sender not in p.clients:
            raise WrongRoster(COORDINATOR, f"roster holds '{sender:.80}', who is not in the proposal")
        bundles.append(open_bundle(raw, sender, p, directory))
    roster = Roster(p, tuple(bundles))
    if client not in roster.names or roster.bundle(client).raw != epoch.bundle:
        raise WrongRoster(COORDINATOR, f"roster does not hold the bundle '{client}' sent")
    policy.check_cohort(roster.names, "roster")
    _check_complete(roster.names, p.clients, "roster", policy)
    return roster


def check_start(
    envelope: Envelope,
    epoch: ClientEpoch,
    roster: Roster,
    client: str,
    directory: Directory,
    policy: ClientPolicy,
) -> tuple[tuple[str, ...], list[Envelope]]:
    """(dealers, verified packets for this client in dealer order). On the complete graph every dealer must have
    sent one; on a sparse graph the dealers themselves choose, but this client chose itself."""
    p, dealers = epoch.parameters, tuple(envelope.body["dealers"])
    roster.check_dealers(dealers)
    policy.check_cohort(dealers, "final roster")
    _check_complete(dealers, p.clients, "final roster", policy)
    if client not in dealers:
        raise WrongRoster(COORDINATOR, f"final roster leaves out '{client}', who dealt its shares")
    packets = []
    for raw in envelope.body["packets"]:
        dealer = named_sender(raw, COORDINATOR)
        if dealer not in dealers:
            raise WrongRoster(COORDINATOR, f"packet of '{dealer:.80}', who is not in the final roster")
        packet = parse(raw, dealer)
        verify(packet, directory)
        expect(packet, PACKET, p.session, p.epoch)
        packets.append(packet)
    senders = [packet.sender for packet in packets]
    if senders != sorted(set(senders)) or client not in senders:
        raise WrongRoster(COORDINATOR, "packets must be of distinct dealers in order, one's own among them")
    if roster.holders_each == len(roster.names) and len(senders) != len(dealers):
        raise WrongRoster(COORDINATOR, "number of packets differs from the number of dealers")
    return dealers, packets


def check_round(envelope: Envelope, epoch: ClientEpoch) -> None:
    """Rounds only increase and end with the epoch."""
    r, rounds = envelope.round, epoch.parameters.rounds
    if r > rounds:
        raise OutOfOrder(COORDINATOR, f"round {r}, this epoch has {rounds}: open a new epoch")
    if r <= epoch.last_round:
        raise ReplayedRound(COORDINATOR, f"round {r} asked for after round {epoch.last_round}")


def check_acks(envelope: Envelope, epoch: ClientEpoch, directory: Directory, policy: ClientPolicy) -> None:
    """So many parties signed this client's transcript that no other transcript can have as many; a single
    signature under another one proves two rosters."""
    p, seen = epoch.parameters, set()
    dealers = frozenset(epoch.dealers)
    for raw in envelope.body["acks"]:
        sender = named_sender(raw, COORDINATOR)
        if sender not in dealers or sender in seen:
            raise WrongRoster(
                COORDINATOR, f"acknowledgement of '{sender:.80}' is repeated or not of the roster"
            )
        ack = parse(raw, sender)
        verify(ack, directory)
        expect(ack, ACK, p.session, p.epoch)
        if ack.body["transcript"] != epoch.transcript:
            raise WrongRoster(COORDINATOR, f"showed '{sender}' another roster than this client")
        seen.add(sender)
    enough = max(p.threshold, p.sharing.acks, policy.min_cohort)
    needed = len(epoch.dealers) if policy.release == "abort" else enough
    if len(seen) < needed:
        raise WrongRoster(COORDINATOR, f"{len(seen)} acknowledgements of the roster, {needed} needed")


def check_partition(
    epoch: ClientEpoch, client: str, survivors: Sequence[str], dropped: Sequence[str], policy: ClientPolicy
) -> None:
    """The whole roster, in two parts, of which this client's policy opens the sum of the first."""
    for name in sorted(set(survivors) & set(dropped)):
        raise BothShareKinds(COORDINATOR, f"'{name}' is named both survivor and dropped")
    if list(survivors) != sorted(set(survivors)) or list(dropped) != sorted(set(dropped)):
        raise WrongRoster(COORDINATOR, "survivors and dropped must be sorted and distinct")
    if set(survivors) | set(dropped) != set(epoch.dealers):
        raise WrongRoster(COORDINATOR, "survivors and dropped do not make up the roster of the epoch")
    if client not in survivors:
        raise WrongRoster(COORDINATOR, f"lists '{client}' as dropped, who uploaded in this round")
    if policy.release == "abort" and dropped:
        raise ReleaseRefused(
            COORDINATOR,
            f"partial sum without {', '.join(dropped)}; "
            "under release 'abort' only the whole roster's sum is opened",
        )
    if len(survivors) < epoch.parameters.threshold:
        raise BelowThreshold(
            COORDINATOR, f"{len(survivors)} survivors, the threshold is {epoch.parameters.threshold}"
        )
    policy.check_cohort(survivors, "set of survivors")


def _check_complete(
    parties: tuple[str, ...], expected: tuple[str, ...], where: str, policy: ClientPolicy
) -> None:
    if policy.release == "abort" and parties != expected:
        missing = ", ".join(sorted(set(expected) - set(parties)))
        raise ReleaseRefused(
            COORDINATOR, f"{where} lacks {missing}; under release 'abort' all must take part"
        )
