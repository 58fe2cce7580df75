"""Malformed messages at every decoder: nothing but the protocol's own errors, and no state changed."""

from __future__ import annotations

import time

import pytest

from tests.adversarial.secagg.fuzz import Target, fuzz, targets


def test_twenty_thousand_malformed_messages() -> None:
    decoders, keys = targets()
    assert len(decoders) > 25
    ended = fuzz(20_000, 1, decoders, keys)
    assert ended["accepted"] < 0.4 * ended.total()  # most of them are really malformed
    # and they get past the outermost checks, to what only well-formed and signed messages reach
    deep = {"BadSignature", "WrongRoster", "WrongEpoch", "PolicyViolation", "OutOfOrder", "LayoutMismatch",
            "ContextMismatch", "CorruptState"}  # fmt: skip
    assert deep <= ended.keys(), deep - ended.keys()


def test_a_decoder_that_crashes_is_found_with_its_message() -> None:
    decoders, keys = targets()
    raw = decoders[0].seeds[0]
    planted = Target("planted", lambda message: message[len(raw) - 1], [raw], (ValueError,))
    with pytest.raises(AssertionError, match="planted raised IndexError"):
        fuzz(200, 1, [planted], keys)


@pytest.mark.bench
@pytest.mark.timeout(3600)
def test_a_million_malformed_messages() -> None:
    decoders, keys = targets()
    began = time.perf_counter()
    ended = fuzz(1_000_000, 2, decoders, keys)
    spent = time.perf_counter() - began
    print(f"\n{ended.total():,} messages at {len(decoders)} decoders in {spent:.0f} s, ", end="")
    print(f"{ended.total() / spent:,.0f} per second: {dict(ended.most_common())}", end="")
    assert ended.total() == 1_000_000
