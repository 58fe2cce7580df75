"""The survey form: what its constructors refuse, that it prints nothing private, and how it is split."""

import logging
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appa_secure.data.survey import (
    GroupData,
    Question,
    Responses,
    Survey,
    counts_of,
    split_members,
    split_questions,
)
from appa_secure.errors import DataError

Q1 = Question("q1", "First?", ("no", "maybe", "yes"), (1.0, 1.5, 2.0))
Q2 = Question("q2", "Second?", ("left", "right"))


def questions(n: int) -> list[Question]:
    return [Question(f"q{i}", f"Text {i}?", ("a", "b", "c")) for i in range(n)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qid": " "}, "empty qid"),
        ({"text": ""}, "empty text"),
        ({"options": ("a",)}, "1 options"),
        ({"options": tuple("abcdefghijk")}, "11 options"),
        ({"options": ("a", "a")}, "same text"),
        ({"options": ("a", " ")}, "an option is empty"),
        ({"ordinals": (1.0,)}, "1 ordinals for 2 options"),
        ({"ordinals": (2.0, 1.0)}, "ascending"),
        ({"ordinals": (1.0, 1.0)}, "ascending"),
        ({"ordinals": (1.0, float("inf"))}, "finite"),
        ({"ordinals": (float("nan"), 1.0)}, "finite"),
    ],
)
def test_question_refuses(fields: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"qid": "q", "text": "Text?", "options": ("a", "b"), "ordinals": None}
    with pytest.raises(DataError, match=message):
        Question(**{**good, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("counts", "message"),
    [([1.0, -1.0], "negative"), ([np.nan, 1.0], "finite"), ([np.inf, 1.0], "finite"), ([[1.0]], "vector")],
)
def test_group_refuses_bad_counts_and_names_the_place(counts: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        GroupData("Green Hills", {"q7": np.array(counts)})
    assert "q7" in str(caught.value)
    assert "Green Hills" in str(caught.value)


def test_survey_refuses_what_does_not_fit_together() -> None:
    good = GroupData("g", {"q1": np.ones(3), "q2": np.ones(2)})
    Survey("s", (Q1, Q2), (good,))
    bad = {
        "question id 'q1' occurs twice": ((Q1, Q1), (good,)),
        "group name 'g' occurs twice": ((Q1, Q2), (good, good)),
        "'q2' is missing": ((Q1, Q2), (GroupData("g", {"q1": np.ones(3)}),)),
        "another order": ((Q2, Q1), (good,)),
        "2 counts for 3 options": ((Q1, Q2), (GroupData("g", {"q1": np.ones(2), "q2": np.ones(2)}),)),
        "no questions are left": ((), (good,)),
        "no groups": ((Q1, Q2), ()),
    }
    for message, (qs, groups) in bad.items():
        with pytest.raises(DataError, match=message):
            Survey("s", qs, groups)


def test_counts_must_be_the_histogram_of_the_responses() -> None:
    responses = Responses(np.array([5, 5, 6]), np.array([0, 1, 0]), np.array([2, 0, 2]))
    counts = {"q1": np.array([0.0, 0, 2]), "q2": np.array([1.0, 0])}
    Survey("s", (Q1, Q2), (GroupData("g", counts, responses=responses),))
    counts["q2"] = np.array([0.0, 1])
    with pytest.raises(DataError, match="'q2', group 'g'"):
        Survey("s", (Q1, Q2), (GroupData("g", counts, responses=responses),))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([1, 1], [0, 0], [0, 1]), "twice"),
        (([1], [0, 1], [0, 1]), "length"),
        (([1], [-1], [0]), "negative"),
        (([1], [0], [40_000]), "int16"),
        (([1], [0.5], [0]), "int32"),
    ],
)
def test_responses_refuse(columns: tuple[list[float], ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Responses(*(np.array(column) for column in columns))


def test_responses_outside_the_survey_are_refused() -> None:
    for question, option, message in ((2, 0, "beyond"), (1, 2, "'q2', group 'g'.*does not exist")):
        with pytest.raises(DataError, match=message):
            counts_of((Q1, Q2), Responses(np.array([1]), np.array([question]), np.array([option])), "g")


def test_nothing_private_is_printed(caplog: pytest.LogCaptureFixture) -> None:
    responses = Responses(np.full(1, 987654321), np.zeros(1, int), np.array([2]))
    group = GroupData("g", {"q1": np.array([0.0, 0, 1])}, responses=responses)
    large = GroupData("h", {"q1": np.array([123456.0, 234567.0, 1.0])})
    survey = Survey("s", (Q1,), (group, large))
    with caplog.at_level(logging.INFO):
        logging.getLogger("test").info("%s %r %s %r", survey, group, [large], responses)
    for text in (caplog.text, repr(survey), str(large), repr(responses), f"{group}"):
        assert not any(number in text for number in ("987654321", "123456", "234567", "array"))
    copy = pickle.loads(pickle.dumps(large))
    assert np.array_equal(copy.counts["q1"], large.counts["q1"])


def test_counts_cannot_be_changed_from_outside() -> None:
    given_counts = np.ones(3)
    group = GroupData("g", {"q1": given_counts})
    given_counts[0] = 7
    assert group.counts["q1"][0] == 1
    with pytest.raises(ValueError, match="read-only"):
        group.counts["q1"][0] = 2


def test_distribution() -> None:
    group = GroupData("g", {"q1": np.array([1.0, 0, 3]), "q2": np.zeros(2)})
    assert np.array_equal(group.distribution("q1"), [0.25, 0, 0.75])
    assert [group.has(q) for q in ("q1", "q2", "q3")] == [True, False, False]
    for qid in ("q2", "q3"):
        with pytest.raises(DataError, match=f"'{qid}': group 'g' has no answers"):
            group.distribution(qid)


@given(st.integers(1, 60), st.integers(0, 60), st.floats(0, 0.999), st.integers(0, 2**32), st.randoms())
def test_split_is_a_seeded_partition_whatever_the_order(n, context, fraction, seed, random) -> None:
    pool = questions(n)
    try:
        split = split_questions(pool, context, fraction, seed)
    except DataError:
        heldout = max(round(fraction * (n - context)), 1 if fraction > 0 else 0)
        assert n - context - heldout < 1
        return
    parts = split.context + split.train + split.heldout
    assert sorted(parts) == sorted(q.qid for q in pool)
    assert len(split.context) == context
    assert split.train
    assert len(split.heldout) >= (fraction > 0)
    shuffled = random.sample(pool, n)
    again = split_questions(shuffled, context, fraction, seed)
    assert [set(p) for p in (again.context, again.train, again.heldout)] == [
        set(p) for p in (split.context, split.train, split.heldout)
    ]


def test_split_depends_on_the_seed_and_refuses_nonsense() -> None:
    pool = questions(50)
    assert split_questions(pool, 10, 0.2, 1) == split_questions(pool, 10, 0.2, 1)
    assert split_questions(pool, 10, 0.2, 1) != split_questions(pool, 10, 0.2, 2)
    assert len(split_questions(pool, 10, 0.2, 1).heldout) == 8
    for context, fraction in ((-1, 0.2), (50, 0.2), (10, 1.0), (10, -0.1), (10, float("nan"))):
        with pytest.raises(DataError, match="cannot split"):
            split_questions(pool, context, fraction, 1)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=2, max_size=5), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(0, 99),
    st.floats(0, 0.99),
)
def test_members_split_counts_exactly_once(table, members, seed, fraction) -> None:
    counts = {f"q{i}": np.array(row, dtype=float) for i, row in enumerate(table)}
    counts["q0"] = counts["q0"] + fraction  # a nominal count is no whole number
    counts["sure"] = np.array([50.0, 50.0])
    group = GroupData("g", counts, nominal=True)
    parts = split_members(group, members, seed)
    assert len({part.name for part in parts}) == members
    for qid, whole in counts.items():
        pieces = [part.counts[qid] for part in parts]
        assert np.allclose(sum(pieces), whole, rtol=0, atol=1e-9)
        totals = [np.floor(piece).sum() for piece in pieces]
        assert max(totals) - min(totals) <= 1
        assert all((piece >= 0).all() for piece in pieces)
    again = split_members(group, members, seed)
    assert all(np.array_equal(a.counts["sure"], b.counts["sure"]) for a, b in zip(parts, again, strict=True))


