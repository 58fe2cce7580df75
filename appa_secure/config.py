"""The configuration of a run: what may be set, what each field means, how a run's choices become one object.

Hydra composes the option files of `configs/` with the command line; pydantic checks every value (unknown
fields, types, ranges); `config_checks` checks what only combinations show. All of it happens before any work,
and every refusal is a `ConfigError` that names the field, the value and the fix. Defaults stand here once; an
option file says only what makes that option different.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from appa_secure import config_checks
from appa_secure.config_checks import Problem
from appa_secure.errors import ConfigError

GROUPS = (
    "data", "embedder", "predictor", "policy", "privacy", "secagg", "aggregation", "federation", "experiment",
)  # fmt: skip


def _as_text(value: object) -> object:
    """A run called 2024 or a group called 1 is still a name."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_as_text), Field(min_length=1)]
Names = Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of all sections: unknown fields refused, no silent conversion, immutable, finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _about(default: Any, meaning: str, **bounds: Any) -> Any:
    """A field with its default, its one-line meaning (shown by --help) and its bounds."""
    return Field(default=default, description=meaning, **bounds)


class TaskConfig(Section):
    reward: Literal["wasserstein", "js", "cosine", "kl", "borda", "kendall", "binary", "choice"] = _about(
        "wasserstein", "how an answer is compared with what a group prefers"
    )
    style: Literal["short", "instruct"] = _about(
        "short", "prompts: short for tiny policies, instruct for real LMs"
    )
    format_penalty: float = _about(
        0.5, "training reward of an answer that cannot be read; measured as 0", ge=-1, le=1
    )


class DataConfig(Section):
    kind: Literal["synthetic", "opinionqa", "globalopinionqa", "table"] = _about(
        "synthetic", "where the survey comes from"
    )
    path: Text | None = _about(None, "local file or folder, or a hub id")
    groups: Names | None = _about(None, "names of the groups that take part; null takes all")
    context: Count = _about(40, "questions whose private noisy counts describe a group to the predictor")
    heldout_fraction: float = _about(0.2, "share of the questions that nobody trains on", gt=0, lt=1)
    min_responses: int = _about(30, "fewest answers per group for a question to be used", ge=0)
    min_groups: Count | None = _about(
        None, "globalopinionqa: groups a question must have been asked in; null: all"
    )
    ordinal_only: bool = _about(True, "use only questions whose options have an order")
    nominal_respondents: Count | None = _about(
        None, "globalopinionqa: respondents assumed behind each published distribution"
    )
    questions: int = _about(120, "synthetic: number of questions", ge=3)
    respondents: Count = _about(400, "synthetic: people per group")
    answers_per_respondent: Count = _about(30, "synthetic: questions each person answers")
    conflict: Share = _about(0.6, "synthetic: how far apart the groups stand, 0 to 1")
    group_count: int = _about(8, "synthetic: number of groups", ge=2)
    minority: Share = _about(0.3, "synthetic: how far the minority groups stand off the rest, 0 to 1")

    @property
    def known_groups(self) -> int | None:
        """How many groups will take part, where the configuration alone says so."""
        if self.groups is not None:
            return len(self.groups)
        return self.group_count if self.kind == "synthetic" else None


class EmbedderConfig(Section):
    kind: Literal["minilm", "hf"] = _about("minilm", "encoder of questions and options")
    path: Text | None = _about(None, "local folder or hub id of the encoder")
    batch_size: Count = _about(64, "texts per forward pass")
    cache_dir: Text | None = _about(
        ".appa_cache", "where embeddings are kept by content hash; null keeps none"
    )


class PredictorConfig(Section):
    dim: Count = _about(128, "width of the preference predictor")
    layers: Count = _about(6, "transformer layers")
    heads: Count = _about(4, "attention heads; divides dim")
    ff: Count = _about(128, "width of the feed-forward layers")
    mlp_depth: Count = _about(4, "layers of the input network")
    rounds: Count = _about(100, "federated rounds")
    local_steps: Count = _about(1, "training steps per client and round")
    questions_per_step: Count = _about(64, "training questions asked in one step; public, each once per pass")
    lr: Positive = _about(0.1, "clients' learning rate (SGD); matters only with several local steps")
    server_lr: Positive = _about(3e-3, "coordinator's learning rate (Adam on the averaged update)")
    training: Literal["federated", "pooled", "one_group"] = _about(
        "federated", "pooled, one_group: a trusted party trains on all groups, or one per round"
    )


