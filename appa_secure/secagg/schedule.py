"""The key schedule: every derived key, commitment and digest of the protocol, with its label.

Labels go through `keys.bind`, which adds protocol name and version and separates all fields. `parameters` gives
session and epoch. The transcript digest salts what is derived after the set-up, so parties with different views of
the epoch derive unrelated keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from .keys import KEY_BYTES, bind, derive, digest, expand
from .policy import EpochParameters
from .shamir import SHARE_BYTES

SHARE_DIGEST_BYTES = 16
CHECK_BYTES = 16

KINDS = 3
SEED, MASK_KEY, ANSWER_KEY = range(KINDS)
"""The secrets of a client that are shared, three per round: the seed of its self-mask, its one-time mask key, and
the key that its own answer is sealed with.
"""


def secret_commitment(
    parameters: EpochParameters, client: str, round_id: int, kind: int, secret: bytes
) -> bytes:
    """Hash commitment of a shared secret (hiding because the secret has 256 bits of entropy)."""
    return digest("commitment", parameters.session, parameters.epoch, client, round_id, kind, secret)


def self_seed(
    seed: bytes, transcript: bytes, parameters: EpochParameters, client: str, round_id: int
) -> bytes:
    """Seed of a client's self-mask in one round, from the secret it committed to."""
    return derive(seed, transcript, bind("self-seed", parameters.session, parameters.epoch, client, round_id))


def pair_seed(
    shared: bytes, transcript: bytes, parameters: EpochParameters, a: str, b: str, round_id: int
) -> bytes:
    """Seed of the pairwise mask of two clients in one round, from their X25519 secret; the same for both."""
    first, second = sorted((a, b))
    info = bind("pair-seed", parameters.session, parameters.epoch, first, second, round_id)
    return derive(shared, transcript, info)


_PAIR_CHECK = bind("pair-check")


def pair_check(seed: bytes) -> bytes:
    """What a survivor says of a pair seed that it shares with a dropped party: 128 bits of a hash.

    A second preimage is what a liar would need. Hiding because the seed has 256 bits of entropy; the seed is
    already bound to session, epoch, round and both parties.
    """
    return hashlib.sha256(_PAIR_CHECK + seed).digest()[:CHECK_BYTES]


def table_key(
    mask_private: bytes, transcript: bytes, parameters: EpochParameters, client: str, round_id: int
) -> bytes:
    """AEAD key of a client's sealed pair seeds of one round, from its one-time mask key. Used once."""
    info = bind("pair-table", parameters.session, parameters.epoch, client, round_id)
    return derive(mask_private, transcript, info)


def answer_key(
    secret: bytes, transcript: bytes, parameters: EpochParameters, client: str, round_id: int
) -> bytes:
    """AEAD key of the sealed part of a client's answer in one round. Used once: a round is answered once."""
    info = bind("answer", parameters.session, parameters.epoch, client, round_id)
    return derive(secret, transcript, info)


def noise_key(
    secret: bytes, parameters: EpochParameters, client: str, round_id: int, coding: bytes, context: bytes
) -> bytes:
    """AES key of the output noise of one upload, from a secret that never leaves the client and is never shared.

    Everything the upload depends on is in it: the same upload has the same noise, also after a restart, and no two
    different uploads have (their difference would be free of noise).
    """
    info = bind("noise", parameters.session, parameters.epoch, client, round_id, coding, context)
    return expand(secret, info)


def reply_key(shared: bytes, transcript: bytes, parameters: EpochParameters, client: str) -> bytes:
    """Key under which a client's uploads and answers of one epoch are authenticated to the coordinator, from the X25519
    secret of the client's encryption key and the coordinator's key in the proposal."""
    return derive(shared, transcript, bind("reply-key", parameters.session, parameters.epoch, client))


def share_key(shared: bytes, roster: bytes, parameters: EpochParameters, dealer: str, holder: str) -> bytes:
    """AEAD key for the share packet from `dealer` to `holder`; one per direction."""
    return derive(shared, roster, bind("share-key", parameters.session, parameters.epoch, dealer, holder))


def share_context(parameters: EpochParameters, roster: bytes, dealer: str, holder: str) -> bytes:
    """Associated data of the share packet."""
    return bind("share-packet", parameters.session, parameters.epoch, roster, dealer, holder)


def share_digests(parameters: EpochParameters, dealer: str, holder: str, shares: bytes) -> bytes:
    """Truncated hashes of all KINDS * rounds shares of one packet, signed by the dealer so that a wrong share
    can be pinned on whoever is at fault: on the holder when it does not match, on the dealer when all match and
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
    prefix = bind("share-digest", parameters.session, parameters.epoch, dealer, holder)
    return _share_digest(prefix, index, share) == expected


def _share_digest(prefix: bytes, index: int, share: bytes) -> bytes:
    return hashlib.sha256(prefix + index.to_bytes(4, "big") + share).digest()[:SHARE_DIGEST_BYTES]


def split(data: bytes, size: int = KEY_BYTES) -> Sequence[bytes]:
    """`data` in pieces of `size` bytes."""
    return [data[i : i + size] for i in range(0, len(data), size)]
