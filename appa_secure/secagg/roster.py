"""The signed roster of an epoch: what clients and coordinator compute from the same bundles.

Three digests, each containing the one before: proposal (parameters) -> roster (all bundles, in id order) ->
transcript (plus the final list of dealers). The transcript salts every
mask derivation, so two clients with different views of who takes part, or of anyone's keys, produce masks
that do not cancel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .errors import BadEncoding, BelowThreshold, WrongRoster
from .keys import COORDINATOR, KEY_BYTES, LOW_ORDER, Directory, digest
from .policy import EpochParameters
from .schedule import KINDS, split
from .wire import BUNDLE, Envelope, expect, parse, verify


@dataclass(frozen=True)
class Bundle:
    """A client's verified public values for one epoch."""

    sender: str
    encryption_key: bytes
    mask_keys: bytes  # rounds * 32
    commitments: bytes  # rounds * KINDS * 32
    raw: bytes

    def mask_key(self, round_id: int) -> bytes:
        """X25519 public key of round 1..rounds."""
        return self.mask_keys[KEY_BYTES * (round_id - 1) : KEY_BYTES * round_id]

    def commitment(self, round_id: int, kind: int) -> bytes:
        """Commitment of the shared secret of one kind of round 1..rounds."""
        start = KEY_BYTES * (KINDS * (round_id - 1) + kind)
        return self.commitments[start : start + KEY_BYTES]


def open_bundle(raw: bytes, sender: str, parameters: EpochParameters, directory: Directory) -> Bundle:
    """Parse and verify one bundle; raises a `RemoteMisbehaviour` naming its sender."""
    envelope = parse(raw, sender)
    verify(envelope, directory)
    return check_bundle(envelope, parameters)


def check_bundle(envelope: Envelope, parameters: EpochParameters) -> Bundle:
    """The bundle in a verified envelope."""
    expect(envelope, BUNDLE, parameters.session, parameters.epoch)
    body = envelope.body
    if body["proposal"] != parameters.digest():
        raise WrongRoster(envelope.sender, "its bundle answers another proposal")
    for field, each in (("mask_keys", 1), ("commitments", KINDS)):
        if len(body[field]) != KEY_BYTES * parameters.rounds * each:
            raise BadEncoding(envelope.sender, f"bundle: field '{field}' has {len(body[field])} bytes")
    if not LOW_ORDER.isdisjoint([body["encryption_key"], *split(body["mask_keys"])]):
        raise WrongRoster(envelope.sender, "its bundle holds a low-order point")
    return Bundle(
        envelope.sender, body["encryption_key"], body["mask_keys"], body["commitments"], envelope.raw
    )


@dataclass(frozen=True)
class Roster:
    """Verified bundles in id order, of at least the quorum of the epoch."""

    parameters: EpochParameters
    bundles: tuple[Bundle, ...]

    def __post_init__(self) -> None:
        names = [bundle.sender for bundle in self.bundles]
        if names != sorted(set(names)) or not set(names) <= set(self.parameters.clients):
            raise WrongRoster(COORDINATOR, "roster is not a sorted part of the proposal's clients")
        if len(names) < self.parameters.quorum:
            raise BelowThreshold(
                COORDINATOR, f"roster has {len(names)} clients, at least {self.parameters.quorum} are needed"
            )

    @cached_property
    def _by_name(self) -> dict[str, Bundle]:
        return {bundle.sender: bundle for bundle in self.bundles}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def bundle(self, name: str) -> Bundle:
        return self._by_name[name]

    @property
    def holders_each(self) -> int:
        """How many clients hold shares of a dealer, itself included."""
        return min(self.parameters.sharing.degree + 1, len(self.bundles))

    def check_holders(self, dealer: str, holders: Sequence[str]) -> None:
        """Raise unless a dealer may share among `holders`: sorted, of the roster, with itself, as many as due."""
        if (
            list(holders) != sorted(set(holders))
            or not set(holders) <= self._by_name.keys()
            or dealer not in holders
            or len(holders) != self.holders_each
        ):
            raise WrongRoster(dealer, f"shares are not for {self.holders_each} clients of the roster")

    @cached_property
    def _digest(self) -> bytes:
        fields = [hashlib.sha256(bundle.raw).digest() for bundle in self.bundles]
        return digest("roster", self.parameters.digest(), *fields)

    def digest(self) -> bytes:
        return self._digest

    def transcript(self, dealers: Sequence[str]) -> bytes:
        """Digest of the epoch as it runs: proposal, every bundle, and the dealers between whom masks are
        exchanged.
        """
        return digest("transcript", self.digest(), *dealers)

    def check_dealers(self, dealers: Sequence[str]) -> None:
        """Raise unless `dealers` is a sorted part of the roster of at least threshold size."""
        if list(dealers) != sorted(set(dealers)) or not set(dealers) <= set(self.names):
            raise WrongRoster(COORDINATOR, "final roster is not a sorted part of the roster of bundles")
        if len(dealers) < self.parameters.threshold:
            raise BelowThreshold(
                COORDINATOR,
                f"final roster has {len(dealers)} clients, the threshold is {self.parameters.threshold}",
            )
