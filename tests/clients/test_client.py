"""The client's whole interface: what it answers, what it refuses, and why."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appa_secure.aggregation import AggregationSpec
from appa_secure.agreement import PREDICTOR, REWARD
from appa_secure.data import GroupData
from appa_secure.errors import PrivacyError
from appa_secure.messages import REPLIES, REQUESTS, Message, pack, pack_float, unpack
from appa_secure.privacy.accounting import epsilon
from appa_secure.secagg.wire import parse
from clients.store import ClientStore
from tests.clients.drive import (
    ME,
    Ledgered,
    Session,
    parameters,
    refused,
    score_body,
    train_request,
    trained,
    training,
)
from tests.clients.world import World, make_world


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = make_world(tmp_path)
    world.set_up()
    return world


@pytest.fixture
def frozen(world: World) -> World:
    trained(world)
    return world


# -- order and agreement -------------------------------------------------------------------------------------


def test_nothing_is_answered_before_set_up(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    for kind, body in {
        "context": {}, "truth": {"parameters": b""}, "freeze": {"parameters": b""},
        "secagg": {"session": PREDICTOR, "message": b""},
        "train": {"session": PREDICTOR, "message": b"", "round": 0, "parameters": b""},
        "score": {"session": REWARD, "message": b"", **score_body(world)},
    }.items():  # fmt: skip
        refused(world.ask(ME, kind, **body), "OutOfOrder", f"{kind} before setup")
    assert not (tmp_path / "clients" / ME / "ledger.jsonl").read_bytes()


def test_another_agreement_or_run_is_refused_with_its_reason(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    mine = world.agreement
    for other in (
        replace(mine, context_noise=0.1), replace(mine, min_cohort=2), replace(mine, release="recover"),
        replace(mine, plan=replace(mine.plan, noise_multiplier=0.5)), replace(mine, mode="clear"),
    ):  # fmt: skip
        refused(
            world.ask(ME, "setup", run="test-run", agreement=other.digest()), "AgreementMismatch", "differs"
        )
    refused(world.ask(ME, "setup", run="another", agreement=mine.digest()), "AgreementMismatch", "'another'")
    refused(world.ask(ME, "context"), "OutOfOrder")


def test_stages_come_in_their_order(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    for client in world.clients:
        world.ask(client, "setup", run="test-run", agreement=world.agreement.digest())
    session = training(world)
    raw = train_request(world, session)
    refused(unpack(REPLIES, world.members[ME].handle(raw), ME), "OutOfOrder", "context")
    assert not (tmp_path / "clients" / ME / "ledger.jsonl").read_bytes()  # what is refused is not paid for
    refused(world.ask(ME, "freeze", parameters=parameters(world)), "OutOfOrder", "context")
    refused(
        world.ask(ME, "score", session=REWARD, message=b"", **score_body(world)), "OutOfOrder", "predictor"
    )


def test_truth_stays_home_unless_the_site_itself_allows_it(world: World, tmp_path: Path) -> None:
    refused(world.ask(ME, "truth", parameters=b""), "NotAllowed", "evaluation.truth")
    open_world = make_world(tmp_path / "open", truth=True)
    assert open_world.agreement.digest() == world.agreement.digest()  # a coordinator cannot ask for it
    open_world.set_up()
    reply = open_world.ask(ME, "truth", parameters=b"").body
    np.testing.assert_allclose(
        json.loads(reply["distributions"])["q1"], open_world.groups[ME].distribution("q1")
    )
    assert json.loads(reply["predictions"]) == {}  # no predictor yet
    open_world.ask(ME, "freeze", parameters=parameters(open_world))
    predicted = json.loads(open_world.ask(ME, "truth", parameters=b"").body["predictions"])
    assert set(predicted) == set(open_world.agreement.questions)
    assert sum(predicted["q1"]) == pytest.approx(1.0)


def test_a_weight_stays_home_unless_the_site_itself_allows_it(world: World, tmp_path: Path) -> None:
    trained(world)
    world.ask(ME, "score", session=REWARD, message=b"", **score_body(world))
    refused(world.ask(ME, "weight", step=1), "NotAllowed", "evaluation.truth")
    assert "weight" not in ClientStore(tmp_path / "clients" / ME).load()["history"]


def test_the_private_context_is_paid_for_once_and_never_sent(world: World, tmp_path: Path) -> None:
    state = ClientStore(tmp_path / "clients" / ME).load()
    reply = world.members[ME].handle(pack(REQUESTS, "context"))
    (row,) = json.loads(unpack(REPLIES, reply, ME).body["ledger"])
    assert row["release"] == "context"
    assert row["noise_multiplier"] == 4.0
    assert row["epsilon"] == epsilon(Ledgered(tmp_path).events, 1e-6, "rdp")
    assert len(Ledgered(tmp_path).rows) == 1
    for name, shares in state["context"].items():
        assert not np.array_equal(np.frombuffer(shares), world.groups[ME].distribution(name))
        for start in range(0, len(shares), 8):
            assert shares[start : start + 8] not in reply


def test_a_group_without_context_answers_is_refused(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    counts = {
        q: c if q not in world.agreement.plan.context else np.zeros_like(c)
        for q, c in world.groups[ME].counts.items()
    }
    world.groups[ME] = GroupData(ME, counts)
    world.start(ME)
    world.ask(ME, "setup", run="test-run", agreement=world.agreement.digest())
    refused(world.ask(ME, "context"), "NoContext", "data.context")


def test_unit_respondent_needs_respondents(tmp_path: Path) -> None:
    world = make_world(tmp_path, plan={"unit": "respondent", "answers_per_unit": 2})
    world.groups[ME] = GroupData(ME, world.groups[ME].counts)
    with pytest.raises(PrivacyError, match=r"privacy\.unit=respondent"):
        world.start(ME)


# -- training ------------------------------------------------------------------------------------------------


def test_the_same_request_gets_the_same_bytes_and_is_paid_for_once(world: World, tmp_path: Path) -> None:
    raw = train_request(world, training(world))
    first = world.members[ME].handle(raw)
    assert unpack(REPLIES, first, ME).kind == "train"
    assert world.members[ME].handle(raw) == first
    assert world.start(ME).handle(raw) == first  # after a restart too
    assert [row["release"] for row in Ledgered(tmp_path).rows] == ["context", "predictor/1"]


def test_the_round_asked_again_in_another_secure_round_is_the_same_release(
    world: World, tmp_path: Path
) -> None:
    session = training(world)
    first = train_request(world, session)
    replies = [world.members[ME].handle(first)]
    update = world.members[ME]._state["vector"]["update"]
    session.give_up()
    second = train_request(world, session)
    replies.append(world.members[ME].handle(second))
    assert all(unpack(REPLIES, reply, ME).kind == "train" for reply in replies)
    assert replies[0] != replies[1]  # fresh masks
    assert world.members[ME]._state["vector"]["update"] == update
    assert len(Ledgered(tmp_path).rows) == 2


@pytest.mark.parametrize("restart", [False, True])
def test_other_parameters_for_an_answered_round_are_refused(world: World, restart: bool) -> None:
    session = training(world)
    world.members[ME].handle(train_request(world, session))
    if restart:
        world.start(ME)
    session.give_up()
    reply = world.members[ME].handle(train_request(world, session, seed=2))
    refused(unpack(REPLIES, reply, ME), "ReplayedRound", "other parameters")


def test_an_older_round_is_refused(world: World) -> None:
    session = training(world)
    for index in (0, 1):
        world.members[ME].handle(train_request(world, session, index))
        session.give_up()
    refused(unpack(REPLIES, world.members[ME].handle(train_request(world, session, 0)), ME), "ReplayedRound")


def test_rounds_beyond_the_plan_are_refused(world: World, tmp_path: Path) -> None:
    for index in (world.agreement.plan.rounds, 2**63, 2**64 - 1):
        reply = world.ask(
            ME, "train", session=PREDICTOR, message=b"", round=index, parameters=parameters(world)
        )
        refused(reply, "PlanExceeded", "the agreed plan has 3")
    assert len(Ledgered(tmp_path).rows) == 1


def test_a_skipped_round_is_paid_for_all_the_same(tmp_path: Path) -> None:
    """Two steps per pass: round 2 alone adds nothing to a plan that had round 1, but it was the first release
    here.
    """
    world = make_world(tmp_path, questions=9, plan={"questions_per_step": 2})
    assert [world.agreement.plan.event(r).count for r in range(3)] == [1, 0, 1]
    world.set_up()
    reply = world.members[ME].handle(train_request(world, training(world), index=1))
    sent = json.loads(unpack(REPLIES, reply, ME).body["ledger"])
    ledger = Ledgered(tmp_path)
    assert [row["release"] for row in ledger.rows] == ["context", "predictor/1", "predictor/2"]
    assert [row["release"] for row in sent] == ["predictor/1", "predictor/2"]
    assert sum(e.count for e in ledger.events[1:]) == 1
    assert ledger.rows[-1]["epsilon"] > ledger.rows[0]["epsilon"]


def test_training_is_over_when_the_predictor_is_final(frozen: World, tmp_path: Path) -> None:
    """Otherwise every round could be had again, for other parameters and for free."""
    before = len(Ledgered(tmp_path).rows)
    session = Session(frozen, PREDICTOR, "recover")
    session.open(epoch=9)
    for index in range(frozen.agreement.plan.rounds):
        raw = train_request(frozen, session, index, seed=99)
        refused(unpack(REPLIES, frozen.members[ME].handle(raw), ME), "OutOfOrder", "training is over")
        session.give_up()
    assert len(Ledgered(tmp_path).rows) == before


@pytest.mark.parametrize("damage", [b"", b"\0" * 7, b"nan"])
def test_parameters_that_are_no_network_are_refused(world: World, damage: bytes, tmp_path: Path) -> None:
    raw = parameters(world)
    bad = np.full(len(raw) // 4, np.nan, "<f4").tobytes() if damage == b"nan" else raw[:-4] + damage
    refused(
        world.ask(ME, "train", session=PREDICTOR, message=b"", round=0, parameters=bad),
        "BadEncoding",
        "train.parameters",
    )
    refused(world.ask(ME, "freeze", parameters=bad), "BadEncoding", "freeze.parameters")
    assert len(Ledgered(tmp_path).rows) == 1


def test_a_predictor_whose_answers_overflow_is_refused_not_stored(world: World) -> None:
    huge = np.full(world.agreement.predictor_size, 3e38, "<f4").tobytes()
    refused(world.ask(ME, "freeze", parameters=huge), "RemoteMisbehaviour", "not finite")
    assert "predicted" not in world.members[ME]._state
    reply = world.members[ME].handle(
        training(world).request("train", world.agreement.predictor_layout, round=0, parameters=huge)
    )
    assert unpack(REPLIES, reply, ME).kind in ("train", "refusal")  # never an exception


def test_a_budget_that_is_used_up_stops_training_before_anything_is_computed(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    budget = replace(world.agreement.budget, epsilon=epsilon([world.agreement.plan.event(0)], 1e-6, "rdp"))
    world.agreement = replace(world.agreement, budget=budget)
    for client in world.clients:
        world.start(client)
    world.set_up()
    reply = world.members[ME].handle(train_request(world, training(world)))
    refused(unpack(REPLIES, reply, ME), "PrivacyError", "privacy.epsilon")
    assert not world.members[ME]._state["vector"]
    assert len(Ledgered(tmp_path).rows) == 1


# -- sessions ------------------------------------------------------------------------------------------------


def test_a_reward_travels_in_its_own_session_only(frozen: World) -> None:
    """Each session has a release policy of its own: a cohort's predictor session opens partial sums."""
    a = frozen.agreement
    session = Session(frozen, PREDICTOR, "recover")
    session.open(epoch=9)
    raw = session.request("score", a.reward_layout(2), **score_body(frozen))
    refused(unpack(REPLIES, frozen.members[ME].handle(raw), ME), "WrongSession", "'reward'")
    refused(frozen.ask(ME, "score", session="nowhere", message=b"", **score_body(frozen)), "WrongSession")
    assert not frozen.members[ME]._state["history"]


