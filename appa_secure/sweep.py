"""Several runs over the values of any fields: `appa-secure sweep aggregation=appa,min seed=1,2`.

The values come from the command line in Hydra's syntax (`a,b`, `range(1,4)`), or from the experiment, whose file
may declare a study under `sweep`: one mapping of fields to values, or a list of them, each a grid of its own

    sweep:
      - {seed: [1, 2, 3], privacy: ["off"]}
      - {seed: [1, 2, 3], privacy: [dp], privacy.epsilon: [8, 3, 1], predictor.rounds: 80}

Fields with lists give the runs their names; one without a list is set, and goes without saying. A grid may name other
experiments, which then take the place of the one that declares it: a study over several data sets. The command line
replaces a field's values. All combinations are checked before the first one starts. Each runs in
a process of its own, as many side by side as there are jobs. The folder of a sweep depends on what is held fixed
and on which fields vary, not on their values: repeating the command goes on where it stopped, and adding a seed
adds runs.

What several runs have in common is computed once: runs with the same predictor start from one that ends with it
(`appa_secure.origin`), runs with the same warmed-up policy copy it (`policy.cache_dir`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.errors import HydraException
from omegaconf import OmegaConf

from appa_secure import children, records
from appa_secure.config import Config, compose, load, options, parse_overrides
from appa_secure.errors import AppaError, ConfigError, RunError
from appa_secure.origin import predictor_part


@dataclass(frozen=True)
class Member:
    """One run of a sweep: what makes it different, how it is started, where it goes, whose predictor it starts from."""

    varied: Mapping[str, str]
    overrides: tuple[str, ...]
    config: Config
    directory: Path
    origin: Member | None = None

    @property
    def finished(self) -> bool:
        """Whether this very run has ended well before; RunError if the folder holds another one."""
        if not (self.directory / records.CONFIG).exists():
            return False
        if _compared(load(self.directory / records.CONFIG)) != _compared(self.config):
            raise RunError(
                f"{self.directory} holds a run with another configuration: choose another sweep by name=..."
            )
        return self.ended

    @property
    def ended(self) -> bool:
        """Whether a run in the folder has ended well, whatever its configuration."""
        return (self.directory / records.SUMMARY).exists()

    def summary(self) -> dict[str, Any] | None:
        """The run's summary.json; None while it has not ended well."""
        return json.loads((self.directory / records.SUMMARY).read_text("utf-8")) if self.ended else None


def plan(overrides: list[str]) -> tuple[Member, ...]:
    """Every combination of the values given, checked. ConfigError names the combination at fault."""
    study, combinations, varying = _combinations(overrides)
    for key in ("name", "output_root"):
        if key in varying:
            raise ConfigError(f"{key} names the folder of the sweep and cannot vary. Fix: give one {key}")
    root, cache, stores = _root(study, combinations[0], varying)
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
        # What comes later wins: a cache of one's own may be given.
        final = (cache, *combination, stores, f"output_root={_quoted(str(root))}", f"name={_quoted(label)}")
        members[label] = Member(varied, final, _composed(label if varied else "", final), root / label)
    return _families(root, list(members.values()))


def _composed(label: str, overrides: Sequence[str]) -> Config:
    try:
        return compose(list(overrides))
    except ConfigError as error:
        raise ConfigError(f"{label}:\n{error}" if label else str(error)) from error


def _families(root: Path, members: Sequence[Member]) -> tuple[Member, ...]:
    """The members; those whose predictor another one has, too, start from a run that ends with it."""
    parts = [predictor_part(m.config).to_yaml() if _may_share(m.config) else None for m in members]
    count, origins = Counter(parts), {}
    found = []
    for member, part in zip(members, parts, strict=True):
        if part is None or count[part] < 2:
            found.append(member)
            continue
        if part not in origins:
            name = f"predictor-{records.digest(part)[:12]}"
            overrides = (*member.overrides, "until=predictor", f"name={name}")
            origins[part] = Member({}, overrides, _composed(name, overrides), root / name)
        where = str(origins[part].directory)
        predictor = member.config.predictor.model_copy(update={"origin": where})
        found.append(
            replace(
                member,
                overrides=(*member.overrides, f"predictor.origin={_quoted(where)}"),
                config=member.config.model_copy(update={"predictor": predictor}),
                origin=origins[part],
            )
        )
    return tuple(found)


