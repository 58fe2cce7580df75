"""Strict encoding: one accepted form per message; every deviation is an error that names the sender."""

from __future__ import annotations

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appa_secure.secagg import BadEncoding, BadSignature, ProtocolError, RemoteMisbehaviour, cbor
from appa_secure.secagg.wire import BODIES, WITH_MAC, parse, peek, seal, seal_reply, verify
from tests.secagg.world import World, identities

values = st.recursive(
    st.integers(0, 2**64 - 1) | st.binary(max_size=40) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEY = identities(1)["site-00"]


@given(values)
def test_cbor_round_trip_agrees_with_cbor2(value: object) -> None:
    data = cbor.encode(value)
    assert cbor.decode(data) == value == cbor2.loads(data)


@given(st.binary(max_size=60))
def test_whatever_is_accepted_is_canonical(data: bytes) -> None:
    try:
        value = cbor.decode(data)
    except cbor.NotCanonical:
        return
    assert cbor.encode(value) == data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\x00",
        b"\x18\x01",
        b"\x19\x00\xff",
        b"\x5f\xff",
        b"\x9f\xff",
        b"\x20",
        b"\xc0\x60",
        b"\xf5",
        b"\xf6",
        b"\xf9\x00\x00",
        b"\xa2\x61b\x01\x61a\x01",
        b"\xa2\x61a\x01\x61a\x01",
        b"\xa1\x01\x01",
        b"\x61\xff",
        b"\x9b" + b"\xff" * 8,
        b"\x5b" + b"\xff" * 8,
        b"\x81" * 50 + b"\x00",
    ],
)
def test_other_encodings_are_refused(data: bytes) -> None:
    with pytest.raises(cbor.NotCanonical):
        cbor.decode(data)


def ack(**changes: object) -> bytes:
    fields: dict[str, object] = {
        "version": 3, "type": "ack", "session": b"s", "epoch": 1, "round": 0, "sender": "site-00",
        "body": {"transcript": bytes(32)}, **changes,
    }  # fmt: skip
    payload = cbor.encode({name: value for name, value in fields.items() if value is not None})
    return cbor.encode([payload, bytes(64)])


def test_the_template_itself_is_accepted() -> None:
    assert parse(ack(), "site-00").body == {"transcript": bytes(32)}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (ack() + b"\0", "trailing"),
        (ack(version=1), "version 1"),
        (ack(version=None), "version None"),
        (ack(type="hello"), "unknown message type"),
        (ack(extra=1), "unknown fields"),
        (ack(round=None), "missing fields"),
        (ack(epoch="1"), "'epoch' is not uint"),
        (ack(body={"transcript": bytes(31)}), "'transcript' is not bytes:32"),
        (ack(body={}), "missing fields"),
        (ack(body={"transcript": bytes(32), "x": 0}), "unknown fields"),
        (ack(body=[1]), "body is missing"),
        (ack(sender="site-01"), "as its sender"),
        (ack(session=b""), "session has 0 bytes"),
        (cbor.encode([cbor.encode({}), b""]), "version None"),
        (cbor.encode([cbor.decode(ack())[0], bytes(63)]), "proof of a ack message has 63 bytes, needs 64"),
        (cbor.encode([cbor.decode(ack())[0] + b"\0", bytes(64)]), "trailing"),
        (cbor.encode({"a": 1}), "not [payload"),
        (b"\xd8\x1c\x80", "tags"),
    ],
)
def test_bad_messages_name_their_sender(message: bytes, reason: str) -> None:
    with pytest.raises(BadEncoding) as caught:
        parse(message, "site-00")
    assert caught.value.sender == "site-00"
    assert reason in caught.value.reason


def test_every_bit_of_a_signed_message_is_covered() -> None:
    world = World(2)
    message = seal("ack", b"s", 1, 0, "site-00", {"transcript": bytes(32)}, world.identities["site-00"])
    verify(parse(message, "site-00"), world.directory)
    for position in range(len(message)):
        broken = bytearray(message)
        broken[position] ^= 1
        with pytest.raises(RemoteMisbehaviour):
            verify(parse(bytes(broken), "site-00"), world.directory)


def test_a_signature_of_another_client_is_refused() -> None:
    world = World(2)
    message = seal("ack", b"s", 1, 0, "site-00", {"transcript": bytes(32)}, world.identities["site-01"])
    with pytest.raises(BadSignature):
        verify(parse(message, "site-00"), world.directory)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_only_raise_protocol_errors(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        peek(data)


def test_every_message_type_is_sealed_and_parsed() -> None:
    sample = {"uint": 1, "text": "x", "bytes": b"y", "[text]": ["a"], "[bytes]": [b"b"]}
    for type_, forms in BODIES.items():
        body = {f: sample[form] if form in sample else bytes(int(form[6:])) for f, form in forms.items()}
        message = seal(type_, b"s", 1, 2, "site-00", body, KEY)
        if type_ in WITH_MAC:
            with pytest.raises(BadEncoding, match="needs 32"):
                parse(message, "site-00")  # no signature where a MAC is due
            request = peek(seal(type_, b"s", 1, 2, "coordinator", body, None))
            message = seal_reply(type_, "site-00", body, request, b"", bytes(32))
        assert parse(message, "site-00").body == body
