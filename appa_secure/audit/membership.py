"""Membership inference: was this answer in the training data? Asked of the predictor and of what the policy learns.

Each client of the configured run keeps its true answers to the context questions. Of its training data there is left,
per question, one answer drawn from its group's answers, and a fair coin decides whether it is in the data or not. That
is the case in which a model remembers most, and the clients, the training and the rewards are the real ones. The run is
repeated without differential privacy, as a control: an attack that fails there says nothing.

- Predictor: the adversary holds the released parameters and the client's context; its score for an answer is the log
  of the predicted share.
- Policy: the adversary reads the policy's expected answer; its score is the log of the share of the target's option.
  The policy is the language model that the run trains, asked for many answers (`sampled_shares`), or, without the time
  for that, a stand-in (`policy_shares`): for the reward R that the real path gives N answers to each question, the
  optimum of the KL-regularised objective over these N is pi(a) ~ exp(R(a) / beta). PPO on a language model approaches
  it from far, and says less of a question that it saw in few steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from appa_secure.agreement import Agreement
from appa_secure.audit.canaries import scratch
from appa_secure.config import Config
from appa_secure.data import GroupData, Responses
from appa_secure.errors import ConfigError
from appa_secure.launch import LocalFederation, Parts, prepare
from appa_secure.predictor import PreferencePredictor, context_points, predict, unflatten
from appa_secure.progress import Progress
from appa_secure.records import Journal, RunDir
from appa_secure.tasks import answer_text, parse, prompt, random_answer
from clients.client import Client
from clients.store import ClientStore
from coordinator.pipeline import Pipeline
from coordinator.reward import FederatedReward
from coordinator.rounds import Rounds

Floats = NDArray[np.float64]
Coins = NDArray[np.bool_]

ANSWERS = 24  # answers per question that the stand-in for the policy chooses from
SAMPLES = 64  # answers per question that a language model is asked for


@dataclass(frozen=True)
class Roc:
    """How well scores tell members from others. auc with its 95 % interval (DeLong et al. 1988); false, true: rates of
    the curve, ascending; members, others: how many of each."""

    auc: float
    low: float
    high: float
    members: int
    others: int
    false: Floats
    true: Floats

    @property
    def at_chance(self) -> bool:
        """Whether the interval contains 1/2."""
        return self.low <= 0.5 <= self.high


def roc(scores: Floats, member: Coins) -> Roc:
    """The curve of `scores` (n,), higher for members, against `member` (n,). ValueError without both kinds."""
    inside, outside = np.asarray(scores)[member], np.asarray(scores)[~member]
    m, n = len(inside), len(outside)
    if not m or not n:
        raise ValueError(f"a curve needs members and others, got {m} and {n}")
    ranks = stats.rankdata(np.concatenate([inside, outside]))
    # Share of the others below each member, and of the members above each other; ties count half.
    above = (ranks[:m] - stats.rankdata(inside)) / n
    below = 1 - (ranks[m:] - stats.rankdata(outside)) / m
    auc = float(above.mean())
    spread = (above.var(ddof=1) / m if m > 1 else 0.25) + (below.var(ddof=1) / n if n > 1 else 0.25)
    reach = float(stats.norm.ppf(0.975) * np.sqrt(spread))
    levels = np.unique(scores)[::-1]
    true = np.concatenate([[0.0], (inside[:, None] >= levels).mean(axis=0)])
    false = np.concatenate([[0.0], (outside[:, None] >= levels).mean(axis=0)])
    return Roc(auc, max(0.0, auc - reach), min(1.0, auc + reach), m, n, false, true)


@dataclass(frozen=True)
class Target:
    """One answer whose membership is asked for."""

    client: str
    question: str
    option: int
    member: bool


@dataclass(frozen=True)
class Attacked:
    """A finished training: targets, and what was read off it about each target's option.

    predicted: share that its client's predictions give it (n,); policy: share in the policy's expected answer (n,).
    """

    targets: list[Target]
    predicted: Floats
    policy: Floats

    def predictor(self) -> Roc:
        """Membership from the predictor."""
        return self._roc(self.predicted)

    def answers(self) -> Roc:
        """Membership from the policy's answers."""
        return self._roc(self.policy)

    def _roc(self, shares: Floats) -> Roc:
        return roc(np.log(np.maximum(shares, 1e-12)), np.array([t.member for t in self.targets]))


def without_privacy(config: Config) -> Config:
    """The same run with privacy=off."""
    return config.model_copy(update={"privacy": config.privacy.model_copy(update={"enabled": False})})


