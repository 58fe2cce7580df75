"""Secure sums as the coordinator asks for them: epochs, rounds, bytes counted, everything in the transcript.

`Rounds.sum` is the only way a number leaves the clients. In blind mode it returns the sum over all clients, in cohort
mode one sum per group, in clear mode (comparison only) the sum of the same fixed-point codes without masks.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from appa_secure.agreement import PREDICTOR, Agreement
from appa_secure.errors import PrivacyError, RunError
from appa_secure.journal import atomic_write, canonical_json
from appa_secure.membership import Membership, renewed
from appa_secure.messages import REPLIES, REQUESTS, Message, Refused, digest, pack, unpack
from appa_secure.records import RunDir
from appa_secure.secagg.coordinator import CoordinatorMachine
from appa_secure.secagg.driver import resume
from appa_secure.secagg.errors import BadEncoding, RemoteMisbehaviour
from appa_secure.secagg.fixedpoint import Layout
from appa_secure.secagg.keys import digest as fingerprint
from appa_secure.secagg.outcomes import Aborted, Aggregate, EpochReady

_COUNTER = "epochs"


class Federation(Protocol):
    """A transport: bytes to clients and back. A client missing from the replies dropped out."""

    clients: tuple[str, ...]

    def exchange(self, requests: Mapping[str, bytes]) -> dict[str, bytes]:
        """Send each client its request and return the replies that came."""
        ...


@dataclass(frozen=True)
class Summed:
    """One opened sum: (L,) float64 over `contributors`, and the plain fields of their replies."""

    sum: np.ndarray
    contributors: tuple[str, ...]
    dropped: tuple[str, ...]
    replies: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class NotOpened:
    """A round that was aborted; nothing was revealed. unpaid: a client's privacy budget did not allow its part."""

    reason: str
    unpaid: bool = False


def ask(
    federation: Federation, kind: str, clients: Sequence[str] | None = None, **body: Any
) -> dict[str, Message]:
    """Send one request to every client, or to `clients`. Raises Refused for a refusal and RunError for silence."""
    raw = pack(REQUESTS, kind, **body)
    asked = federation.clients if clients is None else clients
    replies = federation.exchange(dict.fromkeys(asked, raw))
    silent = sorted(set(asked) - set(replies))
    if silent:
        raise RunError(
            f"no answer to {kind!r} from {', '.join(silent)}: bring the client back and resume the run"
        )
    return {client: _reply(client, kind, reply) for client, reply in sorted(replies.items())}


def _reply(client: str, kind: str, raw: bytes) -> Message:
    message = unpack(REPLIES, raw, client)
    if message.kind == "refusal":
        raise Refused(client, message.body["code"], message.body["reason"])
    if message.kind != kind:
        raise BadEncoding(client, f"answered {kind!r} with {message.kind!r}")
    return message


def in_force(founding: Agreement, run: RunDir) -> Agreement:
    """The agreement with the members that the transcript last recorded."""
    for row in reversed(list(run.transcript)):
        if row["event"] == "membership":
            facts = {k: row[k] for k in ("version", "period", "clients")}
            return renewed(founding, Membership.decode(canonical_json({"run": founding.plan.run, **facts})))
    return founding


