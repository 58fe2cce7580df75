"""The command line: help that teaches, refusals before any work, paths alone on standard output."""

import json
import multiprocessing.forkserver
import re
import shlex
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer

from appa_secure import cli, config_checks, records
from appa_secure import sweep as sweeping
from appa_secure.config import GROUPS, Config, compose, options
from appa_secure.errors import ConfigError, DataError
from appa_secure.privacy.accounting import GaussianEvent
from appa_secure.privacy.ledger import Budget, Ledger
from appa_secure.privacy.output import MECHANISM, plan_output

REPO = Path(__file__).resolve().parent.parent
Ended = tuple[int, str, str]  # exit code, standard output, standard error
Call = Callable[..., Ended]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the console script's entry point in this process."""

    monkeypatch.delenv("APPA_SHARED", raising=False)

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["appa-secure", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def summary_of(config: Config) -> dict[str, object]:
    part = {"per_group": {"Coast": 0.5, "Hills": 0.25}, "avg": 0.375, "min": 0.25, "fairness_index": 0.9}
    after = {"per_group": {"Coast": 0.75, "Hills": 0.5}, "avg": 0.625, "min": 0.5, "fairness_index": 0.96}
    split = {"before": part, "after": after} if config.evaluation.truth else None
    return {
        "seed": config.seed,
        "groups": ["Coast", "Hills"],
        "alignment": {"train": split, "heldout": split},
        "privacy": {"epsilon": {"Coast": 7.5, "Hills": 7.25}},
        "seconds": {"predictor": 40.0, "align": 2.0},
    }


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Config, Path | None]]:
    """Stands in for the work itself; lists what it was asked to do."""
    calls: list[tuple[Config, Path | None]] = []

    def run(config: Config, resume: Path | None) -> Path:
        calls.append((config, resume))
        directory = resume or Path(config.output_root) / (config.name or f"{config.experiment}-{config.seed}")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / records.CONFIG).write_text(config.to_yaml(), encoding="utf-8")
        (directory / records.SUMMARY).write_text(json.dumps(summary_of(config)), encoding="utf-8")
        (directory / records.REPORT).write_text("<html>", encoding="utf-8")
        return directory

    module = types.ModuleType("appa_secure.launch")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "appa_secure.launch", module)
    monkeypatch.setattr("appa_secure.launch", module, raising=False)
    monkeypatch.chdir(tmp_path)
    return calls


# --- help ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [[], ["run"], ["sweep"], ["report"], ["fields"], ["audit"], ["audit", "verify"], ["audit", "privacy"]],
    ids=" ".join,
)
def test_help_fits_a_terminal_of_80_columns(command: list[str]) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "appa_secure.cli", *command, "--help"],
        cwd=REPO, capture_output=True, text=True, check=True,
        env={"COLUMNS": "80", "PATH": "", "PYTHONPATH": str(REPO)},
    )  # fmt: skip
    assert "Usage: appa-secure" in shown.stdout
    assert max(len(line) for line in shown.stdout.splitlines()) <= 80
    assert shown.stderr == ""


