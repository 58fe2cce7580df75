"""Proximal policy optimisation on top of TRL's GRPOTrainer.

TRL keeps generation, datasets, checkpoints, peft, accelerate and vLLM; this subclass turns the update into
PPO: a critic, GAE(lambda), the clipped ratio, the clipped value loss and the KL penalty inside the per-token
reward.

One PPO step = one batch of rollouts = one call of the reward function, followed by ``epochs`` passes over the
batch in minibatches; each minibatch is one optimiser step of the underlying trainer.
"""

import copy
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from trl import GRPOTrainer

from appa_secure.errors import ConfigError
from coordinator import checkpoints
from coordinator.checkpoints import latest_checkpoint
from coordinator.critic import CompletionScorer, Critic
from coordinator.gae import (
    gae,
    leave_one_out,
    masked_mean,
    masked_moments,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from coordinator.minibatches import PromptSampler, shuffled, trimmed
from coordinator.ppo_config import PPOConfig, make_config
from coordinator.ppo_metrics import rollout_metrics, rollout_sums
from coordinator.sampling import base_of, rollout

# TRL reads a property of the model by its former name, at every step.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

__all__ = ["PPOConfig", "PPOTrainer", "latest_checkpoint", "make_config"]


class _EndOfUpdate(TrainerCallback):
    """Housekeeping the underlying trainer cannot know about."""

    def __init__(self, trainer: "PPOTrainer") -> None:
        self.trainer = trainer

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        # The underlying trainer zeroes the gradients of the model only.
        self.trainer.critic.zero_grad(set_to_none=True)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer._report_if_complete()


class PPOTrainer(GRPOTrainer):
    """PPO for any causal LM, on one process or several under DDP.

    Args:
        model: a causal LM or its path or hub id; a peft model is refused, pass ``peft_config`` instead. Its
            weights at construction are the KL reference (with ``peft_config``: without the adapter).
        reward_funcs: TRL reward function(s), called once per PPO step and process; None or NaN for a
            completion means unscored: its tokens take part in no loss. ``trainer_state.ppo_step`` is the
            number of the step (from 1).
        args: see ``make_config``.
        train_dataset: columns ``prompt`` (text or messages) and whatever the reward function wants.
        processing_class: the tokenizer.
        on_step: called on the main process after each PPO step with its metrics: step, reward (mean score),
            kl (mean over completions of sum_t log pi/reference at sampling time; None without reference),
            entropy (per token), clip_fraction, policy_loss, value_loss, value_explained (1 - Var[R - V] /
            Var[R]), length, unscored (share), seconds, seconds_generate, seconds_reward, and every metric the
            reward function logs through ``log_metric``. Called before the checkpoint of that step is written.
    """

    _tag_names = ["appa-secure", "ppo"]  # noqa: RUF012 - declared so by TRL
    _name = "PPO"
    args: PPOConfig
    model: Any
    ref_model: Any
    state: Any
    train_dataset: Any
    processing_class: Any
    num_generations: int
    max_completion_length: int

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any,
        args: PPOConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        on_step: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        if isinstance(model, str):
            from transformers import AutoModelForCausalLM

            options: Any = args.model_init_kwargs or {}
            model = AutoModelForCausalLM.from_pretrained(model, **options)
        if hasattr(model, "peft_config"):
            raise ConfigError(
                "PPOTrainer got a peft model: pass the merged base model and peft_config instead"
            )
        # Copied before TRL patches the model: the patches are bound to the instance.
        reference = copy.deepcopy(model) if args.kl_coef > 0.0 and peft_config is None else None
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
        )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ConfigError("PPOTrainer runs in one process or under DDP; its critic is not sharded")
        base = base_of(self.model)
        self.critic = Critic(base.config.get_text_config().hidden_size, args.seed).to(self.accelerator.device)
        self._score = CompletionScorer(base, self.temperature, install_head=False)
        self._reference_score: CompletionScorer | None = None
        if reference is not None:
            self.ref_model = reference.requires_grad_(False).eval().to(self.accelerator.device)
            self._reference_score = CompletionScorer(self.ref_model, self.temperature, install_head=True)
        self._reference_id = None
        if args.kl_coef > 0.0:
            frozen = self.model if reference is None else reference
            weights = ((n, p) for n, p in frozen.named_parameters() if not p.requires_grad)
            self._reference_id = checkpoints.fingerprint(weights)
        # Minibatches of a rollout batch, and how many are read in one PPO step.
        self._parts = args.steps_per_generation or 1
        self._passes = self._parts * args.num_iterations
        self.on_step = on_step
        self._measured: dict[str, list[float]] = defaultdict(list)
        self._found: dict[str, float | None] = {}
        self._seconds: dict[str, float] = defaultdict(float)
        self._step_began = time.perf_counter()
        # log-probs (B, T) and hidden states (B, T, d) as the sampling loop saw them
        self._sampled: tuple[Tensor, Tensor] | None = None
        self._batch: dict[str, Tensor] = {}
        self._minibatches: list[dict[str, Tensor]] = []
        for noisy in (PrinterCallback, ProgressCallback):
            self.remove_callback(noisy)
        self.add_callback(_EndOfUpdate(self))

    # ---- one PPO step after the other ----------------------------------------------------------------------

    @property
    def ppo_step(self) -> int:
        """Number of the PPO step in progress, from 1."""
        return int(self.state.global_step // self.args.updates_per_step) + 1

    def _get_train_sampler(self, dataset: Dataset | None = None) -> PromptSampler:
        return PromptSampler(
            size=len(self.train_dataset if dataset is None else dataset),
            prompts=(self.args.generation_batch_size or 1) // self.num_generations,
            generations=self.num_generations,
            repeats=self._passes,
            steps=-(-self.args.max_steps // self.args.updates_per_step),
            seed=self.args.seed,
        )

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        loader.device = None  # Its rows are texts: looking for tensors among them at every update takes long.
        return loader

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Tensor]:
        """The minibatch of this update; new rollouts at each PPO step, reshuffled every epoch."""
        if self._step % self._passes == 0 or not self._batch:
            self._batch = self._generate_and_score_completions(generation_batch)
        if self._step % self._parts == 0 or not self._minibatches:
            group = self._group(self._batch["prompt_ids"].size(0) // self._parts)
            self._minibatches = shuffled(self._batch, self._parts, group)
        return self._minibatches[self._step % self._parts]

    def _group(self, rows: int) -> int:
        """Completions per prompt if ``rows`` consist of whole prompts, else 1."""
        return int(self.num_generations) if rows % self.num_generations == 0 else 1

    # ---- rollouts: sample, score, advantages ---------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        self.state.ppo_step = self.ppo_step
        self._sampled = None
        out = super()._generate_and_score_completions(inputs)
        ids = torch.cat([out["prompt_ids"], out["completion_ids"]], dim=1)  # (B, P + T)
        attention = torch.cat([out["prompt_mask"], out["completion_mask"]], dim=1)  # (B, P + T)
        length = out["completion_ids"].size(1)

        scores = self._local_scores(len(inputs))  # (B,)
        scored = ~torch.isnan(scores)
        mask = out["completion_mask"] * scored.unsqueeze(1)  # (B, T)
        with torch.no_grad():
            old_logps, hidden = self._sampled or self._read(self.model, self._score, ids, attention, length)
            old_values = self.critic(hidden)  # (B, T)
            ref_logps = self._reference_logps(ids, attention, length)  # (B, T)
        learned = leave_one_out(scores, self.num_generations) if self.args.prompt_baseline else scores
        scores, learned = scores.nan_to_num(0.0), learned.nan_to_num(0.0)
        rewards = token_rewards(learned, old_logps, ref_logps, mask, self.args.kl_coef)  # (B, T)
        advantages, returns = gae(rewards, old_values, mask, self.args.gamma, self.args.lam)  # (B, T)
        if self.args.whiten_advantages:
            moments = self.accelerator.reduce(masked_moments(advantages, mask), reduction="sum")
            advantages = whiten(advantages, mask, moments)
        if "importance_sampling_ratio" in out:  # vLLM's sampler is not exactly this policy
            advantages = advantages * out["importance_sampling_ratio"].nan_to_num(0.0)

        drift = None if ref_logps is None else old_logps - ref_logps  # (B, T)
        sums = rollout_sums(scores.where(scored, torch.nan), mask, drift, old_values, returns)
        sums = self.accelerator.reduce(sums, reduction="sum")
        self._found = rollout_metrics(sums.tolist(), drift is not None)
        self._sampled = None
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        return {
            **{name: out[name] for name in names},
            "mask": mask,
            "old_logps": old_logps,
            "old_values": old_values,
            "advantages": advantages,
            "returns": returns,
        }

    def _generate_single_turn(
        self,
        prompt_ids: Any,
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> Any:
        began = time.perf_counter()
        groups = [prompt_ids[i : i + num_generations] for i in range(0, len(prompt_ids), num_generations)]
        plain = not (
            self.use_vllm or self.use_transformers_continuous_batching or self.args.generation_kwargs
        )
        plain = plain and (self.top_p, self.top_k, self.min_p, self.repetition_penalty) == (1.0, 0, None, 1.0)
        if not plain or images is not None or any(ids != group[0] for group in groups for ids in group):
            result = super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        else:
            model = self.accelerator.unwrap_model(self.model)
            drawn = rollout(
                model,
                [group[0] for group in groups],
                num_generations,
                self.max_completion_length,
                self.temperature,
                self.eos_token_ids,
                self._tokenizer.pad_token_id,
                keep_hidden=True,
            )
            # Under autocast the update sees other numbers than the sampler; then they are computed afresh.
            if not (self.args.bf16 or self.args.fp16) and drawn.hidden is not None:
                self._sampled = (drawn.logps, drawn.hidden)
            rows = zip(drawn.tokens.cpu(), drawn.mask.cpu(), strict=True)
            result = [tokens[kept].tolist() for tokens, kept in rows], None
        self._seconds["generate"] += time.perf_counter() - began
        return result

    def _get_per_token_logps_and_entropies(
        self, *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, None, None]:
        """Without vLLM's correction, log-probs and values come from one pass, after TRL's own part."""
        if self.use_vllm:
            found: tuple[Tensor, None, None] = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            return found
        return None, None, None

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        began = time.perf_counter()
        per_function: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._seconds["reward"] += time.perf_counter() - began
        self._raw_rewards = per_function  # (B over all processes, number of functions), NaN where not scored
        for name, values in self._pending_metrics.items():
            self._measured[name].extend(values)
        return per_function

    def _local_scores(self, count: int) -> Tensor:
        """(B,) weighted sum of the rewards of this process's completions; NaN where no function gave one."""
        raw = self._raw_rewards
        scores: Tensor = (raw * self.reward_weights.to(raw.device)).nansum(dim=1)
        scores = scores.masked_fill(torch.isnan(raw).all(dim=1), torch.nan)
        self._anything_scored = not bool(torch.isnan(scores).all())
        start = self.accelerator.process_index * count
        return scores[start : start + count]

    def _reference_logps(self, ids: Tensor, attention: Tensor, length: int) -> Tensor | None:
        if self._reference_id is None:
            return None
        if self._reference_score is not None:
            return self._read(self.ref_model, self._reference_score, ids, attention, length)[0]
        with self.accelerator.unwrap_model(self.model).disable_adapter():
            return self._read(self.model, self._score, ids, attention, length)[0]

    def _read(
        self, model: nn.Module, score: CompletionScorer, ids: Tensor, attention: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """Log-probs (B, T) and hidden states (B, T, d), in chunks of the minibatch size."""
        rows = self.args.per_device_train_batch_size
        parts = []
        for i, a in zip(ids.split(rows), attention.split(rows), strict=True):
            with self.accelerator.autocast():
                parts.append(score(model, i, a, length, self._group(i.size(0))))
        return torch.cat([p[0] for p in parts]), torch.cat([p[2] for p in parts])

    # ---- the update ----------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        x = trimmed(inputs)
        ids = torch.cat([x["prompt_ids"], x["completion_ids"]], dim=1)  # (B, P + T)
        attention = torch.cat([x["prompt_mask"], x["completion_mask"]], dim=1)  # (B, P + T)
        mask = x["mask"]  # (B, T)
        group = self._group(ids.size(0))

        logps, entropies, hidden = self._score(model, ids, attention, mask.size(1), group)
        values = self.critic(hidden.detach() if self.args.critic_detach else hidden)  # (B, T)
        # PPO 2017 eq. 9: L = L_clip - c1 L_value + c2 entropy, as a loss
        policy, clipped = policy_loss(logps, x["old_logps"], x["advantages"], mask, self.epsilon_low)
        value, _ = value_loss(values, x["old_values"], x["returns"], mask, self.args.value_clip)
        # Without a weight the entropy is a metric alone, and its gradient costs as much as that of the log-probs.
        entropy = masked_mean(entropies if self.args.entropy_coef else entropies.detach(), mask)
        loss = policy + self.args.value_coef * value - self.args.entropy_coef * entropy

        measured = torch.stack([policy, value, entropy, clipped]).detach()
        measured = self.accelerator.reduce(measured, reduction="mean").tolist()
        names = ("policy_loss", "value_loss", "entropy", "clip_fraction")
        for name, number in zip(names, measured, strict=True):
            self._measured[name].append(number)
        return loss / self.current_gradient_accumulation_steps

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        parameters = list(self.critic.parameters())
        if not self._anything_scored:
            # Adam moves on zero gradients, by its momentum; without any score nothing may move.
            for parameter in (*model.parameters(), *parameters):
                parameter.grad = None
        elif self.accelerator.sync_gradients:
            for parameter in parameters:  # the critic stands outside DDP
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
            if self.args.max_grad_norm:
                nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        known = self.optimizer
        optimizer = super().create_optimizer(*args, **kwargs)
        if known is None:
            rate = self.args.learning_rate if self.args.critic_lr is None else self.args.critic_lr
            optimizer.add_param_group(
                {"params": list(self.critic.parameters()), "lr": rate, "weight_decay": 0.0}
            )
        return optimizer

    # ---- metrics -------------------------------------------------------------------------------------------

    def _report_if_complete(self) -> None:
        if self.state.global_step % self.args.updates_per_step:
            return
        now = time.perf_counter()
        metrics: dict[str, Any] = {"step": self.state.global_step // self.args.updates_per_step}
        metrics |= self._found
        metrics |= {name: sum(x) / len(x) for name, x in self._measured.items()}
        metrics |= {"seconds": now - self._step_began}
        metrics |= {f"seconds_{name}": spent for name, spent in self._seconds.items()}
        self._step_began = now
        self._measured.clear()
        self._seconds.clear()
        if self.args.logging_strategy == "no":
            self._metrics["train"].clear()  # TRL empties it when it logs
        if self.on_step is not None and self.accelerator.is_main_process:
            self.on_step(metrics)

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Train to the last step; True resumes from the newest complete checkpoint in output_dir, if any.

        An uninterrupted run and a resumed one end with the same bits on a CPU with the same number of
        threads.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = latest_checkpoint(str(self.args.output_dir))
        if resume_from_checkpoint:
            checkpoints.check(Path(resume_from_checkpoint), self._identity())
        else:
            set_seed(self.args.seed, device_specific=True)
        self._step, self._batch, self._minibatches = 0, {}, []
        self._step_began = time.perf_counter()
        return super().train(
            resume_from_checkpoint=str(resume_from_checkpoint) if resume_from_checkpoint else None, **kwargs
        )

    def save_policy(self, folder: str | Path) -> None:
        """The policy (or its adapter) and the tokenizer, loadable by AutoModelForCausalLM or PeftModel."""
        self.accelerator.unwrap_model(self.model).save_pretrained(str(folder))
        self.processing_class.save_pretrained(str(folder))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the run directory describes the run, and TRL's card would name another algorithm."""

    def _send_telemetry(self) -> None:
        """Nothing is reported to anybody, whatever the environment says."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        checkpoints.unmark(folder)
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            checkpoints.complete(folder, self.critic, self._identity())

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint relies on without containing it: its run must agree, or resuming is not exact."""
        return {
            "reference": self._reference_id,
            "seed": self.args.seed,
            "prompts": len(self.train_dataset),
            "updates_per_step": self.args.updates_per_step,
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        checkpoints.load_critic(Path(resume_from_checkpoint), self.critic)
