"""Shamir secret sharing (Shamir 1979) of many 32-byte secrets at once over the prime field of p = 2^31 - 1.

A secret is nine little-endian limbs of 30 bits; each limb is the constant term of its own random polynomial
of degree t - 1. A share is the nine values at one non-zero point: 36 bytes, whatever t and n. Any t - 1
shares are independent of the secret.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .errors import BadParameters
from .keys import Rng

PRIME = 2**31 - 1
LIMB_BITS = 30
LIMBS = 9
SECRET_BYTES = 32
SHARE_BYTES = 4 * LIMBS
MAX_POINT = 2**16

_P = np.uint64(PRIME)
_WEIGHTS = (np.uint32(1) << np.arange(LIMB_BITS, dtype=np.uint32)).astype(np.uint32)


def share(secrets: NDArray[np.uint8], threshold: int, points: int, rng: Rng) -> NDArray[np.uint32]:
    """Shares of S secrets for the points x = 1..points.

    `secrets` is (S, 32); the result is (points, S, 9), row x - 1 belonging to point x. Needs 1 <= threshold
    <= points.
    """
    if not 1 <= threshold <= points <= MAX_POINT:
        raise BadParameters(
            f"threshold {threshold} of {points} points: needs 1 <= threshold <= points <= {MAX_POINT}"
        )
    if secrets.ndim != 2 or secrets.shape[1] != SECRET_BYTES or secrets.dtype != np.uint8:
        raise BadParameters(f"secrets have shape {secrets.shape}, need (S, {SECRET_BYTES}) bytes")
    limbs = _to_limbs(secrets)  # (S, 9)
    coefficients = _uniform((threshold - 1, *limbs.shape), rng)  # (t-1, S, 9)
    x = np.arange(1, points + 1, dtype=np.uint64)[:, None, None]
    values = np.zeros((points, *limbs.shape), dtype=np.uint64)
    for row in coefficients:  # Horner, highest power first; x * value < 2^16 * 2^31
        values = (values + row) * x % _P
    values = (values + limbs) % _P
    return values.astype(np.uint32)


def combine(points: NDArray[np.int64], shares: NDArray[np.uint32]) -> list[bytes | None]:
    """Secrets from exactly the given shares: `points` is (S, t) with distinct points in every row, `shares`
    (S, t, 9).

    None where the result is not 32 bytes in limbs, which no honestly dealt secret is. A wrong share otherwise
    gives a wrong secret: the caller checks each against its commitment.
    """
    if not len(points):
        return []
    rows, of_row = np.unique(points, axis=0, return_inverse=True)
    weights = _lagrange(rows.tobytes(), points.shape[1])[of_row.reshape(-1)]  # (S, t)
    terms = shares.astype(np.uint64) * weights[:, :, None] % _P  # (S, t, 9)
    return _from_limbs((terms.sum(axis=1) % _P).astype(np.uint32))


def consistent(
    present: NDArray[np.bool_], shares: NDArray[np.uint32], threshold: int, rng: Rng
) -> NDArray[np.bool_]:
    """(S,) whether all shares of a secret lie on one polynomial of degree below `threshold`, in one pass over them.

    `shares` is (S, H, 9), column i belonging to the point i + 1; where `present` (S, H) is false it may hold anything.
    Shares on such a polynomial are orthogonal to every word (m(x_i) / prod_(j != i) (x_i - x_j))_i, m of degree below
    N - t for N present shares. Others are so to a random word with probability 1/p (Cascudo and David, SCRAPE, ACNS
    2017, Lemma 1), drawn after they were handed in. More than N - t shares that were changed in concert can pass.
    """
    rows, width = present.shape
    spare = present.sum(axis=1) - threshold
    if not rows or spare.max() < 1:
        return np.ones(rows, np.bool_)
    x = np.arange(1, width + 1, dtype=np.uint64)
    coefficients = _uniform((int(spare.max()), rows), rng)
    coefficients[np.arange(len(coefficients))[:, None] >= spare] = 0
    word = np.zeros((rows, width), np.uint64)
    for row in coefficients[::-1]:
        word = (word * x + row[:, None]) % _P
    word = word * _dual(width) % _P
    # The dual weights are for all points; a missing one's factor comes out again, and leaves its own place zero.
    absent = np.argsort(present, axis=1, kind="stable")[:, : width - int(present.sum(axis=1).min())]
    for column in absent.T:
        factor = x + _P - (column[:, None] + 1).astype(np.uint64)
        word = word * np.where(present[np.arange(rows), column][:, None], np.uint64(1), factor % _P) % _P
    terms = word[:, :, None] * shares.astype(np.uint64) % _P
    return np.asarray((terms.sum(axis=1) % _P == 0).all(axis=1))


def pack(shares: NDArray[np.uint32]) -> bytes:
    """Shares as little-endian bytes, 36 per secret."""
    return shares.astype("<u4", copy=False).tobytes()


def unpack(data: bytes, count: int) -> NDArray[np.uint32] | None:
    """(count, 9) shares, or None when the size is wrong or a value is not in the field."""
    if len(data) != count * SHARE_BYTES:
        return None
    shares = np.frombuffer(data, dtype="<u4").reshape(count, LIMBS)
    if shares.size and int(shares.max()) >= PRIME:
        return None
    return shares


@lru_cache(maxsize=8)  # the same holders answer in round after round
def _lagrange(points: bytes, threshold: int) -> NDArray[np.uint64]:
    """(U, t) weights of f(0) = sum_i w_i f(x_i) mod p for (U, t) int64 points, distinct in every row."""
    rows = np.frombuffer(points, np.int64).reshape(-1, threshold)
    ordered = np.sort(rows, axis=1)
    if ordered.min() < 1 or ordered.max() > MAX_POINT or (ordered[:, 1:] == ordered[:, :-1]).any():
        raise BadParameters("points to combine must be distinct and positive")
    x = rows.astype(np.uint64)
    above, below = np.ones_like(x), np.ones_like(x)
    others = ~np.eye(threshold, dtype=bool)
    for i, other in enumerate(others):
        point = x[:, i, None]
        above = above * np.where(other, point, np.uint64(1)) % _P
        below = below * np.where(other, point + _P - x, np.uint64(1)) % _P
    return above * _inverse(below) % _P


@lru_cache(maxsize=8)
def _dual(width: int) -> NDArray[np.uint64]:
    """1 / prod_(j != i) (x_i - x_j) mod p for the points 1..width."""
    x = np.arange(1, width + 1, dtype=np.uint64)
    product = np.ones_like(x)
    for i, point in enumerate(x):
        product = product * np.where(np.arange(width) == i, np.uint64(1), x + _P - point) % _P
    return _inverse(product)


def _inverse(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """values^(p - 2) mod p (Fermat)."""
    result = np.ones_like(values)
    for bit in bin(PRIME - 2)[2:]:
        result = result * result % _P
        if bit == "1":
            result = result * values % _P
    return result


def _uniform(shape: tuple[int, ...], rng: Rng) -> NDArray[np.uint64]:
    """Uniform field elements: 31 random bits each, redrawn when they equal p."""
    count = int(np.prod(shape))
    values = np.frombuffer(rng(4 * count), dtype="<u4") & np.uint32(PRIME)
    while np.any(bad := values == PRIME):
        values = values.copy()
        values[bad] = np.frombuffer(rng(4 * int(bad.sum())), dtype="<u4") & np.uint32(PRIME)
    return values.astype(np.uint64).reshape(shape)


def _to_limbs(secrets: NDArray[np.uint8]) -> NDArray[np.uint64]:
    bits = np.unpackbits(secrets, axis=1, bitorder="little")
    padded = np.zeros((len(secrets), LIMBS * LIMB_BITS), dtype=np.uint32)
    padded[:, : bits.shape[1]] = bits
    return (padded.reshape(-1, LIMBS, LIMB_BITS) @ _WEIGHTS).astype(np.uint64)


def _from_limbs(limbs: NDArray[np.uint32]) -> list[bytes | None]:
    top_bits = 8 * SECRET_BYTES - LIMB_BITS * (LIMBS - 1)
    valid = np.all(limbs < 2**LIMB_BITS, axis=1) & (limbs[:, -1] < 2**top_bits)
    # 30-bit limbs to a bit string: take each as 4 bytes and drop the upper two bits
    raw = np.ascontiguousarray(limbs.astype("<u4")).view(np.uint8).reshape(len(limbs), LIMBS, 4)
    bits = np.unpackbits(raw, axis=2, bitorder="little")[:, :, :LIMB_BITS].reshape(len(limbs), -1)
    secrets = np.packbits(bits[:, : 8 * SECRET_BYTES], axis=1, bitorder="little")
    return [row.tobytes() if ok else None for row, ok in zip(secrets, valid, strict=True)]
