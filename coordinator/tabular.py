"""Training a table of answers (`appa_secure.tabular`) on the federated reward, in place of PPO on a language model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from appa_secure.agreement import Agreement
from appa_secure.config import Config
from appa_secure.tabular import TabularPolicy, schedule
from coordinator.reward import FederatedReward

FILE = "table.safetensors"
_TRAIN, _MEASURE = 0x7AB1, 0x7AB2  # streams of random numbers


def new_policy(agreement: Agreement) -> TabularPolicy:
    """Every answer undecided."""
    return TabularPolicy(agreement.questions, agreement.task, agreement.max_weight)


def save(policy: TabularPolicy, folder: Path, step: int) -> None:
    """Write the table and the number of steps it has learnt from, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{FILE}.part"
    save_file({"values": policy.values, "step": np.array(step)}, part)
    part.replace(folder / FILE)


def load(agreement: Agreement, folder: Path) -> tuple[TabularPolicy, int]:
    """The table in a folder and its step; the untrained one where the folder has none."""
    policy = new_policy(agreement)
    if not (folder / FILE).exists():
        return policy, 0
    stored = load_file(folder / FILE)
    policy.values = stored["values"]
    return policy, int(stored["step"])


def measured(
    policy: TabularPolicy, qids: Sequence[str], samples: int, seed: int, spread: float
) -> list[list[str]]:
    """`samples` answers to each question, as `coordinator.evaluate` wants them."""
    texts, _ = policy.draw(qids, samples, spread, np.random.default_rng([seed, _MEASURE]))
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def final_spread(config: Config) -> float:
    """Noise that is left in the answers at the end of a run."""
    return config.policy.spread * schedule(config.ppo.steps, config.ppo.steps)


def train(
    config: Config,
    agreement: Agreement,
    reward: FederatedReward,
    checkpoints: Path,
    on_step: Callable[[dict[str, Any]], None],
) -> TabularPolicy:
    """All remaining steps of a run. `on_step` gets each step's metrics, as of `coordinator.ppo.PPOTrainer`.

    A step asks `ppo.prompts_per_step` different training questions, at most all of them.
    """
    c, train_qids = config.ppo, list(agreement.plan.train)
    policy, done = load(agreement, checkpoints)
    per_step = min(c.prompts_per_step, len(train_qids))
    for step in range(done + 1, c.steps + 1):
        began = time.perf_counter()
        factor = schedule(step, c.steps)
        rng = np.random.default_rng([config.seed, _TRAIN, step])
        qids = [train_qids[i] for i in np.sort(rng.choice(len(train_qids), per_step, replace=False))]
        texts, _ = policy.draw(qids, c.generations, config.policy.spread * factor, rng)
        asked = time.perf_counter()
        scores = reward.step(step, [q for q in qids for _ in range(c.generations)], texts)
        answered = time.perf_counter()
        policy.update(scores, config.policy.step_size * factor)
        known = [s for s in scores if s is not None]
        metrics = {
            "step": step, "reward": float(np.mean(known)) if known else None, "kl": None, "entropy": None,
            "seconds": time.perf_counter() - began, "seconds_reward": answered - asked,
        }  # fmt: skip
        on_step(metrics)
        if step % c.checkpoint_every == 0 or step == c.steps:
            save(policy, checkpoints, step)
    return policy
