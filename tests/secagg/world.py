"""A small federation for the tests: seeded randomness, and a transport that can lie, lose and tamper."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from appa_secure.secagg import (
    Aborted,
    Aggregate,
    ClientMachine,
    ClientPolicy,
    CoordinatorMachine,
    Directory,
    EpochReady,
    IdentityKey,
    Layout,
    ReleaseRefused,
    Segment,
    respond,
    run_epoch_setup,
    run_round,
    schedule,
)
from appa_secure.secagg.keys import COORDINATOR
from appa_secure.secagg.wire import WITH_MAC, Envelope, parse, peek, seal, seal_reply

SESSION = b"test session"
CONTEXT = hashlib.sha256(b"rollouts").digest()
LAYOUT = Layout((Segment("reward", 4, 0.0, 1.0), Segment("history", 2, -2.0, 3.0)))

Rewrite = Callable[[str, Envelope], bytes | None]


def seeded(seed: object) -> Callable[[int], bytes]:
    """Reproducible bytes, for tests only."""
    calls = count()
    return lambda size: hashlib.shake_256(repr((seed, next(calls))).encode()).digest(size)


def names(n: int) -> tuple[str, ...]:
    return tuple(f"site-{i:02d}" for i in range(n))


def identities(n: int) -> dict[str, IdentityKey]:
    return {name: IdentityKey.generate(seeded(("identity", name))) for name in names(n)}


def random_vector(layout: Layout, seed: object) -> np.ndarray:
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:8], "big"))
    return np.concatenate([rng.uniform(s.lo, s.hi, s.size) for s in layout.segments])


def reseal(
    envelope: Envelope, body: Mapping[str, Any], identity: IdentityKey | None = None, **changes: Any
) -> bytes:
    """The same message with another body or envelope fields, signed by `identity` if given."""
    head = ("type", "session", "epoch", "round", "sender")
    return seal(*(changes.get(name, getattr(envelope, name)) for name in head), body, identity)


class World:
    """n clients and a coordinator. `silent[type]` lists clients that do not answer requests of that type;
    `outbound` and `inbound` may rewrite messages (return None to lose one)."""

    def __init__(
        self,
        n: int,
        *,
        release: str = "recover",
        asked: str | None = None,
        layout: Layout = LAYOUT,
        rounds: int = 3,
        min_cohort: int = 2,
        seed: object = 0,
        threshold: int | None = None,
        colluders: int | None = 0,
    ) -> None:
        self.names = names(n)
        self.identities = identities(n)
        self.directory = Directory({name: key.public_bytes() for name, key in self.identities.items()})
        self.policy = ClientPolicy(
            min_cohort=min_cohort, release=release, ring_bits=layout.ring_bits, colluders=colluders
        )
        self.clients = {
            name: ClientMachine(name, key, self.directory, self.policy, seeded((seed, name)))
            for name, key in self.identities.items()
        }
        self.coordinator = CoordinatorMachine(
            SESSION,
            self.directory,
            threshold=threshold,
            min_cohort=min_cohort,
            rounds=rounds,
            ring_bits=layout.ring_bits,
            release=asked or release,
            rng=seeded((seed, COORDINATOR)),
        )
        self.layouts = dict.fromkeys(self.names, layout)
        self.contexts = dict.fromkeys(self.names, CONTEXT)
        self.vectors = {name: random_vector(layout, (seed, name)) for name in self.names}
        self.layout = layout
        self.silent: dict[str, set[str]] = {}
        self.outbound: Rewrite = lambda name, envelope: envelope.raw
        self.inbound: Rewrite = lambda name, envelope: envelope.raw
        self.uploads: dict[str, bytes] = {}
        self.paid: dict[str, int] = {}  # how often each client paid for noise
        self.broke = False  # nobody can pay any more

    def exchange(self, requests: Mapping[str, bytes]) -> dict[str, bytes]:
        replies = {}
        for name, raw in requests.items():
            if name in self.silent.get(peek(raw).type, ()):
                continue
            message = self.outbound(name, peek(raw))
            reply = self.answer(name, message) if message is not None else None
            if reply is None:
                continue
            envelope = parse(reply, name)
            if envelope.type == "upload":
                self.uploads[name] = envelope.body["vector"]
            rewritten = self.inbound(name, envelope)
            if rewritten is not None:
                replies[name] = rewritten
        return replies

    def answer(self, name: str, message: bytes) -> bytes | None:
        return respond(
            self.clients[name],
            message,
            lambda e, r, c: (self.vectors[name], self.layouts[name], self.contexts[name]),
            lambda: self.pay(name),
        )

    def pay(self, name: str) -> bytes:
        """The secret for noise, counted; what a client with a ledger does."""
        if self.broke:
            raise ReleaseRefused(COORDINATOR, "the budget is used up")
        self.paid[name] = self.paid.get(name, 0) + 1
        return self.noise_secret(name)

    def noise_secret(self, name: str) -> bytes:
        return hashlib.sha256(b"noise of " + name.encode()).digest()

    def noise_key(self, name: str, round_id: int, context: bytes = CONTEXT) -> bytes:
        """The key of a client's noise in one round, as its machine derives it."""
        coding = self.layout.preflight(len(self.coordinator.roster)).digest
        return schedule.noise_key(
            self.noise_secret(name), self.coordinator.parameters, name, round_id, coding, context
        )

    def setup(self, epoch: int = 1) -> EpochReady | Aborted:
        return run_epoch_setup(self.coordinator, self.exchange, epoch)

    def round(self, round_id: int, context: bytes = CONTEXT) -> Aggregate | Aborted:
        return run_round(self.coordinator, self.exchange, round_id, context, self.layout)

    def ring_sum(self, contributors: tuple[str, ...]) -> np.ndarray:
        coding = self.layout.preflight(len(self.coordinator.roster))
        return coding.add([coding.encode(self.vectors[name]) for name in contributors])

    def proposal(self, **changes: Any) -> bytes:
        """The proposal of the coordinator's present epoch, or a false one."""
        p = self.coordinator.parameters
        body = {
            "clients": list(self.names), "threshold": p.threshold, "rounds": p.rounds, "ring_bits": p.ring_bits,
            "coordinator_key": p.coordinator_key,
        }  # fmt: skip
        return self.request("propose", 0, {**body, **changes})

    def reseal(self, envelope: Envelope, body: Mapping[str, Any], **changes: Any) -> bytes:
        """The same message with another body or envelope fields, as its sender itself can make it; an upload or answer
        for what the coordinator asked."""
        if changes.get("type", envelope.type) not in WITH_MAC:
            return reseal(envelope, body, self.identities[envelope.sender], **changes)
        epoch = self.coordinator._epoch
        request = replace(peek(epoch.outbound[envelope.sender]), **changes)
        key = self.clients[envelope.sender]._epoch.reply_key
        return seal_reply(envelope.type, envelope.sender, body, request, epoch.context, key)

    def request(self, type_: str, round_id: int, body: Mapping[str, Any]) -> bytes:
        """A message of a dishonest coordinator."""
        return seal(type_, SESSION, self.coordinator.parameters.epoch, round_id, COORDINATOR, body, None)
