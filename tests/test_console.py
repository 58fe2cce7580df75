"""Tables for people: right figures in right places, and nothing invented where a figure is missing."""

from typing import Any

from rich.console import Console
from rich.table import Table

from appa_secure import console
from appa_secure.config import compose


def shown(table: Table) -> str:
    recorder = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    recorder.print(table)
    return recorder.export_text()


def part(low: float, high: float) -> dict[str, Any]:
    return {
        "per_group": {"Coast": low, "Hills": high},
        "avg": (low + high) / 2,
        "min": low,
        "fairness_index": 0.9,
    }


def test_comparison_shows_the_worst_epsilon_and_missing_figures_as_dashes() -> None:
    full = {
        "alignment": {"train": {"after": part(0.3, 0.6)}, "heldout": {"after": part(0.2, 0.4)}},
        "privacy": {"epsilon": {"Coast": 3.0, "Hills": 7.5}},
        "seconds": {"align": 10.0, "predictor": 5.0},
    }
    text = shown(console.comparison([({"seed": "1"}, full), ({"seed": "2"}, {}), ({"seed": "3"}, None)]))
    first, second, third = (line for line in text.splitlines() if line.startswith("│"))
    assert [cell.strip() for cell in first.split("│")[1:-1]] == [
        "1", "0.450 / 0.300", "0.300 / 0.200", "0.9000", "7.50", "15",
    ]  # fmt: skip
    assert "– / –" in second
    assert "did not finish" in third


def test_a_comparison_with_a_run_that_is_not_private_says_so() -> None:
    rows = [
        ({"seed": str(i)}, {"stamp": stamp}) for i, stamp in enumerate(("private", "not private", "private"))
    ]
    assert "not private" in shown(console.comparison(rows))
    assert "not private" in shown(console.comparison([({}, {})]))  # no stamp, no promise
    assert "not private" not in shown(console.comparison([rows[0], rows[2], ({"seed": "3"}, None)]))


def test_choices_name_what_is_not_private() -> None:
    text = " ".join(shown(console.choices(compose(["privacy=off", "evaluation.truth=false"]))).split())
    assert "not private" in text
    private = " ".join(
        shown(console.choices(compose(["evaluation.truth=false", "privacy.secure_rng=true"]))).split()
    )
    assert "epsilon 8, delta 1e-06 per response and client" in private
    assert "not private" not in private
