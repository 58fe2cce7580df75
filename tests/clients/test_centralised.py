"""The trusted curator: the federated step without masks, noise once, turns, and nobody else's business."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from appa_secure.errors import PrivacyError
from clients.centralised import CentralClient, Curator
from clients.store import ClientStore
from coordinator.predictor import initial_predictor
from tests.clients.drive import Ledgered
from tests.clients.world import World, make_world

QUIET = {"private": False, "noise_multiplier": 0.0}


def curated(root: Path, **plan: Any) -> tuple[World, Curator]:
    """A world past its context stage, and a curator over its clients."""
    world = make_world(root, plan={"training": "pooled", **plan})
    for client in world.clients:
        world.members[client] = CentralClient(
            client, world.groups[client], world.agreement, world.embeddings, ClientStore(root / "clients" / client),
            world.identities[client], noise_key=client.encode().ljust(32, b"."),
        )  # fmt: skip
    world.set_up()
    return world, Curator(world.members)  # type: ignore[arg-type]


def start_of(world: World) -> np.ndarray:
    return initial_predictor(world.agreement, 1)


def test_without_noise_pooling_is_the_federated_step(tmp_path: Path) -> None:
    world, curator = curated(tmp_path, **QUIET)
    start = start_of(world)
    gradient, rows = curator.round(start, 0)
    apart = [c._local_trainer().round(start, 0, c._model) for c in world.members.values()]
    np.testing.assert_allclose(gradient, np.mean(apart, axis=0), atol=1e-9)
    assert np.abs(gradient).max() > 0
    assert not any(rows.values())


def test_noise_is_added_once_at_the_scale_of_one_unit(tmp_path: Path) -> None:
    """All units in, clipping far away: what is left beside the noiseless mean is Gaussian of the stated size."""
    loud = {"sample_rate": 1.0, "clip": 50.0, "noise_multiplier": 1.5}
    world, curator = curated(tmp_path / "loud", **loud)
    _, silent = curated(tmp_path / "still", **{**loud, "noise_multiplier": 0.5})
    start = start_of(world)
    gradient, _ = curator.round(start, 0)
    noise = gradient - silent.round(start, 0)[0]
    # The same contexts and the same normal draws: what is left is their difference, of noise multiplier 1.
    (questions,) = world.agreement.plan.steps(0)
    scales = [c._local_trainer().scale(len(questions)) for c in world.members.values()]
    expected = 50.0 * max(scales) / len(world.clients)
    assert noise.std() == pytest.approx(expected, rel=5 / np.sqrt(2 * len(noise)))
    federated = 50.0 * np.sqrt(np.square(scales).sum()) / len(world.clients)
    assert expected < federated
    np.testing.assert_array_equal(curator.round(start, 0)[0], gradient)  # asked again: the same release
    assert not np.allclose(
        curator.round(start + 1e-3, 0)[0] - silent.round(start + 1e-3, 0)[0], noise, rtol=0.1
    )


def test_every_client_pays_in_every_pooled_round(tmp_path: Path) -> None:
    world, curator = curated(tmp_path)
    for index in (0, 1, 1):
        _, rows = curator.round(start_of(world), index)
        assert set(rows) == set(world.clients)
        assert all(row["client"] == c for c, (row,) in rows.items())
    assert [row["release"] for row in Ledgered(tmp_path).rows] == ["context", "predictor/1", "predictor/2"]


def test_clients_take_turns(tmp_path: Path) -> None:
    """One group per round: everybody once in as many rounds, with the step and the charge of that turn."""
    groups = 5
    world, curator = curated(tmp_path, training="one_group", turns=groups, rounds=3 * groups)
    turns = [curator.turn(index) for index in range(3 * groups)]
    for cycle in range(3):
        assert Counter(turns[cycle * groups : (cycle + 1) * groups]) == Counter(world.clients)
    assert turns[:groups] != turns[groups : 2 * groups]
    start = start_of(world)
    for index in range(groups):
        gradient, rows = curator.round(start, index)
        client = world.members[turns[index]]
        assert list(rows) == [turns[index]]
        np.testing.assert_array_equal(gradient, client._local_trainer().round(start, index, client._model))
    (row,) = [row for row in Ledgered(tmp_path, turns[0]).rows if row["release"] != "context"]
    assert (row["release"], row["count"]) == ("predictor/1", 1)


def test_a_federated_plan_has_no_curator_and_a_centralised_one_no_updates(tmp_path: Path) -> None:
    world, _ = curated(tmp_path / "central")
    with pytest.raises(PrivacyError, match="federated"):
        Curator(make_world(tmp_path / "apart").members)  # type: ignore[arg-type]
    parameters = start_of(world).astype("<f4").tobytes()
    reply = world.ask("g0", "train", session="predictor", message=b"", round=0, parameters=parameters)
    assert (reply.kind, reply.body["code"]) == ("refusal", "NotAllowed")
