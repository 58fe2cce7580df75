"""The audit as a command: what it prints, writes and exits with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from appa_secure import cli
from appa_secure.audit import privacy
from appa_secure.audit.bound import Bound
from appa_secure.audit.canaries import View
from appa_secure.audit.membership import roc
from appa_secure.audit.reconstruction import Reconstruction
from appa_secure.config import compose

QUICK = (
    "experiment=smoke", "predictor.rounds=2", "predictor.local_steps=1", "privacy.accountant=rdp", "privacy.epsilon=2",
    "privacy.sample_rate=1",
)  # fmt: skip


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["appa-secure", "audit", "privacy", *arguments])
    code = 0
    try:
        cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_a_sound_build_ends_with_0_and_the_same_figures_each_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = (*QUICK, "--canaries", "112", "--no-attacks", "--out", str(tmp_path))
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert code == 0
    assert out == f"{tmp_path / privacy.PAGE}\n"
    assert "canaries step 8/8" in err
    assert "No claim was refuted" in err
    first = (tmp_path / privacy.JSON).read_text()
    found = json.loads(first)
    assert [row["release"] for row in found["canaries"]] == ["context", "update", "sum of updates"]
    assert found["exceeded"] == []
    code, out, _ = call(monkeypatch, capsys, *arguments, "--json")
    assert (code, out) == (0, first)


def test_a_broken_build_ends_with_1_and_says_what_is_refuted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("clients.training.gaussian", lambda key, label, size, std: np.zeros(size))
    code, out, err = call(
        monkeypatch, capsys, *QUICK, "--canaries", "112", "--no-attacks", "--markdown", "--out", str(tmp_path)
    )
    assert code == 1
    assert "REFUTED: update" in out
    assert "measured epsilon exceeds the claim" in err


def test_what_claims_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(monkeypatch, capsys, "experiment=smoke", "privacy=off")
    assert (code, out) == (2, "")
    assert "Fix: privacy=dp" in err


def test_everything_found_is_written_and_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    member = rng.random(60) < 0.5
    bound = Bound(2.5, 0.95, 1e-6, 400, 80, 77, 4.0)
    more = rng.random(20) < 0.5
    found = privacy.Findings(
        compose(["experiment=smoke"]),
        [View("update", "somebody", 2.0, bound, (3.0, 9.0), 0.95), View("context", "a thief", 4.0, bound, None, 0.95)],
        {"predictor": {"private": roc(rng.random(60), member), "without privacy": roc(member + rng.random(60), member)}},
        {
            "raw": Reconstruction(np.zeros(80), np.where(more, 1.0, -1.0), more, 0.0),
            "private": Reconstruction(8 * rng.standard_normal(80), rng.standard_normal(20), more, 8.0),
        },
    )  # fmt: skip
    page = privacy.write(found, tmp_path / "deep" / "folder").read_text("utf-8")
    assert page.count("data:image/svg+xml") == 3
    assert "REFUTED: update" in page
    for name in ("bounds.png", "membership_predictor.png", "context.png"):
        assert (tmp_path / "deep" / "folder" / name).read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "deep" / "folder" / privacy.JSON).read_text("utf-8"))
    assert written["exceeded"] == ["update"]
    assert written["context"]["raw"]["hits"] == 20
    assert written["context"]["private"]["limit"] == pytest.approx(0.5249, abs=1e-4)
    text = privacy.markdown(found)
    assert "update (ε ≥ 3.00, claimed 2.00)" in text
    assert "| 2.00 | 2.50 | 3.00 | 77 of 80 | 400 | 4.00, 9.00 |" in text
    assert "| 4.00 | 2.50 | – | 77 of 80 | 400 | 4.00, – |" in text
    assert written["canaries"][0]["gaussian"] == 3.0
