"""An institution's own file: both forms read right, and everything wrong with it is named by line."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appa_secure.data import Survey, load
from appa_secure.errors import DataError

HEAD = "qid,question,option,group,count,ordinal"
PEOPLE = "respondent,group,qid,question,option"
GOOD = f"""{HEAD}
q1,"Longer hours, or shorter?",Longer,North,10,2
q1,"Longer hours, or shorter?",Shorter,North,20,1
q1,"Longer hours, or shorter?",Longer,South,5,2
q2,More buses?,Yes,North,7,
q2,More buses?,No,South,9,
q2,More buses?,No,North,1,
"""


def read(path: Path, **changes: object) -> Survey:
    fields = {"kind": "table", "path": str(path), "groups": None, "min_responses": 1, "ordinal_only": False}
    return load(SimpleNamespace(**{**fields, **changes}), 1)


def table(tmp_path: Path, text: str | bytes, name: str = "own.csv", **changes: object) -> Survey:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read(path, **changes)


def test_aggregated_form(tmp_path: Path) -> None:
    survey = table(tmp_path, GOOD)
    assert survey.name == "own"
    assert survey.questions[0].options == ("Shorter", "Longer")
    assert survey.questions[0].ordinals == (1.0, 2.0)
    assert survey.questions[1].options == ("Yes", "No")
    assert survey.questions[1].ordinals is None
    north, south = survey.groups
    assert (north.name, south.name) == ("North", "South")
    assert north.counts["q1"].tolist() == [20, 10]
    assert south.counts["q1"].tolist() == [0, 5]
    assert south.counts["q2"].tolist() == [0, 9]
    assert north.responses is None


@pytest.mark.parametrize(
    "variant",
    [
        b"\xef\xbb\xbf" + GOOD.encode(),  # byte-order mark of a spreadsheet
        GOOD.replace("\n", "\r\n").encode(),
        GOOD.replace("\n", "\n\n").encode(),
        GOOD.replace(",North", ", North ").encode(),
    ],
)
def test_harmless_variants_read_the_same(tmp_path: Path, variant: bytes) -> None:
    expected, survey = table(tmp_path, GOOD), table(tmp_path, variant, "variant.csv")
    assert survey.questions == expected.questions
    for a, b in zip(survey.groups, expected.groups, strict=True):
        assert all(np.array_equal(a.counts[qid], b.counts[qid]) for qid in ("q1", "q2"))


def test_jsonl_reads_like_csv(tmp_path: Path) -> None:
    records = list(csv.DictReader(GOOD.splitlines()))
    lines = [
        {**r, "count": int(r["count"]), "ordinal": float(r["ordinal"]) if r["ordinal"] else None}
        for r in records
    ]
    survey = table(tmp_path, "\n".join(json.dumps(line) for line in lines), "own.jsonl")
    assert survey.questions == table(tmp_path, GOOD).questions
    assert survey.groups[0].counts["q1"].tolist() == [20, 10]


def test_selection_of_questions_and_groups(tmp_path: Path) -> None:
    assert [q.qid for q in table(tmp_path, GOOD, ordinal_only=True).questions] == ["q1"]
    assert [q.qid for q in table(tmp_path, GOOD, min_responses=8).questions] == ["q2"]
    assert [g.name for g in table(tmp_path, GOOD, groups=["South"]).groups] == ["South"]
    with pytest.raises(DataError, match=r"data\.groups.*West.*North, South"):
        table(tmp_path, GOOD, groups=["West"])
    with pytest.raises(
        DataError, match=r"no questions are left.*fewer than 99 answers from a selected group: 2"
    ):
        table(tmp_path, GOOD, min_responses=99)


def test_refusals_are_left_out_and_counted(tmp_path: Path) -> None:
    survey = table(tmp_path, GOOD + "q2,More buses?,Don't know,North,3,\nq2,More buses?,Refused,South,3,\n")
    assert survey.questions[1].options == ("Yes", "No")
    assert survey.dropped == {"option recording a refusal or don't know": 2}


answer = st.tuples(st.integers(0, 6), st.integers(0, 3), st.sampled_from("xyz"))


@settings(deadline=None, max_examples=40)
@given(st.lists(answer, unique_by=lambda a: a[:2], max_size=28))
def test_respondent_form_against_counting_by_hand(tmp_path_factory: pytest.TempPathFactory, answers) -> None:
    answers = [(90, 9, "x"), (91, 9, "y"), *answers]  # one question both groups have answered
    lines = [f"p{p},{'AB'[p % 2]},q{q},Text {q}?,{o}" for p, q, o in answers]
    path = tmp_path_factory.mktemp("t") / "own.csv"
    path.write_text("\n".join([PEOPLE, *lines]))
    counted: dict[tuple[str, str, str], int] = {}
    for p, q, o in answers:
        key = ("AB"[p % 2], f"q{q}", o)
        counted[key] = counted.get(key, 0) + 1
    chosen: dict[int, set[str]] = {}
    for _, q, o in answers:
        chosen.setdefault(q, set()).add(o)
    if min(map(len, chosen.values())) < 2:
        with pytest.raises(DataError, match="one option only"):
            read(path)
        return
    survey = read(path)
    for group in survey.groups:
        assert group.responses is not None
        for q in survey.questions:
            assert group.counts[q.qid].tolist() == [counted.get((group.name, q.qid, o), 0) for o in q.options]
        rows = len([1 for p, q, _ in answers if "AB"[p % 2] == group.name and f"q{q}" in group.counts])
        assert len(group.responses) == rows


A = "q1,Text?,Yes,G,1"
B = "q1,Text?,No,G,1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r":1: file: no rows"),
        (HEAD, r":1: file: no rows"),
        ("qid,question,option,group\nq,T,Yes,G", r":2: count: column is missing"),
        (f"{HEAD},weight\n{A},1,5", r":2: weight: unknown column"),
        ("qid,qid,question\na,b,c", r":1: qid: column occurs twice"),
        (f"{HEAD}\n{A},1\n{B}", r":3: line: 5 values for 6 columns: quote"),
        (f"{HEAD}\n{A},1\n,Text?,No,G,1,2", r":3: qid: empty"),
        (f"{HEAD}\n{A},1\nq1,Text?,,G,1,2", r":3: option: empty"),
        (f"{HEAD}\nq1,Text?,Yes,G,,1", r":2: count: empty"),
        (f"{HEAD}\nq1,Text?,Yes,G,many,1", r":2: count: not a number"),
        (f"{HEAD}\nq1,Text?,Yes,G,-4321,1", r":2: count: negative: write a number >= 0"),
        (f"{HEAD}\nq1,Text?,Yes,G,nan,1", r":2: count: not finite"),
        (f"{HEAD}\nq1,Text?,Yes,G,1e999,1", r":2: count: not finite"),
        (f"{HEAD}\n{A},1\n\n{A},1", r":4: line: the group has this option at .*:2 already"),
        (f"{HEAD}\n{A},1\nq1,Other text?,No,G,1,2", r":3: question: 'q1' has another text at .*:2"),
        (f"{HEAD}\n{A},1\nq1,Text?,Yes,H,1,2", r":3: ordinal: option 'Yes' has another ordinal at .*:2"),
        (f"{HEAD}\n{A},1\n{B},", r":3: ordinal: empty, while other options"),
        (f"{HEAD}\n{A},1\n{B},1", r":3: ordinal: 'Yes' and 'No' share one"),
        (f"{HEAD}\n{A},1\n{B},up", r":3: ordinal: not a number"),
        (f"{HEAD}\n{A},1", r":2: option: question 'q1' has one option only"),
        (HEAD + "".join(f"\nq1,T,o{i},G,1," for i in range(11)), r":12: option: 'q1' has more than 10"),
        (f"{PEOPLE}\np,G,q1,T,Yes\np,G,q1,T,No", r":3: line: the respondent has answered this"),
        (f"{PEOPLE}\np,G,q1,T,Yes\np,H,q2,T,No", r":3: group: this respondent was in another group"),
        (f"{PEOPLE},count\np,G,q1,T,Yes,1", r":2: count: unknown column"),
        (f'{HEAD}\n{A},1\nq1,"Text?,No,G,1,2', r":3: line: .*: close the quotes"),
        (b"qid,question\n\xff\xfe", r":2: encoding: not UTF-8"),
    ],
)  # fmt: skip
def test_errors_name_line_field_and_fix(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=r"own\.csv" + message) as caught:
        table(tmp_path, text)
    assert "4321" not in str(caught.value)  # counts are private, in messages too


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"qid": "q"', ":1: line: not JSON"),
        ("[1]", ":1: line: not an object"),
        ('{"qid": ["q"]}', ":1: qid: neither text nor number"),
        ('\n{"qid": "q"}', ":2: question: column is missing"),
    ],
)
def test_broken_jsonl(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=r"own\.jsonl" + message):
        table(tmp_path, text, "own.jsonl")


def test_quoted_line_breaks_do_not_shift_line_numbers(tmp_path: Path) -> None:
    text = f'{HEAD}\nq1,"Two\nlines?",Yes,G,1,1\nq1,"Two\nlines?",No,G,x,2\n'
    with pytest.raises(DataError, match=r"own\.csv:4: count"):
        table(tmp_path, text)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "absent.csv")
    with pytest.raises(DataError, match="unknown ending"):
        table(tmp_path, GOOD, "own.xlsx")


def test_unknown_kind_and_missing_path() -> None:
    with pytest.raises(DataError, match=r"data\.kind"):
        load(SimpleNamespace(kind="oracle", path="x"), 1)
    with pytest.raises(DataError, match=r"data\.path is needed"):
        load(SimpleNamespace(kind="table", path=None), 1)


def test_examples_of_the_documentation_run(tmp_path: Path) -> None:
    """Every csv and jsonl block of docs/data.md loads; each is preceded by its file name in bold."""
    page = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    parts = page.split("\n**`")[1:]
    assert len(parts) == 3
    for part in parts:
        name, block = part.split("`", 1)[0], part.split("```", 2)[1].split("\n", 1)[1]
        assert len(table(tmp_path, block, name).groups) == 2
