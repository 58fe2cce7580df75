"""GlobalOpinionQA (Durmus et al. 2023): Pew Global Attitudes and World Values Survey answers by country.

Source form: JSON lines, one row per question and country, ``qid, question, options, country,
distribution``; the hub form ``question, selections, options`` (one row per question) is unfolded into
it. Only distributions are published, so counts are ``distribution * nominal_respondents`` (default
1000: Pew interviews about 1,000 adults per country and wave) and ``GroupData.nominal`` is True. The
source gives no order of the options: all questions are nominal.

Rows of several survey waves are merged under one question in places, so an option that a country was
never offered appears with share zero (a structural zero). :func:`_structural_zeros` states the rule
that finds them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from appa_secure.data.source import hub_error, is_nonresponse, literal, local_path
from appa_secure.data.survey import MAX_OPTIONS, FloatArray, GroupData, Question, Survey
from appa_secure.errors import DataError

NOMINAL_RESPONDENTS = 1000
SUM_TOLERANCE = 0.05  # published shares are rounded to whole percents; sums of 0.97 occur
STRUCTURAL_SHARE = (
    0.10  # nobody among about 1,000 people, yet this share elsewhere: not offered rather than not chosen
)
MAX_SETS = 20_000  # size of the search of densest_groups
#: The selection used by experiment=globalopinionqa_8, see docs/data.md.
DEFAULT_COUNTRIES = (
    "United States", "Germany", "France", "Turkey", "Jordan", "Pakistan", "Nigeria", "Brazil",
)  # fmt: skip


class GlobalOpinionQAConfig(Protocol):
    """The fields of ``data`` this loader reads."""

    path: str
    groups: Sequence[str] | None
    nominal_respondents: int | None
    ordinal_only: bool
    min_groups: int | None


@dataclass(frozen=True)
class _Item:
    """One question: text, options (refusals included), share per option by country."""

    text: str
    options: tuple[str, ...]
    shares: dict[str, FloatArray]


def load(cfg: GlobalOpinionQAConfig) -> Survey:
    """Read the questions with usable distributions from enough of the selected countries.

    Enough is ``min_groups`` of them, all when it is None. A country that was not asked a question has
    zero counts for it (``GroupData.has`` is False).
    """
    if cfg.ordinal_only:
        raise DataError(
            "data.ordinal_only=true: GlobalOpinionQA has no ordinals; set data.ordinal_only=false"
        )
    respondents = NOMINAL_RESPONDENTS if cfg.nominal_respondents is None else cfg.nominal_respondents
    if respondents < 1:
        raise DataError(f"data.nominal_respondents={respondents}: must be at least 1")
    items, dropped = _read(cfg.path)
    countries = list(DEFAULT_COUNTRIES if cfg.groups is None else cfg.groups)
    known = Counter(country for item in items.values() for country in item.shares)
    for country in countries:
        if country not in known:
            frequent = ", ".join(name for name, _ in known.most_common(16))
            raise DataError(
                f"data.groups: no rows for {country!r}; the countries with most questions are {frequent}"
            )
    # A field of its own in configurations that allow gaps; without it every country must have every question.
    least = _min_groups(cfg.min_groups, len(countries))
    questions: list[Question] = []
    counts: dict[str, dict[str, FloatArray]] = {country: {} for country in countries}
    for qid, item in items.items():
        present = [country for country in countries if country in item.shares]
        if len(present) < least:
            dropped[f"question asked in fewer than {least} of the selected countries"] += 1
            continue
        cleaned = _clean(item, present)
        if isinstance(cleaned, str):
            dropped[cleaned] += 1
            continue
        options, shares, refusals = cleaned
        dropped["option recording a refusal or don't know"] += refusals
        questions.append(Question(qid, item.text, options))
        for country in countries:
            counts[country][qid] = np.zeros(len(options))
        for country, share in zip(present, shares, strict=True):
            counts[country][qid] = share * respondents
    groups = tuple(GroupData(country, values, nominal=True) for country, values in counts.items())
    return Survey("globalopinionqa", tuple(questions), groups, {k: n for k, n in dropped.items() if n})


def densest_groups(path: str, n: int, min_groups: int | None = None) -> tuple[tuple[str, ...], int]:
    """The ``n`` countries with most usable questions (as :func:`load` keeps them), and how many questions.

    Exhaustive over the countries with most questions, as many of them as keep the number of sets below
    ``MAX_SETS``; the cleaning rules are applied to the 100 best sets. Ties go to the set whose thinnest
    country has most questions, then to the alphabet.
    """
    items, _ = _read(path)
    asked = Counter(country for item in items.values() for country in item.shares)
    least = _min_groups(min_groups, n)
    ranked = sorted(asked, key=lambda country: (-asked[country], country))
    if not 1 <= n <= len(ranked):
        raise DataError(f"{path}: cannot choose {n} of {len(ranked)} countries")
    width = n
    while width < len(ranked) and math.comb(width + 1, n) <= MAX_SETS:
        width += 1
    matrix = np.array(
        [[name in item.shares for item in items.values()] for name in ranked[:width]], dtype=np.int8
    )
    sets = sorted(
        (-int((matrix[list(chosen)].sum(axis=0) >= least).sum()), chosen)
        for chosen in combinations(range(width), n)
    )
    best: tuple[int, int, tuple[str, ...]] | None = None
    for _, chosen in sets[:100]:
        names = tuple(sorted(ranked[i] for i in chosen))
        kept = [asked_in for item in items.values() if (asked_in := _usable_in(item, names, least))]
        coverage = Counter(chain.from_iterable(kept))
        entry = (-len(kept), -min(coverage[name] for name in names), names)
        best = entry if best is None else min(best, entry)
    assert best is not None
    return best[2], -best[0]


def _usable_in(item: _Item, countries: Sequence[str], least: int) -> list[str]:
    """The countries that have the question, when the question is usable there; else none."""
    present = [country for country in countries if country in item.shares]
    return present if len(present) >= least and not isinstance(_clean(item, present), str) else []


def _min_groups(wanted: int | None, countries: int) -> int:
    least = countries if wanted is None else wanted
    if not 1 <= least <= countries:
        raise DataError(
            f"data.min_groups={wanted}: must be between 1 and the number of selected countries, {countries}"
        )
    return least


def _clean(item: _Item, countries: Sequence[str]) -> tuple[tuple[str, ...], list[FloatArray], int] | str:
    """Options, shares (K,) per country, number of refusal options removed; or the reason for dropping."""
    keep = np.array([not is_nonresponse(option) for option in item.options])
    table = np.stack([item.shares[country] for country in countries])[:, keep]  # (C, K)
    options = [option for option, kept in zip(item.options, keep, strict=True) if kept]
    if len(options) < 2:
        return "question with fewer than 2 options"
    if (table.sum(axis=1) <= 0.5).any():
        return "question that most of a country refused"
    table = table / table.sum(axis=1, keepdims=True)
    if _structural_zeros(options, table):
        return "question with structural zeros"
    chosen = (table > 0).any(axis=0)
    table, options = table[:, chosen], [o for o, c in zip(options, chosen, strict=True) if c]
    if len(options) < 2:
        return "question with fewer than 2 options"
    if len(options) > MAX_OPTIONS:
        return f"question with more than {MAX_OPTIONS} options"
    return tuple(options), list(table), int((~keep).sum())


def _structural_zeros(options: Sequence[str], table: FloatArray) -> bool:
    """True when some zero of the (C, K) shares looks like "not offered" rather than "not chosen".

    Either an option that nobody chose in one country has at least ``STRUCTURAL_SHARE`` in another; or,
    in one country, at least two and at least half of the options read out to people (volunteered ones
    aside) are zero, as happens where the options of another question were merged in.
    """
    zero = table == 0
    if (zero.any(axis=0) & (table.max(axis=0) >= STRUCTURAL_SHARE)).any():
        return True
    offered = np.array([not _volunteered(option) for option in options])
    empty = zero[:, offered].sum(axis=1)
    return bool(((empty >= 2) & (2 * empty >= offered.sum())).any())


def _volunteered(option: str) -> bool:
    lowered = option.lower()
    return "(vol" in lowered or "do not read" in lowered or "volunteered" in lowered


def _read(path: str) -> tuple[dict[str, _Item], Counter[str]]:
    """All questions by id, and the broken rows counted by reason."""
    local = local_path(path, "globalopinionqa")
    rows = _hub_rows(path) if local is None else _file_rows(local)
    dropped: Counter[str] = Counter()
    items: dict[str, _Item] = {}
    for row in chain.from_iterable(map(_unfold, rows)):
        problem = _defect(row)
        if problem is None:
            qid = str(row["qid"])
            options = tuple(str(option).strip() for option in row["options"])
            item = items.setdefault(qid, _Item(str(row["question"]).strip(), options, {}))
            if item.options != options:
                problem = "row whose options differ from its question's"
            elif row["country"] in item.shares:
                problem = "row repeating a question and country"
            else:
                share = np.array(row["distribution"], dtype=np.float64)
                item.shares[row["country"]] = share / share.sum()
        if problem is not None:
            dropped[problem] += 1
    if not items:
        raise DataError(f"{path}: no usable rows (dropped: {dict(dropped)})")
    return items, dropped


def _defect(row: dict[str, Any]) -> str | None:
    """Why a row cannot be used, or None."""
    options, shares = row.get("options"), row.get("distribution")
    if not isinstance(options, list) or not isinstance(shares, list) or not row.get("country"):
        return "row without options, distribution or country"
    if not str(row.get("question", "")).strip() or row.get("qid") is None:
        return "row without question or qid"
    if len(options) != len(shares):
        return "row with differing numbers of options and shares"
    if any(isinstance(s, bool) or not isinstance(s, int | float) or not 0 <= s < math.inf for s in shares):
        return "row with a share that is negative or no number"
    if abs(sum(shares) - 1) > SUM_TOLERANCE:
        return "row whose shares do not add up to 1"
    names = [str(option).strip() for option in options]
    if len(set(names)) != len(names) or not all(names):
        return "row with empty or repeated options"
    return None


def _file_rows(path: Path) -> Iterator[dict[str, Any]]:
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: no .jsonl file in this directory")
    for file in files:
        with file.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as problem:
                    raise DataError(
                        f"{file}:{number}: not JSON ({problem.msg}): repair or remove the line"
                    ) from problem
                if not isinstance(row, dict):
                    raise DataError(f"{file}:{number}: must be an object, not {type(row).__name__}")
                yield row


def _hub_rows(hub_id: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    try:
        table = load_dataset(hub_id, split="train")
    except Exception as problem:
        raise hub_error(hub_id, problem) from problem
    for number, row in enumerate(table):
        yield {"qid": number, **row}


def _unfold(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of the hub form (``selections`` by country, written as Python text) as one row per country."""
    if "selections" not in row:
        yield row
        return
    where = f"question {str(row.get('question'))[:60]!r}"
    options, selections = row.get("options"), row["selections"]
    if isinstance(options, str):
        options = literal(options, f"{where}: options")
    if isinstance(selections, str):
        # The upstream text is the repr of a defaultdict; only the dictionary inside is read.
        inner = selections[selections.find("{") : selections.rfind("}") + 1]
        selections = literal(inner, f"{where}: selections")
    for country, shares in selections.items():
        if shares is not None:
            yield {
                "qid": row.get("qid", row.get("question")),
                "question": row.get("question"),
                "options": [str(option) for option in options or ()],
                "country": country,
                "distribution": shares,
            }
