"""Fixed-point coding: exact against integer arithmetic, no wrap at the extremes, refusals."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appa_secure.secagg import BadParameters, Headroom, Layout, OutOfRange, Segment, SumOutOfRange

ranges = st.tuples(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(ranges, st.integers(1, 200), st.sampled_from([32, 64]), st.data())
def test_error_bound_and_headroom_hold_at_any_values(bounds, parties, ring_bits, data) -> None:
    lo, hi = bounds
    layout = Layout((Segment("s", 3, lo, hi, min_bits=0),), ring_bits)
    try:
        coding = layout.preflight(parties)
    except Headroom:
        assert parties * max(abs(lo), abs(hi)) * 2 >= 2 ** (ring_bits - 2)
        return
    value = st.one_of(st.sampled_from([lo, hi]), st.floats(lo, hi))
    used = min(parties, 5)
    vectors = [np.array(data.draw(st.lists(value, min_size=3, max_size=3))) for _ in range(used)]
    got = coding.decode(coding.add([coding.encode(v) for v in vectors]), used)
    for k in range(3):
        exact = sum(Fraction(float(v[k])) for v in vectors)
        assert abs(Fraction(float(got[k])) - exact) <= Fraction(float(coding.error_bound[k]))
    top = coding.encode(np.full(3, hi)).astype(object) * parties  # worst-case sum in unbounded integers
    assert (
        max(int(x) if x < 2 ** (ring_bits - 1) * parties else 0 for x in top) < 2 ** (ring_bits - 1) * parties
    )


def test_worst_case_sum_does_not_wrap() -> None:
    for ring_bits in (32, 64):
        coding = Layout((Segment("s", 2, -1.0, 1.0),), ring_bits).preflight(7)
        for extreme in (-1.0, 1.0):
            total = coding.add([coding.encode(np.full(2, extreme))] * 7)
            np.testing.assert_array_equal(coding.decode(total, 7), np.full(2, 7 * extreme))


def test_preflight_takes_as_many_bits_as_fit() -> None:
    assert Layout((Segment("s", 1, 0, 1),), 32).preflight(8).bits == (27,)  # 8 * 2^28 = 2^31 would wrap
    assert Layout((Segment("s", 1, 0, 1),), 32).preflight(7).bits == (28,)
    assert Layout((Segment("s", 1, 0, 1),), 64).preflight(8).bits == (49,)  # float64's 53 bits


def test_overflow_is_refused_with_the_segments_name() -> None:
    with pytest.raises(Headroom, match=r"segment 'big'.*ring_bits=64"):
        Layout((Segment("ok", 1, 0, 1), Segment("big", 1, 0, 1e6)), 32).preflight(50)
    with pytest.raises(Headroom, match="40 are required"):
        Layout((Segment("s", 1, 0, 1, min_bits=40),), 32).preflight(2)


@pytest.mark.parametrize("bad", [1.0000001, -1e-9, np.nan, np.inf])
def test_out_of_range_is_counted_and_named(bad: float) -> None:
    coding = Layout((Segment("a", 2, 0, 1), Segment("b", 3, 0, 1))).preflight(3)
    with pytest.raises(OutOfRange) as caught:
        coding.encode(np.array([0, 1, bad, 0.5, bad]))
    assert (caught.value.segment, caught.value.count) == ("b", 2)


def test_noise_is_recognised() -> None:
    coding = Layout((Segment("a", 64, 0, 1),)).preflight(3)
    noise = np.frombuffer(np.random.default_rng(0).bytes(8 * 64), "<u8")
    with pytest.raises(SumOutOfRange, match="masks did not cancel"):
        coding.decode(noise, 3)


def test_digest_binds_everything() -> None:
    base = Layout((Segment("a", 2, 0, 1),))
    digests = {
        base.preflight(3).digest,
        base.preflight(4).digest,
        Layout((Segment("a", 2, 0, 1),), 32).preflight(3).digest,
        Layout((Segment("b", 2, 0, 1),)).preflight(3).digest,
        Layout((Segment("a", 3, 0, 1),)).preflight(3).digest,
        Layout((Segment("a", 2, 0, 1.5),)).preflight(3).digest,
        Layout((Segment("a", 2, -1, 1),)).preflight(3).digest,
    }
    assert len(digests) == 7
    assert Layout.from_description(base.describe(), 64) == base


@pytest.mark.parametrize(
    "make",
    [
        lambda: Segment("", 1, 0, 1),
        lambda: Segment("a", 0, 0, 1),
        lambda: Segment("a", 1, 1, 1),
        lambda: Segment("a", 1, 0, float("nan")),
        lambda: Layout((), 64),
        lambda: Layout((Segment("a", 1, 0, 1),), 16),
        lambda: Layout((Segment("a", 1, 0, 1), Segment("a", 1, 0, 1))),
        lambda: Layout((Segment("a", 1, 0, 1),)).preflight(0),
        lambda: Layout((Segment("a", 1, 0, 1),)).preflight(2).encode(np.zeros(2)),
        lambda: Layout((Segment("a", 1, 0, 1),)).preflight(2).decode(np.zeros(1, "<u8"), 3),
    ],
)
def test_bad_parameters(make) -> None:
    with pytest.raises(BadParameters):
        make()
