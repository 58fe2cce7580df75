"""Deterministic CBOR (RFC 8949, section 4.2.1), restricted to what the protocol needs.

Values: unsigned integers below 2^64, byte strings, text strings, arrays, and maps with text keys. Encoding is
cbor2's, which takes the shortest form of everything, with map keys put in order here: its own canonical mode copies long
byte strings several times. Decoding is written here because it is the first code that touches hostile bytes: a
general decoder interprets tags (dates, regular expressions, shared references), indefinite lengths, floats
and duplicate keys, none of which may occur. Every value has exactly one accepted encoding, so
`encode(decode(b)) == b` for all accepted `b`.
"""

from __future__ import annotations

from typing import Any

import cbor2

MAX_DEPTH = 8
_LEAVES = frozenset({int, bytes, str})


class NotCanonical(ValueError):
    """The bytes are not the canonical encoding of one allowed value."""


def encode(value: Any) -> bytes:
    """The canonical encoding of `value`."""
    return cbor2.dumps(_ordered(value))


def _ordered(value: Any) -> Any:
    """Maps with their keys in the order of their encodings."""
    if isinstance(value, dict):
        return {key: _ordered(value[key]) for key in sorted(value, key=cbor2.dumps)}
    if isinstance(value, list) and not _LEAVES.issuperset(map(type, value)):
        return [_ordered(item) for item in value]
    return value


def decode(data: bytes) -> Any:
    """The one value that `data` encodes; raises `NotCanonical` for anything else, trailing bytes included."""
    value, end = _item(data, 0, 0)
    if end != len(data):
        raise NotCanonical(f"{len(data) - end} trailing byte(s)")
    return value


def _item(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    if depth > MAX_DEPTH:
        raise NotCanonical(f"nested deeper than {MAX_DEPTH}")
    major, number, at = _head(data, at)
    if major == 0:
        return number, at
    if major in (2, 3):
        end = at + number
        if end > len(data):
            raise NotCanonical("string runs past the end")
        raw = data[at:end]
        if major == 2:
            return raw, end
        try:
            return raw.decode("utf-8"), end
        except UnicodeDecodeError:
            raise NotCanonical("text is not UTF-8") from None
    # Every item takes a byte at least, so a count beyond what is left is refused before any memory is taken.
    if major in (4, 5) and number > len(data) - at:
        raise NotCanonical("more items announced than bytes present")
    if major == 4:
        items = []
        for _ in range(number):
            item, at = _item(data, at, depth + 1)
            items.append(item)
        return items, at
    if major == 5:
        fields: dict[str, Any] = {}
        previous = b""
        for _ in range(number):
            start = at
            key, at = _item(data, at, depth + 1)
            if not isinstance(key, str):
                raise NotCanonical("map key is not text")
            if data[start:at] <= previous:
                raise NotCanonical("map keys repeated or out of order")
            previous = data[start:at]
            fields[key], at = _item(data, at, depth + 1)
        return fields, at
    raise NotCanonical("negative numbers, tags, floats and simple values are not part of the format")


def _head(data: bytes, at: int) -> tuple[int, int, int]:
    """(major type, argument, next offset); the argument must be in its shortest form."""
    if at >= len(data):
        raise NotCanonical("ends too early")
    major, low = data[at] >> 5, data[at] & 31
    at += 1
    if low < 24:
        return major, low, at
    if low > 27:
        raise NotCanonical("indefinite length or reserved form")
    size = 1 << (low - 24)
    if at + size > len(data):
        raise NotCanonical("ends too early")
    number = int.from_bytes(data[at : at + size], "big")
    if number < (24 if size == 1 else 1 << (4 * size)):
        raise NotCanonical("number not in its shortest form")
    return major, number, at + size
