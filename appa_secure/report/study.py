"""A sweep as one tidy table, and what it shows: means over seeds with intervals, and paired differences.

`results.parquet` has one row per run, part, split, group and metric:

    run, seed, stamp, part, split, group, round, metric, value, and a column per field of the configuration

part: `policy.before`, `policy.after`, `predictor.own`, `predictor.shared`, `predictor.pluralllm` (coordinator/evaluate.py),
`ceiling` (fields of a summary's ceiling as metrics), or `run`. group is null in figures over all groups, round everywhere
but in a predictor's curve.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from appa_secure import records
from appa_secure.errors import ConfigError, RunError
from appa_secure.report.run import Run, load_run, lookup
from appa_secure.report.tables import flatten

SPLITS = {"train": "training", "heldout": "held-out"}
METRICS = {"avg": "Avg", "min": "Min", "fairness_index": "FI"}
WINS = {"win_rate": "win rate", "lowest_win_rate": "lowest win rate"}  # against the policy before training
COMPARED = {"avg": "Avg", "min": "Min", "spread": "Spread", **WINS}  # spread: best-off less worst-off group
# Part `run`: shares of what is attainable on the questions of a split; where in a summary, and in words.
REACHED = {
    "gap_closed_avg": ("gap_closed.{}.avg", "Avg gap closed"),
    "gap_closed_min": ("gap_closed.{}.min", "Min gap closed"),
    "share_of_gain": ("share_of_gain.{}", "Min gain"),
}
PARTS = {
    "policy.after": "Policy after training",
    "predictor.own": "Predictor: each group with its own predictions",
    "predictor.shared": "Predictor: each group with the mean of all groups' predictions",
    "predictor.pluralllm": "Predictor: own predictions in PluralLLM's score, 1 - sqrt(JSD)",
}

# Where a measurement has a metric, if not under its name.
_PLACES = {"win_rate": "win_rate.avg", "lowest_win_rate": "win_rate.min"}
_RESAMPLES = 10_000
_PANELS = ("experiment", "data", "data.kind", "task.reward", "policy", "policy.kind")
_RULE, _SYSTEM, _PRIVACY, _REFERENCE = "aggregation", "system", "privacy", "average"


@dataclass(frozen=True)
class Estimate:
    """Mean over n seeds with the 95 % interval of Student's t; without an interval for one seed."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """values: one per seed, at least one."""
        mean, n = float(np.mean(values)), len(values)
        if n < 2:
            return cls(mean, None, None, n)
        reach = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
        return cls(mean, mean - reach, mean + reach, n)


@dataclass(frozen=True)
class Difference:
    """`other` minus `reference` over the seeds that both have: absolute, in percent of the reference, the p of
    the paired t test (None for fewer than two seeds or no spread), and the 95 % percentile bootstrap over the seeds."""

    reference: str
    other: str
    absolute: Estimate
    percent: Estimate
    p: float | None
    bootstrap: tuple[float, float] | None


