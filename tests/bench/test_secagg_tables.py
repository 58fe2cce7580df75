"""The benchmark of `secagg.py` itself works, at a small size and without the peer."""

from pathlib import Path

import pytest

from tests.bench import secagg


def test_it_measures_checks_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(secagg, "N", 8)
    monkeypatch.setattr(secagg, "DIMS", (64, 10**3))
    monkeypatch.setenv("APPA_SHARED", str(tmp_path))
    page = tmp_path / "page.md"
    secagg.main(["--reps", "1", "--large", "7", "--large-rounds", "2", "--markdown", str(page)])
    out = capsys.readouterr()
    assert "no peers/flower_secagg.py" in out.err
    text = page.read_text("utf-8")
    assert "| 1,000, 30% dropped |" in text
    assert "| n = 1,000: server, per round | <= 2 s |" in text
    assert "| client mask, dim 1,000 | >= 50x | not measured | – |  |" in text


def test_a_missed_target_is_marked() -> None:
    slow, fast = secagg.Timing(client=[1.0], server=[1.0]), secagg.Timing(client=[49.0], server=[1000.0])
    rows = secagg.targets({(1000, 0.0): slow}, {(1000, 0.0): fast}, 0.5, None, {"client mask": "many keys"})
    verdicts = {row[0]: row[2:] for row in rows}
    assert verdicts["client mask, dim 1,000"] == ("49x", "MISSED", "many keys")
    assert verdicts["server unmask, dim 1,000, 0% dropped"] == ("1,000x", "reached", "")
    assert verdicts["mask expansion, dim 1,000,000"] == ("50 %", "MISSED", "–")
