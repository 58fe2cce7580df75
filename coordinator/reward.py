"""The federated reward: a TRL reward function whose numbers come from secure sums.

    reward = FederatedReward(...)
    SomeTRLTrainer(reward_funcs=reward, ...)       # dataset columns: prompt, qid

One call is one alignment step: the rollouts go to the clients, each scores them against its group's private predicted
preferences, and the coordinator turns the sums it receives into rewards (`appa_secure.aggregation`). Completions that
are not an answer get the format penalty and are never sent; None marks rollouts that no quorum could score, and answers
that were scored with other members. Between two steps the members may change (`coordinator.membership`).

The call is idempotent. What a step opened is journalled under the step's number and the digest of its rollouts, so a
trainer resumed from a checkpoint gets the same rewards without asking anyone again.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch.distributed

from appa_secure.aggregation import StepResult, combine, combine_clear
from appa_secure.agreement import Agreement
from appa_secure.errors import PrivacyError, RunError
from appa_secure.journal import canonical_json
from appa_secure.membership import Scored
from appa_secure.messages import pack_float
from appa_secure.records import Journal
from appa_secure.tasks import parse
from coordinator.membership import follow
from coordinator.predictor import record_ledger
from coordinator.rounds import NotOpened, Rounds, Summed

_PATIENCE = 5  # steps in a row that may be discarded before the run stops and says who is missing

Seen = Callable[[int, Sequence[str], Sequence[np.ndarray | None], dict[str, Any]], None]


@dataclass
class _Alignment:
    """What the coordinator remembers between steps: all of it comes from opened sums."""

    opened: int = 0  # number of the last opened step
    steps: int = 0  # how many were opened in this period
    z: float | None = None
    histories: tuple[float, ...] | None = None  # cohort mode only: one per group


class StepReward(ABC):
    """A TRL reward function that is asked once per step: rollouts are gathered over all processes, read, and scored
    together by `step`. `rows`: what each step was, by its number; `seen` is called once per new step with the parsed
    rollouts and the step's row."""

    __name__ = "step_reward"

    def __init__(self, agreement: Agreement, seen: Seen | None) -> None:
        self.agreement, self.seen = agreement, seen
        self.rows: dict[int, dict[str, Any]] = {}

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        qid: Sequence[str],
        trainer_state: Any,
        **_: Any,
    ) -> list[float | None]:
        """Rewards of this process's rollouts in the step `trainer_state.ppo_step`."""
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        step = int(trainer_state.ppo_step)
        if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
            return self.step(step, list(qid), texts)
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        parts: list[Any] = [None] * world
        torch.distributed.all_gather_object(parts, (list(qid), texts))
        answer: list[Any] = [None]
        if rank == 0:
            answer[0] = self.step(
                step, [q for part in parts for q in part[0]], [t for part in parts for t in part[1]]
            )
        torch.distributed.broadcast_object_list(answer, src=0)
        start = sum(len(part[0]) for part in parts[:rank])
        return list(answer[0][start : start + len(texts)])

    @abstractmethod
    def step(self, step: int, qids: Sequence[str], texts: Sequence[str]) -> list[float | None]:
        """Rewards (B,) of all rollouts of step number `step` (from 1); None where there is none."""

    def parsed(self, qids: Sequence[str], texts: Sequence[str]) -> list[np.ndarray | None]:
        """The answers (K,), None where a text is none."""
        a = self.agreement
        return [parse(t, a.questions[q], a.task, a.max_weight) for q, t in zip(qids, texts, strict=True)]


