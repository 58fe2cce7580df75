"""Answers that are not distributions: options are listed, so are rankings of few options; longer ones are optimised.

What a question's answer gives each group, (G,), stands for the answer itself: no ceiling needs to know more of it.
"""

from __future__ import annotations

import itertools
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from appa_secure.errors import DataError
from appa_secure.rewards import score, task_of

Floats = NDArray[np.float64]
MAX_LISTED = 6  # 720 rankings


class Choices(Protocol):
    """All answers to one question."""

    def best(self, weights: Floats) -> Floats:
        """Rewards (G,) of the answer with the largest weighted sum of rewards, weights (G,)."""

    def best_worst(self, counted: NDArray[np.bool_]) -> Floats:
        """Rewards (G,) of the answer whose least reward among counted groups (G,) is largest."""

    def uniform(self) -> Floats:
        """Expected rewards (G,) of a uniformly random answer."""


def choices(kind: str, target: Floats) -> Choices:
    """Every option (`choice`) or ranking (`opa`) as an answer to targets (G, K)."""
    count = target.shape[1]
    if kind == "binary" or task_of(kind) == "choice":  # of a ranking only its first option counts
        return Listed(kind, target, np.eye(count))
    if count <= MAX_LISTED:
        return Listed(kind, target, np.array(list(itertools.permutations(range(count))), dtype=np.float64))
    return Orders(kind, target)


class Listed:
    """Answers (N, K) that are looked through one by one."""

    def __init__(self, kind: str, target: Floats, answers: Floats) -> None:
        groups, count = len(target), len(answers)
        pairs = score(kind, np.tile(answers, (groups, 1)), np.repeat(target, count, axis=0))
        self.rewards = pairs.reshape(groups, count)

    def best(self, weights: Floats) -> Floats:
        return self.rewards[:, np.argmax(weights @ self.rewards)]

    def best_worst(self, counted: NDArray[np.bool_]) -> Floats:
        return self.rewards[:, np.argmax(self.rewards[counted].min(axis=0))]

    def uniform(self) -> Floats:
        result: Floats = self.rewards.mean(axis=1)
        return result


class Orders:
    """All rankings of K options, K! of them, for rewards that add up over pairs:

    reward of group g = base + Σ_{i ahead of j} pairs[g, i, j]

    `borda`: i's points are how many it is ahead of, each worth q_i over the best order's sum. `kendall`: (1 + τ_b)/2 adds
    a pair's agreement, without ties in the answer. The best order for weights is a linear ordering problem, solved
    exactly over subsets of options (Held and Karp 1962): 2^K states, K at most 10.
    """

    def __init__(self, kind: str, target: Floats) -> None:
        count = target.shape[1]
        if kind == "borda":
            best = -np.sort(-target, axis=1) @ np.arange(count - 1, -1, -1.0)
            self.base = 0.0
            self.pairs = np.repeat((target / best[:, None])[:, :, None], count, axis=2)
        else:
            assert kind == "kendall"
            agree = np.sign(target[:, :, None] - target[:, None, :])
            untied = (agree != 0).sum(axis=(1, 2))
            scale = np.sqrt(untied * float(count * (count - 1))) / 2.0  # pairs are counted once in τ_b
            self.base = 0.5
            self.pairs = 0.5 * agree / np.where(untied > 0, scale, 1.0)[:, None, None]
        self.pairs[:, np.arange(count), np.arange(count)] = 0.0

    def rewards(self, order: NDArray[np.int64]) -> Floats:
        """Rewards (G,) of an order (K,), best option first."""
        first, second = np.triu_indices(len(order), 1)
        result: Floats = self.base + self.pairs[:, order[first], order[second]].sum(axis=1)
        return result

    def best(self, weights: Floats) -> Floats:
        gain = np.tensordot(weights, self.pairs, axes=1)  # (K, K)
        count = len(gain)
        states = np.arange(1 << count)  # sets of options that are placed, from the front
        left = ((states[:, None] >> np.arange(count)) & 1) == 0  # (2^K, K)
        ahead = left @ gain.T  # of every option, if it is placed next
        value, follow = np.zeros(len(states)), np.zeros(len(states), dtype=np.int64)
        placed = count - left.sum(axis=1)
        for size in range(count - 1, -1, -1):
            now = states[placed == size]
            then = np.where(left[now], value[now[:, None] | (1 << np.arange(count))] + ahead[now], -np.inf)
            follow[now] = then.argmax(axis=1)
            value[now] = then.max(axis=1)
        order, state = np.zeros(count, dtype=np.int64), 0
        for place in range(count):
            order[place] = follow[state]
            state |= 1 << int(order[place])
        return self.rewards(order)

    def best_worst(self, counted: NDArray[np.bool_]) -> Floats:
        """An integer program: x_ij for i < j, 1 if i is ahead; no three options in a circle."""
        count = self.pairs.shape[1]
        first, second = np.triu_indices(count, 1)
        at = {pair: n for n, pair in enumerate(zip(first.tolist(), second.tolist(), strict=True))}
        back = self.pairs[:, second, first]  # (G, pairs)
        gain = self.pairs[:, first, second] - back
        circles = np.zeros((len(list(itertools.combinations(range(count), 3))), len(at) + 1))
        for row, (i, j, k) in zip(circles, itertools.combinations(range(count), 3), strict=True):
            row[[at[i, j], at[j, k], at[i, k]]] = 1.0, 1.0, -1.0  # all or none of i>j, j>k, k>i are circles
        floor = np.hstack([gain[counted], -np.ones((int(counted.sum()), 1))])
        found = milp(
            np.append(np.zeros(len(at)), -1.0),
            integrality=np.append(np.ones(len(at)), 0),
            bounds=Bounds(np.append(np.zeros(len(at)), -np.inf), np.append(np.ones(len(at)), np.inf)),
            constraints=[
                LinearConstraint(circles, 0.0, 1.0),
                LinearConstraint(floor, -self.base - back[counted].sum(axis=1), np.inf),
            ],
            options={"mip_rel_gap": 1e-9},
        )
        if found.status != 0:
            raise DataError(f"the best ranking for the worst group was not found: {found.message}")
        ahead = np.zeros((count, count))
        ahead[first, second] = np.rint(found.x[:-1])
        ahead[second, first] = 1.0 - ahead[first, second]
        return self.rewards(np.argsort(-ahead.sum(axis=1)))

    def uniform(self) -> Floats:
        result: Floats = self.base + 0.5 * self.pairs.sum(axis=(1, 2))
        return result
