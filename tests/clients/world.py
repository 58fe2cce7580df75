"""A small federation for tests: synthetic answers, random embeddings, the smallest predictor; no files, no
models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from appa_secure.aggregation import AggregationSpec
from appa_secure.agreement import Agreement
from appa_secure.data import GroupData, Question, Responses
from appa_secure.data.survey import counts_of
from appa_secure.messages import REPLIES, REQUESTS, Message, pack, unpack
from appa_secure.predictor import PredictorShape
from appa_secure.privacy.ledger import Budget
from appa_secure.privacy.plan import TrainingPlan
from appa_secure.records import RunDir
from appa_secure.secagg.keys import Directory, IdentityKey
from clients.client import Client
from clients.store import ClientStore
from coordinator.rounds import Rounds

EMBEDDING = 5
SHAPE = PredictorShape(embedding=EMBEDDING, dim=8, layers=1, heads=2, ff=8, mlp_depth=2)
KEY = bytes(range(32))


def make_questions(count: int) -> tuple[Question, ...]:
    """Questions q0, q1, ... with 2, 3, 4, 2, 3, ... options on a scale."""
    return tuple(
        Question(
            f"q{i}", f"Question {i}?", tuple(f"option {k}" for k in range(2 + i % 3)), tuple(range(2 + i % 3))
        )
        for i in range(count)
    )


def make_embeddings(questions: Sequence[Question], seed: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {q.qid: rng.standard_normal((len(q.options), EMBEDDING)).astype(np.float32) for q in questions}


def make_group(
    name: str, questions: Sequence[Question], people: int = 40, answers: int = 6, seed: int = 0
) -> GroupData:
    """`people` persons who answer `answers` random questions each."""
    rng = np.random.default_rng([seed, *name.encode()])
    rows = [(person, int(q)) for person in range(people) for q in rng.permutation(len(questions))[:answers]]
    option = [int(min(rng.integers(0, 6), len(questions[q].options) - 1)) for _, q in rows]
    responses = Responses(np.array([p for p, _ in rows]), np.array([q for _, q in rows]), np.array(option))
    return GroupData(name, counts_of(questions, responses, name), responses=responses)


def make_plan(train: Sequence[str], context: Sequence[str], **changes: Any) -> TrainingPlan:
    plan = TrainingPlan(
        run="test-run", seed=1, train=tuple(train), context=tuple(context), rounds=3, local_steps=1,
        questions_per_step=4, lr=0.1, private=True, unit="response", clip=0.7,
        sample_rate=0.4, noise_multiplier=2.0, answers_per_unit=1,
    )  # fmt: skip
    return replace(plan, **changes)


@dataclass
class World:
    """An agreement, clients in this process, and a transport that can lose, watch and change messages."""

    root: Path
    agreement: Agreement
    groups: dict[str, GroupData]
    embeddings: dict[str, np.ndarray]
    identities: dict[str, IdentityKey]
    members: dict[str, Client] = field(default_factory=dict)
    offline: set[str] = field(default_factory=set)
    watched: list[tuple[str, bytes, bytes | None]] = field(default_factory=list)
    lose: Callable[[str, Message], bool] | None = None

    @property
    def clients(self) -> tuple[str, ...]:
        return self.agreement.clients

    def start(self, client: str) -> Client:
        """(Re)start a client from its store."""
        agreement = self.agreement
        noise = None if agreement.secure_rng else hashlib.sha256(b"noise" + client.encode()).digest()
        self.members[client] = Client(
            client, self.groups[client], agreement, self.embeddings,
            ClientStore(self.root / "clients" / client), self.identities[client], noise_key=noise,
        )  # fmt: skip
        return self.members[client]

    def exchange(self, requests: Mapping[str, bytes]) -> dict[str, bytes]:
        replies = {}
        for client, raw in requests.items():
            if client in self.offline or (
                self.lose is not None and self.lose(client, unpack(REQUESTS, raw, "test"))
            ):
                self.watched.append((client, raw, None))
                continue
            replies[client] = self.members[client].handle(raw)
            self.watched.append((client, raw, replies[client]))
        return replies

    def ask(self, client: str, kind: str, **body: Any) -> Message:
        return unpack(REPLIES, self.members[client].handle(pack(REQUESTS, kind, **body)), client)

    def set_up(self, *kinds: str) -> None:
        """Take every client through `setup` and `context`."""
        for client in self.clients:
            assert (
                self.ask(client, "setup", run="test-run", agreement=self.agreement.digest()).kind == "setup"
            )
            assert self.ask(client, "context").kind == "context"

    def run_dir(self, name: str = "run") -> RunDir:
        root = self.root / name
        return RunDir.open(root) if (root / "stages").is_dir() else RunDir.create(root)

    def rounds(self, run: RunDir) -> Rounds:
        return Rounds(self.agreement, self, run)


def make_world(
    root: Path,
    groups: int = 5,
    members: int = 1,
    questions: int = 9,
    plan: Mapping[str, Any] | None = None,
    spec: AggregationSpec | None = None,
    data: Mapping[str, GroupData] | None = None,
    **changes: Any,
) -> World:
    """`groups` groups g0, g1, ... of `members` clients each; questions q0-q2 are context, all but the last
    two train.
    """
    survey = make_questions(questions)
    qids = [q.qid for q in survey]
    names = {
        f"g{g}" if members == 1 else f"g{g} #{m}": f"g{g}" for g in range(groups) for m in range(members)
    }
    identities = {c: IdentityKey.from_seed(hashlib.sha256(c.encode()).digest()) for c in names}
    training = make_plan(qids[3:-2], qids[:3], **(plan or {}))
    agreement = Agreement(
        plan=training, budget=Budget(1e3, 1e-6, "rdp", training.unit), context_noise=4.0,
        questions={q.qid: q for q in survey}, reward="wasserstein", aggregation=spec or AggregationSpec(),
        predictor=SHAPE, groups=names,
        directory=Directory({c: k.public_bytes() for c, k in identities.items()}),
        mode="blind", release="abort", threshold=0.667, min_cohort=3, ring_bits=64, rounds_per_epoch=4,
        embedder="test",
    )  # fmt: skip
    agreement = replace(agreement, **changes)
    held = {c: (data or {}).get(c) or make_group(c, survey) for c in names}
    world = World(root, agreement, held, make_embeddings(survey), identities)
    for client in names:
        world.start(client)
    return world
