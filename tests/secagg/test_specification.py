"""The written specification is held to the code: every label, and the size of every field of real messages."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest

from appa_secure.secagg import cbor, close_epoch, keys
from appa_secure.secagg.keys import KEY_BYTES, bind
from appa_secure.secagg.schedule import KINDS
from appa_secure.secagg.wire import (
    BODIES,
    MAC_BYTES,
    SIGNATURE_BYTES,
    WITH_MAC,
    Envelope,
    named_sender,
    parse,
)
from tests.secagg.world import LAYOUT, World
from tests.test_docs import REPO, SPECIFICATION, fields, named, table

PACKAGE = REPO / "appa_secure" / "secagg"
GONE, N, ROUNDS = 2, 8, 3
REPLY_FIELDS = ("SHA-256(payload)", "SHA-256(request)", "context")  # of `wire.reply_mac`, in its order


def labels() -> set[str]:
    """The first argument of every call of `bind` and `digest` in the package; only literals are allowed there."""
    found = set()
    for path in sorted(PACKAGE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("bind", "digest")
            ):
                (label, *_) = node.args
                if isinstance(label, ast.Constant):
                    found.add(label.value)
                else:
                    assert ast.unparse(node) == "bind(purpose, *fields)", f"{path.name}: {ast.unparse(node)}"
    return found


def test_the_key_schedule_lists_every_label_and_no_other() -> None:
    rows = table(SPECIFICATION, "label", "in", "input beside the label")
    listed = [label for row in rows for label in named(row[0])]
    assert len(set(listed)) == len(listed) == len(rows)
    assert set(listed) == labels()


def test_hashes_begin_with_bind_or_take_bound_bytes() -> None:
    """Nothing else is hashed: what SHA-256 is called on in the package, apart from `digest` itself."""
    calls = [
        ast.unparse(node.args[0])
        for path in sorted(PACKAGE.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "hashlib.sha256"
    ]
    assert sorted(calls) == sorted(
        [
            "bind(purpose, *fields)",
            "message",  # payloads and requests: go into bind("message", ...) and bind("reply", ...)
            "bundle.raw",  # goes into the digest of the roster
            "_PAIR_CHECK + seed",
            "prefix + index.to_bytes(4, 'big') + share",
        ]
    )


def messages(world: World) -> dict[str, list[Envelope]]:
    """Every message of an epoch with a round in which some dropped out, by type; nested ones too."""
    seen: dict[str, list[Envelope]] = {type_: [] for type_ in BODIES}

    def keep(envelope: Envelope) -> bytes:
        seen[envelope.type].append(envelope)
        for value in envelope.body.values():
            for raw in value if isinstance(value, list) else [value]:
                if isinstance(raw, bytes) and raw[:1] == b"\x82" and len(raw) > 100:
                    seen[(inner := parse(raw, named_sender(raw, "test"))).type].append(inner)
        return envelope.raw

    world.outbound = world.inbound = lambda name, envelope: keep(envelope)
    world.setup()
    world.silent = {"round": set(world.names[:GONE])}
    world.round(1)
    for name in world.names:
        keep(parse(world.answer(name, b"nonsense") or b"", name))
    close_epoch(world.coordinator, world.exchange)
    return seen


@pytest.fixture(scope="module")
def seen() -> dict[str, list[Envelope]]:
    return messages(World(N, rounds=ROUNDS))


def test_every_message_has_the_size_that_is_written(seen: dict[str, list[Envelope]]) -> None:
    rows = table(SPECIFICATION, "type", "field", "form", "size")
    assert sorted(row[:2] for row in rows) == sorted(fields(BODIES))
    # On the complete graph everybody is everybody's holder, ward and peer.
    known = {
        "n": N, "m": N, "D": N, "h": N, "w": N, "p": N - 1, "a": N - GONE, "d": GONE, "gone": GONE, "R": ROUNDS,
        "L": LAYOUT.size, "B": LAYOUT.ring_bits // 8,
    }  # fmt: skip
    for type_, field, form, size, content in rows:
        assert content
        if field == "–":
            continue
        assert form == BODIES[type_][field]
        assert (size == "–") == (form in ("uint", "text") or (type_, field) == ("ready", "ack"))
        assert seen[type_], f"no {type_} was seen"
        for envelope in seen[type_] if size != "–" else ():
            here = {**known, "acks": len(envelope.body.get("acks", ()))}
            (formula,) = named(size)
            assert len(envelope.body[field]) == eval(formula, {"__builtins__": {}}, here), (type_, field)


def head(x: int) -> int:
    return 1 if x < 24 else 2 if x < 2**8 else 3 if x < 2**16 else 5 if x < 2**32 else 9


def size(value: Any) -> int:
    if isinstance(value, int):
        return head(value)
    if isinstance(value, list):
        return head(len(value)) + sum(map(size, value))
    content = value.encode() if isinstance(value, str) else value
    return head(len(content)) + len(content)


def test_envelopes_have_the_size_and_order_that_is_written(seen: dict[str, list[Envelope]]) -> None:
    text = SPECIFICATION.read_text("utf-8")
    ((payload, signed, with_mac, unsigned),) = re.findall(
        r"^payload +P = (.+)\n.*\nmessage += (.+?) {3,}.*\n += (.+?) {3,}.*\n += (.+?) {3,}",
        text,
        re.MULTILINE,
    )
    order = [row[0] for row in table(SPECIFICATION, "field", "form", "bytes after the key")]
    for envelope in (e for envelopes in seen.values() for e in envelopes):
        assert list(cbor.decode(envelope.payload)) == order
        known = {
            "H": head, "T": len(envelope.type), "epoch": envelope.epoch, "round": envelope.round,
            "I": len(envelope.sender.encode()), "S": len(envelope.session),
            "body": 1 + sum(1 + len(name) + size(value) for name, value in envelope.body.items()),
        }  # fmt: skip
        known["P"] = eval(payload, {"__builtins__": {}}, known)
        assert len(envelope.payload) == known["P"]
        formula = with_mac if envelope.type in WITH_MAC else signed
        formula = unsigned if envelope.sender == keys.COORDINATOR else formula
        assert len(envelope.raw) == eval(formula, {"__builtins__": {}}, known)


def test_constants_are_those_written() -> None:
    text = SPECIFICATION.read_text("utf-8")
    signed = len(bind("message", bytes(32)))
    assert f'`bind("message", SHA-256(payload))`, {signed} bytes' in text
    assert f"| version | uint | `1` | {keys.VERSION} |" in text
    assert (KINDS, KEY_BYTES, SIGNATURE_BYTES, MAC_BYTES) == (3, 32, 64, 32)
    assert f'bind("reply", {", ".join(REPLY_FIELDS)})' in text
