"""What secure aggregation costs of a PPO step: blind against clear, in one run of one policy.

Sizes of `opinionqa_dense`: 8 groups, 64 prompts x 4 generations, its policy and PPO settings; synthetic answers, because
the cost does not depend on them. Every step's rollouts go to two federations with the same data and predictor, one with
masks and one without, one right after the other and in turns first, so that load of the machine hits both. Remembering
which answers were scored (decision 16) serves secure sums only and is switched off for the clear one.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from appa_secure.agreement import REWARD
from appa_secure.config import Config, compose
from appa_secure.language import lora_config
from appa_secure.launch import LocalFederation, prepare
from appa_secure.membership import Scored
from appa_secure.progress import Progress
from appa_secure.records import Journal, RunDir
from appa_secure.tasks import prompt
from coordinator.pipeline import Pipeline, _load
from coordinator.ppo import PPOTrainer, make_config
from coordinator.reward import FederatedReward
from coordinator.rounds import Rounds

pytestmark = pytest.mark.bench

STEPS = int(os.environ.get("APPA_BENCH_STEPS", "24"))
LIMIT = 0.03  # of a step's wall time


def begin(root: Path, mode: str) -> tuple[Config, Pipeline]:
    """A run up to its first alignment step."""
    config = compose(
        [
            "experiment=opinionqa_dense", "data=synthetic", "data.questions=336", "data.ordinal_only=true",
            "data.path=null", "predictor.rounds=1", "predictor.local_steps=1", f"ppo.steps={STEPS}", f"secagg={mode}",
            # Equal names give equal contexts and predictors.
            "ppo.checkpoint_every=1000", "policy.warmup_steps=100", "name=run",
            "evaluation.truth=false", "evaluation.every=0",
            f"output_root={root}/{mode}", f"federation.client_root={root}/{mode}/clients", "privacy.epsilon=50",
        ]
    )  # fmt: skip
    run = RunDir.create(root / mode / "run")
    parts = prepare(config, run.root)
    federation = LocalFederation({c: parts.client(c).handle for c in parts.agreement.clients})
    pipeline = Pipeline(
        config, parts.agreement, parts.heldout, federation, run, Progress(), parts.nominal, parts.embeddings
    )
    for stage in ("setup", "context", "predictor", *(("warmup",) if mode == "blind" else ())):
        pipeline._stage(stage, getattr(pipeline, f"_{stage}"))
    return config, pipeline


def both_clocks() -> np.ndarray:
    """Wall and processor seconds of this process, all threads: the second does not feel other processes."""
    return np.array([time.perf_counter(), time.process_time()])


def set_up(rounds: Rounds, layout: Any) -> np.ndarray:
    """What a new epoch takes."""
    rounds.close()
    began = both_clocks()
    rounds._ready(REWARD, layout)
    return both_clocks() - began


@pytest.mark.timeout(1800)
def test_share_of_a_ppo_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, blind = begin(tmp_path, "blind")
    _, clear = begin(tmp_path, "clear")
    agreement, penalty = blind.agreement, config.task.format_penalty
    assert len(agreement.clients) == 8
    rewards = {
        mode: FederatedReward(p.agreement, p.rounds, Journal(p.run_dir.path("rewards.jsonl")), penalty)
        for mode, p in (("blind", blind), ("clear", clear))
    }
    masked = [True]
    barred, add = Scored.barred, Scored.add
    monkeypatch.setattr(Scored, "barred", lambda *args: barred(*args) if masked[0] else [])
    monkeypatch.setattr(Scored, "add", lambda *args: add(*args) if masked[0] else None)
    layout = agreement.reward_layout(1)
    assert set_up(blind.rounds, layout).all()  # warm
    calls: dict[str, list[np.ndarray]] = {"blind": [], "clear": []}
    ends: list[np.ndarray] = []

    def reward(prompts: Any, completions: Any, qid: Any, trainer_state: Any, **_: Any) -> list[float | None]:
        found = {}
        step = int(trainer_state.ppo_step)
        for mode in ("blind", "clear") if step % 2 else ("clear", "blind"):
            masked[0] = mode == "blind"
            began = both_clocks()
            found[mode] = rewards[mode](prompts, completions, qid, trainer_state)
            calls[mode].append(both_clocks() - began)
        assert rewards["blind"].rows[step]["opened"], "nothing was measured"
        assert found["blind"] == found["clear"]
        return found["blind"]

    model, tokenizer = _load(blind.run_dir.path("policy") / "warm")
    trainer = PPOTrainer(
        model=model,
        reward_funcs=[reward],
        args=make_config(config.ppo, tmp_path / "checkpoints", config.seed, blind._new_tokens()),
        train_dataset=Dataset.from_list(
            [
                {"prompt": prompt(agreement.questions[q], agreement.task, config.task.style), "qid": q}
                for q in blind.train
            ]
        ),
        processing_class=tokenizer,
        peft_config=lora_config(None),  # the tiny policy has no adapter
        on_step=lambda _: ends.append(both_clocks()),
    )
    trainer.train()

    epochs = np.array([set_up(blind.rounds, layout) for _ in range(5)]) / agreement.rounds_per_epoch
    # From the second step on: the end of one is the begin of the next, for both clocks.
    whole = np.diff(np.array(ends), axis=0)
    with_masks, without = (np.array(calls[mode])[1:] for mode in ("blind", "clear"))
    step, extra, epoch = whole - without, with_masks - without, np.median(epochs, axis=0)
    cost = np.median(extra, axis=0) + epoch
    shares = (extra + epoch) / step
    sizes = [len(row["rewards"]) - row["malformed"] for row in rewards["blind"].rows.values()]
    print(f"\nmedian of {np.median(sizes):.0f} scored rollouts, 8 groups", end="")
    print(
        f"\n{len(step)} PPO steps of {agreement.rounds_per_epoch} rounds per epoch, milliseconds: median (quartiles)"
    )
    for clock, name in enumerate(("wall", "processor")):

        def spread(values: np.ndarray, clock: int = clock) -> str:
            low, middle, high = np.percentile(1e3 * values[:, clock], [25, 50, 75])
            return f"{middle:.1f} ({low:.1f}..{high:.1f})"

        low, high = np.percentile(100 * shares[:, clock], [25, 75])
        print(
            f"{name:<10} step {spread(step)}, reward call blind {spread(with_masks)}, clear {spread(without)}, "
            f"difference {spread(extra)}, set-up of an epoch per round {1e3 * epoch[clock]:.2f}\n"
            f"{'':<10} secure aggregation {1e3 * cost[clock]:.1f} ms = {100 * cost[clock] / np.median(step[:, clock]):.2f} % "
            f"of a step (quartiles of the steps' own shares {low:.2f}..{high:.2f} %)"
        )
    assert cost[0] <= LIMIT * np.median(step[:, 0])
