"""Canaries in clients' data, and what the strongest adversary of the threat model reads off the clients' releases.

The clients are the real ones: data in, requests answered by `Client.handle`, noise and sampling theirs, and what they
claim to have spent is what their own ledger rows say. The noise, the clipping norm, the rate, the schedule of questions
and the number of rounds are those of the configured run. What is made up is what the definition of differential privacy
lets an adversary choose: the other answers (it knows them), the question texts, and the parameters that the coordinator
sends. They are chosen so that nothing but the noise stands between a canary and the adversary:

- a context question has ten options: nine canaries in cells well above zero, and an option that so many chose that the
  shares the client keeps give the noisy counts back. The adversary has stolen the client's state;
- a training question has two options, and its canary the first. Embeddings are long and random, so that gradients are
  nearly orthogonal and longer than the clipping norm; parameters are the same in every round. Context questions have
  one embedding for all their options: what the noisy context says then changes no gradient.

The adversary sees one client's update in the clear (secagg.mode=clear shows what masks hide), or the sum over the run's
clients of which it knows all but one.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special, stats

from appa_secure import data as surveys
from appa_secure.agreement import PREDICTOR, Agreement, make_agreement
from appa_secure.audit.bound import Bound, audit
from appa_secure.config import Config
from appa_secure.data import GroupData, Question, Responses, Split
from appa_secure.data.survey import counts_of
from appa_secure.errors import ConfigError, RunError
from appa_secure.messages import REPLIES, REQUESTS, Message, Refused, pack, unpack, unpack_float
from appa_secure.predictor import PreferencePredictor, context_points, flatten, log_likelihood, pad_options
from appa_secure.privacy.accounting import GaussianEvent, epsilon
from appa_secure.secagg.keys import Directory, IdentityKey
from clients.client import Client
from clients.store import ClientStore

Floats = NDArray[np.float64]
Coins = NDArray[np.bool_]

_EMBEDDING = 384  # as all-MiniLM-L6-v2
_OPTIONS = 10  # of a context question, the last for the many
_SAFE = 6.0  # standard deviations of noise between a canary's cell and zero, where it would be cut off
_MANY = 10  # times as many answers in the last option: its own noise hardly moves the shares
_MEMORY = 2**28  # bytes of gradients held at most


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for simulated clients' stores, in memory where there is one: each answer waits for the disk twice."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="appa-audit-", dir=memory if memory.is_dir() else None)


@dataclass(frozen=True)
class View:
    """One kind of release as one adversary sees it. claimed: epsilon of its ledger rows alone, at the run's delta."""

    name: str
    adversary: str
    claimed: float
    bound: Bound

    @property
    def exceeded(self) -> bool:
        """Whether the measured lower bound refutes the claim."""
        return self.bound.epsilon > self.claimed


