"""Reconstruction of a group's context answers from its rewards, with the true context and with the private one.

The adversary is the worst case that secure aggregation rules out: it sees one group's rewards alone, for answers of its
own choice, and knows the predictor. (Everybody else in a sum colluding comes to that.) Two steps:

The predictor is the coordinator's choice (threat_model/limitations.md), so the adversary takes one that is easy to read:
the public initial parameters, with the weights that read preferences made smaller.

1. rewards -> predicted shares. For each question the shares that give the rewards seen, by least squares.
2. predicted shares -> context. The predictor is a known function of the context; Levenberg-Marquardt finds the context
   shares under which it predicts what step 1 found. The search begins at the answers the adversary knows (below): from
   elsewhere it ends in other explanations on large surveys.

What it gets is the context that the client used, noise and all. How much that says about people is measured by what
differential privacy is about: neighbouring data. In every context question a fair coin decides whether one more person
chose its rarest option; the adversary knows all other answers and guesses. "At chance" means that the interval of its
hit rate contains 1/2. The exact limit of the Gaussian mechanism is Phi(1 / (2 sigma)) (`limit`), a little above 1/2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize, special, stats
from torch import Tensor

from appa_secure.agreement import REWARD, Agreement
from appa_secure.audit.canaries import request, scratch
from appa_secure.audit.membership import open_client, without_privacy
from appa_secure.config import Config
from appa_secure.data import GroupData, Responses
from appa_secure.errors import ConfigError
from appa_secure.launch import prepare
from appa_secure.messages import pack_float
from appa_secure.predictor import (
    DIRECTION,
    PreferencePredictor,
    flatten,
    log_likelihood,
    pad_options,
    unflatten,
)
from appa_secure.rewards import score
from appa_secure.tasks import answer_text, parse
from clients.client import Client
from coordinator.predictor import initial_predictor

Floats = NDArray[np.float64]

_QUESTIONS = 80  # whose rewards are used at most: many more numbers than a context has
_MILD = 0.3  # of the weights that read preferences: the context bends predictions less, and they have one explanation
_STARTS = 3  # of the search for the context
_EXPLAINED = (
    1e-5  # largest error of a centred logit at which the rewards count as explained; float32 leaves 1e-6
)


@dataclass(frozen=True)
class Reconstruction:
    """What the adversary got out of one kind of context.

    errors: reconstructed minus true count, of every option of every context question; scores, more: evidence for the
    one more person, and whether it was there; noise: standard deviation of the counts that the client keeps.
    """

    errors: Floats
    scores: Floats
    more: NDArray[np.bool_]
    noise: float

    @property
    def limit(self) -> float:
        """The largest hit rate that the noise allows anybody."""
        return float(stats.norm.cdf(0.5 / self.noise)) if self.noise else 1.0

    @property
    def exact_by_noise(self) -> float:
        """Share of the counts that this noise alone leaves as they are, when rounded."""
        return float(2 * stats.norm.cdf(0.5 / self.noise) - 1) if self.noise else 1.0

    @property
    def hits(self) -> int:
        """Right guesses about the one more person."""
        return int(((self.scores > 0) == self.more).sum())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the hit rate (Clopper and Pearson 1934)."""
        found = stats.binomtest(self.hits, len(self.more)).proportion_ci(0.95)
        return float(found.low), float(found.high)

    @property
    def at_chance(self) -> bool:
        """Whether the interval contains 1/2."""
        low, high = self.interval
        return low <= 0.5 <= high

    @property
    def exact(self) -> float:
        """Share of the counts that are reconstructed exactly, when rounded."""
        return float((np.abs(self.errors) < 0.5).mean())


def attack(config: Config, groups: int, progress: Callable[[int, int], None]) -> dict[str, Reconstruction]:
    """Reconstruct the contexts of the first `groups` groups, "raw" and "private". progress: called with (groups done,
    groups). ConfigError for a unit of which a context question holds no more than one."""
    if config.privacy.unit == "record":
        raise ConfigError(
            "privacy.unit=record: this attack tells one answer more from one less; use response or respondent"
        )
    found: dict[str, list[Reconstruction]] = {"raw": [], "private": []}
    with scratch() as folder:
        variants = {"raw": without_privacy(config), "private": config}
        worlds = {name: prepare(c, Path(folder) / name) for name, c in variants.items()}
        names = sorted(worlds["raw"].holdings)[:groups]
        total = len(names) * len(worlds)
        for name, parts in worlds.items():
            parts = replace(
                parts,
                agreement=replace(parts.agreement, mode="clear", truth=False),
                client_root=Path(folder) / f"{name} stores",
            )
            theta = readable_predictor(parts.agreement, config.seed)
            for number, group in enumerate(names):
                rng = np.random.default_rng([config.seed, 0x0E16, number])
                data, cells, more = neighbour(parts.holdings[group], parts.agreement, rng)
                client = open_client(parts, group, data)
                seen = rewards_of(client, theta)
                context = invert(parts.agreement, theta, dict(parts.embeddings), seen, parts.holdings[group])
                found[name].append(_judge(context, parts.holdings[group], data, cells, more, parts.agreement))
                done = len(found["raw"]) + len(found["private"])
                progress(done, total)
    return {name: _together(parts) for name, parts in found.items()}


