"""Errors of the protocol, split by blame.

`LocalMisuse` is the fault of the code that called the machine; `RemoteMisbehaviour` is the fault of whoever
sent the message and always names the sender. Both keep their reason: a rejection without a reason is useless
to an auditor. No message ever quotes a secret or an input value.
"""

from __future__ import annotations

from appa_secure.errors import AppaError


class ProtocolError(AppaError):
    """Base of everything secure aggregation refuses."""

    @property
    def code(self) -> str:
        """Stable name used in refusals, outcomes, transcripts and test vectors."""
        return type(self).__name__


class LocalMisuse(ProtocolError):
    """The caller's fault; nothing was sent and no state changed."""


class IllegalEvent(LocalMisuse):
    """A method was called in a state whose transition table has no such event."""


class BadParameters(LocalMisuse):
    """Parameters no epoch may run with (threshold, cohort, rounds, ring, identifiers)."""


class Headroom(LocalMisuse):
    """The worst-case sum of all parties would wrap in the ring."""


class OutOfRange(LocalMisuse):
    """Values outside their segment's range, or not numbers. Never clipped."""

    def __init__(self, segment: str, count: int, lo: float, hi: float) -> None:
        super().__init__(
            f"segment '{segment}': {count} value(s) outside [{lo}, {hi}] or not a number; "
            "widen the segment's range or correct the values (they are never clipped)"
        )
        self.segment = segment
        self.count = count


class SumOutOfRange(LocalMisuse):
    """A ring vector that is not the sum of the stated number of in-range vectors."""


class CorruptState(LocalMisuse):
    """An exported state that cannot be restored."""


class RemoteMisbehaviour(ProtocolError):
    """A message that must not be accepted. `sender` is the party at fault, `reason` says why."""

    def __init__(self, sender: str, reason: str) -> None:
        super().__init__(f"{sender}: {reason}")
        self.sender = sender
        self.reason = reason


class BadEncoding(RemoteMisbehaviour):
    """Not the canonical encoding of a known message: trailing bytes, unknown version or field, wrong size."""


class BadSignature(RemoteMisbehaviour):
    """The signature does not verify under the directory's key for the sender."""


class BadMac(RemoteMisbehaviour):
    """An upload or answer that is not authenticated under the client's reply key, or not for the request that was sent."""


class UnknownParty(RemoteMisbehaviour):
    """A party that the provisioned directory does not list."""


class WrongEpoch(RemoteMisbehaviour):
    """Another session, or an epoch that is not the current one."""


class OutOfOrder(RemoteMisbehaviour):
    """A message that the transition table does not allow in the receiver's state."""


class PolicyViolation(RemoteMisbehaviour):
    """A proposal outside the client's own policy (threshold, rounds, ring, members)."""


class CohortTooSmall(RemoteMisbehaviour):
    """Fewer parties than the client's minimum cohort."""


class BelowThreshold(RemoteMisbehaviour):
    """Fewer parties than the secret-sharing threshold."""


class WrongRoster(RemoteMisbehaviour):
    """A roster that is not the one this party agreed to: invented peer, swapped key, or two different
    rosters.
    """


class ReplayedRound(RemoteMisbehaviour):
    """A round (or epoch) that was answered before, or an older one."""


class BothShareKinds(RemoteMisbehaviour):
    """A party named both survivor and dropped: answering would open its input."""


class ReleaseRefused(RemoteMisbehaviour):
    """The client's release policy does not open the sum of this set of survivors."""


class LayoutMismatch(RemoteMisbehaviour):
    """The coordinator's layout, scale or ring is not the one the client encodes with."""


class ContextMismatch(RemoteMisbehaviour):
    """The round is bound to another context (rollouts, payload) than the client was shown."""


class BadShare(RemoteMisbehaviour):
    """A share that does not match what its dealer committed to, or a dealer whose shares give no secret."""
