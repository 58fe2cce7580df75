"""A seeded generator of a survey population, so that the whole system runs without anyone's data.

Model, one respondent i of group g, one question q made of a topic t and a template (Samejima's graded
response model with a probit link, Psychometrika Monograph 17, 1969):

    x_i = theta_g + v_i,                  v_i ~ N(0, SPREAD^2 I)            position on the value axes, (A,)
    y   = a_t . x_i + b_t + c_template + e,   e ~ N(0, 1)                   latent support
    answer k  iff  tau_k < y <= tau_(k+1)                                   tau fixed by the number of options

The loading a_t is what the topic's text says (``topics.TOPICS``), so an embedding of the text can
generalise to questions never seen. ``conflict`` scales theta; ``minority`` moves the last group away
from the mean of the others.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

import numpy as np
import numpy.typing as npt

from appa_secure.data.survey import FloatArray, GroupData, Question, Responses, Survey, counts_of
from appa_secure.data.topics import AXES, GROUPS, TEMPLATES, TOPICS, Template
from appa_secure.errors import DataError

SPREAD = 0.5  # standard deviation of people within a group, per axis
DISTANCE = 1.6  # length by which conflict=1 scales the written profiles
MINORITY_DISTANCE = 2.0  # how far minority=1 moves the last group, in latent units
JITTER = 0.15  # seeded change of the written profiles, so that seeds give different populations
CROSS_LOADING = 0.15  # standard deviation of a topic's loading on the other axes
POPULARITY = 0.35  # standard deviation of b_t

_NORMAL = NormalDist()


class SyntheticConfig(Protocol):
    """The fields of ``data`` this generator reads."""

    groups: Sequence[str] | None
    group_count: int
    questions: int
    respondents: int
    answers_per_respondent: int
    conflict: float
    minority: float
    min_responses: int


@dataclass(frozen=True)
class Population:
    """Parameters of a generated population: what a survey of infinitely many respondents would show.

    loadings (Q, A), offsets (Q,), positions (G, A).
    """

    questions: tuple[Question, ...]
    names: tuple[str, ...]
    loadings: FloatArray
    offsets: FloatArray
    positions: FloatArray

    def probabilities(self, group: int, question: int) -> FloatArray:
        """Exact share of each option in a group, float64 (K,): the person and error terms integrated out."""
        load = self.loadings[question]
        mean = float(load @ self.positions[group] + self.offsets[question])
        scale = float(np.sqrt(1.0 + SPREAD**2 * (load @ load)))
        cuts = [(cut - mean) / scale for cut in thresholds(len(self.questions[question].options))]
        cdf = np.array([0.0, *(_NORMAL.cdf(cut) for cut in cuts), 1.0])
        return np.diff(cdf)


def thresholds(options: int) -> FloatArray:
    """Cut points tau, float64 (K-1,), ascending: with y ~ N(0, 1.3^2) all options are equally frequent."""
    return np.array([1.3 * _NORMAL.inv_cdf(k / options) for k in range(1, options)])


def available_questions() -> int:
    """How many distinct questions the bank can make."""
    return sum(len(plus) + len(minus) for plus, minus in TOPICS.values()) * len(TEMPLATES)


def load(cfg: SyntheticConfig, seed: int) -> Survey:
    """Generate the survey. Same fields and seed, same bytes. DataError when the fields cannot fit."""
    population = make_population(cfg, seed)
    _check_sampling(cfg)
    groups = []
    for index, name in enumerate(population.names):
        responses = _answer(population, index, cfg, seed)
        counts = counts_of(population.questions, responses, name)
        for qid, values in counts.items():
            if values.sum() < cfg.min_responses:
                raise DataError(
                    f"question {qid!r}, group {name!r}: fewer than data.min_responses={cfg.min_responses} "
                    "answers; raise data.respondents or data.answers_per_respondent, or lower data.questions"
                )
        groups.append(GroupData(name, counts, responses=responses))
    return Survey("synthetic", population.questions, tuple(groups))


def make_population(cfg: SyntheticConfig, seed: int) -> Population:
    """Draw topics, templates and positions. Topics keep their loadings whichever questions are chosen."""
    names = _names(cfg)
    topic_rng, pick_rng = (np.random.default_rng([seed, tag]) for tag in (0x701C, 0x91C4))
    bank: list[tuple[Question, FloatArray, float]] = []
    for axis, name in enumerate(AXES):
        for sign, topics in zip((1.0, -1.0), TOPICS[name], strict=True):
            for number, topic in enumerate(topics):
                load_ = topic_rng.normal(0.0, CROSS_LOADING, len(AXES))
                load_[axis] = sign * topic_rng.uniform(0.8, 1.2)
                offset = float(topic_rng.normal(0.0, POPULARITY))
                stem = f"{name}{'+' if sign > 0 else '-'}{number + 1}"
                bank += [(_question(stem, topic, t), load_, offset + t.shift) for t in TEMPLATES]
    if not 1 <= cfg.questions <= len(bank):
        raise DataError(
            f"data.questions={cfg.questions}: the synthetic bank makes between 1 and {len(bank)} questions"
        )
    chosen = [bank[i] for i in np.sort(pick_rng.permutation(len(bank))[: cfg.questions])]
    return Population(
        questions=tuple(question for question, _, _ in chosen),
        names=names,
        loadings=np.stack([loading for _, loading, _ in chosen]),
        offsets=np.array([offset for _, _, offset in chosen]),
        positions=_positions(names, cfg.conflict, cfg.minority, seed),
    )


def _names(cfg: SyntheticConfig) -> tuple[str, ...]:
    if cfg.groups is not None:
        unknown = [name for name in cfg.groups if name not in GROUPS]
        if unknown or not cfg.groups:
            raise DataError(
                f"data.groups: unknown {unknown}; the synthetic population has {', '.join(GROUPS)}"
            )
        return tuple(cfg.groups)
    if not 1 <= cfg.group_count <= len(GROUPS):
        raise DataError(
            f"data.group_count={cfg.group_count}: the synthetic population has 1 to {len(GROUPS)} groups"
        )
    return tuple(GROUPS)[: cfg.group_count]


def _positions(names: tuple[str, ...], conflict: float, minority: float, seed: int) -> FloatArray:
    if not 0.0 <= conflict <= 1.0:
        raise DataError(f"data.conflict={conflict}: must be in [0, 1]")
    if not 0.0 <= minority <= 1.0:
        raise DataError(f"data.minority={minority}: must be in [0, 1]")
    rows = [np.array(GROUPS[n]) + _group_rng(seed, n, 1).normal(0.0, JITTER, len(AXES)) for n in names]
    profile = np.stack(rows)  # (G, A)
    centered = profile - profile.mean(axis=0)
    positions: FloatArray = conflict * DISTANCE * centered
    if len(names) > 1 and minority > 0:
        away = centered[-1] - centered[:-1].mean(axis=0)
        positions[-1] += minority * MINORITY_DISTANCE * away / max(float(np.linalg.norm(away)), 1e-9)
    return positions


def _question(stem: str, topic: str, template: Template) -> Question:
    text = template.text.format(topic=topic)
    ordinals = tuple(float(k + 1) for k in range(len(template.options)))
    return Question(f"{stem}.{template.name}", text, template.options, ordinals)


def _check_sampling(cfg: SyntheticConfig) -> None:
    if cfg.respondents < 1:
        raise DataError(f"data.respondents={cfg.respondents}: must be at least 1 per group")
    if not 1 <= cfg.answers_per_respondent <= cfg.questions:
        raise DataError(
            f"data.answers_per_respondent={cfg.answers_per_respondent}: must be between 1 and "
            f"data.questions={cfg.questions}"
        )


def _answer(population: Population, group: int, cfg: SyntheticConfig, seed: int) -> Responses:
    rng = _group_rng(seed, population.names[group], 2)
    people, each, total = cfg.respondents, cfg.answers_per_respondent, cfg.questions
    asked = _assign(rng, people, each, total)  # (P, M)
    values = population.positions[group] + rng.normal(0.0, SPREAD, (people, len(AXES)))  # (P, A)
    latent = np.einsum("pma,pa->pm", population.loadings[asked], values)
    latent += population.offsets[asked] + rng.normal(0.0, 1.0, asked.shape)  # (P, M)
    option = np.empty(asked.shape, dtype=np.int16)
    sizes = np.array([len(question.options) for question in population.questions])[asked]
    for size in np.unique(sizes):
        here = sizes == size
        option[here] = np.searchsorted(thresholds(int(size)), latent[here])
    # Ids are unique across groups, so that pooled files stay valid.
    base = zlib.crc32(population.names[group].encode()) * 10**6
    respondent = np.repeat(base + np.arange(people, dtype=np.int64), each)
    return Responses(respondent, asked.ravel().astype(np.int32), option.ravel())


def _assign(rng: np.random.Generator, people: int, each: int, total: int) -> npt.NDArray[np.int64]:
    """Which questions each person is asked, (P, M): distinct per person, nearly balanced over questions."""
    per_deal = total // each
    deals = -(-people // per_deal)
    rows = [rng.permutation(total)[: per_deal * each].reshape(per_deal, each) for _ in range(deals)]
    return np.concatenate(rows)[:people]


def _group_rng(seed: int, name: str, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, zlib.crc32(name.encode())])
