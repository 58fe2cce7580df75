"""A lower bound on epsilon from guesses about canaries, with confidence.

One-run auditing (Steinke, Nasr and Jagielski, NeurIPS 2023, arXiv 2305.08846). Of m canaries each is put into the data
by a fair coin of its own; the auditor sees what was released and guesses the coins, or abstains. Theorem 5.2: if the
release is (epsilon, delta)-DP for each canary, then at most r guesses with at least v right ones happen with
probability at most

    P[X >= v] + 2 m delta * max_{1 <= i <= v} (1/i) P[v > X >= v - i],    X ~ Binomial(r, e^eps / (1 + e^eps)).

It holds for any number of runs taken together, as long as every canary is in one of them only: side by side they are
one release that is (epsilon, delta)-DP for each canary. It holds however the guesses hang together, which is why it stays
far below the epsilon of a Gaussian.

Where all that a client claims is a Gaussian without subsampling, it claims more than one pair (epsilon, delta): mu-GDP
(Dong, Roth and Su 2022, arXiv 1905.02383), under which a fair coin is guessed with probability at most Phi(mu / 2). And
clients draw noise of their own, so that they are independent. `gaussian_bound` uses both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

# Shares of the canaries that the auditor says something about: the surest guesses first. Chosen before any data.
SHARES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
_HIGHEST = 50.0  # epsilons from here on are one: no number of guesses that fits a machine tells them apart


@dataclass(frozen=True)
class Bound:
    """What guesses prove: epsilon >= `epsilon` at the stated delta, unless something of probability 1 - confidence
    happened.

    canaries: m; guesses, correct: of the share of guesses that proved most; ceiling: the epsilon that as many canaries
    would prove if every guess were right.
    """

    epsilon: float
    confidence: float
    delta: float
    canaries: int
    guesses: int
    correct: int
    ceiling: float


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Largest probability of `correct` or more right guesses under (epsilon, delta)-DP: Theorem 5.2, in [0, 1].

    canaries: m; guesses: r, at most that many guesses are made; correct: v. Raises ValueError unless 0 <= v <= r <= m,
    epsilon >= 0 and 0 <= delta <= 1.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"need 0 <= correct <= guesses <= canaries, got {correct}, {guesses} and {canaries}")
    if not epsilon >= 0 or not 0 <= delta <= 1:
        raise ValueError(f"need epsilon >= 0 and delta in [0, 1], got {epsilon} and {delta}")
    right = float(special.expit(epsilon))
    tail = float(stats.binom.sf(correct - 1, guesses, right))
    if correct == 0 or delta == 0:
        return min(tail, 1.0)
    # P[v > X >= v - i] for i = 1..v: the mass just below v, summed downwards.
    below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
    worst = float(np.max(below / np.arange(1, correct + 1)))
    return min(tail + 2.0 * canaries * delta * worst, 1.0)


def lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """The largest epsilon >= 0 that so many right guesses refute with `confidence`, rounded down to 1e-6; 0 for none.

    Raises ValueError as `p_value` does, and for a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    low, high = 0.0, _HIGHEST
    if p_value(canaries, guesses, correct, low, delta) > 1 - confidence:
        return 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if p_value(canaries, guesses, correct, middle, delta) <= 1 - confidence:
            low = middle
        else:
            high = middle
    return low


def audit(
    scores: NDArray[np.float64],
    included: NDArray[np.bool_],
    delta: float,
    confidence: float,
    shares: Sequence[float] = SHARES,
) -> Bound:
    """The best bound over the given shares of guesses; their number is paid for (Bonferroni).

    scores: (m,) above 0 where the auditor takes the canary for included, below 0 where not, the surer the larger; made
    without looking at `included` (m,), the coins. Raises ValueError for other shapes or no canaries.
    """
    if scores.ndim != 1 or scores.shape != included.shape or not len(scores):
        raise ValueError(f"scores {scores.shape} and included {included.shape} must both be (m,), m > 0")
    m, level = len(scores), 1 - (1 - confidence) / len(shares)
    # Nothing about the coins may decide between equal scores: the order of the canaries does.
    order = np.argsort(-np.abs(scores), kind="stable")
    right = np.cumsum((scores > 0)[order] == included[order])
    tried = []
    for guesses in sorted({max(1, round(share * m)) for share in shares}):
        correct = int(right[guesses - 1])
        tried.append((lower_bound(m, guesses, correct, delta, level), guesses, correct))
    epsilon, guesses, correct = max(tried, key=lambda found: found[0])
    return Bound(epsilon, confidence, delta, m, guesses, correct, lower_bound(m, m, m, delta, level))


def gaussian_bound(accuracy: NDArray[np.float64], confidence: float) -> float:
    """The largest mu >= 0 that the shares of right guesses `accuracy` (n,), one of each client, refute; 0 for none.

    Under mu-GDP every client's share has expectation at most p = Phi(mu / 2), given those before it and however its
    guesses hang together. The product of shares / p then has expectation at most 1, and by Markov's inequality exceeds
    1 / (1 - confidence) with probability 1 - confidence at most. Raises ValueError for no clients, or a confidence
    outside (0, 1).
    """
    if not len(accuracy) or not 0 < confidence < 1:
        raise ValueError(f"need clients and confidence in (0, 1), got {len(accuracy)} and {confidence}")
    with np.errstate(divide="ignore"):
        p = math.exp((np.log(accuracy).sum() + math.log(1 - confidence)) / len(accuracy))
    return max(0.0, 2.0 * float(special.ndtri(p)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The epsilon >= 0 of mu-GDP at `delta` in (0, 1), rounded down to 1e-6: Dong et al. 2022, corollary 2.13."""

    def excess(epsilon: float) -> float:
        high, low = special.log_ndtr(mu / 2 - epsilon / mu), special.log_ndtr(-mu / 2 - epsilon / mu)
        return math.exp(high) - math.exp(epsilon + low) - delta

    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    most = mu * mu / 2 - mu * float(special.ndtri(delta))  # where the first term alone is delta
    return max(0.0, float(optimize.brentq(excess, 0.0, max(most, 1e-9), xtol=1e-7)) - 1e-6)