def attack(config: Config, progress: Progress, language_model: bool = False) -> Attacked:
    """Train the configured run on targets and score answers with it.

    language_model: train the run's policy too and ask it, instead of the stand-in. Raises ConfigError for a policy that
    is none.
    """
    if language_model and config.policy.kind == "tabular":
        raise ConfigError("policy=tabular is no language model to attack. Fix: policy=tiny")
    quiet = config.evaluation.model_copy(update={"truth": False})
    until = "align" if language_model else "predictor"
    config = config.model_copy(update={"evaluation": quiet, "until": until})
    with scratch() as folder, RunDir.create(Path(folder) / "run") as run:
        parts = prepare(config, run.root)
        parts = replace(
            parts, agreement=replace(parts.agreement, mode="clear", truth=False), client_root=Path(folder)
        )
        rng = np.random.default_rng([config.seed, 0x3E3B])
        targets: list[Target] = []
        holdings = {}
        for name, group in sorted(parts.holdings.items()):
            mine = _targets(name, group, parts.agreement, rng)
            holdings[name] = planted(group, parts.agreement, [t for t in mine if t.member])
            targets += mine
        agreement = parts.agreement
        clients = {c: open_client(parts, c, holdings[c]) for c in agreement.clients}
        federation = LocalFederation({c: client.handle for c, client in clients.items()})
        pipeline = Pipeline(
            config, agreement, parts.heldout, federation, run, progress, parts.nominal, parts.embeddings
        )
        pipeline.run()
        theta = np.load(run.path("predictor") / "parameters.npy")
        predicted = {c: _predicted(parts, c, theta) for c in clients}
        if language_model:
            policy = sampled_shares(agreement, pipeline.speaker(), config.task.style)
        else:
            journal = Journal(run.path("rewards.jsonl"))
            try:
                rounds = Rounds(agreement, federation, run)
                reward = FederatedReward(agreement, rounds, journal, config.task.format_penalty)
                policy = policy_shares(agreement, reward, config.ppo.kl_coef, config.seed)
            finally:
                journal.close()
    return Attacked(
        targets,
        np.array([predicted[t.client][t.question][t.option] for t in targets]),
        np.array([policy[t.question][t.option] for t in targets]),
    )


def _predicted(parts: Parts, client: str, theta: NDArray[np.float32]) -> dict[str, Floats]:
    """Question -> (K,) shares predicted by the parameters `theta` (P,) for the context in the client's store."""
    model = PreferencePredictor(parts.agreement.predictor)
    unflatten(model, theta)
    shares, asked = stolen_context(parts, client), parts.agreement.plan.train
    points = context_points([parts.embeddings[q] for q in shares], list(shares.values()))
    return dict(zip(asked, predict(model, points, [parts.embeddings[q] for q in asked]), strict=True))


def sampled_shares(
    agreement: Agreement, generate: Callable[[list[str], int], list[list[str]]], style: str
) -> dict[str, Floats]:
    """Question -> (K,) mean of `SAMPLES` answers of a language model; those that cannot be read are left out.

    generate: (prompts, samples) -> the texts for each prompt.
    """
    asked = agreement.plan.train
    texts = generate([prompt(agreement.questions[q], agreement.task, style) for q in asked], SAMPLES)
    out = {}
    for q, row in zip(asked, texts, strict=True):
        found = [_shares(text, agreement, q) for text in row]
        answers = [f for f in found if f is not None]
        k = len(agreement.questions[q].options)
        out[q] = np.mean(answers, axis=0) if answers else np.full(k, 1.0 / k)
    return out


def policy_shares(agreement: Agreement, reward: FederatedReward, beta: float, seed: int) -> dict[str, Floats]:
    """Question -> (K,) expected answer of the policy that is optimal for the real rewards; see the module docstring."""
    rng = np.random.default_rng([seed, 0x9011])
    qids, texts = [], []
    for q in agreement.plan.train:
        k = len(agreement.questions[q].options)
        options = (
            {answer_text([10 * (i == j) for i in range(k)], "dpa") for j in range(k)}
            if agreement.task == "dpa"
            else set()
        )
        options |= {random_answer(agreement.task, k, rng) for _ in range(ANSWERS - len(options))}
        texts += sorted(options)
        qids += [q] * len(options)
    rewards = np.array(reward.step(1, qids, texts), dtype=np.float64)
    out = {}
    for q in agreement.plan.train:
        rows = [i for i, asked in enumerate(qids) if asked == q]
        answers = np.stack([a for i in rows if (a := _shares(texts[i], agreement, q)) is not None])  # (N, K)
        out[q] = special.softmax(rewards[rows] / max(beta, 1e-3)) @ answers
    return out


def _shares(text: str, agreement: Agreement, question: str) -> Floats | None:
    """(K,) shares of an answer; None for one that cannot be read."""
    parsed = parse(text, agreement.questions[question], agreement.task, agreement.max_weight)
    return None if parsed is None else np.asarray(parsed / max(parsed.sum(), 1e-12))


def _targets(name: str, group: GroupData, agreement: Agreement, rng: np.random.Generator) -> list[Target]:
    found = []
    for q in agreement.plan.train:
        if group.has(q):
            option = int(rng.choice(len(group.counts[q]), p=group.distribution(q)))
            found.append(Target(name, q, option, bool(rng.random() < 0.5)))
    return found


def planted(group: GroupData, agreement: Agreement, members: list[Target]) -> GroupData:
    """The group's true context answers, and of its training answers the members alone, each by a person of its own."""
    counts = {q: c if q in agreement.plan.context else np.zeros_like(c) for q, c in group.counts.items()}
    for t in members:
        counts[t.question][t.option] = 1.0
    if group.responses is None:
        return GroupData(group.name, counts, group.nominal)
    order = agreement.question_order
    known, context = group.responses, {order.index(q) for q in agreement.plan.context}
    kept = np.isin(known.question, list(context))
    new = int(known.respondent.max()) + 1 + np.arange(len(members))
    responses = Responses(
        np.concatenate([known.respondent[kept], new]),
        np.concatenate([known.question[kept], [order.index(t.question) for t in members]]),
        np.concatenate([known.option[kept], [t.option for t in members]]),
    )
    return GroupData(group.name, counts, responses=responses)


def open_client(parts: Parts, client: str, data: GroupData) -> Client:
    """The real client with other data, its store below `parts.client_root`."""
    return replace(parts, holdings={client: data}).client(client)


def stolen_context(parts: Parts, client: str) -> dict[str, Floats]:
    """The context shares in a client's store, question -> (K,)."""
    kept = ClientStore(parts.site(client)).load()["context"]
    return {q: np.frombuffer(kept[q]) for q in parts.agreement.plan.context if q in kept}