def test_an_update_travels_in_its_own_session_only(world: World) -> None:
    session = Session(world, REWARD, "abort")
    session.open()
    raw = train_request(world, session)
    refused(unpack(REPLIES, world.members[ME].handle(raw), ME), "WrongSession", "'predictor'")
    refused(world.ask(ME, "secagg", session="nowhere", message=b""), "UnknownSession")


def test_vectors_are_not_sent_in_key_set_up_messages(frozen: World) -> None:
    session = Session(frozen, REWARD, "abort")
    session.open()
    step = session.machine.begin_round(1, bytes(32), frozen.agreement.reward_layout(2))
    reply = frozen.ask(ME, "secagg", session=REWARD, message=step.outbound[ME])
    assert parse(reply.body["message"], ME).type == "refusal"


# -- alignment -----------------------------------------------------------------------------------------------


def test_answers_that_are_none_are_refused(frozen: World) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"questions": [], "answers": []}, "at least one"),
        ({"questions": ["q3"], "answers": []}, "as many answers"),
        ({"questions": ["nope"], "answers": ["1 2"]}, "'nope'"),
        ({"questions": ["q3"], "answers": ["1 2 3"]}, "'q3'"),
        ({"questions": ["q3"], "answers": ["maybe"]}, "'q3'"),
        ({"z": pack_float(1.0)}, "a normaliser was sent"),
    ]
    for change, words in cases:
        body = {**score_body(frozen), **change}
        reply = frozen.ask(ME, "score", session=REWARD, message=b"", **body)
        assert reply.kind == "refusal"
        assert words in reply.body["reason"]


