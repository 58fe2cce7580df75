"""MaxMin-RLHF (arXiv 2402.08925): a mixture of reward models learnt by federated EM, then PPO on the worst of them.

The mixture. Clients compare answers that the coordinator sampled from the warmed-up policy. In each round a client takes
the reward model under which its preferences are likeliest (E-step, at the client) and sends that model's Bradley-Terry
gradient, zeros for the others and a one-hot of its choice; one masked sum holds a FedAvg per cluster (M-step). The
coordinator sees sums and how many chose what, not who.

The policy. F_k is the mean reward of model k over a step's rollouts; PPO maximises F of k* = argmin_k F_k (algorithm 1).
Bradley-Terry fixes a reward up to a constant per question, and its scale is each model's own: here a reward is
σ((r_k - mean) / spread) over the warmed-up policy's answers to the same question, so that the F_k can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from appa_secure.agreement import Agreement
from appa_secure.config import Config
from appa_secure.errors import RunError
from appa_secure.predictor import unflatten
from appa_secure.records import RunDir
from appa_secure.systems import AnswerReward, comparable, initial_mixture
from appa_secure.tasks import parse, prompt
from coordinator.predictor import adam, decay, save_state
from coordinator.reward import Seen, StepReward
from coordinator.rounds import Rounds
from coordinator.sampling import sample
from coordinator.tuning import ask_patiently

_REFERENCE_DRAW = 2**20  # in place of a round's number
_REFERENCES = 8  # answers of the warmed-up policy per question, against which rewards are scaled
Draw = Callable[[int, int], list[list[str]]]  # (answers per training question, seed) -> [question][answer]


@dataclass(frozen=True)
class Mixture:
    """Reward models (K, P) that somebody chose in the last round, how many did, and the last mean log-likelihood."""

    models: np.ndarray
    members: tuple[int, ...]
    likelihood: float


def drawer(config: Config, agreement: Agreement, model: Any, tokenizer: Any, new_tokens: int) -> Draw:
    """Answers of the warmed-up policy to all training questions, a function of the seed alone."""
    prompts = [
        prompt(agreement.questions[q], agreement.task, config.task.style) for q in agreement.plan.train
    ]
    return lambda count, seed: sample(
        model, tokenizer, prompts, count, config.ppo.temperature, new_tokens, seed=seed
    )


def learn_mixture(
    config: Config,
    agreement: Agreement,
    rounds: Rounds,
    run: RunDir,
    draw: Draw,
    embedding: int,
    progress: Callable[[int, float], None],
) -> Mixture:
    """Federated EM for system.rounds rounds, or go on with it; the state after each round is on disk before the next.

    embedding: entries of an option's embedding; progress: called with (rounds done, mean log-likelihood per pair).
    """
    system = config.system
    path = run.path("mixture") / "state.npz"
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        with np.load(path) as stored:
            state = dict(stored)
    else:
        theta = initial_mixture(system.clusters, embedding, config.seed).astype(np.float64)
        zeros = np.zeros_like(theta)
        # steps: updates each model has had; members: who chose it in the last round
        state = {
            "round": np.array(0), "theta": theta, "m": zeros, "v": zeros.copy(),
            "steps": np.zeros(system.clusters, dtype=int), "members": np.zeros(system.clusters),
            "likelihood": np.array(0.0),
        }  # fmt: skip
    for done in range(int(state["round"]), system.rounds):
        qids, texts = _pairs(agreement, draw(config.ppo.generations, _seed(config.seed, done)))
        payload = {
            "step": done + 1, "opened": done, "parameters": state["theta"].astype("<f4").tobytes(),
            "questions": qids, "answers": texts,
        }  # fmt: skip
        size = state["theta"].shape[1]
        summed = ask_patiently(rounds, payload, size)
        update, members = np.split(summed.sum[:-1], [system.clusters * size])
        state["members"], gradients = np.rint(members), update.reshape(system.clusters, size)
        for k in np.flatnonzero(state["members"]):  # a model that nobody chose stays as it is
            state["steps"][k] += 1
            state["theta"][k], state["m"][k], state["v"][k] = adam(
                state["theta"][k], state["m"][k], state["v"][k], gradients[k] / state["members"][k],
                int(state["steps"][k]), system.server_lr * decay(done + 1, system.rounds),
            )  # fmt: skip
        state["round"] = np.array(done + 1)
        state["likelihood"] = np.array(summed.sum[-1] / len(summed.contributors))
        progress(done + 1, float(state["likelihood"]))
        save_state(path, state)
    chosen = state["members"] > 0
    return Mixture(
        state["theta"][chosen].astype(np.float32),
        tuple(int(n) for n in state["members"][chosen]),
        float(state["likelihood"]),
    )


def _pairs(agreement: Agreement, drawn: Sequence[Sequence[str]]) -> tuple[list[str], list[str]]:
    """Readable answers, two or more of them side by side for a question; an odd one is left out."""
    qids: list[str] = []
    texts: list[str] = []
    for qid, row in zip(agreement.plan.train, drawn, strict=True):
        good = [t for t in row if parse(t, agreement.questions[qid], agreement.task) is not None]
        good = good[: len(good) // 2 * 2]
        qids += [qid] * len(good)
        texts += good
    if not qids:
        raise RunError("no question got two readable answers to compare: raise policy.warmup_steps")
    return qids, texts


def _seed(seed: int, done: int) -> int:
    return int(np.random.default_rng([seed, 0xE3, done]).integers(2**31))


class MaxMinReward(StepReward):
    """The reward model under which this step's rollouts fare worst. Asks no client anything.

    An answer that cannot be read gets 0, as if it lost every comparison.
    """

    __name__ = "maxmin_reward"

    def __init__(
        self,
        agreement: Agreement,
        mixture: Mixture,
        embeddings: Mapping[str, np.ndarray],
        draw: Draw,
        seed: int,
        seen: Seen | None = None,
    ) -> None:
        super().__init__(agreement, seen)
        self.embeddings = embeddings
        embedding, cumulative = next(iter(embeddings.values())).shape[1], agreement.reward == "wasserstein"
        self.models = [AnswerReward(embedding, cumulative) for _ in mixture.models]
        for model, vector in zip(self.models, mixture.models, strict=True):
            unflatten(model, vector)
        qids, texts = _pairs(agreement, draw(_REFERENCES, _seed(seed, _REFERENCE_DRAW)))
        found = self._raw(qids, self.parsed(qids, texts))
        at = {q: np.flatnonzero(np.array(qids) == q) for q in dict.fromkeys(qids)}
        self._mean = {q: found[:, rows].mean(axis=1) for q, rows in at.items()}  # question -> (K,)
        self._unseen = found.mean(axis=1)  # (K,), for a question without readable references
        centred = found - np.stack([self._mean[q] for q in qids], axis=1)
        self._spread = np.maximum(centred.std(axis=1), 1e-8)  # (K,)

    def rewards(self, qids: Sequence[str], answers: Sequence[Any]) -> np.ndarray:
        """(K, N) in (0, 1): under each model, how an answer compares with the warmed-up policy's."""
        mean = np.stack([self._mean.get(q, self._unseen) for q in qids], axis=1)
        return np.asarray(1.0 / (1.0 + np.exp(-(self._raw(qids, answers) - mean) / self._spread[:, None])))

    def step(self, step: int, qids: Sequence[str], texts: Sequence[str]) -> list[float | None]:
        """Rewards (B,) of one step's rollouts."""
        answers = self.parsed(qids, texts)
        good = [i for i, a in enumerate(answers) if a is not None]
        rewards, worst = np.zeros(len(texts)), None
        if good:
            found = self.rewards([qids[i] for i in good], [answers[i] for i in good])
            worst = int(found.mean(axis=1).argmin())
            rewards[good] = found[worst]
        row = {
            "malformed": len(texts) - len(good), "opened": True, "weights": None,
            "result": {"branch": None if worst is None else f"reward model {worst + 1}"},
        }  # fmt: skip
        if step not in self.rows and self.seen is not None:
            self.seen(step, qids, answers, row)
        self.rows[step] = row
        return list(rewards.tolist())

    def _raw(self, qids: Sequence[str], answers: Sequence[Any]) -> np.ndarray:
        with torch.no_grad():
            points = comparable(self.embeddings, qids, answers)
            return np.stack([model(points).double().numpy() for model in self.models])  # (K, N)
