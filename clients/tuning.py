"""A client's part of the systems that train something else than the predictor with it: policies and reward models.

Answers are labelled with the scorer of this client's private predicted preferences, so every vector made here is
post-processing of private artefacts (only `sft` with raw labels is not, which the configuration allows without privacy
alone). Nothing here is random except the cluster a client draws at the start of `maxmin`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from appa_secure.agreement import Agreement
from appa_secure.data import GroupData, Question
from appa_secure.language import adapted, answer_ids, answer_logps, unpack_policy
from appa_secure.messages import unpack_vector
from appa_secure.predictor import flatten, unflatten
from appa_secure.privacy.noise import sampler
from appa_secure.rewards import Scorer
from appa_secure.secagg.errors import BadEncoding, ProtocolError, RemoteMisbehaviour
from appa_secure.secagg.keys import COORDINATOR
from appa_secure.systems import (
    FLOOR,
    AnswerReward,
    SystemSpec,
    comparable,
    log_likelihood,
    preferences,
)
from appa_secure.tasks import answer_text, parse, prompt

LONGEST = 1000  # characters of an answer


def dpo_loss(margin: Tensor, beta: float) -> Tensor:
    """-log σ(β·m) (DPO, arXiv 2305.18290, eq. 7), over log 2: 1 for the reference policy.

    margin: (N,) log(π/π_ref) of the preferred answer less that of the other, in nats.
    """
    return F.softplus(-beta * margin) / math.log(2.0)


def ipo_loss(margin: Tensor, beta: float) -> Tensor:
    """(m - 1/(2β))² (IPO, arXiv 2310.12036, eq. 17), over its value 1/(4β²) for the reference policy."""
    return (2.0 * beta * margin - 1.0) ** 2


def clipped_policy_loss(
    logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, ratio_clip: float
) -> Tensor:
    """PPO's clipped objective (arXiv 1707.06347, eq. 7) as a loss, mean over tokens; logps, old, mask (N, T)."""
    ratio = (logps - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - ratio_clip, 1 + ratio_clip) * advantages)
    return -(gain * mask).sum() / mask.sum()


def raised_history(history: float | None, loss: float, spec: SystemSpec) -> float:
    """Log-weight of a group after a round: exponentiated gradient (arXiv 2405.20304, algorithm 1) without a normaliser.

    α_g ← α_g·exp(η·L_g)/Σ unrolls to α_g = exp(η·ΣL_g)/Σ_g exp(η·ΣL_g). A constant that all groups take off changes
    nothing: 1, the loss of the reference policy. loss: the group's own mean (N·L_g/N_g in the paper), in units of the
    reference policy's. The result stays within ±log(contrast)/2.
    """
    band = 0.5 * math.log(spec.contrast)
    grown = (history or 0.0) + spec.eta * (loss - 1.0)
    return float(np.clip(grown, -band, band))


def group_weight(history: float, spec: SystemSpec) -> float:
    """Weight in (0, 1] of the log-weight; 1 at the top of the band, so that no sum can overflow."""
    return min(1.0, math.exp(history - 0.5 * math.log(spec.contrast)))


def own_answer(target: np.ndarray, task: str) -> str:
    """The answer that says what a distribution (K,) over options says: its weights, its order or its top option."""
    if task == "dpa":
        return answer_text(np.rint(10.0 * target / target.max()).astype(int).tolist(), task)
    order = np.argsort(-target, kind="stable").tolist()
    return answer_text(order if task == "opa" else order[:1], task)


@dataclass(frozen=True)
class Rollouts:
    """(N,) answers as text and parsed (None where they cannot be read), those to one question side by side."""

    qids: Sequence[str]
    texts: Sequence[str]
    answers: Sequence[np.ndarray | None]


