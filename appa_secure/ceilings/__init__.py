"""What any policy can reach at best on given questions, when the groups' true distributions are known.

Alignment of group g: AS_g = mean, over the questions g has answers to, of the reward of the answer against
g's distribution. `ceiling` optimises the answers (all distributions for `dpa`, all rankings for `opa`, all
options for `choice`) for

  - `avg`: mean over groups of AS_g;
  - `pooled`: mean over questions of the mean reward of the groups that were asked, the objective of average
    aggregation; the same as `avg` where every group was asked every question, otherwise not;
  - `min`: min over groups of AS_g, the best possible worst group (maximin over groups, not over questions);
  - `question_min`: mean over questions of the worst group's reward (the objective of min aggregation).

A policy that randomises its answers is covered: its expected reward is bounded by the same optima, since the
first is reached by one answer per question and the second is a game whose value includes mixtures.

Methods. For given group weights the best answer is known per question: Wasserstein: the weighted median of
the CDFs; JS, KL: a monotone fixed-point iteration whose distance from the optimum is certified by the
Frank-Wolfe gap of a concave function; cosine: the weighted mean of the unit vectors; `opa`, `choice`:
enumeration, and for rankings of more than six options a dynamic program over subsets of them, which is exact too
(their minimum per question is an integer program). The maximin over groups follows by column generation (Kelley's
cutting planes on the dual): every set of weights gives an upper bound, the best mixture of the answers found so far
a lower one, until the two meet. The minimum per question is the same game on each question alone. For Wasserstein
both are one linear program over CDFs instead, exact. Rewards of distributions are concave in the answer (1 - JSD, and
exp(-KL) as a geometric mean; cosine in the answer scaled to length 1, where it is linear and the unit ball is
convex), so a mixture is never better than one averaged answer, and that answer is what is reported.

A ceiling is one of the questions it was computed on, with their true answers known. A policy cannot be expected to
reach that of held-out questions by learning from others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from appa_secure.ceilings.answers import TOLERANCE, Answers, Floats, Table
from appa_secure.ceilings.programs import cdf_program, matrix_game, matrix_games
from appa_secure.errors import DataError
from appa_secure.rewards import task_of

if TYPE_CHECKING:
    from appa_secure.data.survey import Question, Survey

__all__ = ["ceiling", "frontier", "group_distributions", "share_of_gain"]

_MAX_COLUMNS = 300


def ceiling(
    kind: str, questions: Sequence[Question], distributions: Mapping[str, ArrayLike]
) -> dict[str, dict[str, Any]]:
    """Attainable alignment under each objective.

    Args:
        kind: a reward kind of `appa_secure.rewards`.
        questions: the questions to average over; `wasserstein` needs their ordinals.
        distributions: question id -> (G, K) true distributions, the same groups in the same order for all; a
            row of NaN where a group has no answers to the question.

    Returns:
        A dict with the keys `avg`, `pooled`, `min`, `question_min` (the objectives above), `mean` (answering the mean
        of the groups' distributions; not for rankings and choices) and `uniform` (answering uniformly; for
        rankings and choices a uniformly random answer). Each is a dict of `avg`, `min` (Avg AS and Min
        AS reached), `per_group` (list of AS_g), and `upper`, a proven upper bound on that objective (None where
        nothing is optimised). `min` also has `weights`, the group weights (summing
        to 1) that prove the bound; `pooled` and `question_min` also `reached`, their objective's value, which
        is no mean of AS.

        An objective's optimum is unique, the answers that reach it are not, and with them the other figures
        of its entry: for Wasserstein `avg` takes the lower median, and `min` and `question_min` the answers
        with the largest Avg AS; elsewhere it is one of them. For rankings and choices `min` may need answers
        chosen at random.

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
        game = Table(kind, questions, distributions)
    equal = np.full(game.groups, 1.0 / game.groups)
    _, best, gap = game.respond(equal)
    result = {"avg": _entry(best, float(best.mean()) + gap), "pooled": _pooled(game)}
    if isinstance(game, Answers):
        result["min"] = _cdf_maximin(game) if kind == "wasserstein" else _maximin(game)
        result["question_min"] = _cdf_question_min(game) if kind == "wasserstein" else _question_min(game)
        result["mean"] = _entry(game.alignment(game.mixed((game.share > 0).astype(np.float64))))
        result["uniform"] = _entry(game.alignment(game.mask / game.mask.sum(axis=1, keepdims=True)))
    else:
        result["min"] = _maximin(game)
        result["question_min"] = _listed_question_min(game)
        result["uniform"] = _entry(game.alignment(game.uniform()))
    return result


