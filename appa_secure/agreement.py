"""What the parties of a run agree on beforehand: public, the same at every site, and digested into the set-up message.

Each site derives it from its own configuration, so a client takes none of its safety parameters (threshold, cohort,
ranges, release policy, privacy plan) from the coordinator; it only checks that the coordinator's digest is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from appa_secure.aggregation import AggregationSpec, segments
from appa_secure.config import Config
from appa_secure.config_checks import as_yaml
from appa_secure.data import Question, Split
from appa_secure.errors import ConfigError, PrivacyError
from appa_secure.journal import canonical_json
from appa_secure.predictor import PredictorShape, PreferencePredictor
from appa_secure.privacy import sensitivity
from appa_secure.privacy.accounting import GaussianEvent, calibrate
from appa_secure.privacy.ledger import Budget
from appa_secure.privacy.output import OutputPlan, plan_output
from appa_secure.privacy.plan import TrainingPlan
from appa_secure.rewards import task_of
from appa_secure.secagg.errors import BadParameters, Headroom
from appa_secure.secagg.fixedpoint import Layout, Segment
from appa_secure.secagg.keys import Directory
from appa_secure.secagg.policy import (
    ClientPolicy,
    Release,
    fewest_honest,
    most_colluders,
    threshold_for,
)
from appa_secure.systems import SystemSpec
from appa_secure.systems import segments as system_segments
from appa_secure.tasks import MAX_WEIGHT

PREDICTOR = "predictor"
REWARD = "reward"
SYSTEM = "system"


@dataclass(frozen=True)
class Agreement:
    """See the module docstring. `truth` and `secure_rng` are each site's own choice and not part of the digest."""

    plan: TrainingPlan
    budget: Budget
    context_noise: float
    questions: Mapping[str, Question]
    reward: str
    aggregation: AggregationSpec
    predictor: PredictorShape
    groups: Mapping[str, str]  # client id -> group
    directory: Directory
    mode: str  # blind, cohort or clear
    release: Release  # for rewards
    threshold: float
    min_cohort: int
    ring_bits: int
    rounds_per_epoch: int
    embedder: str
    max_weight: int = MAX_WEIGHT  # of an answer that is a distribution
    true_rewards: bool = False  # rewards from raw answers instead of predictions: simulations without privacy
    system: SystemSpec = field(default_factory=SystemSpec)
    version: int = 0  # of the membership in force; not digested, as a run is founded once
    period: int = 0  # see `appa_secure.membership`
    output: OutputPlan | None = None  # noise on the reward sums
    origin: str = ""  # digest of the finished predictor that the run starts from (`appa_secure.origin`)
    secure_rng: bool = field(default=False, compare=False)
    truth: bool = field(default=False, compare=False)

    @property
    def clients(self) -> tuple[str, ...]:
        """Client ids, sorted."""
        return tuple(sorted(self.groups))

    @property
    def question_order(self) -> tuple[str, ...]:
        """All question ids in the survey's order, to which respondents' rows refer."""
        return tuple(self.questions)

    @property
    def clear(self) -> bool:
        """No masks: the coordinator sees every group's vector; for comparison only."""
        return self.mode == "clear"

    @property
    def cohort(self) -> bool:
        """Sums inside each group; the coordinator sees one mean per group."""
        return self.mode == "cohort"

    @property
    def once_per_period(self) -> bool:
        """Whether an answer is summed with one set of parties only: a policy that opens no partial sum for differencing
        opens no two sums of different members for it either. In clear mode too, so that it can be compared."""
        return self.release == "abort" and not self.cohort

    @property
    def needs_normaliser(self) -> bool:
        """Whether clients take the normaliser Z from the coordinator, whom they then trust with it."""
        return self.aggregation.kind == "appa" and self.aggregation.variant == "paper" and not self.cohort

    @property
    def histogram_release(self) -> tuple[str, float, GaussianEvent]:
        """The release before training: its name in the ledger, the standard deviation of its noise, and its event."""
        plan = self.plan
        spread = sensitivity.histograms(plan.unit, plan.answers_per_unit)
        if plan.mechanism == "histogram":
            return (
                "histograms",
                plan.noise_multiplier * spread,
                GaussianEvent(plan.noise_multiplier, 1.0, 1),
            )
        return "context", self.context_noise, GaussianEvent(self.context_noise / spread, 1.0, 1)

    @cached_property
    def task(self) -> str:
        """The answer format the reward reads: dpa, opa or choice."""
        return task_of(self.reward)

    @cached_property
    def predictor_size(self) -> int:
        """Number of parameters of the predictor."""
        return sum(p.numel() for p in PreferencePredictor(self.predictor).parameters())

    @cached_property
    def predictor_layout(self) -> Layout:
        """Range of one client's pseudo-gradient per coordinate: 16 clipping norms per local step.

        A private step's mean gradient is at most a little longer than the clipping norm, plus noise; a value beyond the
        range is refused by the client, not clipped.
        """
        reach = 16.0 * max(self.plan.clip, 1.0) * self.plan.local_steps
        return Layout((Segment("update", self.predictor_size, -reach, reach),), self.ring_bits)

    def reward_layout(self, batch: int) -> Layout:
        """What one client sends for `batch` rollouts."""
        noise = self.output.noise if self.output else None
        if self.cohort:
            return Layout((Segment("r", batch, 0.0, 1.0),), self.ring_bits, noise)
        parts = segments(self.aggregation, batch)
        return Layout(tuple(Segment(*part) for part in parts), self.ring_bits, noise)

    @property
    def summed_together(self) -> int:
        """How many clients a reward sum has when nobody drops out; the fewest, where groups differ."""
        groups = set(self.groups.values())
        return min(len(self.members(g)) for g in groups) if self.cohort else len(self.groups)

    def system_layout(self, size: int) -> Layout:
        """What one client sends towards a model of `size` parameters (`appa_secure.systems`)."""
        return Layout(tuple(Segment(*part) for part in system_segments(self.system, size)), self.ring_bits)

    def sessions(self, client: str) -> dict[str, tuple[Directory, ClientPolicy]]:
        """The secure-aggregation sessions a client takes part in: name -> (directory, the client's own policy)."""
        everyone = ClientPolicy(
            self.min_cohort, self.threshold, self.ring_bits, self.rounds_per_epoch, self.predictor_release
        )
        policy = ClientPolicy(
            self.min_cohort, self.threshold, self.ring_bits, self.rounds_per_epoch, self.release,
            self.output.colluders if self.output else None,
        )  # fmt: skip
        if not self.cohort:
            aligning = REWARD if self.system.kind == "appa" else SYSTEM
            return {PREDICTOR: (self.directory, everyone), aligning: (self.directory, policy)}
        members = self.members(self.groups[client])
        return {
            PREDICTOR: (self.directory, everyone),
            self.reward_session(self.groups[client]): (members, policy),
        }

    @property
    def predictor_release(self) -> Release:
        """In cohort mode partial sums of predictor updates may be opened: each update alone is differentially private.

        In blind mode a group's update is as much its secret as its rewards: the policy of the rewards holds. Updates carry
        no output noise, so that `noise` means `abort` for them.
        """
        if self.plan.private and self.cohort:
            return "recover"
        return "abort" if self.release == "noise" else self.release

    def members(self, group: str) -> Directory:
        """Directory of one group's clients."""
        return Directory({c: self.directory[c] for c in self.clients if self.groups[c] == group})

    def reward_session(self, group: str | None = None) -> str:
        """Name of the session in which a reward vector travels."""
        return REWARD if not self.cohort else f"{REWARD}/{group}"

    def session_id(self, session: str) -> bytes:
        """The bytes that name a session in every key derivation of this run."""
        return hashlib.sha256(f"{self.plan.run}/{session}".encode()).digest()[:16]

    def threshold_of(self, parties: int) -> int:
        """Number of clients whose shares open a sum of `parties`."""
        return threshold_for(parties, self.threshold)

    def digest(self) -> bytes:
        """SHA-256 over everything agreed."""
        plan, spec = self.plan, self.aggregation
        return hashlib.sha256(
            canonical_json(
                {
                    "plan": {k: getattr(plan, k) for k in plan.__dataclass_fields__},
                    "budget": [self.budget.epsilon, self.budget.delta, self.budget.accountant, self.budget.unit],
                    "context_noise": self.context_noise,
                    "questions": [[q.qid, q.text, q.options, q.ordinals] for q in self.questions.values()],
                    "reward": self.reward,
                    "aggregation": {k: getattr(spec, k) for k in spec.__dataclass_fields__},
                    "predictor": {k: getattr(self.predictor, k) for k in self.predictor.__dataclass_fields__},
                    "groups": dict(self.groups),
                    "directory": self.directory.digest().hex(),
                    "secagg": [
                        self.mode, self.release, self.threshold, self.min_cohort, self.ring_bits, self.rounds_per_epoch,
                    ],
                    "output": None if self.output is None else asdict(self.output),
                    "embedder": self.embedder,
                    "answers": [self.max_weight, self.true_rewards],
                    "system": asdict(self.system),
                    "origin": self.origin,
                }
            )
        ).digest()  # fmt: skip


