"""The study over a sweep: the tidy table, means with intervals, paired differences, and what is drawn."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from appa_secure import records
from appa_secure.errors import ConfigError, RunError
from appa_secure.report import render_study, study_markdown
from appa_secure.report.study import Estimate, load_study, write_results
from appa_secure.report.study_page import differences_table, means_heads, means_table
from appa_secure.report.study_plots import _far

SEEDS = (1, 2, 3)
SHIFT = {"average": 0.0, "min": 0.02}


def curve(level: float) -> dict[str, object]:
    part = {
        "per_group": {"a": level, "b": level - 0.1},
        "avg": level - 0.05,
        "min": level - 0.1,
        "fairness_index": 0.99,
    }
    return {"own": part, "shared": part}


@pytest.fixture(scope="module")
def sweep(make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rules over three seeds, every figure of `min` .02 above that of `average`, and a run that never ended."""
    root = tmp_path_factory.mktemp("sweep")
    noted = {"fields": ["aggregation", "seed"], "runs": {}}
    for kind in SHIFT:
        for seed in SEEDS:
            name = f"aggregation-{kind}_seed-{seed}"
            run = make_run(root / name, seed=seed, kind=kind, steps=4)
            path = run / records.SUMMARY
            summary = json.loads(path.read_text("utf-8"))
            for figures in summary["alignment"]["train"].values():
                figures["avg"] = 0.8 + 0.01 * seed + SHIFT[kind]
            ceiling = {"avg": 0.95, "min": 0.91, "min_at_avg": 0.89, "pooled": {"avg": 0.949, "min": 0.88}}
            summary["ceiling"] = ceiling | {"train": ceiling, "heldout": ceiling}
            summary["share_of_gain"] = {"train": 0.5 + 0.1 * seed, "heldout": -3.0}
            summary["gap_closed"] = {"train": {"avg": 0.8, "min": None}, "heldout": {"avg": 0.1, "min": 0.1}}
            summary["alignment"]["train"]["after"]["malformed"] = 0.003
            rate = 0.6 + 0.01 * seed + SHIFT[kind]
            summary["alignment"]["train"]["after"]["win_rate"] = {
                "per_group": {"White": rate}, "avg": rate, "min": rate - 0.1,
            }  # fmt: skip
            path.write_text(json.dumps(summary), encoding="utf-8")
            noted["runs"][name] = {"aggregation": kind, "seed": str(seed)}
            journal = records.Journal(run / records.MEASUREMENT)
            for number in (5, 10):
                journal.append({"stage": "predictor", "round": number, "train": curve(0.8 + number / 100)})
            journal.close()
    noted["runs"]["aggregation-max_seed-1"] = {"aggregation": "max", "seed": "1"}
    (root / records.SWEEP).write_text(json.dumps(noted), encoding="utf-8")
    return root


def test_every_figure_is_a_row(sweep: Path) -> None:
    study = load_study(sweep)
    write_results(study, sweep / records.RESULTS)
    frame = pd.read_parquet(sweep / records.RESULTS)
    assert len(frame) == len(study.frame)
    one = frame[(frame["run"] == "aggregation-min_seed-2") & (frame["part"] == "policy.after")]
    summary = json.loads((sweep / "aggregation-min_seed-2" / records.SUMMARY).read_text("utf-8"))
    for split in ("train", "heldout"):
        told = summary["alignment"][split]["after"]
        rows = one[one["split"] == split]
        groups = rows[rows["metric"] == "alignment"].set_index("group")["value"].to_dict()
        assert groups == pytest.approx(told["per_group"])
        overall = rows[rows["group"].isna()].set_index("metric")["value"]
        assert overall["avg"] == pytest.approx(told["avg"])
        assert overall["fairness_index"] == pytest.approx(told["fairness_index"])
        assert overall["spread"] == pytest.approx(max(groups.values()) - min(groups.values()))
    rounds = frame[frame["round"].notna()]
    assert set(rounds["round"]) == {5, 10}
    assert not frame.duplicated(["run", "part", "split", "group", "round", "metric"]).any()
    # Columns of the configuration, as they were resolved.
    assert set(frame["aggregation.kind"]) == {"average", "min"}
    assert set(frame["privacy.epsilon"]) == {8.0}
    assert not any(name in frame for name in ("output_root", "name"))


