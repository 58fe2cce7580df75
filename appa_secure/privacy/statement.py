"""The privacy statement of a run: what is guaranteed to whom, from the ledger and the configuration alone.

What it tells follows the best practices for stating guarantees of Ponomareva et al., "How to DP-fy ML: A Practical Guide
to Machine Learning with Differential Privacy" (JAIR 77, 2023; arXiv 2303.00654, section 5.3), and the factors of NIST SP
800-226, "Guidelines for Evaluating Differential Privacy Guarantees" (Near, Darais, Lefkovitz, Howarth, 2025):
threat_model/differential_privacy.md, section 8, goes through them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from appa_secure.config import Config
from appa_secure.privacy import sensitivity
from appa_secure.privacy.accounting import GaussianEvent, epsilon

_UNITS = {
    "response": "one person's answer to one question",
    "respondent": "all answers of one person that are used (at most {bound} per release)",
    "record": "one group's answer distribution to one question",
}
_ACCOUNTING = {
    "prv": "privacy loss distributions, computed numerically to 0.01 in ε; assumes the Poisson sampling that is really done",
    "rdp": "Rényi divergences, an upper bound; assumes the Poisson sampling that is really done",
}


def statement(
    config: Config, rows: Sequence[Mapping[str, Any]], noise_multiplier: float, nominal: bool,
    origin: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The statement as data. rows: the run's ledger; noise_multiplier: the plan's, 0 without privacy; origin: facts of
    the run in which the releases were made (`appa_secure.origin`), None where this run made them."""
    p = config.privacy
    spent: dict[str, float] = {}
    for row in rows:
        spent[row["client"]] = max(spent.get(row["client"], 0.0), float(row["epsilon"]))
    return {
        "private": p.enabled,
        "unit": p.unit,
        "unit_meaning": _UNITS[p.unit].format(bound=p.answers_per_unit),
        "adjacency": "add/remove one unit",
        "model": "central within each client: noise is added before anything leaves it; no trust in the coordinator",
        "data_accesses": "this run's releases of context and training; no other run, and no choice among runs",
        "outputs": "all that leaves a client, each round's update and all that is made of it: not the last predictor alone",
        "mechanism": p.mechanism,
        "delta": p.delta,
        "accountant": p.accountant,
        "accounting": _ACCOUNTING[p.accountant],
        "implementation": "noise is float64 and gradients are float32: the accounting is for real numbers, and attacks on "
        "the low bits of floating-point sums are not excluded by it. Times and sizes of messages are not covered",
        "epsilon": spent,
        "epsilon_without_amplification": _largest(rows, p.delta, p.accountant, 1, amplified=False),
        "epsilon_of_a_person_in_several_groups": {
            str(k): _largest(rows, p.delta, p.accountant, k) for k in (2, 3) if len(spent) >= k
        },
        "secure_rng": p.secure_rng,
        "budget": p.epsilon,
        "released_in": None if origin is None else dict(origin),
        "mechanisms": _mechanisms(config, noise_multiplier) if p.enabled else [],
        "post_processing": "rewards, alignment histories, fairness indices, the policy and its checkpoints",
        "noise_source": "secret key of each client" if p.secure_rng else "derived from the run's seed",
        "nominal_respondents": config.data.nominal_respondents if nominal else None,
        "not_covered": _not_covered(config, nominal),
    }


def _largest(
    rows: Sequence[Mapping[str, Any]], delta: float, accountant: str, clients: int, amplified: bool = True
) -> float:
    """The largest epsilon at `delta` of any `clients` clients together: their releases, accounted for as one sequence.

    Whoever is a unit at several clients takes part in all their releases. amplified=False counts every unit as drawn in
    every step.
    """
    events: dict[str, list[GaussianEvent]] = {}
    for row in rows:
        rate = float(row["sample_rate"]) if amplified else 1.0
        event = GaussianEvent(float(row["noise_multiplier"]), rate, int(row["count"]))
        events.setdefault(row["client"], []).append(event)
    # Clients with the same releases, as nearly all are, need one computation: combinations of bills, not of clients.
    bills = Counter(tuple(sorted(one)) for one in events.values())
    chosen = itertools.combinations_with_replacement(bills, clients)
    possible = [c for c in chosen if all(n <= bills[bill] for bill, n in Counter(c).items())]
    return max((epsilon(itertools.chain.from_iterable(c), delta, accountant) for c in possible), default=0.0)


def _mechanisms(config: Config, noise_multiplier: float) -> list[dict[str, Any]]:
    p, t = config.privacy, config.predictor
    spread = sensitivity.histograms(p.unit, p.answers_per_unit)
    if p.mechanism == "histogram":
        return [
            {
                "name": "histograms of all context and training questions",
                "kind": "Gaussian",
                "sensitivity": spread,
                "noise_multiplier": noise_multiplier,
                "sampler": "none: all answers within the contribution bound",
                "releases": 1,
            }
        ]
    return [
        {
            "name": "private context",
            "kind": "Gaussian",
            "sensitivity": spread,
            "noise_multiplier": p.context_noise / spread,
            "sampler": "none: all answers within the contribution bound",
            "releases": 1,
        },
        {
            "name": "preference predictor",
            "kind": "DP-SGD: Poisson-subsampled Gaussian, per-unit clipping",
            "noise_multiplier": noise_multiplier,
            "sampler": "Poisson: every unit independently in every step that asks for it",
            "sample_rate": p.sample_rate,
            "clip": sensitivity.gradient_sum(p.clip),
            "rounds": t.rounds,
            "local_steps": t.local_steps,
        },
    ]


