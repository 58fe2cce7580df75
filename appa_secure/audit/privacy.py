"""`appa-secure audit privacy`: canaries and attacks on one configuration, and the report about them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from appa_secure.audit import canaries, figures, membership, reconstruction
from appa_secure.audit.canaries import View
from appa_secure.audit.membership import Roc
from appa_secure.audit.reconstruction import Reconstruction
from appa_secure.config import Config
from appa_secure.journal import atomic_write, plain
from appa_secure.progress import Progress
from appa_secure.report import html

JSON, MARKDOWN, PAGE = "privacy_audit.json", "privacy_audit.md", "privacy_audit.html"
_GROUPS = 8  # whose context is reconstructed at most


@dataclass(frozen=True)
class Findings:
    """What the audit of one configuration found; attacks that the unit does not allow, or that were not asked for, are
    missing."""

    config: Config
    views: list[View]
    membership: dict[str, dict[str, Roc]]  # attack -> with or without privacy -> curve
    contexts: dict[str, Reconstruction]

    @property
    def exceeded(self) -> list[View]:
        """Views whose measured lower bound refutes the claim."""
        return [v for v in self.views if v.exceeded]


def investigate(
    config: Config, planted: int, confidence: float, attacks: bool, policy: bool, progress: Progress
) -> Findings:
    """Audit `config` with at least `planted` training canaries. policy: attack the run's language model too. Raises
    ConfigError where it claims no privacy."""
    views = canaries.measure(
        config, planted, confidence, lambda done, total: progress.step("canaries", done, total)
    )
    curves: dict[str, dict[str, Roc]] = {}
    contexts: dict[str, Reconstruction] = {}
    if attacks:
        for name, variant in (("private", config), ("without privacy", membership.without_privacy(config))):
            progress.note(f"membership, {name}")
            found = membership.attack(variant, progress)
            curves.setdefault("predictor", {})[name] = found.predictor()
            curves.setdefault("policy stand-in", {})[name] = found.answers()
            if policy:
                answers = membership.attack(variant, progress, language_model=True).answers()
                curves.setdefault("language model", {})[name] = answers
        if config.privacy.unit != "record":
            contexts = reconstruction.attack(
                config, _GROUPS, lambda done, total: progress.step("context", done, total)
            )
    return Findings(config, views, curves, contexts)


def write(found: Findings, folder: Path) -> Path:
    """Write JSON, Markdown, page and figures into `folder`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"bounds": figures.bounds(found.views)}
    for name, curves in found.membership.items():
        drawn[f"membership {name}"] = figures.rocs(f"Membership from the {name}", curves)
    if found.contexts:
        drawn["context"] = figures.contexts(found.contexts)
    for name, (_, png) in drawn.items():
        atomic_write(folder / f"{name.replace(' ', '_')}.png", png)
    atomic_write(folder / JSON, json.dumps(plain(as_data(found)), indent=1) + "\n")
    text = markdown(found)
    atomic_write(folder / MARKDOWN, text)
    images = [
        (name, html.figure(svg, f"Figure: {name}. The numbers are in the text."))
        for name, (svg, _) in drawn.items()
    ]
    atomic_write(folder / PAGE, html.audit_page(text, images))
    return folder / PAGE


def as_data(found: Findings) -> dict[str, Any]:
    """Everything measured, for machines."""
    p = found.config.privacy
    return {
        "experiment": found.config.experiment,
        "seed": found.config.seed,
        "unit": p.unit,
        "epsilon": p.epsilon,
        "delta": p.delta,
        "exceeded": [v.name for v in found.exceeded],
        "canaries": [
            {
                "release": v.name, "adversary": v.adversary, "claimed": v.claimed, "exceeded": v.exceeded,
                "gaussian": None if v.gaussian is None else v.gaussian[0],
                "gaussian_ceiling": None if v.gaussian is None else v.gaussian[1],
                **asdict(v.bound), "confidence": v.confidence,
            }
            for v in found.views
        ],
        "membership": {
            attack: {
                name: {"auc": r.auc, "interval": [r.low, r.high], "members": r.members, "others": r.others}
                for name, r in curves.items()
            }
            for attack, curves in found.membership.items()
        },
        "context": {
            name: {
                "hits": r.hits, "trials": len(r.more), "interval": list(r.interval), "at_chance": r.at_chance,
                "limit": r.limit, "exact": r.exact, "exact_by_noise": r.exact_by_noise, "counts": len(r.errors),
            }
            for name, r in found.contexts.items()
        },
    }  # fmt: skip