def readable_predictor(agreement: Agreement, seed: int) -> NDArray[np.float32]:
    """The adversary's parameters (P,): see the module docstring."""
    model = PreferencePredictor(agreement.predictor)
    unflatten(model, initial_predictor(agreement, seed))
    with torch.no_grad():
        model.point[0].weight[:, agreement.predictor.embedding :].mul_(_MILD)  # type: ignore[index]
    return flatten(model)


def neighbour(
    group: GroupData, agreement: Agreement, rng: np.random.Generator
) -> tuple[GroupData, list[tuple[str, int]], NDArray[np.bool_]]:
    """The group with one more person in the rarest option of each context question, or not, as coins say."""
    asked = [q for q in agreement.plan.context if group.has(q)]
    cells = [(q, int(np.argmin(group.counts[q]))) for q in asked]
    more = rng.random(len(cells)) < 0.5
    counts = {q: c.copy() for q, c in group.counts.items()}
    for (q, k), added in zip(cells, more, strict=True):
        counts[q][k] += added
    if group.responses is None:
        return GroupData(group.name, counts, group.nominal), cells, more
    known, order = group.responses, agreement.question_order
    added = [cell for cell, there in zip(cells, more, strict=True) if there]
    new = int(known.respondent.max()) + 1 + np.arange(len(added))
    responses = Responses(
        np.concatenate([known.respondent, new]),
        np.concatenate([known.question, [order.index(q) for q, _ in added]]),
        np.concatenate([known.option, [k for _, k in added]]),
    )
    return GroupData(group.name, counts, responses=responses), cells, more


Seen = dict[str, tuple[Floats, Floats]]  # question -> answers (N, K) and rewards (N,)


def rewards_of(client: Client, theta: NDArray[np.float32]) -> Seen:
    """Take a client to the point where it scores, and ask it for the rewards of chosen answers, in the clear."""
    a = client.agreement
    request(client, "setup", run=a.plan.run, agreement=a.digest())
    request(client, "context")
    request(client, "freeze", parameters=theta.astype("<f4").tobytes())
    asked = (*a.plan.train, *a.plan.context)[:_QUESTIONS]
    pairs = [(q, text) for q in asked for text in _answers(a.task, len(a.questions[q].options))]
    reply = request(
        client, "score", session=REWARD, message=b"", step=1, opened=0, z=pack_float(None),
        questions=[q for q, _ in pairs], answers=[text for _, text in pairs],
    )  # fmt: skip
    layout = a.reward_layout(len(pairs))
    coded = np.frombuffer(reply.body["message"], dtype=f"<u{layout.ring_bits // 8}")
    rewards = layout.preflight(len(a.clients)).decode(coded, 1)[: len(pairs)]  # the segment S1
    out: Seen = {}
    for q in asked:
        rows = [i for i, (asked_q, _) in enumerate(pairs) if asked_q == q]
        parsed = [parse(pairs[i][1], a.questions[q], a.task) for i in rows]
        out[q] = np.stack([p for p in parsed if p is not None]), rewards[rows]
    return out


def _answers(task: str, options: int) -> list[str]:
    """For each option an answer that is all for it."""
    if task == "choice":
        return [answer_text([k], task) for k in range(options)]
    if task == "dpa":
        return [answer_text([10 * (i == k) for i in range(options)], task) for k in range(options)]
    return [answer_text([k, *(i for i in range(options) if i != k)], task) for k in range(options)]


def invert(
    agreement: Agreement,
    theta: NDArray[np.float32],
    embeddings: dict[str, NDArray[np.float32]],
    seen: Seen,
    known: GroupData,
) -> dict[str, Floats]:
    """Context question -> (K,) shares that explain the rewards seen. known: the answers the adversary knows, where the
    search begins; it goes on from elsewhere if it ends with rewards unexplained."""
    logits = {q: _predicted(agreement, q, *rows) for q, rows in seen.items()}
    wanted = np.concatenate(list(logits.values()))
    asked = [q for q in agreement.plan.context if known.has(q)]
    network = _Inverse(agreement, theta, [embeddings[q] for q in asked], [embeddings[q] for q in logits])
    rng = np.random.default_rng(0)
    begin = network.coordinates([known.distribution(q) for q in asked])
    best, explained = begin, np.inf

    def off_by(z: Floats) -> Floats:
        return network.logits(z) - wanted

    for start in range(_STARTS):
        solved = optimize.least_squares(
            off_by, 0.3 * rng.standard_normal(network.size) if start else begin, jac=network.jacobian, method="lm",
            xtol=1e-10, ftol=1e-10, gtol=1e-12, max_nfev=20,
        )  # fmt: skip
        off = float(np.abs(solved.fun).max())
        if off < explained:
            best, explained = solved.x, off
        if explained < _EXPLAINED:
            break
    return dict(zip(asked, network.shares(best), strict=True))


