"""Crash safety of files and journals."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appa_secure.errors import RunError
from appa_secure.journal import Journal, StepJournal, atomic_write, canonical_json, plain, read_journal

same_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
rows_of_json = st.lists(
    st.dictionaries(st.text().filter(lambda key: key != "check"), json_values, max_size=3), max_size=4
)


def fill(path: Path, rows: list[dict[str, Any]]) -> None:
    path.unlink(missing_ok=True)
    journal = Journal(path)
    for row in rows:
        journal.append(row)
    journal.close()


# --- JSON and files -----------------------------------------------------------------------------------------


@given(value=json_values)
def test_canonical_json_is_ascii_of_one_line_and_round_trips(value: Any) -> None:
    data = canonical_json(value)
    assert data.isascii()
    assert b"\n" not in data
    assert canonical_json(json.loads(data)) == data


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert (
        canonical_json({"b": 1, "a": [1, 2.5]})
        == canonical_json({"a": (1, 2.5), "b": 1})
        == b'{"a":[1,2.5],"b":1}'
    )


def test_numpy_becomes_plain_numbers() -> None:
    assert plain({"x": np.float32(0.5), "n": np.int64(3), "v": np.arange(2), "b": np.bool_(True)}) == {
        "x": 0.5, "n": 3, "v": [0, 1], "b": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": [1.0, float("nan")]}}, r"value\.a\.b\[1\] is nan"),
        ({"a": float("inf")}, r"value\.a is inf"),
        ({"a": np.float32("nan")}, r"value\.a is nan"),
        ({1: 2}, "keys must be strings"),
        ({"a": object()}, r"value\.a is a object"),
    ],
)
def test_values_that_a_record_cannot_hold_are_named(value: Any, message: str) -> None:
    with pytest.raises(RunError, match=message):
        canonical_json(value)


def test_atomic_write_keeps_the_old_file_when_the_new_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "summary.json"
    atomic_write(target, "old")

    def broken(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(target, b"new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


# --- journal ------------------------------------------------------------------------------------------------


@same_folder
@given(rows=rows_of_json)
def test_a_journal_gives_back_what_was_appended(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "j.jsonl"
    fill(path, rows)
    assert read_journal(path) == list(Journal(path)) == rows


def test_killed_at_every_byte_a_journal_keeps_every_whole_row_and_takes_more(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": 0, "who": "Zoë\n"}, {"step": 1}, {"step": 2, "x": [0.1, None]}]
    path = tmp_path / "j.jsonl"
    fill(path, rows)
    content = path.read_bytes()
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = content[:cut].count(b"\n")
        assert read_journal(path) == rows[:whole]
        assert path.stat().st_size == cut, "reading must not change the file"
        journal = Journal(path)
        assert list(journal) == rows[:whole]
        journal.append({"again": cut})
        journal.close()
        assert list(Journal(path)) == [*rows[:whole], {"again": cut}]


def test_every_changed_byte_is_found_and_its_line_named(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    fill(path, [{"a": 1}, {"b": 2}, {"c": 3}])
    content = path.read_bytes()
    for position in range(len(content) - 1):  # the last newline is the torn-line case above
        damaged = bytearray(content)
        damaged[position] ^= 0x01
        path.write_bytes(damaged)
        first_line = content[:position].count(b"\n") + 1
        with pytest.raises(RunError, match=rf"j\.jsonl line {first_line} "):
            Journal(path)
        assert path.read_bytes() == damaged, "a damaged journal must not be touched"


def test_a_failed_append_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    journal.append({"a": 1})
    with monkeypatch.context() as patch:

        def full(descriptor: int) -> None:
            raise OSError("no space left")

        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space left"):
            journal.append({"b": 2})
    journal.append({"c": 3})
    assert list(Journal(tmp_path / "j.jsonl")) == list(journal) == [{"a": 1}, {"c": 3}]


def test_a_row_with_nan_or_the_reserved_field_is_refused_and_not_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    for row, message in (({"loss": float("nan")}, "loss is nan"), ({"check": 1}, "'check'")):
        with pytest.raises(RunError, match=message):
            journal.append(row)
    assert len(journal) == 0
    assert journal.path.read_bytes() == b""


def test_kill_9_loses_no_row_whose_append_returned(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    program = (
        "import sys, pathlib; from appa_secure.records import Journal\n"
        "j = Journal(pathlib.Path(sys.argv[1]))\n"
        "for k in range(10**6): j.append({'k': k, 'pad': 'x' * 500}); print(k, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        seen = [int(process.stdout.readline()) for _ in range(20)]
        process.kill()
        seen += [int(line) for line in process.stdout]
    kept = [row["k"] for row in Journal(path)]
    assert kept == list(range(len(kept)))
    assert len(kept) >= len(seen)


@same_folder
@given(last=st.integers(0, 6), step=st.integers(-1, 7))
def test_truncate_after_takes_steps_back_and_keeps_the_rest(tmp_path: Path, last: int, step: int) -> None:
    path = tmp_path / "m.jsonl"
    rows: list[dict[str, Any]] = [{"stage": "predictor", "round": 9}, *({"step": k} for k in range(last))]
    fill(path, rows)
    journal = StepJournal(path)
    assert journal.truncate_after(step) == sum(k > step for k in range(last))
    journal.append({"step": step + 1})
    expected = [rows[0], *({"step": k} for k in range(last) if k <= step), {"step": step + 1}]
    assert list(journal) == list(Journal(path)) == expected
