"""What a run leaves behind: the hash-chained transcript of its protocol and the run directory.

The journals and atomic files underneath are in `appa_secure.journal`; the names most callers need are here
too.
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from appa_secure import __version__
from appa_secure.errors import RunError
from appa_secure.journal import (
    Journal,
    StepJournal,
    atomic_write,
    canonical_json,
    digest,
    plain,
    read_journal,
    scan,
    sync_directory,
)

__all__ = [
    "Journal",
    "RunDir",
    "StepJournal",
    "Transcript",
    "atomic_write",
    "canonical_json",
    "digest",
    "environment",
    "plain",
    "read_journal",
    "verify",
]

CONFIG = "config.resolved.yaml"
ENVIRONMENT = "environment.txt"
METRICS = "metrics.jsonl"
MEASUREMENT = "measurement.jsonl"
SUMMARY = "summary.json"
FAIRNESS = "fairness.json"
LEDGER = "privacy_ledger.jsonl"
OUTPUT_LEDGER = "output_ledger.jsonl"
STATEMENT_MD = "privacy_statement.md"
STATEMENT_JSON = "privacy_statement.json"
TRANSCRIPT = "transcript.jsonl"
REPORT = "report.html"
SWEEP = "sweep.json"  # in the folder of a sweep: which fields vary, and each run's values
RESULTS = "results.parquet"  # there too
POLICY = "policy"
PREDICTOR = "predictor"

_STAGES = "stages"
_LOCK = ".lock"
_GENESIS = "0" * 64  # `prev` of the first transcript row
_CHAIN_FIELDS = ("event", "seq", "prev", "hash")
_PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "opacus", "flwr", "numpy", "scipy", "cryptography",
    "cbor2", "tokenizers", "safetensors", "datasets", "pandas", "pyarrow", "hydra-core", "pydantic",
)  # fmt: skip


# --- transcript ---------------------------------------------------------------------------------------------


class Transcript:
    """Hash-chained record of the protocol, for an auditor.

    Row k holds `seq` = k (from 0), `prev` = hash of row k-1 (zeros for the first), its event and fields, and
    `hash` = SHA-256 over the canonical JSON of all of these. Changing, removing, inserting or swapping rows
    breaks the chain at the first row concerned. Rewriting the whole file, or cutting its end off, shows only
    against a head hash kept elsewhere (`summary.json`, the parties): compare with `head`.

    Digests and fingerprints are hex strings; nothing secret or private belongs here.
    """

    def __init__(self, path: Path) -> None:
        self._journal = Journal(path)
        try:
            self._head = _check_chain(self._journal, path.name)
        except RunError:
            self._journal.close()
            raise

    @property
    def head(self) -> str:
        """Hash of the last row; 64 zeros while there is none."""
        return self._head

    def __len__(self) -> int:
        return len(self._journal)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._journal)

    def close(self) -> None:
        """Give the file back."""
        self._journal.close()

    def _append(self, event: str, **fields: Any) -> None:
        row = plain({"event": event, "seq": len(self._journal), "prev": self._head, **fields}, event)
        row["hash"] = digest(row)
        self._journal.append(row)
        self._head = row["hash"]

    def run(self, run_id: str, config_digest: str, **facts: Any) -> None:
        """First row of a run: its id and the digest of its resolved configuration."""
        self._append("run", run_id=run_id, config_digest=config_digest, **facts)

    def epoch(self, epoch: int, roster_hash: str, fingerprints: Mapping[str, str], **facts: Any) -> None:
        """A set-up of secure aggregation: who takes part and the fingerprint of each client's signing key."""
        self._append("epoch", epoch=epoch, roster_hash=roster_hash, fingerprints=dict(fingerprints), **facts)

    def membership(self, version: int, period: int, clients: Mapping[str, Any], **facts: Any) -> None:
        """Other members from the next epoch on: all of them with group and public key, and who changed."""
        self._append("membership", version=version, period=period, clients=dict(clients), **facts)

    def round(
        self,
        epoch: int,
        round_id: int,
        kind: str,
        context: str,
        roster_hash: str,
        messages: Mapping[str, str],
        contributors: Sequence[str],
        dropouts: Sequence[str],
        **facts: Any,
    ) -> None:
        """One aggregation that was opened. `context` is the digest of what was scored, `messages` maps a
        label of a message (such as `upload/<client>`) to its SHA-256."""
        self._append(
            "round", epoch=epoch, round=round_id, kind=kind, context=context, roster_hash=roster_hash,
            messages=dict(messages), contributors=list(contributors), dropouts=list(dropouts), **facts,
        )  # fmt: skip

    def abort(self, reason: str, **facts: Any) -> None:
        """A round, epoch or run that ended without opening anything, and why."""
        self._append("abort", reason=reason, **facts)

    def resume(self, stage: str, step: int | None = None, **facts: Any) -> None:
        """The run went on from the checkpoint at `step` of `stage`; that stage's later rounds recur."""
        self._append("resume", stage=stage, step=step, **facts)


def _check_chain(rows: Iterable[dict[str, Any]], name: str) -> str:
    head = _GENESIS
    for number, row in enumerate(rows):
        missing = [field for field in _CHAIN_FIELDS if field not in row]
        if missing:
            raise RunError(f"{name} row {number} lacks {', '.join(missing)}: it is not a transcript row")
        if row["seq"] != number:
            raise RunError(
                f"{name} row {number} calls itself row {row['seq']}: a row was removed, added or moved"
            )
        if row["prev"] != head:
            raise RunError(
                f"{name} row {number} does not follow from the row before it: the chain was broken"
            )
        if digest({key: value for key, value in row.items() if key != "hash"}) != row["hash"]:
            raise RunError(f"{name} row {number} does not match its own hash: the row was changed")
        head = row["hash"]
    return head


