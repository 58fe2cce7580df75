"""Opening a round: shares to secrets, secrets to the plain sum, every lie to its author.

Only secrets of the one round are ever rebuilt, in this order: the answer keys of the survivors that answered and the
mask keys of the dropped parties, from shares in clear; with the answer keys the sealed parts of the answers; from
those the self-mask seeds of all survivors. All shares that were handed in are checked to be consistent, needed or not,
and each secret against its owner's commitment. On a mismatch the shares of that secret are compared with the digests
their dealer signed: shares that differ are their holder's fault and are left out; if all agree, the dealer dealt badly.

The pair seeds of a dropped party come from its own table, which its mask key opens: no key agreement. Each is
compared with what the survivor at the other end says of it. Where they differ, or the survivor fell silent, the mask
key gives the true seed by X25519, and tells who lied. So the outcome is the exact sum, or a named abort.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from numpy.typing import NDArray

from . import shamir
from .errors import BadEncoding, BadShare, BelowThreshold, RemoteMisbehaviour
from .fixedpoint import Coding
from .graph import SharingGraph
from .keys import COORDINATOR, KEY_BYTES, Rng, agree, x25519_public
from .masks import RingVector, apply_masks, mask_key
from .roster import Roster
from .schedule import (
    ANSWER_KEY,
    CHECK_BYTES,
    MASK_KEY,
    SEED,
    answer_key,
    pair_check,
    pair_seed,
    secret_commitment,
    self_seed,
    share_matches,
    split,
    table_key,
)
from .wire import Envelope

TAG_BYTES = 16
_NONCE = bytes(12)  # every key here encrypts one message

Shares = NDArray[np.uint32]  # (wards, 9) of one holder, in the order of its wards


@dataclass
class Opening:
    """One round about to be opened. `culprits` fills up with whoever is caught, also when the round fails.

    `digests[dealer, holder]` are the signed share digests of set-up, `tables[client]` the sealed pair seeds.
    """

    roster: Roster
    graph: SharingGraph
    transcript: bytes
    round_id: int
    survivors: tuple[str, ...]
    dropped: tuple[str, ...]
    digests: Mapping[tuple[str, str], bytes]
    tables: Mapping[str, bytes]
    culprits: dict[str, str] = field(default_factory=dict)  # client -> what it did
    rng: Rng = os.urandom

    def check(self, answer: Envelope) -> Shares:
        """The shares in clear of an answer, (wards, 9); raises `BadEncoding` when a field has a wrong size."""
        wards, gone = self.graph.wards[answer.sender], self._gone
        shares = shamir.unpack(answer.body["shares"], len(wards))
        alive = len(wards) - len(gone.intersection(wards))
        if (
            shares is None
            or len(answer.body["checks"]) != CHECK_BYTES * len(self._dropped_peers(answer.sender))
            or len(answer.body["seeds"]) != shamir.SHARE_BYTES * alive + TAG_BYTES
        ):
            raise BadEncoding(answer.sender, "answer does not hold one share per party it holds shares of")
        return shares

    def remove_masks(
        self, total: RingVector, coding: Coding, context: bytes, answers: Mapping[str, Envelope]
    ) -> None:
        """In place: from the sum of the survivors' uploads to the sum of their encoded vectors.

        Raises `BelowThreshold` when a secret that is needed has fewer than threshold good shares, `BadShare`
        naming a dealer whose own shares give no secret.
        """
        seeds, mask_keys = self._secrets(answers)
        p, r = self.roster.parameters, self.round_id
        add: list[bytes] = []
        subtract = [self_seed(seeds[name], self.transcript, p, name, r) for name in self.survivors]
        for gone in self.dropped:
            for name, seed in self._pair_seeds(gone, mask_keys[gone], answers):
                # A survivor added the mask of every peer with a larger id and subtracted the others'.
                (subtract if name < gone else add).append(seed)
        plus, minus = ([mask_key(s, r, coding.digest, context) for s in part] for part in (add, subtract))
        apply_masks(total, plus, minus)

    def _secrets(self, answers: Mapping[str, Envelope]) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """(self-mask seeds of the survivors, mask keys of the dropped)."""
        kinds = {**dict.fromkeys(self.survivors, ANSWER_KEY), **dict.fromkeys(self.dropped, MASK_KEY)}
        found, failed = self._reconstruct(kinds, {name: self.check(e) for name, e in answers.items()})
        self._require(self.dropped, failed)
        sealed = {
            name: shares
            for name in answers
            if name in found and (shares := self._unseal(answers[name], found[name])) is not None
        }
        seeds, failed = self._reconstruct(dict.fromkeys(self.survivors, SEED), sealed)
        self._require(self.survivors, failed)
        return seeds, {name: found[name] for name in self.dropped}

    def _require(self, owners: Iterable[str], failed: Mapping[str, RemoteMisbehaviour]) -> None:
        for owner in owners:
            if owner in failed:
                raise failed[owner]

    def _unseal(self, answer: Envelope, secret: bytes) -> Shares | None:
        """Seed shares by ward (zero for dropped ones), or None and a culprit when its seal is not its own."""
        name = answer.sender
        key = answer_key(secret, self.transcript, self.roster.parameters, name, self.round_id)
        alive = np.array([ward not in self._gone for ward in self.graph.wards[name]])
        try:
            plain = ChaCha20Poly1305(key).decrypt(_NONCE, answer.body["seeds"], None)
        except InvalidTag:
            self.culprits[name] = "sealed its answer under another key than it dealt"
            return None
        found = shamir.unpack(plain, int(alive.sum()))
        if found is None:
            self.culprits[name] = "sealed an answer that does not hold shares"
            return None
        shares = np.zeros((len(alive), shamir.LIMBS), np.uint32)
        shares[alive] = found
        return shares

    def _reconstruct(
        self, kinds: Mapping[str, int], shares: Mapping[str, Shares]
    ) -> tuple[dict[str, bytes], dict[str, RemoteMisbehaviour]]:
        """Secrets by owner, and for the owners without one the reason. `kinds[owner]` says which of its secrets;
        `shares[holder]` has a row for each ward."""
        graph, threshold, owners = self.graph, self.roster.parameters.sharing.threshold, list(kinds)
        starts, count = (
            np.full(len(graph.dealers) + 1, -1),
            0,
        )  # the last for holders that are out of the epoch
        for holder, block in shares.items():
            starts[graph.row[holder]] = count
            count += len(block)
        pool = np.concatenate([*shares.values(), np.zeros((1, shamir.LIMBS), np.uint32)])
        rows = [graph.row[owner] for owner in owners]
        first = starts[graph.places[rows]].reshape(len(owners), -1)
        present = first >= 0
        values = pool[
            np.where(present, first + graph.slots[rows].reshape(first.shape), count)
        ]  # (owners, H, 9)

        secrets: dict[str, bytes] = {}
        failed: dict[str, RemoteMisbehaviour] = {}
        pending = list(range(len(owners)))
        doubtful = np.flatnonzero(~shamir.consistent(present, values, threshold, self.rng)).tolist()
        for _ in range(2):  # once more for those whose wrong shares showed in the secret only
            for i in doubtful:
                self._drop_wrong_shares(owners[i], kinds[owners[i]], present[i], values[i])
            usable = present.sum(axis=1)
            for i in pending:
                if usable[i] < threshold:
                    reason = f"{usable[i]} usable answers, the threshold is {threshold}; nothing was opened"
                    failed[owners[i]] = BelowThreshold(COORDINATOR, reason)
            pending = [i for i in pending if usable[i] >= threshold]
            chosen = np.argsort(~present[pending], axis=1, kind="stable")[:, :threshold]
            found = shamir.combine(chosen + 1, np.take_along_axis(values[pending], chosen[:, :, None], 1))
            doubtful = []
            for i, secret in zip(pending, found, strict=True):
                if secret is not None and self._is_committed(owners[i], kinds[owners[i]], secret):
                    secrets[owners[i]] = secret
                else:
                    doubtful.append(i)
            pending = doubtful
        for i in pending:
            reason = f"round {self.round_id}: the shares it dealt do not give the secret it committed to"
            self.culprits[owners[i]] = reason
            failed[owners[i]] = BadShare(owners[i], reason)
        return secrets, failed

    def _is_committed(self, owner: str, kind: int, secret: bytes) -> bool:
        expected = self.roster.bundle(owner).commitment(self.round_id, kind)
        return secret_commitment(self.roster.parameters, owner, self.round_id, kind, secret) == expected

    def _drop_wrong_shares(self, owner: str, kind: int, present: NDArray[np.bool_], values: Shares) -> None:
        """Leave out, and name, who handed in another share than its signed digest says; if nobody did, the dealer's own
        shares do not belong together."""
        p, r = self.roster.parameters, self.round_id
        honest = True
        for i in np.flatnonzero(present):
            holder, share = self.graph.holders[owner][i], shamir.pack(values[i])
            if not share_matches(p, owner, holder, self.digests[owner, holder], r, kind, share):
                self.culprits[holder] = "handed in shares it was not dealt"
                present[i] = honest = False
        if honest:
            self.culprits[owner] = "dealt shares that do not belong together"

    def _pair_seeds(
        self, gone: str, mask_private: bytes, answers: Mapping[str, Envelope]
    ) -> Iterable[tuple[str, bytes]]:
        """(survivor, seed of its mask with the dropped party `gone`) for every survivor it masked with."""
        row = self._open_row(gone, mask_private)
        for position, name in enumerate(self.graph.peers[gone]):
            if name in self._gone:
                continue
            claimed = row[position] if row else b""
            said = self._checks(answers[name])[gone] if name in answers else b""
            if claimed and pair_check(claimed) == said:
                yield name, claimed
            else:
                yield name, self._agree(gone, mask_private, name, claimed, said)

    def _agree(self, gone: str, mask_private: bytes, name: str, claimed: bytes, said: bytes) -> bytes:
        """The true pair seed by key agreement; whoever said otherwise is a culprit."""
        if x25519_public(mask_private) != self.roster.bundle(gone).mask_key(self.round_id):
            reason = f"round {self.round_id}: the mask key it shared is not the one in its bundle"
            self.culprits[gone] = reason
            raise BadShare(gone, reason)
        try:
            shared = agree(
                X25519PrivateKey.from_private_bytes(mask_private),
                self.roster.bundle(name).mask_key(self.round_id),
            )
        except ValueError:
            raise BadShare(name, "its mask key is a low-order point") from None
        seed = pair_seed(shared, self.transcript, self.roster.parameters, name, gone, self.round_id)
        if gone in self.tables and claimed != seed:  # who missed the start has no table, and no blame
            self.culprits[gone] = "sealed pair seeds that are not those of its mask key"
        if said and said != pair_check(seed):
            self.culprits[name] = f"gave a wrong check of its pair seed with '{gone}'"
        return seed

    def _open_row(self, gone: str, mask_private: bytes) -> list[bytes]:
        """The pair seeds in the table of a dropped party, in the order of its peers; empty if it cannot be
        read or it sent none."""
        if gone not in self.tables:
            return []
        size = KEY_BYTES * len(self.graph.peers[gone]) + TAG_BYTES
        sealed = self.tables[gone][size * (self.round_id - 1) : size * self.round_id]
        key = table_key(mask_private, self.transcript, self.roster.parameters, gone, self.round_id)
        try:
            return list(split(ChaCha20Poly1305(key).decrypt(_NONCE, sealed, None)))
        except InvalidTag:
            return []

    @cached_property
    def _gone(self) -> frozenset[str]:
        return frozenset(self.dropped)

    def _dropped_peers(self, name: str) -> list[str]:
        return [peer for peer in self.graph.peers[name] if peer in self._gone]

    def _checks(self, answer: Envelope) -> dict[str, bytes]:
        """What a survivor says of its pair seeds, by dropped peer."""
        found = self._said.get(answer.sender)
        if found is None:
            checks = split(answer.body["checks"], CHECK_BYTES)
            found = dict(zip(self._dropped_peers(answer.sender), checks, strict=True))
            self._said[answer.sender] = found
        return found

    @cached_property
    def _said(self) -> dict[str, dict[str, bytes]]:
        return {}
