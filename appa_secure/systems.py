"""How a run trains its policy: the systems of the field, side by side on the same data, predictor and rollouts.

| kind      | source           | a client sends (summed over all of them)                  | the coordinator takes     |
|-----------|------------------|-----------------------------------------------------------|---------------------------|
| `appa`    | arXiv 2604.04261 | rewards of rollouts (`appa_secure.aggregation`)           | PPO steps on the aggregate |
| `grdpo`   | arXiv 2405.20304 | its weight, and weight × gradient of DPO on its own labels | Adam steps on the mean   |
| `gripo`   | arXiv 2405.20304 | the same with the IPO loss                                | Adam steps on the mean    |
| `fedrlhf` | arXiv 2412.15538 | what policy-gradient steps on its own reward changed      | Adam steps on the mean    |
| `sft`     | -                | gradient of the log-likelihood of its own answers         | Adam steps on the mean    |
| `maxmin`  | arXiv 2402.08925 | gradient of the reward model it chose, zeros for others   | PPO steps on the worst    |

A client labels answers with its *private* predictor, so whatever it sends is post-processing of what the ledger paid
for. Every vector goes through one secure-aggregation session, `agreement.SYSTEM`, and is opened as a sum only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from appa_secure.predictor import flatten, pad_options

KINDS = ("appa", "grdpo", "gripo", "fedrlhf", "sft", "maxmin")
PAIRED = ("grdpo", "gripo", "maxmin")  # learn from pairs of answers to one question
WIDTH = 64  # of a reward model's hidden layers
FLOOR = -16.0  # least log-likelihood of one client's pairs that is reported, in nats per pair


@dataclass(frozen=True)
class SystemSpec:
    """What both sides must agree on about the system; part of the agreement's digest.

    beta: DPO's β, IPO's τ. eta: step size of the group weights. contrast: largest ratio between two weights.
    local_steps, lr: a client's SGD steps per round and their learning rate; clip: largest gradient norm of one.
    ratio_clip, kl_coef, human_weight: `fedrlhf`, PPO's ε, the KL penalty, and λ of R = R⁰ + λ·H. format_reward: R⁰ of
    an answer that cannot be read. labels: `sft`, "predicted" or "raw". generations: answers per question of a round;
    temperature: at which they were sampled. clusters, free_rounds: `maxmin`, reward models, and the rounds at the start
    in which a client keeps the cluster it drew. style: of the prompts. adapter: peft options of `policy.lora` as JSON,
    None where all weights are trained.
    """

    kind: str = "appa"
    beta: float = 0.1
    eta: float = 0.1
    contrast: float = 100.0
    local_steps: int = 1
    lr: float = 0.1
    clip: float = 1.0
    ratio_clip: float = 0.2
    kl_coef: float = 0.0
    human_weight: float = 1.0
    format_reward: float = 0.5
    labels: str = "predicted"
    generations: int = 2
    temperature: float = 1.0
    clusters: int = 2
    free_rounds: int = 5
    style: str = "short"
    adapter: str | None = None

    @property
    def requests(self) -> tuple[str, ...]:
        """Kinds of messages of the align stage that a client answers under this system."""
        return {"appa": ("score",), "maxmin": ("tune",)}.get(self.kind, ("policy", "tune"))


def segments(spec: SystemSpec, size: int) -> tuple[tuple[str, int, float, float], ...]:
    """Layout of one client's vector: (name, entries, lo, hi). size: parameters of the model that is trained.

    `update` is the sum of the clipped gradients of the local steps. Policies: times the client's `weight`, and `reward`,
    `reward2`: mean reward of the well-formed rollouts and its square. `maxmin`: one update per cluster, of which all
    but one are zero, `members` one-hot, and the mean log-likelihood of the client's pairs.
    """
    reach = spec.clip * spec.local_steps
    if spec.kind == "maxmin":
        return (
            ("update", spec.clusters * size, -reach, reach),
            ("members", spec.clusters, 0.0, 1.0),
            ("likelihood", 1, FLOOR, 0.0),
        )
    return (
        ("update", size, -reach, reach),
        ("weight", 1, 0.0, 1.0),
        ("reward", 1, 0.0, 1.0),
        ("reward2", 1, 0.0, 1.0),
    )


def preferences(rewards: np.ndarray) -> np.ndarray:
    """Labels (N/2,) of the pairs (0, 1), (2, 3), ...: 1 where the first is preferred, -1 the second, 0 neither.

    rewards: (N,), NaN for an answer that cannot be read, to which every other is preferred.
    """
    known = np.where(np.isnan(rewards), -1.0, rewards)
    return np.sign(known[0::2] - known[1::2])


# -- reward models of `maxmin` -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparable:
    """Answers as a reward model reads them: N answers to Q questions of at most K options.

    options: (Q, K, 2E), each option's embedding beside the mean of its question's; mask: (Q, K) real options; question:
    (N,) index; shares: (N, K), an answer's values over their sum.
    """

    options: Tensor
    mask: Tensor
    question: Tensor
    shares: Tensor


def comparable(
    embeddings: Mapping[str, np.ndarray], qids: Sequence[str], answers: Sequence[np.ndarray]
) -> Comparable:
    """Answers to questions, as `tasks.parse` returns them."""
    at = {q: i for i, q in enumerate(dict.fromkeys(qids))}
    options, mask = pad_options([embeddings[q] for q in at])
    middle = torch.from_numpy(np.stack([embeddings[q].mean(axis=0) for q in at])).float()
    shares = np.zeros((len(qids), mask.shape[1]), dtype=np.float32)
    for row, answer in zip(shares, answers, strict=True):
        row[: len(answer)] = answer / answer.sum()
    return Comparable(
        torch.cat([options, middle.unsqueeze(1).expand_as(options)], dim=2),
        mask,
        torch.tensor([at[q] for q in qids]),
        torch.from_numpy(shares),
    )


class AnswerReward(nn.Module):
    """r(question, answer) = -c·|a - p(question)|², p a distribution over options from public embeddings.

    The ideal point p bounds what can be gained: a free-form network of this size is soon driven where nothing was
    compared. `cumulative` compares cumulated shares, as the Wasserstein reward does.
    """

    def __init__(self, embedding: int, cumulative: bool) -> None:
        super().__init__()
        self.cumulative = cumulative
        self.net = nn.Sequential(
            nn.Linear(2 * embedding, WIDTH),
            nn.GELU(),
            nn.Linear(WIDTH, WIDTH),
            nn.GELU(),
            nn.Linear(WIDTH, 1),
        )
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Comparable) -> Tensor:
        """(N,) rewards; only differences between answers to one question mean anything (Bradley and Terry 1952)."""
        logits = self.net(x.options).squeeze(-1).masked_fill(~x.mask, float("-inf"))
        gap = x.shares - torch.softmax(logits, dim=1)[x.question]  # (N, K)
        if self.cumulative:
            gap = gap.cumsum(1)
        return -self.log_scale.exp() * (gap * gap).sum(1)


def initial_mixture(clusters: int, embedding: int, seed: int) -> np.ndarray:
    """Parameters (K, P) float32 of the reward models before training, a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return np.stack([flatten(AnswerReward(embedding, False)) for _ in range(clusters)])


def log_likelihood(rewards: Tensor, labels: Tensor) -> Tensor:
    """Mean log σ(r(preferred) - r(other)) over the pairs that have a preference (MaxMin-RLHF, eq. of the E-step).

    rewards: (N,), pairs side by side; labels: (N/2,) of `preferences`. -log 2 without any preference.
    """
    margin = (rewards[0::2] - rewards[1::2]) * labels
    return (
        F.logsigmoid(margin)[labels != 0].mean()
        if bool((labels != 0).any())
        else F.logsigmoid(0.0 * margin).mean()
    )