def test_help_of_run_lists_the_groups_and_main_fields(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    code, shown, _ = call("run", "--help")
    assert code == 0
    together = " ".join(shown.split())
    for group in GROUPS:
        assert re.search(rf"^ *{group} +{options(group)[0]}", shown, re.MULTILINE), group
        assert f"{group} {' '.join(options(group))} " in together
    for field in cli._MAIN_FIELDS:
        # The meaning follows on one line of its own: it was not wrapped.
        assert re.search(rf"^   {re.escape(field)} *\n       \S.*\n(   \S| *$)", shown, re.MULTILINE), field


def test_examples_in_the_help_compose(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(config_checks, "environment_problems", lambda config: [])
    for command in ("run", "sweep"):
        _, shown, _ = call(command, "--help")
        examples = re.findall(rf"^ +appa-secure ({command}.*?) *$", shown, re.MULTILINE)
        assert len(examples) > 1
        for example in examples:
            check(shlex.split(example))


def test_fields_lists_a_section(call: Call) -> None:
    code, shown, _ = call("fields", "secagg")
    assert code == 0
    assert "secagg=blind\n" in shown
    assert "secagg.ring_bits=64\n" in shown
    assert "ppo." not in shown
    assert call("fields", "nonsense")[0] == 2


# --- run ----------------------------------------------------------------------------------------------------


def test_the_last_line_of_run_is_the_directory_alone(
    call: Call, launched: list[object], tmp_path: Path
) -> None:
    code, out, err = call("run", "experiment=smoke", "seed=7", "name=a run")
    assert (code, out) == (0, "runs/a run\n")
    assert (tmp_path / out.rstrip("\n")).is_dir()
    assert "seed 7" in err
    assert re.search(r"worst-off +│? *0\.250 │? *0\.500", err)
    assert "report.html" in err


def test_run_without_truth_shows_no_table(call: Call, launched: list[object]) -> None:
    code, _, err = call("run", "evaluation.truth=false")
    assert code == 0
    assert "not measured" in err


def test_resume_takes_the_options_from_the_run(
    call: Call, launched: list[tuple[Config, Path | None]], tmp_path: Path
) -> None:
    call("run", "experiment=smoke", "seed=7", "name=first")
    code, out, _ = call("run", "--resume", "runs/first")
    assert (code, out) == (0, "runs/first\n")
    assert launched[1] == (launched[0][0], Path("runs/first"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "aggregaton=appa"], "did you mean aggregation=appa?"),
        (["run", "privacy.delta=2"], "privacy.delta=2"),
        (["run", "data.group_count=4"], "secagg.min_cohort=5"),
        (["run", "data=opinionqa"], "data.path=null"),
        (["run", "seed=1,2"], "appa-secure sweep seed=1,2"),
        (["run", "--resume", "nowhere"], "nowhere has no config.resolved.yaml"),
        (["run", "--resume", "nowhere", "seed=2"], "leave out seed=2"),
        (["sweep", "seed=1,2", "aggregation=appa,nonsense"], "no such option"),
        (["sweep", "seed=1,2", "lr=3"], "predictor.lr=3"),
        (["sweep", "seed=1,1"], "list each value once"),
        (["sweep", "name=a,b"], "give one name"),
        (["sweep", "seed=interval(1,2)"], "list the values"),
        (["report", "nowhere"], "nowhere has no config.resolved.yaml"),
        (["audit", "verify", "nowhere"], "nowhere has no config.resolved.yaml"),
        (["run", "--unknown"], "No such option"),
        (["rum"], "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_before_any_work(
    call: Call, launched: list[object], tmp_path: Path, arguments: list[str], said: str
) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert launched == []
    assert list(tmp_path.iterdir()) == []


def test_an_expected_failure_of_the_work_ends_with_code_1(
    call: Call, launched: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: Config, resume: Path | None) -> Path:
        raise DataError("answers.csv line 3: no such option 'maybe'")

    monkeypatch.setattr(sys.modules["appa_secure.launch"], "run", fail)
    code, out, err = call("run")
    assert (code, out) == (1, "")
    assert err.endswith("appa-secure: answers.csv line 3: no such option 'maybe'\n")


# --- sweep --------------------------------------------------------------------------------------------------


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, launched: list[object]) -> list[list[str]]:
    """Runs the sweep's child processes in this one; seed 13 fails. Lists their arguments."""
    started: list[list[str]] = []

    def run(arguments: list[str], log: Path | None, threads: int) -> int:
        started.append(arguments)
        if "seed=13" in arguments:
            return 1
        resume = Path(arguments[1]) if arguments[0] == "--resume" else None
        config = cli.load(resume / records.CONFIG) if resume else compose(arguments)
        sys.modules["appa_secure.launch"].run(config, resume)
        return 0

    monkeypatch.setattr(sweeping.children, "run", run)
    return started


def test_sweep_runs_every_combination_and_compares(call: Call, children: list[list[str]]) -> None:
    code, out, err = call("sweep", "experiment=smoke", "aggregation=appa,average", "seed=1,2,3", "name=both")
    assert code == 0
    assert out.splitlines() == [
        f"runs/both/aggregation-{a}_seed-{s}" for a in ("appa", "average") for s in (1, 2, 3)
    ]
    predictors = [a for a in children if "until=predictor" in a]
    assert len(predictors) == 3  # one for both rules of a seed, and before any of them
    assert children[:3] == predictors
    assert len(children) == 3 + 6
    found = [cli.load(Path(line) / records.CONFIG) for line in out.splitlines()]
    names = {cli.load(path).name for path in Path("runs/both").glob("predictor-*/config.resolved.yaml")}
    assert {c.predictor.origin for c in found} == {f"runs/both/{name}" for name in names}
    assert [(c.aggregation.kind, c.seed) for c in found] == [
        (a, s) for a in ("appa", "average") for s in (1, 2, 3)
    ]  # fmt: skip
    assert "0.625 / 0.500" in err
    assert "7.50" in err


def test_a_repeated_sweep_goes_on_and_a_new_value_adds_runs(call: Call, children: list[list[str]]) -> None:
    first = call("sweep", "experiment=smoke", "seed=1,2")[1].splitlines()
    Path(first[1], records.SUMMARY).unlink()  # as if it had been killed
    children.clear()
    code, out, err = call("sweep", "experiment=smoke", "seed=1,2,3")
    assert code == 0
    assert out.splitlines()[:2] == first
    assert children[0] == ["--resume", first[1]]
    assert len(children) == 2
    assert "seed-1: finished before, skipped" in err


def test_a_failed_run_does_not_stop_the_sweep(call: Call, children: list[list[str]]) -> None:
    code, out, err = call("sweep", "experiment=smoke", "seed=1,13,2")
    assert code == 1
    assert len(out.splitlines()) == len(children) == 3
    assert "did not finish" in err
    assert "1 of 3 runs" in err


def test_a_sweep_does_not_take_another_run_for_its_own(call: Call, children: list[list[str]]) -> None:
    directory = call("sweep", "experiment=smoke", "seed=1,2", "name=mine")[1].splitlines()[0]
    code, _, err = call("sweep", "experiment=smoke", "seed=1,2", "name=mine", "ppo.steps=2")
    assert code == 1
    assert "another configuration" in " ".join(err.split())
    assert cli.load(Path(directory) / records.CONFIG).ppo.steps == 3


def test_a_run_killed_before_it_wrote_its_options_starts_again(
    call: Call, children: list[list[str]], tmp_path: Path
) -> None:
    left = tmp_path / "runs" / "mine" / "seed-1"
    (left / "stages").mkdir(parents=True)
    (left / ".lock").touch()
    assert call("sweep", "experiment=smoke", "seed=1", "name=mine")[0] == 0
    foreign = tmp_path / "runs" / "mine" / "seed-2"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("keep me", encoding="utf-8")
    assert call("sweep", "experiment=smoke", "seed=1,2", "name=mine")[0] == 1
    assert (foreign / "notes.txt").read_text("utf-8") == "keep me"


GRIDS = [
    {"seed": [1, 2], "privacy": ["off"]},
    {"seed": [1, 2], "privacy": ["dp"], "privacy.epsilon": [8, 3], "predictor.rounds": 3},
]
DECLARED = ("+experiment=smoke", "until=predictor")


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The smoke experiment declares GRIDS for the time of a test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweeping, "declared_sweep", lambda name: GRIDS if name == "smoke" else [])


