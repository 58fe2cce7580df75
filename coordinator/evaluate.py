"""Measuring a policy against true group distributions. Not private; possible only where clients hand truth out.

AS_g is the mean reward of group g's true distribution over questions and sampled answers (APPA, arXiv 2604.04261).
Every sampled completion counts: one that is not an answer scores 0, whatever the format penalty was in training.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from appa_secure.agreement import Agreement
from appa_secure.ceilings import ceiling, frontier
from appa_secure.messages import Message
from appa_secure.rewards import Scorer, fairness_index
from appa_secure.secagg.errors import BadEncoding
from appa_secure.tasks import parse, prompt

_DIALS = (0.0, 0.5, 0.8, 1.0)  # points of the frontier between the best average and the best worst group

Generate = Callable[[list[str], int], list[list[str]]]  # (prompts, samples) -> [prompt][sample] texts


Tables = Mapping[str, Mapping[str, np.ndarray]]  # group -> question -> (K,) distribution


@dataclass(frozen=True)
class Truth:
    """True distributions, and the private predictor's. A group's members are averaged with equal weight."""

    groups: Tables
    predicted: Tables

    @classmethod
    def gather(cls, agreement: Agreement, replies: Mapping[str, Message]) -> Truth:
        """From the clients' answers to a `truth` request. Raises BadEncoding naming a client that sent something else."""
        return cls(*(_by_group(agreement, replies, field) for field in ("distributions", "predictions")))