class Rounds:
    """All secure-aggregation sessions of one run. `agreement` has the members in force, `founding` the first ones."""

    def __init__(self, agreement: Agreement, federation: Federation, run: RunDir) -> None:
        self.founding, self.federation, self.run = agreement, federation, run
        self.agreement = in_force(agreement, run)
        self._machines: dict[str, CoordinatorMachine] = {}
        self._roster: dict[str, str] = {}

    def sum(self, session: str, kind: str, payload: Mapping[str, Any], layout: Layout) -> Summed | NotOpened:
        """One sum over the clients of `session`; `kind` and `payload` are the request their vectors answer."""
        body = {"session": session, **payload}
        context = digest(kind, body)
        if self.agreement.clear:
            return self._clear_sum(session, kind, body, layout, context)
        machine = self._ready(session, layout)
        if isinstance(machine, NotOpened):
            return machine
        wire = _Wire(self.federation, session, kind, body)
        outcome = resume(machine, wire.exchange, machine.begin_round(machine.last_round + 1, context, layout))
        if isinstance(outcome, Aborted):
            faults = _faults(wire, outcome)
            self.run.transcript.abort(
                outcome.reason, session=session, round=outcome.round, phase=outcome.phase, faults=faults
            )
            return NotOpened(_reason(wire, outcome), wire.unpaid)
        assert isinstance(outcome, Aggregate)
        self.run.transcript.round(
            epoch=machine.parameters.epoch, round_id=outcome.round, kind=kind, context=context.hex(),
            roster_hash=self._roster[session], messages=wire.digests, contributors=outcome.contributors,
            dropouts=outcome.dropped, session=session, bytes_per_client=wire.largest, culprits=list(outcome.culprits),
        )  # fmt: skip
        return Summed(outcome.sum, outcome.contributors, outcome.dropped, wire.replies)

    def change(self, agreement: Agreement) -> None:
        """Go on with other members: the epochs in progress end, the next sums set new ones up."""
        self.close()
        self.agreement = agreement

    def close(self) -> None:
        """End all epochs: clients destroy the secrets of rounds that will not be needed."""
        for session, machine in self._machines.items():
            _Wire(self.federation, session, "", {}).exchange(machine.close_epoch())
        self._machines.clear()

    def _ready(self, session: str, layout: Layout) -> CoordinatorMachine | NotOpened:
        """The session's machine with a round left; sets a new epoch up where there is none."""
        machine = self._machines.get(session)
        if machine is not None and machine.rounds_left:
            return machine
        a = self.agreement
        directory = (
            a.directory if session == PREDICTOR or not a.cohort else a.members(session.partition("/")[2])
        )
        release = a.predictor_release if session == PREDICTOR else a.release
        machine = CoordinatorMachine(
            a.session_id(session), directory, threshold=a.threshold_of(len(directory)), min_cohort=a.min_cohort,
            rounds=a.rounds_per_epoch, ring_bits=a.ring_bits, release=release,
        )  # fmt: skip
        number = self._next_epoch()
        wire = _Wire(self.federation, session, "", {})
        outcome = resume(machine, wire.exchange, machine.propose(number))
        if isinstance(outcome, Aborted):
            faults = _faults(wire, outcome)
            self.run.transcript.abort(
                outcome.reason, session=session, epoch=number, phase=outcome.phase, faults=faults
            )
            return NotOpened(_reason(wire, outcome))
        assert isinstance(outcome, EpochReady)
        self._roster[session] = outcome.transcript.hex()
        keys = {c: fingerprint("fingerprint", directory[c]).hex()[:16] for c in outcome.roster}
        self.run.transcript.epoch(
            number, outcome.transcript.hex(), keys, session=session, absent=list(outcome.absent)
        )
        self._machines[session] = machine
        return machine

    def _next_epoch(self) -> int:
        """Epoch numbers never repeat within a run, also after a crash in the middle of a set-up."""
        path = self.run.path("stages") / _COUNTER
        number = int(path.read_text()) + 1 if path.exists() else 1
        atomic_write(path, str(number))
        return number

    def _clear_sum(
        self, session: str, kind: str, body: Mapping[str, Any], layout: Layout, context: bytes
    ) -> Summed | NotOpened:
        raw = pack(REQUESTS, kind, message=b"", **body)
        replies = self.federation.exchange(dict.fromkeys(self.agreement.clients, raw))
        coding = layout.preflight(len(self.agreement.clients))
        vectors, fields, sent = [], {}, {}
        for client, reply in sorted(replies.items()):
            message = _reply(client, kind, reply).body
            if len(message["message"]) * 8 != layout.size * layout.ring_bits:
                raise BadEncoding(
                    client, f"{kind}: {len(message['message'])} bytes are not {layout.size} coded values"
                )
            vectors.append(np.frombuffer(message["message"], dtype=f"<u{layout.ring_bits // 8}"))
            fields[client] = {k: v for k, v in message.items() if k != "message"}
            sent[f"upload/{client}"] = hashlib.sha256(reply).hexdigest()
        dropped = tuple(sorted(set(self.agreement.clients) - set(fields)))
        if dropped:
            self.run.transcript.abort("clients stayed silent", session=session, faults=list(dropped))
            return NotOpened(f"no answer from {', '.join(dropped)}")
        total = coding.decode(coding.add(vectors), len(vectors))
        self.run.transcript.round(
            epoch=0, round_id=len(self.run.transcript), kind=kind, context=context.hex(), roster_hash="",
            messages=sent, contributors=sorted(fields), dropouts=[], session=session, masked=False,
            bytes_per_client=max(len(v) * layout.ring_bits // 8 for v in vectors),
        )  # fmt: skip
        return Summed(total, tuple(sorted(fields)), (), fields)


def _faults(wire: _Wire, outcome: Aborted) -> list[str]:
    """What went wrong with whom: refused by the client around the protocol, and in the protocol."""
    found = wire.faults + [f"{f.party}: {f.reason}" for f in outcome.faults]
    found += [f"{name}: culprit" for name in outcome.culprits]
    return found + [f"{one} or {other}: one of them lies about a packet" for one, other in outcome.disputes]


def _reason(wire: _Wire, outcome: Aborted) -> str:
    """Why nothing was opened, with what clients gave as their reasons."""
    refusals = [f"client {f.party!r} refused: {f.reason}" for f in outcome.faults if f.kind == "refusal"]
    return "; ".join([outcome.reason, *wire.faults, *refusals])


class _Wire:
    """Wraps secure-aggregation messages in this run's requests and unwraps the replies, counting bytes."""

    def __init__(self, federation: Federation, session: str, kind: str, body: Mapping[str, Any]) -> None:
        self.federation, self.session, self.kind, self.body = federation, session, kind, body
        self.first = bool(kind)  # the first exchange of a round carries the request itself
        self.replies: dict[str, Mapping[str, Any]] = {}
        self.digests: dict[str, str] = {}
        self.faults: list[str] = []
        self.unpaid = False
        self._bytes: dict[str, int] = defaultdict(int)

    @property
    def largest(self) -> int:
        """Bytes the busiest client sent."""
        return max(self._bytes.values(), default=0)

    def exchange(self, outbound: Mapping[str, bytes]) -> dict[str, bytes]:
        kind = self.kind if self.first else "secagg"
        body = self.body if self.first else {"session": self.session}
        label = "upload" if self.first else "answer"
        self.first = False
        requests = {
            client: pack(REQUESTS, kind, message=message, **body) for client, message in outbound.items()
        }
        out = {}
        for client, raw in self.federation.exchange(requests).items():
            try:
                reply = _reply(client, kind, raw)
            except (Refused, RemoteMisbehaviour) as error:
                self.faults.append(str(error))
                self.unpaid |= isinstance(error, Refused) and error.code == PrivacyError.__name__
                continue
            self._bytes[client] += len(raw)
            if self.kind:
                self.digests[f"{label}/{client}"] = hashlib.sha256(raw).hexdigest()
            if label == "upload":
                self.replies[client] = {k: v for k, v in reply.body.items() if k != "message"}
            out[client] = reply.body["message"]
        return out
