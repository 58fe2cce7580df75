"""What the commands print for people: what a run is about to do, and several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from appa_secure.config import Config
from appa_secure.config_notes import notes

# Standard output carries paths only, so that commands can be chained; everything for people goes here.
people = Console(stderr=True)


def choices(config: Config) -> Table:
    """The choices of a run that decide what it computes and what it protects."""
    c = config
    names = f"{c.data.known_groups} groups" if c.data.known_groups else "all groups"
    data = c.data.kind if c.data.path is None else f"{c.data.kind} from {c.data.path}"
    privacy = (
        f"epsilon {c.privacy.epsilon:g}, delta {c.privacy.delta:g} per {c.privacy.unit} and client"
        if c.privacy.enabled
        else "off"
    )
    rows = (
        ("experiment", f"{c.experiment}, seed {c.seed}"),
        ("data", f"{data}, {names}"),
        ("policy", c.policy.kind + (f" from {c.policy.path}" if c.policy.path else "")),
        ("reward", f"{c.task.reward}, {_system(c)}"),
        ("secure aggregation", f"{c.secagg.mode}, federation {c.federation.kind}"),
        ("privacy", privacy),
        (
            "alignment",
            "none: the run ends with the predictor"
            if c.until == "predictor"
            else f"{c.ppo.steps} steps of {c.ppo.prompts_per_step} x {c.ppo.generations} answers",
        ),
    )
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    for note in notes(c):
        table.add_row(Text("note", style="bold yellow"), Text(note))
    return table


NO_CHOICE = (
    "not private: at least one of these runs was measured against true answers or ran without protection. "
    "No ledger pays for a choice made by such figures."
)


def comparison(rows: Sequence[tuple[Mapping[str, str], Mapping[str, Any] | None]]) -> Table:
    """One line per run: what was varied, and the figures of its summary (None: the run did not finish)."""
    ended = any(summary is not None and _at(summary, ("alignment",)) for _, summary in rows)
    what = "Alignment after training" if ended else "Alignment of the predictor"
    table = Table(title=f"{what} (avg / min), fairness index, privacy", title_justify="left")
    varied = list(dict.fromkeys(key for keys, _ in rows for key in keys))
    for key in varied:
        table.add_column(key, overflow="fold")
    for title in ("train", "held-out", "FI", "epsilon", "s"):
        table.add_column(title, justify="right", no_wrap=True)
    for keys, summary in rows:
        cells = _figures(summary) if summary is not None else ("did not finish", "–", "–", "–", "–")
        table.add_row(*(Text(keys.get(key, "")) for key in varied), *cells)
    if any(summary is not None and summary.get("stamp") != "private" for _, summary in rows):
        table.caption, table.caption_justify = Text(NO_CHOICE), "left"
    return table


def _figures(summary: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    train, heldout = ("alignment", "train", "after"), ("alignment", "heldout", "after")
    if _at(summary, ("until",)) == "predictor":
        train, heldout = ("predictor", "train", "own"), ("predictor", "heldout", "own")
    epsilon = _at(summary, ("privacy", "epsilon"))
    worst = max(epsilon.values(), default=None) if isinstance(epsilon, Mapping) else epsilon
    seconds = _at(summary, ("seconds",))
    total = sum(seconds.values()) if isinstance(seconds, Mapping) else seconds
    return (
        f"{_number(_at(summary, (*train, 'avg')))} / {_number(_at(summary, (*train, 'min')))}",
        f"{_number(_at(summary, (*heldout, 'avg')))} / {_number(_at(summary, (*heldout, 'min')))}",
        _number(_at(summary, (*train, "fairness_index")), 4),
        _number(worst, 2),
        _number(total, 0),
    )


def _system(c: Config) -> str:
    if c.system.kind != "appa":
        return f"system {c.system.kind}"
    return (
        f"aggregation appa ({c.aggregation.variant})"
        if c.aggregation.kind == "appa"
        else f"aggregation {c.aggregation.kind}"
    )


def _at(tree: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _number(value: Any, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "–"
