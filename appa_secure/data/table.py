"""An institution's own survey as ``.csv`` or ``.jsonl``; the formats are documented in ``docs/data.md``.

Two forms, told apart by their columns, one record per line:

- aggregated: ``qid, question, option, group, count[, ordinal]``; a group without
  a line for an option has count 0 there;
- respondent-level: ``respondent, group, qid, question, option[, ordinal]``, one line per answer.

Options keep the order of their first appearance unless every option of the question has an ordinal.
Errors name file and line: what is wrong with an institution's own file is for it to repair, so nothing
is dropped silently. Refusals and don't-knows, recognised by their wording, are left out and counted.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from appa_secure.data.source import is_nonresponse
from appa_secure.data.survey import MAX_OPTIONS, GroupData, Question, Responses, Survey, counts_of
from appa_secure.errors import DataError

_AGGREGATED = ("qid", "question", "option", "group", "count")
_RESPONDENTS = ("respondent", "group", "qid", "question", "option")
_OPTIONAL = "ordinal"


class TableConfig(Protocol):
    """The fields of ``data`` this loader reads."""

    path: str
    groups: Sequence[str] | None
    min_responses: int
    ordinal_only: bool


@dataclass(frozen=True)
class _Row:
    where: str  # "file:line"
    cells: dict[str, str]

    def fail(self, name: str, problem: str, fix: str) -> NoReturn:
        raise DataError(f"{self.where}: {name}: {problem}: {fix}")


@dataclass
class _Draft:
    """A question while its rows are read: where each option first appeared, and its ordinal if it has one."""

    text: str
    where: str
    options: dict[str, _Row] = field(default_factory=dict)
    ordinals: dict[str, float | None] = field(default_factory=dict)


def load(cfg: TableConfig) -> Survey:
    """Read the file. DataError with ``file:line: field: problem: fix`` at the first thing that cannot
    be right.

    Kept are the questions with at least ``max(1, min_responses)`` answers from every selected group and, with
    ``ordinal_only``, with ordinals.
    """
    path = Path(cfg.path).expanduser()
    rows, with_respondents = _rows(path)
    drafts: dict[str, _Draft] = {}
    answers: dict[tuple[str, str, str], tuple[_Row, float]] = {}  # (group or respondent, qid, option)
    members: dict[str, str] = {}  # respondent -> group
    given: list[tuple[str, str, str]] = []  # (respondent, qid, option) in file order
    refused: set[tuple[str, str]] = set()
    groups: dict[str, None] = {}
    for row in rows:
        groups.setdefault(row.cells["group"])
        if is_nonresponse(row.cells["option"]):
            _number(row, "count", 0.0)
            refused.add((row.cells["qid"], row.cells["option"]))
            continue
        _register(drafts, row)
        qid, option, group = row.cells["qid"], row.cells["option"], row.cells["group"]
        if with_respondents:
            person = row.cells["respondent"]
            if members.setdefault(person, group) != group:
                row.fail("group", "this respondent was in another group before", "use one group each")
            _once(answers, (person, qid, ""), row, 1.0, "respondent has answered this question")
            given.append((person, qid, option))
        else:
            count = _number(row, "count", 0.0)
            assert count is not None
            _once(answers, (group, qid, option), row, count, "group has this option")
    selected = _selected(groups, cfg.groups, path)
    questions = {qid: _finish(qid, draft) for qid, draft in drafts.items()}
    totals: dict[tuple[str, str], float] = {}  # (group, qid) -> answers
    for (key, qid, _), (_, count) in answers.items():
        group = members[key] if with_respondents else key
        totals[group, qid] = totals.get((group, qid), 0.0) + count
    dropped: Counter[str] = Counter()
    least = max(1, cfg.min_responses)
    kept = []
    for qid, question in questions.items():
        if cfg.ordinal_only and question.ordinals is None:
            dropped["question without ordinals"] += 1
        elif any(totals.get((group, qid), 0.0) < least for group in selected):
            dropped[f"question with fewer than {least} answers from a selected group"] += 1
        else:
            kept.append(question)
    if refused:
        dropped["option recording a refusal or don't know"] = len(refused)
    if with_respondents:
        data = [_from_responses(group, kept, given, members) for group in selected]
    else:
        none = (None, 0.0)
        data = [
            GroupData(
                g, {q.qid: np.array([answers.get((g, q.qid, o), none)[1] for o in q.options]) for q in kept}
            )
            for g in selected
        ]
    return Survey(path.stem, tuple(kept), tuple(data), dict(dropped))


def _from_responses(
    group: str, questions: Sequence[Question], given: list[tuple[str, str, str]], members: dict[str, str]
) -> GroupData:
    index = {question.qid: i for i, question in enumerate(questions)}
    place = {question.qid: {o: k for k, o in enumerate(question.options)} for question in questions}
    # Numbers in order of first appearance in the file: the names of respondents go no further than this line.
    number = {person: i for i, person in enumerate(members)}
    mine = [(number[p], index[q], place[q][o]) for p, q, o in given if members[p] == group and q in index]
    table = np.array(mine, dtype=np.int64).reshape(-1, 3)
    responses = Responses(table[:, 0], table[:, 1].astype(np.int32), table[:, 2].astype(np.int16))
    return GroupData(group, counts_of(questions, responses, group), responses=responses)


def _register(drafts: dict[str, _Draft], row: _Row) -> None:
    """Note the row's question, option and ordinal; fail where they contradict an earlier line."""
    qid, text, option = row.cells["qid"], row.cells["question"], row.cells["option"]
    draft = drafts.setdefault(qid, _Draft(text, row.where))
    if draft.text != text:
        row.fail("question", f"{qid!r} has another text at {draft.where}", "write one text per qid")
    ordinal = _number(row, _OPTIONAL, -math.inf) if row.cells.get(_OPTIONAL) else None
    if draft.ordinals.setdefault(option, ordinal) != ordinal:
        other = draft.options[option].where
        row.fail(_OPTIONAL, f"option {option!r} has another ordinal at {other}", "write one per option")
    if option not in draft.options:
        draft.options[option] = row
        if len(draft.options) > MAX_OPTIONS:
            row.fail("option", f"{qid!r} has more than {MAX_OPTIONS} options", "merge or leave out some")


