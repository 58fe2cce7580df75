"""The made-up survey that carries the canaries: what the definition of differential privacy lets an adversary choose.

- A question that is released as noisy counts has a canary in every cell but its last: cells well above zero, where no
  count is cut off, and a last option that so many chose that the shares the client keeps give the noisy counts back.
  With privacy.mechanism=dpsgd these are the context questions, of ten options; with privacy.mechanism=histogram the
  training questions too, of two options.
- With privacy.mechanism=dpsgd a training question has no other answers than its canary, which chose the first option.
- Embeddings are random, and under DP-SGD so long that gradients exceed the clipping norm. Context questions have one
  embedding for all their options: what the noisy context says then changes no gradient.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from appa_secure.agreement import make_plan
from appa_secure.config import Config
from appa_secure.data import GroupData, Question, Responses, Split
from appa_secure.data.survey import counts_of
from appa_secure.privacy import sensitivity

Floats = NDArray[np.float64]
Coins = NDArray[np.bool_]

EMBEDDING = 384  # as all-MiniLM-L6-v2
_OPTIONS = 10  # of a context question, the last for the many
_SAFE = 6.0  # standard deviations of noise between a canary's cell and zero, where it would be cut off
_MANY = 10  # times as many answers in the last option: its own noise hardly moves the shares


class CanarySurvey:
    """The questions, embeddings and data that carry the canaries; which canaries exist, not which are included."""

    def __init__(self, config: Config, questions: int, context: int, limit: int) -> None:
        """questions, context: training and context questions of the run; limit: training canaries of one client at
        most."""
        p = config.privacy
        self.unit, self.histogram = p.unit, p.mechanism == "histogram"
        self.split = Split(
            tuple(f"context {i}" for i in range(context)), tuple(f"train {i}" for i in range(questions)), ()
        )
        # Of two options a record that is even and one that is not are too near each other.
        few = _OPTIONS if self.histogram and self.unit == "record" else 2
        sizes = dict.fromkeys(self.split.context, _OPTIONS) | dict.fromkeys(self.split.train, few)
        self.questions = tuple(
            Question(q, q, tuple(f"option {k}" for k in range(n)), tuple(range(n))) for q, n in sizes.items()
        )
        # A respondent gives as many answers as count, to different questions; every other unit is one answer.
        width = p.answers_per_unit if self.unit == "respondent" else 1
        cells = context * (1 if self.unit == "record" else _OPTIONS - 1)
        self.context_cells = _cells(
            cells, min(width, context), cells
        )  # (m, width) cell = option * context + question
        self.train_cells = _cells(questions, min(width, questions), limit)  # (m, width) question
        used = self.split.train[: self.train_cells.size] if self.histogram else ()
        self.counted = (*self.split.context, *used)  # questions released as noisy counts
        self.noise = p.context_noise
        if self.histogram:
            spread = sensitivity.histograms(p.unit, p.answers_per_unit)
            self.noise = make_plan(config, "canaries", self.split).noise_multiplier * spread
        rng = np.random.default_rng([config.seed, 0xCA7A])
        # Gradients longer than the clipping norm under DP-SGD (see `WhiteBox`); on histograms nothing is clipped.
        self.length = 10.0 if self.histogram else 10.0 * p.clip
        drawn = {q: rng.standard_normal((n, EMBEDDING)) for q, n in sizes.items()}
        self.embeddings = {
            q: (self.length * (e[:1].repeat(len(e), 0) if q in self.split.context else e)).astype(np.float32)
            for q, e in drawn.items()
        }

    @property
    def first_release(self) -> int:
        """Number of canaries in the release made before training."""
        return len(self.context_cells) + (len(self.train_cells) if self.histogram else 0)

    def known(self, question: str) -> Floats:
        """(K,) answers to a question that the adversary knows."""
        counts = np.zeros(len(self.embeddings[question]))
        if question not in self.counted:
            return counts
        if self.unit == "record":
            # A record that is missing is no question asked, which is public; an even one is as far as can be from it.
            return counts + 1.0
        counts[:] = self._few
        counts[-1] = _MANY * max(self._few, 1)
        return counts

    def included(self, question: str, option: int) -> Floats:
        """(K,) answers to a question with its canary in `option`."""
        counts = self.known(question)
        if self.unit == "record":
            counts[:] = 0.0
        counts[option] += 1.0
        return counts

    def data(self, name: str, context: Coins, train: Coins) -> GroupData:
        """A client's answers: the known ones, and the canaries whose coins say so."""
        contexts, order = len(self.split.context), (*self.split.context, *self.split.train)
        counts = {q: self.known(q) for q in order}
        chosen = self.context_cells[context].ravel()
        trained = self.train_cells[train].ravel()
        question = np.concatenate([chosen % contexts, contexts + trained])
        option = np.concatenate([chosen // contexts, np.zeros(len(trained), dtype=int)])
        if self.unit == "record":
            counts |= {order[i]: self.included(order[i], 0) for i in question}
            return GroupData(name, counts)
        known = np.concatenate([counts[q] for q in order]).astype(int)
        for i, k in zip(question, option, strict=True):
            counts[order[i]][k] += 1.0
        if self.unit == "response":
            return GroupData(name, counts)
        # The known answers are by a person each.
        at = np.concatenate([np.full(len(counts[q]), i) for i, q in enumerate(order)])
        options = np.concatenate([np.arange(len(counts[q])) for q in order])
        persons = np.concatenate(
            [
                np.repeat(np.arange(int(context.sum())), self.context_cells.shape[1]),
                int(context.sum()) + np.repeat(np.arange(int(train.sum())), self.train_cells.shape[1]),
            ]
        )
        responses = Responses(
            np.concatenate([np.arange(known.sum()), known.sum() + persons]),
            np.concatenate([at.repeat(known), question]),
            np.concatenate([options.repeat(known), option]),
        )
        return GroupData(name, counts_of(self.questions, responses, name), responses=responses)

    def first_scores(self, shares: dict[str, Floats]) -> Floats:
        """(m,) evidence for each canary of the first release in the shares a client keeps, question -> (K,); context
        canaries first."""
        if self.unit == "record":
            return np.array([shares[q][0] for q in self.counted]) - self._between
        noisy = [
            _MANY * max(self._few, 1) * shares[q][:-1] / shares[q][-1] - self._few for q in self.counted
        ]  # counts without the known answers
        contexts = len(self.split.context)
        evidence = (np.stack(noisy[:contexts]).T.ravel()[self.context_cells] - 0.5).sum(axis=1)
        if not self.histogram:
            return np.asarray(evidence)
        trained = (np.concatenate(noisy[contexts:])[self.train_cells] - 0.5).sum(axis=1)
        return np.concatenate([evidence, trained])

    @cached_property
    def _between(self) -> float:
        """Share of the first option half way between a record's and an even one's, after noise as claimed."""
        rng = np.random.default_rng(0)
        kept = []
        for counts in (np.eye(_OPTIONS)[0], np.full(_OPTIONS, 1.0 / _OPTIONS)):
            noisy = np.maximum(counts + self.noise * rng.standard_normal((20_000, _OPTIONS)), 0.0)
            kept.append(np.mean(noisy[:, 0] / np.maximum(noisy.sum(axis=1), 1e-12)))
        return float(np.mean(kept))

    @property
    def _few(self) -> int:
        return math.ceil(_SAFE * self.noise)


def _cells(count: int, width: int, limit: int) -> NDArray[np.int64]:
    """(m, width) disjoint cells, neighbours together, of `count`; at most `limit` canaries."""
    m = min(count // width, limit)
    return np.arange(m * width).reshape(m, width)
