"""Every (state, event) pair: listed ones move, all others raise and change nothing."""

from __future__ import annotations

from itertools import product

import pytest

from appa_secure.secagg import ClientState, CoordinatorState, IllegalEvent, OutOfOrder
from appa_secure.secagg.states import CLIENT_TABLE, COORDINATOR_TABLE, client_next, coordinator_next
from tests.secagg.world import CONTEXT, LAYOUT, World


def test_tables_are_total_over_their_events() -> None:
    for table, states, move, error in (
        (CLIENT_TABLE, ClientState, client_next, OutOfOrder),
        (COORDINATOR_TABLE, CoordinatorState, coordinator_next, IllegalEvent),
    ):
        for state, event in product(states, {event for _, event in table}):
            if (state, event) in table:
                assert move(state, event) is table[state, event]
            else:
                with pytest.raises(error, match=f"'{event}'.*'{state.value}'"):
                    move(state, event)
        assert set(table.values()) == set(states)  # every state can be reached


def test_illegal_coordinator_calls_change_nothing() -> None:
    world = World(3)
    calls = {
        "propose": lambda c: c.propose(2),
        "advance": lambda c: c.advance(),
        "begin_round": lambda c: c.begin_round(1, CONTEXT, LAYOUT),
        "receive": lambda c: c.receive("site-00", b""),
        "close_epoch": lambda c: c.close_epoch(),
    }
    world.setup()
    for call in ("propose", "advance", "receive"):
        before = world.coordinator.export_state()
        with pytest.raises(IllegalEvent):
            calls[call](world.coordinator)
        assert world.coordinator.export_state() == before
    world = World(3)
    for call in ("advance", "begin_round", "receive", "close_epoch"):
        with pytest.raises(IllegalEvent):
            calls[call](world.coordinator)
    assert world.coordinator.state is CoordinatorState.IDLE


def test_messages_out_of_order_change_no_client() -> None:
    world = World(3)
    world.setup()
    client = world.clients["site-00"]
    before = client.export_state()
    for method, type_, body in (
        (client.deal_shares, "roster", {"bundles": []}),
        (client.start_epoch, "start", {"dealers": [], "packets": []}),
        (client.unmask, "unmask", {"survivors": [], "dropped": []}),
    ):
        with pytest.raises(OutOfOrder):
            method(world.request(type_, 1 if type_ == "unmask" else 0, body))
        assert client.export_state() == before
