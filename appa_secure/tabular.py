"""A policy without a model: one vector per question. It shows what an aggregation rule does, apart from what a network
can learn.

| task     | vector of a question (K,) | an answer                                     | gradient                        |
|----------|---------------------------|-----------------------------------------------|---------------------------------|
| `dpa`    | a distribution p          | p + noise, projected to the simplex, written  | antithetic evolution strategies |
|          |                           | as whole weights 0..max_weight                | (Salimans et al. 2017)          |
| `opa`    | log-odds of the options   | a ranking drawn from Plackett and Luce's law  | score function (Williams 1992)  |
| `choice` | log-odds of the options   | an option drawn from their softmax            | score function                  |

For `dpa` the noise and the step size fall over a run, and ascent in the simplex itself keeps a concave objective
concave, so a fixed point is an optimum of the aggregated reward, up to the rounding of weights: max_weight = 1000 costs
less than 1e-3 of a probability. Every draw is a function of (seed, step), so a run repeats and resumes exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from appa_secure.tasks import answer_text

if TYPE_CHECKING:
    from appa_secure.data.survey import Question

Floats = NDArray[np.float64]

DECAY = 1 / 25  # step size and, for `dpa`, noise at the end of a run relative to its start


class TabularPolicy:
    """The table: `values` (Q, K), padded with zeros where `mask` (Q, K) is False. Starts uniform."""

    def __init__(self, questions: Mapping[str, Question], task: str, max_weight: int) -> None:
        self.task, self.max_weight = task, max_weight
        self.row = {qid: i for i, qid in enumerate(questions)}
        sizes = np.array([len(q.options) for q in questions.values()])
        self.mask = np.arange(sizes.max()) < sizes[:, None]
        uniform = self.mask / sizes[:, None]
        self.values: Floats = uniform if task == "dpa" else np.zeros(self.mask.shape)
        self._drawn: tuple[NDArray[np.int64], Floats, float] | None = None

    def draw(
        self, qids: Sequence[str], samples: int, spread: float, rng: np.random.Generator
    ) -> tuple[list[str], list[Floats]]:
        """`samples` answers to each question in a row: their texts, and as `tasks.parse` reads them (K,).

        samples: for `dpa` even, in pairs of opposite noise; one sample is drawn without a partner.
        spread: standard deviation of the noise of `dpa`; the other tasks have their own randomness.
        """
        rows = np.array([self.row[q] for q in qids])
        mask, count = self.mask[rows], self.mask[rows].sum(axis=1)
        if self.task == "dpa":
            noise = rng.standard_normal((len(rows), -(-samples // 2), mask.shape[1])) * mask[:, None]
            noise -= (
                noise.sum(axis=2, keepdims=True) / count[:, None, None] * mask[:, None]
            )  # stay in the plane
            noise = np.concatenate([noise, -noise], axis=1)[:, :samples]
            answers = simplex(self.values[rows][:, None] + spread * noise, mask[:, None])  # (Q, S, K)
            weights = np.rint(answers * (self.max_weight / answers.max(axis=2, keepdims=True))).astype(int)
            self._drawn = rows, noise, spread
            numbers = [w[:k].tolist() for row, k in zip(weights, count, strict=True) for w in row]
            parsed = [np.array(w, dtype=np.float64) / sum(w) for w in numbers]
        else:
            keys = self.values[rows][:, None] + rng.gumbel(size=(len(rows), samples, mask.shape[1]))
            order = np.argsort(-np.where(mask[:, None], keys, -np.inf), axis=2)  # (Q, S, K) best first
            self._drawn = rows, self._score_function(rows, order), 1.0
            kept = 1 if self.task == "choice" else None
            numbers = [o[: kept or k].tolist() for row, k in zip(order, count, strict=True) for o in row]
            parsed = [
                _places(o, k) if kept is None else np.eye(k)[o[0]]
                for o, k in zip(numbers, np.repeat(count, samples).tolist(), strict=True)
            ]
        return [answer_text(n, self.task, self.max_weight) for n in numbers], parsed

    def _score_function(self, rows: NDArray[np.int64], order: NDArray[np.int64]) -> Floats:
        """Gradient of the log-probability of each ranking (or of its first place) in the log-odds, (Q, S, K)."""
        odds = np.where(
            self.mask[rows], np.exp(self.values[rows] - self.values[rows].max(axis=1, keepdims=True)), 0.0
        )
        ranked = np.take_along_axis(np.broadcast_to(odds[:, None], order.shape), order, axis=2)
        left = np.cumsum(ranked[:, :, ::-1], axis=2)[:, :, ::-1]  # mass of those not yet placed
        share = np.cumsum(np.where(ranked > 0, 1 / np.where(left > 0, left, 1.0), 0.0), axis=2)
        placed = ranked > 0
        if self.task == "choice":
            share, placed = share[:, :, :1] * np.ones_like(share), placed & (np.arange(order.shape[2]) == 0)
        gradient = np.empty_like(ranked)
        np.put_along_axis(gradient, order, placed - ranked * share, axis=2)
        return gradient

    def update(self, rewards: Sequence[float | None], step_size: float) -> None:
        """Ascend on the rewards (B,) of the answers drawn last; an answer without a reward teaches nothing.

        Each question's other answers are the baseline, as in `coordinator.gae.leave_one_out`.
        """
        assert self._drawn is not None, "draw first"
        rows, noise, spread = self._drawn
        r = np.array([np.nan if x is None else x for x in rewards]).reshape(len(rows), -1)  # (Q, S)
        known = ~np.isnan(r)
        count = known.sum(axis=1, keepdims=True)
        centred = np.where(
            known, r - np.where(known, r, 0.0).sum(axis=1, keepdims=True) / np.maximum(count, 1), 0.0
        )
        gradient = np.einsum("qs,qsk->qk", centred, noise) / (np.maximum(count - 1, 1) * spread)
        moved = self.values[rows] + step_size * gradient
        self.values[rows] = simplex(moved, self.mask[rows]) if self.task == "dpa" else moved


def schedule(step: int, steps: int) -> float:
    """Factor on step size and noise at step 1..steps: geometric from 1 to `DECAY`."""
    return float(DECAY ** ((step - 1) / max(steps - 1, 1)))


def simplex(values: Floats, mask: NDArray[np.bool_]) -> Floats:
    """Nearest distribution to each vector over its real options, (..., K); Duchi et al. 2008."""
    ranked = -np.sort(-np.where(mask, values, -np.inf), axis=-1)
    real = np.isfinite(ranked)
    excess = np.cumsum(np.where(real, ranked, 0.0), axis=-1) - 1.0
    places = np.arange(1, values.shape[-1] + 1)
    last = (real & (ranked - excess / places > 0)).sum(axis=-1, keepdims=True)
    threshold = np.take_along_axis(excess, last - 1, axis=-1) / last
    return np.where(mask, np.maximum(values - threshold, 0.0), 0.0)


def _places(order: Sequence[int], count: int) -> Floats:
    places = np.empty(count)
    places[list(order)] = (count - 1 - np.arange(count)) / max(count - 1, 1)
    return places