def _predicted(agreement: Agreement, question: str, answers: Floats, rewards: Floats) -> Floats:
    """(K,) centred logits of the shares for which `answers` (N, K) earn `rewards` (N,)."""
    k = answers.shape[1]
    ordinals = agreement.questions[question].ordinals
    places = None if ordinals is None else np.tile(np.asarray(ordinals, dtype=np.float64), (len(answers), 1))

    def off(z: Floats) -> Floats:
        shares = np.tile(special.softmax(np.append(z, 0.0)), (len(answers), 1))
        return np.asarray(score(agreement.reward, answers, shares, places) - rewards)

    solved = optimize.least_squares(off, np.zeros(k - 1), xtol=1e-15, ftol=1e-15, gtol=1e-15)
    full = np.append(solved.x, 0.0)
    return np.asarray(full - full.mean())


class _Inverse:
    """The predictor as a float64 function of the context: z, coordinates of shares that sum to 1, -> centred logits."""

    def __init__(
        self,
        agreement: Agreement,
        theta: NDArray[np.float32],
        context: Sequence[NDArray[np.float32]],
        targets: Sequence[NDArray[np.float32]],
    ) -> None:
        model = PreferencePredictor(agreement.predictor)
        unflatten(model, theta)
        self._model = model.double().eval().requires_grad_(False)
        # Targets do not see each other, so the options of all questions go through the network in one row.
        self._targets = torch.from_numpy(np.concatenate(targets)).double()[None]  # (1, N, E)
        _, self._mask = pad_options(list(targets))  # (Q, K)
        self._place = torch.zeros(self._mask.shape, dtype=torch.long)  # of each question's options in the row
        self._place[self._mask] = torch.arange(self._targets.shape[1])
        # Columns of an orthonormal basis of the vectors that sum to 0: shares = 1/K + basis @ z.
        self._basis = [torch.linalg.svd(torch.ones(1, len(e), dtype=torch.float64)).Vh[1:].T for e in context]
        points = [torch.from_numpy(e).double() for e in context]
        self._texts = torch.stack([e.mean(dim=0) for e in points])  # (C, E)
        self._steps = [DIRECTION * (b.T @ e) for b, e in zip(self._basis, points, strict=True)]  # (K-1, E)
        self._sizes = [b.shape[1] for b in self._basis]
        self.size = sum(self._sizes)

    def _forward(self, z: Tensor) -> Tensor:
        parts = z.split(self._sizes)
        rows = torch.stack([part @ step for part, step in zip(parts, self._steps, strict=True)])  # (C, E)
        points = torch.cat([self._texts, rows], dim=1)
        found = self._model(points[None], self._targets)[0]  # (N,)
        likely = log_likelihood(found[self._place], self._mask)
        means = likely.masked_fill(~self._mask, 0.0).sum(dim=1) / self._mask.sum(dim=1)
        return (likely - means[:, None])[self._mask]

    def logits(self, z: Floats) -> Floats:
        """Centred logits of all target options, in a row."""
        return np.asarray(self._forward(torch.from_numpy(z)).numpy())

    def jacobian(self, z: Floats) -> Floats:
        """Derivatives of `logits`, (rows, size)."""
        return np.asarray(torch.func.jacfwd(self._forward)(torch.from_numpy(z)).detach().numpy())

    def coordinates(self, shares: Sequence[Floats]) -> Floats:
        """z (size,) of the shares (K,) of each context question."""
        parts = [b.T @ torch.from_numpy(s) for b, s in zip(self._basis, shares, strict=True)]
        return np.asarray(torch.cat(parts).numpy())

    def shares(self, z: Floats) -> list[Floats]:
        """The shares (K,) of each context question."""
        parts = torch.from_numpy(z).split(self._sizes)
        return [(1.0 / len(b) + b @ part).numpy() for b, part in zip(self._basis, parts, strict=True)]


def _judge(
    context: dict[str, Floats],
    known: GroupData,
    data: GroupData,
    cells: list[tuple[str, int]],
    more: NDArray[np.bool_],
    agreement: Agreement,
) -> Reconstruction:
    """known: the answers without the one more, which the adversary knows; data: what the client really holds."""
    errors = [shares * data.counts[q].sum() - data.counts[q] for q, shares in context.items()]
    noise = agreement.histogram_release[1] if agreement.plan.private else 0.0
    scores = []
    for q, k in cells:
        count, total = known.counts[q][k], known.counts[q].sum()
        scores.append(context[q][k] - (count / total + (count + 1) / (total + 1)) / 2)
    return Reconstruction(np.concatenate(errors), np.array(scores), more, noise)


def _together(parts: Sequence[Reconstruction]) -> Reconstruction:
    return Reconstruction(
        np.concatenate([p.errors for p in parts]), np.concatenate([p.scores for p in parts]),
        np.concatenate([p.more for p in parts]), parts[0].noise,
    )  # fmt: skip