@dataclass(frozen=True)
class Study:
    """The runs of a sweep. `conditions` maps each combination of varied fields but the seed, in words, to its values."""

    frame: pd.DataFrame
    fields: tuple[str, ...]
    conditions: Mapping[str, Mapping[str, str]]
    runs: Mapping[str, Run]
    missing: tuple[str, ...]

    def parts(self) -> list[str]:
        """The parts that were measured, in the order of PARTS."""
        return [part for part in PARTS if (self.frame["part"] == part).any()]

    def values(self, condition: str, part: str, split: str, metric: str) -> dict[int, float]:
        """The final figure over all groups of each seed."""
        f = self.frame
        rows = f[
            (f["condition"] == condition) & (f["part"] == part) & (f["split"] == split) & (f["metric"] == metric)
            & f["group"].isna() & f["round"].isna()
        ]  # fmt: skip
        return dict(zip(rows["seed"].astype(int), rows["value"].astype(float), strict=True))

    def estimate(self, condition: str, part: str, split: str, metric: str) -> Estimate | None:
        """Over all seeds of a condition; None where nothing was measured."""
        values = list(self.values(condition, part, split, metric).values())
        return Estimate.of(values) if values else None

    def names(self, part: str) -> dict[str, str]:
        """What each condition is called in a table of this part. Conditions that start from one predictor, and so have the
        same figures of it, seed by seed, share a name: what they have in common. Policies are told apart."""
        f = self.frame
        rows = f[(f["part"] == part) & f["group"].isna() & f["round"].isna()]
        figures = rows.pivot_table(index=["seed", "split", "metric"], columns="condition", values="value")
        alike: list[list[str]] = []
        for condition in self.conditions:
            mine = figures.get(condition)
            same = None
            if mine is not None and part != "policy.after":
                same = next((c for c in alike if _equal(mine, figures[c[0]])), None)
            if same is None:
                alike.append([condition])
            else:
                same.append(condition)
        found: dict[str, str] = {}
        for group in alike:
            shared = set.intersection(*(set(self.conditions[c].items()) for c in group))
            words = _words(
                {k: v for k, v in self.conditions[group[0]].items() if (k, v) in shared}, self.fields
            )
            name = group[0] if len(group) == 1 else f"{words} ({len(group)} alike)"
            found |= dict.fromkeys(group, name)
        return found

    def difference(self, reference: str, other: str, part: str, split: str, metric: str) -> Difference | None:
        """None where the two have no seed in common."""
        a, b = (self.values(one, part, split, metric) for one in (reference, other))
        seeds = sorted(a.keys() & b.keys())
        if not seeds:
            return None
        x, y = (np.array([values[seed] for seed in seeds]) for values in (a, b))
        spread = len(seeds) > 1 and float(np.ptp(y - x)) > 0
        p = float(stats.ttest_rel(y, x).pvalue) if spread else None
        percent = Estimate.of((100 * (y - x) / x).tolist())
        return Difference(reference, other, Estimate.of((y - x).tolist()), percent, p, _bootstrap(y - x))

    def rounds_to(self, condition: str, split: str, levels: Mapping[int, float]) -> dict[int, int | None]:
        """Per seed of `levels`, the first measured round in which the average alignment of own predictions is at least
        the seed's level; None where it never is. Seeds without a curve are left out."""
        f = self.frame
        rows = f[
            (f["condition"] == condition)
            & (f["part"] == "predictor.own")
            & (f["split"] == split)
            & (f["metric"] == "avg")
            & f["round"].notna()
        ]
        found: dict[int, int | None] = {}
        for seed, level in levels.items():
            curve = rows[rows["seed"] == seed]
            if not curve.empty:
                reached = curve[curve["value"] >= level]["round"]
                found[seed] = None if reached.empty else int(reached.min())
        return found

    def panels(self) -> list[tuple[str, Study]]:
        """The study taken apart by data set and policy, where they vary: each part with its title. Else itself."""
        apart = [field for field in self.fields if field in _PANELS]
        found: dict[tuple[str, ...], list[str]] = {}
        for condition, values in self.conditions.items():
            found.setdefault(tuple(values.get(field, "") for field in apart), []).append(condition)
        if len(found) < 2:
            return [("", self)]
        return [self._panel(names, set(apart)) for names in found.values()]

    def _panel(self, names: Sequence[str], apart: set[str]) -> tuple[str, Study]:
        rest = tuple(field for field in self.fields if field not in apart)
        inside = {name: {k: v for k, v in self.conditions[name].items() if k not in apart} for name in names}
        words = {name: _words(values, rest) for name, values in inside.items()}
        frame = self.frame[self.frame["condition"].isin(names)]
        runs = {name: self.runs[name] for name in frame["run"].unique()}
        one = next(iter(runs.values()))
        told = [str(self.conditions[names[0]].get("experiment", "")), f"data {one.get('data.kind')}"]
        told += [f"reward {one.get('task.reward')}", f"policy {one.get('policy.kind')}"]
        conditions = {words[name]: values for name, values in inside.items()}
        panel = Study(frame.assign(condition=frame["condition"].map(words)), rest, conditions, runs, ())
        return ", ".join(word for word in told if word), panel

    def _with_average(self) -> list[tuple[str, str]]:
        """Every rule and system, with whatever options, with the average rule, where all else that varies is the same."""

        def rest(condition: str) -> tuple[tuple[str, str], ...]:
            values = self.conditions[condition].items()
            return tuple(
                (k, v) for k, v in values if k not in (_RULE, _SYSTEM) and not k.startswith(f"{_SYSTEM}.")
            )

        references = {rest(c): c for c, v in self.conditions.items() if v.get(_RULE) == _REFERENCE}
        found = [
            (references.get(rest(c)), c) for c, v in self.conditions.items() if v.get(_RULE) != _REFERENCE
        ]
        return [(reference, c) for reference, c in found if reference is not None]

    def _with_first(self) -> list[tuple[str, str]]:
        first, *others = self.conditions or [""]
        return [(first, other) for other in others]

    def frontier(self, split: str) -> list[tuple[float, float]]:
        """Attainable pairs of average and worst group, from the best average on: means over the runs that know them."""
        known = [f for run in self.runs.values() if (f := lookup(run.summary, f"ceiling.{split}.frontier"))]
        return [(float(x), float(y)) for x, y in np.mean(known, axis=0)] if known else []

    def pairs(self, by: str | None) -> list[tuple[str, str]]:
        """Which conditions are compared. `by` is a field: those that differ in it alone (`privacy`: in any option of privacy),
        with the one that has its first value; or field=value, with the one that has that value. None: those that differ in
        the rule or system alone, with the average rule; where there is no such rule, all with the first."""
        if by is None:
            return self._with_average() or self._with_first()
        field, _, value = by.partition("=")
        if field not in self.fields:
            known = ", ".join(f for f in self.fields if f != "seed")
            raise ConfigError(
                f"--by {by}: does not vary in this sweep. Fix: one of {known or 'no field varies'}"
            )
        values = {condition: own.get(field, "") for condition, own in self.conditions.items()}
        if value and value not in values.values():
            known = ", ".join(f"{field}={one}" for one in dict.fromkeys(values.values()) if one)
            raise ConfigError(f"--by {by}: no run has this value. Fix: one of {known}")
        # What privacy costs is seen against runs without it, which have no ε: `privacy` stands for all of its options.
        aside = (f"{field}.",) if field == _PRIVACY else ()
        alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for condition, own in self.conditions.items():
            rest = tuple((k, v) for k, v in own.items() if k != field and not k.startswith(aside))
            alike.setdefault(rest, []).append(condition)
        found: list[tuple[str, str]] = []
        for same in alike.values():
            references = [c for c in same if not value or values[c] == value]
            found += [(references[0], c) for c in same if references and c != references[0]]
        return found


