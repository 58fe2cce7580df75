"""The rules with every group's rewards in one place: cohort mode, and reference for the secure-sum form."""

from __future__ import annotations

import math

import numpy as np

from appa_secure.aggregation.history import next_history, raw_weight, weight
from appa_secure.aggregation.spec import (
    AggregationSpec,
    Branch,
    Floats,
    StepResult,
    check_rewards,
    jain_to_index,
)


def combine_clear(
    spec: AggregationSpec,
    r: Floats,
    h_prev: Floats | None,
    z_prev: float | None = None,
    roster: int | None = None,
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

    Returns:
        The result; the histories after the step (G,); the weights α used (G,): `weighted` normalised, `paper` as used.

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
    temperature = spec.temperature
    known = [None if np.isnan(h) else float(h) for h in before]
    terms = [math.exp(-h / temperature) for h in known if h is not None]
    z = z_prev if z_prev is not None else (sum(terms) if terms else None)
    size = count if roster is None else roster
    means = r.mean(axis=1)  # (G,)
    if spec.variant == "weighted":
        first = z_prev is None and not terms
        raw = [raw_weight(h, float(m), first, temperature) for h, m in zip(known, means, strict=True)]
        alpha = np.array(raw)  # (G,)
    else:
        alpha = np.array([weight(h, z, size, temperature) for h in known])  # (G,)
    after = np.array(
        [
            next_history(spec.h0 if h is None else h, float(mean), spec.decay)
            for h, mean in zip(known, means, strict=True)
        ]
    )

    jain = _jain(r) if spec.fi_scope == "question" else _jain(means[:, None])
    fi = float(jain_to_index(jain, spec.fi).mean())
    rewards, branch = _rewards(spec, r, alpha, fi)
    appa = spec.kind == "appa"
    z_next = float(np.exp(-after / temperature).sum())
    result = StepResult(
        rewards=np.clip(rewards, 0.0, 1.0),
        fi=fi,
        branch=branch,
        z_next=z_next if appa else None,
        h_mean=float(after.mean()),
        h_jain=float(_jain(after[:, None])[0]),
        soft_min=-temperature * math.log(z_next / count) if appa else None,
        alpha_sum=float(alpha.sum()) if appa else None,
    )
    return result, after, alpha / alpha.sum() if spec.variant == "weighted" else alpha


def _rewards(spec: AggregationSpec, r: Floats, alpha: Floats, fi: float) -> tuple[Floats, Branch]:
    mean: Floats = r.mean(axis=0)
    if spec.kind == "min":
        return r.min(axis=0), "min"
    if spec.kind == "max":
        return r.max(axis=0), "max"
    if spec.kind == "average" or fi >= spec.tau:
        return mean, "mean"
    if spec.variant == "paper":
        if abs(alpha.sum() - 1.0) > spec.alpha_tolerance:
            return mean, "mean"
        return np.log(np.exp(alpha[:, None] * r).mean(axis=0)), "lse"
    share = (alpha / alpha.sum())[:, None]  # (G, 1)
    if spec.a == 0.0:
        return (share * r).sum(axis=0), "lse"
    return np.log1p((share * np.expm1(spec.a * r)).sum(axis=0)) / spec.a, "lse"


def _jain(values: Floats) -> Floats:
    """Jain's index 1/(1 + CoV²) over the first axis, (G, N) -> (N,), each in [1/G, 1]; 1 where all are 0."""
    mean = values.mean(axis=0)
    scaled = np.where(mean > 0.0, values / np.where(mean > 0.0, mean, 1.0), 1.0)
    return np.asarray(1.0 / (1.0 + scaled.var(axis=0)), dtype=np.float64)
