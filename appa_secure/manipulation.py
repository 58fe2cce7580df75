"""What a group gains by lying, under every aggregation rule, and what the others lose: `appa-secure manipulation`.

Nobody can check a masked number (threat_model/limitations.md). Here single groups send something else than their
rewards and histories, in the secure-sum form of each rule (`contribution` and `combine`, in float64 and without masks,
which change nothing), against the policy without a language model (`appa_secure.tabular`) and true rewards. Every figure
is a simulation on survey data that this process holds; what it writes is stamped `not private`.

The lies, each for every group in turn:

  - `history`: the group claims that it has always scored 0, to get the largest weight. Its rewards are true.
  - `rewards`: of the answers asked for a question it reports its true reward for the one it likes best, and for the
    others four times as large a distance from that as is true (at least 0).
  - `two`: the group and the one most like it do both, and want the answer that is best for the two.

Rules with weights are measured as they are and with a cap on the weights' contrast (PRIVACY: histories clipped to a band
of public constants, `aggregation.band`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from appa_secure import data as surveys
from appa_secure.aggregation import AggregationSpec, combine, contribution
from appa_secure.ceilings import ceiling, group_distributions
from appa_secure.config import Config
from appa_secure.journal import atomic_write
from appa_secure.report.tables import markdown
from appa_secure.rewards import Scorer, task_of
from appa_secure.tabular import Floats, TabularPolicy, schedule

LIES = ("history", "rewards", "two")
_HEADS = (
    "rule",
    "lie",
    "liar gains",
    "95 %",
    "largest",
    "others lose",
    "Avg AS",
    "Min AS",
    "honest Avg",
    "honest Min",
)
_BOOTSTRAP = 2000
_EXAGGERATION = 4.0


class Population:
    """The true preferences of all groups, in one place: a simulation."""

    def __init__(self, config: Config) -> None:
        survey = surveys.load(config.data, config.seed)
        rng = np.random.default_rng([config.seed, 0x3A9])
        kept = np.sort(rng.permutation(len(survey.questions))[: config.ppo.prompts_per_step])
        self.questions = {survey.questions[i].qid: survey.questions[i] for i in kept}
        self.names = tuple(group.name for group in survey.groups)
        self.reward, self.task = config.task.reward, task_of(config.task.reward)
        self.truth = group_distributions(survey, list(self.questions))
        ordinals = {q: question.ordinals for q, question in self.questions.items()}
        self.scorers = [
            Scorer(
                self.reward, {q: p[g] for q, p in self.truth.items() if not np.isnan(p[g]).any()}, ordinals
            )
            for g in range(len(self.names))
        ]

    def rewards(self, qids: Sequence[str], answers: Sequence[Floats]) -> Floats:
        """(G, B); NaN where a group was not asked the question."""
        out = np.full((len(self.scorers), len(qids)), np.nan)
        for row, scorer in zip(out, self.scorers, strict=True):
            known = [i for i, qid in enumerate(qids) if scorer.knows(qid)]
            row[known] = scorer.score([qids[i] for i in known], [answers[i] for i in known])
        return out

    def nearest(self, group: int) -> int:
        """The other group whose distributions are closest on average."""
        gaps = np.nanmean([np.abs(p - p[group]).sum(axis=1) for p in self.truth.values()], axis=0)
        gaps[group] = np.inf
        return int(np.argmin(gaps))


@dataclass(frozen=True)
class Lie:
    """Who lies, and about what."""

    groups: tuple[int, ...] = ()
    history: bool = False
    rewards: bool = False


def play(
    population: Population, spec: AggregationSpec, config: Config, seed: int, lie: Lie | None = None
) -> tuple[Floats, Floats]:
    """Train the table under a rule for `ppo.steps` steps.

    Returns:
        True AS of each group for the final answers, (G,); and (steps, 2): true Avg and Min of each step's rollouts.
    """
    lie = lie or Lie()
    qids, groups, samples = list(population.questions), len(population.names), config.ppo.generations
    asked = [q for q in qids for _ in range(samples)]
    policy = TabularPolicy(population.questions, population.task, config.task.max_weight)
    histories: list[float | None] = [None] * groups
    z: float | None = None
    trace = []
    for step in range(1, config.ppo.steps + 1):
        factor = schedule(step, config.ppo.steps)
        _, answers = policy.draw(
            qids, samples, config.policy.spread * factor, np.random.default_rng([seed, step])
        )
        true = population.rewards(asked, answers)  # (G, B)
        means = np.nanmean(true, axis=1)
        sent = np.where(np.isnan(true), means[:, None], true)
        if lie.rewards:
            wanted = sent[list(lie.groups)].mean(axis=0).reshape(len(qids), samples)
            top = wanted.max(axis=1, keepdims=True)
            sent[list(lie.groups)] = np.maximum(top - _EXAGGERATION * (top - wanted), 0.0).ravel()
        total: Floats | None = None
        for g in range(groups):
            before = 0.0 if lie.history and g in lie.groups else histories[g]
            vector, histories[g] = contribution(spec, sent[g], before, z, groups, step)
            total = vector if total is None else total + vector
        assert total is not None
        result = combine(spec, total, len(asked), groups)
        z = result.z_next if result.z_next is not None else 1.0
        policy.update(result.rewards.tolist(), config.policy.step_size * factor)
        trace.append((means.mean(), means.min()))
    _, final = policy.draw(qids, samples, config.policy.spread * factor, np.random.default_rng([seed, 0]))
    return np.nanmean(population.rewards(asked, final), axis=1), np.array(trace)


def rules(config: Config, population: Population) -> dict[str, AggregationSpec]:
    """Every built-in rule, those with weights also capped. `aggregation.*` of the configuration gives maximin's options."""
    found = ceiling(population.reward, list(population.questions.values()), population.truth)
    own = replace(config.aggregation.spec, kind="maximin")
    level, best = found["avg"]["avg"], found["min"]["min"]
    appa = AggregationSpec(tau=1.0)
    return {
        "average": AggregationSpec(kind="average"),
        "lse, a = -4": AggregationSpec(kind="lse", a=-4.0),
        "min": AggregationSpec(kind="min"),
        "max": AggregationSpec(kind="max"),
        "appa": appa,
        "appa, capped": replace(appa, band=(max(level - 0.05, 0.0), min(level + 0.05, 1.0))),
        "maximin": own,
        # Who claims to be worse off than the best attainable worst score counts at most e² times as much as that.
        "maximin, capped": replace(own, band=(best - 2 * own.temperature, max(own.band[1], best))),
    }