def _equal(one: pd.Series, other: pd.Series) -> bool:
    """Whether two conditions' figures agree wherever both have one."""
    both = one.notna() & other.notna()
    return bool(both.any()) and bool((one[both] == other[both]).all())


def _bootstrap(values: np.ndarray) -> tuple[float, float] | None:
    """Percentile interval of the mean (Efron 1979), the same at every call. With few values it is too narrow."""
    if len(values) < 2:
        return None
    draws = np.random.default_rng(0xB007).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def load_study(root: Path) -> Study:
    """The finished runs below `root`. RunError when there is none, or `root` is no sweep."""
    path = root / records.SWEEP
    if not path.is_file():
        raise RunError(f"{root} has no {records.SWEEP}: name a folder that appa-secure sweep made")
    noted = json.loads(path.read_text("utf-8"))
    fields = tuple(noted["fields"])
    runs = {
        name: load_run(root / name) for name in noted["runs"] if (root / name / records.SUMMARY).is_file()
    }
    if not runs:
        raise RunError(f"{root}: none of its runs has finished; repeat the sweep")
    conditions: dict[str, dict[str, str]] = {}
    tables = []
    for name, run in runs.items():
        varied = {key: value for key, value in noted["runs"][name].items() if key != "seed"}
        condition = _words(varied, fields)
        conditions.setdefault(condition, varied)
        table = pd.DataFrame(_rows(run))
        table.insert(0, "condition", condition)
        table.insert(0, "run", name)
        for key, value in {**_columns(run.config), **varied}.items():
            table[key] = value
        tables.append(table)
    missing = tuple(name for name in noted["runs"] if name not in runs)
    return Study(pd.concat(tables, ignore_index=True), fields, conditions, runs, missing)


