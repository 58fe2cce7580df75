"""A client killed at random instants between paying and answering: nothing paid twice, nothing forgotten.

And the other half of the account: what is asked after training is free, however often.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appa_secure.agreement import PREDICTOR, REWARD
from appa_secure.privacy.accounting import epsilon
from tests.clients.drive import ME, Ledgered, parameters, score_body
from tests.clients.world import World, make_world

KILLS = ("before the row", "after the row", "before the state", "after the state")


class Killed(BaseException):
    """The process ends here."""


def at(point: str, work: Callable[..., Any], when: str) -> Callable[..., Any]:
    """`work`, with a kill before or after it where `point` says so."""

    def run(*arguments: Any) -> Any:
        if point == f"before the {when}":
            raise Killed
        found = work(*arguments)
        if point == f"after the {when}":
            raise Killed
        return found

    return run


def alone(root: Path, mechanism: str) -> World:
    """One client that can be asked without a coordinator's session: masks are off."""
    shutil.rmtree(root, ignore_errors=True)
    return make_world(root, mode="clear", plan={"mechanism": mechanism})


def requests(world: World) -> list[tuple[str, dict[str, Any]]]:
    train = {"session": PREDICTOR, "message": b"", "parameters": parameters(world)}
    return [
        ("setup", {"run": "test-run", "agreement": world.agreement.digest()}),
        ("context", {}),
        *(("train", {**train, "round": i}) for i in range(world.agreement.plan.rounds)),
    ]


def outcome(world: World, root: Path, kills: list[list[str]]) -> tuple[bytes, list[bytes], bytes]:
    """Ledger, updates and released shares after all requests, each repeated until it is answered."""
    updates = []
    for (kind, body), points in itertools.zip_longest(requests(world), kills, fillvalue=[]):
        for point in [*points, "never"]:
            client = world.start(ME)
            assert client._ledger is not None
            client._ledger._journal.append = at(point, client._ledger._journal.append, "row")  # type: ignore[method-assign]
            client._store.save = at(point, client._store.save, "state")  # type: ignore[method-assign]
            try:
                assert world.ask(ME, kind, **body).kind == kind
            except Killed:
                continue
        if kind == "train":
            updates.append(client._state["vector"]["update"])
    kept = b"".join(raw for _, raw in sorted(client._state["context"].items()))
    return (root / "clients" / ME / "ledger.jsonl").read_bytes(), updates, kept


@pytest.mark.parametrize("mechanism", ["dpsgd", "histogram"])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kills=st.lists(st.lists(st.sampled_from(KILLS), max_size=3), min_size=5, max_size=5))
def test_kills_anywhere_change_neither_the_bill_nor_the_releases(
    tmp_path: Path, mechanism: str, kills: list[list[str]]
) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    expected = outcome(alone(calm, mechanism), calm, [])
    assert outcome(alone(killed, mechanism), killed, kills) == expected


@pytest.mark.parametrize("mechanism", ["dpsgd", "histogram"])
def test_epsilon_after_ten_and_after_a_thousand_alignment_steps_is_the_same_number(
    tmp_path: Path, mechanism: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards of a thousand steps from real client code: of an alignment the client sees no more than this."""
    monkeypatch.setattr("os.fsync", lambda _: None)  # a thousand waits for the disk prove nothing here
    world = alone(tmp_path, mechanism)
    for kind, body in requests(world):
        assert world.ask(ME, kind, **body).kind == kind
    assert world.ask(ME, "freeze", parameters=parameters(world)).kind == "freeze"
    ledger = tmp_path / "clients" / ME / "ledger.jsonl"
    before = ledger.read_bytes()
    spent, replies = {}, []
    rng = np.random.default_rng(0)
    for step in range(1, 1001):
        body = score_body(world, step, step - 1, 1.0)
        body["answers"] = [" ".join(map(str, rng.integers(1, 10, k))) for k in (2, 3)]
        reply = world.ask(ME, "score", session=REWARD, message=b"", **body)
        assert reply.kind == "score", reply.body
        replies.append(reply.body["message"])
        if step in (10, 1000):
            spent[step] = epsilon(Ledgered(tmp_path).events, 1e-6, "rdp")
    assert spent[10] == spent[1000] > 0
    assert ledger.read_bytes() == before
    assert len(set(replies)) > 50  # the steps were different ones