class LoraConfig(Section):
    r: Count = _about(16, "rank of the adapter")
    alpha: Count = _about(32, "scale of the adapter")
    dropout: float = _about(0.0, "dropout of the adapter's input", ge=0, lt=1)
    target_modules: Names | None = _about(None, "layers that get an adapter; null lets peft choose")


class PolicyConfig(Section):
    kind: Literal["tiny", "stories260k", "hf"] = _about("tiny", "the language model to be aligned")
    path: Text | None = _about(None, "local folder (or hub id, for hf) of the weights")
    dim: Count = _about(128, "tiny: width")
    layers: Count = _about(4, "tiny: layers")
    heads: Count = _about(4, "tiny: attention heads; divides dim")
    vocab_size: int = _about(2000, "tiny: size of the word-level vocabulary", ge=64)
    warmup_steps: int = _about(300, "steps on public text that teach the answer format", ge=0)
    warmup_lr: Positive = _about(2e-3, "learning rate of the warm-up")
    lora: LoraConfig | None = _about(None, "low-rank adapter; null trains all weights")


class PrivacyConfig(Section):
    enabled: bool = _about(True, "false trains without noise and stamps everything it writes 'not private'")
    unit: Literal["response", "respondent", "record"] = _about(
        "response", "what is protected: one answer, one person, or one group's distribution"
    )
    epsilon: Positive = _about(8.0, "privacy budget of each client for the whole run")
    delta: float = _about(1e-6, "probability left outside the guarantee", gt=0, lt=1)
    accountant: Literal["prv", "rdp"] = _about("prv", "Opacus accountant")
    clip: Positive = _about(1.0, "dpsgd: largest gradient norm of one unit")
    sample_rate: float = _about(0.1, "dpsgd: chance of a unit to be in a step", gt=0, le=1)
    mechanism: Literal["dpsgd", "histogram"] = _about(
        "dpsgd", "noise in each training step, or once on all counts"
    )
    context_noise: float = _about(4.0, "dpsgd: standard deviation of the noise on context counts", ge=0)
    answers_per_unit: Count = _about(1, "unit=respondent: answers of one person that are used at most")
    secure_rng: bool = _about(
        True,
        "noise from a secret key per client; false: from the seed, repeatable",
    )


class SecaggConfig(Section):
    mode: Literal["blind", "cohort", "clear"] = _about(
        "blind", "sums over groups; one mean per group; or no masks, for comparison"
    )
    ring_bits: Literal[32, 64] = _about(64, "size of the ring that masks live in")
    rounds_per_epoch: int = _about(64, "rounds served by one key set-up", ge=1, le=256)
    threshold: float = _about(0.667, "share of the clients that must stay for a sum to open", gt=0.5, le=1)
    min_cohort: int = _about(5, "fewest clients that are ever summed", ge=3)
    release: Literal["auto", "abort", "noise", "recover"] = _about(
        "auto", "a dropout: discard the round, or open the rest (noise: if noisy)"
    )
    output_epsilon: Positive | None = _about(
        None, "budget of one whole client, kept by noise on reward sums; null: none"
    )
    output_delta: float = _about(1e-6, "probability left outside that guarantee", gt=0, lt=1)
    colluders: int | None = _about(
        None, "clients that may collude or leave out noise; null: all it can stand", ge=0
    )


