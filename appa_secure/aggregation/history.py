"""A group's alignment history and the weight it gives: the parts of a rule that never leave a group."""

from __future__ import annotations

import math


def next_history(h: float | None, r_mean: float, decay: float) -> float:
    """The history after a step (APPA, arXiv 2604.04261): λ·h + (1-λ)·mean reward; at first the mean reward itself.

    Args:
        h: history so far in [0, 1], or None.
        r_mean: mean reward of the step, in [0, 1].
        decay: λ in [0, 1).
    """
    if not 0.0 <= r_mean <= 1.0:
        raise ValueError(f"mean reward must lie in [0, 1], got {r_mean}")
    if h is None:
        return r_mean
    _check_history(h)
    return decay * h + (1.0 - decay) * r_mean


def averaging_decay(step: int) -> float:
    """λ of step 1, 2, ... that makes the history the average of all mean rewards, later ones weighing more: 1 - 2/(t+1).

    The step size of Frank and Wolfe (Jaggi 2013, "Revisiting Frank-Wolfe"): h_t = Σ_s 2s·r_s / (t(t+1)).
    """
    _check_step(step)
    return (step - 1) / (step + 1)


def raw_weight(
    h: float | None,
    r_mean: float,
    first: bool,
    temperature: float,
    band: tuple[float, float] = (0.0, 1.0),
    gain: float = 1.0,
) -> float:
    """Weight of a group before normalisation, exp(-gain·(h - lo)/T) in (0, 1] with h clipped to the band (lo, hi).

    1 for everyone on the first step of all (`first`), so that weights are uniform. A group without history on a later
    step takes its mean reward of this step for one. Normalising is left to the sum of these weights, so no value from
    the coordinator enters: a coordinator that could scale a group's weight at will could read rewards off the sums.
    """
    if h is None and first:
        return 1.0
    h = r_mean if h is None else h
    _check_history(h)
    lo, hi = band
    return math.exp(-gain * (min(max(h, lo), hi) - lo) / temperature)


def ramped(step: int, ramp: int) -> float:
    """Share of the full exponent at step 1, 2, ...: 0 at the first, 1 from step `ramp` + 1 on."""
    _check_step(step)
    return min(1.0, (step - 1) / ramp)


def weight(h: float | None, z: float | None, groups: int, temperature: float) -> float:
    """A group's weight α in (0, 1] from its own history and the published normaliser.

    α = exp(-h/T)/z. Uniform, 1/groups, while there is no normaliser (first step) or no history (a group's
    first step). A group that comes back after missing the step that made z can exceed 1; it is capped there,
    so the ranges promised to the secure sum hold and a returner never outweighs all others by more than 1 :
    1.

    Raises:
        ValueError: a history outside [0, 1], or a z that no set of 1..groups histories can give.
    """
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    if h is not None:
        _check_history(h)
    if z is not None:
        smallest = math.exp(-1.0 / temperature)
        if not 0.99 * smallest <= z <= 1.01 * groups:  # 1 %: room for fixed-point rounding
            raise ValueError(
                f"z={z} is not a sum of 1..{groups} terms exp(-h/T) in [{smallest:.3g}, 1]: wrong step?"
            )
    if h is None or z is None:
        return 1.0 / groups
    return min(1.0, math.exp(-h / temperature) / z)


def _check_history(h: float) -> None:
    if not 0.0 <= h <= 1.0:
        raise ValueError(f"history must lie in [0, 1], got {h}")


def _check_step(step: int) -> None:
    if step < 1:
        raise ValueError(f"steps are counted from 1, got {step}")