def read_rollouts(body: Mapping[str, Any], agreement: Agreement) -> Rollouts:
    """The rollouts of a `tune` request. Raises BadEncoding for anything that is not groups of answers to questions."""
    spec, qids, texts = agreement.system, body["questions"], body["answers"]
    each = 2 if spec.kind == "maxmin" else spec.generations
    if not qids or len(qids) != len(texts) or len(qids) % each:
        raise BadEncoding(
            COORDINATOR, f"tune: needs {each} answers to each question, and at least one question"
        )
    if any(qids[i] != qids[i - i % each] for i in range(len(qids))):
        raise BadEncoding(COORDINATOR, f"tune: runs of {each} answers must belong to one question")
    unknown = next((q for q in qids if q not in agreement.questions), None)
    if unknown is not None:
        raise BadEncoding(COORDINATOR, f"tune: no question of this survey ({unknown!r:.80})")
    if max(map(len, texts)) > LONGEST:
        raise BadEncoding(COORDINATOR, f"tune: an answer has more than {LONGEST} characters")
    answers = [parse(t, agreement.questions[q], agreement.task) for q, t in zip(qids, texts, strict=True)]
    if spec.kind == "maxmin" and any(a is None for a in answers):
        raise BadEncoding(COORDINATOR, "tune: reward models compare readable answers only")
    return Rollouts(qids, texts, answers)