def make_plan(config: Config, run: str, split: Split, clients: int = 1) -> TrainingPlan:
    """The training plan, with the least noise that keeps everything a client releases within privacy.epsilon.

    Raises PrivacyError when no noise does.
    """
    p, t = config.privacy, config.predictor

    def plan(noise: float) -> TrainingPlan:
        return TrainingPlan(
            run=run, seed=config.seed, train=split.train, context=split.context, rounds=t.rounds,
            local_steps=t.local_steps, questions_per_step=min(t.questions_per_step, len(split.train)), lr=t.lr,
            private=p.enabled, unit=p.unit, clip=p.clip, sample_rate=p.sample_rate, noise_multiplier=noise,
            answers_per_unit=p.answers_per_unit, mechanism=p.mechanism,
            training=t.training, turns=clients if t.training == "one_group" else 1,
        )  # fmt: skip

    draft = plan(0.0)
    if not p.enabled:
        return draft
    if p.mechanism == "histogram":
        # Context and training questions in one release: a unit is moved by one vector, so there is nothing to compose.
        return plan(calibrate(p.epsilon, p.delta, p.accountant, [], 1.0, 1))
    fixed = [GaussianEvent(context_multiplier(config), 1.0, 1)]
    return plan(
        calibrate(p.epsilon, p.delta, p.accountant, fixed, p.sample_rate, draft.participations(t.rounds))
    )


