"""Tables over one run (terminal) and over several runs (Markdown)."""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from appa_secure.console import NO_CHOICE
from appa_secure.report.run import Run, load_run, lookup
from appa_secure.report.words import banner, duration, gap_closed, number, percent

# Fields in which runs differ without being different experiments.
_NOT_OPTIONS = (
    "name", "output_root", "seed", "federation.client_root", "predictor.origin", "policy.cache_dir",
)  # fmt: skip
COLUMNS = (
    ("train", "avg"), ("train", "min"), ("train", "fairness"),
    ("heldout", "avg"), ("heldout", "min"), ("heldout", "fairness"),
)  # fmt: skip
HEADS = (
    "run", "seed", "Avg", "Min", "FI", "held-out Avg", "held-out Min", "held-out FI", "gap closed", "Min gain", "ε",
    "masking", "time", )  # fmt: skip


def terminal_table(summary: Mapping[str, Any]) -> Table:
    """Before and after training, per group, on training and held-out questions; fits 80 columns."""
    run = Run(path=Path(), summary=dict(summary))
    table = Table(title="Agreement with each group's true answers (1 = identical)", title_justify="left")
    splits = []
    for split in ("train", "heldout"):
        before, after = run.alignment(split, "before"), run.alignment(split, "after")
        if before is not None and after is not None:
            splits.append((split, before, after))
    if not splits and (predicted := lookup(summary, "predictor")) is not None:
        return _predictor_table(run, predicted, table)
    if not splits:
        table.title = "Agreement with the groups"
        table.add_column("group")
        table.add_column("agreement")
        for name in run.groups:
            table.add_row(escape(name), "not measured (evaluation.truth=false)")
        return table
    table.add_column("group", overflow="fold")
    for split, _, _ in splits:
        heading = {"train": "training", "heldout": "held-out"}[split]
        for head in (f"{heading}\nbefore", "\nafter", "\nchange"):
            table.add_column(head, justify="right")
    measured = splits[0][2].per_group
    known = [name for name in run.groups if name in measured]
    for name in known + [name for name in measured if name not in known]:
        table.add_row(
            escape(name), *_cells([(b.per_group.get(name), a.per_group.get(name)) for _, b, a in splits])
        )
    table.add_section()
    table.add_row("average", *_cells([(b.avg, a.avg) for _, b, a in splits]), style="bold")
    table.add_row("worst-off", *_cells([(b.min, a.min) for _, b, a in splits]), style="bold")
    table.add_row("fairness index", *_cells([(b.fairness, a.fairness) for _, b, a in splits], digits=4))
    return table


def _predictor_table(run: Run, predicted: Mapping[str, Any], table: Table) -> Table:
    """Of a run that ended with the predictor: each group's own predictions, and the mean of all groups' for it."""
    table.title = "Agreement of predictions with each group's true answers (1 = identical)"
    table.add_column("group", overflow="fold")
    found = []
    for split, heading in (("train", "training"), ("heldout", "held-out")):
        for which in ("own", "shared"):
            table.add_column(f"{heading}\n{which}", justify="right")
            found.append(lookup(predicted, f"{split}.{which}") or {})
    for name in run.groups:
        table.add_row(escape(name), *(number(one.get("per_group", {}).get(name)) for one in found))
    table.add_section()
    table.add_row("average", *(number(one.get("avg")) for one in found), style="bold")
    table.add_row("worst-off", *(number(one.get("min")) for one in found), style="bold")
    table.add_row("fairness index", *(number(one.get("fairness_index"), 4) for one in found))
    return table


def _cells(pairs: Sequence[tuple[float | None, float | None]], digits: int = 3) -> list[str]:
    """Before, after and change of each pair."""
    texts = []
    for old, new in pairs:
        change = "–" if old is None or new is None else f"{new - old:+.{digits}f}"
        texts += [number(old, digits), number(new, digits), change]
    return texts


# --- several runs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One run of a comparison, and the options that set it apart, in words."""

    label: str
    run: Run

    @property
    def seed(self) -> str:
        """The run's seed, a dash if unknown."""
        return str(self.run.get("seed", "–"))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names; lists are values."""
    if not isinstance(tree, Mapping):
        return {prefix[:-1]: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.")
    return flat


def load_rows(paths: Sequence[Path]) -> list[Row]:
    """The runs, each labelled by the options in which they differ (the seed apart), or by its experiment."""
    runs = [load_run(path) for path in paths]
    flats = [flatten(run.config) for run in runs]
    names = sorted(set().union(*flats) - set(_NOT_OPTIONS))
    varied = [name for name in names if len({repr(flat.get(name)) for flat in flats}) > 1]
    varied = [name for name in varied if not _follows(name, varied, flats)]
    rows = []
    for run, flat in zip(runs, flats, strict=True):
        parts = [
            f"{_short(name, varied)} {flat[name]}".strip() for name in varied if flat.get(name) is not None
        ]
        rows.append(Row(", ".join(parts) or _experiment(run), run))
    return rows


def _experiment(run: Run) -> str:
    return str(run.get("experiment", run.path.resolve().name))


def _short(name: str, varied: Sequence[str]) -> str:
    if name in ("aggregation.kind", "system.kind"):
        return ""  # "appa" or "min" says enough
    last = name.rsplit(".", 1)[-1]
    return last if sum(other.rsplit(".", 1)[-1] == last for other in varied) == 1 and last != "kind" else name


def _follows(name: str, varied: Sequence[str], flats: Sequence[dict[str, Any]]) -> bool:
    """Whether `name` varies only because its group's `kind` does: fixed by it, missing for another kind."""
    kind = f"{name.rsplit('.', 1)[0]}.kind"
    if kind == name or kind not in varied or all(flat.get(name) is not None for flat in flats):
        return False
    seen: dict[str, set[str]] = {}
    for flat in flats:
        seen.setdefault(repr(flat.get(kind)), set()).add(repr(flat.get(name)))
    return all(len(values) == 1 for values in seen.values())


