"""GlobalOpinionQA: gaps, structural zeros, broken rows, both file forms, the choice of countries."""

import json
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from appa_secure.data import Survey, load
from appa_secure.data.globalopinionqa import DEFAULT_COUNTRIES, _unfold, densest_groups
from appa_secure.data.source import is_nonresponse
from appa_secure.errors import DataError


def config(path: Path, **changes: object) -> SimpleNamespace:
    fields = {
        "kind": "globalopinionqa", "path": str(path), "groups": None, "ordinal_only": False,
        "nominal_respondents": None, "min_groups": None,
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


def row(country: str, shares: list[float], qid: object = 1, options: object = None) -> dict[str, object]:
    names = options if options is not None else ["Good", "Bad", "DK/Refused"][: len(shares)]
    return {
        "qid": qid,
        "question": f"Question {qid}?",
        "options": names,
        "country": country,
        "distribution": shares,
    }


def survey_of(tmp_path: Path, rows: list[object], **changes: object) -> Survey:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return load(config(file, **{"groups": ["A", "B"], **changes}), 1)


def test_eight_countries_of_the_experiment(shared: Path) -> None:
    """The source is sparse: few questions were put to all eight, hundreds to three of them or more."""
    path = shared / "data/globalopinionqa"
    sizes = {n: len(load(config(path, min_groups=n), 1).questions) for n in (3, 4)}
    assert sizes == {3: 363, 4: 163}
    survey = load(config(path, min_groups=3), 1)
    assert tuple(group.name for group in survey.groups) == DEFAULT_COUNTRIES
    for group in survey.groups:
        assert group.nominal
        asked = [q.qid for q in survey.questions if group.has(q.qid)]
        assert len(asked) >= 105
        assert all(group.counts[qid].sum() == pytest.approx(1000) for qid in asked)
    for q in survey.questions:
        assert q.ordinals is None
        assert not any(is_nonresponse(option) for option in q.options)
        truth = np.stack([g.distribution(q.qid) for g in survey.groups if g.has(q.qid)])
        assert len(truth) >= 3
        assert (truth.max(axis=0) > 0).all()
        assert not ((truth == 0).any(axis=0) & (truth.max(axis=0) >= 0.1)).any()
    assert survey.dropped["question with structural zeros"] > 10


def test_densest_groups_against_trying_every_set(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows = [row(c, [0.4, 0.6], qid=q) for q in range(40) for c in "ABCDEF" if rng.random() < 0.5]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for least in (2, 3):

        def usable(chosen: tuple[str, ...], least: int = least) -> int:
            return sum(
                sum(r["qid"] == q and r["country"] in chosen for r in rows) >= least for q in range(40)
            )

        countries, found = densest_groups(str(file), 3, least)
        assert found == max(usable(chosen) for chosen in combinations("ABCDEF", 3)) == usable(countries)
        assert len(load(config(file, groups=list(countries), min_groups=least), 1).questions) == found


def test_counts_are_shares_of_the_nominal_respondents_without_refusals(tmp_path: Path) -> None:
    survey = survey_of(
        tmp_path, [row("A", [0.6, 0.2, 0.2]), row("B", [0.5, 0.5, 0.0])], nominal_respondents=400
    )
    assert survey.questions[0].options == ("Good", "Bad")
    assert np.allclose(survey.groups[0].counts["1"], [300, 100])
    assert np.allclose(survey.groups[1].counts["1"], [200, 200])
    assert survey.dropped == {"option recording a refusal or don't know": 1}


def test_gaps_are_zero_counts_only_where_the_configuration_allows_them(tmp_path: Path) -> None:
    rows = [row("A", [0.5, 0.5]), row("B", [0.4, 0.6]), row("A", [0.1, 0.9], qid=2)]
    strict = survey_of(tmp_path, rows)
    assert [q.qid for q in strict.questions] == ["1"]
    assert strict.dropped == {"question asked in fewer than 2 of the selected countries": 1}
    loose = survey_of(tmp_path, rows, min_groups=1)
    assert [loose.groups[1].has(q) for q in ("1", "2")] == [True, False]
    assert loose.groups[1].counts["2"].tolist() == [0, 0]


FIVE = ["Good", "Bad", "Good thing", "Bad thing", "Both (VOL)"]


@pytest.mark.parametrize(
    ("options", "a", "b", "kept"),
    [
        (FIVE, [0.5, 0.5, 0, 0, 0], [0, 0, 0.5, 0.4, 0.1], None),  # two waves merged
        (FIVE, [0.5, 0.5, 0, 0, 0], [0.4, 0.6, 0, 0, 0], None),  # half of what was read out is empty
        (["Yes", "No", "Both (VOL)"], [0.5, 0.5, 0], [0.4, 0.5, 0.1], None),  # offered in one country only
        (["Yes", "No", "Both (VOL)"], [0.5, 0.5, 0], [0.4, 0.55, 0.05], ("Yes", "No", "Both (VOL)")),
        (["Yes", "No", "Both (VOL)"], [0.5, 0.5, 0], [0.4, 0.6, 0], ("Yes", "No")),  # chosen by nobody
        (["Yes", "No"], [1.0, 0.0], [0.95, 0.05], ("Yes", "No")),
    ],
)
def test_structural_zeros(
    tmp_path: Path, options: list[str], a: list[float], b: list[float], kept: object
) -> None:
    rows = [
        row("A", a, 1, options),
        row("B", b, 1, options),
        row("A", [0.5, 0.5], 2),
        row("B", [0.5, 0.5], 2),
    ]
    survey = survey_of(tmp_path, rows)
    assert survey.dropped.get("question with structural zeros", 0) == (kept is None)
    assert [q.options for q in survey.questions] == ([kept] if kept else []) + [("Good", "Bad")]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (row("A", [0.5, 0.2]), "do not add up"),
        (row("A", [0.5, -0.5]), "negative"),
        (row("A", [float("nan"), 1.0]), "negative"),
        (row("A", [1.0], 1, ["Good", "Bad"]), "differing numbers"),
        (row("A", [0.5, 0.5], 1, ["Good", "Good"]), "repeated"),
        (row("A", [0.5, 0.5], 1, "Good, Bad"), "without options"),
        (row("", [0.5, 0.5]), "country"),
        (row("A", [0.5, 0.5], None), "qid"),
        (row("B", [0.5, 0.5], 2), "repeating"),
        (row("A", [0.5, 0.5], 2, ["Bad", "Good"]), "options differ"),
    ],
)
def test_broken_rows_are_dropped_and_counted(tmp_path: Path, broken: object, reason: str) -> None:
    rows = [row("B", [0.5, 0.5], 2), row("A", [0.2, 0.8], 3), row("B", [0.3, 0.7], 3), broken]
    survey = survey_of(tmp_path, rows)
    assert [q.qid for q in survey.questions] == ["3"]
    assert sum(count for why, count in survey.dropped.items() if reason in why) == 1


