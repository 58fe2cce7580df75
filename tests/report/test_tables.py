"""Tables over one run and over several."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

from rich.console import Console

from appa_secure.report import results_markdown, terminal_table
from appa_secure.report.run import load_run
from appa_secure.report.tables import load_rows, markdown

MakeRun = Callable[..., Path]


def shown(run: Path, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(terminal_table(json.loads((run / "summary.json").read_text())))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_terminal_table_fits_80_columns_and_shows_every_group(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "run", steps=1, groups=("North", "[red]South[/red]", "C", "D", "E"))
    summary = json.loads((run / "summary.json").read_text())
    lines = shown(run).splitlines()
    assert all(len(line) <= 80 for line in lines)
    for name in summary["groups"]:
        line = next(line for line in lines if f"│ {name} " in line)
        for split in ("train", "heldout"):
            sides = summary["alignment"][split]
            before, after = (sides[when]["per_group"][name] for when in ("before", "after"))
            assert f"{before:.3f}" in line
            assert f"{after:.3f}" in line
            assert f"{after - before:+.3f}" in line
    assert "…" not in "".join(lines)


def test_without_truth_the_terminal_table_says_so(tmp_path: Path, make_run: MakeRun) -> None:
    text = shown(make_run(tmp_path / "run", steps=1, truth=False))
    assert text.count("not measured (evaluation.truth=false)") == 8


def test_runs_are_named_by_what_sets_them_apart(tmp_path: Path, make_run: MakeRun) -> None:
    runs = [
        make_run(tmp_path / "a", steps=1, kind="appa"),
        make_run(tmp_path / "b", steps=1, kind="min"),
        make_run(tmp_path / "c", steps=1, kind="min", seed=2),
    ]
    assert [row.label for row in load_rows(runs)] == ["appa", "min", "min"]
    assert [row.label for row in load_rows([runs[1], runs[2]])] == ["demo", "demo"]
    other = make_run(tmp_path / "d", steps=2, kind="appa", dp=False)
    assert [row.label for row in load_rows([runs[0], other])] == [
        "steps 1, enabled True",
        "steps 2, enabled False",
    ]


def test_results_put_seeds_together(tmp_path: Path, make_run: MakeRun) -> None:
    runs = [make_run(tmp_path / str(seed), steps=1, seed=seed) for seed in (1, 2, 3)]
    lone = make_run(tmp_path / "min", steps=1, kind="min")
    lines = results_markdown([*runs, lone]).strip().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:] if line.startswith("|")] == [
        "before training",
        "appa, mean (range)",
        "min",
    ]
    after = [
        json.loads((run / "summary.json").read_text())["alignment"]["train"]["after"] for run in (*runs, lone)
    ]
    averages = [one["avg"] for one in after[:3]]
    assert f"| {sum(averages) / 3:.3f} ({min(averages):.3f} to {max(averages):.3f}) |" in lines[3]
    assert "| 1 2 3 |" in lines[3]
    low, high = after[3]["ci95"]["avg"]
    assert f"[{low:.3f}, {high:.3f}]" in lines[4]


def test_a_table_says_what_choosing_among_its_runs_costs(tmp_path: Path, make_run: MakeRun) -> None:
    """A ledger pays for one run. The choice among several is stamped, or summed up, and never free by silence."""
    measured = [make_run(tmp_path / f"m{i}", steps=1, seed=i) for i in (1, 2)]
    kept = [make_run(tmp_path / f"k{i}", steps=1, seed=i, truth=False) for i in (1, 2)]
    assert "\nnot private: " in results_markdown(measured)
    assert "\nnot private: " in results_markdown([*kept, measured[0]])
    told = results_markdown(kept)
    assert "not private" not in told
    total = sum(max(load_run(run).epsilon.values()) for run in kept)
    assert f"cost up to ε = {total:.2f}" in told
    assert "cost up to" not in results_markdown(kept[:1])


def test_an_unfinished_run_is_marked(tmp_path: Path, make_run: MakeRun) -> None:
    runs = [make_run(tmp_path / "a", steps=2), make_run(tmp_path / "b", steps=2, kind="min", finished=False)]
    assert "| min (unfinished) |" in results_markdown(runs)


def test_markdown_cells_cannot_break_the_table() -> None:
    table = markdown(("a", "b"), [("x|y\n<b>", "1")])
    assert table == "| a | b |\n|---|---:|\n| x\\|y \\<b\\> | 1 |\n"