def test_an_experiment_declares_its_sweep(declared: None) -> None:
    members = sweeping.plan([*DECLARED])
    assert [member.directory.name for member in members] == [
        "seed-1_privacy-off", "seed-2_privacy-off",
        "seed-1_privacy-dp_epsilon-8", "seed-1_privacy-dp_epsilon-3",
        "seed-2_privacy-dp_epsilon-8", "seed-2_privacy-dp_epsilon-3",
    ]  # fmt: skip
    found = [
        (m.config.privacy.enabled, m.config.privacy.epsilon, m.config.predictor.rounds) for m in members[1:4]
    ]
    assert found == [(False, 8.0, 2), (True, 8.0, 3), (True, 3.0, 3)]
    # The command line replaces a field's values; the folder knows which fields vary, not their values.
    fewer = sweeping.plan([*DECLARED, "seed=1,7"])
    assert [member.config.seed for member in fewer] == [1, 7, 1, 1, 7, 7]
    assert fewer[0].directory == members[0].directory
    single = sweeping.plan([*DECLARED, "privacy=off"])
    assert [member.directory.name for member in single] == [
        "seed-1", "seed-2", "seed-1_epsilon-8", "seed-1_epsilon-3", "seed-2_epsilon-8", "seed-2_epsilon-3",
    ]  # fmt: skip


_STUDIES = ("seeds_table", "frontier", "claims")  # over other experiments


