"""Opening a round: shares to secrets, secrets to the plain sum, wrong shares to their author.

Only secrets of the one round are ever reconstructed: the self-mask seeds of its survivors, the one-time mask
keys of its dropped parties. Each is checked against what its owner committed to at set-up. On a mismatch
every share is compared with the digests its dealer signed: shares that differ are their holder's fault, that
holder's answer is set aside and the rest goes on; if all agree and still no secret comes out, the dealer
dealt badly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from . import shamir
from .errors import BadShare, BelowThreshold
from .fixedpoint import Coding
from .keys import COORDINATOR, agree, x25519_public
from .masks import RingVector, apply_masks, mask_key
from .roster import MASK_KEY, SEED, Roster, pair_seed, seed_commitment, self_seed, share_matches


@dataclass(frozen=True)
class Answers:
    """Shares by holder: row i belongs to the i-th name of `survivors + dropped`; (names, 9) each."""

    survivors: tuple[str, ...]
    dropped: tuple[str, ...]
    shares: Mapping[str, NDArray[np.uint32]]

    @property
    def names(self) -> tuple[str, ...]:
        return self.survivors + self.dropped


def reconstruct(
    roster: Roster, round_id: int, answers: Answers, digests: Mapping[tuple[str, str], bytes]
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Secrets of the round by owner (seed for a survivor, private key for a dropped party), and the culprits
    found.

    `digests[dealer, holder]` are the signed share digests of set-up. Raises `BelowThreshold` when fewer than
    threshold good answers are left, `BadShare` naming a dealer whose own shares give no secret.
    """
    threshold = roster.parameters.threshold
    culprits: set[str] = set()
    while True:
        holders = [holder for holder in sorted(answers.shares) if holder not in culprits]
        if len(holders) < threshold:
            reason = f"; wrong shares from {', '.join(sorted(culprits))}" if culprits else ""
            raise BelowThreshold(
                COORDINATOR,
                f"{len(holders)} usable answers, the threshold is {threshold}; nothing was opened{reason}",
            )
        chosen = holders[:threshold]
        stack = np.stack([answers.shares[holder] for holder in chosen])  # (t, names, 9)
        found = shamir.combine([roster.point(holder) for holder in chosen], stack)
        secrets = {
            name: secret for name, secret in zip(answers.names, found, strict=True) if secret is not None
        }
        wrong = [
            name
            for name in answers.names
            if not _is_committed(roster, round_id, name, answers, secrets.get(name))
        ]
        if not wrong:
            return secrets, tuple(sorted(culprits))
        blamed = _wrong_holders(roster, round_id, answers, digests, holders)
        if not blamed:
            raise BadShare(
                wrong[0], f"round {round_id}: the shares it dealt do not give the secret it committed to"
            )
        culprits |= blamed


def _is_committed(roster: Roster, round_id: int, name: str, answers: Answers, secret: bytes | None) -> bool:
    if secret is None:
        return False
    bundle = roster.bundle(name)
    if name in answers.survivors:
        return seed_commitment(roster.parameters, name, round_id, secret) == bundle.commitment(round_id)
    return x25519_public(secret) == bundle.mask_key(round_id)


def _wrong_holders(
    roster: Roster,
    round_id: int,
    answers: Answers,
    digests: Mapping[tuple[str, str], bytes],
    holders: Sequence[str],
) -> set[str]:
    return {
        holder
        for holder in holders
        for name, share in zip(answers.names, answers.shares[holder], strict=True)
        if not share_matches(
            roster.parameters,
            name,
            holder,
            digests[name, holder],
            round_id,
            SEED if name in answers.survivors else MASK_KEY,
            shamir.pack(share),
        )
    }


def remove_masks(
    total: RingVector,
    roster: Roster,
    transcript: bytes,
    round_id: int,
    coding: Coding,
    context: bytes,
    answers: Answers,
    secrets: Mapping[str, bytes],
) -> None:
    """In place: from the sum of the survivors' uploads to the sum of their encoded vectors."""
    p = roster.parameters
    subtract = [
        mask_key(self_seed(secrets[name], transcript, p, name, round_id), round_id, coding.digest, context)
        for name in answers.survivors
    ]
    add: list[bytes] = []
    for gone in answers.dropped:
        private = X25519PrivateKey.from_private_bytes(secrets[gone])
        for name in answers.survivors:
            try:
                shared = agree(private, roster.bundle(name).mask_key(round_id))
            except ValueError:
                raise BadShare(name, "its mask key is a low-order point") from None
            seed = pair_seed(shared, transcript, p, name, gone, round_id)
            # A survivor added the mask of every peer with a larger id and subtracted the others'.
            (subtract if name < gone else add).append(mask_key(seed, round_id, coding.digest, context))
    apply_masks(total, add, subtract)
