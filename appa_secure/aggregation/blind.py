"""The rules in secure-sum form: each group adds one vector, the coordinator sees the sum only.

Segments of the vector, in order; "r" is the group's reward vector (B,), h its history, α and w its weight:

| name | size | one group's values                          | kinds              | the sum gives                 |
|------|------|---------------------------------------------|--------------------|-------------------------------|
| S1   | B    | r                                           | all                | the mean                      |
| S2   | B, 1 | r², or (mean r)² (scope `batch`)            | all                | the fairness index            |
| E    | B    | min, max, lse, `paper`: an exponential of r | all but average    | the log-sum-exp branch        |
|      |      | `weighted`: w·(exp(a·r)-1)/a; maximin: w·r  |                    | the weighted mean             |
| Z    | 1    | exp(-h/T), h after the step                 | appa               | soft minimum; `paper`'s norm  |
| A    | 1    | α (`paper`), w (`weighted`, maximin)        | appa, maximin      | the weights' normaliser       |
| H1   | 1    | h                                           | all                | mean history                  |
| H2   | 1    | h²                                          | all                | Jain's index of the histories |

`paper` needs α = exp(-h/T)/Z inside an exponent, so groups must be told Z. `weighted` and `maximin` are linear in the
weights: groups send w = exp(-h/T) and A normalises, which is the same rule (APPA §2) with nothing taken from the
coordinator, and renormalises after dropouts by itself.

`appa` with scope `question` has 3B+4 entries, `maximin` 3B+3. Fairness figures are wanted for every rule, so every rule
sends S1, S2, H1 and H2. Between S2 and H1 stand the sums that the rule declares (`rules`).

Accuracy. With values rounded to multiples of 2^-f and G groups, a sum is off by at most ε = G·2^-(f+1):
  - mean: ε/G. `weighted` for a > 0 and `maximin`: about 2ε/A with A ≥ G·exp(-(hi-lo)/T) for the band (lo, hi);
    `weighted` and `lse` for a < 0: up to a factor exp(|a|) more; `lse` for a > 0, `paper`: ε/G;
  - smooth min and max: every term is at least 1, so at most -log(1 - 2^-(f+1))/c, on top of the bias of
    at most log(G)/c that the rule itself has: min ≤ R_min ≤ min + log(G)/c, max - log(G)/c ≤ R_max ≤ max;
  - Jain's index: relative 2ε/S1 + ε/S2, so meaningless for rewards whose squares are near 2^-f; `cov` takes a
    square root of 1/J - 1, so near equality its error is the root of that;
  - Z: relative ε/Z with Z ≥ G·exp(-(hi-lo)/T), so at most 2^-(f+1)·exp(1/T) without a band: with T = 0.1 and f = 40,
    1.0e-8. In `paper` the same relative error enters all weights α; no other rule uses Z.
"""

from __future__ import annotations

import numpy as np

from appa_secure.aggregation.history import averaging_decay, next_history, ramped, raw_weight, weight
from appa_secure.aggregation.rules import Own, Sum, Sums
from appa_secure.aggregation.spec import (
    MAX_LOG_CONTRAST,
    AggregationSpec,
    Floats,
    StepResult,
    check_rewards,
    jain_to_index,
)


def declared(spec: AggregationSpec) -> tuple[Sum, ...]:
    """All sums of a rule, in the order in which they travel."""
    question = spec.fi_scope == "question"
    return (
        Sum("S1", 0.0, 1.0, lambda g: g.rewards),
        Sum("S2", 0.0, 1.0, lambda g: g.rewards**2 if question else float(g.rewards.mean()) ** 2, question),
        *spec.rule.sums(spec),
        Sum("H1", 0.0, 1.0, lambda g: g.history, per_rollout=False),
        Sum("H2", 0.0, 1.0, lambda g: g.history**2, per_rollout=False),
    )


def segments(spec: AggregationSpec, batch: int) -> tuple[tuple[str, int, float, float], ...]:
    """Layout of one group's vector for a batch of B rollouts.

    Returns:
        (name, size, lo, hi) per segment, in order; every value `contribution` writes lies in [lo, hi].
    """
    if batch < 1:
        raise ValueError(f"batch must have at least one rollout, got {batch}")
    if spec.contrast > MAX_LOG_CONTRAST:
        raise ValueError(
            f"aggregation.temperature={spec.temperature}: weights that differ by up to e^{spec.contrast:.3g} drown in a secure "
            f"sum; at most e^{MAX_LOG_CONTRAST:g}: take a higher temperature or a narrower aggregation.band"
        )
    return tuple((s.name, batch if s.per_rollout else 1, s.low, s.high) for s in declared(spec))


