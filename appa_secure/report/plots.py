"""The report's figures, as SVG. Each shows one thing, labels it directly, and survives black-and-white print.

Colours are from the palette of Okabe and Ito (2008), made for the common forms of colour blindness.
Text stays text in the SVG, so that a browser draws group names of any script.
"""

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from appa_secure.report.run import Run, lookup

INK, MUTED, FAINT, PALE = "#1a1a1a", "#6b6b6b", "#dddddd", "#a8c8de"
BLUE, ORANGE = "#0072b2", "#d55e00"
# The palette's light colours are darkened: labels are written in them.
LINES = (BLUE, ORANGE, "#00865f", "#b5568c", "#000000", "#9a6b00", "#3d9bd6", "#7a5195")
DASHES = ("-", "--", ":", "-.")  # a second sign beside colour where there are more groups than colours
WIDTH = 4.9  # inches; shown at 390 to 560 CSS pixels, so that 10 pt stays readable on a phone

_MOST = 30  # clients in a figure

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10.0,
    "text.parse_math": False,  # a group may be called "$x$"
    "svg.fonttype": "none",
    "svg.hashsalt": "appa-secure",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def _draw(height: float, paint: Callable[[Axes], None]) -> str:
    with rc_context(STYLE), warnings.catch_warnings():
        # A glyph that is missing here concerns the layout only: the browser draws the text.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def shorten(name: str, limit: int = 22) -> str:
    """A group's name cut to what fits beside a plot."""
    name = " ".join(name.split())
    return name if len(name) <= limit else name[: limit - 1] + "…"


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Positions for labels at `values` that keep `gap` between neighbours and move as little as is simple.

    Sorted labels that collide are merged into blocks, each centred on the mean of its values.
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    blocks: list[list[int]] = []
    centres: list[float] = []
    for index in order:
        blocks.append([index])
        centres.append(values[index])
        while len(blocks) > 1 and centres[-1] - centres[-2] < gap * (len(blocks[-1]) + len(blocks[-2])) / 2:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
            centres[-2:] = [sum(values[member] for member in blocks[-1]) / len(blocks[-1])]
    placed = [0.0] * len(values)
    for block, centre in zip(blocks, centres, strict=True):
        for rank, member in enumerate(block):
            placed[member] = centre + gap * (rank - (len(block) - 1) / 2)
    return placed


