"""Plots over the runs of a sweep: every mean with its 95 % interval over seeds."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from appa_secure.report.plots import DASHES, FAINT, LINES, MUTED, STYLE, shorten, smooth
from appa_secure.report.study import SPLITS, Estimate, Study

_EPSILON = "privacy.epsilon"
_DPI = 200
_MARKS = ("o", "s", "^", "D")  # a second sign beside colour, as in `plots.DASHES`
_HATCHES = ("", "///", "...")
_SPOKEN = {"min": "worst-off group", "avg": "average group"}
_COLUMNS = 2  # axes in a row
_FAR = 10.0


@dataclass(frozen=True)
class Drawing:
    """One figure, as SVG for the page and PNG for everything else."""

    name: str
    caption: str
    svg: str
    png: bytes


def drawings(study: Study) -> list[Drawing]:
    """What the sweep's data allow: the Avg-Min plane, groups, ε against alignment, the predictor while it learns, weights."""
    parts = study.parts()
    part = next((p for p in ("policy.after", "predictor.own") if p in parts), None)
    found = []
    if part is not None:
        for split, name in SPLITS.items():
            found.append(_plane(study, part, split, name))
            found += [_groups(study, part, split, name)] if study.pairs(None) else []
            if _has_epsilons(study):
                found += [_against_epsilon(study, part, split, name, metric) for metric in ("min", "avg")]
            found += [_curves(study, split, name)] if study.frame["round"].notna().any() else []
    return found + _weights(study)


def _draw(name: str, caption: str, paint: Callable[[Axes], None], height: float = 3.6) -> Drawing:
    return _draw_all(name, caption, lambda figure: paint(figure.add_subplot()), height)


def _draw_all(name: str, caption: str, paint: Callable[[Figure], None], height: float) -> Drawing:
    """`paint` adds axes with equal labels; the legend stands beside them."""
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=(6.4, height), layout="constrained")
        paint(figure)
        for axes in figure.axes:
            axes.grid(color=FAINT, linewidth=0.6)
            axes.set_axisbelow(True)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8.5)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
    return Drawing(name, caption, svg.getvalue(), png.getvalue())