class PolicyTuner:
    """`grdpo`, `gripo`, `fedrlhf` and `sft` at one client: its own gradient of the policy on a round's rollouts."""

    def __init__(
        self,
        spec: SystemSpec,
        scorer: Scorer,
        questions: Mapping[str, Question],
        wanted: Mapping[str, np.ndarray],
        model: Any,
        tokenizer: Any,
    ) -> None:
        """wanted: question -> (K,) distribution that `sft` imitates. The model's weights are the reference policy."""
        self.spec, self.scorer, self.wanted = spec, scorer, wanted
        self.model, self.tokenizer = model, tokenizer
        self.reference = flatten(model)
        self._prompts = {q: prompt(x, scorer.task, spec.style) for q, x in questions.items()}
        self._encoded = {q: tokenizer(text)["input_ids"] for q, text in self._prompts.items()}

    @property
    def size(self) -> int:
        """Number of trained parameters."""
        return len(self.reference)

    @property
    def asked(self) -> int:
        """Number of parameters in a request."""
        return self.size

    def contribution(
        self, vector: np.ndarray, rollouts: Rollouts, history: float | None, step: int
    ) -> tuple[np.ndarray, float]:
        """This client's vector for one round (`systems.segments`), and its log-weight after it.

        vector: (P,) the policy; history: the log-weight before the round, None before the first.
        """
        spec, rewards = self.spec, self.scorer.score(rollouts.qids, rollouts.answers)
        loss = self._loss(vector, rollouts.qids, rollouts.texts, rewards)
        update, at_start = descend(self.model, vector, loss, spec)
        after, weight = 0.0, 1.0
        if spec.kind in ("grdpo", "gripo"):
            after = raised_history(history, at_start, spec)
            weight = group_weight(after, spec)
        mean = float(np.nanmean(rewards)) if np.isfinite(rewards).any() else 0.0
        return np.concatenate([weight * update, [weight, mean, mean * mean]]), after

    def _loss(
        self, vector: np.ndarray, qids: Sequence[str], texts: Sequence[str], rewards: np.ndarray
    ) -> Callable[[], Tensor]:
        """The local objective as a function of the model's present weights."""
        spec = self.spec
        first = list(qids[:: spec.generations])
        if spec.kind == "sft":
            asked = [q for q in first if q in self.wanted]
            tokens = self._tokens(asked, [own_answer(self.wanted[q], self.scorer.task) for q in asked])
            return lambda: self._imitation(asked, tokens)
        tokens = self._tokens(qids, texts)

        def logps() -> tuple[Tensor, Tensor]:
            return answer_logps(
                self.model,
                self.tokenizer.pad_token_id,
                [self._encoded[q] for q in first],
                tokens,
                spec.temperature,
            )

        with torch.no_grad():
            unflatten(self.model, self.reference)
            reference = logps()[0].sum(1)  # (N,)
        if spec.kind == "fedrlhf":
            unflatten(self.model, vector)
            with torch.no_grad():
                old, mask = logps()
            advantages = self._advantages(rewards, (old.sum(1) - reference).double().numpy())
            return lambda: clipped_policy_loss(logps()[0], old, advantages, mask, spec.ratio_clip)
        labels = torch.from_numpy(preferences(rewards)).float()  # (N/2,)
        form = dpo_loss if spec.kind == "grdpo" else ipo_loss

        def pairwise() -> Tensor:
            gain = logps()[0].sum(1) - reference
            margin = (gain[0::2] - gain[1::2]) * labels
            known = labels != 0  # a pair without preference takes no part
            return form(margin[known], spec.beta).mean() if bool(known.any()) else 1.0 + 0.0 * gain.sum()

        return pairwise

    def _imitation(self, qids: Sequence[str], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Negative log-likelihood per token of the client's own answers; 0 where it has none."""
        if not qids:
            return 0.0 * sum(p.sum() for p in self.model.parameters() if p.requires_grad)
        pad, prompts = self.tokenizer.pad_token_id, [self._encoded[q] for q in qids]
        logps, mask = answer_logps(self.model, pad, prompts, tokens, 1.0)
        return -logps.sum() / mask.sum()

    def _advantages(self, rewards: np.ndarray, drift: np.ndarray) -> Tensor:
        """(N, 1) of R = R⁰ + λ·H - kl·log(π/π_ref) (FedRLHF, eq. 3), less the other answers' mean to the same question.

        H is the client's own reward of an answer, R⁰ says only whether it can be read. Scaled to unit variance.
        """
        spec = self.spec
        total = (
            np.where(np.isnan(rewards), spec.format_reward, spec.human_weight * rewards)
            - spec.kl_coef * drift
        )
        rows = total.reshape(-1, spec.generations)
        centred = (
            (rows - rows.mean(axis=1, keepdims=True)).reshape(-1) * spec.generations / (spec.generations - 1)
        )
        return torch.from_numpy(centred / (centred.std() + 1e-8)).float().unsqueeze(1)

    def _tokens(self, qids: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
        return [
            answer_ids(self.tokenizer, self._prompts[q], self._encoded[q], text)
            for q, text in zip(qids, texts, strict=True)
        ]


def descend(
    model: Any, vector: np.ndarray, loss: Callable[[], Tensor], spec: SystemSpec
) -> tuple[np.ndarray, float]:
    """Local SGD from the parameters `vector` (P,): (start - end)/lr, float64 (P,), and the loss at the start.

    Each step's gradient is shortened to the norm `clip`. With parameters chosen to overflow on one label only, the
    coordinator would see from a refused upload what the label was: what is not finite becomes zero, silently.
    """
    unflatten(model, vector)
    trained = [p for p in model.parameters() if p.requires_grad]
    total, at_start = np.zeros(len(vector)), math.nan
    for step in range(spec.local_steps):
        value = loss()
        at_start = float(value.detach()) if step == 0 else at_start
        gradients = torch.autograd.grad(value, trained, allow_unused=True)
        flat = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten()
                for p, g in zip(trained, gradients, strict=True)
            ]
        )
        norm = float(flat.norm())
        if not math.isfinite(norm):
            return np.zeros(len(vector)), 1.0
        flat = flat * min(1.0, spec.clip / max(norm, 1e-12))
        total += flat.double().numpy()
        if step + 1 < spec.local_steps:
            unflatten(model, (vector - spec.lr * total).astype(np.float32))
    reach = spec.clip * spec.local_steps
    return np.clip(total, -reach, reach), at_start if math.isfinite(at_start) else 1.0


