"""Several runs over the values of any fields: `appa-secure sweep aggregation=appa,min seed=1,2`.

Hydra's sweep syntax (`a,b` and `range(1,4)`) is expanded to single configurations, all of them checked before
the first one starts. Each runs in a process of its own. The folder of a sweep depends on what is held fixed
and on which fields vary, not on their values: repeating the command goes on where it stopped, and adding a
seed adds runs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.errors import HydraException

from appa_secure import records
from appa_secure.config import Config, compose, load, parse_overrides
from appa_secure.errors import AppaError, ConfigError, RunError


@dataclass(frozen=True)
class Member:
    """One run of a sweep: what makes it different, how it is started, where it goes."""

    varied: Mapping[str, str]
    overrides: tuple[str, ...]
    config: Config
    directory: Path

    @property
    def finished(self) -> bool:
        """Whether this very run has ended well before; RunError if the folder holds another one."""
        if not (self.directory / records.CONFIG).exists():
            return False
        if load(self.directory / records.CONFIG) != self.config:
            raise RunError(
                f"{self.directory} holds a run with another configuration: choose another sweep by name=..."
            )
        return (self.directory / records.SUMMARY).exists()

    def summary(self) -> dict[str, Any] | None:
        """The run's summary.json; None while it has not ended well."""
        path = self.directory / records.SUMMARY
        return json.loads(path.read_text("utf-8")) if path.exists() else None


def plan(overrides: list[str]) -> tuple[Member, ...]:
    """Every combination of the values given, checked. ConfigError names the combination at fault."""
    parsed = parse_overrides(overrides)
    varying = [override.key_or_group for override in parsed if override.is_sweep_override()]
    for key in ("name", "output_root"):
        if key in varying:
            raise ConfigError(f"{key} names the folder of the sweep and cannot vary. Fix: give one {key}")
    try:
        combinations = BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
    except HydraException as error:
        raise ConfigError(
            f"this sweep cannot be expanded: {error}. Fix: list the values, as in seed=1,2"
        ) from error
    root = _root(combinations[0], varying)
    members: dict[str, Member] = {}
    for combination in combinations:
        varied = {
            key: value for key, _, value in (text.partition("=") for text in combination) if key in varying
        }
        label = _label(varied)
        if label in members:
            raise ConfigError(
                f"two runs of this sweep would both be called {label}. Fix: list each value once"
            )
        final = (*combination, f"output_root={_quoted(str(root))}", f"name={_quoted(label)}")
        try:
            config = compose(list(final))
        except ConfigError as error:
            raise ConfigError(f"{label}:\n{error}" if varied else str(error)) from error
        members[label] = Member(varied, final, config, root / label)
    return tuple(members.values())


def execute(member: Member, say: Callable[[str], None]) -> bool:
    """Run one member in a process of its own, go on with it, or skip it if it has ended well.

    False if it failed. `say` gets a line for people at each turn.
    """
    label = member.directory.name
    try:
        if member.finished:
            say(f"{label}: finished before, skipped")
            return True
        if (member.directory / records.CONFIG).exists():
            say(f"{label}: resuming")
            arguments = ["--resume", str(member.directory)]
        else:
            _remove_skeleton(member.directory)
            say(f"{label}: starting")
            arguments = list(member.overrides)
    except AppaError as error:
        say(f"{label}: {error}")
        return False
    command = [sys.executable, "-m", "appa_secure.cli", "run", *arguments]
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    if ended:
        say(f"{label}: ended with code {ended}; the sweep goes on")
    return ended == 0


def _root(combination: list[str], varying: list[str]) -> Path:
    """Folder of the sweep: output_root/name, the name made from what is fixed unless it is given."""
    config = compose(combination)
    fixed = sorted(text for text in combination if text.partition("=")[0] not in varying)
    name = config.name or f"sweep-{config.experiment}-{records.digest([fixed, sorted(varying)])[:8]}"
    return Path(config.output_root) / name


def _label(varied: Mapping[str, str]) -> str:
    parts = (f"{key.rpartition('.')[2]}-{value}" for key, value in varied.items())
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "_".join(parts)) or "run"


def _quoted(value: str) -> str:
    """A string as Hydra reads it back unchanged."""
    return "'" + value.replace("'", "\\'") + "'"


def _remove_skeleton(directory: Path) -> None:
    """A run killed before it wrote its configuration leaves empty folders and a lock; they hold nothing."""
    if not directory.exists():
        return
    left = [path for path in directory.rglob("*") if path.is_file() and path.name != ".lock"]
    if left:
        raise RunError(
            f"{directory} exists and is no run: move {left[0].name} away or choose another name=..."
        )
    shutil.rmtree(directory)
