"""Prompts, answer formats and parsing: round trips, strictness, and no text that makes it raise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appa_secure.data.survey import Question
from appa_secure.tasks import (
    LETTERS,
    STYLES,
    TASKS,
    answer_text,
    completion_length,
    parse,
    prompt,
    random_answer,
)


def question(count: int = 3) -> Question:
    return Question(
        "q", "How much\n do you  trust it?", tuple(f"option {index}" for index in range(count)), None
    )


counts = st.integers(2, 10)
tasks = st.sampled_from(TASKS)


def test_short_prompt_is_one_line_and_letters_only_where_answers_use_them():
    assert (
        prompt(question(), "dpa", "short")
        == "How much do you trust it? | option 0 | option 1 | option 2 = 3 :"
    )
    assert prompt(question(2), "opa", "short") == "How much do you trust it? | A option 0 | B option 1 = 2 :"


def test_instruct_prompt_names_options_count_and_scale():
    text = prompt(question(), "dpa", "instruct")
    assert "C. option 2" in text
    assert "exactly 3 numbers" in text
    assert "0 to 10" in text
    assert text.endswith("Answer:")


@given(tasks, st.sampled_from(STYLES), counts)
def test_every_prompt_shows_every_option(task, style, count):
    text = prompt(question(count), task, style)
    assert all(f"option {index}" in text for index in range(count))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 0 5", [3 / 8, 0, 5 / 8]),
        ("  10\t0 10 \n", [0.5, 0, 0.5]),
        ("0 0 0", None),  # no weight at all
        ("3 0", None),
        ("3 0 5 1", None),
        ("3 0 11", None),
        ("3 0 05", None),
        ("3 0 -5", None),
        ("3 0 5.0", None),
        ("3, 0, 5", None),
        ("3 0 ٥", None),  # an Arabic-Indic digit, for which int() would work
        ("3 0 ²", None),
        ("3 0 5 people", None),
        ("", None),
    ],
)
def test_dpa(text, expected):
    answer = parse(text, question(), "dpa")
    if expected is None:
        assert answer is None
    else:
        np.testing.assert_allclose(answer, expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B A C", [0.5, 1, 0]),
        (" C B A\n", [0, 0.5, 1]),
        ("B A", None),
        ("B A A", None),
        ("B A D", None),
        ("b a c", None),
        ("BAC", None),
        ("B A C A", None),
    ],
)
def test_opa(text, expected):
    answer = parse(text, question(), "opa")
    assert answer is None if expected is None else answer.tolist() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [(" B ", [0, 1, 0]), ("D", None), ("A B", None), ("b", None), ("AB", None), ("", None)],
)
def test_choice(text, expected):
    answer = parse(text, question(), "choice")
    assert answer is None if expected is None else answer.tolist() == expected


loose_text = st.text() | st.text(alphabet="0123456789 ABCDEFGHIJabc\n\t-+.,²٥\x00\x1c", max_size=40)


@settings(max_examples=300)
@given(loose_text, tasks, counts)
def test_no_text_makes_parse_raise_and_what_it_accepts_is_well_formed(text, task, count):
    answer = parse(text, question(count), task)
    if answer is None:
        return
    assert answer.shape == (count,)
    assert answer.dtype == np.float64
    assert ((answer >= 0) & (answer <= 1)).all()
    if task != "opa":
        assert answer.sum() == pytest.approx(1)
    # Whatever is accepted is an answer that could have been written: canonical form parses to the same.
    np.testing.assert_array_equal(parse(" ".join(text.split()), question(count), task), answer)


@given(tasks, counts, st.integers(0, 2**32))
def test_random_answers_parse_and_fit_the_completion_length(task, count, seed):
    text = random_answer(task, count, np.random.default_rng(seed))
    assert parse(text, question(count), task) is not None
    assert completion_length(task, count) == len(text.split()) + 1
    assert completion_length(task, count, 2) == 2 * len(text.split()) + 1


def test_random_weights_use_the_whole_scale_and_survive_an_all_zero_draw():
    rng = np.random.default_rng(0)
    seen = {int(item) for _ in range(200) for item in random_answer("dpa", 4, rng).split()}
    assert seen == set(range(11))

    class Zeros:
        def integers(self, low, high, size):
            return np.zeros(size, dtype=np.int64)

    assert random_answer("dpa", 3, Zeros()) == "1 1 1"


@given(st.permutations(list(range(6))))
def test_ranking_text_keeps_the_order(order):
    text = answer_text(order, "opa")
    assert [LETTERS.index(letter) for letter in text.split()] == order
    answer = parse(text, question(6), "opa")
    assert np.argsort(-answer).tolist() == order


@pytest.mark.parametrize(
    ("values", "task"),
    [([0, 0], "dpa"), ([11, 1], "dpa"), ([-1, 1], "dpa"), ([], "dpa"), ([0, 0], "opa"), ([0, 2], "opa"),
     ([1, 0], "choice"), ([10], "choice")],
)  # fmt: skip
def test_answer_text_refuses_what_would_not_parse(values, task):
    with pytest.raises(ValueError, match=r"."):
        answer_text(values, task)


def test_misuse_is_named():
    with pytest.raises(ValueError, match="task 'vote' is unknown"):
        parse("A", question(), "vote")
    with pytest.raises(ValueError, match=r"task\.style 'chat'"):
        prompt(question(), "dpa", "chat")

    class Wide:
        qid, text, options = "wide", "?", tuple("abcdefghijk")

    with pytest.raises(ValueError, match="'wide' has 11 options"):
        prompt(Wide(), "dpa", "short")
    with pytest.raises(ValueError, match=r"2\.\.10"):
        random_answer("dpa", 11, np.random.default_rng(0))