def study(config: Config, directory: Path, say: Callable[[str], None]) -> Path:
    """Play every rule with every liar, and write manipulation.json, .md and .png into the directory, which is returned."""
    population = Population(config)
    groups = len(population.names)
    directory.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name, spec in rules(config, population).items():
        honest, _ = play(population, spec, config, config.seed)
        for kind in LIES:
            gains, losses, averages, minima = [], [], [], []
            for g in range(groups):
                liars = (g, population.nearest(g)) if kind == "two" else (g,)
                lie = Lie(liars, history=kind != "rewards", rewards=kind != "history")
                reached, _ = play(population, spec, config, config.seed, lie)
                change = reached - honest
                others = [i for i in range(groups) if i not in liars]
                gains.append(float(change[list(liars)].mean()))
                losses.append(float(-change[others].mean()))
                averages.append(float(reached.mean()))
                minima.append(float(reached.min()))
            rows.append(
                {
                    "rule": name, "lie": kind, "gains": gains, "losses": losses, "avg": float(np.mean(averages)),
                    "min": float(np.mean(minima)), "honest_avg": float(honest.mean()), "honest_min": float(honest.min()),
                }
            )  # fmt: skip
            say(
                f"{name}, {kind}: the liar gains {np.mean(gains):+.4f}, the others lose {np.mean(losses):+.4f}"
            )
    described = {
        "stamp": "not private", "experiment": config.experiment, "seed": config.seed, "groups": population.names,
        "questions": len(population.questions), "steps": config.ppo.steps, "rows": rows,
    }  # fmt: skip
    atomic_write(directory / "manipulation.json", json.dumps(described, indent=1) + "\n")
    atomic_write(directory / "manipulation.md", table(rows, config.seed))
    _plot(rows, directory / "manipulation.png")
    return directory


def table(rows: Sequence[dict[str, Any]], seed: int) -> str:
    """Markdown: mean over liars, its 95 % bootstrap interval over liars, the largest gain, and what became of all."""
    lines = []
    for row in rows:
        gains = np.array(row["gains"])
        rng = np.random.default_rng([seed, 0xB007])
        means = gains[rng.integers(len(gains), size=(_BOOTSTRAP, len(gains)))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        lines.append(
            [
                row["rule"], row["lie"], f"{gains.mean():+.4f}", f"{low:+.4f} to {high:+.4f}", f"{gains.max():+.4f}",
                f"{np.mean(row['losses']):+.4f}", f"{row['avg']:.4f}", f"{row['min']:.4f}", f"{row['honest_avg']:.4f}",
                f"{row['honest_min']:.4f}",
            ]
        )  # fmt: skip
    return markdown(_HEADS, lines)


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["rule"] for row in rows))
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    for place, (axes, title, key) in enumerate(
        zip(
            figure.subplots(1, 2, sharey=True),
            ("liar gains", "others lose"),
            ("gains", "losses"),
            strict=True,
        )
    ):
        for shift, (lie, colour) in enumerate(zip(LIES, ("#0072b2", "#d55e00", "#00865f"), strict=True)):
            chosen = {row["rule"]: row[key] for row in rows if row["lie"] == lie}
            height = [i + 0.26 * (shift - 1) for i in range(len(names))]
            axes.barh(height, [float(np.mean(chosen[n])) for n in names], 0.24, color=colour, label=lie)
        axes.set_yticks(range(len(names)), names)
        axes.axvline(0, color="#1a1a1a", linewidth=0.8)
        axes.set_xlabel(f"{title} (change of AS, mean over liars)")
        if place == 0:
            axes.invert_yaxis()
            axes.legend(title="lie", frameon=False)
    figure.savefig(path, dpi=150)