def _finish(qid: str, draft: _Draft) -> Question:
    first = next(iter(draft.options.values()))
    if len(draft.options) < 2:
        first.fail("option", f"question {qid!r} has one option only", "list all, with count 0 where unused")
    known = {option: value for option, value in draft.ordinals.items() if value is not None}
    if not known:
        return Question(qid, draft.text, tuple(draft.options))
    for option, row in draft.options.items():
        if option not in known:
            row.fail(
                _OPTIONAL, f"empty, while other options of {qid!r} have one", "give all options one, or none"
            )
    ordered = sorted(known, key=known.__getitem__)
    for lower, upper in pairwise(ordered):
        if known[lower] == known[upper]:
            draft.options[upper].fail(
                _OPTIONAL, f"{lower!r} and {upper!r} share one", "give each its own place"
            )
    return Question(qid, draft.text, tuple(ordered), tuple(known[option] for option in ordered))


def _once(
    seen: dict[tuple[str, str, str], tuple[_Row, float]],
    key: tuple[str, str, str],
    row: _Row,
    value: float,
    what: str,
) -> None:
    if key in seen:
        row.fail("line", f"the {what} at {seen[key][0].where} already", "remove one of the two lines")
    seen[key] = (row, value)


def _number(row: _Row, name: str, least: float) -> float | None:
    """The cell as a finite number >= least; None without such a column. Values are never printed."""
    text = row.cells.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        row.fail(name, "not a number" if text else "empty", "write a number such as 12")
    if not math.isfinite(value):
        row.fail(name, "not finite", "write a number such as 12")
    if value < least:
        row.fail(name, "negative", f"write a number >= {least:g}")
    return value


def _selected(present: dict[str, None], wanted: Sequence[str] | None, path: Path) -> list[str]:
    if wanted is None:
        return list(present)
    unknown = [name for name in wanted if name not in present]
    if unknown:
        raise DataError(f"data.groups: {unknown} not in {path}; it has {', '.join(present)}")
    return list(wanted)


def _rows(path: Path) -> tuple[Iterator[_Row], bool]:
    """All rows, and whether they are respondent-level."""
    if not path.is_file():
        raise DataError(f"data.path={str(path)!r}: no such file; data=table reads one .csv or .jsonl file")
    if path.suffix not in (".csv", ".jsonl"):
        raise DataError(f"data.path={str(path)!r}: unknown ending {path.suffix!r}; name it .csv or .jsonl")
    rows = list(_csv_rows(path) if path.suffix == ".csv" else _jsonl_rows(path))
    if not rows:
        raise DataError(f"{path}:1: file: no rows: write at least one line of data")
    form = _RESPONDENTS if "respondent" in rows[0].cells else _AGGREGATED
    return iter([_checked(row, form) for row in rows]), form is _RESPONDENTS


def _checked(row: _Row, form: tuple[str, ...]) -> _Row:
    needed = f"needed are {', '.join(form)}, and {_OPTIONAL} if options have an order"
    for name in form:
        if name not in row.cells:
            row.fail(name, "column is missing", needed)
        if not row.cells[name]:
            row.fail(name, "empty", "fill it in or remove the line")
    for name in row.cells:
        if name not in form and name != _OPTIONAL:
            row.fail(name, "unknown column", needed)
    return row


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # drops the byte-order mark that spreadsheets write
    except UnicodeDecodeError as problem:
        line = path.read_bytes()[: problem.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: encoding: not UTF-8: save the file as UTF-8") from problem


def _csv_rows(path: Path) -> Iterator[_Row]:
    reader = csv.reader(_text(path).splitlines(keepends=True), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for values in reader:
            start, line = line, reader.line_num + 1
            where = f"{path}:{start}"
            if not any(value.strip() for value in values):
                continue
            if header is None:
                header = [value.strip() for value in values]
                twice = [name for name, count in Counter(header).items() if count > 1]
                if twice:
                    raise DataError(f"{where}: {twice[0]}: column occurs twice: rename or remove one")
                continue
            if len(values) != len(header):
                raise DataError(
                    f"{where}: line: {len(values)} values for {len(header)} columns: quote texts with commas"
                )
            yield _Row(where, {n: v.strip() for n, v in zip(header, values, strict=True)})
    except csv.Error as problem:
        raise DataError(f"{path}:{line}: line: {problem}: close the quotes") from problem


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except json.JSONDecodeError as problem:
            raise DataError(f"{where}: line: not JSON ({problem.msg}): repair or remove it") from problem
        if not isinstance(record, dict):
            raise DataError(f"{where}: line: not an object: write {{...}} with the documented fields")
        cells = {}
        for name, value in record.items():
            if isinstance(value, bool) or not isinstance(value, str | int | float | None):
                raise DataError(f"{where}: {name}: neither text nor number: write one of them")
            cells[name] = "" if value is None else str(value).strip()
        yield _Row(where, cells)
