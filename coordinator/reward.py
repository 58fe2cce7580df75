"""The federated reward: a TRL reward function whose numbers come from secure sums.

    reward = FederatedReward(...)
    SomeTRLTrainer(reward_funcs=reward, ...)       # dataset columns: prompt, qid

One call is one alignment step: the rollouts go to the clients, each scores them against its group's private predicted
preferences, and the coordinator turns the sums it receives into rewards (`appa_secure.aggregation`). Completions that
are not an answer get the format penalty and are never sent; None marks rollouts that no quorum could score.

The call is idempotent. What a step opened is journalled under the step's number and the digest of its rollouts, so a
trainer resumed from a checkpoint gets the same rewards without asking anyone again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch.distributed

from appa_secure.aggregation import StepResult, combine, combine_clear
from appa_secure.agreement import Agreement
from appa_secure.errors import RunError
from appa_secure.journal import canonical_json
from appa_secure.messages import pack_float
from appa_secure.records import Journal
from appa_secure.tasks import parse
from coordinator.rounds import NotOpened, Rounds, Summed

_PATIENCE = 5  # steps in a row that may be discarded before the run stops and says who is missing

Seen = Callable[[int, Sequence[str], Sequence[np.ndarray | None], dict[str, Any]], None]


@dataclass
class _Alignment:
    """What the coordinator remembers between steps: all of it comes from opened sums."""

    opened: int = 0  # number of the last opened step
    z: float | None = None
    histories: tuple[float, ...] | None = None  # cohort mode only: one per group


class FederatedReward:
    """See the module docstring. `seen` is called once per new step with the parsed rollouts and the step's row."""

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
        self.agreement, self.rounds, self.journal = agreement, rounds, journal
        self.format_penalty, self.seen, self.stamp = format_penalty, seen, stamp
        self.groups = tuple(sorted(set(agreement.groups.values())))
        self.rows: dict[int, dict[str, Any]] = {row["step"]: row for row in journal}
        self._discarded = 0

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        qid: Sequence[str],
        trainer_state: Any,
        **_: Any,
    ) -> list[float | None]:
        """Rewards of one step's rollouts, gathered over all processes: one federated query per step."""
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

    def step(self, step: int, qids: Sequence[str], texts: Sequence[str]) -> list[float | None]:
        """Rewards (B,) of step number `step` (from 1); None where the step was discarded."""
        asked = hashlib.sha256(canonical_json([step, list(qids), list(texts)])).hexdigest()
        answers = [
            parse(t, self.agreement.questions[q], self.agreement.task, self.agreement.max_weight)
            for q, t in zip(qids, texts, strict=True)
        ]
        row = self.rows.get(step)
        if row is None:
            row = self._query(step, asked, qids, texts, [i for i, a in enumerate(answers) if a is not None])
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

    def _query(
        self, step: int, asked: str, qids: Sequence[str], texts: Sequence[str], valid: Sequence[int]
    ) -> dict[str, Any]:
        before = self._before(step)
        rewards: list[float | None] = [self.format_penalty] * len(qids)
        row: dict[str, Any] = {
            "stamp": self.stamp, "step": step, "asked": asked, "rewards": rewards, "malformed": len(qids) - len(valid),
            "opened": False,
            "result": None, "histories": None if before.histories is None else list(before.histories), "reason": None,
            "weights": None,
        }  # fmt: skip
        if not valid:
            row["reason"] = "no completion was an answer"
            return row
        payload = {
            "step": step,
            "opened": before.opened,
            "z": pack_float(before.z if self.agreement.needs_normaliser else None),
            "questions": [qids[i] for i in valid],
            "answers": [texts[i] for i in valid],
        }
        outcome = self._cohort(payload, before) if self.agreement.cohort else self._blind(payload)
        if isinstance(outcome, NotOpened):
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
        for i, value in zip(valid, result.rewards.tolist(), strict=True):
            rewards[i] = value
        row.update(opened=True, histories=histories, weights=weights)
        row["result"] = {k: v for k, v in asdict(result).items() if k != "rewards"}
        return row

    def _before(self, step: int) -> _Alignment:
        """The state that the steps before `step` left; malformed or discarded steps leave it as it was."""
        for number in range(step - 1, 0, -1):
            row = self.rows.get(number)
            if row is not None and row["opened"]:
                histories = None if row["histories"] is None else tuple(row["histories"])
                return _Alignment(number, row["result"]["z_next"], histories)
        return _Alignment()

    def _blind(self, payload: Mapping[str, Any]) -> tuple[StepResult, None, None] | NotOpened:
        a, batch = self.agreement, len(payload["questions"])
        summed = self.rounds.sum(a.reward_session(), "score", payload, a.reward_layout(batch))
        if isinstance(summed, NotOpened):
            return summed
        return combine(a.aggregation, summed.sum, batch, len(summed.contributors)), None, None

    def _cohort(
        self, payload: Mapping[str, Any], before: _Alignment
    ) -> tuple[StepResult, list[float], dict[str, float]] | NotOpened:
        a, batch = self.agreement, len(payload["questions"])
        means = []
        for group in self.groups:
            summed = self.rounds.sum(a.reward_session(group), "score", payload, a.reward_layout(batch))
            if not isinstance(summed, Summed):
                return NotOpened(f"group {group}: {summed.reason}")
            means.append(np.clip(summed.sum / len(summed.contributors), 0.0, 1.0))
        previous = None if before.histories is None else np.array(before.histories)
        result, after, alpha = combine_clear(
            a.aggregation, np.stack(means), previous, before.z, step=payload["step"]
        )
        return result, after.tolist(), dict(zip(self.groups, alpha.tolist(), strict=True))
