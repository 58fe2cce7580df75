"""Mask expansion: AES-256-CTR keystreams added in Z_2^32 or Z_2^64.

Nonce discipline: every keystream has a key of its own, derived for (pair or party, round, transcript, coding,
context), and starts at counter block 2. A key is used for one vector and forgotten, so no keystream can meet two
payloads.

From block 2 on, counter mode is what GCM encrypts with under a zero nonce (NIST SP 800-38D, sections 6.5 and 7.1), so two
routines of OpenSSL give the same keystream. On processors with vector AES its GCM is 2.5 times as fast as its counter
mode, on others slower: the faster one is found once per process. No tag is ever made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from .keys import bind, expand

RingVector = NDArray[np.unsignedinteger[Any]]

CHUNK_BYTES = 256 * 1024  # stays in the second-level cache
_ZEROS = bytes(CHUNK_BYTES)
_MODES = (modes.CTR((2).to_bytes(16, "big")), modes.GCM(bytes(12)))
KEYS_AT_ONCE = 1024  # bounds the memory of expanded keys


def ring_dtype(ring_bits: int) -> np.dtype[Any]:
    """Little-endian uint32 or uint64: the wire format and the arithmetic at once."""
    return np.dtype({32: "<u4", 64: "<u8"}[ring_bits])


def mask_key(seed: bytes, round_id: int, coding: bytes, context: bytes) -> bytes:
    """AES key of one keystream. `seed` is already bound to session, epoch, round, transcript and parties; the
    fixed-point coding and the round's context are added here, so parties that disagree on either produce
    masks that do not cancel."""
    return expand(seed, _mask_info(round_id, coding, context))


@lru_cache(maxsize=8)  # the same for all keys of a round
def _mask_info(round_id: int, coding: bytes, context: bytes) -> bytes:
    return bind("mask", round_id, coding, context)


def keystream(key: bytes, mode: modes.Mode) -> Callable[[memoryview, bytearray], int]:
    """Called with n zero bytes and a buffer: writes the next n bytes of the keystream of `key`."""
    cipher: Cipher[Any] = Cipher(algorithms.AES(key), mode)
    return cipher.encryptor().update_into


@lru_cache(maxsize=1)
def fastest_mode() -> modes.Mode:
    """The quicker of the two routines on this machine, over a chunk."""
    zeros, scratch = memoryview(_ZEROS), bytearray(CHUNK_BYTES)

    def seconds(mode: modes.Mode) -> float:
        stream, spent = keystream(bytes(32), mode), []
        for _ in range(5):
            began = time.perf_counter()
            stream(zeros, scratch)
            spent.append(time.perf_counter() - began)
        return min(spent)

    return min(_MODES, key=seconds)


def apply_masks(vector: RingVector, add: Sequence[bytes], subtract: Sequence[bytes]) -> None:
    """In place: vector += sum of keystreams of the keys in `add` - those of `subtract`, modulo 2^ring_bits.

    Chunk by chunk over many keys, so that a chunk of the vector is in cache for all of them.
    """
    signed = [(key, np.add) for key in add] + [(key, np.subtract) for key in subtract]
    step = min(CHUNK_BYTES // vector.itemsize, vector.size)
    scratch = bytearray(step * vector.itemsize)
    mask = np.frombuffer(scratch, dtype=vector.dtype)
    zeros, mode = memoryview(_ZEROS), fastest_mode()
    for first in range(0, len(signed), KEYS_AT_ONCE):
        streams = [
            (keystream(key, mode), operation) for key, operation in signed[first : first + KEYS_AT_ONCE]
        ]
        for start in range(0, vector.size, step or 1):
            part = vector[start : start + step]
            for stream, operation in streams:
                stream(zeros[: part.nbytes], scratch)
                operation(part, mask[: part.size], out=part)
