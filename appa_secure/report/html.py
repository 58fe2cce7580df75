"""The HTML pages."""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from appa_secure import __version__
from appa_secure.records import REPORT, atomic_write
from appa_secure.report import plots, tables, words
from appa_secure.report.run import Run, load_run, lookup

environment = Environment(
    loader=PackageLoader("appa_secure.report", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
environment.filters |= {
    "number": words.number,
    "interval": words.interval,
    "percent": words.percent,
    "duration": words.duration,
    "bytes": words.size,
}


def render(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from whatever the run has recorded so far; returns its path.

    Raises RunError if `run_dir` holds nothing of a run.
    """
    run = load_run(run_dir)
    page = environment.get_template("run.html").render(**_context(run))
    atomic_write(run_dir / REPORT, page)
    return run_dir / REPORT


def compare(run_dirs: Sequence[Path], output: Path | None = None) -> tuple[str, Path]:
    """A Markdown table over several runs, and the path of an HTML page with that table and Avg-Min plots.

    The page goes to `output`, by default `comparison.html` beside the first run.
    """
    rows = tables.load_rows(run_dirs)
    target = run_dirs[0].resolve().parent / "comparison.html" if output is None else output
    alone = len({row.label for row in rows}) == len(rows)
    figures = []
    for split, name in (("train", "training questions"), ("heldout", "held-out questions")):
        points: dict[str, tuple[float, float]] = {}
        for row in rows:
            after = row.run.alignment(split, "after")
            if after is not None:
                label = row.label if alone else f"{row.label}, seed {row.seed}"
                points[_unique(label, points)] = (after.avg, after.min)
        if points:
            alt = "; ".join(
                f"{label}: average {x:.3f}, worst-off {y:.3f}" for label, (x, y) in points.items()
            )
            figures.append((name.capitalize(), figure(plots.average_against_worst(points, name), alt)))
    page = environment.get_template("comparison.html").render(
        heads=tables.HEADS,
        lines=[tables.cells(row) for row in rows],
        figures=figures,
        notes=[f"{row.run.path.resolve().name}: {note}" for row in rows for note in row.run.notes],
        not_private=any(words.banner(row.run) for row in rows),
        version=__version__,
    )
    atomic_write(target, page)
    return tables.comparison_markdown(rows), target


def _unique(label: str, taken: Mapping[str, Any]) -> str:
    count = 2
    name = label
    while name in taken:
        name, count = f"{label} #{count}", count + 1
    return name


def figure(svg: str | None, alt: str) -> Markup | None:
    """An <img> that carries `svg` inside: in an image a browser runs no scripts and loads nothing."""
    if svg is None:
        return None
    data = base64.b64encode(svg.encode()).decode()
    return Markup('<img alt="{}" src="data:image/svg+xml;base64,{}">').format(alt, data)


def audit_page(text: str, figures: Sequence[tuple[str, Markup | None]]) -> str:
    """The page of a privacy audit: its Markdown, then its (name, image)s."""
    return environment.get_template("audit.html").render(
        text=statement_html(text), figures=figures, version=__version__
    )


def statement_html(text: str) -> Markup:
    """A privacy statement, written in Markdown, as HTML; tags in it are shown, not obeyed. Headings become h3."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = "h3"
    page = parser.renderer.render(tokens, parser.options, {})
    page = page.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    return Markup(page)


# --- what the page shows ------------------------------------------------------------------------------------


def _context(run: Run) -> dict[str, Any]:
    packages = run.summary.get("packages") or {}
    return {
        "title": str(run.get("name") or run.path.resolve().name),
        "version": __version__,
        "run": run,
        "banner": words.banner(run),
        "headline": words.headline(run),
        "facts": _facts(run),
        "group_rows": _group_rows(run),
        "totals": _totals(run),
        "figures": _figures(run),
        "secagg": words.secagg(run),
        "secagg_facts": _secagg_facts(run),
        "seconds": _seconds(run),
        "privacy": words.privacy(run),
        "statement": statement_html(run.statement) if run.statement else None,
        "aggregation": words.aggregation(run),
        "predictor": words.predictor(run),
        "measure": words.measure(run),
        "audit": _audit(run),
        "packages": run.environment or "\n".join(f"{name} {version}" for name, version in packages.items()),
    }


def _facts(run: Run) -> list[tuple[str, str]]:
    """The figures at a glance, each with what it is."""
    facts = []
    for split, name in (("train", "trained questions"), ("heldout", "unseen questions")):
        before, after = run.alignment(split, "before"), run.alignment(split, "after")
        if before and after:
            facts.append((f"{before.avg:.3f} → {after.avg:.3f}", f"average agreement, {name}"))
            if split == "train":
                facts.append((f"{before.min:.3f} → {after.min:.3f}", f"worst-off group, {name}"))
    if run.dp_enabled is False:
        facts.append(("none", "differential privacy"))
    elif run.largest_epsilon is not None:
        facts.append((f"ε {run.largest_epsilon:.2f}", "privacy spent (largest of any client)"))
    if run.secagg_mode:
        mode = str(run.secagg_mode)
        seen = {"blind": "sums only", "cohort": "group averages", "clear": "everything sent"}.get(mode, mode)
        facts.append((seen, f"what the coordinator sees ({mode})"))
    return facts


def _group_rows(run: Run) -> list[dict[str, Any]]:
    after = run.alignment("train", "after") or run.alignment("heldout", "after")
    if after is None:
        return []
    rows = []
    for name in _in_order(run, after.per_group):
        row: dict[str, Any] = {"name": name}
        for split in ("train", "heldout"):
            for when in ("before", "after"):
                one = run.alignment(split, when)
                row[f"{split}_{when}"] = None if one is None else one.per_group.get(name)
        rows.append(row)
    return rows


def _in_order(run: Run, names: Mapping[str, float]) -> list[str]:
    """Groups in the order of the summary, any others behind."""
    return [name for name in run.groups if name in names] + [name for name in names if name not in run.groups]


def _totals(run: Run) -> list[dict[str, Any]]:
    rows = []
    for name, which, digits in (
        ("Average", "avg", 3),
        ("Worst-off group", "min", 3),
        ("Fairness index", "fairness", 4),
    ):
        row: dict[str, Any] = {"name": name, "digits": digits}
        for split in ("train", "heldout"):
            for when in ("before", "after"):
                one = run.alignment(split, when)
                row[f"{split}_{when}"] = None if one is None else getattr(one, which)
                row[f"{split}_{when}_ci"] = None if one is None else getattr(one, f"ci_{which}", None)
            row[f"{split}_ceiling"] = run.ceiling(split, which)
            row[f"{split}_gap"] = words.gap_closed(run, split, which) if which != "fairness" else None
        rows.append(row)
    for name, place in (
        ("Win rate over the model before", "win_rate.avg"),
        ("Lowest win rate of a group", "win_rate.min"),
        ("Unreadable answers", "malformed"),
    ):
        row = {"name": name, "digits": 3}
        for split in ("train", "heldout"):
            for when in ("before", "after"):
                row[f"{split}_{when}"] = lookup(run.summary, f"alignment.{split}.{when}.{place}")
                row[f"{split}_{when}_ci"] = None
            row |= {f"{split}_ceiling": None, f"{split}_gap": None}
        rows.append(row)
    return rows


def _figures(run: Run) -> dict[str, Markup | None]:
    """Every figure that the records allow, with a text for those who cannot see it."""

    def spoken(split: str) -> str:
        before, after = run.alignment(split, "before"), run.alignment(split, "after")
        if before is None or after is None:
            return ""
        return "; ".join(
            f"{name}: {words.number(before.per_group.get(name))} before, {value:.3f} after"
            for name, value in after.per_group.items()
        )

    epsilon = "; ".join(f"{name}: epsilon {value:.2f}" for name, value in run.epsilon.items())
    return {
        "train": figure(plots.before_after(run, "train"), spoken("train")),
        "heldout": figure(plots.before_after(run, "heldout"), spoken("heldout")),
        "intervals": figure(plots.train_and_heldout(run), "The same figures as in the table of averages."),
        "alignment": figure(
            plots.alignment_over_steps(run), "Alignment of each group over the training steps."
        ),
        "fairness": figure(plots.fairness_over_steps(run), "Fairness index over the training steps."),
        "weights": figure(plots.weights_over_steps(run), "Weight of each group over the training steps."),
        "history": figure(
            plots.history_over_steps(run), "Mean and soft minimum of the groups over the steps."
        ),
        "reward": figure(plots.reward_over_steps(run), "Mean reward over the training steps."),
        "epsilon": figure(plots.epsilon_per_client(run), epsilon),
    }


def _secagg_facts(run: Run) -> list[tuple[str, str]]:
    part = run.summary.get("secagg") or {}
    rounds = [row for row in run.transcript if row.get("event") == "round"]
    facts: list[tuple[str, str]] = []
    if part.get("rounds") is not None or rounds:
        facts.append(("Rounds opened", str(part.get("rounds", len(rounds)))))
    dropouts = part.get("dropouts")
    if dropouts is None and rounds:
        dropouts = sum(len(row.get("dropouts", [])) for row in rounds)
    if dropouts is not None:
        facts.append(("Clients that dropped out of a round", "none" if dropouts == 0 else str(dropouts)))
    aborts = sum(row.get("event") == "abort" for row in run.transcript)
    if run.transcript:
        facts.append(("Rounds given up without opening anything", "none" if not aborts else str(aborts)))
    sent = part.get("bytes_per_client_and_round")
    for kind, count in sent.items() if isinstance(sent, Mapping) else ():
        facts.append((f"Sent per client and round, {kind}", words.size(count)))
    return facts


def _seconds(run: Run) -> list[tuple[str, float, float]]:
    """Stage, seconds, share of the longest."""
    longest = max(run.seconds.values(), default=0.0) or 1.0
    return [(words.STAGES.get(name, name), value, value / longest) for name, value in run.seconds.items()]


def _audit(run: Run) -> dict[str, Any]:
    head = run.transcript[-1].get("hash", "") if run.transcript else ""
    stated = run.summary.get("transcript_head")
    fault = run.transcript_fault
    if fault is None and stated and stated != head:
        fault = f"it ends with another hash than summary.json states ({stated})"
    clients = Counter(str(row["client"]) for row in run.ledger if "client" in row)
    return {
        "rows": len(run.transcript),
        "head": head,
        "fault": fault,
        "events": sorted(Counter(str(row.get("event")) for row in run.transcript).items()),
        "ledger": len(run.ledger),
        "clients": sorted(clients.items()),
    }
