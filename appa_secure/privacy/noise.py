"""Noise for the Gaussian mechanism from a cryptographic generator.

Every draw is named: (client key, label). The same name gives the same noise, so that a client killed before it could
answer recomputes exactly the release it had paid for, instead of paying for (and publishing) a second one. Distinct
labels give independent streams; the label must therefore contain everything the release depends on.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_DOMAIN = b"appa-secure/1/privacy-noise/"


def _derive(key: bytes, label: str, length: int) -> bytes:
    return HKDF(hashes.SHA256(), length, salt=None, info=_DOMAIN + label.encode()).derive(key)


def gaussian(key: bytes, label: str, size: int, std: float) -> np.ndarray:
    """`size` independent N(0, std^2) draws, float64, from AES-256-CTR by the Box-Muller transform.

    Box & Muller (1958). Uniforms have 53 bits; u1 lies in (0, 1], so the largest draw is sqrt(2*53*ln 2) = 8.6 std.
    Floating-point Gaussians are not exactly Gaussian (Mironov 2012): see threat_model/limitations.md.
    """
    if not std >= 0:
        raise ValueError(f"std must be >= 0, got {std}")
    pairs = (size + 1) // 2
    stream = Cipher(algorithms.AES(_derive(key, label, 32)), modes.CTR(bytes(16))).encryptor()
    words = np.frombuffer(stream.update(bytes(16 * pairs)), dtype="<u8") >> np.uint64(11)
    u = (words.astype(np.float64) + np.array([[1.0], [0.0]]).repeat(pairs, 1).ravel()) / 2.0**53
    radius, angle = np.sqrt(-2.0 * np.log(u[:pairs])), 2.0 * np.pi * u[pairs:]
    return std * np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]


def subkey(key: bytes, label: str) -> bytes:
    """32 secret bytes for one purpose, which say nothing about `key` or other labels."""
    return _derive(key, label, 32)


def sampler(key: bytes, label: str) -> np.random.Generator:
    """A generator for Poisson sampling, keyed by 128 secret bits (amplification needs the sample to stay secret)."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_derive(key, label, 16), "little")))
