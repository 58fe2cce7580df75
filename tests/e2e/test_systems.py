"""Every system from the front door to the report, in one process at the smallest sizes: blind equals clear."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from appa_secure import launch
from appa_secure.config import compose
from appa_secure.records import read_journal, verify
from appa_secure.report import plots
from appa_secure.rewards import FORMAT_PENALTY
from tests.adversarial.test_boundary import FakeEmbedder

SYSTEMS = ("grdpo", "gripo", "fedrlhf", "sft", "maxmin")
_VOLATILE = {"seconds", "seconds_reward", "check"}


def finished(root: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Path:
    monkeypatch.setattr(launch, "build_embedder", lambda config: FakeEmbedder())
    config = compose(
        [
            "experiment=smoke", "name=run", f"output_root={root}/runs", f"federation.client_root={root}/clients",
            "embedder.cache_dir=null", "data.group_count=5", "data.questions=12", "data.context=4", "privacy.accountant=rdp",
            "policy.dim=32", "policy.layers=1", "policy.warmup_steps=70", "policy.warmup_lr=0.01", "ppo.steps=2",
            "system.rounds=3", "system.free_rounds=1", *overrides,
        ]
    )  # fmt: skip
    return launch.run(config)


def results(run: Path) -> dict[str, Any]:
    rows = [
        {k: v for k, v in row.items() if k not in _VOLATILE} for row in read_journal(run / "metrics.jsonl")
    ]
    weights = (run / "policy" / "model.safetensors").read_bytes()
    return {
        "metrics": rows,
        "policy": weights,
        "system": json.loads((run / "summary.json").read_text())["system"],
    }


@pytest.mark.parametrize("kind", ["kl", "kendall", "choice"])
def test_every_task_runs_with_a_language_model_that_cannot_answer_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Malformed answers are scored, counted and never fatal: a policy that has hardly been warmed up writes many."""
    monkeypatch.setattr(plots, "_draw", lambda height, paint: "<svg/>")  # drawing is what takes time
    run = finished(
        tmp_path, monkeypatch, f"task.reward={kind}", "policy.warmup_steps=3", "evaluation.truth=true"
    )
    summary = json.loads((run / "summary.json").read_text())
    steps = [row for row in read_journal(run / "metrics.jsonl") if "step" in row]
    rewards = list(read_journal(run / "rewards.jsonl"))
    assert [row["malformed"] for row in steps] == [row["malformed"] for row in rewards]
    assert sum(row["malformed"] for row in steps) > 0
    for row in rewards:
        assert row["rewards"].count(FORMAT_PENALTY[kind]) >= row["malformed"]
    for split in ("train", "heldout"):
        for when in ("before", "after"):
            found = summary["alignment"][split][when]
            assert 0 <= found["avg"] <= 1 - found["malformed"]  # what cannot be read scores 0
    assert summary["alignment"]["train"]["before"]["malformed"] > 0
    assert summary["ceiling"]["train"]["avg"] > summary["ceiling"]["train"]["uniform"]
    assert "Unreadable answers" in (run / "report.html").read_text()


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_blind_run_and_a_clear_one_end_in_the_same_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    common = (f"system={system}", "evaluation.truth=false", "privacy.secure_rng=false")
    blind = finished(tmp_path / "blind", monkeypatch, *common)
    clear = finished(tmp_path / "clear", monkeypatch, *common, "secagg=clear")
    here, there = results(blind), results(clear)
    assert here == there
    assert here["policy"] != (blind / "policy" / "warm" / "model.safetensors").read_bytes()
    assert here["system"]["kind"] == system
    steps = [row for row in here["metrics"] if "step" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(math.isfinite(row["reward"]) for row in steps)
    # Post-processing of what was paid for before: no system spends anything of its own.
    releases = {row["release"] for row in read_journal(blind / "privacy_ledger.jsonl")}
    assert releases == {"context", "predictor/1", "predictor/2"}
    kinds = [row.get("kind") for row in read_journal(blind / "transcript.jsonl") if row["event"] == "round"]
    assert kinds == ["train"] * 2 + ["tune"] * (3 if system == "maxmin" else 2)
    verify(blind / "transcript.jsonl")
    assert (blind / "report.html").stat().st_size > 0


def test_raw_labels_are_stamped_and_measured_like_any_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(
        tmp_path, monkeypatch, "system=sft", "system.labels=raw", "privacy=off", "system.server_lr=0.01"
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["stamp"] == "not private"
    assert (run / "policy" / "STAMP").read_text() == "not private\n"
    assert set(summary["alignment"]["train"]["after"]["per_group"]) == set(summary["groups"])


def test_with_an_adapter_the_adapter_alone_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(tmp_path, monkeypatch, "system=grdpo", "policy.lora.r=2", "evaluation.truth=true")
    sent = [
        row["bytes_per_client"] for row in read_journal(run / "transcript.jsonl") if row.get("kind") == "tune"
    ]
    whole = (run / "policy" / "warm" / "model.safetensors").stat().st_size
    assert max(sent) < whole / 2
    assert (run / "policy" / "adapter_model.safetensors").exists()
    after = json.loads((run / "summary.json").read_text())["alignment"]["train"]["after"]
    assert 0 < after["min"] <= after["avg"] <= 1
