"""The rules in secure-sum form: each group adds one vector, the coordinator sees the sum only.

Segments of the vector, in order; "r" is the group's reward vector (B,), h its history, α its weight:

| name | size | one group's values               | kinds             | the sum gives                        |
|------|------|----------------------------------|-------------------|--------------------------------------|
| S1   | B    | r                                | all               | the mean                             |
| S2   | B, 1 | r², or (mean r)² (scope `batch`) | all               | the fairness index                   |
| E    | B    | see `_exponential`               | min, max, appa    | the log-sum-exp branch               |
| Z    | 1    | exp(-h/T), h after the step      | appa              | soft minimum; `paper`: normaliser    |
| H1   | 1    | h                                | all               | mean history                         |
| H2   | 1    | h²                               | all               | Jain's index of the histories        |
| A    | 1    | α (`paper`), w (`weighted`)      | appa              | the weights' normaliser              |

`paper` needs α = exp(-h/T)/Z inside an exponent, so groups must be told Z. `weighted` is linear in the weights: groups
send w = exp(-h/T) and A normalises, which is the same rule (APPA §2) with nothing taken from the coordinator, and
renormalises after dropouts by itself.

`appa` with scope `question` has 3B+4 entries. Fairness figures are wanted for every rule, so every rule sends
S1, S2, H1 and H2.

Accuracy. With values rounded to multiples of 2^-f and G groups, a sum is off by at most ε = G·2^-(f+1):
  - mean: ε/G. `weighted` for a > 0: about 2ε/A; for a < 0 up to a factor exp(|a|) more (A ≥ G·exp(-1/T));
  - `paper`: ε/G;
  - smooth min and max: every term is at least 1, so at most -log(1 - 2^-(f+1))/c, on top of the bias of
    at most log(G)/c that the rule itself has: min ≤ R_min ≤ min + log(G)/c, max - log(G)/c ≤ R_max ≤ max;
  - Jain's index: relative 2ε/S1 + ε/S2, so meaningless for rewards whose squares are near 2^-f; `cov` takes a
    square root of 1/J - 1, so near equality its error is the root of that;
  - Z: relative ε/Z with Z ≥ G·exp(-1/T), so at most 2^-(f+1)·exp(1/T): with T = 0.1 and f = 40, 1.0e-8.
    In `paper` the same relative error enters all weights α; `weighted` does not use Z.
"""

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


def segments(spec: AggregationSpec, batch: int) -> tuple[tuple[str, int, float, float], ...]:
    """Layout of one group's vector for a batch of B rollouts.

    Returns:
        (name, size, lo, hi) per segment, in order; every value `contribution` writes lies in [lo, hi].
    """
    if batch < 1:
        raise ValueError(f"batch must have at least one rollout, got {batch}")
    layout = [("S1", batch, 0.0, 1.0), ("S2", batch if spec.fi_scope == "question" else 1, 0.0, 1.0)]
    if spec.kind in ("min", "max"):
        layout.append(("E", batch, 1.0, math.exp(spec.sharpness)))
    elif spec.kind == "appa":
        if spec.variant == "paper":
            layout.append(("E", batch, 1.0, math.e))
        else:
            layout.append(("E", batch, 0.0, float(_centred(np.ones(1), spec.a)[0])))
        layout.append(("Z", 1, math.exp(-1.0 / spec.temperature), 1.0))
    layout += [("H1", 1, 0.0, 1.0), ("H2", 1, 0.0, 1.0)]
    if spec.kind == "appa":
        layout.append(("A", 1, 0.0, 1.0))
    return tuple(layout)


def contribution(
    spec: AggregationSpec, r: Floats, h_prev: float | None, z_prev: float | None, groups: int
) -> tuple[Floats, float]:
    """One group's vector for one step; computed by the group alone.

    Args:
        spec: the rule, the same for every group.
        r: (B,) the group's rewards in [0, 1].
        h_prev: the group's history before the step, None before its first.
        z_prev: the normaliser published after the previous step; None on the first step of all: all weights
            equal. `weighted` uses no more of it than whether it is None.
        groups: number of groups in the roster.

    Returns:
        The vector, float64, entries as `segments(spec, B)` says; and the history after the step, which the
        caller keeps only if the step is completed.

    Raises:
        ValueError: rewards, history or normaliser out of range; names which.
    """
    r = np.asarray(r, dtype=np.float64)
    if r.ndim != 1 or not len(r):
        raise ValueError(f"rewards must be a non-empty vector (B,), got shape {r.shape}")
    check_rewards("rewards", r)
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    mean = float(r.mean())
    alpha = (
        raw_weight(h_prev, mean, z_prev is None, spec.temperature)
        if spec.variant == "weighted"
        else weight(h_prev, z_prev, groups, spec.temperature)
    )
    h = next_history(spec.h0 if h_prev is None else h_prev, mean, spec.decay)
    values = {
        "S1": r,
        "S2": r * r if spec.fi_scope == "question" else np.array([mean * mean]),
        "H1": np.array([h]),
        "H2": np.array([h * h]),
    }
    if spec.kind != "average":
        values["E"] = _exponential(spec, r, alpha)
    if spec.kind == "appa":
        values["Z"] = np.array([math.exp(-h / spec.temperature)])
        values["A"] = np.array([alpha])
    layout = segments(spec, len(r))
    # Rounding in exp and the products may step over a bound by one unit in the last place.
    return np.concatenate([np.clip(values[name], lo, hi) for name, _, lo, hi in layout]), h


