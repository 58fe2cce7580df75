"""A run directory as the report sees it: whatever is there is read, whatever is not is noted."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from appa_secure import records
from appa_secure.errors import RunError

NOT_PRIVATE = "not private"


@dataclass(frozen=True)
class Alignment:
    """How well the policy answers for each group on one set of questions, each figure in [0, 1]."""

    per_group: dict[str, float]
    avg: float
    min: float
    fairness: float | None
    ci_avg: tuple[float, float] | None
    ci_min: tuple[float, float] | None


@dataclass(frozen=True)
class Run:
    """One run directory. Missing or unreadable files leave empty fields and a line in `notes`."""

    path: Path
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    environment: str = ""
    steps: tuple[dict[str, Any], ...] = ()  # alignment rows of metrics.jsonl
    rounds: tuple[dict[str, Any], ...] = ()  # predictor rows of metrics.jsonl
    measurement: tuple[dict[str, Any], ...] = ()
    ledger: tuple[dict[str, Any], ...] = ()
    transcript: tuple[dict[str, Any], ...] = ()
    transcript_fault: str | None = None
    statement: str = ""
    stages_done: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: the summary is the last thing it writes."""
        return bool(self.summary)

    def get(self, name: str, default: Any = None) -> Any:
        """The summary's value at a dotted name, or the configuration's, or `default`."""
        for source in (self.summary, self.config):
            value = lookup(source, name)
            if value is not None:
                return value
        return default

    def alignment(self, split: str, when: str) -> Alignment | None:
        """Measured alignment on "train" or "heldout" questions, "before" or "after" training, if measured."""
        found = lookup(self.summary, f"alignment.{split}.{when}")
        if not isinstance(found, Mapping) or not found.get("per_group"):
            return None
        groups = {str(name): float(value) for name, value in found["per_group"].items()}
        values = list(groups.values())
        return Alignment(
            per_group=groups,
            avg=float(found.get("avg", sum(values) / len(values))),
            min=float(found.get("min", min(values))),
            fairness=found.get("fairness_index"),
            ci_avg=_interval(lookup(found, "ci95.avg")),
            ci_min=_interval(lookup(found, "ci95.min")),
        )

    def ceiling(self, split: str, which: str) -> float | None:
        """What the best policy could reach, where known. One ceiling without a split belongs to training."""
        value = lookup(self.summary, f"ceiling.{split}.{which}")
        if value is None and split == "train":
            value = lookup(self.summary, f"ceiling.{which}")
        return float(value) if isinstance(value, int | float) else None

    @property
    def epsilon(self) -> dict[str, float]:
        """Epsilon spent per client; empty before the run's end."""
        spent = lookup(self.summary, "privacy.epsilon")
        if not isinstance(spent, Mapping):
            return {}
        return {str(name): float(value) for name, value in spent.items() if isinstance(value, int | float)}

    @property
    def largest_epsilon(self) -> float | None:
        """The largest epsilon of any client, of an unfinished run as its last step stated it."""
        stated = [value for row in self.steps[-1:] if isinstance(value := row.get("epsilon"), int | float)]
        return max(self.epsilon.values(), default=stated[0] if stated else None)

    @property
    def dp_enabled(self) -> bool | None:
        """Whether differential privacy was on; None if nothing says so."""
        value = self.get("privacy.enabled")
        if isinstance(value, bool):
            return value
        return bool(self.epsilon) if self.summary else None

    @property
    def secagg_mode(self) -> str | None:
        """blind, cohort or clear; None if nothing says so."""
        mode = self.get("secagg.mode")
        return None if mode is None else str(mode)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per stage, as far as known."""
        spent = lookup(self.summary, "seconds")
        if not isinstance(spent, Mapping):
            return {}
        return {str(name): float(value) for name, value in spent.items() if isinstance(value, int | float)}

    @property
    def groups(self) -> list[str]:
        """The groups' names, as far as known."""
        return [str(name) for name in lookup(self.summary, "groups") or []]


def lookup(tree: Any, name: str) -> Any:
    """The value at a dotted name in nested mappings, None if any part is missing."""
    for part in name.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return None
        tree = tree[part]
    return tree


def _interval(value: Any) -> tuple[float, float] | None:
    return (float(value[0]), float(value[1])) if isinstance(value, list | tuple) and len(value) == 2 else None


def load_run(path: Path) -> Run:
    """Read `path`, finished or not. RunError if it is no directory or holds nothing of a run."""
    if not path.is_dir():
        raise RunError(f"{path} is not a directory: name a run directory")
    if not any((path / name).exists() for name in (records.CONFIG, records.METRICS, records.SUMMARY)):
        raise RunError(
            f"{path} holds no run: {records.CONFIG}, {records.METRICS} and {records.SUMMARY} are missing"
        )
    notes: list[str] = []

    def read(name: str, parse: Callable[[Path], Any], empty: Any, meaning: str | None) -> Any:
        target = path / name
        if not target.exists():
            if meaning:
                notes.append(f"{name} is missing: {meaning}.")
            return empty
        try:
            return parse(target)
        except (RunError, ValueError, OSError, yaml.YAMLError) as error:
            notes.append(f"{name} could not be read: {error}.")
            return empty

    config_text, config = read(records.CONFIG, _config, ("", {}), "the options of the run are unknown")
    metrics = read(records.METRICS, records.read_journal, [], "no step was recorded")
    transcript = read(records.TRANSCRIPT, records.read_journal, [], "the protocol cannot be checked")
    fault = None
    if (path / records.TRANSCRIPT).exists():
        try:
            records.verify(path / records.TRANSCRIPT)
        except RunError as error:
            fault = str(error)
    unpaid = None if lookup(config, "privacy.enabled") is False else "what was spent is not recorded"
    return Run(
        path=path,
        summary=read(records.SUMMARY, _object, {}, "the run has not come to its end"),
        config=config,
        config_text=config_text,
        environment=read(records.ENVIRONMENT, _text, "", "package versions are unknown"),
        steps=tuple(row for row in metrics if isinstance(row.get("step"), int)),
        measurement=tuple(read(records.MEASUREMENT, records.read_journal, [], None)),
        ledger=tuple(read(records.LEDGER, records.read_journal, [], unpaid)),
        transcript=tuple(transcript),
        transcript_fault=fault,
        statement=read(records.STATEMENT_MD, _text, "", "the run has made no privacy statement"),
        stages_done=tuple(sorted(marker.stem for marker in (path / "stages").glob("[!.]*.json"))),
        notes=tuple(notes),
    )


def _config(path: Path) -> tuple[str, dict[str, Any]]:
    text = _text(path)
    value = yaml.safe_load(text)
    if not isinstance(value, dict):
        raise ValueError("not a mapping of options")
    return text, value


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _object(path: Path) -> dict[str, Any]:
    value = json.loads(_text(path))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value
