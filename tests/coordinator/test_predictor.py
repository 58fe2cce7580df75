"""Federated training of the predictor: FedAdam by the book, resumable, and every ledger row on file first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from appa_secure.errors import RunError
from appa_secure.predictor import PreferencePredictor, context_points, predict, unflatten
from appa_secure.privacy.ledger import check_rows
from appa_secure.secagg.errors import BadEncoding
from clients.client import Client
from coordinator.predictor import initial_predictor, record_ledger, train_predictor
from tests.clients.drive import Ledgered
from tests.clients.world import SHAPE, World, make_world

LR = 3e-3


def train(world: World, name: str = "run", progress: Any = None) -> np.ndarray:
    with world.run_dir(name) as run:
        return train_predictor(world.agreement, world.rounds(run), run, 1, LR, progress or (lambda *_: None))


def test_the_start_is_a_function_of_the_seed_and_leaves_others_randomness_alone(tmp_path: Path) -> None:
    agreement = make_world(tmp_path).agreement
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = initial_predictor(agreement, 1)
    assert torch.equal(torch.rand(3), expected)
    np.testing.assert_array_equal(first, initial_predictor(agreement, 1))
    assert not np.array_equal(first, initial_predictor(agreement, 2))
    assert first.shape == (agreement.predictor_size,)


def test_rounds_are_adam_on_the_mean_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kingma & Ba 2015, algorithm 1, with the mean pseudo-gradient for a gradient (FedAdam) and the decaying
    rate.
    """
    world = make_world(tmp_path, plan={"rounds": 6})
    world.set_up()
    updates: list[dict[str, np.ndarray]] = [{} for _ in range(6)]
    send = Client._send

    def spy(self: Client, kind: str, body: Any, vector: np.ndarray, layout: Any) -> bytes:
        updates[body["round"]][self.client_id] = np.array(vector)
        return send(self, kind, body, vector, layout)

    monkeypatch.setattr(Client, "_send", spy)
    seen: list[tuple[int, float | None]] = []
    measured: list[tuple[int, np.ndarray]] = []
    with world.run_dir("run") as run:
        found = train_predictor(
            world.agreement, world.rounds(run), run, 1, LR,
            lambda number, spent: seen.append((number, spent)),
            lambda number, now: measured.append((number, now.copy())),
        )  # fmt: skip
    assert [number for number, _ in measured] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(measured[-1][1].astype(np.float32), found)
    theta = initial_predictor(world.agreement, 1).astype(np.float64)
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    rates = [1, 1, 1, 1, 1, 0.5]  # linear over the last third: rounds 5 and 6 of 6 have 2/2 and 1/2
    for t, (round_updates, rate) in enumerate(zip(updates, rates, strict=True), 1):
        g = np.mean(list(round_updates.values()), axis=0)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        theta -= LR * rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
    np.testing.assert_allclose(found, theta, rtol=1e-5, atol=1e-7)
    assert [number for number, _ in seen] == [1, 2, 3, 4, 5, 6]
    spent = [s for _, s in seen]
    assert spent == sorted(spent)
    assert spent[-1] == Ledgered(tmp_path).rows[-1]["epsilon"]


def test_a_run_killed_after_any_round_ends_with_the_same_predictor_and_ledger(tmp_path: Path) -> None:
    calm = make_world(tmp_path / "calm")
    calm.set_up()
    theta = train(calm)

    class Killed(Exception):
        pass

    world = make_world(tmp_path / "killed")
    world.set_up()
    for stop in (1, 2):

        def kill(number: int, spent: float | None, stop: int = stop) -> None:
            if number == stop:
                raise Killed

        with pytest.raises(Killed):
            train(world, progress=kill)
        for client in world.clients:
            world.start(client)
    np.testing.assert_array_equal(train(world), theta)
    np.testing.assert_array_equal(train(world), theta)  # and finished stays finished
    ledgers = []
    for w in (calm, world):
        with w.run_dir() as run:
            ledgers.append(sorted(map(json.dumps, run.ledger)))
        assert [row["release"] for row in Ledgered(w.root).rows] == [
            "context",
            *(f"predictor/{i}" for i in (1, 2, 3)),
        ]
    assert ledgers[0] == ledgers[1]


def test_a_coordinator_killed_between_the_sum_and_its_state_asks_again_for_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, world = (make_world(tmp_path / name) for name in ("calm", "killed"))
    calm.set_up()
    world.set_up()
    theta = train(calm)

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("coordinator.predictor.save_state", kill)
        with pytest.raises(KeyboardInterrupt):
            train(world)
    np.testing.assert_array_equal(train(world), theta)
    assert len(Ledgered(world.root).rows) == 4