class ClusterTuner:
    """`maxmin` at one client: choose the likeliest reward model (E-step), send that one's gradient (M-step).

    This is expectation-maximisation with hard assignment as a federation does it (IFCA, arXiv 2006.04088): the choice
    stays at the client, and the sum does not say who chose what.
    """

    def __init__(
        self, spec: SystemSpec, scorer: Scorer, embeddings: Mapping[str, np.ndarray], drawn: int
    ) -> None:
        """drawn: the cluster this client keeps for the first `free_rounds` rounds, drawn in secret."""
        self.spec, self.scorer, self.embeddings, self.drawn = spec, scorer, embeddings, drawn
        self.model = AnswerReward(next(iter(embeddings.values())).shape[1], scorer.kind == "wasserstein")

    @property
    def size(self) -> int:
        """Number of parameters of one reward model."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def asked(self) -> int:
        """Number of parameters in a request: all reward models."""
        return self.spec.clusters * self.size

    def contribution(
        self, vector: np.ndarray, rollouts: Rollouts, history: float | None, step: int
    ) -> tuple[np.ndarray, float]:
        """This client's vector for round number `step` (`systems.segments`), and the cluster it chose.

        vector: (K·P,) all reward models; rollouts: pairs of readable answers; history: not used, the choice has none.
        """
        spec, models = self.spec, vector.reshape(self.spec.clusters, -1)
        labels = torch.from_numpy(preferences(self.scorer.score(rollouts.qids, rollouts.answers))).float()
        answers = comparable(self.embeddings, rollouts.qids, [a for a in rollouts.answers if a is not None])

        def likelihood() -> Tensor:
            return log_likelihood(self.model(answers), labels)

        with torch.no_grad():
            found = []
            for model in models:
                unflatten(self.model, model)
                found.append(float(likelihood()))
        known = np.nan_to_num(np.array(found), nan=-np.inf)
        chosen = self.drawn if step <= spec.free_rounds else int(known.argmax())
        update = np.zeros(models.shape)
        update[chosen] = descend(self.model, models[chosen], lambda: -likelihood(), spec)[0]
        members = np.zeros(spec.clusters)
        members[chosen] = 1.0
        report = float(np.clip(known[chosen], FLOOR, 0.0))
        return np.concatenate([update.ravel(), members, [report]]), float(chosen)


Tuner = PolicyTuner | ClusterTuner


def make_tuner(
    agreement: Agreement,
    scorer: Scorer,
    data: GroupData,
    embeddings: Mapping[str, np.ndarray],
    policy: Mapping[str, Any] | None,
    noise_key: bytes,
) -> Tuner:
    """This client's part of the agreed system.

    policy: body of the `policy` message. Raises RemoteMisbehaviour where one is needed and missing, or cannot be
    read.
    """
    spec = agreement.system
    if spec.kind == "maxmin":
        drawn = int(sampler(noise_key, f"maxmin/{agreement.plan.run}").integers(spec.clusters))
        return ClusterTuner(spec, scorer, embeddings, drawn)
    if policy is None:
        raise RemoteMisbehaviour(COORDINATOR, "tune: the policy has not been sent yet")
    try:
        model, tokenizer = unpack_policy(
            policy, lambda raw, size: unpack_vector(raw, COORDINATOR, "policy.weights", size)
        )
        model = adapted(model, None if spec.adapter is None else json.loads(spec.adapter))
    except ProtocolError:
        raise
    except Exception as error:  # the tokenizer library raises nothing narrower
        raise RemoteMisbehaviour(COORDINATOR, f"policy: cannot be read ({type(error).__name__})") from None
    wanted = (
        {q: data.distribution(q) for q in agreement.questions if data.has(q)}
        if spec.labels == "raw"
        else scorer.targets
    )
    return PolicyTuner(spec, scorer, agreement.questions, wanted, model, tokenizer)