def _text(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    """Write `text` at `offset` points from the data point `at`."""
    defaults: dict[str, Any] = {"fontsize": 9, "va": "center"}
    axes.annotate(text, at, offset, textcoords="offset points", **(defaults | style))


def _value_axis(axes: Axes, label: str) -> None:
    """Values run to the right, names stand on the left."""
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(label)


def before_after(run: Run, split: str) -> str | None:
    """Each group's alignment before (hollow) and after (solid) training; orange: worst off afterwards."""
    before, after = run.alignment(split, "before"), run.alignment(split, "after")
    if before is None or after is None:
        return None
    start = before.per_group
    end = {name: value for name, value in after.per_group.items() if name in start}
    names = sorted(end, key=start.__getitem__)
    if not names:
        return None
    worst = min(names, key=end.__getitem__)

    def paint(axes: Axes) -> None:
        low = min(min(start[name], end[name]) for name in names)
        high = max(max(start[name], end[name]) for name in names)
        room = max(high - low, 0.02)
        for row, name in enumerate(names):
            old, new = start[name], end[name]
            colour = ORANGE if name == worst else BLUE
            axes.plot([old, new], [row, row], color=colour, linewidth=2.4, alpha=0.45, zorder=1)
            axes.plot(
                old,
                row,
                "o",
                markersize=7,
                markerfacecolor="white",
                markeredgecolor=MUTED,
                markeredgewidth=1.5,
            )
            axes.plot(new, row, "o", markersize=8, color=colour)
            outward = 1 if new >= old else -1
            for value, side, tone in ((new, outward, colour), (old, -outward, MUTED)):
                _text(
                    axes,
                    f"{value:.3f}",
                    (value, row),
                    (7 * side, 0),
                    ha="left" if side > 0 else "right",
                    color=tone,
                )
        top = len(names) - 1
        apart = abs(end[names[top]] - start[names[top]]) > 0.2 * room  # else the two words would overlap
        for value, word in ((start[names[top]], "before"), (end[names[top]], "after")) if apart else ():
            _text(axes, word, (value, top), (0, 9), ha="center", va="bottom", color=MUTED)
        axes.set_yticks(range(len(names)), [shorten(name) for name in names])
        axes.spines["left"].set_visible(False)
        axes.set_xlim(low - 0.22 * room, high + 0.22 * room)
        axes.set_ylim(-0.6, len(names) - 0.1)
        _value_axis(axes, "alignment score (1 = answers exactly like the group)")

    return _draw(1.1 + 0.30 * len(names), paint)


def _lines(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], label: str, height: float) -> str:
    """Lines with their names at their right ends. `series` maps a name to (x, y)."""
    signs = [(LINES[k % len(LINES)], DASHES[k // len(LINES) % len(DASHES)]) for k in range(len(series))]

    def paint(axes: Axes) -> None:
        for (colour, dash), (x, y) in zip(signs, series.values(), strict=True):
            axes.plot(x, y, color=colour, linestyle=dash, marker="o" if len(x) == 1 else None)
        low, high = axes.get_ylim()
        # 13 points per label in an axis that is 0.75 inches lower than its figure
        places = spread([y[-1] for _, y in series.values()], 13 / 72 / (height - 0.75) * (high - low))
        axes.set_ylim(min(low, *places), max(high, *places))
        for (colour, _), name, place in zip(signs, series, places, strict=True):
            axes.annotate(
                shorten(name, 18),
                (1, place),
                (6, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center",
                color=colour,
                fontsize=9.5,
            )
        first, last = min(x[0] for x, _ in series.values()), max(x[-1] for x, _ in series.values())
        axes.set_xlim(first, max(last, first + 1))
        _steps(axes, label)

    return _draw(height, paint)


def _steps(axes: Axes, label: str) -> None:
    axes.set_xlabel("training step")
    axes.set_title(label, loc="left", fontsize=10, color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def smooth(values: Sequence[float], reach: int = 4) -> list[float]:
    """Moving average over each value and up to `reach` neighbours on each side."""
    windows = [values[max(0, index - reach) : index + reach + 1] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _column(rows: Sequence[Mapping[str, object]], key: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of `key`, leaving out the rows without it."""
    points = [
        (float(step), float(value))
        for row in rows
        if isinstance(step := row.get("step"), int)
        and isinstance(value := row.get(key), int | float)
        and math.isfinite(value)
    ]
    return [step for step, _ in points], [value for _, value in points]


def _per_group(rows: Sequence[Mapping[str, object]], key: str) -> dict[str, tuple[list[float], list[float]]]:
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        values, step = row.get(key), row.get("step")
        if isinstance(values, Mapping) and isinstance(step, int):
            for name, value in values.items():
                if isinstance(value, int | float):
                    x, y = series.setdefault(str(name), ([], []))
                    x.append(step)
                    y.append(float(value))
    return series


def _height(lines: int) -> float:
    return max(2.9, 0.9 + 0.21 * lines)


def alignment_over_steps(run: Run) -> str | None:
    """Measured alignment of each group with the rollouts of each step, smoothed."""
    series = {name: (x, smooth(y)) for name, (x, y) in _per_group(run.measurement, "per_group").items()}
    return _lines(series, "alignment score, smoothed", _height(len(series))) if series else None


def weights_over_steps(run: Run) -> str | None:
    """Weight of each group in the reward, where it was measured, smoothed."""
    series = {name: (x, smooth(y)) for name, (x, y) in _per_group(run.measurement, "weights").items()}
    if not series:
        return None
    return _lines(series, "weight of each group, smoothed (all add up to 1)", _height(len(series)))


def history_over_steps(run: Run) -> str | None:
    """What the coordinator itself knows of the groups: their mean history and its soft minimum."""
    named = {"mean of the groups": "h_mean", "soft minimum": "soft_min"}
    series = {name: column for name, key in named.items() if (column := _column(run.steps, key))[0]}
    return _lines(series, "estimated alignment history", 2.9) if series else None


def reward_over_steps(run: Run) -> str | None:
    """The reward that the policy was trained on: each step, and smoothed."""
    x, y = _column(run.steps, "reward")
    if not x:
        return None

    def paint(axes: Axes) -> None:
        axes.plot(x, y, color="#a8c8de", linewidth=1, marker="o" if len(x) == 1 else None)
        axes.plot(x, smooth(y), color=BLUE)
        axes.set_xlim(x[0], max(x[-1], x[0] + 1))
        _steps(axes, "mean reward per step, and smoothed (bold)")

    return _draw(2.9, paint)


def fairness_over_steps(run: Run) -> str | None:
    """Fairness index of each step as the coordinator computed it, with the threshold tau."""
    x, y = _column(run.steps, "fi")
    if not x:
        return None
    tau = run.get("aggregation.tau") if run.get("aggregation.kind") == "appa" else None

    def paint(axes: Axes) -> None:
        axes.plot(x, y, color=PALE, linewidth=1, marker="o" if len(x) == 1 else None)
        axes.plot(x, smooth(y), color=BLUE)
        axes.set_xlim(x[0], max(x[-1], x[0] + 1))
        if isinstance(tau, int | float):
            low, high = axes.get_ylim()
            room = max(high - low, 1e-4)
            axes.set_ylim(min(low, tau - 0.25 * room), max(high, tau + 0.15 * room))
            axes.axhline(tau, color=ORANGE, linewidth=1.2, linestyle="--")
            axes.annotate(
                f"threshold {tau:g}: equal weights above",
                (1, tau),
                (0, -3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                color=ORANGE,
                fontsize=9.5,
                va="top",
                ha="right",
            )
        _steps(axes, "fairness index (1 = all groups alike), smoothed in bold")
        axes.ticklabel_format(axis="y", useOffset=False)

    return _draw(2.9, paint)


def epsilon_per_client(run: Run) -> str | None:
    """Epsilon spent by each client, beside the budget."""
    spent = run.epsilon
    if not spent:
        return None
    budget = lookup(run.config, "privacy.epsilon")
    names = sorted(spent, key=spent.__getitem__)[-_MOST:] if len(spent) > _MOST else list(reversed(spent))

    def paint(axes: Axes) -> None:
        axes.barh(range(len(names)), [spent[name] for name in names], height=0.62, color=BLUE)
        limit = max(spent.values()) * 1.05
        if isinstance(budget, int | float):
            limit = max(limit, budget * 1.05)
            axes.axvline(budget, color=ORANGE, linewidth=1.4, linestyle="--")
            _text(
                axes, f"budget {budget:g}", (budget, len(names) - 0.45), (-4, 2),
                ha="right", va="bottom", color=ORANGE, annotation_clip=False,
            )  # fmt: skip
        for row, name in enumerate(names):
            inside = spent[name] > 0.25 * limit
            style = {"ha": "right", "color": "white"} if inside else {"ha": "left", "color": BLUE}
            _text(axes, f"{spent[name]:.2f}", (spent[name], row), (-5 if inside else 5, 0), **style)
        axes.set_yticks(range(len(names)), [shorten(name) for name in names])
        axes.set_xlim(0, limit or 1)
        axes.set_ylim(-0.6, len(names) + 0.35)
        more = f", the {_MOST} highest of {len(spent)}" if len(spent) > _MOST else ""
        _value_axis(axes, f"ε spent (smaller is stronger){more}")
        axes.grid(visible=False)

    return _draw(1.1 + 0.28 * len(names), paint)


def train_and_heldout(run: Run) -> str | None:
    """Average and worst-off group, training and held-out questions, with 95 % intervals and ceilings."""
    rows = [
        (f"{word}, {text}", before, after, which, run.ceiling(split, which))
        for split, text in (("train", "training"), ("heldout", "held-out"))
        for which, word in (("avg", "average"), ("min", "worst-off"))
        if (before := run.alignment(split, "before")) and (after := run.alignment(split, "after"))
    ]
    rows.reverse()
    if not rows:
        return None
    right = 0.22 if any(row[-1] is not None for row in rows) else 0.02  # room for the words beside a ceiling

    def paint(axes: Axes) -> None:
        for place, (_, before, after, which, ceiling) in enumerate(rows):
            for word, one, y, colour in (
                ("before", before, place + 0.17, MUTED),
                ("after", after, place - 0.17, BLUE),
            ):
                value, bounds = getattr(one, which), getattr(one, f"ci_{which}")
                if bounds is not None:
                    axes.plot(bounds, [y, y], color=colour, linewidth=1.6, zorder=1)
                fill = colour if word == "after" else "white"
                axes.plot(
                    value, y, "o", markersize=7, color=colour, markerfacecolor=fill, markeredgewidth=1.5
                )
                edge = value if bounds is None else min(value, bounds[0])
                _text(axes, f"{word} {value:.3f}", (edge, y), (-7, 0), ha="right", color=colour)
            if ceiling is not None:
                axes.plot([ceiling] * 2, [place - 0.36, place + 0.36], color=ORANGE, linewidth=2)
                _text(
                    axes, f"ceiling\n{ceiling:.3f}", (ceiling, place), (5, 0), color=ORANGE, linespacing=1.1
                )
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_ylim(-0.6, len(rows) - 0.25)
        low, high = axes.get_xlim()
        axes.set_xlim(low - 0.3 * (high - low), high + right * (high - low))
        _value_axis(axes, "alignment score, with 95 % intervals")

    return _draw(0.8 + 0.72 * len(rows), paint)


def average_against_worst(points: Mapping[str, tuple[float, float]], split: str) -> str:
    """One dot per run: average alignment across, worst-off group's up. Up and right is better."""

    def paint(axes: Axes) -> None:
        axes.margins(0.18, 0.12)
        for index, (x, y) in enumerate(points.values()):
            axes.plot(x, y, "o", markersize=8, color=LINES[index % len(LINES)])
        low, high = axes.get_ylim()
        places = spread([y for _, y in points.values()], 13 / 72 / 2.6 * (high - low))
        for index, ((name, point), place) in enumerate(zip(points.items(), places, strict=True)):
            axes.annotate(
                shorten(name, 26),
                point,
                (1.02, place),
                textcoords=("axes fraction", "data"),
                color=LINES[index % len(LINES)],
                fontsize=9.5,
                va="center",
                annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.8, "shrinkB": 5},
            )
        axes.set_xlabel(f"average group, {split}")
        axes.set_title("worst-off group", loc="left", fontsize=10, color=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)

    return _draw(3.5, paint)
