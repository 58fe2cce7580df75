"""What any policy can reach at best on given questions, when the groups' true distributions are known.

Alignment of group g: AS_g = mean, over the questions g has answers to, of the reward of the answer against
g's distribution. `ceiling` optimises the answers (all distributions for `dpa`, all rankings for `opa`, all
options for `choice`) for

  - `avg`: mean over groups of AS_g (the objective of average aggregation);
  - `min`: min over groups of AS_g, the best possible worst group (maximin over groups, not over questions);
  - `question_min`: mean over questions of the worst group's reward (the objective of min aggregation).

A policy that randomises its answers is covered: its expected reward is bounded by the same optima, since the
first is reached by one answer per question and the second is a game whose value includes mixtures.

Methods. For given group weights the best answer is known per question: Wasserstein: the weighted median of
the CDFs; JS, KL: a monotone fixed-point iteration whose distance from the optimum is certified by the
Frank-Wolfe gap of a concave function; cosine: the weighted mean of the unit vectors; `opa`, `choice`:
enumeration. The maximin over groups follows by column generation (Kelley's cutting planes on the dual): every
set of weights gives an upper bound, the best mixture of the answers found so far a lower one, until the two
meet. For Wasserstein it is one linear program over CDFs instead, exact, and so is `question_min`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from appa_secure.ceilings.answers import TOLERANCE, Answers, Floats, Table
from appa_secure.ceilings.programs import cdf_program, matrix_game
from appa_secure.errors import DataError
from appa_secure.rewards import task_of

if TYPE_CHECKING:
    from appa_secure.data.survey import Question, Survey

__all__ = ["ceiling", "frontier", "group_distributions", "share_of_gain"]

MAX_RANKED = 6  # 720 rankings of a question's options; beyond, ceilings of rankings are not computed
_MAX_COLUMNS = 300


def ceiling(
    kind: str, questions: Sequence[Question], distributions: Mapping[str, ArrayLike]
) -> dict[str, dict[str, Any] | None]:
    """Attainable alignment under each objective.

    Args:
        kind: a reward kind of `appa_secure.rewards`.
        questions: the questions to average over; `wasserstein` needs their ordinals.
        distributions: question id -> (G, K) true distributions, the same groups in the same order for all; a
            row of NaN where a group has no answers to the question.

    Returns:
        A dict with the keys `avg`, `min`, `question_min` (the objectives above), `mean` (answering the mean
        of the groups' distributions; None for rankings and choices) and `uniform` (answering uniformly; for
        rankings and choices a uniformly random answer). Each value is None where unknown, or a dict of `avg`,
        `min` (Avg AS and Min AS reached), `per_group` (list of AS_g), and `upper`, a proven upper bound on
        that objective (None where nothing is optimised). `min` also has `weights`, the group weights (summing
        to 1) that prove the bound. Unknown: everything for rankings of more than six options; `question_min`
        for js, cosine and kl.

        An objective's optimum is unique, the answers that reach it are not, and with them the other figures
        of its entry: for Wasserstein `avg` takes the lower median, and `min` and `question_min` the answers
        with the largest Avg AS; elsewhere it is one of them. For cosine, rankings and choices `min` may need
        answers chosen at random.

    Raises:
        DataError: no questions, a question without distributions or ordinals, differing numbers of groups.
    """
    if not questions:
        raise DataError("ceilings need at least one question")
    task = task_of(kind)
    game: Answers | Table
    if task == "dpa":
        game = Answers(kind, questions, distributions)
    else:
        if task == "opa" and max(len(question.options) for question in questions) > MAX_RANKED:
            return {"avg": None, "min": None, "question_min": None, "mean": None, "uniform": None}
        game = Table(kind, questions, distributions)
    equal = np.full(game.groups, 1.0 / game.groups)
    _, best, gap = game.respond(equal)
    result: dict[str, dict[str, Any] | None] = {"avg": _entry(best, float(best.mean()) + gap)}
    if isinstance(game, Answers):
        result["min"] = _cdf_maximin(game) if kind == "wasserstein" else _maximin(game)
        result["question_min"] = _cdf_question_min(game) if kind == "wasserstein" else None
        result["mean"] = _entry(game.alignment(game.mixed((game.share > 0).astype(np.float64))))
        result["uniform"] = _entry(game.alignment(game.mask / game.mask.sum(axis=1, keepdims=True)))
    else:
        result["min"] = _maximin(game)
        result["question_min"] = _entry(*game.question_min())
        result["mean"] = None
        result["uniform"] = _entry(game.uniform())
    return result


def frontier(
    kind: str,
    questions: Sequence[Question],
    distributions: Mapping[str, ArrayLike],
    dials: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0),
) -> list[dict[str, Any]] | None:
    """The attainable frontier between Avg AS and Min AS: the best (1-dial)·Avg + dial·Min for each dial.

    The attainable pairs are convex, so these are supporting points and no policy lies beyond the polygon of their
    tangents. Exact for Wasserstein by a linear programme; for the others certified to `TOLERANCE` by column
    generation, as in `ceiling`, over the groups' payoffs (1-dial)·mean + dial·AS_g.

    Returns:
        For each dial an entry as of `ceiling`, with `dial`, and `upper` a proven bound on (1-dial)·Avg + dial·Min;
        None for rankings of more than six options.
    """
    if not questions:
        raise DataError("a frontier needs at least one question")
    if any(not 0.0 <= dial <= 1.0 for dial in dials):
        raise DataError(f"dials must lie in [0, 1], got {list(dials)}")
    task = task_of(kind)
    if task == "opa" and max(len(question.options) for question in questions) > MAX_RANKED:
        return None
    make = Answers if task == "dpa" else Table
    game = make(kind, questions, distributions)
    found = []
    for dial in dials:
        if dial == 0.0:
            _, best, gap = game.respond(np.full(game.groups, 1.0 / game.groups))
            entry = _entry(best, float(best.mean()) + gap)
        else:
            entry = _cdf_maximin(game, dial) if kind == "wasserstein" else _maximin(game, dial)  # type: ignore[arg-type]
        found.append({"dial": dial, **entry})
    return found


def share_of_gain(value: float, average: float | None, best: float | None) -> float | None:
    """How much of what a fair rule can gain for the worst group over the average objective was reached; None if nothing.

    value: Min AS reached; average: Min AS at the best average; best: the best possible Min AS.
    """
    if average is None or best is None or best - average < TOLERANCE:
        return None
    return (value - average) / (best - average)


def group_distributions(survey: Survey, qids: Sequence[str]) -> dict[str, Floats]:
    """The survey's true distributions for `ceiling`: question id -> (G, K), groups in survey order."""
    return {
        qid: np.array(
            [
                group.distribution(qid) if group.has(qid) else np.full(len(group.counts[qid]), np.nan)
                for group in survey.groups
            ]
        )
        for qid in qids
    }


