"""The best answers to given group weights, per question, and the alignment of answers with each group."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from appa_secure.errors import DataError
from appa_secure.rewards import KL_SMOOTHING, score, task_of

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

    def alignment(self, answers: Floats) -> Floats:
        """AS of each group, (G,), for answers (Q, K)."""
        count, groups, width = self.targets.shape
        per_pair = np.repeat(np.arange(count), groups)  # (Q·G,)
        flat = self.targets.reshape(-1, width)
        rewards = score(self.kind, answers[per_pair], flat, self.ordinals[per_pair], self.mask[per_pair])
        result: Floats = (rewards.reshape(count, groups) * self.share).sum(axis=0)
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
        local /= local.sum(axis=1, keepdims=True)
        if self.kind == "wasserstein":
            answers, gap = self._median(local), np.zeros(len(total))
        elif self.kind == "cosine":
            lengths = np.linalg.norm(self.targets, axis=2)
            answers, gap = self.mixed(local / lengths), np.zeros(len(total))
        elif self.kind == "js":
            answers, gap = self._js(local)
        else:
            answers, gap = self._kl(local)
        return answers, self.alignment(answers), float(total @ gap)

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
    """Answers that can be listed: every ranking, or every option."""

    def __init__(
        self, kind: str, questions: Sequence[Question], distributions: Mapping[str, ArrayLike]
    ) -> None:
        found, self.share = _targets(questions, distributions)
        self.groups = len(found[0])
        self.rewards = [_rewards_of_all(kind, target) for target in found]  # per question (G, answers)

    def respond(self, weights: Floats) -> tuple[Floats, Floats, float]:
        """Best answers to group weights: indices (Q,), their AS (G,), and 0, as the listing is complete."""
        local = weights * self.share
        best = [int(np.argmax(row @ table)) for row, table in zip(local, self.rewards, strict=True)]
        return np.array(best, dtype=np.float64), self._alignment(best), 0.0

    def question_min(self) -> tuple[Floats, float]:
        """The best single answer for each question's worst group: AS (G,), mean of the worst rewards."""
        worst = [table[row > 0].min(axis=0) for row, table in zip(self.share, self.rewards, strict=True)]
        best = [int(np.argmax(values)) for values in worst]
        return self._alignment(best), float(np.mean([values.max() for values in worst]))

    def uniform(self) -> Floats:
        """AS (G,) of a uniformly random answer."""
        result: Floats = (np.array([table.mean(axis=1) for table in self.rewards]) * self.share).sum(axis=0)
        return result

    def _alignment(self, answers: Sequence[int]) -> Floats:
        chosen = np.array([table[:, index] for table, index in zip(self.rewards, answers, strict=True)])
        result: Floats = (chosen * self.share).sum(axis=0)
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


def _rewards_of_all(kind: str, target: Floats) -> Floats:
    """Rewards (G, answers) of every ranking (`opa`) or option (`choice`) against targets (G, K)."""
    groups, count = target.shape
    if task_of(kind) == "opa":
        answers = np.array(list(itertools.permutations(range(count))), dtype=np.float64)
    else:
        answers = np.eye(count)
    pairs = score(kind, np.tile(answers, (groups, 1)), np.repeat(target, len(answers), axis=0))
    return pairs.reshape(groups, len(answers))


def _frank_wolfe_gap(gradient: Floats, p: Floats, mask: NDArray[np.bool_]) -> Floats:
    """Bound per question (Q,) on how far a concave function at p is from its maximum: max_k ∇_k - ∇·p."""
    best = np.where(mask, gradient, -np.inf).max(axis=1)
    inner = np.where(mask, gradient * p, 0.0).sum(axis=1)
    result: Floats = best - inner
    return result
