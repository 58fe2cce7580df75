"""Driving one client by hand: requests of every kind, and a coordinator's session that can stop anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from appa_secure.agreement import PREDICTOR
from appa_secure.journal import read_journal
from appa_secure.messages import REQUESTS, Message, digest, pack, pack_float
from appa_secure.privacy.accounting import GaussianEvent
from appa_secure.secagg.coordinator import CoordinatorMachine
from appa_secure.secagg.driver import resume
from appa_secure.secagg.outcomes import Aborted, EpochReady
from coordinator.predictor import initial_predictor, train_predictor
from coordinator.rounds import _Wire
from tests.clients.world import World

ME = "g0"


def parameters(world: World, seed: int = 1) -> bytes:
    return initial_predictor(world.agreement, seed).astype("<f4").tobytes()


def refused(reply: Message, code: str, words: str = "") -> None:
    assert reply.kind == "refusal", reply
    assert reply.body["code"] == code, reply.body
    assert words in reply.body["reason"]


class Ledgered:
    """A client's ledger file, read from outside."""

    def __init__(self, root: Path, client: str = ME) -> None:
        self.rows = read_journal(root / "clients" / client / "ledger.jsonl")
        self.events = [GaussianEvent(r["noise_multiplier"], r["sample_rate"], r["count"]) for r in self.rows]


class Session:
    """A coordinator's session, driven by hand so that a test can stop anywhere in it."""

    def __init__(self, world: World, name: str, release: str) -> None:
        a = world.agreement
        self.world, self.name = world, name
        self.machine = CoordinatorMachine(
            a.session_id(name), a.directory, threshold=a.threshold_of(len(a.directory)),
            min_cohort=a.min_cohort, rounds=a.rounds_per_epoch, ring_bits=a.ring_bits, release=release,  # type: ignore[arg-type]
        )  # fmt: skip

    def open(self, epoch: int = 1) -> None:
        wire = _Wire(self.world, self.name, "", {})
        assert isinstance(resume(self.machine, wire.exchange, self.machine.propose(epoch)), EpochReady)

    def give_up(self) -> None:
        """Nobody answered the round that was begun."""
        assert isinstance(self.machine.advance(), Aborted)

    def request(self, kind: str, layout: Any, **body: Any) -> bytes:
        """The bytes with which the next round begins."""
        body = {"session": self.name, **body}
        step = self.machine.begin_round(self.machine.last_round + 1, digest(kind, body), layout)
        return pack(REQUESTS, kind, message=step.outbound[ME], **body)


def training(world: World) -> Session:
    session = Session(world, PREDICTOR, "recover")
    session.open()
    return session


def train_request(world: World, session: Session, index: int = 0, seed: int = 1) -> bytes:
    return session.request(
        "train", world.agreement.predictor_layout, round=index, parameters=parameters(world, seed)
    )


def trained(world: World) -> None:
    with world.run_dir() as run:
        theta = train_predictor(world.agreement, world.rounds(run), run, 1, 3e-3, lambda *_: None)
    for client in world.clients:
        assert world.ask(client, "freeze", parameters=theta.astype("<f4").tobytes()).kind == "freeze"


def score_body(world: World, step: int = 1, opened: int = 0, z: float | None = None) -> dict[str, Any]:
    """What a score request asks; the normaliser goes to those only who need it."""
    return {
        "step": step,
        "opened": opened,
        "z": pack_float(z if world.agreement.needs_normaliser else None),
        "questions": ["q3", "q4"],
        "answers": ["3 4", "0 1 2"],
    }
