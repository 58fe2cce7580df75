"""Run directories as a run would leave them, with invented figures, for the tests of the report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from appa_secure.records import RunDir

GROUPS = ("Democrat", "Republican", "Independent", "White", "Black", "Hispanic", "Male", "Female")

CONFIG = """\
experiment: {experiment}
seed: {seed}
name: null
task:
  reward: wasserstein
data:
  kind: synthetic
privacy:
  enabled: {dp}
  unit: response
  epsilon: 8.0
  delta: 1.0e-06
secagg:
  mode: {mode}
aggregation:
  kind: {kind}
{appa}ppo:
  steps: {steps}
evaluation:
  truth: {truth}
"""
STATEMENT = """\
# Privacy statement

Everything this run releases is **(8.00, 1e-06)-differentially private** for one `response`.

- Each client's context was made private once.
- The predictor was trained with DP-SGD.

| client | epsilon |
|---|---|
| Democrat | 7.98 |
"""


def _split(scores: dict[str, float], half: float) -> dict[str, Any]:
    values = np.array(list(scores.values()))
    return {
        "per_group": scores,
        "avg": values.mean(),
        "min": values.min(),
        "fairness_index": values.sum() ** 2 / (len(values) * (values**2).sum()),
        "ci95": {
            "avg": [values.mean() - half, values.mean() + half],
            "min": [values.min() - 1.4 * half, values.min() + 1.4 * half],
        },
    }


def write_run(
    root: Path,
    *,
    seed: int = 1,
    groups: tuple[str, ...] = GROUPS,
    steps: int = 60,
    kind: str = "appa",
    mode: str = "blind",
    dp: bool = True,
    truth: bool = True,
    finished: bool = True,
    experiment: str = "demo",
) -> Path:
    """A run directory in `root`; `finished=False` stops after half of the steps, without a summary."""
    rng = np.random.default_rng(seed)
    lift = {"appa": 0.115, "average": 0.12, "min": 0.10}[kind]
    spread = np.linspace(-0.02, 0.02, len(groups)) + rng.normal(0, 0.006, len(groups))
    start = dict(zip(groups, 0.785 + spread, strict=True))
    end = {name: value + lift + rng.normal(0, 0.008) for name, value in start.items()}
    appa = "  variant: weighted\n  tau: 0.99\n  temperature: 0.1\n" if kind == "appa" else ""
    dp_word, truth_word = str(dp).lower(), str(truth).lower()
    with RunDir.create(root) as run:
        run.write_config(
            CONFIG.format(
                experiment=experiment,
                seed=seed,
                dp=dp_word,
                mode=mode,
                kind=kind,
                appa=appa,
                steps=steps,
                truth=truth_word,
            )
        )
        run.write_environment()
        run.transcript.run("run-1", "c" * 64)
        run.transcript.epoch(0, "a" * 64, dict.fromkeys(groups, "f" * 16))
        for number in range(1, 6):
            run.metrics.append({"stage": "predictor", "round": number, "loss": None, "seconds": 1.5})
        for name in groups if dp else ():
            run.ledger.append({"client": name, "mechanism": "context", "epsilon": 1.2})
            run.ledger.append({"client": name, "mechanism": "dp-sgd", "epsilon": 6.7})
        run.mark_done("predictor")
        for step in range(1, (steps if finished else steps // 2) + 1):
            share = 1 - np.exp(-3 * step / steps)
            now = {n: start[n] + share * (end[n] - start[n]) + rng.normal(0, 0.01) for n in groups}
            values = np.array(list(now.values()))
            fi = values.sum() ** 2 / (len(values) * (values**2).sum()) - 0.012 * (1 - share)
            _write_step(run, step, now, values, fi, truth)
            run.transcript.round(0, step, "reward", "d" * 64, "a" * 64, {"upload": "0" * 64}, groups, [])
        run.path("privacy_statement.md").write_text(STATEMENT, encoding="utf-8")
        if not finished:
            run.transcript.abort("4 of 8 clients answered, 6 are needed")
            return root
        run.mark_done("align")
        lower = {name: value - 0.004 for name, value in start.items()}
        unseen = {name: value - 0.06 for name, value in end.items()}
        alignment = {
            "train": {"before": _split(start, 0.008), "after": _split(end, 0.006)},
            "heldout": {"before": _split(lower, 0.016), "after": _split(unseen, 0.018)},
        }
        run.write_summary(
            {
                "experiment": experiment,
                "seed": seed,
                "stamp": "not private" if truth or not dp or mode == "clear" else "private",
                "groups": groups,
                "questions": {"context": 20, "train": 288, "heldout": 72},
                "alignment": alignment if truth else None,
                "ceiling": {"avg": 0.9495, "min": 0.8977} if truth else None,
                "aggregation": {"kind": kind},
                "privacy": {
                    "unit": "response",
                    "delta": 1e-6,
                    "accountant": "prv",
                    "epsilon": {name: 7.9 + 0.01 * k for k, name in enumerate(groups)} if dp else None,
                },
                "secagg": {
                    "mode": mode,
                    "rounds": steps + 5,
                    "dropouts": 0,
                    "bytes_per_client_and_round": {"reward": 3264, "predictor": 1_250_000},
                },
                "seconds": {
                    "setup": 1.2,
                    "predictor": 41.0,
                    "warmup": 33.5,
                    "align": 188.0,
                    "after": None,
                },
                "packages": {"torch": "2.13.0"},
                "transcript_head": run.transcript.head,
            }
        )
    return root


def _write_step(
    run: RunDir, step: int, now: dict[str, float], values: NDArray[np.float64], fi: float, truth: bool
) -> None:
    raw = np.exp((1 - values) / 0.1)
    run.metrics.append(
        {
            "step": step,
            "reward": values.mean(),
            "fi": fi,
            "branch": "mean" if fi >= 0.99 else "lse",
            "z": np.exp(-values / 0.1).sum(),
            "h_mean": values.mean(),
            "soft_min": -0.1 * np.log(np.exp(-values / 0.1).mean()),
            "alpha_sum": 1.0,
            "kl": 0.01 * step,
            "entropy": 1.0,
            "malformed": 0,
            "epsilon": 7.9,
            "seconds": 2.0,
        }
    )
    if truth:
        run.measurement.append(
            {
                "stamp": "not private",
                "step": step,
                "per_group": now,
                "avg": values.mean(),
                "min": values.min(),
                "fi": fi,
                "weights": dict(zip(now, raw / raw.sum(), strict=True)),
            }
        )


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """`write_run`, for tests."""
    return write_run