def test_shares_of_the_attainable_gain_are_columns_on_training_questions(sweep: Path) -> None:
    """Of every policy's line; a share that is unknown is a dash, and predictors have none."""
    study = load_study(sweep)
    heads, lines = means_heads("policy.after"), means_table(study, "policy.after")
    assert [line[0] for line in lines[2:]] == ["attainable: best average", "attainable: best worst group"]
    for line in lines[:2]:
        cells = dict(zip(heads, line, strict=True))
        low, high = stats.t.interval(0.95, 2, loc=70, scale=stats.sem([60, 70, 80]))
        assert cells["Min gain, %"] == f"70.0 [{low:.1f}, {high:.1f}]"
        assert cells["Avg gap closed, %"] == "80.0 [80.0, 80.0]"
        assert cells["Min gap closed, %"] == "–"
        assert cells["unreadable, %"] == "0.3 [0.3, 0.3]"
    assert "Min gain, %" not in means_heads("predictor.own")
    assert all(len(line) == len(means_heads("predictor.own")) for line in means_table(study, "predictor.own"))
    ceilings = study.frame[(study.frame["part"] == "ceiling") & (study.frame["split"] == "train")]
    assert set(ceilings["metric"]) == {"avg", "min", "min_at_avg", "pooled.avg", "pooled.min"}
    assert "Min gain: share of what can be gained" in render_study(sweep).read_text("utf-8")


def test_win_rates_are_rows_columns_and_compared(sweep: Path) -> None:
    study = load_study(sweep)
    rows = study.frame[(study.frame["run"] == "aggregation-min_seed-2") & (study.frame["split"] == "train")]
    found = rows[rows["metric"].isin(["win_rate", "lowest_win_rate"])]
    assert sorted(zip(found["metric"], found["group"].fillna(""), found["value"].round(9), strict=True)) == [
        ("lowest_win_rate", "", 0.54), ("win_rate", "", 0.64), ("win_rate", "White", 0.64),
    ]  # fmt: skip
    cells = dict(zip(means_heads("policy.after"), means_table(study, "policy.after")[1], strict=True))
    assert cells["win rate, %"].startswith("64.0 [")
    assert cells["lowest win rate, %"].startswith("54.0 [")
    lines = differences_table(study, "policy.after", study.pairs(None))
    told = {(split, figure): percent for _, split, figure, _, _, _, percent, _ in lines}
    assert told[("training", "win rate")].startswith("+3.23 [")  # the mean of .02/.61, .02/.62 and .02/.63
    assert ("held-out", "win rate") not in told


def test_intervals_are_students(sweep: Path) -> None:
    found = load_study(sweep).estimate("min", "policy.after", "train", "avg")
    values = [0.83, 0.84, 0.85]
    expected = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert found is not None
    assert (found.mean, found.low, found.high, found.n) == pytest.approx((0.84, *expected, 3))
    assert Estimate.of([0.5]) == Estimate(0.5, None, None, 1)


def test_differences_are_paired_over_seeds(sweep: Path) -> None:
    """Each seed's difference is the same .02 although the seeds differ by more than that."""
    study = load_study(sweep)
    assert study.pairs(None) == study.pairs("aggregation") == [("average", "min")]
    found = study.difference("average", "min", "policy.after", "train", "avg")
    assert found is not None
    assert found.absolute.mean == pytest.approx(0.02)
    assert found.absolute.high - found.absolute.low < 1e-9  # type: ignore[operator]
    assert found.percent.mean == pytest.approx(np.mean([100 * 0.02 / (0.8 + 0.01 * s) for s in SEEDS]))
    held = study.difference("average", "min", "policy.after", "heldout", "avg")
    a, b = (list(study.values(kind, "policy.after", "heldout", "avg").values()) for kind in SHIFT)
    assert held is not None
    if held.p is not None:
        assert held.p == pytest.approx(stats.ttest_rel(b, a).pvalue)
        t = np.mean(np.subtract(b, a)) / stats.sem(np.subtract(b, a))
        assert held.p == pytest.approx(2 * stats.t.sf(abs(t), 2))


