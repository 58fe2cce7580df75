"""The options of an aggregation rule, and what one aggregated step yields."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from appa_secure.aggregation.rules import Rule, find_rule

Floats = NDArray[np.float64]

Variant = Literal["weighted", "paper"]
FairnessForm = Literal["cov2", "cov"]
FairnessScope = Literal["question", "batch"]

MAX_A = 16.0
MAX_SHARPNESS = 32.0
MAX_LOG_CONTRAST = (
    30.0  # of weights in a secure sum: leaves 7 of float64's 53 bits to the lightest of 8 groups
)
_UNDERFLOW = 600.0  # below exp(-600) float64 has nothing left either


@dataclass(frozen=True)
class AggregationSpec:
    """One aggregation rule. Values are checked here, once.

    Attributes:
        kind: name of a rule of `rules.BUILT_IN` (`average`; `min` and `max` over groups; `lse`, Park et al.
            2405.00254; `appa`, the adaptive rule of arXiv 2604.04261; `maximin`, this project's own), or
            `module:name` of a `Rule` of the user's.
        variant: of `appa`, above `tau` both give the mean; below it, with history weights α (sum 1),
            `weighted`: R = (1/a)·log Σ_g α_g·exp(a·r_g), which stays within [min r, max r];
            `paper`: R = log((1/G)·Σ_g exp(α_g·r_g)), the published formula, which is about Σ α_g·r_g / G and
            so drops by a factor of about G when the fairness index crosses `tau`.
        tau: fairness index from which on `appa` takes the plain mean, in [0, 1] (0.99; 0.9 in the
            predecessor).
        temperature: T > 0 of w_g ∝ exp(-h_g / T).
        band: (lo, hi) within [0, 1]; a history outside counts as the nearer end when it makes a weight. So
            exp((hi-lo)/T) is a public cap on the contrast of weights; in a secure sum at most e^30, or exp(-h/T)
            is lost in fixed point. It is a constant of the agreement: a band that the coordinator moved would single
            groups out (docs/decisions/0009, 0021). `paper` has none.
        decay: λ of the history h ← λ·h + (1-λ)·mean reward, in [0, 1); not used by `maximin`.
        dial: of `maximin`, 0 (average) to 1 (worst group): the objective (1-dial)·mean h + dial·min h.
        ramp: of `maximin`, steps over which the weights' exponent grows from 0 to 1/T.
        a: exponent of `weighted` and `lse`, -16..16; 0 is the limit Σ α_g·r_g, the mean for `lse`.
        fi: fairness index from the coefficient of variation, `cov2`: 1/(1+CoV²) (Jain), or `cov`: 1/(1+CoV).
        fi_scope: `question`: index of each rollout's G rewards, averaged over rollouts; `batch`: one index,
            of the groups' mean rewards over the batch, which needs one sum instead of B.
        sharpness: c of the smooth blind `min` and `max`, in (0, 32]; their bias is at most log(G)/c. Values
            span a factor exp(c) and sums are read as float64: 24 leaves 8 fractional bits for up to 1,300
            groups, 28 for up to 24; from about 30 on the headroom check of the secure sum refuses.
        alpha_tolerance: `paper` cannot be renormalised after a dropout: where |Σα - 1| exceeds this, it takes
            the mean branch.
        h0: history before the first step, or None: the first step's mean reward becomes the first history.
    """

    kind: str = "appa"
    variant: Variant = "weighted"
    tau: float = 0.99
    temperature: float = 0.1
    band: tuple[float, float] = (0.0, 1.0)
    decay: float = 0.8
    dial: float = 0.9
    ramp: int = 200
    a: float = 1.0
    fi: FairnessForm = "cov2"
    fi_scope: FairnessScope = "question"
    sharpness: float = 24.0
    alpha_tolerance: float = 1e-6
    h0: float | None = None

    @property
    def rule(self) -> Rule:
        """The rule that `kind` names."""
        return find_rule(self.kind)

    @property
    def contrast(self) -> float:
        """Logarithm of the largest ratio of two groups' weights, (hi-lo)/T."""
        return (self.band[1] - self.band[0]) / self.temperature

    def __post_init__(self) -> None:
        find_rule(self.kind)
        choices = (("variant", Variant), ("fi", FairnessForm), ("fi_scope", FairnessScope))
        for name, allowed in choices:
            value, known = getattr(self, name), get_args(allowed)
            if value not in known:
                raise ValueError(f"aggregation.{name}={value!r} is unknown; choose one of {', '.join(known)}")
        self._check("tau", self.tau, 0.0 <= self.tau <= 1.0, "in [0, 1]")
        lo, hi = self.band
        if not 0.0 <= lo < hi <= 1.0:
            raise ValueError(f"aggregation.band must be two numbers 0 <= lo < hi <= 1, got {self.band}")
        least = (hi - lo) / _UNDERFLOW
        self._check("temperature", self.temperature, self.temperature >= least, f">= {least:.4g}")
        if self.variant == "paper" and self.band != (0.0, 1.0):
            raise ValueError("aggregation.band acts on sums of weights, which variant=paper does not have")
        self._check("dial", self.dial, 0.0 <= self.dial <= 1.0, "in [0, 1]")
        self._check("ramp", self.ramp, self.ramp >= 1, "at least 1")
        self._check("decay", self.decay, 0.0 <= self.decay < 1.0, "in [0, 1)")
        self._check("a", self.a, abs(self.a) <= MAX_A, f"in [-{MAX_A}, {MAX_A}]")
        self._check(
            "sharpness", self.sharpness, 0.0 < self.sharpness <= MAX_SHARPNESS, f"in (0, {MAX_SHARPNESS}]"
        )
        self._check("alpha_tolerance", self.alpha_tolerance, 0.0 < self.alpha_tolerance < 1.0, "in (0, 1)")
        if self.h0 is not None:
            self._check("h0", self.h0, 0.0 <= self.h0 <= 1.0, "in [0, 1], or null")

    @staticmethod
    def _check(name: str, value: float, holds: bool, rule: str) -> None:
        if not (math.isfinite(value) and holds):
            raise ValueError(f"aggregation.{name} must be {rule}, got {value}")


@dataclass(frozen=True)
class StepResult:
    """What the coordinator knows after one step. Fields a rule does not have are None.

    Attributes:
        rewards: (B,) reward of each rollout, in [0, 1].
        fi: fairness index of the step, in (0, 1].
        branch: how `rewards` came about: `mean`, `lse` (log-sum-exp, also the smooth blind min and max),
            `weighted` (`maximin`), the exact `min`, `max` of the clear form, or what a user's rule calls it.
        z_next: Σ_g exp(-h_g/T) after the step (`appa`; `weighted`: of h within the band, less lo); the next
            step's normaliser of `paper`.
        h_mean: mean history over the groups that took part.
        h_jain: Jain's index of the histories, in (0, 1].
        soft_min: -T·log(z_next/G), a smooth minimum of the histories: min h ≤ soft_min ≤ mean h (`appa`).
        alpha_sum: A, the sum of the weights as sent, over the groups that took part (`appa`, `maximin`). `paper`: Σα,
            1 up to rounding unless the roster changed; else Σ exp(-h/T) before the step, G on the first.
        scale: what `rewards` are multiples of: a reward of r from every group gives about scale·r, in (0, 1]. 1 but for
            the log-sum-exp branch of `paper`, Σα/G (from log(1 + x) ≈ x and exp(x) ≈ 1 + x). Rewards that do not come
            from groups, such as that of an unreadable answer, are put on it.
    """

    rewards: Floats
    fi: float
    branch: str
    z_next: float | None
    h_mean: float
    h_jain: float
    soft_min: float | None
    alpha_sum: float | None
    scale: float = 1.0


def jain_to_index(jain: Floats, fi: FairnessForm) -> Floats:
    """Fairness index from Jain's index J = 1/(1 + CoV²), any shape."""
    if fi == "cov2":
        return jain
    return np.asarray(1.0 / (1.0 + np.sqrt(np.maximum(1.0 / jain - 1.0, 0.0))), dtype=np.float64)


def check_rewards(name: str, rewards: Floats) -> None:
    """Refuse rewards that are not finite numbers in [0, 1], naming the first."""
    bad = ~((rewards >= 0.0) & (rewards <= 1.0))  # True for NaN as well
    if bad.any():
        at = tuple(int(axis) for axis in np.argwhere(bad)[0])
        raise ValueError(
            f"{name}{list(at)} is {rewards[at]}; rewards must lie in [0, 1] (malformed answers are left out)"
        )
