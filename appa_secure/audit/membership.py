"""Membership inference: was this answer in the training data? Asked of the predictor and of what the policy learns.

Each client of the configured run keeps its true answers to the context questions. Of its training data there is left,
per question, one answer drawn from its group's answers, and a fair coin decides whether it is in the data or not. That
is the case in which a model remembers most, and the clients, the training and the rewards are the real ones. The run is
repeated without differential privacy, as a control: an attack that fails there says nothing.

- Predictor: the adversary holds the released parameters and the client's context; its score for an answer is the log
  of the predicted share.
- Policy: `policy_shares` stands in for the policy. For the reward R that the real path gives N answers to each
  question, the optimum of the KL-regularised objective over these N is pi(a) ~ exp(R(a) / beta); PPO on a language
  model approaches it from far. The adversary reads the policy's expected answer. A policy that saw the question in
  few steps says less.
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
from appa_secure.launch import LocalFederation, Parts, prepare
from appa_secure.predictor import PreferencePredictor, context_points, predict, unflatten
from appa_secure.records import Journal, RunDir
from appa_secure.tasks import answer_text, parse, random_answer
from clients.client import Client
from clients.store import ClientStore
from coordinator.predictor import record_ledger, train_predictor
from coordinator.reward import FederatedReward
from coordinator.rounds import Rounds, ask

Floats = NDArray[np.float64]
Coins = NDArray[np.bool_]

ANSWERS = 24  # answers per question that the stand-in for the policy chooses from


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
    """A finished training: targets, predicted shares client -> question -> (K,), expected answers question -> (K,)."""

    targets: list[Target]
    predicted: dict[str, dict[str, Floats]]
    policy: dict[str, Floats]

    def predictor(self) -> Roc:
        """Membership from the predictor."""
        return self._roc([self.predicted[t.client][t.question][t.option] for t in self.targets])

    def answers(self) -> Roc:
        """Membership from the policy's answers."""
        return self._roc([self.policy[t.question][t.option] for t in self.targets])

    def _roc(self, shares: list[float]) -> Roc:
        return roc(np.log(np.maximum(shares, 1e-12)), np.array([t.member for t in self.targets]))


def without_privacy(config: Config) -> Config:
    """The same run with privacy=off."""
    return config.model_copy(update={"privacy": config.privacy.model_copy(update={"enabled": False})})


def attack(config: Config, progress: Callable[[int, int], None]) -> Attacked:
    """Train the configured run's predictor on targets and score answers with it. progress: called with (rounds done,
    rounds)."""
    with scratch() as folder:
        parts = prepare(config, Path(folder) / "run")
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
        clients = {c: open_client(parts, c, holdings[c]) for c in parts.agreement.clients}
        with RunDir.create(Path(folder) / "run") as run:
            return _train(config, parts, clients, run, targets, progress)


def _train(
    config: Config,
    parts: Parts,
    clients: dict[str, Client],
    run: RunDir,
    targets: list[Target],
    progress: Callable[[int, int], None],
) -> Attacked:
    agreement = parts.agreement
    federation = LocalFederation({c: client.handle for c, client in clients.items()})
    run.transcript.run(agreement.plan.run, agreement.digest().hex(), mode=agreement.mode)
    ask(federation, "setup", run=agreement.plan.run, agreement=agreement.digest())
    for client, reply in ask(federation, "context").items():
        record_ledger(run.ledger, client, reply.body["ledger"])
    rounds = Rounds(agreement, federation, run)
    theta = train_predictor(
        agreement, rounds, run, config.seed, config.predictor.server_lr,
        lambda done, _: progress(done, agreement.plan.rounds),
    )  # fmt: skip
    ask(federation, "freeze", parameters=theta.astype("<f4").tobytes())
    model = PreferencePredictor(agreement.predictor)
    unflatten(model, theta)
    predicted = {}
    for client in clients:
        shares = stolen_context(parts, client)
        points = context_points([parts.embeddings[q] for q in shares], list(shares.values()))
        found = predict(model, points, [parts.embeddings[q] for q in agreement.plan.train])
        predicted[client] = dict(zip(agreement.plan.train, found, strict=True))
    journal = Journal(run.path("rewards.jsonl"))
    try:
        reward = FederatedReward(agreement, rounds, journal, config.task.format_penalty)
        policy = policy_shares(agreement, reward, config.ppo.kl_coef, config.seed)
    finally:
        journal.close()
    return Attacked(targets, predicted, policy)


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
        answers = np.stack([_shares(texts[i], agreement, q) for i in rows])  # (N, K)
        out[q] = special.softmax(rewards[rows] / max(beta, 1e-3)) @ answers
    return out


def _shares(text: str, agreement: Agreement, question: str) -> Floats:
    parsed = parse(text, agreement.questions[question], agreement.task)
    assert parsed is not None
    return np.asarray(parsed / max(parsed.sum(), 1e-12))


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
