"""Runs that end with the predictor: complete, measured while they learn, and honest about who held the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from appa_secure import launch
from appa_secure.config import compose
from appa_secure.records import read_journal, verify
from appa_secure.report import terminal_table


def finished(root: Path, *overrides: str) -> tuple[Path, dict[str, Any]]:
    config = compose(
        [
            "experiment=smoke", "until=predictor", "predictor.rounds=5", "predictor.local_steps=1", "name=run",
            f"output_root={root / 'runs'}", f"federation.client_root={root / 'clients'}",
            "privacy.accountant=rdp", *overrides,
        ]
    )  # fmt: skip
    run = launch.run(config)
    return run, json.loads((run / "summary.json").read_text("utf-8"))


def test_a_run_may_end_with_a_measured_predictor(tmp_path: Path) -> None:
    run, summary = finished(tmp_path, "evaluation.predictor_every=2")
    assert summary["until"] == "predictor"
    assert summary["stamp"] == "not private"
    assert summary["alignment"] is None
    assert set(summary["seconds"]) == {"setup", "context", "predictor"}
    for split in ("train", "heldout"):
        for which in ("own", "shared", "pluralllm"):
            found = summary["predictor"][split][which]
            assert set(found["per_group"]) == set(summary["groups"])
            assert found["min"] == min(found["per_group"].values())
    assert not (run / "policy").exists()
    assert (run / "predictor" / "STAMP").read_text() == "not private\n"  # noise from the seed
    rows = read_journal(run / "measurement.jsonl")
    assert [row["round"] for row in rows] == [2, 4, 5]  # every second, and the last
    assert {row["stamp"] for row in rows} == {"not private"}
    # What was measured last is what the clients keep.
    last = {name: rows[-1]["heldout"][name]["avg"] for name in ("own", "shared", "pluralllm")}
    final = {name: summary["predictor"]["heldout"][name]["avg"] for name in last}
    assert last == pytest.approx(final, abs=1e-6)
    assert verify(run / "transcript.jsonl")[1] == summary["transcript_head"]
    assert max(summary["privacy"]["epsilon"].values()) <= 8.0
    page = (run / "report.html").read_text("utf-8")
    assert "no language model was trained" in page
    assert terminal_table(summary).row_count == len(summary["groups"]) + 3


def test_a_centralised_predictor_says_so_everywhere(tmp_path: Path) -> None:
    """Secret noise, masks and no measurement would be `private` if the predictor were federated."""
    run, summary = finished(
        tmp_path, "predictor.training=pooled", "evaluation.truth=false", "privacy.secure_rng=true"
    )
    assert summary["stamp"] == "not private"
    assert summary["predictor"] is None
    assert (run / "predictor" / "STAMP").read_text() == "not private\n"
    assert {row["stamp"] for row in read_journal(run / "metrics.jsonl")} == {"not private"}
    first = read_journal(run / "transcript.jsonl")[0]
    assert first["training"] == "pooled"
    assert "one trusted party held all groups' answers" in (run / "privacy_statement.md").read_text("utf-8")
    assert "one trusted party that held all groups" in (run / "report.html").read_text("utf-8")
    assert not (run / "measurement.jsonl").exists()
    releases = [row["release"] for row in read_journal(run / "privacy_ledger.jsonl")]
    assert releases.count("predictor/5") == len(summary["groups"])
