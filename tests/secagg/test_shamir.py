"""Sharing and combining against a slow Lagrange oracle in Python integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appa_secure.secagg import BadParameters
from appa_secure.secagg.shamir import LIMBS, PRIME, SHARE_BYTES, combine, pack, share, unpack
from tests.secagg.world import seeded


def oracle(points: list[int], values: list[int]) -> int:
    """f(0) by Lagrange, term by term."""
    total = 0
    for i, (x, y) in enumerate(zip(points, values, strict=True)):
        term = y
        for j, other in enumerate(points):
            if i != j:
                term = term * other * pow(other - x, -1, PRIME) % PRIME
        total += term
    return total % PRIME


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.data())
def test_any_threshold_subset_gives_the_secrets(points: int, data: st.DataObject) -> None:
    t = data.draw(st.integers(1, points))
    secrets = data.draw(st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=4))
    dealt = share(np.frombuffer(b"".join(secrets), np.uint8).reshape(-1, 32), t, points, seeded(secrets))
    assert dealt.shape == (points, len(secrets), LIMBS)
    chosen = data.draw(st.permutations(range(1, points + 1)))[:t]
    rows = dealt[[x - 1 for x in chosen]]
    points = np.tile(chosen, (len(secrets), 1))
    assert combine(points, rows.transpose(1, 0, 2)) == secrets
    limbs = [int.from_bytes(secrets[0], "little") >> (30 * k) & (2**30 - 1) for k in range(LIMBS)]
    assert [oracle(chosen, [int(v) for v in rows[:, 0, k]]) for k in range(LIMBS)] == limbs


def test_secrets_with_different_holders_are_combined_at_once() -> None:
    secrets = np.arange(96, dtype=np.uint8).reshape(3, 32)
    dealt = share(secrets, 3, 6, seeded("many"))  # (6, 3, 9)
    points = np.array([[1, 2, 3], [6, 2, 4], [3, 1, 5]])
    shares = np.stack([dealt[row - 1, i] for i, row in enumerate(points)])
    assert combine(points, shares) == [secret.tobytes() for secret in secrets]
    with pytest.raises(BadParameters, match="distinct"):
        combine(np.array([[1, 1, 2]]), shares[:1])


def test_fewer_than_threshold_shares_fit_every_secret() -> None:
    """t - 1 shares and ANY claimed secret lie on one polynomial, so they say nothing about the real one."""
    secret = np.arange(32, dtype=np.uint8)[None]
    dealt = share(secret, 3, 5, seeded("a"))
    found = combine(np.array([[1, 2]]), dealt[:2].transpose(1, 0, 2))
    assert found != [secret.tobytes()]
    # the first limb of two shares is as good as uniform over many sharings
    first = [int(share(secret, 3, 5, seeded(i))[0, 0, 0]) for i in range(400)]
    assert abs(np.mean(first) / PRIME - 0.5) < 0.06


def test_packing_is_strict() -> None:
    dealt = share(np.zeros((2, 32), np.uint8), 2, 3, seeded(0))[0]
    raw = pack(dealt)
    assert len(raw) == 2 * SHARE_BYTES
    np.testing.assert_array_equal(unpack(raw, 2), dealt)
    assert unpack(raw + b"\0", 2) is None
    assert unpack(PRIME.to_bytes(4, "little") + raw[4:], 2) is None


@pytest.mark.parametrize(("t", "n"), [(0, 3), (4, 3)])
def test_bad_thresholds(t: int, n: int) -> None:
    with pytest.raises(BadParameters):
        share(np.zeros((1, 32), np.uint8), t, n, seeded(0))
