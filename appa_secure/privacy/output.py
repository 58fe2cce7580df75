"""Output noise: what the noise that clients add to their reward vectors guarantees about one client, and its account.

Privacy unit `client`: everything one client sends in the alignment (in blind mode a client is a group). Neighbouring
worlds differ in the vectors of one client, which may be any vectors of the layout: who takes part is public, so nothing
is added or removed. Each opened sum is one release; a client pays before its upload leaves, whether or not the sum is
opened in the end.

The honest clients in a sum have drawn discrete Gaussian noise of variance parameter v each. At distance Δ, the sum over k
of them has Rényi divergence at most α e^2 / 2 at every order α > 1, with

    e = Δ / sqrt(k v) + τ sqrt(d),    τ = 10 Σ_{i=1}^{k-1} exp(-2 π^2 v i / (i + 1))

in d dimensions (Kairouz, Liu, Steinke, ICML 2021, theorem 1, from Canonne, Kamath, Steinke 2020). That is the curve of a
Gaussian mechanism of noise multiplier 1 / e, so Opacus's RDP accountant composes and converts it. Its PRV accountant would
not be right: equal Rényi curves do not mean equal mechanisms. More noise of more clients, masks and reduction modulo the
ring are post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from appa_secure.privacy.accounting import GaussianEvent, calibrate
from appa_secure.privacy.ledger import Budget
from appa_secure.secagg.fixedpoint import Coding, OutputNoise

UNIT = "client"
MECHANISM = "sum of discrete gaussians"
ACCOUNTANT = "rdp"
ADJACENCY = "replace"


@dataclass(frozen=True)
class OutputPlan:
    """The output noise of a run. multiplier: standard deviation of the noise of `honest` clients over the L2 sensitivity,
    so that `releases` sums cost at most epsilon at delta. colluders: clients whose noise does not count."""

    epsilon: float
    delta: float
    releases: int
    honest: int
    colluders: int
    multiplier: float

    @property
    def noise(self) -> OutputNoise:
        """What the layout of the reward vectors carries."""
        return OutputNoise(self.multiplier, self.honest)

    @property
    def event(self) -> GaussianEvent:
        """What one release costs."""
        return GaussianEvent(self.multiplier, 1.0, 1)

    @property
    def budget(self) -> Budget:
        """The budget of one client, apart from the one of the people in its data."""
        return Budget(self.epsilon, self.delta, ACCOUNTANT, UNIT, "secagg.output_epsilon", ADJACENCY)


def plan_output(epsilon: float, delta: float, releases: int, honest: int, colluders: int) -> OutputPlan:
    """The least noise with which `releases` sums cost at most `epsilon`."""
    multiplier = calibrate(epsilon, delta, ACCOUNTANT, [], 1.0, releases)
    return OutputPlan(epsilon, delta, releases, honest, colluders, multiplier)


def achieved_multiplier(coding: Coding, honest: int) -> float:
    """The noise multiplier 1 / e of the module's formula that sums of `coding` over `honest` clients have.

    Raises ValueError for a coding without noise.
    """
    if not coding.variance:
        raise ValueError("this coding has no output noise")
    v, size = coding.variance, coding.layout.size
    # The first term, i = 1, is the largest: taken for all of them.
    tau = 10 * (honest - 1) * math.exp(-(math.pi**2) * v)
    return 1 / (math.sqrt(coding.distance_squared / (honest * v)) + tau * math.sqrt(size))


def std_of_mean(coding: Coding, contributors: int) -> float:
    """Standard deviation of the noise on the mean over `contributors` clients of the layout's first entry."""
    return float(coding.noise_std(contributors)[0]) / contributors


def output_statement(
    plan: OutputPlan, rows: Sequence[Mapping[str, Any]], coding: Coding, contributors: int, secure_rng: bool
) -> dict[str, Any]:
    """The part of the privacy statement about single clients, as data.

    rows: the run's output ledger. coding, contributors: of a step in which every answer could be read and nobody dropped.
    """
    spent: dict[str, float] = {}
    for row in rows:
        spent[row["client"]] = max(spent.get(row["client"], 0.0), float(row["epsilon"]))
    return {
        "unit": UNIT,
        "unit_meaning": "everything one client sent during alignment",
        "adjacency": f"{ADJACENCY} one client's vectors by any others",
        "mechanism": MECHANISM,
        "accountant": ACCOUNTANT,
        "budget": plan.epsilon,
        "delta": plan.delta,
        "epsilon": spent,
        "noise_multiplier": plan.multiplier,
        "releases_planned": plan.releases,
        "honest_clients_assumed": plan.honest,
        "colluders_tolerated": plan.colluders,
        "noise_on_a_mean_reward": std_of_mean(coding, contributors),
        "secure_rng": secure_rng,
        "not_covered": [
            "The predictor: its updates are averaged without output noise, and the average depends on every client.",
            "That a client takes part, drops out or refuses.",
            "Who is in several clients' data: this is about one client, and it gives nothing to people beyond their own ε.",
        ],
    }


def output_markdown(s: Mapping[str, Any]) -> str:
    """That part in plain words, to follow the rest of the statement."""
    worst = max(s["epsilon"].values(), default=0.0)
    seeded = (
        [] if s["secure_rng"] else ["**Only towards those who do not know the run's seed**, as above.", ""]
    )
    return "\n".join(
        [
            "## One client as a whole",
            "",
            f"Each client added noise to what it sent. Whoever sees all opened sums learns almost the same about "
            f"**{s['unit_meaning']}** as if it had sent anything else: the odds of any conclusion change by at most a "
            f"factor of e^ε, with **ε ≤ {worst:.2f}**, except with probability δ = {s['delta']:g}.",
            "",
            *seeded,
            f"- It holds while at least {s['honest_clients_assumed']} clients of every sum are honest, with up to "
            f"{s['colluders_tolerated']} that work with the coordinator or leave out their noise.",
            f"- Mechanism: {s['mechanism']}, noise multiplier {s['noise_multiplier']:.4g}, {s['releases_planned']} releases "
            f"planned; accountant: {s['accountant'].upper()} (Opacus); budget: ε = {s['budget']:g}.",
            f"- The price: noise of standard deviation {s['noise_on_a_mean_reward']:.3g} on every mean reward, which lies "
            "between 0 and 1.",
            "",
            "Not covered:",
            "",
            *(f"- {text}" for text in s["not_covered"]),
            "",
        ]
    )
