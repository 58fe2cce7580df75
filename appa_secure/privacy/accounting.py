"""Privacy accounting: which releases a client makes and what they cost together.

The mathematics of composition is Opacus's (RDP: Mironov 2017, Mironov et al. 2019; PRV: Gopi et al. 2021); this module
only says what is composed. Adjacency is add/remove of one privacy unit throughout.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from opacus.accountants import PRVAccountant, RDPAccountant

from appa_secure.errors import PrivacyError


@dataclass(frozen=True, order=True)
class GaussianEvent:
    """`count` adaptive releases of a (Poisson-subsampled) Gaussian mechanism.

    noise_multiplier: standard deviation / L2 sensitivity, > 0. sample_rate: probability that a unit takes part in one
    release, in (0, 1]; 1 means no subsampling. count: how many such releases *one unit can take part in*.
    """

    noise_multiplier: float
    sample_rate: float
    count: int

    def __post_init__(self) -> None:
        if not (self.noise_multiplier > 0 and math.isfinite(self.noise_multiplier)):
            raise PrivacyError(f"noise_multiplier must be a positive number, got {self.noise_multiplier}")
        if not 0 < self.sample_rate <= 1:
            raise PrivacyError(f"sample_rate must lie in (0, 1], got {self.sample_rate}")
        if self.count < 0:
            raise PrivacyError(f"count must be >= 0, got {self.count}")


def epsilon(events: Iterable[GaussianEvent], delta: float, accountant: str) -> float:
    """The epsilon of all `events` together at `delta`, 0 for none. accountant: "prv" or "rdp"."""
    if not 0 < delta < 1:
        raise PrivacyError(f"delta must lie in (0, 1), got {delta}")
    merged: dict[tuple[float, float], int] = {}
    for e in events:
        key = (e.noise_multiplier, e.sample_rate)
        merged[key] = merged.get(key, 0) + e.count
    history = tuple((s, q, n) for (s, q), n in sorted(merged.items()) if n)
    return _epsilon(history, delta, accountant) if history else 0.0


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[tuple[float, float, int], ...], delta: float, accountant: str) -> float:
    if accountant not in ("prv", "rdp"):
        raise PrivacyError(f"accountant must be 'prv' or 'rdp', got {accountant!r}")
    book = PRVAccountant() if accountant == "prv" else RDPAccountant()
    book.history = list(history)
    with warnings.catch_warnings():
        # Opacus warns when the best RDP order is at the edge of its grid; the bound stays valid.
        warnings.simplefilter("ignore")
        return float(book.get_epsilon(delta))


def calibrate(
    target: float, delta: float, accountant: str, fixed: list[GaussianEvent], sample_rate: float, count: int
) -> float:
    """The smallest noise multiplier (to 0.5 %, rounded up) so that `fixed` plus `count` releases cost <= target.

    Raises PrivacyError when `fixed` alone leaves no room.
    """
    spent = epsilon(fixed, delta, accountant)
    if spent >= target:
        raise PrivacyError(
            f"privacy.epsilon={target} is used up by the private context alone (epsilon {spent:.3f}): "
            "raise privacy.context_noise or privacy.epsilon"
        )

    def cost(noise: float, book: str) -> float:
        return epsilon([*fixed, GaussianEvent(noise, sample_rate, count)], delta, book)

    # RDP is cheap and never below PRV by more than its slack, so it brackets; PRV then refines from there.
    low, high = 0.05, 1.0
    while cost(high, "rdp") > target:
        low, high = high, high * 2
        if high > 1e5:
            raise PrivacyError(
                f"no noise reaches privacy.epsilon={target} with {count} releases at rate {sample_rate}"
            )
    while high / low > 1.005:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if cost(middle, "rdp") <= target else (middle, high)
    if accountant == "rdp":
        return high
    low = high * 0.8
    while high / low > 1.005:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if cost(middle, accountant) <= target else (middle, high)
    if cost(high, accountant) > target:
        raise PrivacyError(f"calibration to privacy.epsilon={target} failed under {accountant}")
    return high