def combine(spec: AggregationSpec, sums: Floats, batch: int, groups: int, noisy: bool = False) -> StepResult:
    """The coordinator's side: from the sum of the groups' vectors to rewards.

    Args:
        spec: the rule the groups used.
        sums: (L,) sum over the groups that took part, L the total size of `segments(spec, batch)`.
        batch: B.
        groups: number G of groups in the sum.
        noisy: the sum carries output noise: what leaves its range is moved to the nearest sum that G groups can have, so
            that rewards and indices stay in theirs. A group that lies about its range is then not noticed.

    Raises:
        ValueError: a wrong length, or a sum without noise that no G vectors within their ranges can have; names the
            segment.
    """
    sums = np.asarray(sums, dtype=np.float64)
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    layout = segments(spec, batch)
    expected = sum(size for _, size, _, _ in layout)
    if sums.shape != (expected,):
        raise ValueError(f"sums must have shape ({expected},) for {batch} rollouts, got {sums.shape}")
    part: dict[str, Floats] = {}
    start = 0
    for name, size, lo, hi in layout:
        values = sums[start : start + size]
        if noisy:
            values = np.clip(values, groups * _least(spec, name, lo), groups * hi)
        slack = 1e-6 * groups * max(1.0, hi)  # fixed-point rounding, with room
        if not ((values >= groups * lo - slack) & (values <= groups * hi + slack)).all():  # False for NaN
            raise ValueError(
                f"sum of segment {name} leaves [{groups * lo:.6g}, {groups * hi:.6g}]: a party sent values "
                "out of range, or the sum was decoded with the wrong layout"
            )
        part[name] = values
        start += size

    s1 = part["S1"] if spec.fi_scope == "question" else part["S1"].mean(keepdims=True)
    jain = _jain(s1, part["S2"], groups)
    fi = float(jain_to_index(jain, spec.fi).mean())
    rewards, branch = _rewards(spec, part, fi, groups)
    z = float(part["Z"][0]) if spec.kind == "appa" else None
    if z is not None and z <= 0.0:
        raise ValueError("sum of segment Z is not positive: too few fractional bits for this temperature")
    return StepResult(
        rewards=np.clip(rewards, 0.0, 1.0),
        fi=fi,
        branch=branch,
        z_next=z,
        h_mean=float(part["H1"][0]) / groups,
        h_jain=float(_jain(part["H1"], part["H2"], groups)[0]),
        soft_min=None if z is None else -spec.temperature * math.log(z / groups),
        alpha_sum=float(part["A"][0]) if spec.kind == "appa" else None,
    )


def _least(spec: AggregationSpec, name: str, lo: float) -> float:
    """Lower bound of one group's value. A weight of `weighted` is exp(-h/T), never 0."""
    return math.exp(-1.0 / spec.temperature) if name == "A" and spec.variant == "weighted" else lo


def _rewards(spec: AggregationSpec, part: dict[str, Floats], fi: float, groups: int) -> tuple[Floats, Branch]:
    mean = part["S1"] / groups
    if spec.kind == "average":
        return mean, "mean"
    # Sums of logarithms' arguments, kept positive against rounding.
    if spec.kind in ("min", "max"):
        smooth = np.log(np.maximum(part["E"] / groups, 1.0)) / spec.sharpness
        return (1.0 - smooth if spec.kind == "min" else smooth), "lse"
    if fi >= spec.tau:
        return mean, "mean"
    alpha_sum = float(part["A"][0])
    if spec.variant == "paper":
        if abs(alpha_sum - 1.0) > spec.alpha_tolerance:  # weights inside the exponent cannot be renormalised
            return mean, "mean"
        return np.log(np.maximum(part["E"] / groups, 1.0)), "lse"
    if alpha_sum <= 0.0:
        raise ValueError("sum of segment A is not positive: no group that took part has weight")
    average = np.maximum(part["E"], 0.0) / alpha_sum
    if spec.a == 0.0:
        return average, "lse"
    return np.log1p(np.maximum(spec.a * average, math.expm1(-abs(spec.a)))) / spec.a, "lse"


def _exponential(spec: AggregationSpec, r: Floats, alpha: float) -> Floats:
    """One group's E, (B,); `alpha` is α for `paper`, w for `weighted`.

    `paper`: exp(α·r). `weighted`: w·(exp(a·r) - 1)/a, which with A says the same as w·exp(a·r), has a limit
    at a = 0, and loses no digits for small a. `min`: exp(c·(1-r)); `max`: exp(c·r): never below 1, so that
    rounding is harmless in the logarithm.
    """
    if spec.kind == "min":
        return np.exp(spec.sharpness * (1.0 - r))
    if spec.kind == "max":
        return np.exp(spec.sharpness * r)
    if spec.variant == "paper":
        return np.exp(alpha * r)
    return alpha * _centred(r, spec.a)


def _centred(r: Floats, a: float) -> Floats:
    return r if a == 0.0 else np.asarray(np.expm1(a * r) / a, dtype=np.float64)


def _jain(s1: Floats, s2: Floats, groups: int) -> Floats:
    """Jain's index s1²/(G·s2), elementwise, in [1/G, 1]; 1 where all values are 0 and so equal."""
    safe = np.where(s2 > 0.0, s2, 1.0)
    return np.where(s2 > 0.0, np.clip(s1 * s1 / (groups * safe), 1.0 / groups, 1.0), 1.0)
