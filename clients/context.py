"""Private histograms: one noisy release of a client's answers, made once and kept at the client.

The predictor is in-context: it reads a group's preferences at every reward query. Computing the context once with the
Gaussian mechanism makes every later use of it post-processing. With `privacy.mechanism=histogram` the training
questions are part of the same release, and training is post-processing too. Histograms still never leave the client,
because whoever holds a group's context can compute that group's rewards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from appa_secure.data import GroupData
from appa_secure.privacy.noise import gaussian, sampler


def private_histograms(
    data: GroupData,
    sizes: Mapping[str, int],
    unit: str,
    answers_per_unit: int,
    noise: float,
    key: bytes,
    label: str,
    question_order: Sequence[str],
) -> tuple[dict[str, np.ndarray], float]:
    """Noisy preference shares of the questions in `sizes`, and the noisy mean number of answers per question.

    sizes: question the group was asked (public) -> number of options K. noise: standard deviation in counts (unit
    record: in shares); one unit moves all counts together by at most `sensitivity.histograms`. label names the release.
    Returns question -> (K,) shares on the simplex; and the mean over questions of the noisy totals, >= 1.
    """
    raw = _bounded_counts(data, sizes, unit, answers_per_unit, key, question_order)
    flat = np.concatenate([raw[q] for q in sizes])
    noisy = flat + gaussian(key, label, len(flat), noise)
    shares, totals, at = {}, [], 0
    for q, k in sizes.items():
        shares[q] = to_simplex(noisy[at : at + k])
        totals.append(noisy[at : at + k].sum())
        at += k
    return shares, max(1.0, float(np.mean(totals)))


def raw_shares(data: GroupData, questions: Iterable[str]) -> dict[str, np.ndarray]:
    """True shares of those of `questions` that the group was asked; for runs without privacy only."""
    return {q: data.distribution(q) for q in questions if data.has(q)}


def to_simplex(counts: np.ndarray) -> np.ndarray:
    """Non-negative part, normalised; uniform where nothing is positive. (K,) -> (K,)."""
    positive = np.maximum(counts, 0.0)
    total = positive.sum()
    return positive / total if total > 0 else np.full(len(counts), 1.0 / len(counts))


def _bounded_counts(
    data: GroupData,
    sizes: Mapping[str, int],
    unit: str,
    answers_per_unit: int,
    key: bytes,
    question_order: Sequence[str],
) -> dict[str, np.ndarray]:
    if unit == "record":
        return {q: data.distribution(q) for q in sizes}
    if unit == "response":
        return {q: data.counts[q] for q in sizes}
    assert data.responses is not None
    counts = {q: np.zeros(k) for q, k in sizes.items()}
    rng = sampler(key, "context-contribution-bound")
    # A random order, then the first `answers_per_unit` answers of each person count and the others do not.
    used: dict[int, set[str]] = {}
    for row in rng.permutation(len(data.responses)):
        person = int(data.responses.respondent[row])
        question = question_order[int(data.responses.question[row])]
        seen = used.setdefault(person, set())
        if question in counts and question not in seen and len(seen) < answers_per_unit:
            seen.add(question)
            counts[question][int(data.responses.option[row])] += 1.0
    return counts