def frontier(
    kind: str,
    questions: Sequence[Question],
    distributions: Mapping[str, ArrayLike],
    dials: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0),
) -> list[dict[str, Any]]:
    """The attainable frontier between Avg AS and Min AS: the best (1-dial)·Avg + dial·Min for each dial.

    The attainable pairs are convex, so these are supporting points and no policy lies beyond the polygon of their
    tangents. Exact for Wasserstein by a linear programme; for the others certified to `TOLERANCE` by column
    generation, as in `ceiling`, over the groups' payoffs (1-dial)·mean + dial·AS_g.

    Returns:
        For each dial an entry as of `ceiling`, with `dial`, and `upper` a proven bound on (1-dial)·Avg + dial·Min.
    """
    if not questions:
        raise DataError("a frontier needs at least one question")
    if any(not 0.0 <= dial <= 1.0 for dial in dials):
        raise DataError(f"dials must lie in [0, 1], got {list(dials)}")
    task = task_of(kind)
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


def share_of_gain(value: float, average: float, best: float) -> float | None:
    """How much of what a fair rule can gain for the worst group over the average objective was reached; None if nothing.

    value: Min AS reached; average: Min AS at the best average; best: the best possible Min AS.
    """
    if best - average < TOLERANCE:
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
    if isinstance(game, Answers):  # one answer is at least as good as drawing among several
        everywhere = np.repeat(mixture[:, None], len(game.share), axis=1)
        per_group = game.alignment(game.averaged(everywhere, np.array(answers)))
    return _entry(per_group, upper) | {"weights": proof.tolist()}


def _question_min(game: Answers) -> dict[str, Any]:
    """max over answers of the worst group's reward, each question for itself, by column generation side by side.

    Per question: weights of the groups give an upper bound by their best answer, the average of the answers found so
    far gives a lower one; the mean over questions of the gap is at most `TOLERANCE` unless columns run out.
    """
    counted = game.share > 0
    weights = counted / counted.sum(axis=1, keepdims=True)  # (Q, G)
    found, columns = [], []
    upper, lower = np.full(len(counted), np.inf), np.full(len(counted), -np.inf)
    chosen = np.zeros(game.mask.shape)
    while True:
        answers, gap = game.best(weights)
        found.append(answers)
        columns.append(game.rewards(answers))
        upper = np.minimum(upper, (weights * columns[-1]).sum(axis=1) + gap)
        mixture, _, weights = matrix_games(np.array(columns), counted)
        one = game.averaged(mixture, np.array(found))
        worst = np.where(counted, game.rewards(one), np.inf).min(axis=1)
        chosen = np.where((worst > lower)[:, None], one, chosen)
        lower = np.maximum(lower, worst)
        if float(np.mean(upper - lower)) < TOLERANCE or len(found) == _MAX_COLUMNS:
            return _objective(game.alignment(chosen), float(lower.mean()), float(upper.mean()))


def _cdf_maximin(game: Answers, dial: float = 1.0) -> dict[str, Any]:
    """max (1-dial)·mean AS + dial·t, t ≤ AS_g for every group, over the answers' CDFs: an exact linear program."""
    answers, value, weights = cdf_program(game, np.zeros(len(game.share), dtype=np.int64), game.share, dial)
    weights = (1.0 - dial) / game.groups + dial * weights
    return _entry(game.alignment(answers), value) | {"weights": weights.tolist()}


def _cdf_question_min(game: Answers) -> dict[str, Any]:
    """max Σ_q t_q, t_q ≤ reward of every group on question q."""
    counted = game.share > 0
    answers, value, _ = cdf_program(game, np.arange(len(counted)), counted.astype(np.float64))
    reached = np.where(counted, game.rewards(answers), np.inf).min(axis=1)
    return _objective(game.alignment(answers), float(reached.mean()), value)


def _listed_question_min(game: Table) -> dict[str, Any]:
    """A single answer to each question; it is its own bound."""
    answers = game.best_worst()
    reached = float(np.where(game.share > 0, answers, np.inf).min(axis=1).mean())
    return _objective(game.alignment(answers), reached, reached)


def _pooled(game: Answers | Table) -> dict[str, Any]:
    """Each question's best answer for those who were asked, all of them alike."""
    asked = game.share > 0
    weights = asked / asked.sum(axis=1, keepdims=True)
    answers, gap = game.best(weights)
    reached = float((weights * game.rewards(answers)).sum(axis=1).mean())
    return _objective(game.alignment(answers), reached, reached + float(gap.mean()))


def _objective(per_group: Floats, reached: float, upper: float) -> dict[str, Any]:
    return _entry(per_group, upper) | {"reached": reached}


def _entry(per_group: Floats, upper: float | None = None) -> dict[str, Any]:
    return {
        "avg": float(per_group.mean()),
        "min": float(per_group.min()),
        "per_group": per_group.tolist(),
        "upper": upper,
    }