def test_refused_by_most_and_too_many_options(tmp_path: Path) -> None:
    many = [f"Option {i}" for i in range(11)]
    rows = [row(c, [0.2, 0.2, 0.6]) for c in "AB"] + [row(c, [1 / 11] * 11, 2, many) for c in "AB"]
    with pytest.raises(
        DataError, match=r"most of a country refused: 1; question with more than 10 options: 1"
    ):
        survey_of(tmp_path, rows)


def test_configuration_that_cannot_be(tmp_path: Path) -> None:
    rows = [row("A", [0.5, 0.5]), row("B", [0.4, 0.6])]
    for changes, message in (
        ({"ordinal_only": True}, "data.ordinal_only"),
        ({"nominal_respondents": 0}, "data.nominal_respondents"),
        ({"groups": ["A", "Atlantis"]}, "'Atlantis'"),
        ({"min_groups": 3}, "data.min_groups"),
    ):
        with pytest.raises(DataError, match=message):
            survey_of(tmp_path, rows, **changes)
    (tmp_path / "rows.jsonl").write_text('{"qid": 1}\nnot json\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not JSON"):
        load(config(tmp_path, groups=["A"]), 1)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"no \.jsonl file"):
        load(config(empty, groups=["A"]), 1)


def test_hub_form_is_unfolded_without_running_anything() -> None:
    hub = {
        "qid": 4,
        "question": "Q?",
        "options": "['Good', 'Bad']",
        "selections": "defaultdict(<class 'list'>, {'A': [0.25, 0.75], 'B (Old sample)': [0.5, 0.5]})",
    }
    rows = list(_unfold(hub))
    assert rows[0] == {
        "qid": 4,
        "question": "Q?",
        "options": ["Good", "Bad"],
        "country": "A",
        "distribution": [0.25, 0.75],
    }
    assert [r["country"] for r in rows] == ["A", "B (Old sample)"]
    with pytest.raises(DataError, match="selections"):
        list(_unfold({**hub, "selections": "{'A': __import__('os')}"}))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("DK/Refused", "Don't know", "Don’t know/Refused", "No answer/refused", "Refused (VOL)"), True),
        (("Missing; Not available", "Other missing; Multiple answers Mail (EVS)", "INAP: No internet"), True),
        (("Not sure", "None at all", "Don't know what that is", "No", "Both (VOL)", "Nothing"), False),
        (("I do not know anyone", "Refused refugees", "Namibia", "Missing persons"), False),
    ],
)
def test_what_counts_as_no_answer(options: tuple[str, ...], expected: bool) -> None:
    assert {option: is_nonresponse(option) for option in options} == dict.fromkeys(options, expected)
