"""The configuration of a run: how a run's choices become one object, whose fields `config_sections` lists.

Hydra composes the option files of `configs/` with the command line; pydantic checks every value (unknown
fields, types, ranges); `config_checks` checks what only combinations show. All of it happens before any work,
and every refusal is a `ConfigError` that names the field, the value and the fix. Defaults stand once, there; an
option file says only what makes that option different.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from appa_secure import config_checks
from appa_secure.config_checks import Problem
from appa_secure.config_sections import Config
from appa_secure.errors import ConfigError
from appa_secure.rewards import FORMAT_PENALTY

GROUPS = (
    "data", "embedder", "predictor", "policy", "privacy", "secagg", "aggregation", "system", "federation", "experiment",
)  # fmt: skip


def shared(path: str) -> str | None:
    """`path` below the folder that the environment variable APPA_SHARED names; None where it is not set."""
    root = os.environ.get("APPA_SHARED")
    return str(Path(root) / path) if root else None


OmegaConf.register_new_resolver("shared", shared, replace=True)  # in configs/data


def compose(overrides: list[str]) -> Config:
    """The configuration of `appa-secure run OVERRIDES...`, checked.

    An override is `group=option` or `section.field=value`; the command line wins over the experiment, the
    experiment over the group's option file. Raises ConfigError with every problem found, one per line.
    """
    parsed = parse_overrides(overrides)
    problems = [problem for override in parsed for problem in _override_problems(override)]
    _refuse(problems)
    try:
        with initialize_config_module(config_module="configs", version_base="1.3"):
            composed = hydra_compose("config", overrides=[_for_hydra(override) for override in parsed])
        tree = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"the configuration cannot be composed: {error}") from error
    assert isinstance(tree, dict)
    study = tree.pop("sweep", None)  # that an experiment declares: for appa_secure.sweep alone
    if isinstance(study, list) and (
        others := [name for grid in study for name in grid.get("experiment", ())]
    ):
        name = next(o.value() for o in parsed if o.key_or_group == "experiment")
        raise ConfigError(
            f"experiment={name}: is a study of several experiments. Fix: appa-secure sweep experiment={name}, or one of "
            f"them, such as appa-secure run experiment={others[0]}"
        )
    evaluation, data, task = tree["evaluation"], tree["data"], tree["task"]
    if task.get("format_penalty") is None:
        task["format_penalty"] = FORMAT_PENALTY.get(task.get("reward"))
    if evaluation.get("truth") is None:
        # An institution's own answers are measured against only when somebody asks for it.
        evaluation["truth"] = data.get("kind") != "table"
    if "secure_rng" in tree["privacy"] and tree["privacy"]["secure_rng"] is None:
        # Noise that can be recomputed from the seed protects nobody who knows the seed: for measurement only.
        tree["privacy"]["secure_rng"] = data.get("kind") == "table"
    config = _validate(tree)
    _refuse([*config_checks.problems(config), *config_checks.environment_problems(config)])
    return config


def load(path: Path) -> Config:
    """The configuration in a `config.resolved.yaml`. Raises ConfigError if it is unreadable or not valid."""
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # a YAML parser's errors have no common base with the file system's
        raise ConfigError(f"{path}: cannot be read as a configuration: {error}") from error
    try:
        config = _validate(tree)
        _refuse(config_checks.problems(config))
    except ConfigError as error:
        raise ConfigError(f"{path}:\n{error}") from error
    return config


def parse_overrides(overrides: list[str]) -> list[Override]:
    """Hydra's own reading of the command line. Raises ConfigError for text that is not `field=value`."""
    parsed = []
    for text in overrides:
        try:
            parsed += OverridesParser.create().parse_overrides([text])
        except HydraException as error:
            raise ConfigError(
                f"{text!r} cannot be read: write field=value or group=option, "
                "and quote values with spaces or signs twice, as in 'data.path=\"my file.csv\"'"
            ) from error
    return parsed


