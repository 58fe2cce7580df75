"""One run from the coordinator's side, stage by stage; each stage's result is on disk before the next begins.

    setup -> context -> predictor -> warmup -> before -> align -> after

A run with `until: predictor` ends after the third, with a summary of what it has.

A run that was killed goes on at the stage it was in and ends with the same policy, metrics and ledger as one that was
not: randomness is a function of the seed and the position, sums are exact, and what a step opened is journalled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers.utils import logging as transformers_logging

from appa_secure.aggregation import declared, shares
from appa_secure.agreement import Agreement
from appa_secure.config import Config
from appa_secure.errors import PrivacyError
from appa_secure.journal import atomic_write
from appa_secure.language import lora_config
from appa_secure.messages import unpack_float
from appa_secure.origin import Origin
from appa_secure.progress import Progress
from appa_secure.records import LEDGER, MEASUREMENT, METRICS, PREDICTOR, Journal, RunDir
from appa_secure.tasks import completion_length, prompt
from coordinator import tabular
from coordinator.evaluate import Evaluator, Generate, Truth
from coordinator.maxmin import MaxMinReward, drawer, learn_mixture
from coordinator.ppo import PPOTrainer, latest_checkpoint, make_config
from coordinator.predictor import Sums, copy_rows, record_ledger, train_predictor
from coordinator.reward import FederatedReward, StepReward
from coordinator.rounds import Federation, Rounds, ask
from coordinator.sampling import sample
from coordinator.summary import summarise
from coordinator.tuning import tune_policy
from coordinator.warmup import warm_policy

PRIVATE, NOT_PRIVATE = "private", "not private"
STAMP = "STAMP"
_TOKENS_PER_ITEM = {"tiny": 1, "stories260k": 3, "hf": 3}


class Pipeline:
    """A run of the coordinator over a federation; `run()` does or finishes all stages and writes the summary."""

    def __init__(
        self, config: Config, agreement: Agreement, heldout: tuple[str, ...], federation: Federation, run: RunDir,
        progress: Progress, nominal: bool, embeddings: Mapping[str, np.ndarray], curator: Sums | None = None,
        origin: Origin | None = None,
    ) -> None:  # fmt: skip
        """embeddings: question -> (K, E) of its options, public. origin: the run whose predictor this one starts from."""
        self.config, self.agreement, self.heldout = config, agreement, heldout
        self.federation, self.run_dir, self.progress, self.nominal = federation, run, progress, nominal
        self.rounds = Rounds(agreement, federation, run)
        self.train, self.embeddings = agreement.plan.train, embeddings
        self.origin = origin
        self.curator = curator  # trains the predictor in the clients' place, in a simulation
        self._evaluator: Evaluator | None = None
        apart = not agreement.clear and config.predictor.training == "federated"
        protected = config.privacy.enabled and config.privacy.secure_rng and apart
        # What training alone writes; what is measured against the truth is stamped by itself, and stamps the summary.
        self._trained = PRIVATE if protected else NOT_PRIVATE
        self.stamp = NOT_PRIVATE if config.evaluation.truth else self._trained

    # -- stages ----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """All stages; returns the summary that was written."""
        # One line per step says enough: no bars and notices about every checkpoint between them.
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        self._stage("setup", self._setup)
        self._stage("context", self._context)
        self._stage("predictor", self._predictor)
        if self.config.until == "align":
            self._stage("warmup", self._warmup)
            self._stage("before", lambda: self._measure("policy/warm"))
            self._stage("align", self._align)
            self._stage("after", lambda: self._measure("policy", "policy/warm"))
        return self._summary()

    def _stage(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        if self.run_dir.stage_done(name) is not None:
            return
        began = time.monotonic()
        payload = work()
        # Seconds of a resumed stage are those of its last part.
        self.run_dir.mark_done(name, {**payload, "seconds": time.monotonic() - began})

    def _setup(self) -> dict[str, Any]:
        agreement = self.agreement
        if not len(self.run_dir.transcript):
            facts: dict[str, Any] = {"mode": agreement.mode}
            facts |= {} if self.curator is None else {"training": agreement.plan.training}
            facts |= {} if self.origin is None else {"origin": self.origin.facts}
            self.run_dir.transcript.run(agreement.plan.run, agreement.digest().hex(), **facts)
        ask(self.federation, "setup", run=agreement.plan.run, agreement=agreement.digest())
        return {}

    def _context(self) -> dict[str, Any]:
        if self.agreement.true_rewards:
            return {}  # no predictor, so nothing to describe a group to
        if self.origin is not None:
            copy_rows(self.origin.root / LEDGER, self.run_dir.ledger, ("client", "release"))
            return {}
        for client, reply in ask(self.federation, "context").items():
            record_ledger(self.run_dir.ledger, client, reply.body["ledger"])
        return {}

    def _predictor(self) -> dict[str, Any]:
        if self.agreement.true_rewards:
            return {}
        if self.origin is not None:
            return self._predictor_of(self.origin)
        total = self.agreement.plan.rounds
        known = {row.get("round") for row in self.run_dir.metrics}

        def done(number: int, spent: float | None) -> None:
            spent = self._epsilon() if spent is None else spent  # rounds on histograms pay nothing more
            if number not in known:
                row = {"stamp": self._trained, "stage": "predictor", "round": number, "epsilon": spent}
                self.run_dir.metrics.append(row)
            self.progress.step("predictor", number, total, eps=spent)

        theta = train_predictor(
            self.agreement, self.curator or self.rounds, self.run_dir, self.config.seed, self.config.predictor.server_lr, done,
            self._seen_predictor(),
        )  # fmt: skip
        self.rounds.close()
        ask(self.federation, "freeze", parameters=theta.astype("<f4").tobytes())
        self._keep_predictor(theta)
        if not self.config.evaluation.truth:
            return {}
        return {"alignment": self._predicted(self._measuring())}

    def _keep_predictor(self, theta: np.ndarray) -> None:
        folder = self.run_dir.path("predictor")
        folder.mkdir(exist_ok=True)
        np.save(folder / "parameters.npy", theta)
        self._stamp_folder("predictor")

    def _predictor_of(self, origin: Origin) -> dict[str, Any]:
        """Take over what another run ended with: its rows, parameters and measurement."""
        copy_rows(origin.root / METRICS, self.run_dir.metrics, ("round",))
        copy_rows(origin.root / MEASUREMENT, self.run_dir.measurement, ("round",))
        self._keep_predictor(np.load(origin.root / PREDICTOR / "parameters.npy"))
        self.progress.note(f"predictor: that of run {origin.run} in {origin.root}, paid for there")
        return {"alignment": self._predicted(self._measuring())}

    def _predicted(self, evaluator: Evaluator) -> dict[str, Any]:
        return {name: evaluator.predictor(qids) for name, qids in self._measured()}

    def _seen_predictor(self) -> Callable[[int, np.ndarray], None]:
        """What is measured of the predictor while it learns: rows of measurement.jsonl with `round` instead of `step`."""
        every, total = self.config.evaluation.predictor_every, self.agreement.plan.rounds
        known = {row.get("round") for row in self.run_dir.measurement} if every else set()

        def seen(number: int, theta: np.ndarray) -> None:
            if every and (number % every == 0 or number == total) and number not in known:
                found = self._predicted(self._evaluator_of(theta.astype("<f4").tobytes()))
                row = {"stamp": NOT_PRIVATE, "stage": "predictor", "round": number, **found}
                self.run_dir.measurement.append(row)

        return seen

    def _warmup(self) -> dict[str, Any]:
        folder = self.run_dir.path("policy") / "warm"
        if self.tabular:
            tabular.save(tabular.new_policy(self.agreement), folder, 0)
            return {}
        return warm_policy(
            self.config, self.agreement, folder, self._new_tokens(),
            lambda step, loss: self.progress.step("warm-up", step, self.config.policy.warmup_steps, loss=loss),
        )  # fmt: skip

    def _align(self) -> dict[str, Any]:
        """Train the policy by the run's system: at the coordinator, or by updates from the clients."""
        at_clients = "policy" in self.agreement.system.requests
        payload = self._align_at_clients() if at_clients else self._align_here()
        self.rounds.close()
        self._stamp_folder("policy")
        return payload

    def _align_at_clients(self) -> dict[str, Any]:
        model, tokenizer = _load(self.run_dir.path("policy") / "warm")
        model = tune_policy(
            self.config, self.agreement, self.rounds, self.run_dir, model, tokenizer, self._new_tokens(), self._seen(),
            self._record_step,
        )  # fmt: skip
        for part in (model, tokenizer):
            part.save_pretrained(self.run_dir.path("policy"))
        return {}

    def _align_here(self) -> dict[str, Any]:
        c, agreement, run = self.config, self.agreement, self.run_dir
        checkpoints = run.path("policy") / "checkpoints"
        newest = latest_checkpoint(checkpoints)
        updates = c.ppo.epochs * (c.ppo.prompts_per_step * c.ppo.generations // c.ppo.minibatch_size)
        at = 0 if newest is None else int(newest.name.split("-")[1]) // updates
        if self.tabular:
            at = tabular.load(agreement, checkpoints)[1]
        if run.metrics.truncate_after(at) or at:
            run.transcript.resume("align", at)
        payload: dict[str, Any] = {"stopped": None}
        reward: StepReward
        if agreement.system.kind == "maxmin":
            reward, payload["mixture"] = self._maxmin()
        else:
            reward = FederatedReward(
                agreement, self.rounds, Journal(run.path("rewards.jsonl")), c.task.format_penalty, self._seen(),
                stamp=self._trained,
            )  # fmt: skip

        def record(metrics: dict[str, Any]) -> None:
            self._record_step(metrics, reward.rows[metrics["step"]])

        trainer: PPOTrainer | tabular.TabularTrainer
        if self.tabular:
            assert isinstance(reward, FederatedReward)
            trainer = tabular.TabularTrainer(c, agreement, reward, checkpoints, record)
        else:
            trainer = self._ppo(reward, checkpoints, record)
        try:
            trainer.train(resume_from_checkpoint=newest)
        except PrivacyError as error:
            # A budget is used up. The policy as it is after the last opened step is what there is.
            payload["stopped"] = str(error)
            run.transcript.abort(str(error), stage="align")
            self.progress.note(f"alignment ended early: {error}")
        finally:
            if isinstance(reward, FederatedReward):
                reward.journal.close()
        trainer.save_policy(run.path("policy"))
        return payload

    def _ppo(self, reward: Any, checkpoints: Path, record: Callable[[dict[str, Any]], None]) -> PPOTrainer:
        c, agreement = self.config, self.agreement
        model, tokenizer = _load(self.run_dir.path("policy") / "warm")
        asked = ((q, agreement.questions[q]) for q in self.train)
        dataset = Dataset.from_list(
            [{"prompt": prompt(question, agreement.task, c.task.style), "qid": q} for q, question in asked]
        )
        return PPOTrainer(
            model=model,
            reward_funcs=[reward],
            args=make_config(c.ppo, checkpoints, c.seed, self._new_tokens()),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=lora_config(None if c.policy.lora is None else c.policy.lora.model_dump()),
            on_step=record,
        )

    def _maxmin(self) -> tuple[MaxMinReward, dict[str, Any]]:
        """The reward of the learnt mixture, and what the summary says about the mixture."""
        c, total = self.config, self.config.system.rounds
        draw = drawer(c, self.agreement, *_load(self.run_dir.path("policy") / "warm"), self._new_tokens())
        embedding = next(iter(self.embeddings.values())).shape[1]
        mixture = learn_mixture(
            c, self.agreement, self.rounds, self.run_dir, draw, embedding,
            lambda done, likelihood: self.progress.step("mixture", done, total, likelihood=likelihood),
        )  # fmt: skip
        self._stamp_folder("mixture")
        reward = MaxMinReward(self.agreement, mixture, self.embeddings, draw, c.seed, self._seen())
        return reward, {"members": list(mixture.members), "likelihood": mixture.likelihood}

    def _seen(self) -> Callable[..., None] | None:
        """What is measured at each step against the truth; nothing where truth is not to be had."""
        every = self.config.evaluation.every
        if not self.config.evaluation.truth or not every:
            return None
        known = {row.get("step") for row in self.run_dir.measurement}
        evaluator = self._measuring()

        def seen(step: int, qids: Any, answers: Any, row: dict[str, Any]) -> None:
            if step % every == 0 and step not in known:
                found = evaluator.step(qids, answers)
                self.run_dir.measurement.append(
                    {
                        "stamp": NOT_PRIVATE, "step": step, "per_group": found["per_group"], "avg": found["avg"],
                        "min": found["min"], "fi": found["fairness_index"],
                        "weights": row["weights"] or self._weights(step, row),
                    }
                )  # fmt: skip

        return seen

    def _weights(self, step: int, row: Mapping[str, Any]) -> dict[str, float] | None:
        """How much each group counted in a step, as the clients of a simulation tell; None where a rule has no weights."""
        a = self.rounds.agreement
        if (
            a.system.kind != "appa"
            or not row["opened"]
            or a.cohort
            or all(part.name != "A" for part in declared(a.aggregation))
        ):
            return None
        told = ask(self.federation, "weight", a.clients, step=step)
        used = np.array([unpack_float(told[c].body["weight"], c, "weight") or 0.0 for c in a.clients])
        counted = dict.fromkeys(sorted(set(a.groups.values())), 0.0)
        for client, share in zip(a.clients, shares(a.aggregation, used).tolist(), strict=True):
            counted[a.groups[client]] += share
        return counted

    def _record_step(self, metrics: dict[str, Any], row: dict[str, Any]) -> None:
        """One step to metrics.jsonl and the progress line. row: `result` of the aggregation, and what was malformed."""
        step = metrics["step"]
        result = row["result"] or {}
        spent = self._epsilon()
        self.run_dir.metrics.append(
            {
                "stamp": self._trained, "step": step, "reward": metrics["reward"], "fi": result.get("fi"),
                "branch": result.get("branch"),
                "z": result.get("z_next"), "h_mean": result.get("h_mean"), "soft_min": result.get("soft_min"),
                "alpha_sum": result.get("alpha_sum"), "kl": metrics.get("kl"), "entropy": metrics.get("entropy"),
                "malformed": row["malformed"], "opened": row["opened"], "epsilon": spent,
                "seconds": metrics["seconds"], "seconds_reward": metrics.get("seconds_reward"),
            }
        )  # fmt: skip
        self.progress.step(
            "align",
            step,
            self.config.ppo.steps,
            reward=metrics["reward"],
            fi=result.get("fi"),
            eps=spent,
        )

    def _measure(self, folder: str, reference: str | None = None) -> dict[str, Any]:
        """Alignment of the policy in `folder`; with a reference, its win rates against the policy in there."""
        if not self.config.evaluation.truth:
            return {}
        evaluator, samples = self._measuring(), self.config.evaluation.samples
        said, before = self._answers(folder), None if reference is None else self._answers(reference)
        return {
            name: evaluator.policy(said(qids), qids, samples, None if before is None else before(qids))
            for name, qids in self._measured()
        }

    def _answers(self, folder: str) -> Callable[[Sequence[str]], Generate]:
        """The answers of the policy saved in `folder` to given questions."""
        if not self.tabular:
            generate = self.speaker(folder)
            return lambda _: generate
        table, _ = tabular.load(self.agreement, self.run_dir.path(folder))
        seed, spread = self.config.seed, tabular.final_spread(self.config)
        return lambda qids: lambda _, samples: tabular.measured(table, qids, samples, seed, spread)

    def speaker(self, folder: str = "policy") -> Callable[[list[str], int], list[list[str]]]:
        """What samples from the language model saved in `folder`: (prompts, samples) -> the texts for each prompt."""
        c = self.config
        model, tokenizer = _load(
            self.run_dir.path("policy") / "warm", self.run_dir.path(folder), c.policy.lora is not None
        )

        def generate(prompts: list[str], samples: int) -> list[list[str]]:
            return sample(model, tokenizer, prompts, samples, c.ppo.temperature, self._new_tokens(), c.seed)

        return generate

    def _summary(self) -> dict[str, Any]:
        ceilings = None
        if self.config.evaluation.truth and self.config.until == "align":
            ceilings = {split: self._measuring().ceilings(qids) for split, qids in self._measured()}
        return summarise(
            self.config, self.agreement, self.run_dir, self.stamp, self.nominal, len(self.heldout), ceilings
        )

    # -- helpers ---------------------------------------------------------------------------------------------------

    @property
    def tabular(self) -> bool:
        """Whether the policy is a table of answers instead of a language model."""
        return self.config.policy.kind == "tabular"

    def _measured(self) -> tuple[tuple[str, Sequence[str]], ...]:
        return ("train", self.train), ("heldout", self.heldout)

    def _measuring(self) -> Evaluator:
        if self._evaluator is None:
            self._evaluator = self._evaluator_of(b"")
        return self._evaluator

    def _evaluator_of(self, parameters: bytes) -> Evaluator:
        """With the clients' predictions under `parameters`; those of the final predictor where there are none."""
        c, replies = self.config, ask(self.federation, "truth", parameters=parameters)
        truth = Truth.gather(self.agreement, replies)
        return Evaluator(self.agreement, truth, c.task.style, c.evaluation.bootstrap, c.seed)

    def _stamp_folder(self, name: str) -> None:
        """Say beside the weights whether they are private, because folders are copied without their run."""
        atomic_write(self.run_dir.path(name) / STAMP, self._trained + "\n")

    def _new_tokens(self) -> int:
        most = max(len(q.options) for q in self.agreement.questions.values())
        return completion_length(self.agreement.task, most, _TOKENS_PER_ITEM[self.config.policy.kind])

    def _epsilon(self) -> float | None:
        return max((float(row["epsilon"]) for row in self.run_dir.ledger), default=None)


def _load(base: Any, folder: Any = None, lora: bool = False) -> tuple[Any, Any]:
    """The policy saved in `folder` (default `base`) and its tokenizer; an adapter is put on top of `base`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = base if folder is None else folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if lora and folder != base:
        from peft import PeftModel

        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder), tokenizer
    return AutoModelForCausalLM.from_pretrained(folder), tokenizer
