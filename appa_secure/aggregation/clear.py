"""The rules with every group's rewards in one place: cohort mode, and reference for the secure-sum form."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from appa_secure.aggregation.blind import declared, outcome, own_history, own_weight
from appa_secure.aggregation.history import weight
from appa_secure.aggregation.rules import Own, Sums
from appa_secure.aggregation.spec import AggregationSpec, Floats, StepResult, check_rewards, jain_to_index


def combine_clear(
    spec: AggregationSpec,
    r: Floats,
    h_prev: Floats | None,
    z_prev: float | None = None,
    roster: int | None = None,
    step: int = 1,
) -> tuple[StepResult, Floats, Floats]:
    """One step of the rule from per-group rewards.

    `min` and `max` are exact here. Everything else equals `combine` of the groups' contributions up to
    rounding when `z_prev` and `roster` are those of the secure-sum run. Without `z_prev` the normaliser is
    computed from the histories of the groups present, as a server that knows them does; after a dropout that
    leaves `weighted` as it is and spares `paper` the mean branch.

    Args:
        spec: the rule.
        r: (G, B) rewards in [0, 1] of the groups that take part.
        h_prev: (G,) their histories before the step, NaN where a group has none yet; None: nobody has.
        z_prev: the previous step's `z_next`, or None.
        roster: number of groups including absent ones; default G.
        step: number of the step since histories began, from 1; only `maximin` depends on it.

    Returns:
        The result; the histories after the step (G,); the weights (G,): `paper` as used, else normalised to sum to 1
        (of `maximin` with its dial, (1-dial)/G + dial·w/Σw).

    Raises:
        ValueError: wrong shapes, or values out of range.
    """
    r = np.asarray(r, dtype=np.float64)
    if r.ndim != 2 or not r.size:
        raise ValueError(f"rewards must be a non-empty (G, B) array, got shape {r.shape}")
    check_rewards("rewards", r)
    count = len(r)
    before = np.full(count, np.nan) if h_prev is None else np.asarray(h_prev, dtype=np.float64)
    if before.shape != (count,):
        raise ValueError(f"h_prev must have shape ({count},) like the rewards' groups, got {before.shape}")
    if roster is not None and roster < count:
        raise ValueError(f"roster={roster} is smaller than the {count} groups that take part")
    known = [None if np.isnan(h) else float(h) for h in before]
    means = r.mean(axis=1).tolist()  # (G,)
    if spec.variant == "weighted":
        first = z_prev is None and known.count(None) == count
        alpha = np.array(
            [own_weight(spec, h, m, first, step) for h, m in zip(known, means, strict=True)]
        )  # (G,)
    else:
        terms = [math.exp(-h / spec.temperature) for h in known if h is not None]
        z = z_prev if z_prev is not None else (sum(terms) if terms else None)
        size = count if roster is None else roster
        alpha = np.array([weight(h, z, size, spec.temperature) for h in known])  # (G,)
    after = np.array([own_history(spec, h, m, step) for h, m in zip(known, means, strict=True)])

    groups = [Own(row, float(w), float(h)) for row, w, h in zip(r, alpha, after, strict=True)]
    parts = {s.name: np.sum([np.atleast_1d(s.term(g)) for g in groups], axis=0) for s in declared(spec)}
    jain = _jain(r) if spec.fi_scope == "question" else _jain(r.mean(axis=1)[:, None])
    sums = Sums(parts, count, float(jain_to_index(jain, spec.fi).mean()))
    result = replace(outcome(spec, sums), h_jain=float(_jain(after[:, None])[0]))
    exact = spec.rule.exact
    if exact is not None:
        result = replace(result, rewards=exact(r), branch=spec.kind)
    return result, after, shares(spec, alpha)


def shares(spec: AggregationSpec, used: Floats) -> Floats:
    """How much each group counts, (G,), from the weights that the groups used (G,): as used in `paper`, else summing to 1;
    of `maximin` with its dial, (1-dial)/G + dial·w/Σw."""
    if spec.variant == "paper":
        return used
    share: Floats = used / used.sum()
    return (1.0 - spec.dial) / len(used) + spec.dial * share if spec.kind == "maximin" else share


def _jain(values: Floats) -> Floats:
    """Jain's index 1/(1 + CoV²) over the first axis, (G, N) -> (N,), each in [1/G, 1]; 1 where all are 0."""
    mean = values.mean(axis=0)
    scaled = np.where(mean > 0.0, values / np.where(mean > 0.0, mean, 1.0), 1.0)
    return np.asarray(1.0 / (1.0 + scaled.var(axis=0)), dtype=np.float64)
