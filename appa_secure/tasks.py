"""What the policy is asked and how its answer is read: prompts, answer formats, parsing.

Three tasks (APPA, arXiv 2604.04261, section on tasks; the answer formats are this project's own):

| task     | the policy writes                      | example, K = 3 | parsed to float64 (K,)              |
|----------|----------------------------------------|----------------|-------------------------------------|
| `dpa`    | K whole numbers 0..10, one above 0     | `3 0 5`        | a distribution: numbers / their sum |
| `opa`    | every option letter once, best first   | `B A C`        | places: 1 for the best .. 0 last    |
| `choice` | one option letter                      | `B`            | one-hot                             |

Letters and digits are plain ASCII, items are separated by whitespace, and whitespace around the answer is
ignored. Anything else is malformed: `parse` returns None and never raises, whatever the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from appa_secure.data.survey import Question

TASKS = ("dpa", "opa", "choice")
STYLES = ("short", "instruct")
LETTERS = "ABCDEFGHIJ"
MAX_OPTIONS = len(LETTERS)
MAX_WEIGHT = 10

_WEIGHTS = {str(weight): weight for weight in range(10_000)}

_INSTRUCTIONS = {
    "dpa": (
        "Estimate how a population divides over these options. Give each option, in the order shown, a whole "
        f"number from 0 to {MAX_WEIGHT}; a larger number means that more people choose it. "
        "Reply with exactly {count} numbers separated by spaces and nothing else."
    ),
    "opa": (
        "Rank these options from the most to the least chosen by a population. "
        "Reply with all {count} letters, each once, separated by spaces, and nothing else."
    ),
    "choice": "Which option does the population prefer? Reply with one letter and nothing else.",
}


def prompt(question: Question, task: str, style: str) -> str:
    """The text the policy continues.

    Args:
        question: 2..10 options, in their natural order where they have one.
        task: one of `TASKS`.
        style: `short`, one line for small models ("text | option | option = 2 :"); `instruct`, a readable
            instruction for real language models.

    Raises:
        ValueError: unknown task or style, or a number of options that cannot be lettered.
    """
    _check_task(task)
    count = len(question.options)
    if not 2 <= count <= MAX_OPTIONS:
        raise ValueError(
            f"question {question.qid!r} has {count} options; prompts take 2..{MAX_OPTIONS}: "
            "merge options or leave the question out"
        )
    text = _one_line(question.text)
    options = [_one_line(option) for option in question.options]
    if style == "short":
        if task != "dpa":  # the answer names letters, so the prompt shows them
            options = [f"{letter} {option}" for letter, option in zip(LETTERS, options, strict=False)]
        # A small model follows a stated number of items sooner than it learns to count the options.
        return " | ".join([text, *options]) + f" = {1 if task == 'choice' else count} :"
    if style == "instruct":
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        return f"Question: {text}\nOptions:\n{listed}\n{_INSTRUCTIONS[task].format(count=count)}\nAnswer:"
    raise ValueError(f"task.style {style!r} is unknown; choose one of {', '.join(STYLES)}")


def parse(text: str, question: Question, task: str, max_weight: int = MAX_WEIGHT) -> np.ndarray | None:
    """Read a completion; see the module's table. max_weight: the largest weight of a `dpa` answer.

    Returns:
        float64 (K,), K = len(question.options), or None when the text is not exactly an answer.

    Raises:
        ValueError: unknown task (a programming error). No text makes it raise.
    """
    _check_task(task)
    count = len(question.options)
    items = text.split()
    if task == "dpa":
        if len(items) != count:
            return None
        try:
            weights = [_WEIGHTS[item] for item in items]
        except KeyError:
            return None
        total = sum(weights)
        return np.array(weights, dtype=np.float64) / total if total and max(weights) <= max_weight else None
    letters = LETTERS[:count]
    if any(len(item) != 1 or item not in letters for item in items):
        return None
    if task == "choice":
        if len(items) != 1:
            return None
        answer = np.zeros(count)
        answer[letters.index(items[0])] = 1.0
        return answer
    if len(items) != count or len(set(items)) != count:
        return None
    answer = np.zeros(count)
    for place, item in enumerate(items):
        answer[letters.index(item)] = (count - 1 - place) / max(count - 1, 1)
    return answer


def answer_text(values: Sequence[int], task: str, max_weight: int = MAX_WEIGHT) -> str:
    """Write an answer in the format `parse` reads with this largest weight.

    Args:
        values: `dpa`: K weights 0..max_weight, one above 0; `opa`: option indices, best first; `choice`: one index.

    Raises:
        ValueError: values that would not parse.
    """
    _check_task(task)
    numbers = [int(value) for value in values]
    if task == "dpa":
        if not numbers or any(not 0 <= n <= max_weight for n in numbers) or not any(numbers):
            raise ValueError(f"weights must be whole numbers 0..{max_weight}, one above 0; got {numbers}")
        return " ".join(str(n) for n in numbers)
    if any(not 0 <= n < MAX_OPTIONS for n in numbers):
        raise ValueError(f"option indices must lie in 0..{MAX_OPTIONS - 1}; got {numbers}")
    if task == "opa" and sorted(numbers) != list(range(len(numbers))):
        raise ValueError(f"a ranking names every option index 0..K-1 once; got {numbers}")
    if task == "choice" and len(numbers) != 1:
        raise ValueError(f"a choice names one option index; got {numbers}")
    return " ".join(LETTERS[n] for n in numbers)


def random_answer(task: str, count: int, rng: np.random.Generator) -> str:
    """A well-formed answer that carries no preference, for format warm-up text.

    Uniform over rankings (`opa`) and options (`choice`). For `dpa` the weights are uniform on 0..10, except
    that an all-zero draw becomes all ones.

    Args:
        count: number of options K, 2..10.
    """
    _check_task(task)
    if not 2 <= count <= MAX_OPTIONS:
        raise ValueError(f"count must lie in 2..{MAX_OPTIONS}, got {count}")
    if task == "dpa":
        weights = rng.integers(0, MAX_WEIGHT + 1, size=count)
        return answer_text(weights.tolist() if weights.any() else [1] * count, task)
    if task == "opa":
        return answer_text(rng.permutation(count).tolist(), task)
    return answer_text([int(rng.integers(count))], task)


def completion_length(task: str, count: int, tokens_per_item: int = 1) -> int:
    """How many new tokens a completion needs: the items of an answer, and one for end-of-text.

    Args:
        count: number of options K.
        tokens_per_item: tokens of one number or letter with the space before it: 1 for a word-level
            tokenizer, 2 or 3 for a sub-word or byte one.
    """
    _check_task(task)
    return (1 if task == "choice" else count) * tokens_per_item + 1


def _check_task(task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; choose one of {', '.join(TASKS)}")


def _one_line(text: str) -> str:
    return " ".join(text.split())