def _maximin(game: Answers | Table, dial: float = 1.0) -> dict[str, Any]:
    """max over (mixtures of) answers of (1-dial)·mean AS + dial·min_g AS_g, by column generation to `TOLERANCE`."""
    equal = np.full(game.groups, 1.0 / game.groups)
    weights = equal
    columns: list[Floats] = []  # AS (G,) of each answer found
    answers: list[Floats] = []
    upper, proof = np.inf, weights
    for _ in range(_MAX_COLUMNS):
        answer, reached, gap = game.respond(weights)
        columns.append(reached)
        answers.append(answer)
        bound = float(weights @ reached) + gap
        if bound < upper:
            upper, proof = bound, weights
        payoffs = (1.0 - dial) * np.mean(columns, axis=1, keepdims=True) + dial * np.array(columns)
        mixture, lower, weights = matrix_game(payoffs)
        weights = (1.0 - dial) * equal + dial * weights
        if upper - lower < TOLERANCE:
            break
    per_group = mixture @ np.array(columns)
    if isinstance(game, Answers) and game.kind in (
        "js",
        "kl",
    ):  # concave: one averaged answer is at least as good
        per_group = game.alignment(np.tensordot(mixture, np.array(answers), axes=1))
    return _entry(per_group, upper) | {"weights": proof.tolist()}


def _cdf_maximin(game: Answers, dial: float = 1.0) -> dict[str, Any]:
    """max (1-dial)·mean AS + dial·t, t ≤ AS_g for every group, over the answers' CDFs: an exact linear program."""
    answers, value, weights = cdf_program(game, np.zeros(len(game.share), dtype=np.int64), game.share, dial)
    weights = (1.0 - dial) / game.groups + dial * weights
    return _entry(game.alignment(answers), value) | {"weights": weights.tolist()}


def _cdf_question_min(game: Answers) -> dict[str, Any]:
    """max Σ_q t_q, t_q ≤ reward of every group on question q."""
    answers, value, _ = cdf_program(game, np.arange(len(game.share)), (game.share > 0).astype(np.float64))
    return _entry(game.alignment(answers), value)


def _entry(per_group: Floats, upper: float | None = None) -> dict[str, Any]:
    return {
        "avg": float(per_group.mean()),
        "min": float(per_group.min()),
        "per_group": per_group.tolist(),
        "upper": upper,
    }