def test_members_share_out_people_whole() -> None:
    rng = np.random.default_rng(0)
    asked = np.array([rng.permutation(6)[:4] for _ in range(41)])  # (P, M)
    responses = Responses(np.repeat(np.arange(41), 4), asked.ravel(), rng.integers(0, 3, asked.size))
    pool = questions(6)
    group = GroupData("g", counts_of(pool, responses, "g"), responses=responses)
    parts = split_members(group, 3, seed=5)
    Survey("s", tuple(pool), parts)  # counts are the histogram of each member's responses
    people = [set(part.responses.respondent.tolist()) for part in parts if part.responses is not None]
    assert sorted(map(len, people)) == [13, 14, 14]
    assert set.union(*people) == set(range(41))
    for question in pool:
        assert np.array_equal(sum(p.counts[question.qid] for p in parts), group.counts[question.qid])


def test_too_many_members_are_refused() -> None:
    few = GroupData("g", {"q1": np.array([1.0, 0, 1])})
    with pytest.raises(DataError, match="too few answers for 3 members"):
        split_members(few, 3, 0)
    with pytest.raises(DataError, match="at least 1"):
        split_members(few, 0, 0)
    one = Responses(np.array([1]), np.array([0]), np.array([0]))
    with pytest.raises(DataError, match="fewer respondents"):
        split_members(GroupData("g", {"q1": np.array([1.0, 0, 0])}, responses=one), 2, 0)
