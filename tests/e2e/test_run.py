"""The whole path through the command line: results, kill -9 in every stage, blind against clear."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appa_secure.records import read_journal, verify

SECONDS = 240
_VOLATILE = {"seconds", "seconds_reward", "check"}  # wall-clock fields


def command(root: Path, *overrides: str) -> list[str]:
    """A smoke run in `root`; equal names give equal run ids, so two roots can be compared."""
    return [
        sys.executable, "-m", "appa_secure.cli", "run", "experiment=smoke", "name=run", f"output_root={root}/runs",
        f"federation.client_root={root}/clients", *overrides,
    ]  # fmt: skip


def finish(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    root = tmp_path_factory.mktemp("undisturbed")
    return root, finish(command(root))


def rows(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in _VOLATILE} for row in read_journal(path)]


def results(run: Path) -> dict[str, Any]:
    """Everything a run computed, without clocks and without fresh keys."""
    summary = json.loads((run / "summary.json").read_text())
    return {
        "predictor": np.load(run / "predictor" / "parameters.npy").tobytes(),
        "policy": (run / "policy" / "model.safetensors").read_bytes(),
        "rewards": rows(run / "rewards.jsonl"),
        "metrics": rows(run / "metrics.jsonl"),
        "measurement": rows(run / "measurement.jsonl"),
        "ledger": rows(run / "privacy_ledger.jsonl"),
        "summary": {
            k: summary[k] for k in ("alignment", "ceiling", "gap_closed", "privacy", "groups", "questions")
        },
    }


def test_smoke_run_writes_everything_it_promises(
    smoke: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    root, done = smoke
    run = root / "runs" / "run"
    assert done.stdout == f"{run}\n"  # the path alone, for scripts
    assert "align step 3/3 reward" in done.stderr  # a heartbeat per step without a terminal
    for name in (
        "config.resolved.yaml", "environment.txt", "metrics.jsonl", "summary.json", "fairness.json", "report.html",
        "privacy_ledger.jsonl", "privacy_statement.md", "privacy_statement.json", "transcript.jsonl", "measurement.jsonl",
    ):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    summary = json.loads((run / "summary.json").read_text())
    assert len(summary["groups"]) == 8
    for split in ("train", "heldout"):
        for when in ("before", "after"):
            found = summary["alignment"][split][when]
            assert set(found["per_group"]) == set(summary["groups"])
            assert 0 < found["min"] <= found["avg"] <= 1
            low, high = found["ci95"]["avg"]
            assert low <= found["avg"] <= high
    assert summary["stamp"] == "not private"  # because it was measured against the truth
    assert set(summary["privacy"]["epsilon"]) == set(summary["groups"])
    assert all(0 < e <= 8 for e in summary["privacy"]["epsilon"].values())
    assert summary["secagg"]["mode"] == "blind"
    assert summary["secagg"]["rounds"] == 2 + 3  # predictor rounds and PPO steps
    assert summary["ceiling"]["avg"] >= summary["alignment"]["train"]["after"]["avg"]
    assert verify(run / "transcript.jsonl", summary["transcript_head"])[0] > 5
    for name in ("measurement.jsonl", "metrics.jsonl", "rewards.jsonl"):
        assert all(row["stamp"] == "not private" for row in read_journal(run / name)), name
    for folder in ("predictor", "policy"):  # the noise of this run can be recomputed from its seed
        assert (run / folder / "STAMP").read_text() == "not private\n"


def test_ledger_does_not_move_during_alignment(smoke: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run = smoke[0] / "runs" / "run"
    releases = {row["release"] for row in read_journal(run / "privacy_ledger.jsonl")}
    assert releases == {"context", "predictor/1", "predictor/2"}
    spent = [row["epsilon"] for row in read_journal(run / "metrics.jsonl") if "step" in row]
    assert len(spent) == 3
    assert len(set(spent)) == 1


def _kill_when(arguments: list[str], reached: Callable[[], bool]) -> None:
    """Start the command and send SIGKILL as soon as `reached`; the stage in progress then is cut off anywhere."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + SECONDS
    while not reached():
        assert process.poll() is None, "the run ended before the stage to be killed in was reached"
        assert time.monotonic() < deadline, "the stage to be killed in was not reached in time"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.timeout(900)
def test_killed_in_every_stage_ends_bit_identical(
    smoke: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "run"
    resume = [sys.executable, "-m", "appa_secure.cli", "run", "--resume", str(run)]

    def done(stage: str) -> Callable[[], bool]:
        return lambda: (run / "stages" / f"{stage}.json").exists()

    def recorded(name: str, count: int) -> Callable[[], bool]:
        return lambda: (run / name).exists() and (run / name).read_bytes().count(b"\n") >= count

    _kill_when(command(tmp_path), done("setup"))  # in context
    _kill_when(resume, lambda: (run / "predictor" / "state.npz").exists())  # between predictor rounds
    _kill_when(resume, done("predictor"))  # in the warm-up
    _kill_when(resume, done("warmup"))  # in the first measurement
    _kill_when(resume, recorded("rewards.jsonl", 1))  # in an update, before any checkpoint
    _kill_when(resume, recorded("rewards.jsonl", 2))  # in an update, with a checkpoint behind
    _kill_when(resume, done("align"))  # in the last measurement
    finish(resume)

    undisturbed = results(smoke[0] / "runs" / "run")
    disturbed = results(run)
    for name, value in undisturbed.items():
        assert disturbed[name] == value, f"{name} differs from the undisturbed run"
    for ledger in (smoke[0] / "clients").glob("*/*/ledger.jsonl"):
        twin = tmp_path / ledger.relative_to(smoke[0])
        assert rows(twin) == rows(ledger)
    verify(run / "transcript.jsonl")


def test_blind_and_clear_runs_end_in_the_same_policy(
    smoke: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    finish(command(tmp_path, "secagg=clear"))
    blind, clear = results(smoke[0] / "runs" / "run"), results(tmp_path / "runs" / "run")
    for name in ("predictor", "rewards", "policy"):
        assert blind[name] == clear[name], f"{name} differs between blind and clear"
    assert json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())["stamp"] == "not private"