def _not_covered(config: Config, nominal: bool) -> list[str]:
    out = [
        "Which questions a group was asked, and that it takes part, are public.",
        "What a group as a whole prefers is not hidden by this guarantee: it protects single units.",
        "The choice of the settings of this run (context size, noise, clipping, rounds) is not charged. The defaults were "
        "chosen on public benchmarks; whoever tries several settings on the same people and keeps one pays for all of them.",
    ]
    if config.privacy.unit == "response":
        out.append(
            "A person who answered many questions is protected per answer; all answers together are not one unit. "
            "A person who is counted in several groups loses what is stated for two or three groups."
        )
    if config.predictor.training != "federated":
        out.append(
            f"predictor.training={config.predictor.training}: one trusted party held all groups' answers while the "
            "predictor was trained. The guarantee holds towards everybody but that party."
        )
    if config.evaluation.truth:
        out.append(
            "evaluation.truth=true: this run measured itself against true distributions. Everything it measured, and the "
            "choice of anything by these measurements, is outside the guarantee and stamped 'not private'."
        )
    if config.privacy.enabled and not config.privacy.secure_rng:
        out.append(
            "privacy.secure_rng=false: the noise can be recomputed by anyone who knows the run's seed. The guarantee holds "
            "only towards those who don't. Use privacy.secure_rng=true outside simulations."
        )
    if nominal:
        out.append(
            f"The data set holds distributions only; epsilon per response assumes {config.data.nominal_respondents} equally "
            "weighted respondents behind each of them."
        )
    return out


def markdown(s: Mapping[str, Any]) -> str:
    """The statement in plain words."""
    if not s["private"]:
        return (
            "# Privacy statement\n\n**This run is not private.** It trained without noise, for comparison. Nothing it wrote "
            "carries a differential-privacy guarantee; do not publish it if the data are confidential.\n"
        )
    worst = max(s["epsilon"].values(), default=0.0)
    plain = s["epsilon_without_amplification"]
    lines = [
        "# Privacy statement",
        "",
        f"Whoever sees everything this run released learns almost the same about **{s['unit_meaning']}** as if it had not "
        f"been there: its presence changes the odds of any conclusion by at most a factor of e^ε, with **ε ≤ {worst:.2f}**, "
        f"except with probability δ = {s['delta']:g}. The budget was ε = {s['budget']:g} per client.",
        *_seed_warning(s),
        *_shared_release(s),
        "",
        f"- Privacy unit: {s['unit']}; adjacency: {s['adjacency']}; accountant: {s['accountant'].upper()} (Opacus).",
        f"- Where the noise is added: {s['model']}.",
        f"- Noise: {s['noise_source']}.",
        f"- Uses of the data that are covered: {s['data_accesses']}.",
        f"- Outputs that are covered: {s['outputs']}.",
        f"- Accounting: {s['accounting']}.",
        f"- Implementation: {s['implementation']}.",
        f"- Without counting on which units were drawn staying secret: ε ≤ {plain:.2f} instead of {worst:.2f}.",
        *(
            f"- Somebody whose data are in {k} of the groups: ε ≤ {e:.2f} in total, at the same δ."
            for k, e in s["epsilon_of_a_person_in_several_groups"].items()
        ),
    ]
    for m in s["mechanisms"]:
        facts = "; ".join(_facts((k, v) for k, v in m.items() if k not in ("name", "kind")))
        lines.append(f"- {m['name'].capitalize()}: {m['kind']}; {facts}.")
    lines += [
        f"- Free of further cost, because computed from the above and public text: {s['post_processing']}.",
        "",
        "| client | ε |",
        "|---|---|",
        *(f"| {client.replace('|', '/')} | {eps:.3f} |" for client, eps in sorted(s["epsilon"].items())),
        "",
        "Not covered:",
        "",
        *(f"- {text}" for text in s["not_covered"]),
        "",
    ]
    return "\n".join(lines)


def _shared_release(s: Mapping[str, Any]) -> list[str]:
    if s["released_in"] is None:
        return []
    return [
        "",
        f"**One release for several runs.** What is paid for below was released in run {s['released_in']['run']} (end of its "
        f"transcript: {s['released_in']['transcript']}). This run released nothing more: it and every other run that starts "
        "there work on that one release, and all of them together cost the ε stated here once.",
    ]


def _seed_warning(s: Mapping[str, Any]) -> list[str]:
    if s["secure_rng"]:
        return []
    return [
        "",
        "**This holds only towards those who do not know the run's seed**, which is in its configuration: the noise was "
        "made repeatable for measurement. With `privacy.secure_rng=true` it holds towards everyone.",
    ]


def _facts(parameters: Iterable[tuple[str, Any]]) -> Iterable[str]:
    for name, value in parameters:
        yield (
            f"{name.replace('_', ' ')} {value:.4g}"
            if isinstance(value, float)
            else f"{name.replace('_', ' ')} {value}"
        )
