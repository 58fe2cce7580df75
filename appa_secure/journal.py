"""Files that survive `kill -9`: atomic replacement and append-only journals of checksummed JSON lines.

A file is either the old one or the new one; a journal holds every row whose `append` returned, plus at most
one torn last line, which the next open removes. Damage anywhere else is an error: a privacy ledger that
quietly loses a row would under-count what was spent.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from appa_secure.errors import RunError

_CHECK = "check"  # reserved field of every journal row


# --- JSON ---------------------------------------------------------------------------------------------------


def plain(value: Any, where: str = "value") -> Any:
    """`value` as plain JSON types: tuples become lists, numpy scalars and arrays become numbers and lists.

    Raises RunError naming the field for NaN or infinity, keys that are not strings, and types JSON does not
    have.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RunError(
                f"{where} is {value}: records hold finite numbers only, write null for a missing one"
            )
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RunError(
                    f"{where} has the key {key!r} of type {type(key).__name__}: keys must be strings"
                )
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if hasattr(value, "tolist"):  # numpy, without importing it
        return plain(value.tolist(), where)
    raise RunError(
        f"{where} is a {type(value).__name__}, which a record cannot hold: convert it to JSON types"
    )


def canonical_json(value: Any) -> bytes:
    """ASCII JSON with sorted keys and no white space: equal values, equal bytes. Errors as `plain`."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii")


def digest(value: Any) -> str:
    """SHA-256 (64 hex digits) of `value` as canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


# --- files --------------------------------------------------------------------------------------------------


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` (text as UTF-8) so that any crash leaves the whole old or the whole new
    content.

    Temporary file in the same directory, fsync, rename, fsync of the directory. Raises OSError; the old file
    stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        try:
            _write_all(descriptor, data.encode() if isinstance(data, str) else data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


# --- journals -----------------------------------------------------------------------------------------------


def _encode(row: Mapping[str, Any]) -> bytes:
    if _CHECK in row:
        raise RunError(f"a journal row may not have a field named {_CHECK!r}: the journal writes it")
    return canonical_json({**row, _CHECK: digest(row)[:16]}) + b"\n"


def _decode(line: bytes, name: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
        del row[_CHECK]
        intact = _encode(row) == line + b"\n"
    except (ValueError, KeyError, TypeError, AttributeError, RunError) as error:
        raise RunError(f"{name} line {number} is damaged ({error}): restore the file from a copy") from None
    if not intact:
        raise RunError(f"{name} line {number} does not match its checksum: restore the file from a copy")
    return cast(dict[str, Any], row)


def scan(content: bytes, name: str) -> tuple[list[dict[str, Any]], int]:
    """All rows, and the length of the part that ends with a newline (what follows is a torn last line)."""
    whole = content.rfind(b"\n") + 1
    lines = content[:whole].split(b"\n")[:-1]
    return [_decode(line, name, number) for number, line in enumerate(lines, 1)], whole


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Rows of a journal, read only: a torn last line is left out and left alone, a missing file has no rows.

    Raises RunError naming the line for damage anywhere else.
    """
    return scan(path.read_bytes(), path.name)[0] if path.exists() else []


class Journal:
    """Append-only JSONL file: one canonical-JSON object per line, closed by a checksum field `check`.

    `append` returns after fsync, so a row that was appended is there after any crash. Opening truncates a
    torn last line (one without its newline: its `append` never returned) and raises RunError for any other
    damage. One writer: `RunDir` holds a lock for that.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def _open(self) -> None:
        is_new = not self.path.exists()
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._rows, self._size = scan(self.path.read_bytes(), self.path.name)
            if os.fstat(self._descriptor).st_size > self._size:
                os.ftruncate(self._descriptor, self._size)
                os.fsync(self._descriptor)
            if is_new:
                sync_directory(self.path.parent)
        except BaseException:
            os.close(self._descriptor)
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row and wait until the disk has it. RunError for what is not finite JSON; OSError."""
        line = _encode(row)
        try:
            _write_all(self._descriptor, line)
            os.fsync(self._descriptor)
        except BaseException:  # a full disk or Ctrl-C must not leave half a line before the next row
            os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(line)
        self._rows.append(plain(row))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(list(self._rows))

    def __len__(self) -> int:
        return len(self._rows)

    def close(self) -> None:
        """Give the file back; a closed journal can still be read. Closing twice is allowed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class StepJournal(Journal):
    """A journal of steps, which a resumed run takes back to its checkpoint so that no step occurs twice."""

    def truncate_after(self, step: int, key: str = "step") -> int:
        """Remove the rows whose `key` is greater than `step`, atomically; rows without `key` stay.

        Returns how many rows went.
        """
        kept = [row for row in self._rows if key not in row or row[key] <= step]
        removed = len(self._rows) - len(kept)
        if removed:
            self.close()
            atomic_write(self.path, b"".join(_encode(row) for row in kept))
            self._open()
        return removed
