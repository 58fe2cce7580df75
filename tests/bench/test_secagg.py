"""Speed and memory of secure aggregation: `pytest -s -m bench tests/bench/test_secagg.py`.

Server times are of one process doing what the coordinator does: `receive` is checking signatures and adding
uploads as they arrive, `open` is everything between the last answer and the sum.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc

import numpy as np
import pytest

from appa_secure.secagg import Aggregate, Continue, EpochReady, Layout, Segment, dealing, shamir
from appa_secure.secagg.graph import choose_holders
from tests.secagg.world import CONTEXT, World, seeded

pytestmark = pytest.mark.bench


class Clock:
    """Milliseconds of every call, by what was done."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}

    def __call__(self, what: str, work):
        began = time.perf_counter()
        result = work()
        self.spent.setdefault(what, []).append(1e3 * (time.perf_counter() - began))
        return result

    def median(self, what: str) -> float:
        return statistics.median(self.spent[what])

    def total(self, what: str) -> float:
        return sum(self.spent[what])


def timed_round(world: World, round_id: int, layout: Layout, dropped: int) -> tuple[Clock, int]:
    """One round with the first `dropped` clients silent; the clock and the bytes of one upload."""
    clock, gone = Clock(), set(world.names[:dropped])
    vector = np.random.default_rng(0).random(layout.size)
    world.layouts = dict.fromkeys(world.names, layout)
    world.vectors = dict.fromkeys(world.names, vector)
    step = world.coordinator.begin_round(round_id, CONTEXT, layout)
    sent = 0
    for phase in ("upload", "answer"):
        assert isinstance(step, Continue)
        for name, message in step.outbound.items():
            if name in gone:
                continue
            reply = clock(phase, lambda name=name, message=message: world.answer(name, message))
            sent = max(sent, len(reply))
            clock("receive " + phase, lambda name=name, reply=reply: world.coordinator.receive(name, reply))
        step = clock("open" if phase == "answer" else "close", world.coordinator.advance)
    assert isinstance(step, Aggregate)
    assert len(step.dropped) == dropped
    assert step.culprits == ()
    np.testing.assert_array_equal(
        step.ring_sum, layout.preflight(len(world.names)).encode(vector) * (len(world.names) - dropped)
    )
    return clock, sent


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ring_bits", [32, 64])
def test_fifty_clients(ring_bits: int) -> None:
    """Client mask and server unmask at 50 clients, complete graph."""
    world = World(50, rounds=40, layout=Layout((Segment("a", 1, 0, 1),), ring_bits))
    assert isinstance(world.setup(), EpochReady)
    rounds = iter(range(1, 41))
    timed_round(world, next(rounds), Layout((Segment("a", 1, 0, 1),), ring_bits), 0)  # acknowledgements
    for size in (64, 10**3, 10**5, 10**6):
        layout = Layout((Segment("a", size, 0, 1),), ring_bits)
        for dropped in (0, 5, 15):
            times = 3 if size < 10**6 else 1
            runs = [timed_round(world, next(rounds), layout, dropped) for _ in range(times)]
            opened = [clock.total("open") for clock, _ in runs]
            print(
                f"\n{ring_bits}-bit, {size:8d} entries, {dropped:2d} dropped: "
                f"client mask {statistics.median(c.median('upload') for c, _ in runs):8.2f} ms, "
                f"answer {statistics.median(c.median('answer') for c, _ in runs):6.3f} ms; "
                f"server open {statistics.median(opened):8.2f} ms ({min(opened):.2f}..{max(opened):.2f}), "
                f"receive {runs[-1][0].total('receive upload') + runs[-1][0].total('receive answer'):8.2f} ms; "
                f"{runs[-1][1] / size:.3f} bytes per entry",
                end="",
            )


