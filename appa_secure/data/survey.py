"""The one internal form of survey data: questions, per-group counts, respondents where known.

Everything in :class:`GroupData` is private to its group: counts and responses never leave an
institution, and their ``repr`` shows none of them, so that a stray log line or traceback cannot leak
them. :class:`Question` is public.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from appa_secure.errors import DataError

FloatArray = npt.NDArray[np.float64]

#: The tasks name options by the letters A..J, and a policy's answer carries one number per option.
MAX_OPTIONS = 10


@dataclass(frozen=True)
class Question:
    """A question and its K options, 2 <= K <= 10, ordered by ordinal where ordinals exist.

    ``ordinals`` are strictly ascending positions of the options on the question's scale, in the units
    of its source (an "about right" option may lie at 1.5); None marks a nominal question.
    """

    qid: str
    text: str
    options: tuple[str, ...]
    ordinals: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.qid.strip():
            raise DataError("question with an empty qid: give every question an identifier of its own")
        if not self.text.strip():
            raise DataError(f"question {self.qid!r}: empty text")
        object.__setattr__(self, "options", tuple(self.options))
        count = len(self.options)
        if not 2 <= count <= MAX_OPTIONS:
            raise DataError(f"question {self.qid!r}: {count} options; 2 to {MAX_OPTIONS} are supported")
        if any(not option.strip() for option in self.options):
            raise DataError(f"question {self.qid!r}: an option is empty")
        if len(set(self.options)) != count:
            raise DataError(f"question {self.qid!r}: two options have the same text")
        if self.ordinals is None:
            return
        values = tuple(float(value) for value in self.ordinals)
        if len(values) != count:
            raise DataError(f"question {self.qid!r}: {len(values)} ordinals for {count} options")
        if not np.isfinite(values).all() or (np.diff(values) <= 0).any():
            raise DataError(f"question {self.qid!r}: ordinals {values} must be finite and ascending")
        object.__setattr__(self, "ordinals", values)


@dataclass(frozen=True, eq=False, repr=False)
class Responses:
    """One row per answer: respondent ids int64 (N,), question index int32 (N,), option index int16 (N,).

    ``question`` indexes ``Survey.questions``. A respondent answers a question at most once, so that
    "one response" and "one respondent" are well-defined units of privacy.
    """

    respondent: npt.NDArray[np.int64]
    question: npt.NDArray[np.int32]
    option: npt.NDArray[np.int16]

    def __post_init__(self) -> None:
        for name, dtype in (("respondent", np.int64), ("question", np.int32), ("option", np.int16)):
            given = np.asarray(getattr(self, name))
            array = given.astype(dtype)
            if array.ndim != 1 or (given != array).any():
                raise DataError(f"responses.{name} must be a vector of {np.dtype(dtype)} numbers")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if not len(self.respondent) == len(self.question) == len(self.option):
            raise DataError("responses: respondent, question and option differ in length")
        if len(self.question) and (self.question.min() < 0 or self.option.min() < 0):
            raise DataError("responses: negative question or option index")
        order = np.lexsort((self.question, self.respondent))
        same = (np.diff(self.respondent[order]) == 0) & (np.diff(self.question[order]) == 0)
        if same.any():
            index = int(self.question[order][int(np.argmax(same))])
            raise DataError(f"responses: a respondent answers question number {index} twice; keep one")

    def __len__(self) -> int:
        return len(self.respondent)

    def __repr__(self) -> str:
        return "Responses(<private>)"


@dataclass(frozen=True, eq=False, repr=False)
class GroupData:
    """What one group's institution holds. PRIVATE except for the name and the question ids.

    ``counts[qid]`` is float64 (K,): respondents per option, finite and non-negative, in the order of
    ``Survey.questions``. ``nominal`` marks counts that are a published distribution times an assumed
    number of respondents. ``responses`` holds the same answers with respondent ids where these are
    known.
    """

    name: str
    counts: dict[str, FloatArray]
    nominal: bool = False
    responses: Responses | None = None

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise DataError("a group has an empty name")
        clean: dict[str, FloatArray] = {}
        for qid, values in self.counts.items():
            array = np.array(values, dtype=np.float64)
            where = f"question {qid!r}, group {self.name!r}"
            if array.ndim != 1:
                raise DataError(f"{where}: counts must be a vector, one number per option")
            if not np.isfinite(array).all():
                raise DataError(f"{where}: a count is not a finite number")
            if (array < 0).any():
                raise DataError(f"{where}: a count is negative")
            array.setflags(write=False)
            clean[qid] = array
        object.__setattr__(self, "counts", clean)

    def has(self, qid: str) -> bool:
        """True when the group has answers to the question; all-zero counts: it was not asked there."""
        return qid in self.counts and bool(self.counts[qid].sum() > 0)

    def distribution(self, qid: str) -> FloatArray:
        """Normalised counts, float64 (K,), sum 1. DataError when the group has no answers to the question."""
        if not self.has(qid):
            raise DataError(f"question {qid!r}: group {self.name!r} has no answers to it")
        counts = self.counts[qid]
        result: FloatArray = counts / counts.sum()
        return result

    def __repr__(self) -> str:
        known = "known" if self.responses is not None else "unknown"
        return (
            f"GroupData(name={self.name!r}, questions={len(self.counts)}, nominal={self.nominal}, "
            f"respondents {known}, counts=<private>)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Survey:
    """Questions and the groups that answered them, with counts for every question, in the same order.

    ``dropped`` counts what a loader left out, by reason. Construction checks that counts fit the
    options and, where respondents are known, that counts are exactly the histogram of the responses.
    """

    name: str
    questions: tuple[Question, ...]
    groups: tuple[GroupData, ...]
    dropped: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "questions", tuple(self.questions))
        object.__setattr__(self, "groups", tuple(self.groups))
        if not self.questions:
            raise DataError(f"survey {self.name!r}: no questions are left{_reasons(self.dropped)}")
        if not self.groups:
            raise DataError(f"survey {self.name!r}: no groups")
        _unique([question.qid for question in self.questions], "question id")
        _unique([group.name for group in self.groups], "group name")
        for group in self.groups:
            self._check_group(group)

    def _check_group(self, group: GroupData) -> None:
        qids = [question.qid for question in self.questions]
        if list(group.counts) != qids:
            odd = next((qid for qid in qids if qid not in group.counts), None)
            odd = odd or next((qid for qid in group.counts if qid not in set(qids)), None)
            what = f"question {odd!r} is missing or unknown" if odd else "questions are in another order"
            raise DataError(f"group {group.name!r}: {what}; list the survey's questions in its order")
        for question in self.questions:
            have, want = len(group.counts[question.qid]), len(question.options)
            if have != want:
                raise DataError(
                    f"question {question.qid!r}, group {group.name!r}: {have} counts for {want} options"
                )
        if group.responses is None:
            return
        expected = counts_of(self.questions, group.responses, group.name)
        for qid, counts in expected.items():
            if not np.array_equal(counts, group.counts[qid]):
                raise DataError(
                    f"question {qid!r}, group {group.name!r}: counts are not the histogram of responses"
                )

    def question(self, qid: str) -> Question:
        """The question with this id; DataError when there is none."""
        for question in self.questions:
            if question.qid == qid:
                return question
        raise DataError(f"question {qid!r} is not in survey {self.name!r}")

    def __repr__(self) -> str:
        names = ", ".join(group.name for group in self.groups)
        return f"Survey(name={self.name!r}, {len(self.questions)} questions, groups: {names})"


@dataclass(frozen=True)
class Split:
    """Disjoint question ids, each in the survey's order: context for the predictor, training, held-out."""

    context: tuple[str, ...]
    train: tuple[str, ...]
    heldout: tuple[str, ...]


