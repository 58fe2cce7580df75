"""A structure-aware fuzzer over every decoder: only the protocol's own errors may come out.

Valid messages of a real epoch are damaged as bytes (bits, cuts, splices, length lies, deep nesting) or as trees (types
swapped, huge numbers, fields renamed, lists grown), at any depth: a bundle inside a roster inside a payload too. Most
damaged trees are signed, or authenticated, again with their sender's key, so that they get past the proof.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from appa_secure import messages
from appa_secure.secagg import (
    BadEncoding,
    ClientMachine,
    Continue,
    CoordinatorMachine,
    CorruptState,
    ProtocolError,
    RemoteMisbehaviour,
    cbor,
    respond,
    shamir,
    wire,
)
from appa_secure.secagg.keys import bind
from appa_secure.secagg.roster import open_bundle
from tests.secagg.world import CONTEXT, LAYOUT, World

NUMBERS = (0, 1, 2, 23, 24, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
TEXTS = (
    "",
    "coordinator",
    "site-00",
    "site-01",
    "site-99",
    "abort",
    "ready",
    "0x1p99999",
    "nan",
    "\0",
    "é" * 40,
)
FOREIGN = (-1, -(2**64), 1.5, None, True)
HEADS = (b"\xff", b"\x9f", b"\x5f", b"\x1b" + b"\xff" * 8, b"\x5b" + b"\xff" * 8, b"\x9b" + b"\0" * 7 + b"\x09",
         b"\xbb" + b"\xff" * 8, b"\x98\x18", b"\x58\x05", b"\xc0", b"\xf6", b"\xfb" + b"\0" * 8)  # fmt: skip


Provers = dict[str, Callable[[object, bytes], bytes]]
"""By sender: the proof of a payload of some type."""


@dataclass
class Target:
    """One decoder: what it is fed with, what it may raise. `reset` brings its machine back after an acceptance."""

    name: str
    run: Callable[[bytes], object]
    seeds: list[bytes]
    errors: tuple[type[BaseException], ...]
    weight: int = 1
    reset: Callable[[], None] = lambda: None


class Fuzzer:
    """Seeded. `keys` prove damaged messages again in their sender's name."""

    def __init__(self, seed: int, keys: Provers) -> None:
        self.rng = random.Random(seed)
        self.keys = keys

    def mutate(self, raw: bytes, others: list[bytes]) -> bytes:
        """One damaged version of `raw`."""
        if self.rng.random() < 0.3:
            for _ in range(self.rng.choice((1, 1, 1, 2, 5))):
                raw = self._bytes(raw, others)
            return raw
        return self._message(raw)

    def _bytes(self, raw: bytes, others: list[bytes]) -> bytes:
        rng, at = self.rng, self.rng.randrange(len(raw) + 1)
        how = rng.randrange(9)
        if how == 0 and raw:
            at %= len(raw)
            return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]
        if how == 1:
            return raw[:at]
        if how == 2:
            return raw + rng.randbytes(rng.choice((1, 2, 64)))
        if how == 3:
            head = rng.choice(HEADS)
            return raw[:at] + head + raw[at + len(head) :]
        if how == 4:
            return raw[:at] + rng.choice(HEADS) + raw[at:]
        if how == 5:
            return (
                raw[:at] + rng.choice((b"\x81", b"\xa1\x61a", b"\x9f")) * rng.choice((5, 9, 5000)) + raw[at:]
            )
        if how == 6:
            other = rng.choice(others)
            return raw[:at] + other[rng.randrange(len(other) + 1) :]
        if how == 7:
            end = min(len(raw), at + rng.randrange(1, 40))
            return raw[:at] + raw[end:]
        return rng.randbytes(rng.randrange(80))

    def _message(self, raw: bytes) -> bytes:
        """Damage the tree that `raw` encodes; a signed message is damaged in its payload and signed again."""
        try:
            tree = cbor.decode(raw)
            if (
                isinstance(tree, list)
                and len(tree) == 2
                and isinstance(tree[0], bytes)
                and self.rng.random() < 0.9
            ):
                fields = cbor.decode(tree[0])
                sender = fields.get("sender") if isinstance(fields, dict) else None
                payload = cbor.encode(self._tree(fields))
                key = self.keys.get(sender) if isinstance(sender, str) else None
                if key is not None and self.rng.random() < 0.9:
                    return cbor.encode([payload, key(fields.get("type"), payload)])
                return cbor.encode([payload, tree[1]])
            return cbor.encode(self._tree(tree))
        except (ValueError, OverflowError):  # not a tree, or damaged into something that has no encoding
            return self._bytes(raw, [raw])

    def _tree(self, node: Any) -> Any:
        """A copy with one node damaged."""
        rng = self.rng
        if isinstance(node, dict) and node and rng.random() < 0.85:
            key = "body" if "body" in node and rng.random() < 0.7 else rng.choice(list(node))
            return {**node, key: self._tree(node[key])}
        if isinstance(node, list) and node and rng.random() < 0.6:
            i = rng.randrange(len(node))
            return [*node[:i], self._tree(node[i]), *node[i + 1 :]]
        return self._node(node)

    def _node(self, node: Any) -> Any:
        rng = self.rng
        if rng.random() < 0.15:
            return rng.choice(
                (rng.choice(NUMBERS), rng.choice(TEXTS), rng.choice(FOREIGN), [], {}, b"", [node], {"a": node},
                 [[[[[[[[[node]]]]]]]]])
            )  # fmt: skip
        if isinstance(node, dict):
            return self._map(node)
        if isinstance(node, list):
            return self._list(node)
        if isinstance(node, bytes):
            if len(node) > 60 and rng.random() < 0.7:
                return self._message(node)
            if node and rng.random() < 0.5:  # the same length: found out by what it says, not by its form
                at = rng.randrange(len(node))
                return node[:at] + bytes([node[at] ^ 1 << rng.randrange(8)]) + node[at + 1 :]
            if rng.random() < 0.5:
                return rng.choice((node[:-1], node + b"\0", bytes(len(node)), b"\xff" * len(node), node * 3))
            return self._bytes(node, [node])
        if isinstance(node, str):
            return rng.choice((*TEXTS, node + "x", node[:-1], node.upper()))
        if isinstance(node, int):
            return rng.choice((*NUMBERS, node + 1, abs(node - 1)))
        return node

    def _map(self, node: dict[str, Any]) -> dict[Any, Any]:
        changed: dict[Any, Any] = dict(node)
        key = self.rng.choice(list(changed)) if changed else "a"
        how = self.rng.randrange(4)
        if how == 0:
            changed.pop(key, None)
        elif how == 1:
            changed[self.rng.choice(TEXTS)] = 0
        elif how == 2:
            changed[key + "x"] = changed.pop(key, 0)
        else:
            changed[self.rng.choice((7, b"k", key))] = 0
        return changed

    def _list(self, node: list[Any]) -> list[Any]:
        how = self.rng.randrange(5)
        if how == 0 and node:
            at = self.rng.randrange(len(node))
            return node[:at] + node[at + 1 :]
        if how == 1:
            return [*node, *node[:1]]
        if how == 2:
            return node[::-1]
        if how == 3:
            return node * self.rng.choice((2, 50))
        return [*node, self.rng.choice(TEXTS), self.rng.choice(NUMBERS)]


