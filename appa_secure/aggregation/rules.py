"""The rules, each as the sums it needs and one function from the sums to rewards; and where a user adds one.

A rule of one's own is a `Rule` in any module that all parties can import; `aggregation.kind=my_module:my_rule` takes
it. Nothing else has to be registered. Nash welfare, the geometric mean of the groups' rewards, as an example:

    from math import log
    import numpy as np
    from appa_secure.aggregation import Rule, Sum

    nash = Rule(
        sums=lambda spec: (Sum("L", log(1e-3), 0.0, lambda g: np.log(np.maximum(g.rewards, 1e-3))),),
        rewards=lambda spec, sums: (np.exp(sums["L"] / sums.groups), "nash"),
    )

Every rule also sends S1 = Σ r, S2 = Σ r² (or of batch means), H1 = Σ h and H2 = Σ h², from which come the mean and
the fairness index; `rewards` may use them. Each site vouches for the code it imports: the agreement of a run names the
module, it does not hold the code's digest.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from appa_secure.aggregation.spec import AggregationSpec, Floats


@dataclass(frozen=True)
class Own:
    """What one group's terms are made of; nobody else sees any of it.

    Attributes:
        rewards: (B,) of this step, in [0, 1].
        weight: `paper`: α; else the weight before normalisation, in (0, 1].
        history: after the step, in [0, 1].
    """

    rewards: Floats
    weight: float
    history: float


@dataclass(frozen=True)
class Sum:
    """One secure sum over groups: its name, the range [low, high] of one group's term, and the term itself.

    `term` gives (B,) values, or one number where `per_rollout` is False.
    """

    name: str
    low: float
    high: float
    term: Callable[[Own], Floats | float]
    per_rollout: bool = True


@dataclass(frozen=True)
class Sums:
    """What the coordinator has: `sums["S1"]` is (B,) or (1,); the number of groups; the fairness index in (0, 1]."""

    parts: Mapping[str, Floats]
    groups: int
    fi: float

    def __getitem__(self, name: str) -> Floats:
        return self.parts[name]

    @property
    def mean(self) -> Floats:
        """Mean reward over groups, (B,)."""
        return self["S1"] / self.groups


@dataclass(frozen=True)
class Rule:
    """An aggregation rule; see the module docstring.

    Attributes:
        sums: the secure sums it needs beside S1, S2, H1, H2. Their ranges may depend on options only.
        rewards: (spec, sums) -> rewards (B,) and the branch taken. Clipped to [0, 1] afterwards.
        exact: rewards from all groups' rewards (G, B), where `rewards` only approximates them; for cohort and clear
            form. None: the sums give the rule itself.
        annealed: histories average all steps, and the weights' exponent grows over `ramp` steps, instead of APPA's
            exponential average and constant exponent.
    """

    sums: Callable[[AggregationSpec], tuple[Sum, ...]]
    rewards: Callable[[AggregationSpec, Sums], tuple[Floats, str]]
    exact: Callable[[Floats], Floats] | None = None
    annealed: bool = False


def find_rule(kind: str) -> Rule:
    """The rule of that name. Raises ValueError for a kind that is neither built in nor `module:name` of a Rule."""
    if ":" not in kind:
        try:
            return BUILT_IN[kind]
        except KeyError:
            raise ValueError(
                f"aggregation.kind={kind!r} is unknown; choose one of {', '.join(BUILT_IN)}, or module:name of a Rule"
            ) from None
    module, _, name = kind.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"aggregation.kind={kind!r} cannot be imported: {error}") from error
    if not isinstance(found, Rule):
        raise ValueError(f"aggregation.kind={kind!r} is no appa_secure.aggregation.Rule")
    return found


# --- the built-in rules -----------------------------------------------------------------------------------------------


def _average(spec: AggregationSpec, sums: Sums) -> tuple[Floats, str]:
    return sums.mean, "mean"


def _smooth_sums(sign: float) -> Callable[[AggregationSpec], tuple[Sum, ...]]:
    """E = exp(c·r) for the maximum, exp(c·(1-r)) for the minimum: never below 1, harmless in the logarithm."""

    def sums(spec: AggregationSpec) -> tuple[Sum, ...]:
        c = spec.sharpness
        shift = 0.0 if sign > 0 else 1.0
        return (Sum("E", 1.0, math.exp(c), lambda g: np.exp(c * (shift + sign * g.rewards))),)

    return sums


def _smooth_max(spec: AggregationSpec, sums: Sums) -> tuple[Floats, str]:
    return np.log(np.maximum(sums["E"] / sums.groups, 1.0)) / spec.sharpness, "lse"


def _smooth_min(spec: AggregationSpec, sums: Sums) -> tuple[Floats, str]:
    return 1.0 - _smooth_max(spec, sums)[0], "lse"


def _lse_sums(spec: AggregationSpec) -> tuple[Sum, ...]:
    return (Sum("E", 0.0, float(_centred(np.ones(1), spec.a)[0]), lambda g: _centred(g.rewards, spec.a)),)


def _lse(spec: AggregationSpec, sums: Sums) -> tuple[Floats, str]:
    return _log_of_average(spec, sums["E"] / sums.groups), "lse"


def _appa_sums(spec: AggregationSpec) -> tuple[Sum, ...]:
    lo, hi = spec.band
    temperature = spec.temperature
    if spec.variant == "paper":
        e = Sum("E", 1.0, math.e, lambda g: np.exp(g.weight * g.rewards))
    else:
        top = float(_centred(np.ones(1), spec.a)[0])
        e = Sum("E", 0.0, top, lambda g: g.weight * _centred(g.rewards, spec.a))
    z = Sum(
        "Z",
        math.exp((lo - hi) / temperature),
        1.0,
        lambda g: math.exp((lo - min(max(g.history, lo), hi)) / temperature),
        per_rollout=False,
    )
    return (e, z, _weights(spec))


def _appa(spec: AggregationSpec, sums: Sums) -> tuple[Floats, str]:
    if sums.fi >= spec.tau:
        return sums.mean, "mean"
    alpha_sum = float(sums["A"][0])
    if spec.variant == "paper":
        if abs(alpha_sum - 1.0) > spec.alpha_tolerance:  # weights inside the exponent cannot be renormalised
            return sums.mean, "mean"
        return np.log(np.maximum(sums["E"] / sums.groups, 1.0)), "lse"
    return _log_of_average(spec, np.maximum(sums["E"], 0.0) / _positive(alpha_sum)), "lse"


def _maximin_sums(spec: AggregationSpec) -> tuple[Sum, ...]:
    return (Sum("E", 0.0, 1.0, lambda g: g.weight * g.rewards), _weights(spec))


def _maximin(spec: AggregationSpec, sums: Sums) -> tuple[Floats, str]:
    weighted = sums["E"] / _positive(float(sums["A"][0]))
    return (1.0 - spec.dial) * sums.mean + spec.dial * weighted, "weighted"


def _weights(spec: AggregationSpec) -> Sum:
    """A. A weight of `paper` can be as small as exp(-1/T)/G, any other is exp(-x/T) for an x within the band's width."""
    lo, hi = spec.band
    least = 0.0 if spec.variant == "paper" else math.exp((lo - hi) / spec.temperature)
    return Sum("A", least, 1.0, lambda g: g.weight, per_rollout=False)