def test_speed_is_the_first_round_at_a_level(sweep: Path) -> None:
    """The curves stand at .80 after 5 rounds and at .85 after 10."""
    study = load_study(sweep)
    assert study.rounds_to("min", "train", {1: 0.79, 2: 0.80, 3: 0.86}) == {1: 5, 2: 5, 3: None}
    assert study.rounds_to("min", "train", {1: 0.81, 9: 0.5}) == {1: 10}
    assert study.rounds_to("min", "heldout", {1: 0.1}) == {}


def test_conditions_with_one_predictor_are_one_line(sweep: Path) -> None:
    """Also where one of them has more seeds; policies are told apart whatever they score."""
    study = load_study(sweep)
    part = "predictor.shared"
    frame = study.frame.replace({"part": {"policy.after": part}})
    apart = replace(study, frame=frame)
    assert apart.names(part) == {"average": "average", "min": "min"}
    whole = frame["group"].isna() & (frame["part"] == part)
    frame = frame.assign(value=frame["value"].where(~whole, frame["seed"] / 10))
    frame = frame[(frame["condition"] == "min") | (frame["seed"] != 3)]
    one = replace(study, frame=frame)
    assert set(one.names(part).values()) == {"all (2 alike)"}
    assert [line[:2] for line in means_table(one, part)] == [["all (2 alike)", "3"]]
    assert differences_table(one, part, [("average", "min")]) == []
    policies = replace(study, frame=frame.replace({"part": {part: "policy.after"}}))
    assert [line[0] for line in means_table(policies, "policy.after")[:2]] == ["average", "min"]
    # What they have in common is their name.
    more = replace(one, conditions={c: {**own, "privacy": "dp"} for c, own in one.conditions.items()})
    assert set(more.names(part).values()) == {"privacy dp (2 alike)"}


def test_options_of_a_system_do_not_keep_it_from_the_average_rule(sweep: Path, tmp_path: Path) -> None:
    noted = {"fields": ["aggregation", "system", "system.eta", "seed"], "runs": {}}
    for number, varied in enumerate([{"aggregation": "average"}, {"system": "grdpo", "system.eta": "0"}]):
        (tmp_path / f"r{number}").symlink_to(sweep / "aggregation-min_seed-1")
        noted["runs"][f"r{number}"] = {**varied, "seed": "1"}
    (tmp_path / records.SWEEP).write_text(json.dumps(noted), encoding="utf-8")
    assert load_study(tmp_path).pairs(None) == [("average", "system grdpo, eta 0")]


def test_the_price_of_privacy_is_taken_against_runs_without_it(sweep: Path, tmp_path: Path) -> None:
    noted = {"fields": ["aggregation", "privacy", "privacy.epsilon", "seed"], "runs": {}}
    levels = [{"privacy": "off"}, *({"privacy": "dp", "privacy.epsilon": e} for e in ("8", "1"))]
    for number, varied in enumerate([{"aggregation": a, **level} for level in levels for a in SHIFT]):
        (tmp_path / f"r{number}").symlink_to(sweep / "aggregation-min_seed-1")
        noted["runs"][f"r{number}"] = {**varied, "seed": "1"}
    (tmp_path / records.SWEEP).write_text(json.dumps(noted), encoding="utf-8")
    assert load_study(tmp_path).pairs("privacy") == [
        (f"{rule}, privacy off", f"{rule}, privacy dp, epsilon {e}") for rule in SHIFT for e in ("8", "1")
    ]