def counts_of(questions: Sequence[Question], responses: Responses, group: str) -> dict[str, FloatArray]:
    """Histogram of responses per question, float64 (K,) each. ``group`` is used in error messages only."""
    sizes = np.array([len(question.options) for question in questions], dtype=np.int64)
    if len(responses) and responses.question.max() >= len(questions):
        raise DataError(
            f"group {group!r}: a response names a question beyond the {len(questions)} of the survey"
        )
    too_high = responses.option >= sizes[responses.question]
    if too_high.any():
        row = int(np.argmax(too_high))
        qid = questions[int(responses.question[row])].qid
        raise DataError(f"question {qid!r}, group {group!r}: a response names an option that does not exist")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    cells = starts[responses.question] + responses.option
    flat = np.bincount(cells, minlength=int(starts[-1])).astype(np.float64)
    return {q.qid: flat[starts[i] : starts[i + 1]] for i, q in enumerate(questions)}


def split_questions(questions: Sequence[Question], context: int, heldout_fraction: float, seed: int) -> Split:
    """Seeded, disjoint split; ``heldout_fraction`` in [0, 1) is of the questions left after the context.

    The choice depends on the set of question ids and the seed only, not on their order, so that parties
    whose files are sorted differently agree on it. DataError when no training question would be left.
    """
    if context < 0 or not 0.0 <= heldout_fraction < 1.0:
        raise DataError(
            f"cannot split: data.context={context} must be >= 0 and "
            f"data.heldout_fraction={heldout_fraction} in [0, 1)"
        )
    qids = sorted(question.qid for question in questions)
    _unique(qids, "question id")
    rest = len(qids) - context
    heldout = round(heldout_fraction * max(rest, 0))
    if heldout_fraction > 0:
        heldout = max(heldout, 1)
    if rest - heldout < 1:
        raise DataError(
            f"cannot split {len(qids)} questions into {context} context, {heldout} held-out and at least 1 "
            "training question: lower data.context or data.heldout_fraction, or load more questions"
        )
    order = np.random.default_rng([seed, 0x5B117]).permutation(len(qids))
    chosen = [qids[i] for i in order]
    parts = (chosen[:context], chosen[context + heldout :], chosen[context : context + heldout])
    position = {question.qid: i for i, question in enumerate(questions)}
    return Split(*(tuple(sorted(part, key=position.__getitem__)) for part in parts))


