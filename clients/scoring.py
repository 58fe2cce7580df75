"""What a client puts into a reward sum: its group's rewards, their history, and what it has to remember for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from appa_secure.aggregation import contribution, used_weight
from appa_secure.agreement import Agreement
from appa_secure.data import GroupData
from appa_secure.membership import Scored
from appa_secure.messages import digest, pack_float, unpack_float
from appa_secure.privacy.ledger import Ledger
from appa_secure.privacy.output import MECHANISM
from appa_secure.rewards import Scorer
from appa_secure.secagg.errors import BadEncoding, RemoteMisbehaviour, ReplayedRound
from appa_secure.secagg.keys import COORDINATOR
from appa_secure.secagg.wire import peek
from appa_secure.tasks import parse
from clients.errors import Refusal
from clients.store import ClientStore


class Scoring:
    """Works on the client's own state (`predicted`, `history`), which the client saves. Methods take the agreement in
    force, which changes with the members."""

    def __init__(
        self, client_id: str, data: GroupData, founding: Agreement, store: ClientStore, state: dict[str, Any]
    ) -> None:
        self._data, self._state = data, state
        self._scored = Scored(store.scored_path)
        self._ledger = (
            Ledger(store.output_ledger_path, client_id, founding.output.budget) if founding.output else None
        )
        self._scorer: Scorer | None = None

    def forget_targets(self) -> None:
        """The predictions are new."""
        self._scorer = None

    def restart(self) -> None:
        """Begin the history again; numbers of steps that may have been opened stay taken."""
        if h := self._state["history"]:
            self._state["history"] = {"floor": max(h.get(k, 0) for k in ("pending_step", "step", "floor"))}

    def targets(self, a: Agreement) -> Scorer:
        """Rewards against this group's predicted preferences, which come from private artefacts only.

        With predictor=truth against its true answers, where this site allows measuring.
        """
        if self._scorer is None:
            questions = a.questions
            if a.true_rewards:
                if not a.truth:
                    raise Refusal(
                        "NotAllowed", "evaluation.truth is off at this site: no rewards from true answers"
                    )
                targets = {q: self._data.distribution(q) for q in questions if self._data.has(q)}
            elif self._state.get("predicted"):
                targets = {q: np.frombuffer(p) for q, p in self._state["predicted"].items()}
            else:
                raise Refusal("OutOfOrder", "no predictor yet")
            ordinals = {q: question.ordinals for q, question in questions.items()}
            self._scorer = Scorer(a.reward, targets, ordinals)
        return self._scorer

    def rewards(self, a: Agreement, qids: Sequence[str], answers: Sequence[np.ndarray]) -> np.ndarray:
        """This group's rewards of parsed answers, float64 (B,).

        Predictions exist for all questions, true answers may not: a question that this group was not asked then counts
        as the mean of the others, which moves neither its history nor the policy.
        """
        scorer = self.targets(a)
        known = [i for i, qid in enumerate(qids) if scorer.knows(qid)]
        rewards = np.full(len(qids), np.nan)
        rewards[known] = scorer.score([qids[i] for i in known], [answers[i] for i in known])
        rewards[np.isnan(rewards)] = rewards[known].mean() if known else 0.5
        return rewards

    def vector(self, a: Agreement, body: Mapping[str, Any]) -> np.ndarray:
        """This client's vector for a `score` request, before coding and masking; its history waits until the step is opened.

        Raises Refusal for answers that were summed with other members, and ProtocolErrors for what is no such request.
        """
        step, qids, answers = body["step"], body["questions"], parsed(body, a)
        rewards = self.rewards(a, qids, answers)
        if a.once_per_period and (barred := self._scored.barred(qids, answers, a.period)):
            raise Refusal("ScoredBefore", f"{len(barred)} of these answers were scored with other members")
        history, opened = self.committed(a, step, body["opened"])
        if a.once_per_period:
            self._scored.add(qids, answers, a.period)
        if a.cohort:
            # The group's history is the coordinator's; this says that the predictor is final.
            self._state["history"]["begun"] = 1
            return rewards
        z = _normaliser(body, a)
        try:
            vector, h = contribution(a.aggregation, rewards, history, z, len(a.clients), opened + 1)
        except ValueError as error:
            raise RemoteMisbehaviour(COORDINATOR, f"score: {error}") from None
        self._state["history"].update(pending=pack_float(h), pending_step=step)
        if a.truth:
            used = used_weight(a.aggregation, rewards, history, z, len(a.clients), opened + 1)
            self._state["history"]["weight"] = pack_float(used)
        return vector

    def weight(self, a: Agreement, step: int) -> bytes:
        """The weight used at `step`, the last that was scored; for measuring a simulation."""
        h = self._state["history"]
        if not a.truth:
            raise Refusal("NotAllowed", "evaluation.truth is off at this site: its weight never leaves it")
        if h.get("pending_step") != step or "weight" not in h:
            raise Refusal("OutOfOrder", f"step {step} is not the one that was scored last")
        return bytes(h["weight"])

    def committed(self, a: Agreement, step: int, opened: int) -> tuple[float | None, int]:
        """This group's history before `step`, and how many steps are in it since the period began.

        The pending one counts once the coordinator says its step was opened. The coordinator's own numbers only name
        steps: counted by them, it could take a rule that weighs later steps differently to its end at once.
        """
        h = self._state["history"]
        pending, last = h.get("pending_step"), h.get("step", 0)
        if a.release == "abort" and opened not in (pending, last):
            # Nothing is opened without this client, so it knows which steps can have been.
            raise RemoteMisbehaviour(
                COORDINATOR,
                f"score: says that step {opened} was opened last, here it was {last} or {pending}",
            )
        if step <= max(h.get("floor", 0), pending if opened == pending else last):
            raise ReplayedRound(COORDINATOR, f"alignment step {step} was opened before")
        if opened == pending:
            h.update(current=h.pop("pending"), step=h.pop("pending_step"), steps=h.get("steps", 0) + 1)
        return unpack_float(h.get("current", b""), "own store", "history"), h.get("steps", 0)

    def charge_output(self, a: Agreement, body: Mapping[str, Any]) -> dict[str, Any]:
        """Pay for one upload with output noise. Its name has everything the noise is derived from: another round, or
        other rollouts, is another release, even of the same step; the same upload again is the same release."""
        assert a.output is not None
        assert self._ledger is not None
        round_ = peek(body["message"])
        name = f"{body['session']}/{round_.epoch}/{round_.round}/{digest('score', body).hex()}"
        return self._ledger.charge(name, a.output.event, MECHANISM)


def parsed(body: Mapping[str, Any], a: Agreement) -> list[np.ndarray]:
    """The answers of a request, (K,) each. Raises BadEncoding for what answers no question of the survey."""
    questions, answers = body["questions"], body["answers"]
    if not questions or len(questions) != len(answers):
        raise BadEncoding(COORDINATOR, "score: needs as many answers as questions, and at least one")
    parsed = []
    for qid, text in zip(questions, answers, strict=True):
        question = a.questions.get(qid)
        answer = parse(text, question, a.task, a.max_weight) if question is not None else None
        if answer is None:
            raise BadEncoding(COORDINATOR, f"score: not an answer to a question of this survey ({qid!r:.80})")
        parsed.append(answer)
    return parsed


def _normaliser(body: Mapping[str, Any], a: Agreement) -> float | None:
    """The published normaliser, which only the `paper` variant takes from the coordinator; None on the first step."""
    if a.needs_normaliser:
        return unpack_float(body["z"], COORDINATOR, "score.z")
    if body["z"]:
        raise RemoteMisbehaviour(
            COORDINATOR, "score: a normaliser was sent, but this rule's weights do not depend on it"
        )
    return None if body["opened"] == 0 else 1.0
