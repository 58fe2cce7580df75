"""The privacy statement of a run: what is guaranteed to whom, from the ledger and the configuration alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from appa_secure.config import Config
from appa_secure.privacy import sensitivity

_UNITS = {
    "response": "one person's answer to one question",
    "respondent": "all answers of one person that are used (at most {bound} per release)",
    "record": "one group's answer distribution to one question",
}


def statement(
    config: Config, rows: Sequence[Mapping[str, Any]], noise_multiplier: float, nominal: bool
) -> dict[str, Any]:
    """The statement as data. rows: the run's ledger; noise_multiplier: the plan's, 0 without privacy."""
    p = config.privacy
    spent: dict[str, float] = {}
    for row in rows:
        spent[row["client"]] = max(spent.get(row["client"], 0.0), float(row["epsilon"]))
    return {
        "private": p.enabled,
        "unit": p.unit,
        "unit_meaning": _UNITS[p.unit].format(bound=p.answers_per_unit),
        "adjacency": "add/remove one unit",
        "delta": p.delta,
        "accountant": p.accountant,
        "epsilon": spent,
        "epsilon_of_a_person_in_several_groups": _several(spent),
        "secure_rng": p.secure_rng,
        "budget": p.epsilon,
        "mechanisms": _mechanisms(config, noise_multiplier) if p.enabled else [],
        "post_processing": "rewards, alignment histories, fairness indices, the policy and its checkpoints",
        "noise_source": "secret key of each client" if p.secure_rng else "derived from the run's seed",
        "nominal_respondents": config.data.nominal_respondents if nominal else None,
        "not_covered": _not_covered(config, nominal),
    }


def _several(spent: Mapping[str, float]) -> dict[str, float]:
    """What a unit present at k clients may lose at most: basic composition over the k largest epsilons, k = 2, 3."""
    largest = sorted(spent.values(), reverse=True)
    return {str(k): sum(largest[:k]) for k in (2, 3) if len(largest) >= k}


def _seed_warning(s: Mapping[str, Any]) -> list[str]:
    if s["secure_rng"]:
        return []
    return [
        "",
        "**This holds only towards those who do not know the run's seed**, which is in its configuration: the noise was "
        "made repeatable for measurement. With `privacy.secure_rng=true` it holds towards everyone.",
    ]


def _mechanisms(config: Config, noise_multiplier: float) -> list[dict[str, Any]]:
    p, t = config.privacy, config.predictor
    if p.mechanism == "histogram":
        return [
            {
                "name": "histograms of all context and training questions",
                "kind": "Gaussian",
                "noise_multiplier": noise_multiplier,
                "releases": 1,
            }
        ]
    return [
        {
            "name": "private context",
            "kind": "Gaussian",
            "noise_multiplier": p.context_noise / sensitivity.histograms(p.unit, p.answers_per_unit),
            "releases": 1,
        },
        {
            "name": "preference predictor",
            "kind": "DP-SGD: Poisson-subsampled Gaussian, per-unit clipping",
            "noise_multiplier": noise_multiplier,
            "sample_rate": p.sample_rate,
            "clip": p.clip,
            "rounds": t.rounds,
            "local_steps": t.local_steps,
        },
    ]


def _not_covered(config: Config, nominal: bool) -> list[str]:
    out = ["Which questions a group was asked, and that it takes part, are public."]
    if config.privacy.unit == "response":
        out.append(
            "A person who answered many questions is protected per answer; all answers together are not one unit. "
            "A person who is counted in several groups pays each group's epsilon: the sum bounds that person's loss."
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
    lines = [
        "# Privacy statement",
        "",
        f"Whoever sees everything this run released learns almost the same about **{s['unit_meaning']}** as if it had not "
        f"been there: its presence changes the odds of any conclusion by at most a factor of e^ε, with **ε ≤ {worst:.2f}**, "
        f"except with probability δ = {s['delta']:g}. The budget was ε = {s['budget']:g} per client.",
        *_seed_warning(s),
        "",
        f"- Privacy unit: {s['unit']}; adjacency: {s['adjacency']}; accountant: {s['accountant'].upper()} (Opacus).",
        f"- Noise: {s['noise_source']}.",
        *(
            f"- Somebody whose data are in {k} of the groups: ε ≤ {e:.2f} in total (δ adds up likewise)."
            for k, e in s["epsilon_of_a_person_in_several_groups"].items()
        ),
    ]
    for m in s["mechanisms"]:
        facts = ", ".join(
            f"{k.replace('_', ' ')} {_plain(v)}" for k, v in m.items() if k not in ("name", "kind")
        )
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


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