def _rows(name: str) -> set[tuple[str, str, str, str]]:
    """What is compared in a study: (experiment and reward, policy, rule or system, ε)."""
    found = set()
    for c in (member.config for member in sweeping.plan([f"+experiment={name}", "seed=1"])):
        rule = f"{c.system.kind} {c.system.eta}"
        if c.system.kind == "appa":
            rule = f"{c.aggregation.kind} {c.aggregation.variant} {c.predictor.training}"
        data, ε = f"{c.experiment} {c.task.reward}", str(c.privacy.epsilon if c.privacy.enabled else None)
        found.add((data, c.policy.kind, rule, ε))
    return found


def test_the_quick_studies_leave_no_row_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_checks, "environment_problems", lambda config: [])
    monkeypatch.setenv("APPA_SHARED", "somewhere")
    found = {name: _rows(name) for name in _STUDIES}
    assert found == {name: _rows(f"{name}_quick") for name in _STUDIES}
    table, line, claims = found.values()
    assert len(table) == 6 * 7 + 2 * 5 + 2 + 2
    assert len(line) == 2 * 3 * 5
    assert len(claims) == 2 * 3 + 4


def test_a_study_of_several_experiments_is_no_run() -> None:
    with pytest.raises(ConfigError, match=r"experiment=frontier: .*appa-secure sweep experiment=frontier"):
        compose(["experiment=frontier"])


def test_the_surveys_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("APPA_SHARED", raising=False)
    with pytest.raises(ConfigError, match="APPA_SHARED"):
        compose(["experiment=opinionqa_dense"])
    (tmp_path / "data" / "opinionqa").mkdir(parents=True)
    monkeypatch.setenv("APPA_SHARED", str(tmp_path))
    assert compose(["experiment=opinionqa_dense"]).data.path == str(tmp_path / "data" / "opinionqa")
    assert compose(["experiment=opinionqa_dense", "data.path=owner/name"]).data.path == "owner/name"


def test_the_declared_studies_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_checks, "environment_problems", lambda config: [])
    monkeypatch.setenv("APPA_SHARED", "somewhere")
    studies = [name for name in options("experiment") if sweeping.declared_sweep(name)]
    assert "predictor_opinionqa" in studies
    for name in studies:
        if not name.startswith(_STUDIES):
            members = sweeping.plan([f"experiment={name}"])
            assert all(member.config.experiment == name for member in members)
        seeds = {seed for grid in sweeping.declared_sweep(name) for seed in grid["seed"]}
        assert len(seeds) >= (2 if name.endswith("_quick") else 3)
    assert sweeping.declared_sweep("smoke") == []