def context_multiplier(config: Config) -> float:
    """Noise multiplier of the private context's own release (privacy.mechanism=dpsgd)."""
    p = config.privacy
    return p.context_noise / sensitivity.histograms(p.unit, p.answers_per_unit)


def make_system(config: Config) -> SystemSpec:
    """The system of a configured run."""
    s, p = config.system, config.ppo
    return SystemSpec(
        kind=s.kind, beta=s.beta, eta=s.eta, contrast=s.contrast, local_steps=s.local_steps, lr=s.lr,
        clip=s.clip, ratio_clip=p.clip, kl_coef=p.kl_coef, human_weight=s.human_weight,
        format_reward=config.task.format_penalty, labels=s.labels, generations=p.generations,
        temperature=p.temperature, clusters=s.clusters, free_rounds=s.free_rounds, style=config.task.style,
        adapter=None if config.policy.lora is None else canonical_json(config.policy.lora.model_dump()).decode(),
    )  # fmt: skip


def make_agreement(
    config: Config,
    run: str,
    questions: Sequence[Question],
    split: Split,
    groups: Mapping[str, str],
    directory: Directory,
    embedding_size: int,
    embedder: str,
    origin: str = "",
) -> Agreement:
    """The agreement of a configured run. groups: client id -> group. origin: `Origin.digest` of another run."""
    s, p = config.secagg, config.privacy
    release = s.release if s.release != "auto" else ("recover" if s.mode == "cohort" else "abort")
    agreement = Agreement(
        plan=make_plan(config, run, split, len(groups)),
        budget=Budget(p.epsilon, p.delta, p.accountant, p.unit),
        context_noise=p.context_noise,
        questions={q.qid: q for q in questions},
        reward=config.task.reward,
        aggregation=config.aggregation.spec,
        predictor=PredictorShape(
            embedding_size, config.predictor.dim, config.predictor.layers, config.predictor.heads, config.predictor.ff,
            config.predictor.mlp_depth,
        ),
        groups=dict(groups),
        directory=directory,
        mode=s.mode,
        release=release,
        threshold=s.threshold,
        min_cohort=s.min_cohort,
        ring_bits=s.ring_bits,
        rounds_per_epoch=s.rounds_per_epoch,
        embedder=embedder,
        max_weight=config.task.max_weight,
        true_rewards=config.predictor.kind == "truth",
        system=make_system(config),
        origin=origin,
        secure_rng=p.secure_rng,
        truth=config.evaluation.truth,
    )  # fmt: skip
    return agreement if s.output_epsilon is None else _with_output(config, agreement, s.output_epsilon)


def _with_output(config: Config, agreement: Agreement, epsilon: float) -> Agreement:
    """The agreement with noise for `ppo.steps` reward sums. Raises ConfigError where there is none that fits."""
    s, parties = config.secagg, agreement.summed_together
    threshold = agreement.threshold_of(parties)
    colluders = most_colluders(parties, threshold) if s.colluders is None else s.colluders
    try:
        honest = fewest_honest(parties, threshold, agreement.release, colluders)
        output = plan_output(epsilon, s.output_delta, config.ppo.steps, honest, colluders)
        agreement = replace(agreement, output=output)
        agreement.reward_layout(config.ppo.prompts_per_step * config.ppo.generations).preflight(parties)
    except BadParameters as error:
        raise ConfigError(f"secagg.colluders={as_yaml(s.colluders)}: {error}") from error
    except PrivacyError as error:
        raise ConfigError(
            f"secagg.output_epsilon={epsilon:g}: no noise keeps ppo.steps={config.ppo.steps} sums below it. "
            "Fix: a larger budget or fewer steps"
        ) from error
    except Headroom as error:
        raise ConfigError(f"secagg.output_epsilon={epsilon:g}: {error}") from error
    return agreement