def markdown(found: Findings) -> str:
    """The report in words."""
    c = found.config
    lines = [
        "# Privacy audit",
        "",
        f"Configuration: {c.experiment}, seed {c.seed}; privacy unit {c.privacy.unit}, ε ≤ {c.privacy.epsilon:g} at "
        f"δ = {c.privacy.delta:g} claimed per client for everything together.",
        "",
        _verdict(found),
        "",
        "## Canaries: measured lower bounds beside the claim",
        "",
        "| release | adversary | claimed ε ≤ | measured ε ≥, any mechanism | measured ε ≥, Gaussian | right guesses | "
        "canaries | most that could be proved |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {v.name} | {v.adversary} | {v.claimed:.2f} | {v.bound.epsilon:.2f} | {_or_dash(v.gaussian, 0)} | "
            f"{v.bound.correct} of {v.bound.guesses} | {v.bound.canaries} | {v.bound.ceiling:.2f}, {_or_dash(v.gaussian, 1)} |"
            for v in found.views
        ),
        "",
        f"The measured bounds of a row hold together with {100 * found.views[0].confidence:g} % confidence. A lower bound "
        "below the claim proves nothing: it says what this adversary could show. A lower bound above it proves that the "
        "claim is wrong. A claim above both numbers of the last column could not have been refuted with so few canaries: "
        "plant more. The Gaussian column takes from the ledger that the noise is Gaussian and not subsampled, from the "
        "protocol that clients' noise is independent, and refutes how much of it there is.",
        "",
    ]
    if found.config.privacy.mechanism == "histogram":
        lines += [
            "Training rounds pay for nothing of their own here: they are post-processing of the histograms, and held to "
            "the histograms' claim.",
            "",
        ]
    if found.membership:
        lines += [
            "## Membership inference: was this answer in the training data?",
            "",
            *_curves(found.membership),
        ]
    if found.contexts:
        lines += ["## Context answers from rewards", "", *_contexts(found.contexts)]
    return "\n".join(lines)


def _or_dash(pair: tuple[float, float] | None, index: int) -> str:
    return "–" if pair is None else f"{pair[index]:.2f}"


def _verdict(found: Findings) -> str:
    if not found.exceeded:
        return "**No claim was refuted.**"
    names = ", ".join(f"{v.name} (ε ≥ {v.measured:.2f}, claimed {v.claimed:.2f})" for v in found.exceeded)
    return f"**REFUTED: {names}.** The build, or the accounting, is broken."


def _curves(found: Mapping[str, Mapping[str, Roc]]) -> list[str]:
    return [
        "| attack on | run | AUC (95 %) | members | others |",
        "|---|---|---|---|---|",
        *(
            f"| {attack} | {name} | {r.auc:.3f} ({r.low:.3f} to {r.high:.3f}) | {r.members} | {r.others} |"
            for attack, curves in found.items()
            for name, r in curves.items()
        ),
        "",
        "AUC 0.5 is guessing. One answer per question trains the predictor here, the case in which most is remembered. "
        "The stand-in is the optimum for the real rewards over a few answers per question; the language model is the one "
        "that the run trains.",
        "",
    ]


def _contexts(found: Mapping[str, Reconstruction]) -> list[str]:
    rows = []
    for name, r in found.items():
        low, high = r.interval
        rows.append(
            f"| {name} | {r.hits} of {len(r.more)} ({low:.3f} to {high:.3f}) | {r.limit:.3f} | {r.exact:.3f} | "
            f"{r.exact_by_noise:.3f} |"
        )
    return [
        "| context | one more person found (95 %) | most that the noise allows | counts exact | exact by the noise alone |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "The adversary sees one group's rewards alone, which secure aggregation rules out, and chooses the predictor. "
        "What it reconstructs is the context in use: with noise, the group's opinion up to the noise, and hardly anything "
        "about one person.",
        "",
    ]
