"""The generated population: seeded, true to its model, conflicting as dialled, with meaningful text."""

from types import SimpleNamespace

import numpy as np
import pytest

from appa_secure.data import load, topics
from appa_secure.data.synthetic import MINORITY_DISTANCE, available_questions, make_population, thresholds
from appa_secure.errors import DataError


def config(**changes: object) -> SimpleNamespace:
    fields = {
        "kind": "synthetic", "path": None, "groups": None, "group_count": 4, "questions": 40,
        "respondents": 200, "answers_per_respondent": 10, "conflict": 0.6, "minority": 0.0,
        "min_responses": 20,
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


def test_same_seed_same_survey_other_seed_another() -> None:
    first, again, other = load(config(), 3), load(config(), 3), load(config(), 4)
    assert first.questions == again.questions
    for a, b in zip(first.groups, again.groups, strict=True):
        assert all(np.array_equal(a.counts[q.qid], b.counts[q.qid]) for q in first.questions)
    assert first.questions != other.questions


def test_every_person_answers_the_asked_number_of_distinct_questions() -> None:
    survey = load(config(), 1)
    seen: set[int] = set()
    for group in survey.groups:
        assert group.responses is not None
        people, answers = np.unique(group.responses.respondent, return_counts=True)
        assert len(people) == 200
        assert set(answers) == {10}
        assert not seen & set(people.tolist())
        seen |= set(people.tolist())
        totals = [group.counts[q.qid].sum() for q in survey.questions]
        assert sum(totals) == 2000
        assert max(totals) - min(totals) <= 25  # nearly balanced over questions


def test_answers_follow_the_response_model() -> None:
    """The closed form of `probabilities` is the oracle: frequencies agree within sampling error."""
    cfg = config(questions=12, respondents=6000, answers_per_respondent=12, group_count=3, conflict=1.0)
    survey, population = load(cfg, 7), make_population(cfg, 7)
    for g, group in enumerate(survey.groups):
        for q, question in enumerate(survey.questions):
            expected = population.probabilities(g, q)
            assert expected.sum() == pytest.approx(1)
            assert np.abs(group.distribution(question.qid) - expected).max() < 5 * 0.5 / np.sqrt(6000)


def test_model_formula_against_simulation_written_out() -> None:
    population = make_population(config(), 2)
    rng = np.random.default_rng(0)
    people = population.positions[1] + rng.normal(0, 0.5, (200_000, 4))
    latent = people @ population.loadings[5] + population.offsets[5] + rng.normal(0, 1, 200_000)
    cuts = thresholds(len(population.questions[5].options))
    counts = [(latent <= cut).mean() for cut in cuts]
    assert np.allclose(np.cumsum(population.probabilities(1, 5))[:-1], counts, atol=0.006)


def test_conflict_scales_the_distance_between_groups() -> None:
    def spread(conflict: float) -> float:
        positions = make_population(config(conflict=conflict, group_count=8), 1).positions
        return float(np.linalg.norm(positions - positions.mean(axis=0)))

    assert spread(0.0) == pytest.approx(0)
    assert spread(1.0) == pytest.approx(2 * spread(0.5))
    still = load(config(conflict=0.0, respondents=1500, min_responses=1), 1)
    shares = np.array([[g.distribution(q.qid)[0] for q in still.questions] for g in still.groups])
    assert np.ptp(shares, axis=0).max() < 0.15  # groups differ by chance only


def test_minority_moves_the_last_group_away_from_the_others() -> None:
    near, far = (make_population(config(minority=m), 1).positions for m in (0.0, 1.0))
    assert np.array_equal(near[:-1], far[:-1])
    gap = [np.linalg.norm(p[-1] - p[:-1].mean(axis=0)) for p in (near, far)]
    assert gap[1] == pytest.approx(gap[0] + MINORITY_DISTANCE)


def test_bank_has_enough_distinct_questions_in_plain_english() -> None:
    total = available_questions()
    assert total >= 200
    population = make_population(config(questions=total), 1)
    texts = [question.text for question in population.questions]
    assert len(set(texts)) == total
    assert all(text[0].isupper() and "{" not in text and text.endswith(("?", ".")) for text in texts)
    assert all(
        3 <= len(q.options) <= 5 and q.ordinals == tuple(range(1, len(q.options) + 1))
        for q in population.questions
    )
    with pytest.raises(DataError, match=f"between 1 and {total}"):
        make_population(config(questions=total + 1), 1)


def test_a_topic_keeps_its_meaning_across_templates_and_surveys() -> None:
    """Questions on one topic share their loading, and the sign is what the bank says."""
    population = make_population(config(questions=available_questions()), 1)
    by_topic: dict[str, list[int]] = {}
    for index, question in enumerate(population.questions):
        by_topic.setdefault(question.qid.split(".")[0], []).append(index)
    for stem, indices in by_topic.items():
        axis = next(i for i, name in enumerate(topics.AXES) if stem.startswith(name))
        assert len({population.loadings[i].tobytes() for i in indices}) == 1
        assert np.sign(population.loadings[indices[0], axis]) == (1 if "+" in stem else -1)
    few = make_population(config(questions=20), 1)
    whole = {q.qid: i for i, q in enumerate(population.questions)}
    for i, question in enumerate(few.questions):
        assert np.array_equal(few.loadings[i], population.loadings[whole[question.qid]])


def test_groups_can_be_named_and_are_the_same_people_beside_others() -> None:
    names = ["Wine Hills", "Border Counties"]
    survey = load(config(groups=names), 1)
    assert [group.name for group in survey.groups] == names


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"groups": ["Atlantis"]}, "data.groups"),
        ({"groups": []}, "data.groups"),
        ({"group_count": 99}, "data.group_count"),
        ({"questions": 0}, "data.questions"),
        ({"conflict": 1.5}, "data.conflict"),
        ({"minority": -0.1}, "data.minority"),
        ({"respondents": 0}, "data.respondents"),
        ({"answers_per_respondent": 41}, "data.answers_per_respondent"),
        ({"min_responses": 1000}, "data.min_responses"),
    ],
)
def test_impossible_fields_are_named(changes: dict[str, object], field: str) -> None:
    with pytest.raises(DataError, match=field):
        load(config(**changes), 1)