def test_seeds_come_one_after_the_other_and_jobs_share_the_cores(
    call: Call, children: list[list[str]], declared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Path | None, int]] = []
    run = sweeping.children.run

    alone = threading.Lock()  # the stand-in composes in this process, and Hydra is no friend of threads

    def watched(arguments: list[str], log: Path | None, threads: int) -> int:
        with alone:
            seen.append((log, threads))
            return run(arguments, log, threads)

    monkeypatch.setattr(sweeping.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(sweeping.children, "run", watched)
    assert call("sweep", *DECLARED, "name=one")[0] == 0
    assert [next(word for word in words if word.startswith("seed=")) for words in children] == [
        *["seed=1"] * 3, *["seed=2"] * 3,
    ]  # fmt: skip
    assert set(seen) == {(None, 8)}
    seen.clear()
    code, _, said = call("sweep", *DECLARED, "name=four", "--jobs", "4")
    assert code == 0
    assert [words.split(" eta")[0] for words in said.splitlines() if words.startswith("sweep step")] == [
        f"sweep step {done}/6" for done in range(1, 7)
    ]
    assert {threads for _, threads in seen} == {2}
    assert len({log for log, _ in seen}) == len(seen) == 6
    assert {log.parent for log, _ in seen if log} == {Path("runs/four/logs")}


def test_children_are_processes_of_their_own_with_exit_codes_and_logs(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    arguments = ["experiment=smoke", f"output_root={tmp_path}"]
    assert sweeping.children.run([*arguments, "ppo.stepz=1"], log, 1) == 2
    assert sweeping.children.run([*arguments, "seed=x"], log, 1) == 2
    said = log.read_text("utf-8")
    assert "ppo.stepz" in said
    assert said.count("appa-secure: cannot start") == 2


def test_exit_codes_of_children_side_by_side_are_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starting a child reads the exit codes of others that have ended, and each can be read once. Whoever waits for one is
    slow here, so that the other gets in between."""
    read = multiprocessing.forkserver.read_signed

    def slow(file: int) -> int:
        if not any(frame.name == "_cleanup" for frame in traceback.extract_stack()):
            time.sleep(0.4)
        return int(read(file))

    monkeypatch.setattr(multiprocessing.forkserver, "read_signed", slow)
    arguments = ["experiment=smoke", f"output_root={tmp_path}", "seed=x"]
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda _: sweeping.children.run(arguments, tmp_path / "log", 1), range(6)))
    assert codes == [2] * 6


def test_a_sweep_leaves_one_tidy_table_and_a_report(call: Call, children: list[list[str]]) -> None:
    assert call("sweep", "experiment=smoke", "aggregation=appa,average", "seed=1,2", "name=both")[0] == 0
    frame = pd.read_parquet("runs/both/results.parquet")
    assert set(frame["run"]) == {f"aggregation-{a}_seed-{s}" for a in ("appa", "average") for s in (1, 2)}
    means = frame[
        (frame["part"] == "policy.after") & (frame["split"] == "train") & (frame["metric"] == "avg")
    ]
    assert means["value"].tolist() == [0.625] * 4
    assert set(means["aggregation.kind"]) == {"appa", "average"}
    code, out, _ = call("report", "runs/both")
    assert (code, out) == (0, "runs/both/report.html\n")
    assert Path("runs/both/figures/plane_train.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = call("report", "--markdown", "--by", "aggregation", "runs/both")
    assert code == 0
    assert "| average − appa | training | Avg | 2 |" in out
    assert call("report", "runs/both", "--by", "ppo.steps")[0] == 2
    assert call("report", "runs/both/aggregation-appa_seed-1", "--by", "aggregation")[0] == 2


# --- report ------------------------------------------------------------------------------------------------


def test_report_writes_the_pages_and_lists_them(call: Call, launched: list[object]) -> None:
    for seed in ("1", "2"):
        call("run", "experiment=smoke", f"seed={seed}", f"name=s{seed}")
    Path("runs/s1", records.REPORT).unlink()
    code, out, err = call("report", "runs/s1")
    assert (code, out) == (0, "runs/s1/report.html\n")
    assert "<html" in Path("runs/s1", records.REPORT).read_text("utf-8")
    assert "worst-off" in err
    code, out, err = call("report", "runs/s1", "runs/s2")
    pages = out.splitlines()
    assert pages[:2] == ["runs/s1/report.html", "runs/s2/report.html"]
    assert Path(pages[2]).is_file()
    assert "0.625 / 0.500" in err


def test_report_prints_markdown(call: Call, launched: list[object]) -> None:
    call("run", "experiment=smoke", "name=s1")
    code, out, _ = call("report", "--markdown", "runs/s1")
    assert code == 0
    assert out.startswith("| run |")


# --- audit --------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A run directory with a transcript and a ledger whose only event is context noise of multiplier 4."""
    directory = tmp_path / "run"
    with records.RunDir.create(directory) as run:
        run.write_config(compose([]).to_yaml())
        run.transcript.run("r1", "0" * 64)
        run.transcript.abort("a client left")
        run.path(records.LEDGER).touch()
    terms = Budget(epsilon=8.0, delta=1e-6, accountant="rdp", unit="response")
    ledger = Ledger(directory / records.LEDGER, "Coast", terms)
    ledger.charge("context", GaussianEvent(4.0, 1.0, 1))
    ledger.close()
    return directory


def rewrite(path: Path, **changes: object) -> None:
    """Change the last row of a journal, with a checksum that fits: what a dishonest writer would do."""
    rows = records.read_journal(path)
    path.unlink()
    journal = records.Journal(path)
    for row in [*rows[:-1], {**rows[-1], **changes}]:
        journal.append(row)
    journal.close()


def test_audit_verify_accepts_what_is_whole(call: Call, recorded: Path) -> None:
    code, out, err = call("audit", "verify", str(recorded))
    _, head = records.verify(recorded / records.TRANSCRIPT)
    assert (code, out) == (0, "")
    assert "2 rows" in err
    assert head in err
    assert re.search(r"Coast: epsilon 1\.\d", err)
    assert call("audit", "verify", str(recorded), "--head", head)[0] == 0


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (records.TRANSCRIPT, {"reason": "a client lied"}, "row 1 does not match its own hash"),
        (records.LEDGER, {"epsilon": 0.1}, "its events cost"),
        (records.LEDGER, {"epsilon": 9.0}, "more than privacy.epsilon=8"),
    ],
)
def test_audit_verify_finds_a_change(
    call: Call, recorded: Path, name: str, changes: dict[str, object], said: str
) -> None:
    rewrite(recorded / name, **changes)
    code, _, err = call("audit", "verify", str(recorded))
    assert code == 1
    assert said in err


