"""The documents are held to the code: claims name real tests, message tables and diagrams are complete."""

import ast
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

import pytest

from appa_secure.messages import REPLIES, REQUESTS
from appa_secure.secagg.states import CLIENT_TABLE, COORDINATOR_TABLE
from appa_secure.secagg.wire import BODIES

REPO = Path(__file__).resolve().parent.parent
CLAIMS = REPO / "threat_model" / "README.md"
SYSTEM = REPO / "threat_model" / "system.md"
SPECIFICATION = REPO / "threat_model" / "secure_aggregation.md"
SKIPPED = {"runs", "client_state", "build", "dist", "node_modules"}
MARKDOWN = sorted(
    path
    for path in REPO.rglob("*.md")
    if not any(part in SKIPPED or part.startswith(".") for part in path.relative_to(REPO).parts)
)
HEADS = ("claim", "adversary", "mechanism", "file", "test", "residual risk")


def tables(path: Path) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Every table of a Markdown file: its heads and its rows, cells stripped."""
    found: list[tuple[tuple[str, ...], list[tuple[str, ...]]]] = []
    open_table = False
    for line in without_code(path.read_text("utf-8")).splitlines():
        if not line.startswith("|"):
            open_table = False
            continue
        cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
        if not open_table:
            found.append((cells, []))
            open_table = True
        elif not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
            assert len(cells) == len(found[-1][0]), f"{path.name}: a row has {len(cells)} cells: {line}"
            found[-1][1].append(cells)
    return found


def table(path: Path, *heads: str) -> list[tuple[str, ...]]:
    """The rows of the one table whose first heads are `heads`."""
    (rows,) = (rows for found, rows in tables(path) if found[: len(heads)] == heads)
    return rows


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def functions(path: Path) -> set[str]:
    return {
        node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)
    }


def missing(reference: str) -> str | None:
    """Why `path` or `path::function` does not exist, None if it does."""
    name, _, function = reference.partition("::")
    path = REPO / name
    if not path.is_file():
        return f"no file {name}"
    if function and function not in functions(path):
        return f"no function {function} in {name}"
    return None


def test_every_claim_names_files_and_tests_that_exist() -> None:
    rows = [row for heads, found in tables(CLAIMS) if heads == HEADS for row in found]
    assert len(rows) > 20
    for claim, _, _, file, test, residual in rows:
        files, tests = named(file), named(test)
        assert files, f"{claim!r} names no file"
        assert tests, f"{claim!r} names no test"
        assert residual, f"{claim!r} has an empty residual risk"
        for reference in tests:
            assert re.fullmatch(r"tests/[\w/]+\.py::test_\w+", reference), f"{claim!r}: {reference}"
        references = [*files, *tests, *(name for name in named(residual) if "::" in name)]
        found = [problem for reference in references if (problem := missing(reference))]
        assert not found, f"{claim!r}: {'; '.join(found)}"


def test_a_wrong_reference_is_found() -> None:
    assert missing("tests/test_docs.py::test_a_wrong_reference_is_found") is None
    assert missing("tests/test_docs.py::test_that_is_not_there") is not None
    assert missing("tests/test_that_is_not_there.py::test_x") is not None


def test_tests_named_anywhere_in_the_documents_exist() -> None:
    named_tests = 0
    for document in MARKDOWN:
        for reference in re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", document.read_text("utf-8")):
            assert missing(reference) is None, f"{document.relative_to(REPO)}: {missing(reference)}"
            named_tests += 1
    assert named_tests > 50


def test_readme_is_short() -> None:
    assert len((REPO / "README.md").read_text("utf-8").splitlines()) <= 200


@pytest.mark.parametrize("document", MARKDOWN, ids=lambda path: str(path.relative_to(REPO)))
def test_relative_links_resolve(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text("utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{target} does not exist"
        assert path.is_relative_to(REPO), f"{target} leads out of the repository"
        if anchor:
            assert anchor in anchors(path), f"{target}: no such heading"


def anchors(path: Path) -> set[str]:
    """The anchors GitHub gives a file's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(path.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def fields(forms: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str]]:
    """(kind, field) in the code's order; a kind without fields has the field "–"."""
    return [(kind, field) for kind, body in forms.items() for field in body or ("–",)]


def test_the_message_table_lists_every_field_and_no_other() -> None:
    rows = table(SYSTEM, "direction", "kind", "field")
    for direction, forms in (("request", REQUESTS), ("reply", REPLIES)):
        assert [row[1:3] for row in rows if row[0] == direction] == fields(forms)
    assert {row[0] for row in rows} == {"request", "reply"}
    assert all(all(row) for row in rows), "an empty cell"


def test_the_table_of_protocol_messages_lists_every_field_and_no_other() -> None:
    rows = table(SYSTEM, "from", "type", "field")
    assert sorted(row[1:3] for row in rows) == sorted(fields(BODIES))
    assert {row[0] for row in rows} == {"client", "coordinator"}
    assert all(all(row) for row in rows), "an empty cell"


def diagram(transitions: Mapping[tuple[Enum, str], Enum]) -> str:
    """A transition table as a Mermaid state diagram."""
    arrows = [f"    {old.value} --> {new.value}: {event}" for (old, event), new in transitions.items()]
    return "\n".join(["stateDiagram-v2", "    [*] --> idle", *arrows])


@pytest.mark.parametrize("transitions", [CLIENT_TABLE, COORDINATOR_TABLE], ids=["client", "coordinator"])
def test_state_diagrams_are_the_transition_tables(transitions: Mapping[tuple[Enum, str], Enum]) -> None:
    drawn = re.findall(
        r"^```mermaid\n(stateDiagram.*?)\n```$", SPECIFICATION.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    assert diagram(transitions) in drawn, "paste this into secure_aggregation.md:\n" + diagram(transitions)
