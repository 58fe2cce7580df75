"""Plots over the runs of a sweep: every mean with its 95 % interval over seeds."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from appa_secure.report.plots import FAINT, LINES, MUTED, STYLE, shorten
from appa_secure.report.study import METRICS, SPLITS, Estimate, Study

_EPSILON = "privacy.epsilon"
_DPI = 200


@dataclass(frozen=True)
class Drawing:
    """One figure, as SVG for the page and PNG for everything else."""

    name: str
    caption: str
    svg: str
    png: bytes


def drawings(study: Study) -> list[Drawing]:
    """What the sweep's data allow: the Avg-Min plane, ε against alignment, and the predictor while it learns."""
    parts = study.parts()
    part = next((p for p in ("policy.after", "predictor.own") if p in parts), None)
    found = []
    if part is not None:
        for split, name in SPLITS.items():
            found.append(_plane(study, part, split, name))
            found += [_against_epsilon(study, part, split, name)] if _has_epsilons(study) else []
            found += [_curves(study, split, name)] if study.frame["round"].notna().any() else []
    return found


def _draw(name: str, caption: str, paint: Callable[[Axes], None]) -> Drawing:
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        axes.grid(color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
    return Drawing(name, caption, svg.getvalue(), png.getvalue())


def _plane(study: Study, part: str, split: str, name: str) -> Drawing:
    def paint(axes: Axes) -> None:
        for index, condition in enumerate(study.conditions):
            colour = LINES[index % len(LINES)]
            x, y = (study.estimate(condition, part, split, metric) for metric in ("avg", "min"))
            if x is None or y is None:
                continue
            axes.errorbar(
                x.mean, y.mean, xerr=_reach(x), yerr=_reach(y), fmt="o", color=colour, markersize=6, linewidth=1.2,
                label=shorten(condition, 40),
            )  # fmt: skip
            one, other = (study.values(condition, part, split, metric) for metric in ("avg", "min"))
            axes.plot(
                [one[s] for s in one], [other[s] for s in one], ".", color=colour, markersize=3, alpha=0.6
            )
        axes.set_xlabel(f"average group, {name} questions")
        axes.set_title("worst-off group", loc="left", fontsize=10, color=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(5))

    caption = f"Average against worst-off group, {name} questions: means and 95 % intervals over seeds, dots are seeds"
    return _draw(f"plane_{split}", caption, paint)


def _reach(e: Estimate) -> float:
    return 0.0 if e.high is None else e.high - e.mean


def _has_epsilons(study: Study) -> bool:
    frame = study.frame
    return _EPSILON in frame and frame[frame["privacy.enabled"].astype(bool)][_EPSILON].nunique() > 1


def _against_epsilon(study: Study, part: str, split: str, name: str) -> Drawing:
    """Conditions that differ in ε and what follows from it are one line; runs without privacy are a line across."""
    firsts = study.frame.drop_duplicates("condition").set_index("condition")
    private = firsts["privacy.enabled"].astype(bool)
    series: dict[tuple[str, ...], list[tuple[float, str]]] = {}
    keys = [f for f in study.fields if f not in ("seed", _EPSILON) and not _follows_epsilon(firsts, f)]
    for condition in study.conditions:
        if private[condition]:
            rest = tuple(study.conditions[condition].get(key, "") for key in keys)
            series.setdefault(rest, []).append((float(firsts[_EPSILON][condition]), condition))

    def paint(axes: Axes) -> None:
        for index, (rest, points) in enumerate(series.items()):
            colour = LINES[index % len(LINES)]
            for metric, dash in (("avg", "-"), ("min", "--")):
                known = [(x, e) for x, c in sorted(points) if (e := study.estimate(c, part, split, metric))]
                label = f"{' '.join(word for word in rest if word)} {METRICS[metric]}".strip()
                _band(axes, known, colour, dash, shorten(label, 40))
        for condition in study.conditions:
            if not private[condition]:
                for metric, dash in (("avg", "-"), ("min", "--")):
                    e = study.estimate(condition, part, split, metric)
                    if e is not None:
                        label = f"no privacy {METRICS[metric]}"
                        axes.axhline(e.mean, color=MUTED, linestyle=dash, linewidth=1.2, label=label)
                break
        axes.set_xscale("log")
        ticks = sorted({x for points in series.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("ε, budget of each client (smaller is stronger)")
        axes.set_title(f"alignment, {name} questions", loc="left", fontsize=10, color=MUTED)

    caption = f"ε against alignment, {name} questions: means with 95 % intervals over seeds"
    return _draw(f"epsilon_{split}", caption, paint)


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
