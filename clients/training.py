"""Local training on one client: DP-SGD (unit sampling, per-unit clipping, noise), or plain steps on released shares.

The loss of a record depends on that record and on the *private* context only, so per-unit gradients are per unit and
Opacus's clipping and accounting apply as they are. Answers of one group to one question with one option have one
gradient: it is computed once, clipped, and multiplied by how many of them the Poisson draw took (a Binomial per cell),
which leaves the sensitivity of one response at the clipping norm.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor

from appa_secure.data import GroupData
from appa_secure.predictor import (
    PreferencePredictor,
    context_points,
    flatten,
    log_likelihood,
    pad_options,
    unflatten,
)
from appa_secure.privacy.noise import gaussian, sampler
from appa_secure.privacy.plan import TrainingPlan

# The inputs, embeddings and private context, need no gradients: Opacus's hooks work on layers all the same.
warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)

_CHUNK = 64  # examples per backward pass: per-example gradients stay near the caches, memory bounded


@dataclass(frozen=True)
class Examples:
    """What one DP-SGD step looks at.

    question: (n,) index into the step's questions; target: (n, K) distribution over options; units: rows are privacy
    units, columns examples, None for the identity; multiplicity: how often each unit's clipped gradient counts.
    """

    question: np.ndarray
    target: np.ndarray
    multiplicity: np.ndarray
    units: np.ndarray | None = None


class UnitOptimizer(DPOptimizer):
    """Opacus's DPOptimizer with units that own several examples, multiplicities, and named noise."""

    def __init__(self, *args: object, draw: Callable[[int], np.ndarray], **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._draw = draw  # size -> that many N(0, (noise_multiplier * max_grad_norm)^2) values
        self.multiplicity: Tensor = torch.empty(0)
        self.units: Tensor | None = None

    def clip_and_accumulate(self) -> None:
        """Clip each unit's gradient to max_grad_norm and add multiplicity times it to `summed_grad`."""
        grads, norms = _finite([self._get_flat_grad_sample(p).flatten(1) for p in self.params])
        if self.units is not None:
            grads, norms = _finite([self.units @ g for g in grads])  # (U, n) @ (n, P)
        weight = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0) * self.multiplicity  # (U,)
        for p, g in zip(self.params, grads, strict=True):
            _check_processed_flag(p.grad_sample)
            total = (weight @ g).view_as(p)
            p.summed_grad = total if p.summed_grad is None else p.summed_grad + total
            _mark_as_processed(p.grad_sample)

    def add_noise(self) -> None:
        """Gaussian noise from the client's own generator; replaces Opacus's torch generator."""
        noise, at = self._draw(sum(p.numel() for p in self.params)), 0
        for p in self.params:
            _check_processed_flag(p.summed_grad)
            part = torch.from_numpy(noise[at : at + p.numel()].astype(np.float32)).view_as(p)
            p.grad = p.summed_grad + part
            at += p.numel()
            _mark_as_processed(p.summed_grad)


