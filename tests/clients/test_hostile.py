"""Hostile bytes: whatever arrives, a refusal goes back and the client lives on."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appa_secure.agreement import REWARD
from appa_secure.messages import REPLIES, REQUESTS, Message, digest, pack, unpack
from appa_secure.privacy.ledger import Ledger
from appa_secure.secagg import cbor
from appa_secure.secagg.driver import resume
from appa_secure.secagg.keys import COORDINATOR
from appa_secure.secagg.outcomes import Aggregate
from appa_secure.secagg.wire import seal
from clients.client import Client
from coordinator.rounds import _Wire
from tests.clients.drive import (
    ME,
    Session,
    parameters,
    refused,
    score_body,
    train_request,
    trained,
    training,
)
from tests.clients.world import World, make_world


@pytest.fixture(scope="module")
def hardened(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, list[bytes]]:
    """A federation in the middle of everything, and one valid request of every kind."""
    world = make_world(tmp_path_factory.mktemp("hostile"))
    world.set_up()
    raws = [
        pack(REQUESTS, "setup", run="test-run", agreement=world.agreement.digest()),
        pack(REQUESTS, "context"),
    ]
    raws.append(train_request(world, training(world)))
    trained(world)
    raws.append(pack(REQUESTS, "freeze", parameters=parameters(world)))
    session = Session(world, REWARD, "abort")
    session.open()
    raws.append(session.request("score", world.agreement.reward_layout(2), **score_body(world)))
    p = session.machine.parameters
    raws.append(
        pack(
            REQUESTS,
            "secagg",
            session=REWARD,
            message=seal(
                "unmask", p.session, p.epoch, 1, COORDINATOR, {"survivors": [], "dropped": []}, None
            ),
        )
    )
    raws.append(pack(REQUESTS, "truth", parameters=b""))
    return world, raws


def answers(client: Client, raw: bytes) -> Message:
    """Whatever was sent, a well-formed reply comes back and the client can go on."""
    return unpack(REPLIES, client.handle(raw), client.client_id)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=200))
def test_random_bytes_are_refused(hardened: tuple[World, list[bytes]], raw: bytes) -> None:
    refused(answers(hardened[0].members[ME], raw), "BadEncoding")


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_messages_get_a_reply_and_never_an_exception(
    hardened: tuple[World, list[bytes]], data: st.DataObject
) -> None:
    world, raws = hardened
    raw = bytearray(data.draw(st.sampled_from(raws)))
    for _ in range(data.draw(st.integers(1, 3))):
        how = data.draw(st.sampled_from(["flip", "cut", "insert", "swap"]))
        at = data.draw(st.integers(0, max(len(raw) - 1, 0)))
        if how == "flip" and raw:
            raw[at] ^= data.draw(st.integers(1, 255))
        elif how == "cut":
            del raw[at : at + data.draw(st.integers(1, 9))]
        elif how == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            raw = raw[at:] + raw[:at]
    answers(world.members[ME], bytes(raw))


values = st.recursive(
    st.integers(0, 2**64 - 1) | st.text(max_size=8) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_field_may_hold_anything(hardened: tuple[World, list[bytes]], data: st.DataObject) -> None:
    world, raws = hardened
    message = cbor.decode(data.draw(st.sampled_from(raws)))
    where = data.draw(st.sampled_from(["version", "kind", "body", "field", "field", "field", "extra"]))
    if where == "field" and message["body"]:
        message["body"][data.draw(st.sampled_from(sorted(message["body"])))] = data.draw(values)
    elif where == "extra":
        message["body"][data.draw(st.text(max_size=5))] = data.draw(values)
    elif where in ("version", "kind", "body"):
        message[where] = data.draw(values)
    answers(world.members[ME], cbor.encode(message))


def test_after_all_that_the_ledger_is_as_it_was(hardened: tuple[World, list[bytes]]) -> None:
    world, _ = hardened
    ledger = Ledger(world.root / "clients" / ME / "ledger.jsonl", ME, world.agreement.budget)
    assert [row["release"] for row in ledger.rows] == ["context", "predictor/1", "predictor/2", "predictor/3"]
    ledger.close()


def test_an_aggregate_still_opens_after_hostile_traffic(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    world.set_up()
    trained(world)
    for junk in (b"", b"\xff" * 40, pack(REQUESTS, "truth", parameters=b""), pack(REQUESTS, "context")):
        for client in world.clients:
            world.members[client].handle(junk)
    session = Session(world, REWARD, "abort")
    session.open()
    body = {"session": REWARD, **score_body(world)}
    wire = _Wire(world, REWARD, "score", body)
    step = session.machine.begin_round(1, digest("score", body), world.agreement.reward_layout(2))
    assert isinstance(resume(session.machine, wire.exchange, step), Aggregate)