def test_every_row_is_in_the_runs_ledger_and_adds_up(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    world.set_up()
    train(world)
    with world.run_dir() as run:
        rows = list(run.ledger)
    assert len(rows) == 5 * 3
    own = {c: Ledgered(tmp_path, c).rows for c in world.clients}
    for client in world.clients:
        assert [row for row in rows if row["client"] == client] == own[client][1:]
        assert check_rows(own[client])[client] == own[client][-1]["epsilon"]


def test_a_client_that_stays_away_stops_training_with_its_name(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    world.set_up()
    world.offline = {"g4"}
    with pytest.raises(RunError, match=r"predictor round 1 failed 5 times.*g4"):
        train(world)
    world.offline = set()
    assert np.isfinite(train(world)).all()


def test_a_dropout_and_return_in_a_cohort_changes_the_mean_not_the_run(tmp_path: Path) -> None:
    world = make_world(tmp_path, groups=2, members=3, mode="cohort", release="recover")
    world.set_up()
    lost: list[int] = []

    def lose(client: str, request: Any) -> bool:
        hit = client == "g0 #1" and request.kind == "train" and request.body["round"] == 1
        lost.extend([1] * hit)
        return hit

    world.lose = lose
    assert np.isfinite(train(world)).all()
    assert lost == [1]
    # The round that was missed is paid for with the next: the plan's own figures assume that it took place.
    assert [r["release"] for r in Ledgered(tmp_path, "g0 #1").rows] == [
        "context",
        *(f"predictor/{i}" for i in (1, 2, 3)),
    ]


def test_training_without_noise_learns_what_groups_prefer(tmp_path: Path) -> None:
    """End to end: the mean distance of predictions from true shares on training questions goes down."""
    world = make_world(tmp_path, questions=12, plan={"private": False, "noise_multiplier": 0.0, "rounds": 25})
    world.set_up()

    def distance(theta: np.ndarray) -> float:
        model = PreferencePredictor(SHAPE)
        unflatten(model, theta)
        out = []
        for client in world.clients:
            data, plan = world.groups[client], world.agreement.plan
            points = context_points(
                [world.embeddings[q] for q in plan.context], [data.distribution(q) for q in plan.context]
            )
            found = predict(model, points, [world.embeddings[q] for q in plan.train])
            out += [np.abs(p - data.distribution(q)).sum() for q, p in zip(plan.train, found, strict=True)]
        return float(np.mean(out))

    with world.run_dir() as run:
        theta = train_predictor(world.agreement, world.rounds(run), run, 1, 1.5e-2, lambda *_: None)
        assert not list(run.ledger)
    assert distance(theta) < 0.6 * distance(initial_predictor(world.agreement, 1))


# -- rows a client sends -------------------------------------------------------------------------------------


@pytest.fixture
def row(tmp_path: Path) -> dict[str, Any]:
    world = make_world(tmp_path / "w", groups=3)
    world.set_up()
    return {k: v for k, v in Ledgered(tmp_path / "w").rows[0].items() if k != "check"}


def test_rows_are_recorded_once(tmp_path: Path, row: dict[str, Any]) -> None:
    world = make_world(tmp_path, groups=3)
    with world.run_dir() as run:
        assert record_ledger(run.ledger, "g0", json.dumps([row]).encode()) == row["epsilon"]
        assert record_ledger(run.ledger, "g0", json.dumps([row]).encode()) == row["epsilon"]
        assert record_ledger(run.ledger, "g0", b"[]") is None
        assert list(run.ledger) == [row]


@pytest.mark.parametrize(
    "change",
    [
        {"client": "g1"}, {"client": None}, {"epsilon": "much"}, {"epsilon": None}, {"release": 3},
        {"count": 1.5}, {"surprise": 1}, {"check": "x"},
    ],
)  # fmt: skip
def test_rows_that_are_none_are_refused_by_sender_and_nothing_is_recorded(
    tmp_path: Path, row: dict[str, Any], change: dict[str, Any]
) -> None:
    world = make_world(tmp_path, groups=3)
    with world.run_dir() as run:
        for raw in (
            json.dumps([{**row, **change}]).encode(),
            json.dumps([{k: row[k] for k in list(row)[:-1]}]).encode(),
        ):
            with pytest.raises(BadEncoding, match=r"^g0:"):
                record_ledger(run.ledger, "g0", raw)
        huge = json.dumps([row]).replace(json.dumps(row["epsilon"]), "1e999").encode()
        with pytest.raises(BadEncoding, match=r"^g0:"):
            record_ledger(run.ledger, "g0", huge)
        assert not list(run.ledger)
