"""The linear programs behind ceilings, solved by HiGHS."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array, hstack

from appa_secure.ceilings.answers import Answers, Floats
from appa_secure.errors import DataError


def cdf_program(
    game: Answers, block: NDArray[np.int64], share: Floats, dial: float = 1.0
) -> tuple[Floats, float, Floats]:
    """Maximise the mean of t_b over blocks b of questions, t_b ≤ 1 - Σ_{q in b} share[q, g]·W1_qg for all g; with
    dial < 1 the objective (1-dial)·Avg AS + dial·that mean.

    Many answers reach the optimum; of these, the one with the largest Avg AS is returned, by a second
    program. Variables: F_v (a CDF at each inner option v of each question), u_vg = max(F_v - F_vg, 0), so
    that
    |F - F_g| = 2·u_g - F + F_g, and t_b.

    Args:
        block: (Q,) block of each question: all 0 for the maximin over groups, 0..Q-1 for the minimum per
            question.
        share: (Q, G) weight of each question's distance in its block.
        dial: in (0, 1].

    Returns:
        Answers (Q, K), the objective's value, and the dual weights of the groups in the minimum (G,), summing to 1.
    """
    groups, blocks = game.groups, int(block.max()) + 1
    gaps = np.where(game.mask[:, 1:], np.diff(game.ordinals, axis=1), 0.0)
    gaps /= gaps.sum(axis=1, keepdims=True)
    question, option = np.nonzero(game.mask[:, 1:])  # (V,) a cut lies behind each option but the last
    known = np.cumsum(game.targets, axis=2)[question, :, option].ravel()  # (V·G,) the groups' CDFs
    cut, group = np.divmod(np.arange(len(question) * groups), groups)
    weight = gaps[question, option][cut] * share[question[cut], group]  # (V·G,)
    first_u, first_t = len(question), len(question) + len(cut)
    u, ones = first_u + np.arange(len(cut)), np.ones(len(cut))

    bound = block[question[cut]] * groups + group  # rows (b, g): t_b + Σ weight·(2u - F) ≤ 1 - Σ weight·F_g
    fixed = np.bincount(bound, weight * known, minlength=blocks * groups)
    above = blocks * groups + np.arange(len(cut))  # F - u_g ≤ F_g
    pair = np.flatnonzero(question[1:] == question[:-1])  # F_k ≤ F_{k+1} within a question
    rising = blocks * groups + len(cut) + np.arange(len(pair))
    entries = [
        (
            np.arange(blocks * groups),
            first_t + np.repeat(np.arange(blocks), groups),
            np.ones(blocks * groups),
        ),
        (bound, u, 2.0 * weight),
        (bound, cut, -weight),
        (above, cut, ones),
        (above, u, -ones),
        (rising, pair, np.ones(len(pair))),
        (rising, pair + 1, -np.ones(len(pair))),
    ]
    rows, columns, values = (np.concatenate(part) for part in zip(*entries, strict=True))
    shape = (blocks * groups + len(cut) + len(pair), first_t + blocks)
    matrix = coo_array((values, (rows, columns)), shape=shape).tocsr()
    limits = np.concatenate([1.0 - fixed, known, np.zeros(len(pair))])
    unit = [(0.0, 1.0)] * first_t
    overall = (
        gaps[question, option][cut] * game.share[question[cut], group]
    )  # Σ_g (1 - AS_g) has these weights
    distance = np.concatenate(
        [-np.bincount(cut, overall), 2.0 * overall]
    )  # without the constant overall @ known
    first = _solve(
        np.concatenate([(1.0 - dial) / groups * distance, np.full(blocks, -dial / blocks)]),
        matrix,
        limits,
        [*unit, *[(None, None)] * blocks],
    )
    prices = np.maximum(-first.ineqlin.marginals[: blocks * groups], 0.0).reshape(blocks, groups).sum(axis=0)
    cost = np.concatenate([distance, np.zeros(blocks)])
    reached = [(t - 1e-9, None) for t in first.x[first_t:]]
    solution = _solve(cost, matrix, limits, [*unit, *reached])
    cdf = np.zeros(game.mask.shape)
    cdf[question, option] = solution.x[:first_u]
    cdf[np.arange(len(cdf)), game.mask.sum(axis=1) - 1] = 1.0
    answers = np.where(game.mask, np.maximum(np.diff(cdf, axis=1, prepend=0.0), 0.0), 0.0)
    value = (1.0 - dial) * (1.0 - float(overall @ known) / groups) - float(first.fun)
    return answers / answers.sum(axis=1, keepdims=True), value, prices / prices.sum()


def matrix_games(columns: Floats, counted: NDArray[np.bool_]) -> tuple[Floats, Floats, Floats]:
    """Q games side by side: mix J payoffs (J, Q, G) so that the least payoff of a counted player (Q, G) is largest.

    Returns:
        Mixtures (J, Q), values (Q,), and the weights (Q, G) of the players that prove them, rows summing to 1.
    """
    count, games, groups = columns.shape
    game, group = np.nonzero(counted)
    row = np.arange(len(game))  # value_q - Σ_j mixture_jq·payoff_jqg ≤ 0
    payoff = coo_array(
        (
            -columns[:, game, group].ravel(),
            (np.tile(row, count), (np.arange(count)[:, None] * games + game).ravel()),
        ),
        shape=(len(row), count * games),
    )
    value = coo_array((np.ones(len(row)), (row, game)), shape=(len(row), games))
    total = coo_array((np.ones(count * games), (np.tile(np.arange(games), count), np.arange(count * games))))
    solution = _solve(
        cost=np.concatenate([np.zeros(count * games), -np.ones(games)]),
        rows=hstack([payoff, value]),
        limits=np.zeros(len(row)),
        bounds=[(0.0, 1.0)] * (count * games) + [(None, None)] * games,
        equal=hstack([total, coo_array((games, games))]),
    )
    weights = np.zeros((games, groups))
    weights[game, group] = np.maximum(-solution.ineqlin.marginals, 0.0)
    mixture = np.maximum(solution.x[: count * games], 0.0).reshape(count, games)
    return (
        mixture / mixture.sum(axis=0),
        solution.x[count * games :],
        weights / weights.sum(axis=1, keepdims=True),
    )


def matrix_game(columns: Floats) -> tuple[Floats, float, Floats]:
    """Mix J payoff vectors (J, G) so that the least payoff is largest: mixture (J,), value, weights (G,)."""
    mixture, value, weights = matrix_games(columns[:, None], np.ones((1, columns.shape[1]), dtype=bool))
    return mixture[:, 0], float(value[0]), weights[0]


def _solve(cost: Floats, rows: Any, limits: Floats, bounds: Any, equal: Any = None) -> Any:
    """Minimise cost @ x with rows @ x <= limits, bounds, and equal @ x = 1, by HiGHS."""
    solution = linprog(
        cost,
        A_ub=rows,
        b_ub=limits,
        A_eq=equal,
        b_eq=None if equal is None else np.ones(equal.shape[0]),
        bounds=bounds,
        method="highs",
    )
    if solution.status != 0:
        raise DataError(f"the linear program of a ceiling was not solved: {solution.message}")
    return solution