BUILT_IN: dict[str, Rule] = {
    "average": Rule(lambda spec: (), _average),
    "min": Rule(_smooth_sums(-1.0), _smooth_min, exact=lambda r: np.asarray(r.min(axis=0))),
    "max": Rule(_smooth_sums(1.0), _smooth_max, exact=lambda r: np.asarray(r.max(axis=0))),
    "lse": Rule(_lse_sums, _lse),
    "appa": Rule(_appa_sums, _appa),
    "maximin": Rule(_maximin_sums, _maximin, annealed=True),
}


def _centred(r: Floats, a: float) -> Floats:
    """(exp(a·r) - 1)/a: says the same as exp(a·r), has a limit at a = 0, and loses no digits for small a."""
    return r if a == 0.0 else np.asarray(np.expm1(a * r) / a, dtype=np.float64)


def _log_of_average(spec: AggregationSpec, average: Floats) -> Floats:
    """(1/a)·log of the mean of exp(a·r), from the mean of `_centred`; kept inside the logarithm against rounding."""
    a = spec.a
    if a == 0.0:
        return average
    return np.asarray(np.log1p(np.maximum(a * average, math.expm1(-abs(a)))) / a, dtype=np.float64)


def _positive(weights: float) -> float:
    if weights <= 0.0:
        raise ValueError("sum of segment A is not positive: no group that took part has weight")
    return weights