def split_members(group: GroupData, members: int, seed: int) -> tuple[GroupData, ...]:
    """Deal a group's answers to several institutions; every response goes to exactly one of them.

    Where respondents are known, whole respondents are dealt, as evenly as possible. Otherwise each
    question's counts are split by a multivariate hypergeometric draw into near-equal whole parts; the
    fractional remainder of a nominal count goes to one member. Counts of the members add up to the
    group's. Members are named ``"name #1"`` and so on.
    """
    if members < 1:
        raise DataError(f"group {group.name!r}: members must be at least 1, not {members}")
    if members == 1:
        return (group,)
    rng = np.random.default_rng([seed, 0x3E3B, *group.name.encode()])
    names = [f"{group.name} #{i + 1}" for i in range(members)]
    if group.responses is not None:
        return _split_respondents(group, group.responses, names, rng)
    parts: list[dict[str, FloatArray]] = [{} for _ in names]
    for qid, counts in group.counts.items():
        whole = np.floor(counts).astype(np.int64)
        left = whole.copy()
        base, extra = divmod(int(whole.sum()), members)
        sizes = rng.permutation([base + (i < extra) for i in range(members)])
        lucky = int(rng.integers(members))
        for i, size in enumerate(sizes):
            share = left if i == members - 1 else rng.multivariate_hypergeometric(left, size)
            left = left - share
            rest = counts - whole if i == lucky else np.zeros_like(counts)
            parts[i][qid] = np.asarray(share + rest, dtype=np.float64)
    for name, part in zip(names, parts, strict=True):
        if sum(float(counts.sum()) for counts in part.values()) <= 0:
            raise DataError(f"group {group.name!r}: too few answers for {members} members, {name!r} has none")
    return tuple(GroupData(name, part, group.nominal) for name, part in zip(names, parts, strict=True))


def _split_respondents(
    group: GroupData, responses: Responses, names: list[str], rng: np.random.Generator
) -> tuple[GroupData, ...]:
    people, person = np.unique(responses.respondent, return_inverse=True)
    if len(people) < len(names):
        raise DataError(f"group {group.name!r}: fewer respondents than members ({len(names)})")
    owner_of_person = rng.permutation(np.arange(len(people)) % len(names))
    owner = owner_of_person[person]  # (N,)
    qids = list(group.counts)
    result = []
    for i, name in enumerate(names):
        mine = owner == i
        own = Responses(responses.respondent[mine], responses.question[mine], responses.option[mine])
        counts = {qid: np.zeros_like(values) for qid, values in group.counts.items()}
        for question, option in zip(own.question, own.option, strict=True):
            counts[qids[question]][option] += 1
        result.append(GroupData(name, counts, group.nominal, own))
    return tuple(result)


def _unique(values: Sequence[str], what: str) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise DataError(f"{what} {value!r} occurs twice")
        seen.add(value)


def _reasons(dropped: dict[str, int]) -> str:
    listed = "; ".join(f"{reason}: {count}" for reason, count in dropped.items())
    return f" ({listed})" if listed else ""
