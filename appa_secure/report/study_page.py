"""The report of a sweep: tables over seeds as Markdown and HTML, plots as SVG in the page and PNG beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from appa_secure import __version__
from appa_secure.errors import ConfigError
from appa_secure.records import REPORT, RESULTS, atomic_write
from appa_secure.report import study_plots
from appa_secure.report.html import environment, figure
from appa_secure.report.study import (
    COMPARED,
    METRICS,
    PARTS,
    REACHED,
    SPLITS,
    WINS,
    Difference,
    Estimate,
    Study,
    load_study,
    write_results,
)
from appa_secure.report.tables import Row, choice_note, markdown
from appa_secure.report.words import banner

FIGURES = "figures"
SPEED = (
    "Rounds until the predictor first has 99 % of the average alignment that the first of each pair ends with"
)
_DIGITS = {"avg": 4, "min": 4, "fairness_index": 4}


def render_study(root: Path, by: str | None = None) -> Path:
    """Write results.parquet, figures/*.png and report.html of the sweep in `root`; returns the page's path.

    by: what is compared, as `Study.pairs` reads it. Raises RunError where no run has finished and ConfigError for a field
    that does not vary, or a value that no run has.
    """
    study = load_study(root)
    study.pairs(by)  # refuses a field that does not vary
    write_results(study, root / RESULTS)
    (root / FIGURES).mkdir(exist_ok=True)
    panels = []
    for number, (title, panel) in enumerate(found := study.panels(), 1):
        drawings = study_plots.drawings(panel)
        for drawing in drawings:
            name = drawing.name if len(found) == 1 else f"{number}_{drawing.name}"
            atomic_write(root / FIGURES / f"{name}.png", drawing.png)
        figures = [(drawing.caption, figure(drawing.svg, drawing.caption)) for drawing in drawings]
        panels.append((title, _parts(panel, by), speed_table(panel, _pairs(panel, by)), figures))
    page = environment.get_template("study.html").render(
        name=root.resolve().name,
        speed_title=SPEED,
        runs=len(study.runs),
        panels=panels,
        heads=(DIFFERENCE_HEADS, SPEED_HEADS),
        missing=study.missing,
        choice=choice_note([Row(name, run) for name, run in study.runs.items()]),
        not_private=any(banner(run) for run in study.runs.values()),
        version=__version__,
    )
    atomic_write(root / REPORT, page)
    return root / REPORT


def study_markdown(root: Path, by: str | None = None) -> str:
    """The same tables for a document."""
    study = load_study(root)
    study.pairs(by)
    blocks = []
    for title, panel in study.panels():
        blocks += [f"### {title}\n"] if title else []
        for name, heads, means, differences in _parts(panel, by):
            blocks.append(f"{name}:\n")
            blocks.append(markdown(heads, means))
            if differences:
                blocks.append("Paired differences over the same seeds:\n")
                blocks.append(markdown(DIFFERENCE_HEADS, differences))
        if speed := speed_table(panel, _pairs(panel, by)):
            blocks.append(f"{SPEED}:\n")
            blocks.append(markdown(SPEED_HEADS, speed))
    if study.missing:
        blocks.append(f"Not finished: {', '.join(study.missing)}\n")
    return "\n".join(blocks) + choice_note([Row(name, run) for name, run in study.runs.items()])


def _pairs(panel: Study, by: str | None) -> list[tuple[str, str]]:
    """Within one panel a field may not vary, or be what sets the panels apart, and a value may be missing."""
    try:
        return panel.pairs(by)
    except ConfigError:  # not so in the whole study: `pairs` was asked there first
        return panel.pairs(None)


def _parts(panel: Study, by: str | None) -> list[tuple[str, list[str], list[list[str]], list[list[str]]]]:
    """(title, heads of the means, means, differences) of every part that was measured."""
    pairs = _pairs(panel, by)
    return [
        (PARTS[part], means_heads(part), means_table(panel, part), differences_table(panel, part, pairs))
        for part in panel.parts()
    ]


def means_heads(part: str) -> list[str]:
    """Heads of `means_table`."""
    figures = [f"{split} {name}" for split in SPLITS.values() for name in METRICS.values()]
    return ["", "seeds", *figures, *(name for name, *_ in _shares(part)), "ε"]


def means_table(study: Study, part: str) -> list[list[str]]:
    """A line per condition: mean over seeds and 95 % interval of Avg, Min and FI on training and held-out questions; of a
    policy also what it reached of what is attainable on its training questions, and which share of its answers there
    cannot be read. Conditions that share a name (`Study.names`) are one line, of the one with most seeds."""
    lines = []
    names = study.names(part)
    for name in dict.fromkeys(names.values()):
        same = [condition for condition, own in names.items() if own == name]
        condition = max(same, key=lambda c: len(study.values(c, part, "train", "avg")))
        found = [study.estimate(condition, part, split, metric) for split in SPLITS for metric in METRICS]
        if all(one is None for one in found):
            continue
        seeds = max(one.n for one in found if one is not None)
        texts = [
            _estimate(one, _DIGITS[metric]) for one, metric in zip(found, list(METRICS) * 2, strict=True)
        ]
        shares = [
            _estimate(study.estimate(condition, where, "train", metric), 1, unit=100.0)
            for _, where, metric in _shares(part)
        ]
        lines.append([name, str(seeds), *texts, *shares, _epsilon(study, condition)])
    return [*lines, *_attainable(study)] if part == "policy.after" else lines


def _attainable(study: Study) -> list[list[str]]:
    """What any policy can reach, means over the runs: at the best average, and at the best worst group."""
    f = study.frame[study.frame["part"] == "ceiling"]
    means = f.groupby(["split", "metric"])["value"].mean()
    lines = []
    for name, metrics in (
        ("best average", ("avg", "min_at_avg")),
        ("best worst group", ("avg_at_min", "min")),
    ):
        found = [means.get((split, metric)) for split in SPLITS for metric in metrics]
        texts = ["–" if value is None else f"{value:.4f}" for value in found]
        if any(value is not None for value in found):
            rest = ["–"] * (len(_shares("policy.after")) + 1)
            lines.append([f"attainable: {name}", "–", *texts[:2], "–", *texts[2:], "–", *rest])
    return lines


def _shares(part: str) -> list[tuple[str, str, str]]:
    """Further columns of a part, in percent: head, part and metric."""
    if part != "policy.after":
        return []
    reached = [(f"{name}, %", "run", metric) for metric, (_, name) in REACHED.items()]
    wins = [(f"{name}, %", part, metric) for metric, name in WINS.items()]
    return [*reached, *wins, ("unreadable, %", part, "malformed")]


DIFFERENCE_HEADS = ["", "questions", "figure", "seeds", "difference", "bootstrap", "in %", "p"]


def differences_table(study: Study, part: str, pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """A line per pair of conditions of different names, split and figure."""
    lines = []
    names = study.names(part)
    named: dict[tuple[str, str], tuple[str, str]] = {}
    for reference, other in pairs:
        if names[reference] != names[other]:
            named.setdefault((names[reference], names[other]), (reference, other))
    for (first, second), (reference, other) in named.items():
        for split, name in SPLITS.items():
            for metric, figure_name in COMPARED.items():
                found = study.difference(reference, other, part, split, metric)
                if found is not None:
                    lines.append([f"{second} − {first}", name, figure_name, *_difference(found)])
    return lines


SPEED_HEADS = ["", "questions", "seeds", "rounds", "reached by"]
_SHARE = 0.99


def speed_table(study: Study, pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Rounds until a predictor's average alignment first reaches 99 % of what the pair's reference ends with, per seed.

    A line per condition; empty where no curve was measured. Rounds are those that were measured
    (evaluation.predictor_every), means over the seeds that reached the level.
    """
    lines = []
    for split, name in SPLITS.items():
        for reference, other in dict.fromkeys(pair for a, b in pairs for pair in ((a, a), (a, b))):
            final = study.values(reference, "predictor.own", split, "avg")
            found = study.rounds_to(other, split, {seed: _SHARE * value for seed, value in final.items()})
            reached = [float(number) for number in found.values() if number is not None]
            if found:
                mean = _estimate(Estimate.of(reached), 1) if reached else "–"
                lines.append([other, name, str(len(found)), mean, f"{len(reached)} of {len(found)}"])
    return lines


def _difference(d: Difference) -> list[str]:
    p = "–" if d.p is None else "< .001" if d.p < 0.001 else f"{d.p:.3f}"
    b = "–" if d.bootstrap is None else f"{d.bootstrap[0]:+.4f} to {d.bootstrap[1]:+.4f}"
    return [str(d.absolute.n), _estimate(d.absolute, 4, "+"), b, _estimate(d.percent, 2, "+"), p]


def _estimate(e: Estimate | None, digits: int, sign: str = "", unit: float = 1.0) -> str:
    if e is None:
        return "–"
    text = f"{unit * e.mean:{sign}.{digits}f}"
    if e.low is None or e.high is None:
        return text
    return f"{text} [{unit * e.low:{sign}.{digits}f}, {unit * e.high:{sign}.{digits}f}]"


def _epsilon(study: Study, condition: str) -> str:
    """What the clients spent at most, over the seeds."""
    f = study.frame
    spent = f[(f["condition"] == condition) & (f["metric"] == "epsilon")]["value"]
    return "off" if spent.empty else f"{spent.max():.2f}"
