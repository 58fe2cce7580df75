"""Fixed-point coding of real vectors in Z_2^32 or Z_2^64, with the proof that sums cannot wrap.

A `Layout` names the segments of a payload and the range of each. `layout.preflight(n)` chooses, per segment,
the largest number f of fractional bits for which the sum of n parties stays inside the ring AND inside
float64's 53 bits:

    n * ceil(max(|lo|, |hi|) * 2^f) < 2^min(ring_bits - 1, 53)

so decoding is exact and the only error is rounding on encoding: at most 2^-(f+1) per party, n * 2^-(f+1) per
sum. A value outside its range is an error, never clipped: clipping would bias the sum in silence. Clear mode
uses the same coding, which is what makes blind and clear runs equal bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BadParameters, Headroom, OutOfRange, SumOutOfRange
from .keys import digest
from .masks import RingVector, ring_dtype

FLOAT_BITS = 53
MAX_FRACTION_BITS = 64
MAX_ENTRIES = 2**26
CHUNK_ENTRIES = 2**15  # stays in the second-level cache


@dataclass(frozen=True)
class Segment:
    """`size` values, each in [lo, hi]; a coding with fewer than `min_bits` fractional bits is refused."""

    name: str
    size: int
    lo: float
    hi: float
    min_bits: int = 8

    def __post_init__(self) -> None:
        if not self.name or self.size < 1:
            raise BadParameters(f"segment '{self.name}': needs a name and size >= 1, got {self.size}")
        if not (math.isfinite(self.lo) and math.isfinite(self.hi) and self.lo < self.hi):
            raise BadParameters(
                f"segment '{self.name}': range [{self.lo}, {self.hi}] must be finite with lo < hi"
            )
        if not 0 <= self.min_bits <= MAX_FRACTION_BITS:
            raise BadParameters(
                f"segment '{self.name}': min_bits {self.min_bits} not in 0..{MAX_FRACTION_BITS}"
            )

    @property
    def magnitude(self) -> float:
        return max(abs(self.lo), abs(self.hi))


@dataclass(frozen=True)
class Layout:
    """What one masked vector consists of: segments in order, and the ring they are summed in (32 or 64
    bits).
    """

    segments: tuple[Segment, ...]
    ring_bits: int = 64

    def __post_init__(self) -> None:
        if self.ring_bits not in (32, 64):
            raise BadParameters(f"ring_bits {self.ring_bits}: use 32 or 64")
        names = [segment.name for segment in self.segments]
        if not names or len(set(names)) != len(names):
            raise BadParameters("layout: needs at least one segment and distinct names")
        if self.size > MAX_ENTRIES:
            raise BadParameters(f"layout: {self.size} entries, at most {MAX_ENTRIES}")

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self.segments)

    def describe(self) -> list[list[str | int]]:
        """Segments as plain values; floats as exact hexadecimal text."""
        return [[s.name, s.size, float(s.lo).hex(), float(s.hi).hex(), s.min_bits] for s in self.segments]

    @classmethod
    def from_description(cls, segments: list[list[Any]], ring_bits: int) -> Layout:
        return cls(
            tuple(
                Segment(n, size, float.fromhex(lo), float.fromhex(hi), bits)
                for n, size, lo, hi, bits in segments
            ),
            ring_bits,
        )

    def preflight(self, parties: int) -> Coding:
        """The coding for sums of up to `parties` vectors; raises `Headroom` when a segment has too few bits
        left.
        """
        return _preflight(self, parties)


@lru_cache(maxsize=64)
def _preflight(layout: Layout, parties: int) -> Coding:
    if parties < 1:
        raise BadParameters(f"preflight for {parties} parties: needs at least 1")
    bits = []
    for segment in layout.segments:
        fraction = _fraction_bits(segment, layout.ring_bits, parties)
        if fraction < segment.min_bits:
            raise Headroom(
                f"segment '{segment.name}': the sum of {parties} parties with values in "
                f"[{segment.lo}, {segment.hi}] leaves {fraction} fractional bits "
                f"in a {layout.ring_bits}-bit ring, "
                f"{segment.min_bits} are required; "
                "use ring_bits=64, a narrower range or fewer parties"
            )
        bits.append(fraction)
    return Coding(layout, parties, tuple(bits))


def _fraction_bits(segment: Segment, ring_bits: int, parties: int) -> int:
    limit = 2 ** min(ring_bits - 1, FLOAT_BITS)
    magnitude = Fraction(segment.magnitude)
    bits = MAX_FRACTION_BITS
    while bits >= 0 and parties * math.ceil(magnitude * 2**bits) >= limit:
        bits -= 1
    return bits


@dataclass(frozen=True)
class Coding:
    """A layout with its fractional bits fixed for `parties`. Made by `Layout.preflight` only."""

    layout: Layout
    parties: int
    bits: tuple[int, ...]

    @cached_property
    def digest(self) -> bytes:
        """Binds segments, ranges, ring, party count and fractional bits; part of every mask derivation."""
        fields: list[str | int] = [self.layout.ring_bits, self.parties]
        for description, bits in zip(self.layout.describe(), self.bits, strict=True):
            fields += (*description, bits)
        return digest("coding", *fields)

    @cached_property
    def error_bound(self) -> NDArray[np.float64]:
        """(L,) largest possible difference between a decoded sum of `parties` vectors and the exact sum."""
        return self._spread([self.parties * 2.0 ** -(bits + 1) for bits in self.bits])

    def encode(self, vector: NDArray[np.float64]) -> RingVector:
        """(L,) ring elements, value * 2^f rounded half to even. Raises `OutOfRange` naming the first bad
        segment.
        """
        values = np.asarray(vector, dtype=np.float64)
        if values.shape != (self.layout.size,):
            raise BadParameters(f"vector has shape {values.shape}, the layout needs ({self.layout.size},)")
        ring = np.empty(self.layout.size, dtype=ring_dtype(self.layout.ring_bits))
        signed = ring.view(_signed(self.layout.ring_bits))
        for segment, bits, start, stop in self._chunks():
            part = values[start:stop]
            if not (part.min() >= segment.lo and part.max() <= segment.hi):  # false for NaN
                self._blame(values)
            # Every rounded value is below 2^(ring_bits - 1) in size: the conversion is exact.
            signed[start:stop] = np.rint(part * 2.0**bits)
        return ring

    def encode_clear(self, vector: NDArray[np.float64]) -> RingVector:
        """What a client of clear mode sends: the same ring elements without masks."""
        return self.encode(vector)

    def add(self, vectors: list[RingVector]) -> RingVector:
        """Sum in the ring; the zero vector for no vectors."""
        total = np.zeros(self.layout.size, dtype=ring_dtype(self.layout.ring_bits))
        for vector in vectors:
            np.add(total, vector, out=total)
        return total

    def decode(self, total: RingVector, contributors: int) -> NDArray[np.float64]:
        """(L,) real sum of `contributors` <= parties encoded vectors.

        Raises `SumOutOfRange` when an entry lies outside what so many in-range values can sum to, which is
        what is left when masks do not cancel.
        """
        if not 0 <= contributors <= self.parties:
            raise BadParameters(f"sum of {contributors} contributors, coding made for {self.parties}")
        signed = total.view(_signed(self.layout.ring_bits))
        decoded = np.empty(total.size, dtype=np.float64)
        bad = 0
        for segment, bits, start, stop in self._chunks():
            lowest, highest = np.rint(segment.lo * 2.0**bits), np.rint(segment.hi * 2.0**bits)
            part = signed[start:stop].astype(np.float64)
            bad += int(((part < contributors * lowest) | (part > contributors * highest)).sum())
            np.divide(part, 2.0**bits, out=decoded[start:stop])
        if bad:
            raise SumOutOfRange(
                f"{bad} of {total.size} entries lie outside the range of a sum of {contributors} "
                "vectors: masks did not cancel, or a party encoded with another layout"
            )
        return decoded

    def _chunks(self) -> Iterator[tuple[Segment, int, int, int]]:
        """(segment, its fractional bits, start, stop): the layout in pieces, so that no temporary is as long as
        the vector."""
        start = 0
        for segment, bits in zip(self.layout.segments, self.bits, strict=True):
            stop = start + segment.size
            for begin in range(start, stop, CHUNK_ENTRIES):
                yield segment, bits, begin, min(begin + CHUNK_ENTRIES, stop)
            start = stop

    def _blame(self, values: NDArray[np.float64]) -> None:
        start = 0
        for segment in self.layout.segments:
            part = values[start : start + segment.size]
            count = int((~((part >= segment.lo) & (part <= segment.hi))).sum())
            if count:
                raise OutOfRange(segment.name, count, segment.lo, segment.hi)
            start += segment.size

    def _spread(self, per_segment: list[float]) -> NDArray[np.float64]:
        return np.repeat(np.array(per_segment, dtype=np.float64), [s.size for s in self.layout.segments])


def _signed(ring_bits: int) -> np.dtype[Any]:
    return np.dtype(f"<i{ring_bits // 8}")
