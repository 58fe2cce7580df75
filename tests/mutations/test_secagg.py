"""The table of mutations fits the code, and the script tells caught from survived. The whole table takes minutes:
`python -m tests.mutations.secagg`."""

import shutil
from pathlib import Path

import pytest

from tests.mutations.secagg import (
    PACKAGE,
    PENDING,
    PROPERTIES,
    REPO,
    ROWS,
    Row,
    Stale,
    apply,
    copied_tree,
    row,
    try_row,
)
from tests.test_docs import missing

NODE = "secagg/test_masks.py::test_keys_differ_in_round_coding_and_context"


@pytest.mark.parametrize("entry", ROWS, ids=lambda entry: entry.name)
def test_every_row_fits_the_code(entry: Row, tmp_path: Path) -> None:
    shutil.copytree(REPO / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    before = apply(entry, tmp_path)
    assert 1 <= len(before) <= len(entry.edits)
    assert all(path.read_text("utf-8") != text for path, text in before.items())
    assert missing(entry.test.split("[")[0]) is None


def test_every_property_has_a_row() -> None:
    assert {entry.property for entry in ROWS} | PENDING.keys() == PROPERTIES.keys()


def test_a_row_that_no_longer_fits_is_named() -> None:
    stale = row(2, "something renamed", NODE, ("no such text", ""))
    with (
        copied_tree() as tree,
        pytest.raises(Stale, match=r"property 2, something renamed: text occurs 0 times"),
    ):
        apply(stale, tree)


def test_caught_and_survived() -> None:
    harmless = row(2, "a comment", NODE, ("    return expand(seed, ", "    # kept\n    return expand(seed, "))
    harmful = next(entry for entry in ROWS if entry.test == f"tests/{NODE}")
    with copied_tree() as tree:
        assert try_row(harmless, tree) == ("survived", ("masks.py",))
        assert try_row(harmful, tree) == ("caught", ("masks.py",))
        assert try_row(harmless, tree) == ("survived", ("masks.py",))  # the edit was taken back
