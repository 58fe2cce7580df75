"""Identities, key agreement and the one domain-separation function.

Everything that is hashed, signed, derived or authenticated starts with `bind(purpose, ...)`: protocol
version, purpose, and each field with its type and length, so no two uses can ever see the same bytes. Secrets
have no repr. Python cannot wipe memory reliably (immutable `bytes` are copied at will); secrets are dropped,
or zeroed where they live in numpy arrays.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable, Iterator, Mapping

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from .errors import BadParameters

_X25519_PRIME = 2**255 - 19
_ORDER_EIGHT = (
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
)
LOW_ORDER = frozenset(
    (u | top).to_bytes(32, "little")
    for u in (0, 1, *_ORDER_EIGHT, _X25519_PRIME - 1, _X25519_PRIME, _X25519_PRIME + 1)
    for top in (0, 1 << 255)
)
"""All X25519 public keys with which every agreement gives zero (RFC 7748 ignores the top bit)."""

Rng = Callable[[int], bytes]
"""Source of randomness: `rng(n)` returns n uniformly random bytes. `os.urandom` outside tests."""

KEY_BYTES = 32
VERSION = 3
COORDINATOR = "coordinator"
MAX_ID_BYTES = 64


def bind(purpose: str, *fields: bytes | str | int) -> bytes:
    """Unambiguous bytes for `purpose` and its context fields (protocol name, version, then tag-length-value
    per field).
    """
    parts = [b"appa-secure/secagg", VERSION.to_bytes(2, "big")]
    for field in (purpose, *fields):
        if isinstance(field, int):
            tag, raw = b"i", field.to_bytes(8, "big")
        elif isinstance(field, str):
            tag, raw = b"t", field.encode()
        else:
            tag, raw = b"b", field
        parts += (tag, len(raw).to_bytes(4, "big"), raw)
    return b"".join(parts)


def digest(purpose: str, *fields: bytes | str | int) -> bytes:
    """SHA-256 of `bind(purpose, *fields)`."""
    return hashlib.sha256(bind(purpose, *fields)).digest()


def derive(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869) to 32 bytes; `info` comes from `bind`."""
    return expand(hmac.digest(salt, secret, "sha256"), info)


def expand(key: bytes, info: bytes) -> bytes:
    """The expand half of HKDF-SHA256, for a `key` that is already uniform. One block: 32 bytes."""
    return hmac.digest(key, info + b"\x01", "sha256")


def x25519_public(private: bytes) -> bytes:
    """The X25519 public key (RFC 7748) of 32 private bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: X25519PrivateKey, public: bytes) -> bytes:
    """Raw X25519 shared secret. Raises ValueError for a low-order peer key (all-zero result)."""
    return private.exchange(X25519PublicKey.from_public_bytes(public))


def check_id(client_id: str) -> None:
    """Client identifiers: 1..64 bytes of UTF-8, not the coordinator's name."""
    if not 0 < len(client_id.encode()) <= MAX_ID_BYTES or client_id == COORDINATOR:
        raise BadParameters(f"client id {client_id!r}: use 1..{MAX_ID_BYTES} bytes, and not '{COORDINATOR}'")


class IdentityKey:
    """A client's long-term Ed25519 signing key (RFC 8032)."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    def __repr__(self) -> str:
        return f"<IdentityKey {self.public_bytes().hex()[:16]}>"

    def __reduce__(self) -> str:
        raise BadParameters(
            "an identity key is not pickled; store its 32-byte seed in the client's private store"
        )

    @classmethod
    def generate(cls, rng: Rng = os.urandom) -> IdentityKey:
        return cls.from_seed(rng(KEY_BYTES))

    @classmethod
    def from_seed(cls, seed: bytes) -> IdentityKey:
        """From a 32-byte secret seed."""
        if len(seed) != KEY_BYTES:
            raise BadParameters(f"identity seed has {len(seed)} bytes, needs {KEY_BYTES}")
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    def public_bytes(self) -> bytes:
        return self._key.public_key().public_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)


class Directory(Mapping[str, bytes]):
    """Provisioned client id -> Ed25519 public key. The root of trust: a client masks only with parties listed
    here.
    """

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        """`keys`: 32-byte public keys by client id; no two clients may share a key."""
        for client_id, public in keys.items():
            check_id(client_id)
            if len(public) != KEY_BYTES:
                raise BadParameters(
                    f"directory: key of '{client_id}' has {len(public)} bytes, needs {KEY_BYTES}"
                )
        if len(set(keys.values())) != len(keys):
            raise BadParameters("directory: two clients share one public key; give each its own identity")
        self._keys = dict(sorted(keys.items()))
        self._verifiers = {
            name: Ed25519PublicKey.from_public_bytes(public) for name, public in self._keys.items()
        }

    def __getitem__(self, client_id: str) -> bytes:
        return self._keys[client_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def digest(self) -> bytes:
        """SHA-256 over all ids and keys, to compare directories out of band."""
        fields: list[bytes | str] = []
        for client_id, public in self._keys.items():
            fields += (client_id, public)
        return digest("directory", *fields)

    def verifies(self, client_id: str, data: bytes, signature: bytes) -> bool:
        """Whether `signature` on `data` is by the listed key of `client_id` (which must be listed)."""
        try:
            self._verifiers[client_id].verify(signature, data)
        except InvalidSignature:
            return False
        return True
