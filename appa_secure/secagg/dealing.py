"""A client's secrets of an epoch: made, shared out, received, and turned into pair seeds.

Pure functions of the set-up; `client.ClientMachine` decides when they run. Arrays are round-major: row r - 1
belongs to round r.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from numpy.typing import NDArray

from . import shamir
from .client_store import ClientEpoch, Secrets
from .errors import BadShare, WrongRoster
from .keys import KEY_BYTES, IdentityKey, Rng, agree, x25519_public
from .policy import EpochParameters
from .roster import Roster
from .schedule import (
    KINDS,
    MASK_KEY,
    pair_seed,
    secret_commitment,
    share_context,
    share_digests,
    share_key,
    table_key,
)
from .wire import PACKET, Envelope, seal

NONCE_BYTES = 12
ONE_TIME_NONCE = bytes(NONCE_BYTES)  # for keys that encrypt one message


def make_secrets(rounds: int, rng: Rng) -> Secrets:
    """(R, KINDS, 32) fresh secrets; those of kind MASK_KEY are X25519 private keys."""
    size = rounds * KINDS * KEY_BYTES
    return np.frombuffer(rng(size), np.uint8).reshape(rounds, KINDS, KEY_BYTES).copy()


def bundle_body(
    parameters: EpochParameters, client: str, encryption_private: bytes, secrets: Secrets
) -> dict[str, bytes]:
    """The public values that go with a client's secrets."""
    return {
        "proposal": parameters.digest(),
        "encryption_key": x25519_public(encryption_private),
        "mask_keys": b"".join(x25519_public(row[MASK_KEY].tobytes()) for row in secrets),
        "commitments": b"".join(
            secret_commitment(parameters, client, r, kind, secret.tobytes())
            for r, row in enumerate(secrets, start=1)
            for kind, secret in enumerate(row)
        ),
    }


def deal(
    epoch: ClientEpoch, roster: Roster, client: str, holders: Sequence[str], identity: IdentityKey, rng: Rng
) -> list[bytes]:
    """For every holder a signed, encrypted packet with its shares of all secrets of the epoch, in order."""
    p, digest = epoch.parameters, roster.digest()
    shares = shamir.share(
        epoch.secrets.reshape(-1, KEY_BYTES), p.sharing.threshold, len(holders), rng
    )  # (holders, KINDS * R, 9)
    private = X25519PrivateKey.from_private_bytes(epoch.encryption_private)
    packets = []
    for holder, row in zip(holders, shares, strict=True):
        plain = shamir.pack(row)
        shared = agree_with(private, roster.bundle(holder).encryption_key, holder)
        nonce = rng(NONCE_BYTES)
        packet = {
            "to": holder,
            "roster": digest,
            "nonce": nonce,
            "ciphertext": ChaCha20Poly1305(share_key(shared, digest, p, client, holder)).encrypt(
                nonce, plain, share_context(p, digest, client, holder)
            ),
            "digests": share_digests(p, client, holder, plain),
        }
        packets.append(seal(PACKET, p.session, p.epoch, 0, client, packet, identity))
    return packets


def open_packet(
    packet: Envelope, client: str, epoch: ClientEpoch, roster: Roster, private: X25519PrivateKey
) -> NDArray[np.uint32]:
    """Shares (R, KINDS, 9) in a packet whose signature was verified; raises naming its dealer."""
    p, digest, dealer, body = epoch.parameters, roster.digest(), packet.sender, packet.body
    if body["to"] != client or body["roster"] != digest:
        raise WrongRoster(dealer, "its share packet is for another client or another roster")
    shared = agree_with(private, roster.bundle(dealer).encryption_key, dealer)
    key = share_key(shared, digest, p, dealer, client)
    try:
        plain = ChaCha20Poly1305(key).decrypt(
            body["nonce"], body["ciphertext"], share_context(p, digest, dealer, client)
        )
    except InvalidTag:
        raise BadShare(dealer, "its share packet does not decrypt") from None
    shares = shamir.unpack(plain, KINDS * p.rounds)
    if shares is None:
        raise BadShare(dealer, "its share packet does not hold one share of each kind per round")
    if share_digests(p, dealer, client, plain) != body["digests"]:
        raise BadShare(dealer, "its shares differ from the digests it signed")
    return shares.reshape(p.rounds, KINDS, shamir.LIMBS)


def make_pair_seeds(
    epoch: ClientEpoch, roster: Roster, transcript: bytes, client: str, peers: Sequence[str]
) -> Secrets:
    """(R, peers, 32) seeds of the pairwise masks: all key agreement of the epoch."""
    p = epoch.parameters
    seeds = np.zeros((p.rounds, len(peers), KEY_BYTES), np.uint8)
    for r in range(1, p.rounds + 1):
        own = X25519PrivateKey.from_private_bytes(epoch.secrets[r - 1, MASK_KEY].tobytes())
        for row, peer in enumerate(peers):
            shared = agree_with(own, roster.bundle(peer).mask_key(r), peer)
            seed = pair_seed(shared, transcript, p, client, peer, r)
            seeds[r - 1, row] = np.frombuffer(seed, np.uint8)
    return seeds


def seal_pair_seeds(epoch: ClientEpoch, transcript: bytes, client: str, pair_seeds: Secrets) -> bytes:
    """The client's table: its pair seeds of every round under a key that its one-time mask key of that round
    gives. If it drops out, t shares open the row, and nobody does key agreement on the round's path."""
    table = []
    for r, row in enumerate(pair_seeds, start=1):
        key = table_key(epoch.secrets[r - 1, MASK_KEY].tobytes(), transcript, epoch.parameters, client, r)
        table.append(ChaCha20Poly1305(key).encrypt(ONE_TIME_NONCE, row.tobytes(), None))
    return b"".join(table)


def peers_of(client: str, holders: Sequence[str], wards: Sequence[str], dealers: Sequence[str]) -> list[str]:
    """With whom a client masks: dealers whose shares it holds or who hold its own."""
    return sorted(((set(holders) & set(dealers)) | set(wards)) - {client})


def agree_with(private: X25519PrivateKey, public: bytes, peer: str) -> bytes:
    """X25519, blaming `peer` for a low-order point."""
    try:
        return agree(private, public)
    except ValueError:
        raise WrongRoster(peer, "its key is a low-order point") from None