def _plane(study: Study, part: str, split: str, name: str) -> Drawing:
    means = {
        condition: tuple(study.estimate(condition, part, split, metric) for metric in ("avg", "min"))
        for condition in study.conditions
    }
    known = {c: (x.mean, y.mean) for c, (x, y) in means.items() if x is not None and y is not None}
    far = {c for axis in (0, 1) for c in _far({c: at[axis] for c, at in known.items()})}

    def paint(axes: Axes) -> None:
        shown = study.frontier(split)
        if shown:
            x_best, y_best = zip(*shown, strict=True)
            axes.plot(x_best, y_best, "-", color=MUTED, linewidth=1.4, label="attainable")
        for index, condition in enumerate(study.conditions):
            colour, mark = LINES[index % len(LINES)], _MARKS[index // len(LINES) % len(_MARKS)]
            x, y = means[condition]
            if x is None or y is None:
                continue
            if condition in far:
                axes.plot(
                    [], [], mark, color=colour, markerfacecolor="none",
                    label=f"{shorten(condition, 40)}: off, at {x.mean:.2f}, {y.mean:.2f}",
                )  # fmt: skip
                continue
            axes.errorbar(
                x.mean, y.mean, xerr=_reach(x), yerr=_reach(y), fmt=mark, color=colour, markersize=6, linewidth=1.2,
                label=shorten(condition, 40),
            )  # fmt: skip
            one, other = (study.values(condition, part, split, metric) for metric in ("avg", "min"))
            dots = [(one[seed], other[seed]) for seed in one]
            axes.plot(*zip(*dots, strict=True), ".", color=colour, markersize=3, alpha=0.6)
            shown = [*shown, *dots]
        # Intervals of two or three seeds may run out of the picture: over all their length they would leave one dot of it.
        if shown:
            x_shown, y_shown = zip(*shown, strict=True)
            axes.set_xlim(*_around(x_shown))
            axes.set_ylim(*_around(y_shown))
        axes.set_xlabel(f"average group, {name} questions")
        axes.set_title("worst-off group", loc="left", fontsize=10, color=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(5))

    height = max(3.6, 0.6 + 0.2 * len(study.conditions))
    caption = f"Average against worst-off group, {name} questions: means and 95 % intervals over seeds, dots are seeds"
    caption += "; the grey line is what is attainable" if study.frontier(split) else ""
    caption += "; hollow signs lie outside" if far else ""
    return _draw(f"plane_{split}", caption, paint, height)


def _around(values: Sequence[float]) -> tuple[float, float]:
    room = 0.08 * (max(values) - min(values)) or 0.01
    return min(values) - room, max(values) + room


def _far(values: Mapping[str, float]) -> set[str]:
    """Conditions so far from the others that one scale for all would show nothing else: ten times the median distance from
    the median, and a tenth of the range of scores."""
    middle = median(values.values()) if values else 0.0
    away = {condition: abs(value - middle) for condition, value in values.items()}
    limit = max(_FAR * median(away.values()), 0.1) if away else 0.0
    return {condition for condition, distance in away.items() if distance > limit}


def _groups(study: Study, part: str, split: str, name: str) -> Drawing:
    """Each group's alignment minus what the reference gives it, with intervals over seeds."""
    f = study.frame
    rows = f[(f["part"] == part) & (f["split"] == split) & (f["metric"] == "alignment") & f["round"].isna()]
    values = rows.set_index(["condition", "group", "seed"])["value"].sort_index()
    pairs = [(a, b) for a, b in study.pairs(None) if {a, b} <= set(rows["condition"])]
    groups = sorted(rows["group"].unique())
    thick = 0.8 / max(len(pairs), 1)

    def paint(axes: Axes) -> None:
        for index, (reference, other) in enumerate(pairs):
            found = []
            for group in groups:
                one, two = (values[c, group] for c in (other, reference))
                found.append(Estimate.of((one - two).dropna().tolist() or [math.nan]))
            at = [row + thick * (index - (len(pairs) - 1) / 2) for row in range(len(groups))]
            axes.barh(
                at, [e.mean for e in found], thick, xerr=[_reach(e) for e in found], color=LINES[index % len(LINES)],
                hatch=_HATCHES[index // len(LINES) % len(_HATCHES)], edgecolor="white", linewidth=0.3,
                error_kw={"linewidth": 0.7},
                label=shorten(other, 40),
            )  # fmt: skip
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_yticks(range(len(groups)), [shorten(group) for group in groups])
        axes.invert_yaxis()
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("difference in alignment")

    height = max(3.6, 0.8 + 0.11 * len(groups) * max(len(pairs), 3), 0.6 + 0.2 * len(pairs))
    caption = f"What each group gains or loses against {_the(pairs)}, {name} questions: means and 95 % intervals over seeds"
    return _draw(f"groups_{split}", caption, paint, height)


def _the(pairs: Sequence[tuple[str, str]]) -> str:
    references = dict.fromkeys(reference for reference, _ in pairs)
    return next(iter(references)) if len(references) == 1 else "the reference"


def _reach(e: Estimate) -> float:
    return 0.0 if e.high is None else e.high - e.mean


def _has_epsilons(study: Study) -> bool:
    frame = study.frame
    return _EPSILON in frame and frame[frame["privacy.enabled"].astype(bool)][_EPSILON].nunique() > 1


def _against_epsilon(study: Study, part: str, split: str, name: str, metric: str) -> Drawing:
    """Conditions that differ in ε and what follows from it are one line, which ends at ∞ with the run without privacy."""
    firsts = study.frame.drop_duplicates("condition").set_index("condition")
    private = firsts["privacy.enabled"].astype(bool)
    without = ("seed", "privacy", "privacy.enabled", _EPSILON)
    keys = [f for f in study.fields if f not in without and not _follows_epsilon(firsts, f)]
    levels = [*sorted({float(firsts[_EPSILON][c]) for c in study.conditions if private[c]}), math.inf]
    series: dict[tuple[str, ...], list[tuple[float, str]]] = {}
    for condition, values in study.conditions.items():
        level = float(firsts[_EPSILON][condition]) if private[condition] else math.inf
        series.setdefault(tuple(values.get(key, "") for key in keys), []).append((level, condition))

    def paint(axes: Axes) -> None:
        drawn = 0
        for rest, points in series.items():
            known = [(x, e) for x, c in sorted(points) if (e := study.estimate(c, part, split, metric))]
            label = shorten(" ".join(word for word in rest if word), 40)
            if known and all(x == math.inf for x, _ in known):
                axes.axhline(
                    known[0][1].mean,
                    color=MUTED,
                    linestyle="--",
                    linewidth=1.2,
                    label=f"{label} no privacy".strip(),
                )
                continue
            _band(axes, [(levels.index(x), e) for x, e in known], LINES[drawn % len(LINES)], "-", label)
            drawn += 1
        axes.set_xticks(range(len(levels)), ["∞" if x == math.inf else f"{x:g}" for x in levels])
        axes.set_xlabel("ε, budget of each client (smaller is stronger)")
        axes.set_title(f"{_SPOKEN[metric]}, {name} questions", loc="left", fontsize=10, color=MUTED)

    caption = (
        f"ε against alignment, {_SPOKEN[metric]}, {name} questions: means with 95 % intervals over seeds"
    )
    return _draw(f"epsilon_{metric}_{split}", caption, paint)


def _follows_epsilon(firsts: pd.DataFrame, field: str) -> bool:
    """Whether a field has one value for each ε, such as noise set by a rule."""
    private = firsts[firsts["privacy.enabled"].astype(bool)]
    return field in private and bool((private.groupby(_EPSILON)[field].nunique() <= 1).all())


def _band(axes: Axes, points: list[tuple[float, Estimate]], colour: str, dash: str, label: str) -> None:
    if not points:
        return
    x = [at for at, _ in points]
    axes.plot(x, [e.mean for _, e in points], dash, color=colour, marker="o", markersize=4, label=label)
    if all(e.low is not None for _, e in points):
        low, high = ([getattr(e, side) for _, e in points] for side in ("low", "high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _curves(study: Study, split: str, name: str) -> Drawing:
    f = study.frame
    rows = f[
        (f["part"] == "predictor.own") & (f["split"] == split) & (f["metric"] == "avg") & f["round"].notna()
    ]

    def paint(axes: Axes) -> None:
        for index, condition in enumerate(study.conditions):
            mine = rows[rows["condition"] == condition]
            points = [
                (float(str(at)), Estimate.of(part["value"].tolist())) for at, part in mine.groupby("round")
            ]
            points = [(at, e) for at, e in points if math.isfinite(e.mean)]
            _band(axes, points, LINES[index % len(LINES)], "-", shorten(condition, 40))
        axes.set_xlabel("round of predictor training")
        axes.set_title(
            f"average alignment of own predictions, {name} questions", loc="left", fontsize=10, color=MUTED
        )

    caption = f"The predictor while it learns, {name} questions: means with 95 % intervals over seeds"
    return _draw(f"curve_{split}", caption, paint)


def _weights(study: Study) -> list[Drawing]:
    """How much each group counts over the steps, means over seeds; an axis for every condition that has weights."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for run, condition in study.frame.drop_duplicates("run").set_index("run")["condition"].items():
        for row in study.runs[str(run)].measurement:
            for group, value in (row.get("weights") or {}).items():
                steps = found.setdefault(condition, {}).setdefault(group, {})
                steps.setdefault(int(row["step"]), []).append(float(value))
    if not found:
        return []

    def paint(figure: Figure) -> None:
        first: Axes | None = None
        for place, (condition, groups) in enumerate(found.items(), 1):
            axes = figure.add_subplot(
                -(-len(found) // _COLUMNS), min(len(found), _COLUMNS), place, sharex=first, sharey=first
            )
            first = first or axes
            for index, group in enumerate(sorted(groups)):
                at = sorted(groups[group])
                mean = smooth([sum(groups[group][step]) / len(groups[group][step]) for step in at])
                dash = DASHES[index // len(LINES) % len(DASHES)]
                axes.plot(
                    at, mean, dash, color=LINES[index % len(LINES)], linewidth=1.3, label=shorten(group, 18),
                    marker="o" if len(at) == 1 else None, markersize=4,
                )  # fmt: skip
            axes.set_title(shorten(condition, 30), loc="left", fontsize=8, color=MUTED)
            axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
            axes.label_outer()
        figure.supxlabel("training step", fontsize=10)

    height = 0.8 + 1.9 * -(-len(found) // _COLUMNS)
    caption = "How much each group counts over the steps (all add up to 1), means over seeds, smoothed"
    return [_draw_all("weights", caption, paint, max(height, 2.8))]
