"""Settings of a PPO run."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import GRPOConfig

from appa_secure.errors import ConfigError

# Settings of GRPOConfig that would ask for another loss than the one computed here.
_FIXED = {
    "beta": 0.0,
    "delta": None,
    "top_entropy_quantile": 1.0,
    "use_adaptive_entropy": False,
    "loss_type": "bnpo",
}


@dataclass
class PPOConfig(GRPOConfig):
    """GRPOConfig with the knobs of PPO; ``epsilon`` is the clip range of the ratio, ``beta`` must stay 0.

    gamma, lam: discount and GAE lambda, in [0, 1].
    kl_coef: >= 0, weight of log(pi / reference) in the reward; 0 does without the reference.
    value_coef: weight of the value loss in the total loss.
    value_clip: clip range of the value, in units of reward; None turns it off.
    prompt_baseline: learn from scores less the leave-one-out mean of the prompt's other completions (RLOO).
    whiten_advantages: scale advantages to mean 0, variance 1 over the rollout batch.
    critic_lr: learning rate of the critic head; None takes ``learning_rate``.
    critic_detach: stop the critic's gradient before the trunk.
    """

    gamma: float = 1.0
    lam: float = 0.95
    kl_coef: float = 0.01
    value_coef: float = 0.5
    value_clip: float | None = 0.2
    prompt_baseline: bool = True
    whiten_advantages: bool = True
    critic_lr: float | None = None
    critic_detach: bool = False
    # TRL's defaults are for long texts on large accelerators.
    beta: float = 0.0
    loss_type: str = "bnpo"
    scale_rewards: str = "none"
    disable_dropout: bool = True
    activation_checkpointing: bool | None = False
    bf16: bool = False
    # Adam's first steps have full length whatever the gradient, and the last ones should average their noise.
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0.05
    remove_unused_columns: bool = False
    report_to: Any = field(default_factory=list)
    logging_strategy: str = "no"
    disable_tqdm: bool | None = True
    save_total_limit: int | None = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in _FIXED.items():
            if getattr(self, name) != value:
                raise ConfigError(f"PPOConfig.{name} must be {value!r}: PPO's loss does not use it")
        for name in ("gamma", "lam"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"PPOConfig.{name} must lie in [0, 1], got {getattr(self, name)}")
        passes = (self.steps_per_generation or 1) * self.num_iterations
        if passes % self.gradient_accumulation_steps:
            raise ConfigError(
                f"PPOConfig.gradient_accumulation_steps={self.gradient_accumulation_steps} must divide the "
                f"{passes} minibatches of a PPO step"
            )
        if self.save_strategy == "steps" and self.save_steps % self.updates_per_step:
            raise ConfigError(
                f"PPOConfig.save_steps={self.save_steps} must be a multiple of {self.updates_per_step}, the "
                "updates of one PPO step: rollouts are not part of a checkpoint"
            )
        if self.kl_coef < 0.0:
            raise ConfigError(f"PPOConfig.kl_coef must be >= 0, got {self.kl_coef}")

    @property
    def updates_per_step(self) -> int:
        """Optimiser steps of the underlying trainer in one PPO step."""
        return (self.steps_per_generation or 1) * self.num_iterations // self.gradient_accumulation_steps


def make_config(
    ppo: Any, output_dir: str | Path, seed: int, max_completion_length: int, **overrides: Any
) -> PPOConfig:
    """The PPOConfig of the ``ppo`` section of the configuration.

    Args:
        ppo: has steps, prompts_per_step, generations, epochs, minibatch_size, lr, clip, value_clip,
            value_coef, gamma, lam, kl_coef, temperature, entropy_coef, max_grad_norm, checkpoint_every (PPO
            steps, 0 = never) and device ("auto", "cpu" or "cuda").
        max_completion_length: new tokens per completion.
        overrides: any further field of PPOConfig.

    Raises:
        ConfigError: sizes that do not divide; names the fields.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rollouts = ppo.prompts_per_step * ppo.generations
    if rollouts % ppo.minibatch_size:
        raise ConfigError(
            f"ppo.minibatch_size={ppo.minibatch_size} must divide ppo.prompts_per_step * ppo.generations = "
            f"{rollouts}"
        )
    if ppo.minibatch_size % (world * ppo.generations):
        raise ConfigError(
            f"ppo.minibatch_size={ppo.minibatch_size} must be a multiple of ppo.generations={ppo.generations}"
            + (f" times the {world} processes" if world > 1 else "")
        )
    if ppo.generations < 2:
        raise ConfigError(
            f"ppo.generations={ppo.generations} must be at least 2: TRL compares completions of a prompt"
        )
    if ppo.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("ppo.device=cuda, but torch sees no GPU; use ppo.device=auto or cpu")
    minibatches = rollouts // ppo.minibatch_size
    cycle = ppo.epochs * minibatches
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "seed": seed,
        "use_cpu": ppo.device == "cpu" or not torch.cuda.is_available(),
        "max_steps": ppo.steps * cycle,
        "per_device_train_batch_size": ppo.minibatch_size // world,
        "steps_per_generation": minibatches,
        "num_iterations": ppo.epochs,
        "num_generations": ppo.generations,
        "max_completion_length": max_completion_length,
        "temperature": ppo.temperature,
        "learning_rate": ppo.lr,
        "epsilon": ppo.clip,
        "value_clip": ppo.value_clip,
        "value_coef": ppo.value_coef,
        "gamma": ppo.gamma,
        "lam": ppo.lam,
        "kl_coef": ppo.kl_coef,
        "entropy_coef": ppo.entropy_coef,
        "max_grad_norm": ppo.max_grad_norm,
        "save_strategy": "steps" if ppo.checkpoint_every else "no",
        "save_steps": max(1, ppo.checkpoint_every) * cycle,
    }
    return PPOConfig(**{**settings, **overrides})
