"""The trust boundary is the folder boundary: the import contracts of pyproject.toml hold, and can fail."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import appa_secure

REPO = Path(__file__).resolve().parent.parent


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    script = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    return subprocess.run(
        [sys.executable, "-c", script, "--no-cache"], cwd=root, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(root), "PATH": "", "COLUMNS": "120"},
    )  # fmt: skip


def test_contracts_hold() -> None:
    ended = lint(REPO)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "3 kept, 0 broken" in ended.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("clients/spy.py", "import coordinator", "trust boundary"),
        ("coordinator/spy.py", "from clients import __doc__", "trust boundary"),
        ("appa_secure/aggregation/spy.py", "def late():\n    import torch", "no torch"),
        ("appa_secure/secagg/spy.py", "from flwr import app", "no torch"),
        ("appa_secure/spy.py", "import clients", "neither side"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, module: str, line: str, contract: str) -> None:
    """A contract that no import can break would protect nothing."""
    for package in ("appa_secure", "clients", "coordinator"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    for package in ("secagg", "aggregation"):
        (tmp_path / "appa_secure" / package).mkdir()
        (tmp_path / "appa_secure" / package / "__init__.py").touch()
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    assert lint(tmp_path).returncode == 0
    (tmp_path / module).write_text(line + "\n", encoding="utf-8")
    ended = lint(tmp_path)
    assert ended.returncode == 1
    broken = [text for text in ended.stdout.splitlines() if text.endswith("BROKEN")]
    assert len(broken) == 1, ended.stdout
    assert contract in broken[0]


def test_versions_agree() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == appa_secure.__version__
