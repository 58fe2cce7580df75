"""Canaries in clients' data, and what the strongest adversary of the threat model reads off the clients' releases.

The clients are the real ones: data in, requests answered by `Client.handle`, noise and sampling theirs, and what they
claim to have spent is what their own ledger rows say. The noise, the clipping norm, the rate, the schedule of questions
and the number of rounds are those of the configured run. What is made up is what the definition of differential privacy
lets an adversary choose: the other answers (it knows them), the question texts (`survey`), and the parameters that the
coordinator sends (`whitebox`). They are chosen so that nothing but the noise stands between a canary and the adversary.

The adversary has stolen the client's state, twice, with a restart and another request for the context in between: a
client that makes its noisy counts anew gives itself away. Or it sees one client's update in the clear (secagg.mode=clear
shows what masks hide), or the sum over the run's clients of which it knows all but one.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appa_secure import data as surveys
from appa_secure.agreement import PREDICTOR, Agreement, make_agreement
from appa_secure.audit.bound import Bound, audit, gaussian_bound, gaussian_epsilon
from appa_secure.audit.survey import EMBEDDING, CanarySurvey, Coins, Floats
from appa_secure.audit.whitebox import WhiteBox
from appa_secure.config import Config
from appa_secure.errors import ConfigError, RunError
from appa_secure.messages import REPLIES, REQUESTS, Message, Refused, pack, unpack, unpack_float
from appa_secure.predictor import PredictorShape, PreferencePredictor
from appa_secure.privacy.accounting import GaussianEvent, epsilon
from appa_secure.secagg.keys import Directory, IdentityKey
from clients.client import Client
from clients.store import ClientStore

_MEMORY = 2**29  # bytes of gradients held at most


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for simulated clients' stores, in memory where there is one: each answer waits for the disk twice."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="appa-audit-", dir=memory if memory.is_dir() else None)


@dataclass(frozen=True)
class View:
    """One kind of release as one adversary sees it. claimed: epsilon of its ledger rows alone, at the run's delta.

    bound: for any mechanism. gaussian: epsilon for a Gaussian mechanism without subsampling, of independent clients, and
    the largest that could have been proved; None where the rows claim something else. confidence: that both hold.
    """

    name: str
    adversary: str
    claimed: float
    bound: Bound
    gaussian: tuple[float, float] | None
    confidence: float

    @property
    def measured(self) -> float:
        """The larger of the lower bounds."""
        return self.bound.epsilon if self.gaussian is None else max(self.bound.epsilon, self.gaussian[0])

    @property
    def ceiling(self) -> float:
        """The most that could have been proved."""
        return self.bound.ceiling if self.gaussian is None else max(self.bound.ceiling, self.gaussian[1])

    @property
    def exceeded(self) -> bool:
        """Whether a measured lower bound refutes the claim."""
        return self.measured > self.claimed


Row = dict[str, Any]


def judge(
    name: str, adversary: str, rows: Iterable[Row], scores: Floats, included: Coins, config: Config, confidence: float
) -> View:  # fmt: skip
    """What scores (clients, m) for the coins `included` (clients, m) prove about the releases that `rows` paid for."""
    events, delta = _cost(rows), config.privacy.delta
    claimed = epsilon(events, delta, config.privacy.accountant)
    gaussian = None
    if all(e.sample_rate == 1 for e in events):
        confidence_each = 1 - (1 - confidence) / 2
        accuracy = ((scores > 0) == included).mean(axis=1)
        mu, most = (gaussian_bound(a, confidence_each) for a in (accuracy, np.ones(len(accuracy))))
        gaussian = gaussian_epsilon(mu, delta), gaussian_epsilon(most, delta)
    else:
        confidence_each = confidence
    bound = audit(scores.ravel(), included.ravel(), delta, confidence_each)
    return View(name, adversary, claimed, bound, gaussian, confidence)


def request(client: Client, kind: str, **body: object) -> Message:
    """The client's answer to one request. Raises Refused for a refusal."""
    reply = unpack(REPLIES, client.handle(pack(REQUESTS, kind, **body)), client.client_id)
    if reply.kind == "refusal":
        raise Refused(client.client_id, reply.body["code"], reply.body["reason"])
    return reply


class Asked:
    """One real client, asked as a coordinator asks; keeps the ledger rows it sends, by the release they pay for."""

    def __init__(self, start: Callable[[ClientStore], Client], store: ClientStore) -> None:
        """start: opens the client on its store."""
        self._start, self._store = start, store
        self.context_rows: dict[str, Row] = {}
        self.training_rows: dict[str, Row] = {}
        self._open()

    def _open(self) -> None:
        self._client = client = self._start(self._store)
        self._parties = len(client.agreement.clients)
        request(client, "setup", run=client.agreement.plan.run, agreement=client.agreement.digest())
        _keep(self.context_rows, request(client, "context").body["ledger"])

    def restart(self) -> None:
        """What a new process at the client's does; asked for its context again."""
        self._open()

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
        _keep(self.training_rows, reply["ledger"])
        coded = np.frombuffer(reply["message"], dtype=f"<u{layout.ring_bits // 8}")
        return layout.preflight(self._parties).decode(coded, 1)


