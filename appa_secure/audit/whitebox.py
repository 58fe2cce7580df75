"""The strongest adversary of the training rounds, and the parameters it has the coordinator send."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special, stats

from appa_secure.agreement import Agreement
from appa_secure.audit.survey import CanarySurvey
from appa_secure.predictor import PreferencePredictor, context_points, flatten, log_likelihood, pad_options

Floats = NDArray[np.float64]
Coins = NDArray[np.bool_]


class WhiteBox:
    """The adversary of the training rounds: knows the parameters, the questions, the schedule and every gradient.

    With privacy.mechanism=dpsgd a canary in a step adds its clipped gradient. With privacy.mechanism=histogram it moves
    the share of an option, and with it the mean gradient of the step: whatever the update says beyond the histograms
    that were paid for is found in the same way.
    """

    def __init__(self, agreement: Agreement, survey: CanarySurvey, seed: int) -> None:
        self.plan, self.survey = agreement.plan, survey
        self.model = PreferencePredictor(agreement.predictor)
        self.parameters = flatten(crafted(self.model, survey.length, seed))
        points = context_points(
            [survey.embeddings[q] for q in self.plan.context],
            [np.full(len(e), 1.0 / len(e)) for e in (survey.embeddings[q] for q in self.plan.context)],
        )
        used = self.plan.train[: survey.train_cells.size]
        rows = [self._gradient(survey.embeddings[q], survey.included(q, 0), points) for q in used]
        self.gradients = np.stack(rows)  # (cells, P) float32
        self._column = {q: i for i, q in enumerate(used)}
        self._known = np.zeros(
            (self.plan.rounds, 1), dtype=np.float32
        )  # what known answers add to each round
        if not self.plan.noisy_rounds:
            known = np.stack([self._gradient(survey.embeddings[q], survey.known(q), points) for q in used])
            self._known = np.stack(
                [self._used(i).sum(axis=0, dtype=np.float32) @ known for i in range(self.plan.rounds)]
            )
            self.gradients -= known
        self._products = (self.gradients @ self.gradients.T).astype(np.float64)  # (cells, cells)
        m, width = survey.train_cells.shape
        self._owned = np.repeat(np.eye(m), width, axis=1)  # (m, cells)
        self._weights = [self._clipped(index) for index in range(self.plan.rounds)]
        steps = [questions for index in range(self.plan.rounds) for questions in self.plan.steps(index)]
        self._steps = np.array([self._asked(questions).any(axis=1) for questions in steps]).sum(
            axis=0
        )  # (m,)
        gram = sum(w @ self._products @ w.T for w in self._weights)
        # Canaries that no round asks for get a variance without end, and never a sure guess.
        self._inverse = np.linalg.inv(gram + 1e-9 * max(1.0, float(np.trace(gram))) * np.eye(m))

    def _clipped(self, index: int) -> Floats:
        """(m, cells): round `index` adds `weights @ gradients` (m, P) for the canaries, if drawn in every step."""
        weights = np.zeros(self._owned.shape)
        for questions in self.plan.steps(index):
            mine = self._asked(questions)
            if self.plan.noisy_rounds:
                norms = np.sqrt(np.einsum("ic,cd,id->i", mine, self._products, mine, optimize=True))
                mine *= np.minimum(1.0, self.plan.clip / np.maximum(norms, 1e-9))[:, None]
            weights += mine
        return weights

    def _asked(self, questions: Sequence[str]) -> Floats:
        """(m, cells): which cells of which canary a step asks for."""
        asked = np.zeros(len(self._column))
        asked[[self._column[q] for q in questions if q in self._column]] = 1.0
        mine: Floats = self._owned * asked
        return mine

    def _used(self, index: int) -> Coins:
        """(steps, cells): which questions with a canary each step of a round asks."""
        return np.array([[q in asked for q in self._column] for asked in map(set, self.plan.steps(index))])

    def _gradient(
        self, embedding: NDArray[np.float32], counts: Floats, points: torch.Tensor
    ) -> NDArray[np.float32]:
        """(P,) gradient of the cross entropy of the shares of `counts` (K,), 0 for no answers, by plain autograd."""
        targets, mask = pad_options([embedding])
        shares = torch.from_numpy(counts / max(counts.sum(), 1.0)).float()
        loss = -(shares * log_likelihood(self.model(points[None], targets), mask)[0]).sum()
        grads = torch.autograd.grad(loss, list(self.model.parameters()))
        return torch.cat([g.reshape(-1) for g in grads]).numpy()

    def estimates(self, updates: Callable[[int], Floats], per_question: float) -> Floats:
        """(m,) in what share of the steps that ask for it each training canary seems to be: least squares over all rounds.

        updates: round -> the client's pseudo-gradient (P,); per_question: the client's own (private) estimate of its
        answers per question, by which it scales its updates under DP-SGD.
        """
        matched = np.zeros(len(self._inverse))
        for index, weights in enumerate(self._weights):
            if self.plan.noisy_rounds:
                questions = len(self.plan.steps(index)[0])
                scale = max(1.0, self.plan.expected_batch(max(per_question, 1.0), questions))
            else:
                scale = max(1.0, float(self._used(index)[0].sum()))  # a mean over the step's questions
            update = (updates(index) * scale - self._known[index]).astype(np.float32)
            seen = np.zeros(weights.shape[1])
            for cell in np.flatnonzero(weights.any(axis=0)):
                seen[cell] = self.gradients[cell] @ update
            matched += weights @ seen
        estimate: Floats = self._inverse @ matched
        return estimate

    def scores(self, estimates: Floats, clients: int = 1) -> Floats:
        """Log-likelihood ratios (..., m) of "included" to "not", from `estimates` whose noise is that of so many clients.

        A canary that is included is in Binomial(steps, sample_rate) of the steps that ask for it; otherwise in none. On
        histograms it is in all or in none: the sign says which.
        """
        if not self.plan.noisy_rounds:
            return estimates - 0.5
        noise = clients * self.plan.local_steps * (self.plan.noise_multiplier * self.plan.clip) ** 2
        variance = noise * np.diag(self._inverse)  # (m,)
        most = int(self._steps.max())
        drawn = np.arange(most + 1)[:, None]  # (n, 1)
        chance = stats.binom.logpmf(drawn, self._steps, self.plan.sample_rate)  # (n, m)
        share = drawn / np.maximum(self._steps, 1)
        # log N(e; share, v) - log N(e; 0, v) = share * (e - share / 2) / v
        evidence = share * (estimates[..., None, :] - share / 2) / variance  # (..., n, m)
        ratio: Floats = special.logsumexp(chance + evidence, axis=-2)
        return ratio


def crafted(model: PreferencePredictor, length: float, seed: int) -> PreferencePredictor:
    """Parameters under which canaries' gradients are long and the predicted shares stay even.

    Inputs `length` times longer and first weights as much smaller leave every prediction as it was, and make the
    gradients of these weights, an outer product with the input, `length` times longer.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        fresh = PreferencePredictor(model.shape)
        model.load_state_dict(fresh.state_dict())
        model.point[0].weight.mul_(1.0 / length)  # type: ignore[operator]
        model.head.weight.mul_(0.1)
    return model
