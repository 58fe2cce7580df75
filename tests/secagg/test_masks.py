"""Keystreams against a slow oracle; key separation."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from appa_secure.secagg import masks
from appa_secure.secagg.masks import CHUNK_BYTES, apply_masks, mask_key, ring_dtype


@pytest.mark.parametrize("mode", masks._MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("ring_bits", [32, 64])
@pytest.mark.parametrize("size", [0, 1, 3, 5 * CHUNK_BYTES // 8 // 4 + 7])
def test_masks_add_whole_keystreams_modulo_the_ring(
    ring_bits: int, size: int, mode: modes.Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever routine is the faster one, the keystream is that of AES in counter mode from block 2, block by block."""
    monkeypatch.setattr(masks, "fastest_mode", lambda: mode)
    rng = np.random.default_rng(1)
    start = rng.integers(0, 2**ring_bits, size, dtype=np.uint64).astype(ring_dtype(ring_bits))
    add, subtract = [b"a" * 32, b"b" * 32], [b"c" * 32]
    expected = start.copy()
    for key, sign in ((add[0], 1), (add[1], 1), (subtract[0], -1)):
        blocks = b"".join((2 + i).to_bytes(16, "big") for i in range(-(-start.nbytes // 16)))
        stream = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(blocks)[: start.nbytes]
        words = np.frombuffer(stream, start.dtype)
        expected = expected + words if sign > 0 else expected - words
    got = start.copy()
    apply_masks(got, add, subtract)
    np.testing.assert_array_equal(got, expected)
    apply_masks(got, subtract, add)
    np.testing.assert_array_equal(got, start)


def test_keys_differ_in_round_coding_and_context() -> None:
    seed, a, b = b"s" * 32, bytes(32), b"\1" * 32
    keys = {
        mask_key(seed, 1, a, a),
        mask_key(seed, 2, a, a),
        mask_key(seed, 1, b, a),
        mask_key(seed, 1, a, b),
    }
    assert len(keys) == 4


def test_the_faster_of_both_routines_is_taken() -> None:
    assert masks.fastest_mode() in masks._MODES
    assert masks.fastest_mode() is masks.fastest_mode()  # found once
