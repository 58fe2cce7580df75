"""OpinionQA: the dense benchmark as published, options in order by name, and files that are broken."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from appa_secure.data import Survey, load
from appa_secure.errors import DataError


def config(path: Path, **changes: object) -> SimpleNamespace:
    fields = {
        "kind": "opinionqa",
        "path": str(path),
        "groups": None,
        "min_responses": 30,
        "ordinal_only": False,
    }
    return SimpleNamespace(**{**fields, **changes})


def similarity(p: np.ndarray, q: np.ndarray, ordinals: tuple[float, ...]) -> float:
    """1 - W1 / range, written as moving mass along the scale."""
    moved = sum(
        abs(float(np.sum(p[: k + 1]) - np.sum(q[: k + 1]))) * (ordinals[k + 1] - ordinals[k])
        for k in range(len(ordinals) - 1)
    )
    return 1 - moved / (ordinals[-1] - ordinals[0])


def test_dense_benchmark_has_438_questions_380_of_them_ordinal(shared: Path) -> None:
    survey = load(config(shared / "data/opinionqa"), 1)
    assert [g.name for g in survey.groups] == [
        "Democrat", "Republican", "Independent", "White", "Black", "Hispanic", "Male", "Female",
    ]  # fmt: skip
    assert len(survey.questions) == 438
    assert sum(q.ordinals is not None for q in survey.questions) == 380
    assert survey.dropped["question with fewer than 30 answers from a selected group"] == 494 - 438
    assert not any("refused" in option.lower() for q in survey.questions for option in q.options)
    assert all(g.counts[q.qid].sum() >= 30 for g in survey.groups for q in survey.questions)
    assert {g.nominal for g in survey.groups} == {False}


def test_reference_points_of_the_dense_benchmark(shared: Path) -> None:
    """Uniform guess and mean of the distributions score what was measured elsewhere on the same questions."""
    survey = load(config(shared / "data/opinionqa", ordinal_only=True), 1)
    assert len(survey.questions) == 380
    uniform, mean = np.zeros((2, 8, 380))
    for j, q in enumerate(survey.questions):
        truth = np.stack([g.distribution(q.qid) for g in survey.groups])
        assert q.ordinals is not None
        for i in range(8):
            uniform[i, j] = similarity(np.full(truth.shape[1], 1 / truth.shape[1]), truth[i], q.ordinals)
            mean[i, j] = similarity(truth.mean(axis=0), truth[i], q.ordinals)
    for table, avg, worst in ((uniform, 0.8245, 0.7873), (mean, 0.9483, 0.8917)):
        assert table.mean() == pytest.approx(avg, abs=5e-5)
        assert table.mean(axis=1).min() == pytest.approx(worst, abs=5e-5)


def test_counts_are_those_of_the_file_under_the_same_option_names(shared: Path) -> None:
    survey = load(config(shared / "data/opinionqa"), 1)
    raw = json.loads((shared / "data/opinionqa/SEX_data.json").read_text())
    female = next(g for g in survey.groups if g.name == "Female")
    middle = 0
    for q in survey.questions:
        cell = {o: n for o, n in raw[q.qid]["Female"].items() if o != "Refused"}
        assert dict(zip(q.options, female.counts[q.qid], strict=True)) == {
            o: cell.get(o, 0) for o in q.options
        }
        assert cell.keys() <= set(q.options)
        middle += q.ordinals is not None and 1.5 in q.ordinals
    assert middle > 40  # "about right" options between their neighbours


def test_min_responses_and_group_selection(shared: Path) -> None:
    path = shared / "data/opinionqa"
    # At least one answer is needed, under an option that both files list.
    assert len(load(config(path, min_responses=0), 1).questions) == 459
    two = load(config(path, groups=["RACE:Other", "Asian"], min_responses=10), 1)
    assert [g.name for g in two.groups] == ["RACE:Other", "Asian"]
    for groups, message in (
        (["Other"], "POLPARTY:Other or RACE:Other"),
        (["Martian"], "Martian"),
        (["Male"] * 2, "twice"),
    ):
        with pytest.raises(DataError, match=message):
            load(config(path, groups=groups), 1)


# --- small files written here ------------------------------------------------------------------------------

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a data set of one question; arguments override its parts."""

    def build(
        options: list[str] | None = None,
        mapping: str = "{1.0: 'More', 2.0: 'Less', 3.0: 'About right', 99.0: 'Refused'}",
        ordinals: str = "[1.0, 2.0, 1.5]",
        cell: object = None,
    ) -> Path:
        entry = {
            "MC_options": options or ["About right", "More", "Less", "Refused"],
            "question_text": "How much?",
            "Male": cell
            if cell is not None
            else {"Less": 3.0, "About right": 2.0, "More": 1.0, "Refused": 9.0},
        }
        for attribute in ("POLPARTY", "RACE", "SEX"):
            (tmp_path / f"{attribute}_data.json").write_text(
                json.dumps({"Q": entry if attribute == "SEX" else {**entry, "Male": {}}})
            )
        with (tmp_path / "info.csv").open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(["key", "option_mapping", "option_ordinal"])
            rows.writerow(["Q", mapping, ordinals])
        for attribute in ("POLPARTY", "RACE"):
            (tmp_path / f"{attribute}_data.json").write_text("{}")
        return tmp_path

    return build


def one(path: Path, **changes: object) -> Survey:
    return load(config(path, groups=["Male"], min_responses=1, **changes), 1)


def test_order_comes_from_the_ordinals_by_name(write: Write) -> None:
    survey = one(write())
    assert survey.questions[0].options == ("More", "About right", "Less")
    assert survey.questions[0].ordinals == (1.0, 1.5, 2.0)
    assert survey.groups[0].counts["Q"].tolist() == [1, 2, 3]
    assert survey.dropped == {"option recording a refusal or don't know": 1}


@pytest.mark.parametrize(
    "broken",
    [
        {"ordinals": "[1, 1, 1]"},
        {"ordinals": "[1.0, 2.0]"},
        {"options": ["About", "right", "More", "Less", "Refused"]},
    ],
)
def test_constant_mismatched_or_garbled_ordinals_make_a_question_nominal(
    write: Write, broken: dict[str, object]
) -> None:
    path = write(**broken)
    survey = one(path)
    assert survey.questions[0].ordinals is None
    assert survey.questions[0].options == ("More", "Less", "About right")
    with pytest.raises(DataError, match=r"no questions are left.*without usable ordinals: 1"):
        one(path, ordinal_only=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": {"More": -1.0}}, "SEX_data.json: question 'Q', group 'Male': the count of 'More'"),
        ({"cell": {"More": float("nan")}}, "finite"),
        ({"cell": [1, 2]}, "object of option: count"),
        ({"mapping": "__import__('os')"}, "info.csv:2: option_mapping"),
        ({"ordinals": "{}"}, "option_ordinal a list"),
        ({"cell": {"Never heard of": 5.0}}, "no questions are left.*info.csv does not know: 1"),
        ({"cell": {"Refused": 50.0}}, "fewer than 1 answers"),
    ],
)
def test_broken_files_are_refused_by_name(write: Write, change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        one(write(**change))


def test_missing_or_unreadable_files(tmp_path: Path, write: Write) -> None:
    with pytest.raises(DataError, match="does not exist"):
        one(tmp_path / "absent")
    path = write()
    (path / "RACE_data.json").unlink()
    with pytest.raises(DataError, match=r"lacks RACE_data\.json"):
        one(path)
    (path / "RACE_data.json").write_text("{not json")
    with pytest.raises(DataError, match=r"RACE_data\.json: not JSON"):
        one(path)