def fuzz(count: int, seed: int, targets: list[Target], keys: Provers) -> Counter[str]:
    """Feed `count` damaged messages; returns how they ended. Raises AssertionError with the message that broke in."""
    fuzzer, ended = Fuzzer(seed, keys), Counter[str]()
    everything = [raw for target in targets for raw in target.seeds]
    weights = [target.weight for target in targets]
    for number, target in enumerate(fuzzer.rng.choices(targets, weights, k=count)):
        raw = fuzzer.mutate(fuzzer.rng.choice(target.seeds), everything)
        try:
            target.run(raw)
        except target.errors as error:
            ended[type(error).__name__] += 1
        except Exception as error:
            raise AssertionError(
                f"{target.name} raised {type(error).__name__}: {error} (seed {seed}, message {number}): {raw.hex()}"
            ) from error
        else:
            ended["accepted"] += 1
            target.reset()
    return ended


# -- the decoders


class ClientTarget:
    """One client in one state, restored whenever a message was accepted."""

    def __init__(self, world: World, name: str, request: bytes) -> None:
        self.world, self.name = world, name
        self.state = world.clients[name].export_state()
        self.request = request
        self.calls = 0
        self.reset()

    def reset(self) -> None:
        world, name = self.world, self.name
        self.machine = ClientMachine.restore(
            self.state, name, world.identities[name], world.directory, world.policy
        )

    def respond(self, raw: bytes) -> None:
        """As a deployment calls it: whatever comes in, a reply goes out that the coordinator can read."""
        vector = self.world.vectors[self.name]
        reply = respond(self.machine, raw, lambda *_: (vector, LAYOUT, CONTEXT))
        if reply is None or wire.parse(reply, self.name).type != "refusal":
            return  # accepted
        self._unchanged()
        raise BadEncoding("coordinator", "refused")

    def call(self, raw: bytes) -> None:
        """The method that is due in this state, without the dispatcher's care."""
        machine, type_ = self.machine, wire.peek(self.request).type
        try:
            if type_ == "round":
                machine.upload(raw, self.world.vectors[self.name], layout=LAYOUT, context=CONTEXT)
            else:
                step = {
                    "propose": machine.open_epoch, "roster": machine.deal_shares, "start": machine.start_epoch,
                    "unmask": machine.unmask, "close": machine.close,
                }[type_]  # fmt: skip
                step(raw)
        except ProtocolError:
            self._unchanged()
            raise

    def _unchanged(self) -> None:
        self.calls += 1
        if self.calls % 64 == 0:
            assert self.machine.export_state() == self.state, "a rejected message changed the client"