def contribution(
    spec: AggregationSpec, r: Floats, h_prev: float | None, z_prev: float | None, groups: int, step: int = 1
) -> tuple[Floats, float]:
    """One group's vector for one step; computed by the group alone.

    Args:
        spec: the rule, the same for every group.
        r: (B,) the group's rewards in [0, 1].
        h_prev: the group's history before the step, None before its first.
        z_prev: the normaliser published after the previous step; None on the first step of all: all weights
            equal. Only `paper` uses more of it than whether it is None.
        groups: number of groups in the roster.
        step: number of the step since histories began, from 1; only `maximin` depends on it.

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
    before = used_weight(spec, r, h_prev, z_prev, groups, step)
    own = Own(r, before, own_history(spec, h_prev, float(r.mean()), step))
    # Rounding in exp and the products may step over a bound by one unit in the last place.
    parts = [np.clip(np.atleast_1d(s.term(own)), s.low, s.high) for s in declared(spec)]
    return np.concatenate(parts), own.history


def used_weight(
    spec: AggregationSpec, r: Floats, h_prev: float | None, z_prev: float | None, groups: int, step: int
) -> float:
    """The weight in `contribution`, of the same arguments; before normalisation, but for `paper`."""
    if spec.variant == "weighted":
        return own_weight(spec, h_prev, float(r.mean()), z_prev is None, step)
    return weight(h_prev, z_prev, groups, spec.temperature)


def own_weight(spec: AggregationSpec, h: float | None, mean: float, first: bool, step: int) -> float:
    """One group's weight before normalisation, for every rule but `paper`."""
    gain = ramped(step, spec.ramp) if spec.rule.annealed else 1.0
    return raw_weight(h, mean, first, spec.temperature, spec.band, gain)


def own_history(spec: AggregationSpec, h: float | None, mean: float, step: int) -> float:
    """One group's history after a step with this mean reward."""
    decay = averaging_decay(step) if spec.rule.annealed else spec.decay
    return next_history(spec.h0 if h is None else h, mean, decay)


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
            values = np.clip(values, groups * lo, groups * hi)
        slack = 1e-6 * groups * max(1.0, abs(lo), abs(hi))  # fixed-point rounding, with room
        if not ((values >= groups * lo - slack) & (values <= groups * hi + slack)).all():  # False for NaN
            raise ValueError(
                f"sum of segment {name} leaves [{groups * lo:.6g}, {groups * hi:.6g}]: a party sent values "
                "out of range, or the sum was decoded with the wrong layout"
            )
        part[name] = values
        start += size
    s1 = part["S1"] if spec.fi_scope == "question" else part["S1"].mean(keepdims=True)
    fi = float(jain_to_index(jain(s1, part["S2"], groups), spec.fi).mean())
    return outcome(spec, Sums(part, groups, fi))


def outcome(spec: AggregationSpec, sums: Sums) -> StepResult:
    """What a step's sums say under the rule; also of sums taken in one place, for the clear form."""
    rewards, branch = spec.rule.rewards(spec, sums)
    z = float(sums["Z"][0]) if "Z" in sums.parts else None
    if z is not None and z <= 0.0:
        raise ValueError("sum of segment Z is not positive: too few fractional bits for this temperature")
    alpha_sum = float(sums["A"][0]) if "A" in sums.parts else None
    published = spec.kind == "appa" and spec.variant == "paper" and branch == "lse"
    soft_min = None if z is None else spec.band[0] - spec.temperature * float(np.log(z / sums.groups))
    return StepResult(
        rewards=np.clip(rewards, 0.0, 1.0),
        fi=sums.fi,
        branch=branch,
        z_next=z,
        h_mean=float(sums["H1"][0]) / sums.groups,
        h_jain=float(jain(sums["H1"], sums["H2"], sums.groups)[0]),
        soft_min=soft_min,
        alpha_sum=alpha_sum,
        scale=alpha_sum / sums.groups if published and alpha_sum is not None else 1.0,
    )


def jain(s1: Floats, s2: Floats, groups: int) -> Floats:
    """Jain's index s1²/(G·s2), elementwise, in [1/G, 1]; 1 where all values are 0 and so equal."""
    safe = np.where(s2 > 0.0, s2, 1.0)
    return np.where(s2 > 0.0, np.clip(s1 * s1 / (groups * safe), 1.0 / groups, 1.0), 1.0)
