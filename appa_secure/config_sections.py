"""The sections of a run's configuration: every field, what it means, its default and its bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from appa_secure.aggregation import AggregationSpec


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
    max_weight: int = _about(
        10, "dpa: largest weight in an answer; above 10 only with policy=tabular", ge=10, le=1000
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
    kind: Literal["gpo", "truth"] = _about(
        "gpo", "source of rewards: private predictor; or truth, in simulations only"
    )
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
    origin: Text | None = _about(
        None, "finished run with until=predictor whose predictor is used; set by sweeps"
    )


class LoraConfig(Section):
    r: Count = _about(16, "rank of the adapter")
    alpha: Count = _about(32, "scale of the adapter")
    dropout: float = _about(0.0, "dropout of the adapter's input", ge=0, lt=1)
    target_modules: Names | None = _about(None, "layers that get an adapter; null lets peft choose")


class PolicyConfig(Section):
    kind: Literal["tiny", "stories260k", "hf", "tabular"] = _about(
        "tiny", "what is aligned: a language model, or a table of answers"
    )
    path: Text | None = _about(None, "local folder (or hub id, for hf) of the weights")
    dim: Count = _about(128, "tiny: width")
    layers: Count = _about(4, "tiny: layers")
    heads: Count = _about(4, "tiny: attention heads; divides dim")
    vocab_size: int = _about(2000, "tiny: size of the word-level vocabulary", ge=64)
    warmup_steps: int = _about(300, "steps on public text that teach the answer format", ge=0)
    warmup_lr: Positive = _about(2e-3, "learning rate of the warm-up")
    cache_dir: Text | None = _about(None, "where warmed-up policies are kept by content hash; sweeps set it")
    lora: LoraConfig | None = _about(None, "low-rank adapter; null trains all weights")
    spread: Positive = _about(0.05, "tabular, dpa: noise of answers at the start, in probability")
    step_size: Positive = _about(0.1, "tabular: learning rate at the start; falls to a 25th")


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
    kind: Text = _about("appa", "rule over groups: appa, average, min, max, lse, maximin, module:name")
    variant: Literal["weighted", "paper"] = _about(
        "weighted", "appa: weights outside the exponent, or as published"
    )
    tau: float = _about(0.99, "appa: fairness index from which the plain mean is used", gt=0, le=1)
    temperature: Positive = _about(
        0.1, "appa, maximin: contrast of the weights; small favours the worst-off more"
    )
    band: Annotated[tuple[Share, Share], Field(strict=False)] = _about(
        (0.0, 1.0), "appa, maximin: histories are clipped to it; caps the weights' contrast"
    )
    decay: float = _about(0.8, "appa: memory of a group's history (lambda)", ge=0, lt=1)
    h0: Share | None = _about(None, "appa: history before the first step; null: the first step's mean reward")
    dial: Share = _about(0.9, "maximin: 0 is the average, 1 the worst group alone")
    ramp: Count = _about(200, "maximin: steps until the weights have their full contrast")
    a: float = _about(1.0, "appa weighted, lse: exponent scale; 0 the limit", ge=-16, le=16)
    fi: Literal["cov2", "cov"] = _about(
        "cov2", "fairness index from the squared or plain coefficient of variation"
    )
    fi_scope: Literal["question", "batch"] = _about(
        "question", "fairness index per rollout, or one per batch (leaks less)"
    )
    sharpness: Positive = _about(24.0, "min, max in blind mode: exponent scale of the approximation")

    @property
    def spec(self) -> AggregationSpec:
        """The rule with its options. Raises ValueError naming the field where they do not fit together."""
        return AggregationSpec(**self.model_dump())


class SystemConfig(Section):
    kind: Literal["appa", "grdpo", "gripo", "fedrlhf", "sft", "maxmin"] = _about(
        "appa", "how the policy is trained: PPO on the aggregated reward, or another way"
    )
    beta: Positive = _about(0.1, "grdpo, gripo: pull towards the warmed-up policy")
    eta: float = _about(0.1, "grdpo, gripo: step size of the groups' weights", ge=0)
    contrast: float = _about(100.0, "grdpo, gripo: largest ratio of two weights", ge=1, le=1e6)
    human_weight: Positive = _about(1.0, "fedrlhf: weight of a group's own reward (lambda)")
    labels: Literal["predicted", "raw"] = _about(
        "predicted", "sft: answers from private predictions; raw shares only with privacy=off"
    )
    clusters: Count = _about(2, "maxmin: reward models of the mixture")
    rounds: Count = _about(60, "maxmin: rounds of expectation-maximisation")
    free_rounds: int = _about(10, "maxmin: first rounds, in which clients do not choose", ge=0)
    local_steps: Count = _about(1, "SGD steps of a client in one round")
    lr: Positive = _about(0.1, "clients' learning rate (SGD); matters only with several local steps")
    clip: Positive = _about(1.0, "largest gradient norm of a client's step; bounds what it sends")
    server_lr: Positive = _about(1e-3, "coordinator's learning rate (Adam on the mean update)")


class FederationConfig(Section):
    kind: Literal["local", "simulation"] = _about("local", "one process, or Flower's simulation engine")
    client_root: Text = _about(
        "client_state", "where each client keeps its own state, outside the run directory"
    )
    members_per_group: Count = _about(1, "clients that make up a group; above 1 only with cohort or clear")


class PPOConfig(Section):
    steps: Count = _about(60, "PPO steps, or rounds in which clients train the policy")
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
    system: SystemConfig = Field(default_factory=SystemConfig)
    federation: FederationConfig = Field(default_factory=FederationConfig)
    ppo: PPOConfig = Field(default_factory=PPOConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    def to_yaml(self) -> str:
        """Every field with its value, in a form that `load` reads back to an equal configuration."""
        return OmegaConf.to_yaml(OmegaConf.create(self.model_dump(mode="json")))