class CoordinatorTarget:
    """The coordinator in one phase. Its list of faults grows with every message, so it is restored now and then."""

    def __init__(self, world: World, victim: str) -> None:
        self.directory, self.victim = world.directory, victim
        self.state = world.coordinator.export_state()
        self.calls = 0
        self.reset()

    def reset(self) -> None:
        self.machine = CoordinatorMachine.restore(self.state, self.directory)

    def receive(self, raw: bytes) -> None:
        self.calls += 1
        if self.calls % 500 == 0:
            self.reset()
        self.machine.receive(self.victim, raw)


def targets() -> tuple[list[Target], Provers]:
    """Every decoder, with the messages and states of one real epoch of three clients."""
    world, name = World(3, rounds=2, seed="fuzz"), "site-01"
    found: list[Target] = []
    requests: list[bytes] = []
    replies: list[bytes] = []
    client_states: list[bytes] = []
    coordinator_states: list[bytes] = [world.coordinator.export_state()]
    wire_errors = (BadEncoding,)

    def play(step: Any) -> Any:
        while isinstance(step, Continue):
            client = ClientTarget(world, name, step.outbound[name])
            coordinator = CoordinatorTarget(world, name)
            client_states.append(client.state)
            coordinator_states.append(coordinator.state)
            answers = world.exchange(step.outbound)
            requests.append(step.outbound[name])
            replies.append(answers[name])
            label = wire.peek(step.outbound[name]).type
            due, answer = client.request, answers[name]
            found.extend(
                [
                    Target(f"respond to {label}", client.respond, 3 * [due], (BadEncoding,), 2, client.reset),
                    Target(f"method for {label}", client.call, [due], (ProtocolError,), 4, client.reset),
                    Target(f"receive after {label}", coordinator.receive, 9 * [answer], (RemoteMisbehaviour,), 4,
                           coordinator.reset),
                ]
            )  # fmt: skip
            for sender, reply in answers.items():
                world.coordinator.receive(sender, reply)
            step = world.coordinator.advance()
        return step

    play(world.coordinator.propose(1))
    play(world.coordinator.begin_round(1, CONTEXT, LAYOUT))
    client_states.append(world.clients[name].export_state())
    epoch = world.coordinator._epoch
    requests.append(world.coordinator.close_epoch()[name])

    for target in found:  # what is due is sent most often, everything else now and then
        target.seeds += replies if target.name.startswith("receive") else requests

    def restore_client(raw: bytes) -> None:
        ClientMachine.restore(raw, name, world.identities[name], world.directory, world.policy)

    bundle = next(raw for raw in replies if wire.parse(raw, name).type == "bundle")
    parameters = world.coordinator.parameters
    sample: dict[str, Any] = {
        "text": "x",
        "uint": 7,
        "bytes": bytes(40),
        "[text]": ["q1", "q2"],
        "[uint]": [1],
    }
    outer = {
        label: [
            messages.pack(table, k, **{f: sample[form] for f, form in body.items()})
            for k, body in table.items()
        ]
        for label, table in (("requests", messages.REQUESTS), ("replies", messages.REPLIES))
    }
    rows, vector = b'[{"kind": "gaussian", "sigma": 1.5}]', np.arange(8, dtype="<f4").tobytes()
    found += [
        Target("cbor.decode", cbor.decode, requests + replies, (cbor.NotCanonical,), 3),
        Target("wire.parse", lambda raw: wire.parse(raw, name), replies, wire_errors, 4),
        Target("wire.peek", wire.peek, requests, wire_errors, 4),
        Target("wire.named_sender", lambda raw: wire.named_sender(raw, name), replies, wire_errors, 2),
        Target("open_bundle", lambda raw: open_bundle(raw, name, parameters, world.directory), [bundle],
               (RemoteMisbehaviour,), 3),
        Target("shamir.unpack", lambda raw: shamir.unpack(raw, 2), [bytes(range(72))], (), 1),
        Target("restore a client", restore_client, client_states, (CorruptState,), 3),
        Target("restore the coordinator", lambda raw: CoordinatorMachine.restore(raw, world.directory),
               coordinator_states, (CorruptState,), 3),
        Target("unpack a request", lambda raw: messages.unpack(messages.REQUESTS, raw, "c"), outer["requests"],
               wire_errors, 4),
        Target("unpack a reply", lambda raw: messages.unpack(messages.REPLIES, raw, "c"), outer["replies"],
               wire_errors, 4),
        Target("unpack rows", lambda raw: messages.unpack_rows(raw, "c", "ledger"), [rows], wire_errors),
        Target("unpack a float", lambda raw: messages.unpack_float(raw, "c", "z"), [bytes(8)], wire_errors),
        Target("unpack a vector", lambda raw: messages.unpack_vector(raw, "c", "p", 8), [vector], wire_errors),
    ]  # fmt: skip
    asked = {"upload": requests[3], "answer": requests[4]}

    def prover(sender: str) -> Callable[[object, bytes], bytes]:
        def prove(type_: object, payload: bytes) -> bytes:
            if sender == name and type_ in ("upload", "answer"):
                return wire.reply_mac(epoch.reply_keys[name], payload, asked[str(type_)], CONTEXT)
            return world.identities[sender].sign(bind("message", hashlib.sha256(payload).digest()))

        return prove

    return found, {sender: prover(sender) for sender in world.names}