def _keep(rows: dict[str, Row], ledger: bytes) -> None:
    rows |= {row["release"]: row for row in json.loads(ledger)}


def clear_agreement(config: Config, survey: CanarySurvey, clients: int) -> Agreement:
    """The run's agreement over the canary survey, without masks."""
    names = [f"canary client {i}" for i in range(clients)]
    directory = Directory({name: _identity(config, name).public_bytes() for name in names})
    agreement = make_agreement(
        config, f"canaries/{config.seed}", survey.questions, survey.split, {name: name for name in names}, directory,
        EMBEDDING, "canaries",
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
    limit = max(1, _MEMORY // (8 * _parameters(config)))
    survey = CanarySurvey(config, len(split.train), len(split.context), limit)
    each = len(survey.train_cells)
    clients = cohort * math.ceil(canaries / (each * cohort))
    agreement = clear_agreement(config, survey, clients)
    box = WhiteBox(agreement, survey, config.seed)
    coins = np.random.default_rng([config.seed, 0xC014])
    context_in = coins.random((clients, len(survey.context_cells))) < 0.5
    train_in = coins.random((clients, each)) < 0.5
    first_scores, estimates = [], []
    paid: tuple[list[Row], list[Row]] = ([], [])
    with scratch() as folder:
        for i, name in enumerate(agreement.groups):
            data = survey.data(name, context_in[i], train_in[i])
            key = hashlib.sha256(f"canary noise/{config.seed}/{i}".encode()).digest()

            def start(
                store: ClientStore, name: str = name, data: surveys.GroupData = data, key: bytes = key
            ) -> Client:
                identity = _identity(config, name)
                return Client(name, data, agreement, survey.embeddings, store, identity, noise_key=key)

            asked = Asked(start, ClientStore(Path(folder) / str(i)))
            shares, per_question = asked.stolen()

            def update(index: int, asked: Asked = asked) -> Floats:
                return asked.update(index, box.parameters)

            estimates.append(box.estimates(update, per_question))
            asked.restart()
            readings = [survey.first_scores(s) for s in (shares, asked.stolen()[0])]
            first_scores.append(np.mean(readings, axis=0))
            mine = list(asked.context_rows.values()), list(asked.training_rows.values())
            if not i:
                paid = mine
            elif [_cost(rows) for rows in mine] != [_cost(rows) for rows in paid]:
                raise RunError(f"{name!r} paid for other releases than the first client")
            progress(i + 1, clients)
    found = np.stack(estimates)  # (clients, m)
    first, rounds = paid
    views = [
        judge(
            "histograms" if survey.histogram else "context", "who stole a client's state", first, np.stack(first_scores),
            np.hstack([context_in, train_in])[:, : survey.first_release], config, confidence,
        )
    ]  # fmt: skip
    # Rounds that pay for nothing of their own are post-processing of the first release, and covered by what it claims.
    views.append(
        judge(
            "update", "who sees one client's updates in the clear", rounds or first, box.scores(found), train_in,
            config, confidence,
        )
    )  # fmt: skip
    # In the sum over a cohort the adversary takes off what it knows of all clients but the first.
    rate = config.privacy.sample_rate if rounds else 1.0
    others = found - rate * train_in
    summed = found[::cohort] + others.reshape(-1, cohort, each)[:, 1:].sum(axis=1)
    views.append(
        judge(
            "sum of updates", f"who sees the sum over {cohort} clients and knows the data of all but one", rounds or first,
            box.scores(summed, cohort), train_in[::cohort], config, confidence,
        )
    )  # fmt: skip
    return views


def _cost(rows: Iterable[Row]) -> list[GaussianEvent]:
    return [
        GaussianEvent(float(r["noise_multiplier"]), float(r["sample_rate"]), int(r["count"])) for r in rows
    ]


def _parameters(config: Config) -> int:
    p = config.predictor
    shape = PredictorShape(EMBEDDING, p.dim, p.layers, p.heads, p.ff, p.mlp_depth)
    return sum(w.numel() for w in PreferencePredictor(shape).parameters())


def _identity(config: Config, name: str) -> IdentityKey:
    return IdentityKey.from_seed(hashlib.sha256(f"canaries/{config.seed}/{name}".encode()).digest())
