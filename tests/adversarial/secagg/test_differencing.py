"""Participation differencing: the sum with and without one party gives that party's vector.

It succeeds under `recover` (so it is not the default among few institutions) and fails under `abort`. What `noise` leaves
of it: tests/adversarial/test_output_noise.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from appa_secure.secagg import (
    Aborted,
    Aggregate,
    BadParameters,
    ClientPolicy,
    CohortTooSmall,
    CoordinatorMachine,
    EpochReady,
    ReleaseRefused,
)
from tests.secagg.world import CONTEXT, LAYOUT, World

VICTIM = "site-03"


def fake_a_dropout(world: World, round_id: int):
    """The coordinator throws the victim's upload away and says that it dropped out."""
    world.inbound = lambda name, e: None if (e.type, name) == ("upload", VICTIM) else e.raw
    outcome = world.round(round_id)
    world.inbound = lambda name, envelope: envelope.raw
    return outcome


def test_differencing_succeeds_under_recover() -> None:
    world = World(6, release="recover")
    world.setup()
    everybody, without = world.round(1), fake_a_dropout(world, 2)
    assert isinstance(everybody, Aggregate)
    assert isinstance(without, Aggregate)
    stolen = everybody.sum - without.sum
    np.testing.assert_allclose(stolen, world.vectors[VICTIM], atol=1e-10)


@pytest.mark.parametrize("asked", ["abort", "recover"])
def test_differencing_fails_under_abort(asked: str) -> None:
    """Whatever release mode the coordinator itself runs in, the clients' policy decides."""
    world = World(6, release="abort", asked=asked)
    world.setup()
    assert isinstance(world.round(1), Aggregate)
    outcome = fake_a_dropout(world, 2)
    assert isinstance(outcome, Aborted)
    if asked == "recover":
        refusals = [f for f in outcome.faults if f.code == "ReleaseRefused"]
        assert {f.party for f in refusals} == set(world.names) - {VICTIM}
        assert all(VICTIM in f.reason for f in refusals)
    else:
        assert VICTIM in outcome.reason
    assert isinstance(world.round(3), Aggregate)  # a step is lost, not the epoch


def test_a_new_epoch_without_the_victim_is_refused_under_abort() -> None:
    world = World(6, release="abort")
    others = [name for name in world.names if name != VICTIM]
    reply = world.answer("site-00", world.proposal(clients=others))
    assert b"must list all" in reply
    assert LAYOUT.size == len(world.vectors[VICTIM])


@pytest.mark.parametrize("kind", ["bundle", "shares", "ack or ready", "upload", "answer"])
def test_under_abort_no_message_can_be_lost_to_get_a_partial_sum(kind: str) -> None:
    """The coordinator, which itself would recover, suppresses the victim's message of each kind in turn."""
    world = World(6, release="abort", asked="recover")
    world.inbound = lambda name, e: None if name == VICTIM and e.type in kind.split() else e.raw
    if not isinstance(world.setup(), EpochReady):
        return
    outcome = world.round(1)
    if kind == "answer":  # the victim is in the sum, its answer is not needed
        assert isinstance(outcome, Aggregate)
        assert outcome.contributors == world.names
    else:
        assert isinstance(outcome, Aborted)
        codes = {f.code for f in outcome.faults if f.kind == "refusal"}
        assert codes == {"ReleaseRefused" if kind == "upload" else "WrongRoster"}


def test_under_abort_two_stories_do_not_make_two_sums() -> None:
    """Half of the clients hear of the whole roster, half of a roster without the victim."""
    world = World(6, release="abort")
    world.setup()
    step = world.coordinator.begin_round(1, CONTEXT, LAYOUT)
    for name, message in step.outbound.items():
        assert world.answer(name, message) is not None
    others = [name for name in world.names if name != VICTIM]
    whole = world.request("unmask", 1, {"survivors": list(world.names), "dropped": []})
    part = world.request("unmask", 1, {"survivors": others, "dropped": [VICTIM]})
    for name in others:
        with pytest.raises(ReleaseRefused, match=VICTIM):
            world.clients[name].unmask(part)
        world.clients[name].unmask(whole)  # the refused question has not used the round up


def test_under_recover_a_minimum_cohort_of_all_prevents_it() -> None:
    world = World(6, release="recover", min_cohort=6)
    world.setup()
    step = world.coordinator.begin_round(1, CONTEXT, LAYOUT)
    others = [name for name in world.names if name != VICTIM]
    part = world.request("unmask", 1, {"survivors": others, "dropped": [VICTIM]})
    for name in others:
        world.answer(name, step.outbound[name])
        with pytest.raises(CohortTooSmall):
            world.clients[name].unmask(part)


def test_noise_opens_nothing_that_carries_no_noise() -> None:
    """A policy that promises noise and opens partial sums without it would be worse than none."""
    world = World(6, release="noise")
    world.setup()
    request = world.coordinator.begin_round(1, CONTEXT, LAYOUT).outbound[VICTIM]
    with pytest.raises(BadParameters, match="only vectors with output noise"):
        world.clients[VICTIM].upload(request, world.vectors[VICTIM], layout=LAYOUT, context=CONTEXT)
    with pytest.raises(BadParameters, match="release"):
        ClientPolicy(release="trust")  # type: ignore[arg-type]
    with pytest.raises(BadParameters, match="release"):
        CoordinatorMachine(b"s", world.directory, min_cohort=2, release="trust")  # type: ignore[arg-type]