def test_only_pairs_that_differ_in_the_field_alone_are_compared(sweep: Path, tmp_path: Path) -> None:
    """Four conditions over two fields: each field gives two pairs, without a field the first is the reference."""
    noted = {"fields": ["aggregation", "ppo.lr", "seed"], "runs": {}}
    for number, (kind, lr) in enumerate([("average", "1"), ("average", "2"), ("min", "1"), ("min", "2")]):
        (tmp_path / f"r{number}").symlink_to(sweep / f"aggregation-{kind}_seed-1")
        noted["runs"][f"r{number}"] = {"aggregation": kind, "ppo.lr": lr, "seed": "1"}
    (tmp_path / records.SWEEP).write_text(json.dumps(noted), encoding="utf-8")
    study = load_study(tmp_path)
    assert study.pairs("ppo.lr") == [("average, lr 1", "average, lr 2"), ("min, lr 1", "min, lr 2")]
    assert study.pairs("aggregation") == [("average, lr 1", "min, lr 1"), ("average, lr 2", "min, lr 2")]
    # Rules are compared with the average where all else is the same.
    assert study.pairs(None) == study.pairs("aggregation")
    found = study.difference("average, lr 1", "min, lr 1", "policy.after", "train", "avg")
    assert found is not None
    assert found.p is None  # one seed tells nothing of chance
    assert found.absolute.low is None
    assert study.pairs("aggregation=min") == [
        ("min, lr 1", "average, lr 1"), ("min, lr 2", "average, lr 2"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"--by data\.path.*one of aggregation, ppo\.lr"):
        study.pairs("data.path")
    with pytest.raises(ConfigError, match=r"--by ppo\.lr=3: .*one of ppo\.lr=1, ppo\.lr=2"):
        study.pairs("ppo.lr=3")


def test_the_report_shows_tables_figures_and_what_is_missing(sweep: Path) -> None:
    page = render_study(sweep, "aggregation").read_text("utf-8")
    assert "min − average" in page
    assert "NOT PRIVATE" in page
    assert "aggregation-max_seed-1" in page
    figures = {path.name for path in (sweep / "figures").iterdir()}
    assert figures == {"weights.png"} | {
        f"{name}_{split}.png" for name in ("plane", "groups", "curve") for split in ("train", "heldout")
    }
    text = study_markdown(sweep)
    assert "| min | 3 | 0.8400 [" in text
    assert "Not finished: aggregation-max_seed-1" in text
    assert "No ledger pays for a choice" in text
    assert not math.isnan(load_study(sweep).frame["value"].sum())


def test_a_study_of_several_data_sets_is_taken_apart(sweep: Path, tmp_path: Path) -> None:
    """Each is compared with its own average rule, and reached from the top; long tables of differences open on demand."""
    noted = {"fields": ["experiment", "aggregation", "seed"], "runs": {}}
    for experiment in ("one", "two"):
        for kind in ("average", "min"):
            (tmp_path / f"{experiment}-{kind}").symlink_to(sweep / f"aggregation-{kind}_seed-1")
            varied = {"experiment": experiment, "aggregation": kind, "seed": "1"}
            noted["runs"][f"{experiment}-{kind}"] = varied
    (tmp_path / records.SWEEP).write_text(json.dumps(noted), encoding="utf-8")
    panels = load_study(tmp_path).panels()
    assert [title.split(", ")[0] for title, _ in panels] == ["one", "two"]
    assert [panel.pairs(None) for _, panel in panels] == [[("average", "min")]] * 2
    page = render_study(tmp_path).read_text("utf-8")
    assert re.findall(r'<a href="#(.+?)">(\w+)', page) == [("part-1", "one"), ("part-2", "two")]
    assert re.findall(r'<h2 id="(.+?)">(\w+)', page) == [("part-1", "one"), ("part-2", "two")]
    assert {path.name[:2] for path in (tmp_path / "figures").iterdir()} == {"1_", "2_"}
    assert "<details open><summary>Paired differences" in page  # two splits, few figures
    text = study_markdown(tmp_path)
    assert text.index("### one, ") < text.index("| min − average |") < text.index("### two, ")


def test_a_plane_leaves_out_what_would_hide_the_differences_between_all_others() -> None:
    close = {"a": 0.900, "b": 0.905, "c": 0.897, "d": 0.902}
    assert _far(close | {"broken": 0.03}) == {"broken"}
    assert _far(close | {"worse": 0.85}) == set()
    assert _far({"one": 0.9, "other": 0.1}) == set()
    assert _far({}) == set()


def test_a_folder_that_is_no_sweep_or_has_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"sweep\.json"):
        load_study(tmp_path)
    (tmp_path / records.SWEEP).write_text(json.dumps({"fields": [], "runs": {"r": {}}}), encoding="utf-8")
    with pytest.raises(RunError, match="none of its runs"):
        load_study(tmp_path)