def _may_share(config: Config) -> bool:
    """Whether a run may start from another one's predictor: what `config_checks` allows, and nobody chose otherwise."""
    trains = config.until == "align" and config.predictor.kind == "gpo" and config.predictor.origin is None
    return trains and config.evaluation.truth and config.secagg.output_epsilon is None


def _compared(config: Config) -> Config:
    """What makes a run the same run: not where it keeps things, nor where it takes what it would compute itself.

    A run that ends with the predictor is what its own stages read.
    """
    if config.until == "predictor":
        return predictor_part(config)
    without = {"predictor": {"origin"}, "policy": {"cache_dir"}, "federation": {"client_root"}}
    update = {
        section: getattr(config, section).model_copy(
            update={name: type(getattr(config, section)).model_fields[name].default for name in names}
        )
        for section, names in without.items()
    }
    return config.model_copy(update=update)


def note(root: Path, members: Sequence[Member]) -> None:
    """Write down in `root` which fields vary and what each run has of them; runs of earlier calls stay listed."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / records.SWEEP
    known = json.loads(path.read_text("utf-8")) if path.exists() else {"fields": [], "runs": {}}
    fields = dict.fromkeys([*known["fields"], *(key for member in members for key in member.varied)])
    runs = known["runs"] | {member.directory.name: dict(member.varied) for member in members}
    records.atomic_write(path, json.dumps({"fields": list(fields), "runs": runs}, indent=2) + "\n")


def run_all(
    members: Sequence[Member],
    jobs: int,
    say: Callable[[str], None],
    tell: Callable[[int], None] = lambda done: None,
) -> list[bool]:
    """Run all members, `jobs` at a time; returns for each whether it ended well. `tell` hears how many have ended.

    Each run gets its share of the cores for its arithmetic: results do not depend on it, the time does. Side by
    side, runs print into files of their own, `logs/RUN.log` in the folder of the sweep.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    seeds = list(dict.fromkeys(member.config.seed for member in members))
    # Seed after seed, so that what an interrupted sweep has done can be compared.
    ordered = sorted(members, key=lambda member: seeds.index(member.config.seed))
    with ThreadPoolExecutor(jobs, "run") as pool:
        # Predictors first: the pool is a queue, so nobody waits for one that has not begun.
        origins: dict[Path, Future[bool]] = {}
        for member in ordered:
            if (o := member.origin) is not None and o.directory not in origins and not member.ended:
                origins[o.directory] = pool.submit(execute, o, say, threads, jobs > 1)
        running = {
            member.directory: pool.submit(
                _after, origins.get(member.origin.directory) if member.origin else None,
                member, say, threads, jobs > 1,
            )
            for member in ordered
        }  # fmt: skip
        try:
            for done, future in enumerate(as_completed(running.values()), 1):
                future.result()
                tell(done)
            return [running[member.directory].result() for member in members]
        except BaseException:  # an interrupt reaches the children too; what has not begun must not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _after(
    origin: Future[bool] | None, member: Member, say: Callable[[str], None], threads: int, logged: bool
) -> bool:
    if origin is not None and not member.ended and not origin.result():
        say(f"{member.directory.name}: its predictor did not finish")
        return False
    return execute(member, say, threads, logged)


def execute(member: Member, say: Callable[[str], None], threads: int, logged: bool) -> bool:
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
    log = None
    if logged:
        log = member.directory.parent / "logs" / f"{label}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
    ended = children.run(arguments, log, threads)
    if ended:
        say(f"{label}: ended with code {ended}{f', see {log}' if log else ''}; the sweep goes on")
    elif logged:
        say(f"{label}: done")
    return ended == 0


