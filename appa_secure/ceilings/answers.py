"""The best answers to given group weights, per question, and the alignment of answers with each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from appa_secure.ceilings.listed import choices
from appa_secure.errors import DataError
from appa_secure.rewards import KL_SMOOTHING, score

if TYPE_CHECKING:
    from appa_secure.data.survey import Question

Floats = NDArray[np.float64]

TOLERANCE = 1e-6
_MAX_ITERATIONS = 300


class Answers:
    """Answers that are distributions: padded targets and the best response to group weights."""

    def __init__(
        self, kind: str, questions: Sequence[Question], distributions: Mapping[str, ArrayLike]
    ) -> None:
        self.kind = kind
        found, self.share = _targets(questions, distributions)
        self.groups = len(found[0])
        width = max(target.shape[1] for target in found)
        self.targets = np.zeros((len(found), self.groups, width))  # (Q, G, K)
        self.mask = np.zeros((len(found), width), dtype=bool)  # (Q, K)
        self.ordinals = np.tile(np.arange(width, dtype=np.float64), (len(found), 1))  # (Q, K)
        for row, (question, target) in enumerate(zip(questions, found, strict=True)):
            count = target.shape[1]
            self.targets[row, :, :count] = target
            self.mask[row, :count] = True
            if kind == "wasserstein":
                if question.ordinals is None:
                    raise DataError(
                        f"reward 'wasserstein' needs ordinals and question {question.qid!r} has none"
                    )
                self.ordinals[row, :count] = question.ordinals

    def rewards(self, answers: Floats) -> Floats:
        """Reward of each answer (Q, K) for each group, (Q, G)."""
        count, groups, width = self.targets.shape
        per_pair = np.repeat(np.arange(count), groups)  # (Q·G,)
        flat = self.targets.reshape(-1, width)
        found = score(self.kind, answers[per_pair], flat, self.ordinals[per_pair], self.mask[per_pair])
        return found.reshape(count, groups)

    def alignment(self, answers: Floats) -> Floats:
        """AS of each group, (G,), for answers (Q, K)."""
        result: Floats = (self.rewards(answers) * self.share).sum(axis=0)
        return result

    def mixed(self, weights: Floats) -> Floats:
        """Weighted mean of the groups' distributions: (Q, G) -> (Q, K)."""
        mixed = np.einsum("qg,qgk->qk", weights, self.targets)
        result: Floats = mixed / mixed.sum(axis=1, keepdims=True)
        return result

    def respond(self, weights: Floats) -> tuple[Floats, Floats, float]:
        """Best answers to group weights (G,): answers (Q, K), their AS (G,), bound on what they miss."""
        local = weights * self.share  # (Q, G) weight of each reward in the objective
        total = local.sum(axis=1)  # (Q,); 0 where no group with weight has answers: any answer is best there
        local = np.where(total[:, None] > 0, local, self.share)
        answers, gap = self.best(local / local.sum(axis=1, keepdims=True))
        return answers, self.alignment(answers), float(total @ gap)

    def best(self, weights: Floats) -> tuple[Floats, Floats]:
        """Best answers (Q, K) to each question's own group weights (Q, G), rows summing to 1, and a bound (Q,) on what
        each misses."""
        if self.kind == "wasserstein":
            return self._median(weights), np.zeros(len(weights))
        if self.kind == "cosine":
            return self.mixed(weights / np.linalg.norm(self.targets, axis=2)), np.zeros(len(weights))
        return self._js(weights) if self.kind == "js" else self._kl(weights)

    def averaged(self, mixture: Floats, answers: Floats) -> Floats:
        """One answer (Q, K) at least as good for every group as drawing the J `answers` (J, Q, K) with the chances
        `mixture` (J, Q): rewards are concave in the answer, cosine in the answer scaled to length 1."""
        scale = mixture[:, :, None]
        if self.kind == "cosine":
            scale = scale / np.linalg.norm(answers, axis=2, keepdims=True)
        result = (scale * answers).sum(axis=0)
        averaged: Floats = result / result.sum(axis=1, keepdims=True)
        return averaged

    def _median(self, weights: Floats) -> Floats:
        """Σ_g w_g·|F - F_g| is least at the weighted median, option by option; of several, the lower one."""
        cdf = np.cumsum(self.targets, axis=2)  # (Q, G, K)
        order = np.argsort(cdf, axis=1, kind="stable")
        ranked = np.take_along_axis(cdf, order, axis=1)
        spread = np.broadcast_to(weights[:, :, None], cdf.shape)
        mass = np.cumsum(np.take_along_axis(spread, order, axis=1), axis=1)
        first = (mass < 0.5 - 1e-12).sum(axis=1)  # (Q, K) where the cumulative weight reaches a half
        median = np.take_along_axis(ranked, first[:, None, :], axis=1)[:, 0]
        answers = np.where(
            self.mask, np.diff(np.maximum.accumulate(median, axis=1), axis=1, prepend=0.0), 0.0
        )
        result: Floats = answers / answers.sum(axis=1, keepdims=True)
        return result

    def _js(self, weights: Floats) -> tuple[Floats, Floats]:
        """Mirror descent on Σ w_g·JSD: -H(p)/2 is its steepest part, so step 2 descends without a search.

        The step simplifies to p ← the weighted geometric mean of the mixtures (p + q_g)/2, normalised.
        """
        p, gap = self.mixed(weights), np.full(len(weights), np.inf)
        for _ in range(_MAX_ITERATIONS):
            log_mixture = np.log(np.maximum(0.5 * (p[:, None] + self.targets), 1e-300))  # (Q, G, K)
            geometric = np.einsum("qg,qgk->qk", weights, log_mixture)
            # Gradient in bits. Where p is 0, so is every q that counts, and log((p/2)/p) gives -1/2.
            slope = 0.5 * (geometric - np.log(np.maximum(p, 1e-280))) / np.log(2.0)
            gap = _frank_wolfe_gap(np.where(p > 1e-280, slope, -0.5), p, self.mask)
            if gap.mean() < TOLERANCE / 10:
                break
            p = np.where(self.mask, np.exp(geometric), 0.0)
            p /= p.sum(axis=1, keepdims=True)
        return p, gap

    def _kl(self, weights: Floats) -> tuple[Floats, Floats]:
        """Maximise Σ w_g·v_g, v_g = exp(-KL(q̃_g ‖ p̃)), a sum of weighted geometric means of p̃, so concave.

        By x ≥ x0·(1 + log(x/x0)) the sum is at least a log-likelihood whose maximum is p̃ = Σ w_g·v_g·q̃_g,
        normalised: each step climbs, and p̃ stays an image of a distribution p.
        """
        floor = self.mask * KL_SMOOTHING / self.mask.sum(axis=1, keepdims=True)  # (Q, K)
        smooth = (1 - KL_SMOOTHING) * self.targets + floor[:, None]  # (Q, G, K), 0 in the padding
        negentropy = (smooth * np.log(np.where(smooth > 0, smooth, 1.0))).sum(axis=2)  # (Q, G)
        s, gap = np.einsum("qg,qgk->qk", weights, smooth), np.full(len(weights), np.inf)
        for _ in range(_MAX_ITERATIONS):
            safe = np.where(self.mask, s, 1.0)
            v = weights * np.exp(np.einsum("qgk,qk->qg", smooth, np.log(safe)) - negentropy)  # (Q, G)
            mixed = np.einsum("qg,qgk->qk", v, smooth)
            gap = _frank_wolfe_gap(
                (1 - KL_SMOOTHING) * mixed / safe, (s - floor) / (1 - KL_SMOOTHING), self.mask
            )
            if gap.mean() < TOLERANCE / 10:
                break
            s = mixed / mixed.sum(axis=1, keepdims=True)
        p = np.maximum(s - floor, 0.0)
        return p / p.sum(axis=1, keepdims=True), gap


