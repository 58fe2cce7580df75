"""Sharing and combining against a slow Lagrange oracle in Python integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appa_secure.secagg import BadParameters
from appa_secure.secagg.shamir import LIMBS, PRIME, SHARE_BYTES, combine, consistent, pack, share, unpack
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


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_shares_that_are_on_one_polynomial_are_consistent_and_others_are_not(data: st.DataObject) -> None:
    """Against interpolation in Python integers: through the first t of a secret's shares, at each of the others."""
    width = data.draw(st.integers(2, 9), label="width")
    t = data.draw(st.integers(1, width), label="t")
    secrets = np.frombuffer(seeded(width)(32 * 3), np.uint8).reshape(3, 32)
    shares = share(secrets, t, width, seeded("deal")).transpose(1, 0, 2).copy()  # (S, H, 9)
    present = np.array([[data.draw(st.booleans()) for _ in range(width)] for _ in range(3)])
    for _ in range(data.draw(st.integers(0, 3), label="wrong")):
        row, column, limb = (data.draw(st.integers(0, high - 1)) for high in (3, width, LIMBS))
        shares[row, column, limb] = (
            int(shares[row, column, limb]) + data.draw(st.integers(1, PRIME - 1))
        ) % PRIME
    expected = []
    for row in range(3):
        xs = [i + 1 for i in range(width) if present[row, i]]
        values = [[int(v) for v in shares[row, x - 1]] for x in xs]
        fits = all(
            oracle([a - x for a in xs[:t]], [v[limb] for v in values[:t]]) == y[limb]
            for x, y in zip(xs[t:], values[t:], strict=True)
            for limb in range(LIMBS)
        )
        expected.append(fits)
    assert consistent(present, shares, t, seeded(data.draw(st.integers(0, 9)))).tolist() == expected
    shares[~present] = 12345  # what is missing may hold anything
    assert consistent(present, shares, t, seeded("again")).tolist() == expected


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
