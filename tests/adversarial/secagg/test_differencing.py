"""Participation differencing: the sum with and without one party gives that party's vector.

It succeeds under `recover` (so it is not the default among few institutions), fails under `abort`.
"""

from __future__ import annotations

import numpy as np
import pytest

from appa_secure.secagg import Aborted, Aggregate
from tests.secagg.world import LAYOUT, World

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
    from tests.adversarial.secagg.test_coordinator_lies import proposal

    world = World(6, release="abort")
    others = [name for name in world.names if name != VICTIM]
    reply = world.answer("site-00", proposal(world, clients=others))
    assert b"must list all" in reply
    assert LAYOUT.size == len(world.vectors[VICTIM])