class Table:
    """Answers that are not distributions (`listed`). `answers` (Q, G) are the rewards that they give each group."""

    def __init__(
        self, kind: str, questions: Sequence[Question], distributions: Mapping[str, ArrayLike]
    ) -> None:
        found, self.share = _targets(questions, distributions)
        self.groups = len(found[0])
        self.choices = [choices(kind, target) for target in found]

    def respond(self, weights: Floats) -> tuple[Floats, Floats, float]:
        """Best answers to group weights (G,), their AS (G,), and 0: they are exact."""
        answers, _ = self.best(weights * self.share)
        return answers, self.alignment(answers), 0.0

    def best(self, weights: Floats) -> tuple[Floats, Floats]:
        """Best answers to each question's own group weights (Q, G), and 0 for each."""
        rewards = [one.best(row) for row, one in zip(weights, self.choices, strict=True)]
        return np.array(rewards), np.zeros(len(rewards))

    def best_worst(self) -> Floats:
        """The single answer to each question that is best for its worst group."""
        return np.array([one.best_worst(row > 0) for row, one in zip(self.share, self.choices, strict=True)])

    def uniform(self) -> Floats:
        """A uniformly random answer to each question."""
        return np.array([one.uniform() for one in self.choices])

    def rewards(self, answers: Floats) -> Floats:
        """Reward of each answer for each group, (Q, G)."""
        return answers

    def alignment(self, answers: Floats) -> Floats:
        """AS of each group, (G,)."""
        result: Floats = (answers * self.share).sum(axis=0)
        return result