def _by_group(agreement: Agreement, replies: Mapping[str, Message], field: str) -> Tables:
    members: dict[str, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for client, reply in replies.items():
        try:
            sent = {str(q): [float(x) for x in row] for q, row in json.loads(reply.body[field]).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise BadEncoding(client, f"truth.{field}: {error}") from None
        for qid, row in sent.items():
            if qid not in agreement.questions or len(row) != len(agreement.questions[qid].options):
                raise BadEncoding(
                    client, f"truth.{field}: no such question or wrong number of options ({qid!r:.80})"
                )
            members[agreement.groups[client]][qid].append(np.asarray(row, dtype=np.float64))
    means = {g: {q: np.mean(rows, axis=0) for q, rows in by.items()} for g, by in sorted(members.items())}
    return {g: {q: p / p.sum() for q, p in by.items()} for g, by in means.items()}


class Evaluator:
    """Alignment scores of answers for each group."""

    def __init__(self, agreement: Agreement, truth: Truth, style: str, bootstrap: int, seed: int):
        self.agreement, self.truth, self.style = agreement, truth, style
        self.bootstrap, self.seed = bootstrap, seed
        ordinals = {q: question.ordinals for q, question in agreement.questions.items()}
        self._scorers = {
            g: Scorer(agreement.reward, targets, ordinals) for g, targets in truth.groups.items()
        }

    def scores(self, qids: Sequence[str], answers: Sequence[np.ndarray | None]) -> dict[str, np.ndarray]:
        """Per group (B,) scores; NaN where the group has no answers to the question."""
        out = {}
        for group, scorer in self._scorers.items():
            row = np.full(len(qids), np.nan)
            known = [i for i, q in enumerate(qids) if q in self.truth.groups[group]]
            row[known] = scorer.score([qids[i] for i in known], [answers[i] for i in known])
            malformed = [i for i in known if answers[i] is None]
            row[malformed] = 0.0
            out[group] = row
        return out

    def step(self, qids: Sequence[str], answers: Sequence[np.ndarray | None]) -> dict[str, Any]:
        """Per-group alignment of one step's rollouts, for measurement.jsonl."""
        means = {g: _mean(row) for g, row in self.scores(qids, answers).items()}
        return _summary({g: m for g, m in means.items() if m is not None})

    def policy(
        self, generate: Generate, qids: Sequence[str], samples: int, reference: Generate | None = None
    ) -> dict[str, Any]:
        """Alignment of a policy on questions: per group, average, minimum, fairness index, and 95 % intervals.

        The intervals are percentile bootstrap over questions (Efron 1979): they say how far the figure would move with
        other questions of this kind, not with another training seed. With a reference policy also `win_rate`, against
        that one (`win_rates`): per group, and the average and the lowest of the groups.
        """
        scores, malformed = self._sampled(generate, qids, samples)
        table = scores.mean(axis=2)
        names = list(self._scorers)
        found = _summary(dict(zip(names, np.nanmean(table, axis=1).tolist(), strict=True)))
        found["ci95"] = self._intervals(table)
        found["malformed"] = malformed
        if reference is not None:
            wins = win_rates(scores, self._sampled(reference, qids, samples)[0])
            found["win_rate"] = {
                "per_group": dict(zip(names, wins.tolist(), strict=True)),
                "avg": float(wins.mean()),
                "min": float(wins.min()),
            }
        return found

    def _sampled(self, generate: Generate, qids: Sequence[str], samples: int) -> tuple[np.ndarray, float]:
        """(G, Q, S) scores of sampled answers, NaN where a group was not asked, and the share that cannot be read."""
        questions, task = [self.agreement.questions[q] for q in qids], self.agreement.task
        texts = generate([prompt(question, task, self.style) for question in questions], samples)
        answers = [
            parse(t, question, task, self.agreement.max_weight)
            for question, row in zip(questions, texts, strict=True)
            for t in row
        ]
        rows = self.scores([q for q in qids for _ in range(samples)], answers).values()
        malformed = sum(a is None for a in answers) / len(answers)
        return np.stack(list(rows)).reshape(-1, len(qids), samples), malformed

    def predictor(self, qids: Sequence[str]) -> dict[str, Any]:
        """Agreement of the private predictions with the truth: `own`, each group's for itself, and `shared`, their mean
        over groups for everybody. Where the two are alike, the predictor has not learnt how groups differ.
        `pluralllm`: own predictions in PluralLLM's score, 1 - sqrt(JSD in nats) (arXiv 2503.09925), whatever the reward.
        """
        predicted = self.truth.predicted
        shared = {q: np.mean([by[q] for by in predicted.values() if q in by], axis=0) for q in qids}
        answers = [shared[q] for q in qids]
        own = {g: _mean(self.scores(qids, [by[q] for q in qids])[g]) for g, by in predicted.items()}
        everybody = {g: _mean(row) for g, row in self.scores(qids, answers).items()}
        published = {g: _pluralllm(self.truth.groups[g], by, qids) for g, by in predicted.items()}
        return {
            name: _summary({g: m for g, m in means.items() if m is not None})
            for name, means in (("own", own), ("shared", everybody), ("pluralllm", published))
        }

    def _intervals(self, table: np.ndarray) -> dict[str, list[float]]:
        rng = np.random.default_rng([self.seed, 0xB007])
        draws = rng.integers(table.shape[1], size=(self.bootstrap, table.shape[1]))
        means = np.stack([np.nanmean(table[:, d], axis=1) for d in draws])  # (R, G)
        return {
            name: [float(x) for x in np.nanquantile(values, [0.025, 0.975])]
            for name, values in (("avg", means.mean(axis=1)), ("min", means.min(axis=1)))
        }

    def ceilings(self, qids: Sequence[str]) -> dict[str, Any]:
        """Attainable alignment on questions: `avg`, the best average; `min`, the best possible worst group; the other
        score at each; `uniform`, the average of uniform answers; (avg, min) of the objectives `pooled` and
        `question_min` (`appa_secure.ceilings`); `frontier`, pairs of average and worst group from best to best."""
        groups = list(self.truth.groups)
        questions = [self.agreement.questions[q] for q in qids]
        table = {}
        for q in questions:
            missing = np.full(len(q.options), np.nan)
            table[q.qid] = np.array([self.truth.groups[g].get(q.qid, missing) for g in groups])
        found = ceiling(self.agreement.reward, questions, table)
        average, worst = found["avg"], found["min"]
        between = frontier(self.agreement.reward, questions, table, _DIALS)
        return {
            "avg": average["avg"],
            "min": worst["min"],
            "avg_at_min": worst["avg"],
            "min_at_avg": average["min"],
            "uniform": found["uniform"]["avg"],
            **{
                name: {"avg": found[name]["avg"], "min": found[name]["min"]}
                for name in ("pooled", "question_min")
            },
            "frontier": [[one["avg"], one["min"]] for one in between],
        }


def win_rates(scores: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(G,) probability that a sampled answer suits a group better than one of the reference's to the same question.

    Mean over the questions that the group was asked of P(s > r) + P(s = r)/2, over all pairs of samples: 1/2 for a policy
    against itself. scores: (G, Q, S); reference: (G, Q, R); NaN throughout where a group was not asked.
    """
    pairs = zip(scores, reference, strict=True)
    return np.array([0.5 + 0.5 * np.nanmean(np.sign(s[:, :, None] - r[:, None, :])) for s, r in pairs])


def _pluralllm(
    truth: Mapping[str, np.ndarray], predicted: Mapping[str, np.ndarray], qids: Sequence[str]
) -> float | None:
    known = [q for q in qids if q in truth]
    if not known:
        return None
    similar = Scorer("js", truth, dict.fromkeys(truth)).score(known, [predicted[q] for q in known])
    return float(np.mean(1.0 - np.sqrt(np.log(2.0) * (1.0 - similar))))


def _mean(row: np.ndarray) -> float | None:
    known = row[~np.isnan(row)]
    return float(known.mean()) if len(known) else None


def _summary(per_group: dict[str, float]) -> dict[str, Any]:
    values = np.array(list(per_group.values()))
    return {
        "per_group": per_group,
        "avg": float(values.mean()),
        "min": float(values.min()),
        "fairness_index": fairness_index(values),
    }
