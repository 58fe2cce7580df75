"""The signed roster of an epoch: what clients and coordinator compute from the same bundles.

Three digests, each containing the one before: proposal (parameters) -> roster (all bundles, in id order:
gives every client its share point) -> transcript (plus the final list of dealers). The transcript salts every
mask derivation, so two clients with different views of who takes part, or of anyone's keys, produce masks
that do not cancel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import BadEncoding, BelowThreshold, WrongRoster
from .keys import COORDINATOR, KEY_BYTES, Directory, bind, derive, digest
from .policy import EpochParameters
from .shamir import SHARE_BYTES
from .wire import BUNDLE, Envelope, expect, parse, verify

SHARE_DIGEST_BYTES = 16
KINDS = 2  # per round: share 0 opens the self-mask seed, share 1 the one-time mask key
SEED, MASK_KEY = 0, 1


@dataclass(frozen=True)
class Bundle:
    """A client's verified public values for one epoch."""

    sender: str
    encryption_key: bytes
    mask_keys: bytes  # rounds * 32
    commitments: bytes  # rounds * 32
    raw: bytes

    def mask_key(self, round_id: int) -> bytes:
        """X25519 public key of round 1..rounds."""
        return self.mask_keys[KEY_BYTES * (round_id - 1) : KEY_BYTES * round_id]

    def commitment(self, round_id: int) -> bytes:
        """Commitment of the self-mask seed of round 1..rounds."""
        return self.commitments[KEY_BYTES * (round_id - 1) : KEY_BYTES * round_id]


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
    for field in ("mask_keys", "commitments"):
        if len(body[field]) != KEY_BYTES * parameters.rounds:
            raise BadEncoding(envelope.sender, f"bundle: field '{field}' has {len(body[field])} bytes")
    return Bundle(
        envelope.sender, body["encryption_key"], body["mask_keys"], body["commitments"], envelope.raw
    )


@dataclass(frozen=True)
class Roster:
    """Verified bundles in id order; the i-th client (from 1) holds Shamir point i."""

    parameters: EpochParameters
    bundles: tuple[Bundle, ...]

    def __post_init__(self) -> None:
        names = [bundle.sender for bundle in self.bundles]
        if names != sorted(set(names)) or not set(names) <= set(self.parameters.clients):
            raise WrongRoster(COORDINATOR, "roster is not a sorted part of the proposal's clients")
        if len(names) < self.parameters.threshold:
            raise BelowThreshold(
                COORDINATOR, f"roster has {len(names)} clients, the threshold is {self.parameters.threshold}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(bundle.sender for bundle in self.bundles)

    def bundle(self, name: str) -> Bundle:
        return self.bundles[self.names.index(name)]

    def point(self, name: str) -> int:
        """Shamir point of a client."""
        return self.names.index(name) + 1

    def digest(self) -> bytes:
        fields = [hashlib.sha256(bundle.raw).digest() for bundle in self.bundles]
        return digest("roster", self.parameters.digest(), *fields)

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


def seed_commitment(parameters: EpochParameters, client: str, round_id: int, seed: bytes) -> bytes:
    """Hash commitment of a self-mask seed (hiding because the seed has 256 bits of entropy)."""
    return digest("seed-commitment", parameters.session, parameters.epoch, client, round_id, seed)


def pair_seed(
    shared: bytes, transcript: bytes, parameters: EpochParameters, a: str, b: str, round_id: int
) -> bytes:
    """Seed of the pairwise mask of two clients in one round; the same for both of them."""
    first, second = sorted((a, b))
    info = bind("pair-seed", parameters.session, parameters.epoch, first, second, round_id)
    return derive(shared, transcript, info)


def self_seed(
    seed: bytes, transcript: bytes, parameters: EpochParameters, client: str, round_id: int
) -> bytes:
    """Seed of a client's self-mask in one round, from the secret it committed to."""
    return derive(seed, transcript, bind("self-seed", parameters.session, parameters.epoch, client, round_id))


def share_key(shared: bytes, roster: bytes, parameters: EpochParameters, dealer: str, holder: str) -> bytes:
    """AEAD key for the share packet from `dealer` to `holder`; one per direction."""
    return derive(shared, roster, bind("share-key", parameters.session, parameters.epoch, dealer, holder))


def share_context(parameters: EpochParameters, roster: bytes, dealer: str, holder: str) -> bytes:
    """Associated data of the share packet."""
    return bind("share-packet", parameters.session, parameters.epoch, roster, dealer, holder)


def share_digests(parameters: EpochParameters, dealer: str, holder: str, shares: bytes) -> bytes:
    """Truncated hashes of all 2 * rounds shares of one packet, signed by the dealer so that a wrong share can
    be pinned on whoever is at fault: on the holder when it does not match, on the dealer when all match and
    no secret comes out.

    128 bits suffice: a holder would need a second preimage. Hiding because a share has 279 bits of entropy.
    """
    prefix = bind("share-digest", parameters.session, parameters.epoch, dealer, holder)
    return b"".join(
        _share_digest(prefix, index, shares[index * SHARE_BYTES : (index + 1) * SHARE_BYTES])
        for index in range(len(shares) // SHARE_BYTES)
    )


def share_matches(
    parameters: EpochParameters,
    dealer: str,
    holder: str,
    digests: bytes,
    round_id: int,
    kind: int,
    share: bytes,
) -> bool:
    """Whether a share of `round_id` (from 1) is the one its dealer committed to in `digests`."""
    index = KINDS * (round_id - 1) + kind
    expected = digests[index * SHARE_DIGEST_BYTES : (index + 1) * SHARE_DIGEST_BYTES]
    return (
        _share_digest(
            bind("share-digest", parameters.session, parameters.epoch, dealer, holder), index, share
        )
        == expected
    )


def _share_digest(prefix: bytes, index: int, share: bytes) -> bytes:
    return hashlib.sha256(prefix + index.to_bytes(4, "big") + share).digest()[:SHARE_DIGEST_BYTES]