@pytest.mark.timeout(1800)
def test_a_thousand_clients() -> None:
    """A round of 1,000 clients on the sparse graph, 10 % dropped. Two rounds per epoch keep this short."""
    world = World(1000, rounds=2)
    clock = Clock()
    sharing = clock("degree", lambda: world.coordinator.parameters.sharing)
    began = time.perf_counter()
    assert isinstance(world.setup(), EpochReady)
    print(
        f"\n1,000 clients: {sharing}, found in {clock.total('degree'):.0f} ms; set-up of all, 2 rounds each: "
    )
    print(f"{time.perf_counter() - began:.0f} s")
    layout = Layout((Segment("a", 1000, 0, 1),))
    for round_id, dropped in ((1, 0), (2, 100)):
        clock, _ = timed_round(world, round_id, layout, dropped)
        print(
            f"round {round_id}, {dropped} dropped: client upload {clock.median('upload'):.2f} ms "
            f"(slowest {max(clock.spent['upload']):.2f}), answer {clock.median('answer'):.2f} ms; "
            f"server receive {clock.total('receive upload') + clock.total('receive answer'):.0f} ms, "
            f"open {clock.total('open'):.0f} ms"
        )


@pytest.mark.timeout(1200)
def test_set_up_of_one_client_among_a_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one client computes to set up 64 rounds; the other 999 make their bundles, its dealers their packets."""
    world = World(1000, rounds=64)
    p, clock, everybody = world.coordinator.parameters, Clock(), sorted(world.names)
    own = everybody[0]
    proposal = world.coordinator.propose(1).outbound
    me = world.clients[own]
    bundles = [clock("bundle", lambda: me.open_epoch(proposal[own]))]
    bundles += [world.clients[name].open_epoch(proposal[name]) for name in everybody[1:]]
    roster_message = world.request("roster", 0, {"bundles": bundles})
    assert p.sharing.degree < 999
    clock("shares", lambda: me.deal_shares(roster_message))
    roster = me._epoch.roster
    packets = []
    share = shamir.share
    monkeypatch.setattr(shamir, "share", lambda secrets, t, points, rng: share(secrets, 1, points, rng))
    for name in everybody:  # one packet of each dealer is enough, and its polynomials do not matter here
        holders = choose_holders(everybody, name, p.sharing.degree, seeded(name))
        if name == own or own in holders:
            client = world.clients[name]
            packets += dealing.deal(client._epoch, roster, name, [own], client._identity, seeded((name, 1)))
    start = world.request("start", 0, {"dealers": everybody, "packets": packets})
    clock("ready", lambda: me.start_epoch(start))
    spent = {what: f"{clock.total(what):.0f} ms" for what in ("bundle", "shares", "ready")}
    print(f"\n1,000 clients, 64 rounds, {len(me._epoch.peers)} peers: set-up of one client {spent}")


def test_memory_of_ten_million_entries() -> None:
    """Peak memory beside the client's own vector, in vectors: a small multiple, and the coordinator keeps one."""
    size = 10**7
    layout = Layout((Segment("a", size, 0.0, 1.0),), 32)
    one = 4 * size
    world = World(3, layout=layout, rounds=1)
    world.setup()
    world.vectors = dict.fromkeys(world.names, np.full(size, 0.25))
    step = world.coordinator.begin_round(1, CONTEXT, layout)
    tracemalloc.start()
    try:
        for name, message in step.outbound.items():
            before = _reset_peak()
            reply = world.answer(name, message)
            client = (tracemalloc.get_traced_memory()[1] - before) / one
            before = _reset_peak()
            world.coordinator.receive(name, reply)
            after, peak = tracemalloc.get_traced_memory()
            server, kept = (peak - before) / one, (after - before) / one
            print(f"\n{name}: client {client:.2f} vectors, coordinator {server:.2f}, kept {kept:.2f}", end="")
            assert client < 3.2
            assert server < 2.2
            assert kept < 0.01
            world.clients[name]._epoch.answers.clear()
        step = world.coordinator.advance()
        for name, message in step.outbound.items():
            world.coordinator.receive(name, world.answer(name, message))
        before = _reset_peak()
        assert isinstance(world.coordinator.advance(), Aggregate)
        opened = (tracemalloc.get_traced_memory()[1] - before) / one
        print(f"\nopening: {opened:.2f} vectors, of which two are the sum in float64")
        assert opened < 2.2
    finally:
        tracemalloc.stop()


def _reset_peak() -> int:
    tracemalloc.reset_peak()
    return tracemalloc.get_traced_memory()[0]
