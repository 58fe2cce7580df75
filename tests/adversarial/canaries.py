"""A search for private numbers in bytes, in every encoding a leak could take, with next to no false alarms.

What it knows of a number: float64, int64 and fixed-point ring values in either byte order, short ones next to
another; neighbouring pairs of an array as float32 or int32; CBOR integers; decimal text; all of these again inside
hexadecimal or base64 text. Single 4-byte values and short decimals are left out: they occur by chance in megabytes
of masks.
"""

from __future__ import annotations

import base64
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np

_NUMBER = re.compile(rb"[0-9][0-9.]{5,}(?:[eE][-+]?[0-9]{1,3})?")
_HEX = re.compile(rb"[0-9a-fA-F]{16,}")
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{22,}")
_MIXER, _BITS = np.uint64(0x9E3779B97F4A7C15), 22
_SHIFT = np.uint64(64 - _BITS)
_SEPARATOR = b" \n "
_DIGITS = 10  # significant digits at which one number alone counts as found
_DECIMALS = 6  # decimals at which three neighbours count as found


def _is_plain(value: float) -> bool:
    """Too common to be anybody's secret: 0, 1, 0.25, ..."""
    return float(np.float64(value)) == float(np.float32(value)) or abs(value) < 1e-12


def _decoded(blob: bytes) -> Iterator[bytes]:
    """What hexadecimal and base64 text in `blob` says, at every alignment."""
    for text in set(_HEX.findall(blob)):
        for at in (0, 1):
            part = text[at:]
            yield bytes.fromhex(part[: len(part) // 2 * 2].decode())
    for text in set(_BASE64.findall(blob)):
        plain = text.translate(bytes.maketrans(b"-_", b"+/"))
        for at in range(4):
            part = plain[at:-1] if (len(plain) - at) % 4 == 1 else plain[at:]
            yield base64.b64decode(part + b"=" * (-len(part) % 4))


class Canaries:
    """Private numbers by name. Values shared by two owners are public and drop out."""

    def __init__(self) -> None:
        self._owners: dict[int, dict[str, str]] = defaultdict(dict)  # 8 bytes as uint64 -> {owner: name}
        self._words: dict[bytes, str] = {}  # byte strings of any length
        self._digits: dict[str, dict[str, str]] = defaultdict(dict)  # leading digits -> {owner: name}
        self._triples: dict[tuple[int, ...], str] = {}
        self._common: set[int] = set()  # words that count only next to another of the same name

    @property
    def names(self) -> set[str]:
        """What is searched for."""
        ownable = (o for table in (self._owners, self._digits) for o in table.values() if len(o) == 1)
        return {name for owners in ownable for name in owners.values()} | set(self._words.values())

    def numbers(self, name: str, owner: str, values: Iterable[float]) -> None:
        """Real numbers, in the order in which a leak would write them."""
        array = np.asarray(list(values), dtype=np.float64)
        for value in array:
            if not _is_plain(value):
                self._eight(name, owner, np.float64(value))
                for text in (f"{abs(value):.{_DIGITS - 1}e}", f"{abs(value):.16e}"):
                    self._digits[text.replace(".", "")[:_DIGITS]][owner] = name
        for pair in pairwise(array):
            if not any(abs(x) < 1e-12 or np.float32(x).view(np.uint32) & 0xFFF == 0 for x in pair):
                self._eight(name, owner, np.array(pair, dtype=np.float32))
        for i in range(len(array) - 2):
            part = array[i : i + 3]
            if (np.abs(part) > 1e-3).all() and (np.abs(part) < 1).all():
                self._triples[tuple(np.rint(np.abs(part) * 10**_DECIMALS).astype(int).tolist())] = name

    def integers(self, name: str, owner: str, values: Iterable[int]) -> None:
        """Whole numbers of at least nine digits that fit 32 bits."""
        array = np.asarray(list(values), dtype=np.int64)
        assert (array >= 10**8).all()
        assert (array < 2**31).all()
        for value in array.tolist():
            self._eight(name, owner, np.int64(value))
            self._eight(name, owner, np.float64(value))
            self._digits[str(value)][owner] = name
            self._digits[f"{value:.5e}".replace(".", "").replace("e+", "E")][owner] = name
            self._words[b"\x1a" + value.to_bytes(4, "big")] = name
        for pair in pairwise(array):
            self._eight(name, owner, np.array(pair, dtype=np.int32))
            self._eight(name, owner, np.array(pair, dtype=np.float32))

    def ring(self, name: str, owner: str, values: np.ndarray) -> None:
        """Fixed-point codes, uint64."""
        assert values.dtype.itemsize == 8
        for value in values:
            signed = abs(int(np.int64(value)))
            bits = signed // (signed & -signed) if signed else 0
            # Small or round codes are not distinctive. A float32's has 24 bits and zeros, and so have words of float64
            # arrays made of float32s, in the other byte order, and words that straddle two entries of a random
            # generator's state: of thousands of such codes one meets one of those by chance, two neighbours do not.
            if signed > 2**24 and bits > 2**20:
                self._eight(name, owner, value)
                if bits <= 2**40:
                    self._common.update(self._encoded(value))

    def secret(self, name: str, value: bytes) -> None:
        """A key."""
        self._words[value] = name

    def _eight(self, name: str, owner: str, value: np.ndarray | np.generic) -> None:
        for word in self._encoded(value):
            self._owners[word][owner] = name

    @staticmethod
    def _encoded(value: np.ndarray | np.generic) -> list[int]:
        raw = np.atleast_1d(value)
        encodings = (raw.tobytes(), raw.byteswap().tobytes(), raw[::-1].byteswap().tobytes())
        return [int.from_bytes(encoded, "little") for encoded in encodings]

    def scan(self, blob: bytes) -> set[str]:
        """Names of the canaries that occur in `blob`."""
        unique = {key: next(iter(o.values())) for key, o in self._owners.items() if len(o) == 1}
        known = np.fromiter(unique, dtype=np.uint64, count=len(unique))
        likely = np.zeros(2**_BITS, dtype=bool)  # a hash table with room: almost all chance hits end here
        likely[(known * _MIXER) >> _SHIFT] = True
        found: set[str] = set()
        for part in (blob, _SEPARATOR.join(_decoded(blob))):
            found |= {name for word, name in self._words.items() if word in part} | self._scan_text(part)
            for offset in range(min(8, max(len(part) - 7, 0))):
                here = np.frombuffer(part, dtype="<u8", offset=offset, count=(len(part) - offset) // 8)
                at = np.flatnonzero(likely[(here * _MIXER) >> _SHIFT])
                hits = {
                    i: value
                    for i, value in zip(at.tolist(), here[at].tolist(), strict=True)
                    if value in unique
                }
                found |= {
                    unique[value]
                    for i, value in hits.items()
                    if value not in self._common
                    or unique[value] in (unique.get(hits.get(i + 1)), unique.get(hits.get(i - 1)))
                }
        return found

    def _scan_text(self, blob: bytes) -> set[str]:
        found: set[str] = set()
        row: list[int] = []  # the numbers before this one, in units of the last of _DECIMALS
        for match in _NUMBER.finditer(blob):
            mantissa, _, exponent = match[0].decode().lower().partition("e")
            if mantissa.count(".") > 1:
                row = []
                continue
            digits = mantissa.replace(".", "").lstrip("0")
            keys = [digits] if "." not in mantissa else [digits[:_DIGITS]]
            if exponent:
                keys.append(f"{digits[:6]}E{int(exponent):02d}")
            for key in keys:
                owners = self._digits.get(key, {})
                if len(owners) == 1:
                    found |= set(owners.values())
            fraction = mantissa.partition(".")[2]
            value = float(mantissa) if len(fraction) >= _DECIMALS and not exponent else -1.0
            row = [*row[-2:], round(value * 10**_DECIMALS)] if 0 <= value < 1 else []
            if len(row) == 3 and tuple(row) in self._triples:
                found.add(self._triples[tuple(row)])
        return found
