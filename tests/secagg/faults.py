"""Epochs under fault schedules, and what must hold whatever the schedule.

A schedule is a list of `Hit`s: in this phase, this happens to this party. Transport faults lose, corrupt, cut, lengthen,
repeat, delay or misdirect bytes; lies are well-formed messages signed with the liar's own key. `Trial` plays an epoch
and checks after every phase that ends:

exact     an aggregate is the exact ring sum of what its contributors put in, a lie about one's own vector included;
named     who did not take part is in the faults, nobody untouched is blamed, and an untouched client that refuses
          names somebody who was touched; whoever handed in a wrong share is a culprit; there is a liar in every
          disputed pair;
alive     while every secret has threshold untouched holders and no liar can spoil the step, it succeeds with all of them;
once      no client ever sends two uploads or two answers in one round.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from appa_secure.secagg import (
    Aborted,
    Aggregate,
    ClientMachine,
    Continue,
    CoordinatorMachine,
    EpochReady,
    RemoteMisbehaviour,
    cbor,
    errors,
    shamir,
)
from appa_secure.secagg.wire import Envelope, parse, peek
from tests.secagg.world import CONTEXT, World, random_vector

PHASES = ("propose", "roster", "start", "round", "unmask")
SETUP = PHASES[:3]

# Faults after which a party's own reply of the phase cannot have been accepted.
ABSENT = ("request lost", "reply lost", "reply corrupt", "reply cut", "reply longer", "reply late")
# Faults that leave the party in the phase, or may.
PRESENT = ("twice", "stale first", "misdirected", "crash", "coordinator crash")
MAYBE = ("request corrupt", "request cut", "request longer")
LIES = {
    "propose": ("other keys", "low-order key", "short keys", "other proposal"),
    "roster": ("garbled packets", "wrong digests", "swapped packets", "missing packet", "other seeds"),
    "start": ("other transcript", "garbled field", "false accusation"),
    "round": ("other vector", "noise", "other context", "short vector", "refusal"),
    "unmask": ("wrong shares", "one wrong share", "short answer", "swapped fields", "garbled field"),
}
CODES = {name for name, kind in vars(errors).items() if isinstance(kind, type)}


@dataclass(frozen=True)
class Hit:
    """`what` happens to the party with index `party` (modulo n) in `phase`; `seed` fills in the details."""

    phase: str
    party: int
    what: str
    seed: int = 0

    @property
    def is_lie(self) -> bool:
        return self.what in LIES[self.phase]


class Trial:
    """One federation under faults. `touched` parties may be missing or blamed; of all others nothing may be said."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.touched: set[str] = set()
        self.liars: set[str] = set()
        self.spoilers: set[str] = set()  # liars whose dealt secrets are wrong: rounds with them abort
        self.earlier: dict[str, bytes] = {}  # any older message of a party
        self.sent: dict[tuple[str, str, int, int], bytes] = {}
        self.wrong_answers: set[str] = set()
        self.absent: set[str] = set()  # named when the epoch was set up

    # -- playing

    def setup(self, hits: Iterable[Hit], epoch: int = 1) -> EpochReady | Aborted:
        p = self.world.coordinator.parameters
        outcome = self._play(self.world.coordinator.propose(epoch), hits)
        clean = set(self.world.names) - self.touched
        self._check_blame(outcome, self.world.names)
        if isinstance(outcome, EpochReady):
            assert clean <= set(outcome.roster) <= set(self.world.names)
            assert set(outcome.absent) == set(self.world.names) - set(outcome.roster)
            self.absent = set(outcome.absent)
        else:
            self._check_abort(outcome)
            assert len(clean) < p.threshold or self._spoiled(hits, SETUP), outcome
        return outcome

    def round(self, round_id: int, hits: Iterable[Hit]) -> Aggregate | Aborted:
        world, coordinator = self.world, self.world.coordinator
        world.vectors = {name: random_vector(world.layout, (name, round_id)) for name in world.names}
        self.coding = world.layout.preflight(len(coordinator.roster))
        self.wrong_answers = set()
        self.put_in = {name: self.coding.encode(vector) for name, vector in world.vectors.items()}
        outcome = self._play(coordinator.begin_round(round_id, CONTEXT, world.layout), hits)
        clean = set(coordinator.roster) - self.touched
        if isinstance(outcome, Aggregate):
            self._check_blame(outcome, coordinator.roster)
            assert outcome.round == round_id
            assert clean <= set(outcome.contributors)
            assert sorted(outcome.contributors + outcome.dropped) == list(coordinator.roster)
            expected = self.coding.add([self.put_in[name] for name in outcome.contributors])
            np.testing.assert_array_equal(outcome.ring_sum, expected)
            assert not self.spoilers & set(outcome.contributors), "secrets nobody committed to were accepted"
            self._check_culprits(outcome, hits)
        else:
            self._check_blame(outcome, coordinator.roster)
            self._check_abort(outcome)
            spoiled = self._spoiled(hits, PHASES[3:]) or self.spoilers
            assert not self._enough(clean) or spoiled, outcome
        return outcome

    def _enough(self, clean: set[str]) -> bool:
        """Whether these parties alone can upload, and open every secret."""
        p, graph = self.world.coordinator.parameters, self.world.coordinator._epoch.graph
        holders = [len(clean.intersection(row)) for row in graph.holders.values()]
        return len(clean) >= p.threshold and min(holders) >= p.sharing.threshold

    def _play(self, step: Continue, hits: Iterable[Hit]) -> Any:
        outcome: Any = step
        held: list[tuple[str, bytes]] = []  # late messages, delivered in the next phase
        while isinstance(outcome, Continue):
            phase = peek(next(iter(outcome.outbound.values()))).type
            by_party: dict[str, list[Hit]] = {}
            for hit in hits:
                if hit.phase == phase:
                    by_party.setdefault(self.world.names[hit.party % len(self.world.names)], []).append(hit)
            deliveries, late = held, []
            for name, request in outcome.outbound.items():
                on_time, later = self._exchange(name, request, by_party.get(name, []))
                deliveries = deliveries + on_time
                late += later
            self._order(hits, phase).shuffle(deliveries)
            crash = any(hit.phase == phase and hit.what == "coordinator crash" for hit in hits)
            for i, (sender, message) in enumerate(deliveries):
                if crash and i == len(deliveries) // 2:
                    state = self.world.coordinator.export_state()
                    self.world.coordinator = CoordinatorMachine.restore(state, self.world.directory)
                try:
                    self.world.coordinator.receive(sender, message)
                except RemoteMisbehaviour:
                    continue
            held = late
            outcome = self.world.coordinator.advance()
        return outcome

    @staticmethod
    def _order(hits: Iterable[Hit], phase: str) -> random.Random:
        return random.Random(repr((phase, [hit.seed for hit in hits])))

    def _exchange(
        self, name: str, request: bytes, hits: list[Hit]
    ) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
        """What reaches the coordinator as coming from whom, in this phase and in the next."""
        rng = random.Random(repr([hit.seed for hit in hits]))
        happening = {hit.what for hit in hits}
        if happening:
            self.touched.add(name)
        if "request lost" in happening:
            return [], []
        for kind in MAYBE:
            if kind in happening:
                request = damage(kind, request, rng)
        lies = [hit for hit in hits if hit.is_lie]
        if "other seeds" in happening:
            self._falsify_seeds(name)
        reply = self.world.answer(name, request)
        if reply is None:
            return [], []
        self._check_once(name, reply)
        if "crash" in happening:
            self._restart(name)
            assert self.world.answer(name, request) == reply, f"{name} answers otherwise after a restart"
        for lie in lies[:1]:
            reply = self._lie(name, parse(reply, name), lie.what, rng)
        before, after = [], [(name, reply)]
        if "stale first" in happening and name in self.earlier:
            before.append((name, self.earlier[name]))
        if "misdirected" in happening:
            other = rng.choice([n for n in self.world.names if n != name])
            self.touched.add(other)
            before.append((other, reply))
        self.earlier[name] = reply
        if "twice" in happening:
            after *= 2
        if "reply lost" in happening:
            after = []
        for kind in ("reply corrupt", "reply cut", "reply longer"):
            if kind in happening:
                after = [(name, damage(kind, reply, rng))]
        if "reply late" in happening:
            return before, after
        return before + after, []

    # -- lying

    def _lie(self, name: str, envelope: Envelope, what: str, rng: random.Random) -> bytes:
        """The same message with a lie in it, signed by its sender."""
        body = dict(envelope.body)
        changes: dict[str, Any] = {}
        if envelope.type == "refusal":
            return envelope.raw
        if what == "other keys":
            body["mask_keys"] = rng.randbytes(len(body["mask_keys"]))
        elif what == "low-order key":
            body.update(
                rng.choice([{"encryption_key": bytes(32)}, {"mask_keys": bytes(len(body["mask_keys"]))}])
            )
        elif what == "short keys":
            body["mask_keys"] = body["mask_keys"][:-1]
        elif what == "other transcript" and "ack" in body:
            ack = parse(body["ack"], name)
            body["ack"] = self.world.reseal(ack, {"transcript": rng.randbytes(32)})
        elif what in ("other proposal", "other transcript", "other context"):
            body[what.split()[1]] = rng.randbytes(32)
        elif what in ("garbled packets", "wrong digests", "swapped packets", "missing packet"):
            body["packets"] = self._packets(name, body["packets"], what, rng)
        elif what == "other vector":
            vector = random_vector(self.world.layout, rng.random())
            difference = self.coding.encode(vector) - self.put_in[name]
            body["vector"] = self._shifted(name, body["vector"], difference)
        elif what == "noise":
            noise = np.frombuffer(rng.randbytes(len(body["vector"])), self.put_in[name].dtype)
            body["vector"] = self._shifted(name, body["vector"], noise)
        elif what == "short vector":
            body["vector"] = body["vector"][:-1]
        elif what == "refusal":
            changes["type"] = "refusal"
            text = "x" * rng.choice([1, 10_000])
            body = {"refused": "round", "code": "Tired", "reason": text, "accused": text}
        elif what == "false accusation":
            changes["type"] = "refusal"
            accused = rng.choice([other for other in self.world.names if other != name])
            body = {"refused": "start", "code": "BadShare", "reason": f"{accused}: no", "accused": accused}
        elif what in ("wrong shares", "one wrong share"):
            field = _shares_field(body)
            self.wrong_answers.add(name)
            body[field] = _wrong_shares(body[field], what == "wrong shares", rng)
        elif what == "short answer":
            body[_shares_field(body)] = body[_shares_field(body)][: -shamir.SHARE_BYTES]
        elif what == "swapped fields":
            body = dict(zip(body, reversed(body.values()), strict=True))
        elif what == "garbled field":
            field = rng.choice([f for f in body if body[f]])
            body[field] = rng.randbytes(len(body[field]))
        self.liars.add(name)
        return self.world.reseal(envelope, body, **changes)

    def _packets(self, dealer: str, packets: list[bytes], what: str, rng: random.Random) -> list[bytes]:
        if what == "missing packet":
            return packets[:-1]
        if what == "swapped packets":
            return packets[::-1]
        changed = []
        for raw in packets:
            envelope = parse(raw, dealer)
            body = dict(envelope.body)
            if body["to"] != dealer and rng.random() < 0.4:
                field = "ciphertext" if what == "garbled packets" else "digests"
                body[field] = rng.randbytes(len(body[field]))
                self.touched.add(body["to"])  # it cannot take part, and says whose fault that is
            changed.append(self.world.reseal(envelope, body))
        return changed

    def _shifted(self, name: str, vector: bytes, difference: np.ndarray) -> bytes:
        self.put_in[name] = self.put_in[name] + difference
        return (np.frombuffer(vector, difference.dtype) + difference).tobytes()

    def _falsify_seeds(self, name: str) -> None:
        """Between its bundle and its shares, the liar replaces the seeds it committed to."""
        fields = cbor.decode(self.world.clients[name].export_state())
        if fields["epoch"]:
            secrets = next(field for field in ("seeds", "secrets") if field in fields["epoch"])
            fields["epoch"][secrets] = bytes(len(fields["epoch"][secrets]))
            self._restart(name, cbor.encode(fields))
            self.liars.add(name)
            self.spoilers.add(name)

    def _restart(self, name: str, state: bytes | None = None) -> None:
        world = self.world
        world.clients[name] = ClientMachine.restore(
            state or world.clients[name].export_state(),
            name, world.identities[name], world.directory, world.policy,
        )  # fmt: skip

    # -- checking

    def _spoiled(self, hits: Iterable[Hit], phases: tuple[str, ...]) -> bool:
        """Whether a lie was told that may cost the step even among honest others."""
        return any(hit.phase in phases and hit.what == "noise" for hit in hits)

    def _check_once(self, name: str, reply: bytes) -> None:
        envelope = parse(reply, name)
        if envelope.type in ("upload", "answer"):
            key = (name, envelope.type, envelope.epoch, envelope.round)
            assert self.sent.setdefault(key, reply) == reply, f"{name} answered a round twice"

    def _check_blame(self, outcome: EpochReady | Aggregate | Aborted, asked: Iterable[str]) -> None:
        for fault in outcome.faults:
            if fault.party not in self.touched:
                assert fault.kind == "refusal", f"{fault} although nothing happened to it"
                assert any(name in fault.reason for name in self.touched), fault
        if not isinstance(outcome, Aborted):
            present = outcome.roster if isinstance(outcome, EpochReady) else outcome.contributors
            missing = set(asked) - set(present)
            assert missing <= {fault.party for fault in outcome.faults}, "somebody's absence is not reported"
        if isinstance(outcome, Aggregate) or len(self.liars) <= self._most_liars():
            assert set(outcome.culprits) <= self.liars, "a culprit who told no lie"
        if not isinstance(outcome, Aggregate):
            pairs = [set(pair) for pair in outcome.disputes]
            assert all(pair & self.liars for pair in pairs), "a dispute between two who told no lie"
            assert len(set().union(*pairs)) == sum(map(len, pairs)), "somebody is in two disputes"

    def _most_liars(self) -> int:
        """More may gang up on somebody."""
        return max(1, self.world.coordinator.parameters.sharing.corrupt)

    def _check_culprits(self, outcome: Aggregate, hits: Iterable[Hit]) -> None:
        """Whether its share was needed or not."""
        touched = [
            self.world.names[hit.party % len(self.world.names)] for hit in hits if hit.phase == "unmask"
        ]
        wrong = {name for name in self.wrong_answers if touched.count(name) == 1}
        assert wrong <= set(outcome.culprits), "shares were wrong, and their authors are not named"

    def _check_abort(self, outcome: Aborted) -> None:
        assert outcome.code in CODES, outcome
        assert outcome.reason
        if outcome.code == "BadShare":
            assert outcome.culprits, "an abort over wrong shares names nobody"
        blamed = {fault.party for fault in outcome.faults} | set(outcome.culprits)
        named = blamed or any(name in outcome.reason for name in self.liars)
        # On a sparse graph too few of somebody's holders may be left of those that were named when the epoch was set up.
        known = outcome.code == "BelowThreshold" and self.absent
        assert named or known or outcome.code == "SumOutOfRange", outcome


def damage(kind: str, message: bytes, rng: random.Random) -> bytes:
    """A corrupted, cut or lengthened message."""
    if kind.endswith("corrupt"):
        broken = bytearray(message)
        for _ in range(rng.choice([1, 1, 2, 8])):
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        return bytes(broken) if bytes(broken) != message else message[:-1]
    if kind.endswith("cut"):
        return message[: rng.randrange(len(message))]
    return message + rng.randbytes(rng.choice([1, 7, 100_000]))


def _shares_field(body: Mapping[str, bytes]) -> str:
    """The field of an answer that holds shares in clear."""
    return next(field for field in ("shares", "survivors", "dropped") if body.get(field))


def _wrong_shares(shares: bytes, every: bool, rng: random.Random) -> bytes:
    """Field elements that were never dealt."""
    values = np.frombuffer(shares, "<u4").copy()
    positions: Iterable[int] = range(len(values)) if every else [9 * rng.randrange(len(values) // 9) + 4]
    for i in positions:
        values[i] = (int(values[i]) + rng.randrange(1, 2**31 - 1)) % (2**31 - 1)
    return values.tobytes()