@pytest.mark.parametrize(
    ("z", "words"), [(b"\0", "score.z"), (pack_float(math.nan), "score.z"), (pack_float(1e6), "z=1000000")]
)
def test_a_normaliser_that_is_none_is_refused(tmp_path: Path, z: bytes, words: str) -> None:
    world = make_world(tmp_path, spec=AggregationSpec(variant="paper"))
    world.set_up()
    assert world.ask(ME, "freeze", parameters=parameters(world)).kind == "freeze"
    reply = world.ask(ME, "score", session=REWARD, message=b"", **{**score_body(world), "z": z})
    assert reply.kind == "refusal"
    assert words in reply.body["reason"]


def test_the_predictor_cannot_change_once_alignment_began(frozen: World) -> None:
    session = Session(frozen, REWARD, "abort")
    session.open()
    reply = frozen.members[ME].handle(
        session.request("score", frozen.agreement.reward_layout(2), **score_body(frozen))
    )
    assert unpack(REPLIES, reply, ME).kind == "score"
    refused(frozen.ask(ME, "freeze", parameters=parameters(frozen, 5)), "OutOfOrder", "alignment has begun")


def test_in_a_cohort_the_predictor_cannot_change_either(tmp_path: Path) -> None:
    world = make_world(tmp_path, groups=2, members=3, mode="cohort", release="recover")
    world.set_up()
    for client in world.clients:
        world.ask(client, "freeze", parameters=parameters(world))
    with world.run_dir() as run:
        a = world.agreement
        for group in ("g0", "g1"):
            world.rounds(run).sum(a.reward_session(group), "score", score_body(world), a.reward_layout(2))
    refused(
        world.ask("g0 #0", "freeze", parameters=parameters(world, 5)), "OutOfOrder", "alignment has begun"
    )


