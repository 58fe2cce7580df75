"""What output noise costs: the noise on every mean reward, by number of clients and budget.

    .venv/bin/python -m tests.bench.output_noise [--markdown docs/results/output_noise.md]

Computed, not simulated: the layout, the calibration and the accountant are those of a run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from appa_secure.aggregation import AggregationSpec, segments
from appa_secure.privacy.accounting import GaussianEvent, epsilon
from appa_secure.privacy.output import ACCOUNTANT, OutputPlan, plan_output, std_of_mean
from appa_secure.secagg import Layout, Segment, fewest_honest, most_colluders, threshold_for
from appa_secure.secagg.policy import Release

STEPS, BATCH, DELTA = 160, 256, 1e-6  # opinionqa_dense: 64 prompts of 4 answers, 160 steps
BUDGETS = (8.0, 50.0)
BLIND = (8, 30, 100, 1_000, 10_000, 100_000)
COHORT = (100, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000)
RULES = {
    "appa": segments(AggregationSpec(), BATCH),
    "appa, `fi_scope=batch`": segments(AggregationSpec(fi_scope="batch"), BATCH),
    "average, `fi_scope=batch`": segments(AggregationSpec(kind="average", fi_scope="batch"), BATCH),
    "one member of a cohort": (("r", BATCH, 0.0, 1.0),),
}
USEFUL = 0.1


def std(
    rule: str, clients: int, budget: float, release: Release = "noise", colluders: int | None = None
) -> float:
    """Standard deviation of the noise on a mean reward when nobody drops out."""
    threshold = threshold_for(clients)
    c = most_colluders(clients, threshold) if colluders is None else colluders
    plan = plan_output(budget, DELTA, STEPS, fewest_honest(clients, threshold, release, c), c)
    return std_of_mean(_layout(rule, plan).preflight(clients), clients)


def enough(rule: str, budget: float) -> int:
    """The smallest number of clients, to about 5 %, with which the noise on a mean reward is at most `USEFUL`."""
    low, high = 101, 102
    while std(rule, high, budget) > USEFUL:
        low, high = high, high * 2
    while high > 1.05 * low:
        middle = round((low * high) ** 0.5)
        low, high = (low, middle) if std(rule, middle, budget) <= USEFUL else (middle, high)
    return high


def _layout(rule: str, plan: OutputPlan) -> Layout:
    return Layout(tuple(Segment(*part) for part in RULES[rule]), 64, plan.noise)


def lines() -> Iterator[str]:
    yield "# What output noise costs"
    yield ""
    yield "Written by `python -m tests.bench.output_noise --markdown docs/results/output_noise.md`: computed from the code that"
    yield f"runs use, for the sizes of `opinionqa_dense`: {STEPS} steps of {BATCH} rollouts, δ = {DELTA:g}. Every number is the"
    yield "standard deviation of the noise on one mean reward, a number between 0 and 1, when nobody drops out. Release policy"
    yield f"`noise`, threshold 2/3, as many colluders as it stands. Useful means {USEFUL:g} here, a tenth of the range of a"
    yield "reward: a choice, not a measurement."
    yield ""
    for budget in BUDGETS:
        plan = plan_output(budget, DELTA, STEPS, 1, 0)
        yield f"## ε = {budget:g}: noise multiplier {plan.multiplier:.3g} per step"
        yield ""
        counts = sorted({*BLIND, *COHORT})
        yield "| clients in a sum | " + " | ".join(RULES) + " |"
        yield "|---|" + "---|" * len(RULES)
        for n in counts:
            cells = [f"{std(rule, n, budget):.3g}" for rule in RULES]
            yield f"| {n:,} | " + " | ".join(cells) + " |"
        yield "| **useful from about** | " + " | ".join(f"{enough(rule, budget):,}" for rule in RULES) + " |"
        yield ""
    yield "## Eight groups"
    yield ""
    yield "| ε | `noise`, 3 colluders | `noise`, none | `abort`, 3 colluders | `abort`, none |"
    yield "|---|---|---|---|---|"
    for budget in (*BUDGETS, 1000.0):
        cells = [
            f"{std('average, `fi_scope=batch`', 8, budget, release, c):.3g}"
            for release, c in (("noise", 3), ("noise", 0), ("abort", 3), ("abort", 0))
        ]
        yield f"| {budget:g} | " + " | ".join(cells) + " |"
    yield ""
    yield "Even the cheapest rule, with everybody trusted, has noise many times the range of a reward. **With eight groups"
    yield "output noise leaves nothing to learn from, at any budget that means something**; `abort` without noise is what"
    yield "protects few institutions from differencing. Noise is for cohorts of thousands of members, or for few releases."
    yield ""
    cost = epsilon([GaussianEvent(20.0, 1.0, 10_000)], DELTA, ACCOUNTANT)
    yield f"For comparison: noise multiplier 20 over 10,000 steps costs ε = {cost:.1f} at δ = {DELTA:g} with this accountant."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--markdown", type=Path, help="write the tables there instead of printing them")
    arguments = parser.parse_args()
    text = "\n".join(lines()) + "\n"
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