def write_results(study: Study, path: Path) -> None:
    """The tidy table as parquet; columns whose values differ in type are written as text."""
    frame = study.frame.copy()
    for name in frame.columns:
        kinds = {type(value) for value in frame[name].dropna()}
        mixed = frame[name].dtype == object and bool(kinds - {str, bool})
        if mixed or len(kinds) > 1:
            frame[name] = frame[name].map(str, na_action="ignore")
    temporary = path.with_name(f".{path.name}.tmp")
    frame.to_parquet(temporary, index=False)
    temporary.replace(path)


def _words(varied: Mapping[str, str], fields: Sequence[str]) -> str:
    leaves = [field.rpartition(".")[2] for field in fields]
    parts = []
    for key, value in varied.items():
        leaf = key.rpartition(".")[2]
        shown = leaf if leaves.count(leaf) == 1 and leaf not in ("kind", "enabled") else key
        parts.append(value if key in ("aggregation", "aggregation.kind") else f"{shown} {value}")
    return ", ".join(parts) or "all"


def _columns(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = {
        key: value for key, value in flatten(config).items() if key not in ("seed", "name", "output_root")
    }
    return {key: json.dumps(value) if isinstance(value, list) else value for key, value in flat.items()}


def _rows(run: Run) -> Iterator[dict[str, Any]]:
    head = {"seed": run.get("seed"), "stamp": run.summary.get("stamp")}

    def row(
        part: str, split: str | None, group: str | None, metric: str, value: Any, number: int | None = None
    ) -> Any:
        return head | {
            "part": part, "split": split, "group": group, "round": number, "metric": metric, "value": float(value),
        }  # fmt: skip

    def figures(part: str, split: str, found: Any, number: int | None = None) -> Iterator[dict[str, Any]]:
        scores = lookup(found, "per_group") or {}
        for group, value in scores.items():
            yield row(part, split, str(group), "alignment", value, number)
        if scores:
            yield row(part, split, None, "spread", max(scores.values()) - min(scores.values()), number)
        for group, value in (lookup(found, "win_rate.per_group") or {}).items():
            yield row(part, split, str(group), "win_rate", value, number)
        for metric in (*METRICS, "malformed", *WINS):
            value = lookup(found, _PLACES.get(metric, metric))
            if isinstance(value, int | float):
                yield row(part, split, None, metric, value, number)

    for split in SPLITS:
        for when in ("before", "after"):
            yield from figures(f"policy.{when}", split, lookup(run.summary, f"alignment.{split}.{when}"))
        for name, found in (lookup(run.summary, f"predictor.{split}") or {}).items():
            yield from figures(f"predictor.{name}", split, found)
        told = {
            **{("ceiling", m): v for m, v in flatten(lookup(run.summary, f"ceiling.{split}") or {}).items()},
            **{("run", m): lookup(run.summary, place.format(split)) for m, (place, _) in REACHED.items()},
        }
        for (part, metric), value in told.items():
            if isinstance(value, int | float):
                yield row(part, split, None, metric, value)
        for measured in run.measurement:
            if isinstance(number := measured.get("round"), int):
                for name, found in (measured.get(split) or {}).items():
                    yield from figures(f"predictor.{name}", split, found, number)
    for client, epsilon in run.epsilon.items():
        yield row("run", None, client, "epsilon", epsilon)
    for stage, seconds in run.seconds.items():
        yield row("run", None, None, f"seconds_{stage}", seconds)
