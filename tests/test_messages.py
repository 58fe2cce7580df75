"""The message table: strict in both directions, every field bound into the digest of an upload."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appa_secure.messages import (
    REPLIES,
    REQUESTS,
    VERSION,
    Refused,
    digest,
    pack,
    pack_float,
    unpack,
    unpack_float,
    unpack_rows,
    unpack_vector,
)
from appa_secure.secagg import cbor
from appa_secure.secagg.errors import BadEncoding

FORMS = {
    "text": st.text(max_size=10),
    "uint": st.integers(0, 2**64 - 1),
    "bytes": st.binary(max_size=20),
    "[text]": st.lists(st.text(max_size=5), max_size=3),
}


@st.composite
def messages(draw):
    table = draw(st.sampled_from([REQUESTS, REPLIES]))
    kind = draw(st.sampled_from(sorted(table)))
    return table, kind, {name: draw(FORMS[form]) for name, form in table[kind].items()}


@settings(max_examples=200, deadline=None)
@given(messages())
def test_what_is_packed_is_unpacked(message) -> None:
    table, kind, body = message
    raw = pack(table, kind, **body)
    found = unpack(table, raw, "clinic")
    assert (found.kind, found.body) == (kind, body)
    with pytest.raises(BadEncoding, match="clinic"):
        unpack(table, raw + b"\0", "clinic")
    with pytest.raises(BadEncoding, match="clinic"):
        unpack(table, raw[:-1], "clinic")


@settings(max_examples=200, deadline=None)
@given(messages(), st.data())
def test_a_message_with_one_wrong_field_is_refused_on_both_sides(message, data) -> None:
    table, kind, body = message
    how = data.draw(st.sampled_from(["extra", "missing", "form", "kind", "version"]))
    envelope = {"version": VERSION, "kind": kind, "body": dict(body)}
    if how == "extra":
        envelope["body"]["surprise"] = 1
    elif how in ("missing", "form") and body:
        name = data.draw(st.sampled_from(sorted(body)))
        if how == "missing":
            del envelope["body"][name]
        else:
            envelope["body"][name] = {"deep": [b"x"]}
    elif how == "kind":
        envelope["kind"] = "surprise"
    else:
        envelope["version"] = VERSION + 1
    with pytest.raises(BadEncoding, match="clinic"):
        unpack(table, cbor.encode(envelope), "clinic")
    if how in ("extra", "kind"):
        with pytest.raises(BadEncoding, match="this side"):
            pack(table, envelope["kind"], **envelope["body"])


@pytest.mark.parametrize("value", [[], "text", 7, {"version": 1}, {"version": 1, "kind": 1, "body": {}}])
def test_other_values_are_no_messages(value) -> None:
    with pytest.raises(BadEncoding, match="clinic"):
        unpack(REQUESTS, cbor.encode(value), "clinic")


def test_every_field_but_the_round_request_is_bound_into_the_digest() -> None:
    body = {"session": "reward", "step": 3, "opened": 2, "z": b"z", "questions": ["q"], "answers": ["1 2"]}
    own = digest("score", body)
    assert len(own) == 32
    assert digest("score", {**body, "message": b"anything"}) == own
    for name, other in {
        "session": "predictor", "step": 4, "opened": 1, "z": b"", "questions": ["p"], "answers": ["2 1"],
    }.items():  # fmt: skip
        assert digest("score", {**body, name: other}) != own
    assert digest("train", body) != own


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False) | st.none())
def test_floats_travel_exactly(value) -> None:
    raw = pack_float(value)
    assert len(raw) == (0 if value is None else 8)
    back = unpack_float(raw, "clinic", "z")
    assert back == value
    assert back is None or math.copysign(1, back) == math.copysign(1, value)


@pytest.mark.parametrize("raw", [b"\0" * 7, b"\0" * 9, pack_float(math.inf), pack_float(math.nan)])
def test_floats_that_are_none_are_refused(raw) -> None:
    with pytest.raises(BadEncoding, match=r"clinic.*score\.z"):
        unpack_float(raw, "clinic", "score.z")


def test_vectors_travel_exactly_and_whole() -> None:
    vector = np.array([1.5, -2.25, 3e-38], dtype="<f4")
    np.testing.assert_array_equal(unpack_vector(vector.tobytes(), "clinic", "theta", 3), vector)
    for raw in (vector.tobytes()[:-1], vector.tobytes() + b"\0\0\0\0", b""):
        with pytest.raises(BadEncoding, match="12 are due"):
            unpack_vector(raw, "clinic", "theta", 3)
    for bad in (np.nan, np.inf):
        with pytest.raises(BadEncoding, match="not finite"):
            unpack_vector(np.array([1, bad, 2], "<f4").tobytes(), "clinic", "theta", 3)


def test_rows_are_json_objects_with_numbers() -> None:
    assert unpack_rows(b'[{"a": 1}]', "clinic", "ledger") == [{"a": 1}]
    assert unpack_rows(b"[]", "clinic", "ledger") == []
    for raw in (
        b"", b"{}", b"[1]", b"[{}", b"\xff\xfe", b'[{"a": NaN}]', b'[{"a": Infinity}]', b"[" * 100_000,
        json.dumps([[{}]]).encode(),
    ):  # fmt: skip
        with pytest.raises(BadEncoding, match=r"clinic: ledger"):
            unpack_rows(raw, "clinic", "ledger")


def test_a_refusal_says_who_and_why() -> None:
    error = Refused("clinic", "PlanExceeded", "round 9")
    assert str(error) == "client 'clinic' refused: round 9 (PlanExceeded)"
    assert (error.client, error.code, error.reason) == ("clinic", "PlanExceeded", "round 9")
