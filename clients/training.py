"""Local training on one client: DP-SGD (unit sampling, per-unit clipping, noise), or plain steps on released shares.

The loss of a record depends on that record and on the *private* context only, so per-unit gradients are per unit, and
clipping and accounting apply as they are. Answers of one group to one question with one option have one gradient: it is
computed once, clipped, and multiplied by how many of them the Poisson draw took (a Binomial per cell), which leaves the
sensitivity of one response at the clipping norm.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from appa_secure.data import GroupData
from appa_secure.predictor import (
    PreferencePredictor,
    context_points,
    flatten,
    log_likelihood,
    pad_options,
    together,
    unflatten,
)
from appa_secure.privacy import sensitivity
from appa_secure.privacy.noise import gaussian, sampler
from appa_secure.privacy.plan import TrainingPlan
from clients import sampling
from clients.clipping import ClippedGradients
from clients.sampling import Examples

_CHUNK = 256  # examples per backward pass, a virtual batch: bounds the memory for activations


class Trainer(ABC):
    """One client's side of a predictor round: `local_steps` steps on the plan's public schedule of questions."""

    def __init__(
        self, plan: TrainingPlan, embeddings: dict[str, np.ndarray], context: dict[str, np.ndarray]
    ) -> None:
        """context: asked context question -> its distribution (K,), private unless the plan is not."""
        self.plan, self.embeddings = plan, embeddings
        self.points = context_points([embeddings[q] for q in context], list(context.values()))

    def round(self, vector: np.ndarray, round_index: int, model: PreferencePredictor) -> np.ndarray:
        """Train `local_steps` from the parameters `vector` (P,); returns the pseudo-gradient (start - end) / lr, (P,)."""
        unflatten(model, vector)
        start = flatten(model).astype(np.float64)
        label = f"{self.plan.run}/{round_index}/{hashlib.sha256(start.tobytes()).hexdigest()}"
        for step, questions in enumerate(self.plan.steps(round_index)):
            self._step(model, questions, f"{label}/{step}")
        return (start - flatten(model).astype(np.float64)) / self.plan.lr

    @abstractmethod
    def _step(self, model: PreferencePredictor, questions: Sequence[str], label: str) -> None:
        """One step on the answers to `questions`, in place; `label` names its randomness."""


class ShareTrainer(Trainer):
    """Plain gradient steps on shares: post-processing of private histograms, or, without privacy, of the true ones."""

    def __init__(
        self,
        plan: TrainingPlan,
        embeddings: dict[str, np.ndarray],
        context: dict[str, np.ndarray],
        shares: dict[str, np.ndarray],
    ) -> None:
        """shares: asked training question -> the distribution (K,) to learn."""
        super().__init__(plan, embeddings, context)
        self.shares = shares

    def _step(self, model: PreferencePredictor, questions: Sequence[str], label: str) -> None:
        """Mean cross entropy over the asked questions of the step."""
        here = [q for q in questions if q in self.shares]
        if not here:
            return
        optimizer = torch.optim.SGD(model.parameters(), lr=self.plan.lr)
        optimizer.zero_grad()
        targets, mask = pad_options([self.embeddings[q] for q in here])
        wanted = torch.zeros(mask.shape)
        for i, q in enumerate(here):
            wanted[i, : len(self.shares[q])] = torch.from_numpy(self.shares[q])
        model.train()
        likely = log_likelihood(together(model, self.points, targets), mask).masked_fill(~mask, 0.0)
        (-(wanted * likely).sum() / len(here)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class LocalTrainer(Trainer):
    """DP-SGD on the raw training answers, which it holds beside the private context."""

    def __init__(
        self,
        plan: TrainingPlan,
        data: GroupData,
        embeddings: dict[str, np.ndarray],
        context: dict[str, np.ndarray],
        responses_per_question: float,
        question_order: Sequence[str],
        noise_key: bytes,
    ) -> None:
        """context: asked context question -> private distribution (K,); responses_per_question: its noisy mean."""
        super().__init__(plan, embeddings, context)
        self.noise_key = noise_key
        self.expected = max(responses_per_question, 1.0)
        self.counts = {q: np.rint(data.counts[q]).astype(np.int64) for q in plan.train if data.has(q)}
        self.shares = {q: data.distribution(q) for q in self.counts}
        self.people = (
            sampling.bounded_answers(data, plan, question_order, noise_key)
            if plan.unit == "respondent"
            else {}
        )

    def _step(self, model: PreferencePredictor, questions: Sequence[str], label: str) -> None:
        here = [q for q in questions if q in self.counts]
        examples = self._sample(here, sampler(self.noise_key, f"sample/{label}"))
        std = self.plan.noise_multiplier * sensitivity.gradient_sum(self.plan.clip)
        total = self._clipped_sum(model, here, examples)
        total += gaussian(self.noise_key, f"dp-sgd/{label}", len(total), std)
        unflatten(model, flatten(model) - self.plan.lr * self.scale(len(questions)) * total)

    def scale(self, questions: int) -> float:
        """What a step's sum of gradients is multiplied by; `questions`: how many the step asks.

        The number of answers is private: this is the public rate and an estimate from the private context.
        """
        return 1.0 / max(1.0, self.plan.expected_batch(self.expected, questions))

    def _clipped_sum(
        self, model: PreferencePredictor, questions: Sequence[str], examples: Examples
    ) -> np.ndarray:
        """Sum of the units' clipped gradients, float64 (P,), before any noise; 0 for an empty draw."""
        total = torch.zeros(sum(p.numel() for p in model.parameters()))
        if len(examples.question):
            targets, mask = pad_options([self.embeddings[q] for q in questions])
            model.train()
            with ClippedGradients(model, sensitivity.gradient_sum(self.plan.clip)) as gradients:
                if examples.units is not None:
                    return self._of_people(model, targets, mask, examples, gradients).double().numpy()
                for rows in np.array_split(
                    np.arange(len(examples.question)), -(-len(examples.question) // _CHUNK)
                ):
                    at = torch.from_numpy(examples.question[rows])
                    wanted = torch.from_numpy(examples.target[rows][:, : mask.shape[1]]).float()
                    likely = log_likelihood(model(self.points[None], targets[at]), mask[at])
                    loss = -(wanted * likely.masked_fill(~mask[at], 0.0)).sum()
                    total += gradients.sum(loss, torch.from_numpy(examples.multiplicity[rows]).float())
        return total.double().numpy()

    def _of_people(
        self,
        model: PreferencePredictor,
        targets: Tensor,
        mask: Tensor,
        examples: Examples,
        gradients: ClippedGradients,
    ) -> Tensor:
        """Sum of the persons' clipped gradients (P,).

        The gradient of an answer's loss is sum_k (p_k - [k was answered]) times the gradient of logit k. These weights add
        up to 0, so logit k less logit 0 does as well, and a person's gradient is a sum over such differences, of which there
        are fewer than options, however many answers there are.
        """
        assert examples.units is not None
        question, option = mask[:, 1:].nonzero(as_tuple=True)
        option = option + 1
        logits = model(self.points[None], torch.stack([targets[question, option], targets[question, 0]], 1))
        above = logits[:, 0] - logits[:, 1]
        shares = torch.full(mask.shape, float("-inf")).index_put((question, option), above.detach())
        shares = shares.index_fill(1, torch.tensor([0]), 0.0).softmax(1)
        at, units = torch.from_numpy(examples.question), torch.from_numpy(examples.units)
        push = shares[at] - torch.from_numpy(examples.target[:, : mask.shape[1]]).float()  # (cells, K)
        weights = units @ torch.where(at[:, None] == question, push[:, option], 0.0)  # (people, n)
        return gradients.sum(above.sum(), torch.from_numpy(examples.multiplicity).float(), weights)

    def _sample(self, questions: Sequence[str], rng: np.random.Generator) -> Examples:
        """Draw a Poisson sample of privacy units at the plan's rate."""
        rate, width = self.plan.sample_rate, max((len(self.embeddings[q]) for q in questions), default=2)
        if self.plan.unit == "response":
            return sampling.responses(self.counts, questions, rate, width, rng)
        if self.plan.unit == "record":
            return sampling.records(self.shares, questions, rate, width, rng)
        return sampling.respondents(self.people, questions, rate, width, rng)