def test_audit_verify_recomputes_what_clients_paid_for_output_noise(call: Call, recorded: Path) -> None:
    options = ["secagg.output_epsilon=8", "secagg.release=noise"]
    (recorded / records.CONFIG).write_text(compose(options).to_yaml(), encoding="utf-8")
    assert call("audit", "verify", str(recorded))[0] == 2  # no output ledger
    plan = plan_output(8.0, 1e-6, 3, 3, 3)
    ledger = Ledger(recorded / records.OUTPUT_LEDGER, "Coast", plan.budget)
    for number in range(3):
        ledger.charge(f"reward/1/{number}", plan.event, MECHANISM)
    ledger.close()
    code, _, err = call("audit", "verify", str(recorded))
    assert code == 0
    assert re.search(r"output_ledger\.jsonl: 3 events", err)
    assert re.search(r"Coast: epsilon 7\.9", err)
    for changes, said in ((0.1, "its events cost"), (9.0, "more than secagg.output_epsilon=8")):
        rewrite(recorded / records.OUTPUT_LEDGER, epsilon=changes)
        code, _, err = call("audit", "verify", str(recorded))
        assert code == 1
        assert said in err


def test_audit_verify_misses_no_ledger(call: Call, recorded: Path) -> None:
    (recorded / records.LEDGER).unlink()
    code, _, err = call("audit", "verify", str(recorded))
    assert code == 2
    assert records.LEDGER in err
    (recorded / records.CONFIG).write_text(compose(["privacy=off"]).to_yaml(), encoding="utf-8")
    code, _, err = call("audit", "verify", str(recorded))
    assert code == 0
    assert "nothing here is private" in err


def test_audit_verify_compares_with_a_hash_kept_elsewhere(call: Call, recorded: Path) -> None:
    code, _, err = call("audit", "verify", str(recorded), "--head", "f" * 64)
    assert code == 1
    assert "cut off or rewritten" in err


# --- documents ----------------------------------------------------------------------------------------------


def check(words: list[str]) -> None:
    """Compose a documented command's options; raises what the command itself would."""
    command, arguments = words[0], words[1:]
    if command == "run" and "--resume" not in arguments:
        compose(arguments)
    elif command == "sweep":
        words = [word for word in arguments if not re.fullmatch(r"--jobs|-j|\d+", word)]
        # Seeds make no difference to what is valid, and hundreds of runs to compose.
        sweeping.plan(words if any(word.startswith("seed=") for word in words) else [*words, "seed=1"])
    else:
        parsed: Any = typer.main.get_command(cli.app)
        while words and words[0] in getattr(parsed, "commands", ()):
            parsed, words = parsed.commands[words[0]], words[1:]
        # Raises for an option the command does not have; an unknown command is left over.
        _, rest, _ = parsed.make_parser(parsed.context_class(parsed)).parse_args(list(words))
        assert not hasattr(parsed, "commands") or not rest, words
        if parsed.name == "privacy":
            compose(rest)


def test_commands_in_the_documents_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [
        REPO / "README.md",
        *sorted((REPO / "docs").rglob("*.md")),
        *sorted(REPO.glob("threat_model/*.md")),
    ]
    if not documents[0].exists():
        pytest.skip("README.md has not been written yet")
    # Paths in examples are the reader's; everything else must be right.
    monkeypatch.setattr(config_checks, "environment_problems", lambda config: [])
    monkeypatch.setenv("APPA_SHARED", "somewhere")
    found = 0
    for document in documents:
        if not document.exists():
            continue
        for block in re.findall(
            r"^```[a-z]*\n(.*?)^```", document.read_text("utf-8"), re.MULTILINE | re.DOTALL
        ):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.match(r"^\s*\$?\s*(?:\.venv/bin/)?appa-secure (.+)$", line)
                if command:
                    check(shlex.split(command[1], comments=True))
                    found += 1
    assert found, "README.md shows no command"