def verify(path: Path, head: str | None = None) -> tuple[int, str]:
    """Check a transcript; returns the number of rows and the hash of the last one.

    Raises RunError with the number of the first bad row, for an unfinished last line, and, with `head` (as
    noted by another party), for a chain that ends elsewhere.
    """
    if not path.exists():
        raise RunError(f"{path.name} is missing: name a transcript file")
    content = path.read_bytes()
    rows, whole = scan(content, path.name)
    if whole < len(content):
        raise RunError(
            f"{path.name} row {len(rows)} is unfinished: the run was stopped while writing it; resume it"
        )
    found = _check_chain(rows, path.name)
    if head is not None and found != head:
        raise RunError(
            f"{path.name} ends at row {len(rows) - 1} with {found}, expected {head}: cut off or rewritten"
        )
    return len(rows), found


# --- run directory ------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Versions that a result may depend on: this project, Python, the platform, the packages installed.

    No host, user or path names.
    """
    facts = {
        "appa-secure": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": f"{platform.system()} {platform.machine()}",
    }
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return facts


class RunDir:
    """One run's directory; holds its lock until `close`, so that two processes never write one run.

    Journals open on first use: a file exists only where something was recorded.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise RunError(f"another process is writing {root}: wait for it or choose another name") from None
        for directory in (root, root / _STAGES):
            for leftover in directory.glob(".*.tmp"):  # of a process that was killed inside atomic_write
                leftover.unlink()

    @classmethod
    def create(cls, root: Path) -> Self:
        """A new run in `root`, made with its parents; RunError if something is there already."""
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise RunError(f"{root} exists already: choose another name, or resume that run")
        (root / _STAGES).mkdir(parents=True)
        sync_directory(root)
        return cls(root)

    @classmethod
    def open(cls, root: Path) -> Self:
        """An existing run, to resume it; RunError if `root` is not a run directory."""
        if not (root / _STAGES).is_dir():
            raise RunError(f"{root} is not a run directory: name one that `appa-secure run` made")
        return cls(root)

    def path(self, name: str) -> Path:
        """Path of a file of this run."""
        return self.root / name

    @cached_property
    def metrics(self) -> StepJournal:
        """Rows per alignment step and predictor round; safe to release."""
        return StepJournal(self.path(METRICS))

    @cached_property
    def measurement(self) -> StepJournal:
        """Rows computed from true preferences; only with `evaluation.truth`, stamped `not private`."""
        return StepJournal(self.path(MEASUREMENT))

    @cached_property
    def ledger(self) -> Journal:
        """What was spent, written before the release it pays for; never truncated."""
        return Journal(self.path(LEDGER))

    @cached_property
    def output_ledger(self) -> Journal:
        """What clients spent of their budgets as whole clients, where sums carry output noise; never truncated."""
        return Journal(self.path(OUTPUT_LEDGER))

    @cached_property
    def transcript(self) -> Transcript:
        """The protocol's hash chain; never truncated."""
        return Transcript(self.path(TRANSCRIPT))

    def write_config(self, text: str) -> None:
        """Store the resolved configuration; RunError naming the line if a resumed run brings another."""
        target = self.path(CONFIG)
        if not target.exists():
            atomic_write(target, text)
            return
        old, new = target.read_text(encoding="utf-8").splitlines(), text.splitlines()
        if old != new:
            number = next(
                (k for k, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new))
            )
            was, now = ("\n".join(lines[number : number + 1]).strip() for lines in (old, new))
            raise RunError(
                f"{CONFIG} line {number + 1} was {was!r} and is now {now!r}: resume with the same options"
            )

    def write_environment(self) -> None:
        """Store `environment()`; versions that changed until a resume are added below the first ones."""
        target = self.path(ENVIRONMENT)
        text = "".join(f"{name} {version}\n" for name, version in environment().items())
        old = target.read_text(encoding="utf-8") if target.exists() else ""
        if not old.endswith(text):
            atomic_write(target, f"{old}\nresumed with\n{text}" if old else text)

    def stage_done(self, name: str) -> Any:
        """The payload with which stage `name` was marked done, or None if it is not done."""
        marker = self._marker(name)
        return json.loads(marker.read_bytes())["payload"] if marker.exists() else None

    def mark_done(self, name: str, payload: Any = None) -> None:
        """Mark stage `name` done, atomically, with what a resumed run needs of it (JSON, default {})."""
        value = {"payload": {} if payload is None else payload}
        atomic_write(self._marker(name), canonical_json(value) + b"\n")

    def _marker(self, name: str) -> Path:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
            raise RunError(f"stage name {name!r} must be lower-case letters, digits, - and _")
        return self.root / _STAGES / f"{name}.json"

    def write_json(self, name: str, value: Any) -> None:
        """Store `value` as readable JSON (indented, keys in their order), atomically; RunError for NaN."""
        text = json.dumps(plain(value, name), indent=2, ensure_ascii=False, allow_nan=False)
        atomic_write(self.path(name), text + "\n")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Store `summary.json`."""
        self.write_json(SUMMARY, summary)

    def write_fairness(self, fairness: Mapping[str, Any]) -> None:
        """Store `fairness.json`."""
        self.write_json(FAIRNESS, fairness)

    def close(self) -> None:
        """Close the journals that were opened and give the lock back. Closing twice is allowed."""
        for name in ("metrics", "measurement", "ledger", "output_ledger", "transcript"):
            if name in self.__dict__:
                self.__dict__[name].close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