# --- combinations -------------------------------------------------------------------------------------------


def _combinations(overrides: list[str]) -> tuple[str, list[tuple[str, ...]], list[str]]:
    """The experiment that declares the study, every combination as single overrides, and the fields that vary over
    them, in the order of first mention."""
    parsed = parse_overrides(overrides)
    given = {override.key_or_group: override.input_line or "" for override in parsed}
    varying = [override.key_or_group for override in parsed if override.is_sweep_override()]
    study = given.get("experiment", "").partition("=")[2]
    grids = declared_sweep(study)
    lines = []
    for grid in grids or [{}]:
        # A grid's own experiments take the place of the one that lists them.
        kept = [
            o.input_line or ""
            for o in parsed
            if not ("experiment" in grid and o.key_or_group == "experiment")
        ]
        extra = [_choice(k, value) for k, value in grid.items() if k not in given or k == "experiment"]
        lines += _expand([*kept, *extra])
    if grids:
        lists = (key for grid in grids for key, value in grid.items() if isinstance(value, list))
        declared = list(dict.fromkeys(lists))
        values = {key: {_value_of(line, key) for line in lines} for key in declared}
        varying += [key for key in declared if key not in varying and len(values[key]) > 1]
        # Grids whose difference was overridden on the command line fall together.
        lines = list(dict.fromkeys(lines))
    return study, lines, varying


def declared_sweep(experiment: str) -> list[dict[str, Any]]:
    """The grids under `sweep` in an experiment's file: field or group -> value or list of values. Often none.

    Raises ConfigError for a file that declares something else.
    """
    if experiment not in options("experiment"):
        return []  # compose says so, with the nearest name
    file = resources.files("configs").joinpath("experiment", f"{experiment}.yaml")
    found = OmegaConf.to_container(OmegaConf.create(file.read_text("utf-8"))) or {}
    grids = found.get("sweep", []) if isinstance(found, dict) else []
    grids = [grids] if isinstance(grids, dict) else grids
    if not all(isinstance(grid, dict) for grid in grids):
        raise ConfigError(
            f"experiment={experiment}: sweep is not a mapping of fields to values, or a list of them"
        )
    return [{str(key): value for key, value in grid.items()} for grid in grids]


def _expand(overrides: list[str]) -> list[tuple[str, ...]]:
    try:
        batches = BasicSweeper.split_arguments(parse_overrides(overrides), max_batch_size=None)
    except HydraException as error:
        raise ConfigError(
            f"this sweep cannot be expanded: {error}. Fix: list the values, as in seed=1,2"
        ) from error
    return [tuple(text.lstrip("+") for text in combination) for combination in batches[0]]


def _choice(key: str, value: Any) -> str:
    """A field's declared value, or list of values, as one override."""
    values = value if isinstance(value, list) else [value]
    return f"{key}=" + ",".join(_as_override(one) for one in values)


def _as_override(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if isinstance(value, int | float) or value.isidentifier() else _quoted(str(value))


def _value_of(line: tuple[str, ...], key: str) -> str | None:
    return next((text.partition("=")[2] for text in line if text.partition("=")[0] == key), None)


def _root(study: str, combination: Sequence[str], varying: list[str]) -> tuple[Path, str, str]:
    """Folder of the sweep: output_root/name, the name made from what is fixed unless it is given. And overrides for
    what its runs share, and for their clients' stores, apart from other sweeps'."""
    config = compose(list(combination))
    fixed = sorted(text for text in combination if text.partition("=")[0] not in varying)
    name = config.name or f"sweep-{study or config.experiment}-{records.digest([fixed, sorted(varying)])[:8]}"
    root = Path(config.output_root) / name
    stores = Path(config.federation.client_root) / f"{name}-{records.digest(str(root.absolute()))[:8]}"
    cache = f"policy.cache_dir={_quoted(str(root / 'warm'))}"
    return root, cache, f"federation.client_root={_quoted(str(stores))}"


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