def test_history_moves_only_when_the_coordinator_says_the_step_was_opened(frozen: World) -> None:
    client = frozen.members[ME]
    session = Session(frozen, REWARD, "abort")
    session.open()

    def ask(step: int, opened: int, z: float | None = None) -> Message:
        if session.machine.state.value == "uploads":
            session.give_up()
        body = score_body(frozen, step, opened, z)
        return unpack(
            REPLIES, client.handle(session.request("score", frozen.agreement.reward_layout(2), **body)), ME
        )

    assert ask(1, 0).kind == "score"
    first = client._state["history"]["pending"]
    assert "current" not in client._state["history"]
    assert ask(2, 0).kind == "score"  # step 1 was discarded: as if it had never been
    assert client._state["history"]["pending"] == first
    assert "current" not in client._state["history"]
    assert ask(3, 2, 2.0).kind == "score"  # step 2 was opened
    assert client._state["history"]["current"] == first
    assert client._state["history"]["pending_step"] == 3
    frozen.start(ME)
    client = frozen.members[ME]
    refused(ask(2, 2, 2.0), "ReplayedRound", "step 2 was opened before")
    assert client._state["history"]["current"] == first


def test_truth_predicts_with_any_parameters_where_it_may_be_measured(tmp_path: Path) -> None:
    """Training is measured while it goes on: the answer is what `freeze` with these parameters would keep."""
    world = make_world(tmp_path / "open", truth=True)
    world.set_up()
    asked = world.ask(ME, "truth", parameters=parameters(world)).body["predictions"]
    assert json.loads(world.ask(ME, "truth", parameters=b"").body["predictions"]) == {}  # nothing was kept
    world.ask(ME, "freeze", parameters=parameters(world))
    assert world.ask(ME, "truth", parameters=b"").body["predictions"] == asked
    refused(world.ask(ME, "truth", parameters=b"short"), "BadEncoding", "truth.parameters")
