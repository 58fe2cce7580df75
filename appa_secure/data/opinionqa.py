"""OpinionQA "disagreement 500": Pew American Trends Panel answers by party, race and sex.

A directory (or hub dataset repository) with ``POLPARTY_data.json``, ``RACE_data.json``,
``SEX_data.json`` and ``info.csv``, as released with the "Benchmarking Distributional Alignment" study.
Counts are unweighted respondents.

The order of options comes from ``option_ordinal``, matched to options by **name** through
``option_mapping``: the JSON lists some options in another order. "About right" options lie between
their neighbours (1.5). A question is nominal when its ordinals are constant, do not match the options
in number, or when the two files list different options (a comma inside an option has split it in two).
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from appa_secure.data.source import hub_error, is_nonresponse, literal, local_path
from appa_secure.data.survey import FloatArray, GroupData, Question, Survey
from appa_secure.errors import DataError

ATTRIBUTES = ("POLPARTY", "RACE", "SEX")
DENSE_GROUPS = ("Democrat", "Republican", "Independent", "White", "Black", "Hispanic", "Male", "Female")
_FILES = (*(f"{attribute}_data.json" for attribute in ATTRIBUTES), "info.csv")
_META = ("MC_options", "question_text")


class OpinionQAConfig(Protocol):
    """The fields of ``data`` this loader reads."""

    path: str
    groups: Sequence[str] | None
    min_responses: int
    ordinal_only: bool


@dataclass(frozen=True)
class _Info:
    """One row of info.csv: options without refusals, ordinals (None when constant or mismatched)."""

    options: tuple[str, ...]
    ordinals: tuple[float, ...] | None
    refusals: int


def load(cfg: OpinionQAConfig) -> Survey:
    """Read the selected groups (default: the dense benchmark's 8) and the questions all of them answered.

    A question is kept when every selected group gave at least ``max(1, min_responses)`` answers to the
    options that its file lists, and, with ``ordinal_only``, when its options have usable ordinals.
    """
    root = _directory(cfg.path)
    tables = {a: _read_json(root / f"{a}_data.json") for a in ATTRIBUTES}
    selected = _select(tables, cfg.groups)
    info = _read_info(root / "info.csv")
    needed = list(dict.fromkeys(attribute for attribute, _ in selected.values()))
    dropped: Counter[str] = Counter()
    questions: list[Question] = []
    counts: dict[str, dict[str, FloatArray]] = {name: {} for name in selected}
    for qid in dict.fromkeys(qid for attribute in needed for qid in tables[attribute]):
        entries = {attribute: tables[attribute].get(qid) for attribute in needed}
        if qid not in info or None in entries.values():
            dropped["question missing from one of the files"] += 1
            continue
        built = _question(root, qid, info[qid], entries, selected, cfg)
        if isinstance(built, str):
            dropped[built] += 1
            continue
        question, cells = built
        dropped["option recording a refusal or don't know"] += info[qid].refusals
        questions.append(question)
        for name, values in cells.items():
            counts[name][qid] = values
    groups = tuple(GroupData(name, values) for name, values in counts.items())
    return Survey("opinionqa", tuple(questions), groups, dict(dropped))


def _question(
    root: Path,
    qid: str,
    info: _Info,
    entries: dict[str, Any],
    selected: dict[str, tuple[str, str]],
    cfg: OpinionQAConfig,
) -> tuple[Question, dict[str, FloatArray]] | str:
    """The question and each group's counts, or the reason for dropping it."""
    listed = {a: {o for o in e["MC_options"] if not is_nonresponse(o)} for a, e in entries.items()}
    consistent = all(options == set(info.options) for options in listed.values())
    ordinals = info.ordinals if consistent else None
    if cfg.ordinal_only and ordinals is None:
        return "question without usable ordinals"
    order = np.argsort(ordinals) if ordinals is not None else np.arange(len(info.options))
    options = tuple(info.options[i] for i in order)
    if len(options) < 2:
        return "question with fewer than 2 options"
    cells: dict[str, FloatArray] = {}
    for name, (attribute, key) in selected.items():
        cell = entries[attribute].get(key, {})
        where = f"{root / (attribute + '_data.json')}: question {qid!r}, group {key!r}"
        answers = {o: n for o, n in _numbers(cell, where).items() if not is_nonresponse(o)}
        if not answers.keys() <= set(options):
            return "question with answers to options that info.csv does not know"
        if sum(n for o, n in answers.items() if o in listed[attribute]) < max(1, cfg.min_responses):
            return f"question with fewer than {max(1, cfg.min_responses)} answers from a selected group"
        cells[name] = np.array([answers.get(option, 0.0) for option in options])
    text = str(next(iter(entries.values()))["question_text"]).strip()
    ascending = tuple(ordinals[i] for i in order) if ordinals is not None else None
    return Question(qid, text, options, ascending), cells


def _select(tables: dict[str, Any], groups: Sequence[str] | None) -> dict[str, tuple[str, str]]:
    """Name of each selected group -> (attribute file, key); "RACE:Other" names the file explicitly."""
    homes: dict[str, list[str]] = {}
    for attribute, table in tables.items():
        names = dict.fromkeys(key for entry in table.values() for key in entry if key not in _META)
        for key in names:
            if not is_nonresponse(key):
                homes.setdefault(key, []).append(attribute)
                homes.setdefault(f"{attribute}:{key}", []).append(attribute)
    selected: dict[str, tuple[str, str]] = {}
    for name in DENSE_GROUPS if groups is None else groups:
        where = homes.get(name, [])
        if not where:
            plain = ", ".join(key for key in homes if ":" not in key)
            raise DataError(f"data.groups: {name!r} is not in the data; it has {plain}")
        if len(where) > 1:
            choices = " or ".join(f"{attribute}:{name}" for attribute in where)
            raise DataError(f"data.groups: {name!r} occurs in several files; write {choices}")
        selected[name] = (where[0], name.rpartition(":")[2])
    if len(set(selected.values())) != len(DENSE_GROUPS if groups is None else groups):
        raise DataError(f"data.groups: a group is listed twice in {list(groups or ())}")
    return selected


def _read_info(path: Path) -> dict[str, _Info]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        missing = {"key", "option_mapping", "option_ordinal"} - set(reader.fieldnames or ())
        if missing:
            raise DataError(f"{path}: columns {sorted(missing)} are missing")
        result: dict[str, _Info] = {}
        for row in reader:
            where = f"{path}:{reader.line_num}"
            mapping = literal(row["option_mapping"] or "", f"{where}: option_mapping")
            ordinals = literal(row["option_ordinal"] or "", f"{where}: option_ordinal")
            if not isinstance(mapping, dict) or not isinstance(ordinals, list):
                raise DataError(f"{where}: option_mapping must be a dictionary and option_ordinal a list")
            names = [str(value).strip() for value in mapping.values()]
            options = tuple(dict.fromkeys(name for name in names if not is_nonresponse(name)))
            # A key may stand on several rows (one per wording); their options agree, the first row counts.
            result.setdefault(
                row["key"], _Info(options, _usable(ordinals, options), sum(map(is_nonresponse, names)))
            )
    return result


def _usable(ordinals: list[Any], options: tuple[str, ...]) -> tuple[float, ...] | None:
    """The ordinals when they give every option a place of its own, else None."""
    numbers = [float(o) for o in ordinals if isinstance(o, int | float) and math.isfinite(o)]
    if len(numbers) != len(ordinals) or len(numbers) != len(options) or len(set(numbers)) != len(numbers):
        return None
    return tuple(numbers)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise DataError(f"{path}: not JSON ({problem})") from problem
    if not isinstance(table, dict):
        raise DataError(f"{path}: must be an object keyed by question id")
    for qid, entry in table.items():
        if not isinstance(entry, dict) or any(field not in entry for field in _META):
            raise DataError(f"{path}: question {qid!r} needs the fields {' and '.join(_META)}")
    return table


def _numbers(cell: Any, where: str) -> dict[str, float]:
    """A group's counts by option, checked."""
    if not isinstance(cell, dict):
        raise DataError(f"{where}: must be an object of option: count")
    for option, count in cell.items():
        if isinstance(count, bool) or not isinstance(count, int | float) or not (0 <= count < math.inf):
            raise DataError(f"{where}: the count of {option!r} must be a finite number >= 0")
    return {option.strip(): float(count) for option, count in cell.items()}


def _directory(path: str) -> Path:
    root = local_path(path, "opinionqa")
    if root is None:
        root = _download(path)
    missing = [name for name in _FILES if not (root / name).is_file()]
    if missing:
        raise DataError(
            f"data.path={path!r}: it lacks {', '.join(missing)}; all of {', '.join(_FILES)} are needed"
        )
    return root


def _download(hub_id: str) -> Path:
    """The four files from a hub dataset repository (``datasets`` would turn the nested JSON into one row)."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, repo_type="dataset", allow_patterns=list(_FILES)))
    except Exception as problem:
        raise hub_error(hub_id, problem) from problem