class AggregationConfig(Section):
    kind: Literal["appa", "average", "min", "max"] = _about("appa", "how the groups' rewards become one")
    variant: Literal["weighted", "paper"] = _about(
        "weighted", "appa: weights outside the exponent, or as published"
    )
    tau: float = _about(0.99, "appa: fairness index from which the plain mean is used", gt=0, le=1)
    temperature: Positive = _about(0.1, "appa: contrast of the weights; small favours the worst-off more")
    decay: float = _about(0.8, "appa: memory of a group's history (lambda)", ge=0, lt=1)
    a: float = _about(1.0, "appa, weighted: exponent scale", gt=0, le=16)
    fi: Literal["cov2", "cov"] = _about(
        "cov2", "fairness index from the squared or plain coefficient of variation"
    )
    fi_scope: Literal["question", "batch"] = _about(
        "question", "fairness index per rollout, or one per batch (leaks less)"
    )
    sharpness: Positive = _about(24.0, "min, max in blind mode: exponent scale of the approximation")


class FederationConfig(Section):
    kind: Literal["local", "simulation"] = _about("local", "one process, or Flower's simulation engine")
    client_root: Text = _about(
        "client_state", "where each client keeps its own state, outside the run directory"
    )
    members_per_group: Count = _about(1, "clients that make up a group; above 1 only with cohort or clear")


class PPOConfig(Section):
    steps: Count = _about(60, "PPO steps")
    prompts_per_step: Count = _about(32, "questions asked per step")
    generations: int = _about(4, "answers sampled per question", ge=2)
    epochs: Count = _about(2, "passes over each step's rollouts")
    minibatch_size: Count = _about(64, "rollouts per optimiser step; divides prompts_per_step x generations")
    lr: Positive = _about(1e-3, "learning rate")
    clip: float = _about(0.2, "largest change of a probability ratio", gt=0, lt=1)
    value_clip: Positive = _about(0.2, "largest change of a value estimate")
    value_coef: float = _about(0.5, "weight of the value loss", ge=0)
    gamma: float = _about(1.0, "discount per token", gt=0, le=1)
    lam: Share = _about(0.95, "lambda of generalised advantage estimation")
    kl_coef: float = _about(0.01, "penalty per nat of distance from the warmed-up policy", ge=0)
    temperature: Positive = _about(1.0, "sampling temperature")
    entropy_coef: float = _about(0.0, "bonus per nat of entropy", ge=0)
    max_grad_norm: Positive = _about(1.0, "gradient norm limit")
    checkpoint_every: Count = _about(10, "steps between checkpoints")
    device: Literal["auto", "cpu", "cuda"] = _about("auto", "where the policy runs")


class EvaluationConfig(Section):
    truth: bool = _about(True, "measure against true distributions; stamped 'not private'")
    samples: Count = _about(4, "answers sampled per question when measuring")
    bootstrap: int = _about(1000, "resamples of the 95 % intervals", ge=100)
    every: int = _about(1, "steps between per-group measurements of the rollouts; 0 for none", ge=0)
    predictor_every: int = _about(
        0, "rounds between measurements of the predictor; 0: the final one only", ge=0
    )


class Config(Section):
    """One run. Immutable; equal configurations give equal results on the same machine."""

    seed: int = _about(1, "seed of everything random except keys, masks and secure noise", ge=0, lt=2**31)
    name: Text | None = _about(None, "name of the run directory; null: experiment, seed and time")
    output_root: Text = _about("runs", "folder of the run directories")
    experiment: Text = _about("demo", "the experiment these choices started from")
    until: Literal["predictor", "align"] = _about(
        "align", "last part of the run: predictor ends it before there is a policy"
    )
    task: TaskConfig = Field(default_factory=TaskConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    embedder: EmbedderConfig = Field(default_factory=EmbedderConfig)
    predictor: PredictorConfig = Field(default_factory=PredictorConfig)
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    privacy: PrivacyConfig = Field(default_factory=PrivacyConfig)
    secagg: SecaggConfig = Field(default_factory=SecaggConfig)
    aggregation: AggregationConfig = Field(default_factory=AggregationConfig)
    federation: FederationConfig = Field(default_factory=FederationConfig)
    ppo: PPOConfig = Field(default_factory=PPOConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    def to_yaml(self) -> str:
        """Every field with its value, in a form that `load` reads back to an equal configuration."""
        return OmegaConf.to_yaml(OmegaConf.create(self.model_dump(mode="json")))


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
    tree.pop("sweep", None)  # the study that an experiment declares: for appa_secure.sweep alone
    evaluation, data = tree["evaluation"], tree["data"]
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
