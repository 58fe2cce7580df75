"""Discrete Gaussian noise, which clients add to their ring elements before masking ("output noise").

    p(x) proportional to exp(-x^2 / (2 v))  over the integers,  v = variance parameter, a whole number

(Canonne, Kamath, Steinke: The Discrete Gaussian for Differential Privacy, NeurIPS 2020, definition 1.) Sampled by
inversion: a uniform 128-bit number is looked up in the cumulative distribution, computed once in decimal arithmetic. No
floating-point number touches a sample, every sample takes 16 bytes of the stream, and |x| <= `bound(v)` always. The
distance in total variation from the exact distribution is below `total_variation(v)`, at most 2^-106 per sample.

The sum over k clients is not a discrete Gaussian, but as good as one (Kairouz, Liu, Steinke: The Distributed Discrete
Gaussian Mechanism, ICML 2021, theorem 1): appa_secure/privacy/output.py accounts for it. Why not Skellam noise: decision
18 in docs/decisions.
"""

from __future__ import annotations

import math
from decimal import ROUND_FLOOR, Context, Decimal
from functools import lru_cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from .errors import BadParameters

SAMPLE_BYTES = 16
MIN_VARIANCE = 64  # below a standard deviation of 8, sums of discrete Gaussians are less like one
MAX_VARIANCE = 2**28  # a table of 14 MB
_REACH = 13.5  # standard deviations; beyond lie less than 2^-130 of the mass
_DIGITS = 70


def bound(variance: int) -> int:
    """The largest |x| that is ever drawn."""
    return math.ceil(_REACH * math.sqrt(variance))


def total_variation(variance: int) -> float:
    """Above the distance between one sample and the exact distribution: rounding of every entry of the table to
    2^-128, and the tails."""
    return 2.0**-128 * (2 * bound(variance) + 2)


def sample(variance: int, size: int, randomness: bytes) -> NDArray[np.int64]:
    """(size,) independent samples of variance parameter `variance`, from 16 * size uniform bytes.

    The same bytes give the same samples. Raises `BadParameters` for too few or too many bytes.
    """
    if len(randomness) != SAMPLE_BYTES * size:
        raise BadParameters(f"{len(randomness)} bytes for {size} samples, needs {SAMPLE_BYTES * size}")
    # numpy compares byte strings of one length like big-endian numbers.
    drawn = np.frombuffer(randomness, dtype=f"S{SAMPLE_BYTES}")
    found = np.searchsorted(_thresholds(variance), drawn, side="right")
    return found.astype(np.int64) - bound(variance)


def stream(key: bytes, size: int) -> bytes:
    """`size` bytes of the AES-256-CTR keystream of `key` (32 bytes, used for nothing else)."""
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(size))


@lru_cache(maxsize=8)
def _thresholds(variance: int) -> NDArray[np.bytes_]:
    """floor(2^128 P[X <= x]) for x = -bound .. bound - 1, each as 16 big-endian bytes: a uniform 128-bit number u
    gives the x with so many thresholds <= u."""
    if not MIN_VARIANCE <= variance <= MAX_VARIANCE:
        raise BadParameters(f"noise variance {variance}: must lie in {MIN_VARIANCE}..{MAX_VARIANCE}")
    halves = _weights(variance)
    weights = [*halves[:0:-1], *halves]
    total, scale = sum(weights), 2 ** (8 * SAMPLE_BYTES)
    cumulative, entries = 0, []
    for weight in weights[:-1]:
        cumulative += weight
        entries.append((scale * cumulative // total).to_bytes(SAMPLE_BYTES, "big"))
    return np.frombuffer(b"".join(entries), dtype=f"S{SAMPLE_BYTES}")


def _weights(variance: int) -> list[int]:
    """exp(-x^2 / (2 v)) for x = 0 .. bound, in units of 10^-60.

    By w(x+1) = w(x) q(x) and q(x+1) = q(x) exp(-1/v): in 70 digits, the error grows to at most x^2 10^-70 of w.
    """
    context: Any = Context(prec=_DIGITS)
    ratio = context.exp(context.divide(Decimal(-1), Decimal(2 * variance)))
    step = context.multiply(ratio, ratio)
    weight, unit, found = Decimal(1), Decimal(10) ** 60, []
    for _ in range(bound(variance) + 1):
        found.append(int(context.multiply(weight, unit).to_integral_value(ROUND_FLOOR)))
        weight, ratio = context.multiply(weight, ratio), context.multiply(ratio, step)
    return found