def options(group: str) -> tuple[str, ...]:
    """Names of a group's option files, in alphabetical order."""
    files = resources.files("configs").joinpath(group).iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")))


def option_summary(group: str, option: str) -> str:
    """The first comment line of an option file: what the option is for."""
    text = resources.files("configs").joinpath(group, f"{option}.yaml").read_text("utf-8")
    comments = (line.removeprefix("# ") for line in text.splitlines() if line.startswith("# "))
    return next((line for line in comments if not line.startswith("@")), "")


def fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted name, default, meaning) of every field that can be set."""
    for name, info in model.model_fields.items():
        nested = _nested(info.annotation)
        if nested is None or info.default_factory is None:
            default = None if info.default is PydanticUndefined else info.default
            yield f"{prefix}{name}", default, info.description or ""
        if nested is not None:
            yield from fields(nested, f"{prefix}{name}.")


def _nested(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as `LoraConfig | None`."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _for_hydra(override: Override) -> str:
    """A field may be set whether or not the option file mentions it ('++': add or override)."""
    key, value = override.get_key_element().lstrip("+"), override.get_value_element_as_str()
    return f"{key}={value}" if key in GROUPS else f"++{key}={value}"


def _override_problems(override: Override) -> Iterator[Problem]:
    key, value = override.key_or_group, override.input_line.partition("=")[2] if override.input_line else ""
    if override.is_delete() or override.package is not None:
        yield Problem(
            key, value, "fields can be set, not removed or moved", f"{key}=null, where the field allows it"
        )
    elif override.is_sweep_override():
        yield Problem(
            key, value, "holds several values for one run",
            f"appa-secure sweep {key}={value}, or one value, or [a,b] for a list",
        )  # fmt: skip
    elif key in GROUPS:
        known = options(key)
        if override.value() not in known:
            why = f"no such option (there are {', '.join(known)})"
            yield Problem(key, value, why, f"{key}={_nearest(value, known) or '|'.join(known)}")
    else:
        yield from _field_problems(key, value)


def _field_problems(key: str, value: str) -> Iterator[Problem]:
    known = [name for name, _, _ in fields()]
    if key in known:
        return
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        yield Problem(key, value, "is a section, not a field", f"set its fields, such as {inside[0]}=...")
        return
    same_leaf = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    guess = same_leaf[0] if len(same_leaf) == 1 else _nearest(key, [*known, *GROUPS])
    if guess is None and "." not in key:
        by_leaf = {name.rpartition(".")[2]: name for name in known}
        leaf = _nearest(key, list(by_leaf))
        guess = by_leaf[leaf] if leaf else None
    if len(same_leaf) > 1:
        fix = "one of " + ", ".join(f"{name}={value}" for name in same_leaf)
    elif guess:
        fix = f"did you mean {guess}={value}?"
    else:
        fix = "appa-secure run --help lists the fields"
    yield Problem(key, value, "no such field", fix)


def _nearest(name: str, known: list[str] | tuple[str, ...]) -> str | None:
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return found[0] if found else None


def _validate(tree: Any) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(str(_as_problem(details)) for details in error.errors())) from error


def _as_problem(details: ErrorDetails) -> Problem:
    """pydantic's finding in the project's words: field, value, rule, and a value that works."""
    name = ".".join(str(part) for part in details["loc"] if not isinstance(part, int))
    value = details["input"]
    if details["type"] == "extra_forbidden":
        return next(_field_problems(name, str(value)))
    rule = details["msg"].replace("Input should be", "must be").replace("valid ", "")
    known = {field: (default, meaning) for field, default, meaning in fields()}
    if name not in known:
        return Problem(name or "configuration", value, rule, "see appa-secure run --help")
    default, meaning = known[name]
    return Problem(name, value, f"{rule} ({meaning})", f"for example {name}={config_checks.as_yaml(default)}")


def _refuse(problems: list[Problem]) -> None:
    if problems:
        raise ConfigError("\n".join(str(problem) for problem in problems))
