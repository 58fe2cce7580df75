"""Sentences say what the figures say."""

from pathlib import Path
from typing import Any

import pytest

from appa_secure.aggregation import BUILT_IN
from appa_secure.report.run import Run
from appa_secure.report.words import (
    RULES,
    SYSTEMS,
    aggregation,
    banner,
    duration,
    gap_closed,
    headline,
    number,
    privacy,
    size,
)
from appa_secure.systems import KINDS


def run(before: dict[str, float], after: dict[str, float], ci: list[float] | None = None, **more: Any) -> Run:
    def side(scores: dict[str, float], bounds: list[float] | None) -> dict[str, Any]:
        return {
            "per_group": scores,
            "avg": sum(scores.values()) / len(scores),
            "min": min(scores.values()),
            "fairness_index": 0.99,
            "ci95": {"avg": bounds, "min": None},
        }

    alignment = {"train": {"before": side(before, None), "after": side(after, ci)}}
    return Run(path=Path(), summary={"groups": list(after), "alignment": alignment} | more)


@pytest.mark.parametrize(
    ("after", "ci", "expected"),
    [
        (0.9, [0.88, 0.92], "rose from 0.800 to 0.900"),
        (0.7, [0.68, 0.72], "fell from 0.800 to 0.700"),
        (0.81, [0.79, 0.83], "did not clearly change (0.800 before, 0.810 after)"),
        (0.8, None, "stayed from 0.800 to 0.800"),
    ],
)
def test_a_change_counts_only_outside_the_interval(
    after: float, ci: list[float] | None, expected: str
) -> None:
    assert expected in headline(run({"A": 0.8}, {"A": after}, ci))[1]


def test_the_worst_off_group_is_named_before_and_after() -> None:
    text = headline(run({"A": 0.7, "B": 0.8}, {"A": 0.9, "B": 0.85}))[1]
    assert "the worst-off group was A at 0.700 and is now B at 0.850" in text
    text = headline(run({"A": 0.7, "B": 0.8}, {"A": 0.75, "B": 0.9}))[1]
    assert "the worst-off group, A, went from 0.700 to 0.750" in text


def test_the_gap_is_measured_from_before_to_the_ceiling() -> None:
    one = run({"A": 0.7, "B": 0.9}, {"A": 0.8, "B": 0.9}, ceiling={"avg": 0.9, "min": 0.9})
    assert gap_closed(one, "train") == pytest.approx(0.5)
    assert gap_closed(one, "train", "min") == pytest.approx(0.5)
    assert gap_closed(one, "heldout") is None
    assert "gained 50 % of what any model could have gained" in headline(one)[1]
    assert gap_closed(run({"A": 0.9}, {"A": 0.9}, ceiling={"avg": 0.9}), "train") is None
    assert gap_closed(run({"A": 0.7}, {"A": 0.8}), "train") is None


def test_answers_that_could_not_be_read_are_mentioned() -> None:
    one = run({"A": 0.7}, {"A": 0.8})
    assert "form asked for" not in headline(one)[1]
    one.summary["alignment"]["train"]["after"]["malformed"] = 0.25
    assert headline(one)[1].endswith("25 % of the model's answers were not in the form asked for.")


def test_what_is_unknown_counts_as_not_protected() -> None:
    found = banner(Run(path=Path()))
    assert found is not None
    assert found.title == "NOT PRIVATE"
    assert "do not say" in found.reasons[0]


def test_a_stamp_without_a_known_reason_is_still_shown() -> None:
    summary = {"stamp": "not private", "secagg": {"mode": "blind"}, "privacy": {"epsilon": {"A": 1.0}}}
    found = banner(Run(path=Path(), summary=summary))
    assert found is not None
    assert "marked itself" in found.reasons[0]


def test_epsilon_is_explained_by_the_odds_it_allows() -> None:
    spent = {"enabled": True, "unit": "response", "delta": 1e-6, "epsilon": {"A": 0.5, "B": 1.0}}
    text = " ".join(privacy(Run(path=Path(), summary={"privacy": spent})))
    assert "largest ε of any client is 1.00" in text
    assert "factor of at most 2.7, except with a probability of 1 in 1,000,000" in text
    assert "one person's answer to one question" in text


def test_units_fit_their_size() -> None:
    assert [size(count) for count in (0, 999, 3264, 31_000, 1_250_000, 2.5e9)] == [
        "0 bytes", "999 bytes", "3.3 kB", "31 kB", "1.2 MB", "2.5 GB",
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (0.4, 12.3, 59.9, 188, 3599.7, 7260)] == [
        "0.4 s", "12 s", "60 s", "3 min 08 s", "1 h 00 min", "2 h 01 min",
    ]  # fmt: skip
    assert number(None) == "–"


def test_the_rule_is_the_systems_where_it_is_not_an_aggregation() -> None:
    assert {"appa", *SYSTEMS} == set(KINDS)
    config = {"aggregation": {"kind": "min"}}
    assert aggregation(Run(path=Path(), config=config)).startswith("min: ")
    assert aggregation(Run(path=Path(), config={**config, "system": {"kind": "appa"}})).startswith("min: ")
    found = aggregation(Run(path=Path(), config={**config, "system": {"kind": "maxmin"}}))
    assert found == f"maxmin: {SYSTEMS['maxmin']}"


def test_every_rule_has_words() -> None:
    assert set(BUILT_IN) == set(RULES)
