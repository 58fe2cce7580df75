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


class TabularTrainer:
    """Training in the place and form of `coordinator.ppo.PPOTrainer`. `on_step` gets each step's metrics."""

    def __init__(
        self,
        config: Config,
        agreement: Agreement,
        reward: FederatedReward,
        checkpoints: Path,
        on_step: Callable[[dict[str, Any]], None],
    ) -> None:
        self.config, self.reward, self.checkpoints, self.on_step = config, reward, checkpoints, on_step
        self._questions = list(agreement.plan.train)
        self.policy, self.done = load(agreement, checkpoints)

    def train(self, resume_from_checkpoint: Path | None = None) -> None:
        """All remaining steps of the run; there is one checkpoint, which is resumed from where there is one.

        A step asks `ppo.prompts_per_step` different training questions, at most all of them.
        """
        c, policy = self.config.ppo, self.config.policy
        per_step = min(c.prompts_per_step, len(self._questions))
        for step in range(self.done + 1, c.steps + 1):
            began = time.perf_counter()
            factor = schedule(step, c.steps)
            rng = np.random.default_rng([self.config.seed, _TRAIN, step])
            chosen = np.sort(rng.choice(len(self._questions), per_step, replace=False))
            qids = [self._questions[i] for i in chosen]
            texts, _ = self.policy.draw(qids, c.generations, policy.spread * factor, rng)
            asked = time.perf_counter()
            scores = self.reward.step(step, [q for q in qids for _ in range(c.generations)], texts)
            answered = time.perf_counter()
            self.policy.update(scores, policy.step_size * factor)
            self.done = step
            known = [s for s in scores if s is not None]
            metrics = {
                "step": step, "reward": float(np.mean(known)) if known else None, "kl": None, "entropy": None,
                "seconds": time.perf_counter() - began, "seconds_reward": answered - asked,
            }  # fmt: skip
            self.on_step(metrics)
            if step % c.checkpoint_every == 0 or step == c.steps:
                save(self.policy, self.checkpoints, step)

    def save_policy(self, folder: Path) -> None:
        """The table as it is, with the number of steps it has learnt from."""
        save(self.policy, folder, self.done)
