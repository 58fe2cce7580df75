"""The training plan: everything about the predictor's training that is public and the same on every client.

Which questions a step looks at is fixed in advance and public (question texts are); which answers to them are used is
a secret Poisson draw at the client. An answer to one question can therefore take part only in the steps that ask its
question, and is charged for those alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from appa_secure.privacy.accounting import GaussianEvent


@dataclass(frozen=True)
class TrainingPlan:
    """One federated training of the predictor.

    train, context: question ids; noise_multiplier is 0 exactly when `private` is False, and of the DP-SGD rounds
    (mechanism "dpsgd") or of the one release of histograms ("histogram"). training: "federated", or where one party
    trains on everybody's answers (clients/centralised.py). turns: rounds from one turn of a client to its next.
    """

    run: str
    seed: int
    train: tuple[str, ...]
    context: tuple[str, ...]
    rounds: int
    local_steps: int
    questions_per_step: int
    lr: float
    private: bool
    unit: str
    clip: float
    sample_rate: float
    noise_multiplier: float
    answers_per_unit: int
    mechanism: str = "dpsgd"
    training: str = "federated"
    turns: int = 1

    @property
    def noisy_rounds(self) -> bool:
        """Whether training rounds release anything: DP-SGD's do; on histograms training is post-processing."""
        return self.private and self.mechanism == "dpsgd"

    @property
    def released(self) -> tuple[str, ...]:
        """Questions of the release that is made before training."""
        return self.context + self.train if self.private and self.mechanism == "histogram" else self.context

    @cached_property
    def steps_per_pass(self) -> int:
        """Steps in which every training question occurs exactly once."""
        return math.ceil(len(self.train) / self.questions_per_step)

    def steps(self, round_index: int) -> list[list[str]]:
        """The training questions of each local step of a round (0-based), for the clients whose turn it is."""
        out, turn = [], round_index // self.turns
        for step in range(turn * self.local_steps, (turn + 1) * self.local_steps):
            again, part = divmod(step, self.steps_per_pass)
            order = np.random.default_rng([self.seed, 0xBA7C4, again]).permutation(len(self.train))
            out.append([self.train[i] for i in np.array_split(order, self.steps_per_pass)[part]])
        return out

    def participations(self, rounds: int) -> int:
        """Steps of the first `rounds` rounds that one unit can take part in.

        A response or a record belongs to one question, which occurs once per pass; a respondent's answers may be
        spread over all questions, so a respondent can take part in every step.
        """
        steps = math.ceil(rounds / self.turns) * self.local_steps
        return steps if self.unit == "respondent" else math.ceil(steps / self.steps_per_pass)

    def event(self, round_index: int) -> GaussianEvent:
        """What a client's release in round `round_index` (0-based) adds to a unit's account."""
        began = round_index // self.turns * self.turns
        more = self.participations(began + self.turns) - self.participations(began)
        return GaussianEvent(self.noise_multiplier, self.sample_rate, more)

    def expected_batch(self, responses_per_question: float, questions: int) -> float:
        """Expected number of sampled loss terms of a step that asks `questions` questions."""
        if self.unit == "record":
            return self.sample_rate * questions
        return self.sample_rate * responses_per_question * questions
