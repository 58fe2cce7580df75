"""The transcript's chain and the run directory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from appa_secure import records
from appa_secure.errors import RunError
from appa_secure.records import Journal, RunDir, Transcript, verify

# --- transcript ---------------------------------------------------------------------------------------------


def protocol(path: Path) -> Transcript:
    path.unlink(missing_ok=True)
    transcript = Transcript(path)
    transcript.run("run-1", "c" * 64)
    transcript.epoch(0, "a" * 64, {"North": "f0", "South": "f1"})
    transcript.round(0, 0, "reward", "d" * 64, "a" * 64, {"upload/North": "00"}, ["North"], ["South"])
    transcript.abort("fewer than 5 clients answered", round=1)
    transcript.resume("align", 10)
    return transcript


def test_a_transcript_verifies_and_goes_on_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "transcript.jsonl"
    transcript = protocol(path)
    head = transcript.head
    transcript.close()
    assert verify(path) == verify(path, head) == (5, head)
    again = Transcript(path)
    again.abort("stopped")
    assert verify(path) == (6, again.head)
    assert [row["event"] for row in again] == ["run", "epoch", "round", "abort", "resume", "abort"]


def rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows with valid checksums, as an attacker would write them."""
    path.unlink()
    journal = Journal(path)
    for row in rows:
        journal.append(row)
    journal.close()


@pytest.mark.parametrize("bad", range(5))
def test_each_change_breaks_the_chain_at_its_row(tmp_path: Path, bad: int) -> None:
    path = tmp_path / "transcript.jsonl"
    rows = list(protocol(path))
    changed = [dict(row) for row in rows]
    changed[bad]["event"] = "other"
    rewrite(path, changed)
    with pytest.raises(RunError, match=f"row {bad} does not match its own hash"):
        verify(path)
    with pytest.raises(RunError, match=f"row {bad} "):
        Transcript(path)
    changed[bad]["hash"] = records.digest({k: v for k, v in changed[bad].items() if k != "hash"})
    rewrite(path, changed)
    if bad < 4:  # the row now fits its own hash, so the next one gives it away
        with pytest.raises(RunError, match=f"row {bad + 1} does not follow"):
            verify(path)
    else:  # a new last row shows only against the head noted elsewhere
        with pytest.raises(RunError, match="cut off or rewritten"):
            verify(path, rows[-1]["hash"])


def test_removed_swapped_cut_and_foreign_rows_are_found(tmp_path: Path) -> None:
    path = tmp_path / "transcript.jsonl"
    rows = list(protocol(path))
    rewrite(path, [rows[0], *rows[2:]])
    with pytest.raises(RunError, match="row 1 calls itself row 2"):
        verify(path)
    rewrite(path, [rows[0], rows[2], rows[1], *rows[3:]])
    with pytest.raises(RunError, match="row 1 "):
        verify(path)
    rewrite(path, rows[:3])
    assert verify(path)[0] == 3
    with pytest.raises(RunError, match=r"ends at row 2 with .* cut off"):
        verify(path, rows[-1]["hash"])
    rewrite(path, [{"event": "run"}])
    with pytest.raises(RunError, match="row 0 lacks seq, prev, hash"):
        verify(path)
    path.write_bytes(b'{"torn')
    with pytest.raises(RunError, match="row 0 is unfinished"):
        verify(path)
    path.unlink()
    with pytest.raises(RunError, match="is missing"):
        verify(path)


# --- run directory ------------------------------------------------------------------------------------------


def test_create_refuses_what_exists_and_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    with RunDir.create(tmp_path / "a" / "run"):
        pass
    with pytest.raises(RunError, match="exists already"):
        RunDir.create(tmp_path / "a" / "run")
    with pytest.raises(RunError, match="not a run directory"):
        RunDir.open(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    RunDir.create(tmp_path / "empty").close()


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from appa_secure.records import RunDir\n"
        "run = RunDir.open(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    RunDir.create(tmp_path / "run").close()
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process is writing"):
            RunDir.open(tmp_path / "run")
        other.kill()
    RunDir.open(tmp_path / "run").close()


def test_stage_markers_survive_reopening(tmp_path: Path) -> None:
    with RunDir.create(tmp_path / "run") as run:
        assert run.stage_done("predictor") is None
        run.mark_done("predictor", {"rounds": 3})
        run.mark_done("warmup")
    (tmp_path / "run" / "stages" / ".align.json.1.tmp").write_text("{")
    with RunDir.open(tmp_path / "run") as run:
        assert run.stage_done("predictor") == {"rounds": 3}
        assert run.stage_done("warmup") == {}
        assert run.stage_done("align") is None
        with pytest.raises(RunError, match="stage name"):
            run.stage_done("../x")
    assert not list((tmp_path / "run" / "stages").glob(".*.tmp"))


def test_journals_exist_only_where_used(tmp_path: Path) -> None:
    with RunDir.create(tmp_path / "run") as run:
        run.metrics.append({"step": 1})
        run.transcript.run("r", "c")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"metrics.jsonl", "transcript.jsonl", "stages", ".lock"}


def test_a_resumed_run_must_bring_the_same_configuration(tmp_path: Path) -> None:
    with RunDir.create(tmp_path / "run") as run:
        run.write_config("seed: 1\nppo:\n  steps: 3\n")
        run.write_config("seed: 1\nppo:\n  steps: 3\n")
        with pytest.raises(RunError, match=r"line 3 was 'steps: 3' and is now 'steps: 4'"):
            run.write_config("seed: 1\nppo:\n  steps: 4\n")
        with pytest.raises(RunError, match=r"line 4 was '' and is now 'x: 1'"):
            run.write_config("seed: 1\nppo:\n  steps: 3\nx: 1\n")


def test_environment_names_versions_but_no_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunDir.create(tmp_path / "run") as run:
        run.write_environment()
        run.write_environment()
        text = run.path(records.ENVIRONMENT).read_text()
        assert text.count("python ") == 1
        assert "numpy " in text
        for private in (os.uname().nodename, os.path.expanduser("~"), os.getcwd(), os.uname().release):
            assert private not in text
        monkeypatch.setattr(records, "__version__", "99")
        run.write_environment()
        assert "resumed with\nappa-secure 99\n" in run.path(records.ENVIRONMENT).read_text()


def test_summary_and_fairness_refuse_nan_and_keep_the_last_good_file(tmp_path: Path) -> None:
    with RunDir.create(tmp_path / "run") as run:
        run.write_summary({"alignment": {"avg": 0.5}})
        run.write_fairness({"tau": 0.99})
        with pytest.raises(RunError, match=r"summary\.json\.alignment\.avg is nan"):
            run.write_summary({"alignment": {"avg": float("nan")}})
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"alignment": {"avg": 0.5}}
