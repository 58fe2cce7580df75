"""Fixed-point coding of real vectors in Z_2^32 or Z_2^64, with the proof that sums cannot wrap.

A `Layout` names the segments of a payload and the range of each. `layout.preflight(n)` chooses, per segment,
the largest number f of fractional bits for which the sum of n parties stays inside the ring AND inside
float64's 53 bits:

    n * ceil(max(|lo|, |hi|) * 2^f) < 2^min(ring_bits - 1, 53)

so decoding is exact and the only error is rounding on encoding: at most 2^-(f+1) per party, n * 2^-(f+1) per
sum. A value outside its range is an error, never clipped: clipping would bias the sum in silence. Clear mode
uses the same coding, which is what makes blind and clear runs equal bit by bit.

A layout with `OutputNoise` is coded otherwise. Every client adds discrete Gaussian noise of one variance to all its ring
elements, so the segments are scaled to about the same integer width, and no finer than is of use: until the rounding of
all n parties is at most an eighth of the noise's standard deviation. The preflight counts the noise at its largest:

    n * (ceil(max(|lo|, |hi|) * 2^f) + noise bound) < 2^min(ring_bits - 1, 53)
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

from . import noise
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
class OutputNoise:
    """Noise that clients add so that a sum protects a whole vector: the noise of `honest` clients together has at least
    `multiplier` times the L2 distance of two vectors of the layout as its standard deviation."""

    multiplier: float
    honest: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.multiplier) and self.multiplier > 0):
            raise BadParameters(f"noise multiplier {self.multiplier}: must be a positive number")
        if self.honest < 1:
            raise BadParameters(f"noise of {self.honest} honest clients: needs at least 1")


@dataclass(frozen=True)
class Layout:
    """What one masked vector consists of: segments in order, the ring they are summed in (32 or 64 bits), and the
    noise that clients add, if any.
    """

    segments: tuple[Segment, ...]
    ring_bits: int = 64
    noise: OutputNoise | None = None

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

    def describe_noise(self) -> list[str | int]:
        """Multiplier and number of honest clients of the noise as plain values; nothing without noise."""
        return [float(self.noise.multiplier).hex(), self.noise.honest] if self.noise else []

    @classmethod
    def from_description(
        cls, segments: list[list[Any]], ring_bits: int, noise: list[Any] | None = None
    ) -> Layout:
        return cls(
            tuple(
                Segment(n, size, float.fromhex(lo), float.fromhex(hi), bits)
                for n, size, lo, hi, bits in segments
            ),
            ring_bits,
            OutputNoise(float.fromhex(noise[0]), noise[1]) if noise else None,
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
    if layout.noise is not None:
        return _noisy_preflight(layout, layout.noise, parties)
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


def _noisy_preflight(layout: Layout, target: OutputNoise, parties: int) -> Coding:
    multiplier = Fraction(target.multiplier) ** 2
    for fine in range(1, MAX_FRACTION_BITS):
        # A segment of width 2 is coded one bit coarser than one of width 1, and has as much noise for its width.
        bits = tuple(max(0, fine - round(math.log2(s.hi - s.lo))) for s in layout.segments)
        total = multiplier * _distance_squared(layout, bits)  # of the honest clients' noise, in integers
        if total >= max(16 * parties**2, noise.MIN_VARIANCE * target.honest):
            break
    variance = math.ceil(total / target.honest) + 1  # 1 more for what the sum lacks to a discrete Gaussian
    if variance > noise.MAX_VARIANCE:
        raise Headroom(
            f"output noise: {target.honest} honest clients must each add noise of variance {variance}, at most "
            f"{noise.MAX_VARIANCE} is possible; use a larger epsilon, fewer releases or more clients"
        )
    reach, limit = noise.bound(variance), 2 ** min(layout.ring_bits - 1, FLOAT_BITS)
    for segment, f in zip(layout.segments, bits, strict=True):
        if parties * (math.ceil(Fraction(segment.magnitude) * 2**f) + reach) >= limit:
            raise Headroom(
                f"segment '{segment.name}': the sum of {parties} parties with noise of up to {reach} each can wrap in "
                f"a {layout.ring_bits}-bit ring; use ring_bits=64, a larger epsilon or fewer parties"
            )
    return Coding(layout, parties, bits, variance)


def _distance_squared(layout: Layout, bits: tuple[int, ...]) -> int:
    """Squared L2 distance that two encoded vectors can have at most, in integers."""
    widths = [
        (s.size, int(np.rint(s.hi * 2.0**f)) - int(np.rint(s.lo * 2.0**f)))
        for s, f in zip(layout.segments, bits, strict=True)
    ]
    return sum(size * width**2 for size, width in widths)


@dataclass(frozen=True)
class Coding:
    """A layout with its fractional bits fixed for `parties`, and the variance parameter of each client's noise in
    integers (0: none). Made by `Layout.preflight` only."""

    layout: Layout
    parties: int
    bits: tuple[int, ...]
    variance: int = 0

    @cached_property
    def digest(self) -> bytes:
        """Binds segments, ranges, ring, party count and fractional bits; part of every mask derivation."""
        fields: list[str | int] = [self.layout.ring_bits, self.parties]
        for description, bits in zip(self.layout.describe(), self.bits, strict=True):
            fields += (*description, bits)
        if self.variance:
            fields += ("output noise", *self.layout.describe_noise(), self.variance)
        return digest("coding", *fields)

    @property
    def distance_squared(self) -> int:
        """Squared L2 sensitivity in integers: how far apart two encoded vectors can be, whatever one client sends."""
        return _distance_squared(self.layout, self.bits)

    @property
    def noise_bound(self) -> int:
        """The largest noise one client adds to an entry, in integers."""
        return noise.bound(self.variance) if self.variance else 0

    def noise_std(self, contributors: int) -> NDArray[np.float64]:
        """(L,) standard deviation of the noise in a decoded sum of `contributors` vectors; 0 without noise."""
        std = math.sqrt(contributors * self.variance)
        return self._spread([std * 2.0**-bits for bits in self.bits])

    @cached_property
    def error_bound(self) -> NDArray[np.float64]:
        """(L,) largest possible difference between a decoded sum of `parties` vectors and the exact sum."""
        return self._spread([self.parties * (0.5 + self.noise_bound) * 2.0**-bits for bits in self.bits])

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

    def add_noise(self, ring: RingVector, key: bytes) -> None:
        """In place: the noise of one client, from the keystream of `key` (32 bytes, for this vector alone)."""
        randomness = noise.stream(key, noise.SAMPLE_BYTES * ring.size)
        drawn = noise.sample(self.variance, ring.size, randomness)
        np.add(ring, drawn.astype(_signed(self.layout.ring_bits)).view(ring.dtype), out=ring)

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
        bad, reach = 0, self.noise_bound
        for segment, bits, start, stop in self._chunks():
            lowest = np.rint(segment.lo * 2.0**bits) - reach
            highest = np.rint(segment.hi * 2.0**bits) + reach
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