class CanarySurvey:
    """The questions, embeddings and data that carry the canaries; which canaries exist, not which are included."""

    def __init__(self, config: Config, questions: int, context: int, limit: int) -> None:
        """questions, context: training and context questions of the run; limit: training canaries of one client at
        most."""
        p = config.privacy
        self.unit, self.noise = p.unit, p.context_noise
        self.split = Split(
            tuple(f"context {i}" for i in range(context)), tuple(f"train {i}" for i in range(questions)), ()
        )
        sizes = dict.fromkeys(self.split.context, _OPTIONS) | dict.fromkeys(self.split.train, 2)
        self.questions = tuple(
            Question(q, q, tuple(f"option {k}" for k in range(n)), tuple(range(n))) for q, n in sizes.items()
        )
        # A respondent gives as many answers as count, to different questions; every other unit is one answer.
        width = p.answers_per_unit if self.unit == "respondent" else 1
        cells = context * (1 if self.unit == "record" else _OPTIONS - 1)
        self.context_cells = _cells(
            cells, min(width, context), cells
        )  # (m, width) cell = option * context + question
        self.train_cells = _cells(questions, min(width, questions), limit)  # (m, width) question
        rng = np.random.default_rng([config.seed, 0xCA7A])
        length = 10.0 * p.clip  # makes gradients longer than the clipping norm: see `WhiteBox`
        self.length = length
        drawn = {q: rng.standard_normal((n, _EMBEDDING)) for q, n in sizes.items()}
        self.embeddings = {
            q: (length * (e[:1].repeat(len(e), 0) if q in self.split.context else e)).astype(np.float32)
            for q, e in drawn.items()
        }

    def data(self, name: str, context: Coins, train: Coins) -> GroupData:
        """A client's answers: the known ones, and the canaries whose coins say so."""
        contexts = len(self.split.context)
        chosen = self.context_cells[context].ravel()
        counts = {q: np.zeros(len(e)) for q, e in self.embeddings.items()}
        if self.unit == "record":
            for i, q in enumerate(self.split.context):
                # A record that is missing is no question asked, which is public; this one is as far as can be from it.
                counts[q][:] = 1.0
                if context[i]:
                    counts[q][1:] = 0.0
        else:
            few = math.ceil(_SAFE * self.noise)
            for q in self.split.context:
                counts[q][:] = few
                counts[q][-1] = _MANY * max(few, 1)
        if self.unit != "respondent":
            if self.unit == "response":
                for cell in chosen:
                    counts[self.split.context[cell % contexts]][cell // contexts] += 1
            for cell in self.train_cells[train].ravel():
                counts[self.split.train[cell]][0] = 1.0
            return GroupData(name, counts)
        known = np.repeat(
            np.arange(contexts * _OPTIONS),
            np.concatenate([counts[q] for q in self.split.context]).astype(int),
        )
        persons = [len(known), *np.full(int(context.sum()), self.context_cells.shape[1])]
        persons += [self.train_cells.shape[1]] * int(train.sum())
        person = np.concatenate(
            [np.arange(len(known)), np.repeat(np.arange(len(persons) - 1) + len(known), persons[1:])]
        )
        trained = self.train_cells[train].ravel()
        question = np.concatenate([known // _OPTIONS, chosen % contexts, contexts + trained])
        option = np.concatenate([known % _OPTIONS, chosen // contexts, np.zeros(len(trained), dtype=int)])
        responses = Responses(person, question, option)
        return GroupData(name, counts_of(self.questions, responses, name), responses=responses)

    def context_scores(self, shares: dict[str, Floats]) -> Floats:
        """(m,) evidence for each context canary in the shares a client keeps; question -> (K,)."""
        kept = np.stack([shares[q] for q in self.split.context])  # (C, K)
        if self.unit == "record":
            found = kept[:, 0]
            return found - np.median(found)
        few = math.ceil(_SAFE * self.noise)
        noisy = (
            _MANY * max(few, 1) * kept[:, :-1] / kept[:, -1:] - few
        )  # (C, K-1) counts without the known answers
        return (noisy.T.ravel()[self.context_cells] - 0.5).sum(axis=1)


def _cells(count: int, width: int, limit: int) -> NDArray[np.int64]:
    """(m, width) disjoint cells, neighbours together, of `count`; at most `limit` canaries."""
    m = min(count // width, limit)
    return np.arange(m * width).reshape(m, width)


class WhiteBox:
    """The adversary of the training rounds: knows the parameters, the questions, the schedule and every gradient."""

    def __init__(self, agreement: Agreement, survey: CanarySurvey, seed: int) -> None:
        self.plan, self.survey = agreement.plan, survey
        self.model = PreferencePredictor(agreement.predictor)
        self.parameters = flatten(crafted(self.model, survey.length, seed))
        points = context_points(
            [survey.embeddings[q] for q in self.plan.context],
            [np.full(_OPTIONS, 1.0 / _OPTIONS)] * len(self.plan.context),
        )
        used = survey.train_cells.size
        rows = [self._gradient(survey.embeddings[q], points) for q in self.plan.train[:used]]
        self.gradients = np.stack(rows)  # (cells, P) float32
        self._products = (self.gradients @ self.gradients.T).astype(np.float64)  # (cells, cells)
        self._column = {q: i for i, q in enumerate(self.plan.train[:used])}
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
            norms = np.sqrt(np.einsum("ic,cd,id->i", mine, self._products, mine, optimize=True))
            weights += mine * np.minimum(1.0, self.plan.clip / np.maximum(norms, 1e-9))[:, None]
        return weights

    def _asked(self, questions: Sequence[str]) -> Floats:
        """(m, cells): which cells of which canary a step asks for."""
        asked = np.zeros(len(self._column))
        asked[[self._column[q] for q in questions if q in self._column]] = 1.0
        mine: Floats = self._owned * asked
        return mine

    def _gradient(self, embedding: NDArray[np.float32], points: torch.Tensor) -> NDArray[np.float32]:
        """(P,) gradient of the cross entropy of the first option, by plain autograd."""
        targets, mask = pad_options([embedding])
        loss = -log_likelihood(self.model(points[None], targets), mask)[0, 0]
        grads = torch.autograd.grad(loss, list(self.model.parameters()))
        return torch.cat([g.reshape(-1) for g in grads]).numpy()

    def estimates(self, updates: Callable[[int], Floats], per_question: float) -> Floats:
        """(m,) in what share of the steps that ask for it each training canary seems to be: least squares over all rounds.

        updates: round -> the client's pseudo-gradient (P,); per_question: the client's own (private) estimate of its
        answers per question, by which it scales its updates.
        """
        matched = np.zeros(len(self._inverse))
        for index, weights in enumerate(self._weights):
            questions = len(self.plan.steps(index)[0])
            scale = max(1.0, self.plan.expected_batch(max(per_question, 1.0), questions))
            update = (updates(index) * scale).astype(np.float32)
            seen = np.zeros(weights.shape[1])
            for cell in np.flatnonzero(weights.any(axis=0)):
                seen[cell] = self.gradients[cell] @ update
            matched += weights @ seen
        estimate: Floats = self._inverse @ matched
        return estimate

    def scores(self, estimates: Floats, clients: int = 1) -> Floats:
        """Log-likelihood ratios (..., m) of "included" to "not", from `estimates` whose noise is that of so many clients.

        A canary that is included is in Binomial(steps, sample_rate) of the steps that ask for it; otherwise in none.
        """
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


def request(client: Client, kind: str, **body: object) -> Message:
    """The client's answer to one request. Raises Refused for a refusal."""
    reply = unpack(REPLIES, client.handle(pack(REQUESTS, kind, **body)), client.client_id)
    if reply.kind == "refusal":
        raise Refused(client.client_id, reply.body["code"], reply.body["reason"])
    return reply


class Asked:
    """One real client, asked as a coordinator asks; keeps the ledger rows it sends."""

    def __init__(self, client: Client, store: ClientStore) -> None:
        self._client, self._store = client, store
        self._parties = len(client.agreement.clients)
        self.context_rows: list[dict[str, object]] = []
        self.training_rows: list[dict[str, object]] = []
        request(client, "setup", run=client.agreement.plan.run, agreement=client.agreement.digest())
        self.context_rows += json.loads(request(client, "context").body["ledger"])

    def stolen(self) -> tuple[dict[str, Floats], float]:
        """What a thief of the client's store reads: shares of its context, and its noisy answers per question."""
        state = self._store.load()
        shares = {q: np.frombuffer(raw) for q, raw in state["context"].items()}
        return shares, unpack_float(state["per_question"], "stolen state", "per_question") or 1.0

    def update(self, index: int, parameters: NDArray[np.float32]) -> Floats:
        """The pseudo-gradient (P,) of a round, in the clear."""
        layout = self._client.agreement.predictor_layout
        body = {"session": PREDICTOR, "round": index, "parameters": parameters.astype("<f4").tobytes()}
        reply = request(self._client, "train", message=b"", **body).body
        self.training_rows += json.loads(reply["ledger"])
        coded = np.frombuffer(reply["message"], dtype=f"<u{layout.ring_bits // 8}")
        return layout.preflight(self._parties).decode(coded, 1)


def clear_agreement(config: Config, survey: CanarySurvey, clients: int) -> Agreement:
    """The run's agreement over the canary survey, without masks."""
    names = [f"canary client {i}" for i in range(clients)]
    directory = Directory({name: _identity(config, name).public_bytes() for name in names})
    agreement = make_agreement(
        config, f"canaries/{config.seed}", survey.questions, survey.split, {name: name for name in names}, directory,
        _EMBEDDING, "canaries",
    )  # fmt: skip
    return replace(agreement, mode="clear", secure_rng=False)


def measure(
    config: Config, canaries: int, confidence: float, progress: Callable[[int, int], None]
) -> list[View]:
    """Plant at least `canaries` training canaries, let the clients release, and bound epsilon for each kind of release.

    progress: called with (clients done, clients). Raises ConfigError where the configuration claims nothing.
    """
    if not config.privacy.enabled:
        raise ConfigError("privacy=off claims nothing that could be audited. Fix: privacy=dp")
    real = surveys.load(config.data, config.seed)
    split = surveys.split_questions(
        real.questions, config.data.context, config.data.heldout_fraction, config.seed
    )
    cohort = len(real.groups) * config.federation.members_per_group
    limit = max(1, _MEMORY // (4 * _parameters(config)))
    survey = CanarySurvey(config, len(split.train), len(split.context), limit)
    each = len(survey.train_cells)
    clients = cohort * math.ceil(canaries / (each * cohort))
    agreement = clear_agreement(config, survey, clients)
    box = WhiteBox(agreement, survey, config.seed)
    coins = np.random.default_rng([config.seed, 0xC014])
    context_in = coins.random((clients, len(survey.context_cells))) < 0.5
    train_in = coins.random((clients, each)) < 0.5
    context_scores, estimates = [], []
    paid: list[list[dict[str, object]]] = [[], []]
    with scratch() as folder:
        for i, name in enumerate(agreement.groups):
            store = ClientStore(Path(folder) / str(i))
            data = survey.data(name, context_in[i], train_in[i])
            key = hashlib.sha256(f"canary noise/{config.seed}/{i}".encode()).digest()
            client = Client(
                name, data, agreement, survey.embeddings, store, _identity(config, name), noise_key=key
            )
            asked = Asked(client, store)
            shares, per_question = asked.stolen()
            context_scores.append(survey.context_scores(shares))
            estimates.append(
                box.estimates(lambda index, asked=asked: asked.update(index, box.parameters), per_question)  # type: ignore[misc]
            )
            if not i:
                paid = [asked.context_rows, asked.training_rows]
            elif [_cost(asked.context_rows), _cost(asked.training_rows)] != [_cost(rows) for rows in paid]:
                raise RunError(f"{name!r} paid for other releases than the first client")
            progress(i + 1, clients)
    delta = config.privacy.delta
    claims = [epsilon(_cost(rows), delta, config.privacy.accountant) for rows in paid]
    views = [
        View(
            "context", "who stole a client's state", claims[0],
            audit(np.concatenate(context_scores), context_in.ravel(), delta, confidence),
        )
    ]  # fmt: skip
    if not claims[1]:
        return views  # the rounds release nothing of their own: training is post-processing
    found = np.stack(estimates)  # (clients, m)
    views.append(
        View(
            "update", "who sees one client's updates in the clear", claims[1],
            audit(box.scores(found).ravel(), train_in.ravel(), delta, confidence),
        )
    )  # fmt: skip
    # In the sum over a cohort the adversary takes off what it knows of all clients but the first.
    others = found - config.privacy.sample_rate * train_in
    summed = found[::cohort] + others.reshape(-1, cohort, each)[:, 1:].sum(axis=1)
    views.append(
        View(
            "sum of updates", f"who sees the sum over {cohort} clients and knows the data of all but one", claims[1],
            audit(box.scores(summed, cohort).ravel(), train_in[::cohort].ravel(), delta, confidence),
        )
    )  # fmt: skip
    return views


def _cost(rows: list[dict[str, object]]) -> list[GaussianEvent]:
    return [
        GaussianEvent(float(r["noise_multiplier"]), float(r["sample_rate"]), int(r["count"]))  # type: ignore[arg-type, call-overload]
        for r in rows
    ]


def _parameters(config: Config) -> int:
    from appa_secure.predictor import PredictorShape

    p = config.predictor
    shape = PredictorShape(_EMBEDDING, p.dim, p.layers, p.heads, p.ff, p.mlp_depth)
    return sum(w.numel() for w in PreferencePredictor(shape).parameters())


def _identity(config: Config, name: str) -> IdentityKey:
    return IdentityKey.from_seed(hashlib.sha256(f"canaries/{config.seed}/{name}".encode()).digest())