def _figure(run: Run, split: str, which: str) -> tuple[float | None, tuple[float, float] | None]:
    after = run.alignment(split, "after")
    if after is None:
        return None, None
    return getattr(after, which), getattr(after, f"ci_{which}", None)


def cells(row: Row) -> list[str]:
    """The texts of one comparison line, in the order of `HEADS`."""
    run = row.run
    texts = [row.label if run.finished else f"{row.label} (unfinished)", row.seed]
    for split, which in COLUMNS:
        value, bounds = _figure(run, split, which)
        text = number(value, 4 if which == "fairness" else 3)
        texts.append(f"{text} [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else text)
    closed = gap_closed(run, "train")
    texts.append("–" if closed is None else percent(closed))
    texts.append(_gain([run]))
    texts.append(_epsilon(run))
    texts.append(str(run.secagg_mode or "–"))
    texts.append(duration(sum(run.seconds.values())) if run.seconds else "–")
    return texts


def _gain(runs: Sequence[Run]) -> str:
    """Share of what is attainable for the worst group beyond the average objective, on training questions; the mean."""
    shares = [run.get("share_of_gain.train") for run in runs]
    known = [float(share) for share in shares if isinstance(share, int | float)]
    return percent(statistics.fmean(known)) if known else "–"


def _epsilon(run: Run) -> str:
    if run.epsilon:
        return f"{max(run.epsilon.values()):.2f}"
    return "off" if run.dp_enabled is False else "–"


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column to the left; `|`, backticks and tags in texts are escaped."""

    def line(texts: Sequence[str]) -> str:
        return (
            "| " + " | ".join(re.sub(r"([|<>`])", r"\\\1", " ".join(text.split())) for text in texts) + " |"
        )

    rule = "|---|" + "---:|" * (len(heads) - 1)
    return "\n".join([line(heads), rule, *(line(texts) for texts in lines)]) + "\n"


def comparison_markdown(rows: Sequence[Row]) -> str:
    """One line per run, and what the figures together cost."""
    return markdown(HEADS, [cells(row) for row in rows]) + choice_note(rows)


def choice_note(rows: Sequence[Row]) -> str:
    """The stamp of a table of runs: each ledger pays for one run, and none for the choice among several."""
    if any(banner(row.run) for row in rows):
        return f"\n{NO_CHOICE}\n"
    if len(rows) > 1:
        total = sum(row.run.largest_epsilon or 0.0 for row in rows)
        return (
            f"\nEach ε is one run's. Where these runs used the same people's answers, all of them together, and a choice "
            f"among them, cost up to ε = {total:.2f}; each δ counts as well.\n"
        )
    return ""


def results_markdown(run_dirs: Sequence[Path]) -> str:
    """Table for docs/results: runs that differ in their seed only become one line with mean and range over
    seeds.

    A single run keeps its own 95 % intervals. Figures are alignment after training, with the warmed-up policy
    of the first run as the line to start from.
    """
    rows = load_rows(run_dirs)
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.label, []).append(row)
    lines = [_start(rows[0].run)] if rows[0].run.alignment("train", "before") else []
    for label, members in grouped.items():
        lines.append(cells(members[0]) if len(members) == 1 else _over_seeds(label, members))
    return markdown(HEADS, lines) + choice_note(rows)


def _start(run: Run) -> list[str]:
    texts = ["before training", "–"]
    for split, which in COLUMNS:
        before = run.alignment(split, "before")
        texts.append(number(getattr(before, which) if before else None, 4 if which == "fairness" else 3))
    return texts + ["–"] * (len(HEADS) - len(texts))


def _over_seeds(label: str, members: Sequence[Row]) -> list[str]:
    runs = [row.run for row in members]
    texts = [f"{label}, mean (range)", " ".join(row.seed for row in members)]
    for split, which in COLUMNS:
        values = [value for run in runs if (value := _figure(run, split, which)[0]) is not None]
        texts.append(_range(values, 4 if which == "fairness" else 3))
    closed = [value for run in runs if (value := gap_closed(run, "train")) is not None]
    texts.append(percent(statistics.fmean(closed)) if closed else "–")
    texts.append(_gain(runs))
    texts.append(" / ".join(sorted({_epsilon(run) for run in runs})))
    texts.append(" / ".join(sorted({str(run.secagg_mode or "–") for run in runs})))
    totals = [sum(run.seconds.values()) for run in runs if run.seconds]
    texts.append(duration(statistics.fmean(totals)) if totals else "–")
    return texts


def _range(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