def _targets(
    questions: Sequence[Question], distributions: Mapping[str, ArrayLike]
) -> tuple[list[Floats], Floats]:
    """Per question (G, K), absent groups uniform; and each question's share (Q, G) in the groups' means."""
    found: list[Floats] = []
    present: list[NDArray[np.bool_]] = []
    for question in questions:
        if question.qid not in distributions:
            raise DataError(
                f"question {question.qid!r} has no true distributions: leave it out of the ceiling"
            )
        target = np.array(distributions[question.qid], dtype=np.float64)
        if target.ndim != 2 or target.shape[1] != len(question.options) or not len(target):
            raise DataError(
                f"distributions of question {question.qid!r} have shape {target.shape}, expected "
                f"(groups, {len(question.options)})"
            )
        if found and len(target) != len(found[0]):
            raise DataError(
                f"question {question.qid!r} has {len(target)} groups, others have {len(found[0])}"
            )
        known: NDArray[np.bool_] = np.logical_not(np.isnan(target).all(axis=1))
        target[~known] = 1.0 / target.shape[1]
        if not ((target >= 0).all() and (np.abs(target.sum(axis=1) - 1) <= 1e-5).all()):
            raise DataError(f"distributions of question {question.qid!r} are negative or do not sum to 1")
        if not known.any():
            raise DataError(f"no group has answers to question {question.qid!r}: leave it out of the ceiling")
        found.append(target)
        present.append(known)
    answered = np.array(present, dtype=np.float64)  # (Q, G)
    if (answered.sum(axis=0) == 0).any():
        group = int(np.argmin(answered.sum(axis=0)))
        raise DataError(
            f"group number {group} has answers to none of the questions: leave it out of the ceiling"
        )
    return found, answered / answered.sum(axis=0)


def _frank_wolfe_gap(gradient: Floats, p: Floats, mask: NDArray[np.bool_]) -> Floats:
    """Bound per question (Q,) on how far a concave function at p is from its maximum: max_k ∇_k - ∇·p."""
    best = np.where(mask, gradient, -np.inf).max(axis=1)
    inner = np.where(mask, gradient * p, 0.0).sum(axis=1)
    result: Floats = best - inner
    return result