def _finite(grads: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The rows (n, P) with their L2 norms over all parameters (n,); a row whose norm overflows becomes 0.

    Clipping cannot bound NaN: with parameters chosen to overflow on one answer only, the coordinator would see from the
    refused upload whether that answer was drawn.
    """
    norms = torch.stack([g.norm(2, dim=1) for g in grads], dim=1).norm(2, dim=1)
    finite = torch.isfinite(norms)
    if bool(finite.all()):
        return grads, norms
    return [torch.where(finite[:, None], g, 0.0) for g in grads], torch.where(finite, norms, 0.0)


class Trainer:
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

    def _step(self, model: PreferencePredictor, questions: Sequence[str], label: str) -> None:
        raise NotImplementedError


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
        likely = log_likelihood(model(self.points.expand(len(targets), -1, -1), targets), mask).masked_fill(
            ~mask, 0.0
        )
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
            _bounded_rows(data, plan, question_order, noise_key) if plan.unit == "respondent" else None
        )

    def _step(self, model: PreferencePredictor, questions: Sequence[str], label: str) -> None:
        here, points = [q for q in questions if q in self.counts], self.points
        examples = self._sample(here, sampler(self.noise_key, f"sample/{label}"))
        std = self.plan.noise_multiplier * self.plan.clip
        wrapped = GradSampleModule(model, batch_first=True, loss_reduction="sum")
        optimizer = UnitOptimizer(
            torch.optim.SGD(model.parameters(), lr=self.plan.lr),
            noise_multiplier=self.plan.noise_multiplier,
            max_grad_norm=self.plan.clip,
            expected_batch_size=None,
            loss_reduction="sum",
            draw=lambda size: gaussian(self.noise_key, f"dp-sgd/{label}", size, std),
        )
        try:
            model.train()
            self._accumulate(wrapped, optimizer, here, points, examples, self.scale(len(questions)))
        finally:
            wrapped.to_standard_module()

    def scale(self, questions: int) -> float:
        """What a step's sum of gradients is multiplied by; `questions`: how many the step asks.

        The number of answers is private: this is the public rate and an estimate from the private context.
        """
        return 1.0 / max(1.0, self.plan.expected_batch(self.expected, questions))

    def _accumulate(
        self,
        model: GradSampleModule,
        optimizer: UnitOptimizer,
        questions: Sequence[str],
        points: Tensor,
        examples: Examples,
        scale: float,
    ) -> None:
        for p in optimizer.params:  # an empty draw still releases its noise
            p.summed_grad = torch.zeros_like(p)
        if len(examples.question):
            targets, mask = pad_options([self.embeddings[q] for q in questions])
            for rows, units, multiplicity in _chunks(examples):
                at = torch.from_numpy(examples.question[rows])
                logits = model(points.expand(len(rows), -1, -1), targets[at])
                wanted = torch.from_numpy(examples.target[rows][:, : mask.shape[1]]).float()
                likely = log_likelihood(logits, mask[at]).masked_fill(~mask[at], 0.0)
                (-(wanted * likely).sum()).backward()
                optimizer.units, optimizer.multiplicity = units, multiplicity
                optimizer.clip_and_accumulate()
                for p in optimizer.params:
                    p.grad_sample = None
        optimizer.add_noise()
        for p in optimizer.params:
            p.grad *= scale
        optimizer.original_optimizer.step()
        for p in optimizer.params:
            p.grad = p.summed_grad = None

    def _sample(self, questions: Sequence[str], rng: np.random.Generator) -> Examples:
        """Draw a Poisson sample of privacy units at the plan's rate."""
        width = max((len(self.embeddings[q]) for q in questions), default=2)
        if self.plan.unit == "response":
            cells = [(i, k) for i, q in enumerate(questions) for k in range(len(self.counts[q]))]
            have = np.array([self.counts[questions[i]][k] for i, k in cells], dtype=np.int64)
            taken = rng.binomial(have, self.plan.sample_rate)
            keep = np.flatnonzero(taken)
            target = np.zeros((len(keep), width))
            for row, cell in enumerate(keep):
                target[row, cells[cell][1]] = 1.0
            return Examples(np.array([cells[c][0] for c in keep], dtype=np.int64), target, taken[keep])
        if self.plan.unit == "record":
            keep = np.flatnonzero(rng.random(len(questions)) < self.plan.sample_rate)
            target = np.zeros((len(keep), width))
            for row, i in enumerate(keep.tolist()):
                target[row, : len(self.shares[questions[i]])] = self.shares[questions[i]]
            return Examples(keep, target, np.ones(len(keep), dtype=np.int64))
        assert self.people is not None
        return _people_examples(self.people, questions, self.plan.sample_rate, width, rng)


def _people_examples(
    people: dict[int, list[tuple[str, int]]],
    questions: Sequence[str],
    rate: float,
    width: int,
    rng: np.random.Generator,
) -> Examples:
    """Units are persons: every person is drawn at `rate`, and owns the cells of their answers in this step."""
    index = {q: i for i, q in enumerate(questions)}
    drawn = [p for p, u in zip(people, rng.random(len(people)), strict=True) if u < rate]
    rows = [[(index[q], k) for q, k in people[p] if q in index] for p in drawn]
    rows = [r for r in rows if r]
    cells = sorted({cell for row in rows for cell in row})
    column = {cell: i for i, cell in enumerate(cells)}
    units, target = np.zeros((len(rows), len(cells)), dtype=np.float32), np.zeros((len(cells), width))
    for i, row in enumerate(rows):
        for cell in row:
            units[i, column[cell]] += 1.0
    for (_, option), i in column.items():
        target[i, option] = 1.0
    return Examples(
        np.array([q for q, _ in cells], dtype=np.int64), target, np.ones(len(rows), dtype=np.int64), units
    )


def _chunks(examples: Examples) -> list[tuple[np.ndarray, Tensor | None, Tensor]]:
    """Split into (example rows, units over these rows, multiplicity); a person's examples stay together."""
    if examples.units is None:
        cuts = np.array_split(np.arange(len(examples.question)), math.ceil(len(examples.question) / _CHUNK))
        return [(rows, None, torch.from_numpy(examples.multiplicity[rows]).float()) for rows in cuts]
    rows = np.arange(len(examples.question))
    return [(rows, torch.from_numpy(examples.units), torch.from_numpy(examples.multiplicity).float())]


def _bounded_rows(
    data: GroupData, plan: TrainingPlan, question_order: Sequence[str], noise_key: bytes
) -> dict[int, list[tuple[str, int]]]:
    """Each person's training answers, at most plan.answers_per_unit of them (the contribution bound), secretly chosen."""
    assert data.responses is not None
    train = set(plan.train)
    people: dict[int, list[tuple[str, int]]] = {}
    for person, question, option in zip(
        data.responses.respondent.tolist(),
        data.responses.question.tolist(),
        data.responses.option.tolist(),
        strict=True,
    ):
        if question_order[question] in train:
            people.setdefault(person, []).append((question_order[question], option))
    rng = sampler(noise_key, "contribution-bound")
    for person, rows in people.items():
        if len(rows) > plan.answers_per_unit:
            people[person] = [
                rows[i] for i in sorted(rng.choice(len(rows), plan.answers_per_unit, replace=False))
            ]
    return people