class FederatedReward(StepReward):
    """See the module docstring."""

    __name__ = "federated_reward"

    def __init__(
        self,
        agreement: Agreement,
        rounds: Rounds,
        journal: Journal,
        format_penalty: float,
        seen: Seen | None = None,
        stamp: str = "not private",
    ) -> None:
        super().__init__(agreement, seen)
        self.rounds, self.journal = rounds, journal
        self._scored = Scored(rounds.run.path("stages") / "scored.bin")
        self.format_penalty, self.stamp = format_penalty, stamp
        self.rows = {row["step"]: row for row in journal}
        self._discarded = 0

    def step(self, step: int, qids: Sequence[str], texts: Sequence[str]) -> list[float | None]:
        """Rewards (B,); None where the step was discarded, and of answers that were scored with other members."""
        asked = hashlib.sha256(canonical_json([step, list(qids), list(texts)])).hexdigest()
        answers = self.parsed(qids, texts)
        row = self.rows.get(step)
        if row is None:
            follow(self.rounds)
            self.agreement = self.rounds.agreement
            valid = [i for i, a in enumerate(answers) if a is not None]
            row = self._query(step, asked, qids, texts, valid, self._repeated(qids, answers, valid))
            # Measured first: after a kill between the two the step is asked again and measured no second time.
            if self.seen is not None:
                self.seen(step, qids, answers, row)
            self.journal.append(row)
            self.rows[step] = row
        elif row["asked"] != asked:
            raise RunError(
                f"alignment step {step} was scored for other rollouts before: the resumed run differs from the one that "
                "was interrupted (another machine, thread count or package version?); start a new run"
            )
        return list(row["rewards"])

    def _repeated(self, qids: Sequence[str], answers: Sequence[Any], valid: Sequence[int]) -> set[int]:
        """Those of `valid` that were summed with other members: summed again, the difference would be a member's
        reward. The clients refuse them. The others are remembered before anybody is asked."""
        if not self.agreement.once_per_period:
            return set()
        period, questions, found = (
            self.agreement.period,
            [qids[i] for i in valid],
            [answers[i] for i in valid],
        )
        barred = {valid[i] for i in self._scored.barred(questions, found, period)}
        self._scored.add(questions, found, period)
        return barred

    def _query(
        self,
        step: int,
        asked: str,
        qids: Sequence[str],
        texts: Sequence[str],
        valid: Sequence[int],
        barred: set[int],
    ) -> dict[str, Any]:
        before = self._before(step)
        rewards: list[float | None] = [self.format_penalty] * len(qids)
        row: dict[str, Any] = {
            "stamp": self.stamp, "step": step, "asked": asked, "rewards": rewards, "malformed": len(qids) - len(valid),
            "opened": False, "period": self.agreement.period, "repeated": len(barred),
            "result": None, "histories": None if before.histories is None else list(before.histories), "reason": None,
            "weights": None,
        }  # fmt: skip
        if not valid:
            row["reason"] = "no completion was an answer"
            return row
        # Left out of the update, like a step that was discarded.
        for i in barred:
            rewards[i] = None
        valid = [i for i in valid if i not in barred]
        outcome: tuple[StepResult, list[float] | None, dict[str, float] | None] | NotOpened
        payload = {
            "step": step,
            "opened": before.opened,
            "z": pack_float(before.z if self.agreement.needs_normaliser else None),
            "questions": [qids[i] for i in valid],
            "answers": [texts[i] for i in valid],
        }
        if not valid:
            outcome = NotOpened("every answer had been scored with other members")
        else:
            outcome = self._cohort(payload, before) if self.agreement.cohort else self._blind(payload)
        if isinstance(outcome, NotOpened):
            if outcome.unpaid:
                raise PrivacyError(f"alignment step {step}: {outcome.reason}")
            self._discarded += 1
            if self._discarded >= _PATIENCE:
                raise RunError(
                    f"{_PATIENCE} alignment steps in a row were discarded, the last because: {outcome.reason}"
                )
            # One missing group discards the step: the trainer leaves these rollouts out and goes on with fresh ones.
            for i in valid:
                rewards[i] = None
            row["reason"] = outcome.reason
            return row
        self._discarded = 0
        result, histories, weights = outcome
        # Beside rewards of the published formula, which are about a G-th of the groups', the plain penalty would be a prize.
        rewards = [None if i in barred else result.scale * self.format_penalty for i in range(len(qids))]
        for i, value in zip(valid, result.rewards.tolist(), strict=True):
            rewards[i] = value
        row.update(opened=True, rewards=rewards, histories=histories, weights=weights)
        row["result"] = {k: v for k, v in asdict(result).items() if k != "rewards"}
        return row

    def _before(self, step: int) -> _Alignment:
        """The state that the steps before `step` left; malformed or discarded steps leave it as it was, and histories
        begin again with every period."""
        found = [
            row
            for number, row in self.rows.items()
            if number < step and row["opened"] and row["period"] == self.agreement.period
        ]
        if not found:
            return _Alignment()
        last = max(found, key=lambda row: row["step"])
        histories = None if last["histories"] is None else tuple(last["histories"])
        return _Alignment(last["step"], len(found), last["result"]["z_next"], histories)

    def _blind(self, payload: Mapping[str, Any]) -> tuple[StepResult, None, None] | NotOpened:
        a, batch = self.agreement, len(payload["questions"])
        summed = self.rounds.sum(a.reward_session(), "score", payload, a.reward_layout(batch))
        if isinstance(summed, NotOpened):
            return summed
        self._record(summed)
        noisy = a.output is not None
        return combine(a.aggregation, summed.sum, batch, len(summed.contributors), noisy), None, None

    def _record(self, summed: Summed) -> None:
        """What the clients of a sum with output noise paid for it."""
        if self.agreement.output is not None:
            for client, fields in summed.replies.items():
                record_ledger(self.rounds.run.output_ledger, client, fields["ledger"])

    def _cohort(
        self, payload: Mapping[str, Any], before: _Alignment
    ) -> tuple[StepResult, list[float], dict[str, float]] | NotOpened:
        a, batch = self.agreement, len(payload["questions"])
        groups, means = sorted(set(a.groups.values())), []
        for group in groups:
            summed = self.rounds.sum(a.reward_session(group), "score", payload, a.reward_layout(batch))
            if not isinstance(summed, Summed):
                return NotOpened(f"group {group}: {summed.reason}", summed.unpaid)
            self._record(summed)
            means.append(np.clip(summed.sum / len(summed.contributors), 0.0, 1.0))
        previous = None if before.histories is None else np.array(before.histories)
        result, after, alpha = combine_clear(
            a.aggregation, np.stack(means), previous, before.z, step=before.steps + 1
        )
        return result, after.tolist(), dict(zip(groups, alpha.tolist(), strict=True))
