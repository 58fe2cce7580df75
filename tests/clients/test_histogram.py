"""The histogram mechanism: one noisy release of all counts, then training that costs nothing more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from appa_secure.data import GroupData
from appa_secure.predictor import PreferencePredictor, flatten
from appa_secure.privacy.accounting import GaussianEvent
from clients.context import raw_shares
from clients.store import ClientStore
from clients.training import ShareTrainer
from coordinator.predictor import initial_predictor, train_predictor
from tests.clients.drive import ME, Ledgered, train_request, trained, training
from tests.clients.world import World, make_world

UNITS = ["response", "respondent", "record"]


def histogram_world(root: Path, unit: str = "response", **plan: object) -> World:
    bound = 3 if unit == "respondent" else 1
    return make_world(root, plan={"mechanism": "histogram", "unit": unit, "answers_per_unit": bound, **plan})


@pytest.mark.parametrize("unit", UNITS)
def test_one_event_pays_for_context_and_training(tmp_path: Path, unit: str) -> None:
    world = histogram_world(tmp_path, unit)
    world.set_up()
    (row,) = Ledgered(tmp_path).rows
    assert row["release"] == "histograms"
    assert Ledgered(tmp_path).events == [GaussianEvent(2.0, 1.0, 1)]
    before = (tmp_path / "clients" / ME / "ledger.jsonl").read_bytes()
    trained(world)
    assert (tmp_path / "clients" / ME / "ledger.jsonl").read_bytes() == before
    with world.run_dir() as run:
        assert {r["release"] for r in run.ledger} <= {"histograms"}


@pytest.mark.parametrize("unit", UNITS)
def test_training_looks_at_the_release_and_never_at_the_answers(tmp_path: Path, unit: str) -> None:
    """After the release the answers may be gone, or be other ones: every round is the same."""
    rounds = []
    for name, tamper in (("kept", False), ("gone", True)):
        world = histogram_world(tmp_path / name, unit)
        world.set_up()
        if tamper:
            for client in world.clients:
                held = world.members[client]._data
                world.members[client]._data = GroupData(held.name, {q: c * 0 for q, c in held.counts.items()})
        with world.run_dir() as run:
            a = world.agreement
            rounds.append(train_predictor(a, world.rounds(run), run, 1, 3e-3, lambda *_: None))
    np.testing.assert_array_equal(*rounds)


def test_with_vanishing_noise_it_is_the_training_without_privacy(tmp_path: Path) -> None:
    world = histogram_world(tmp_path, noise_multiplier=1e-9)
    a, client = world.agreement, world.members[ME]
    world.agreement = client.agreement = replace(a, budget=replace(a.budget, epsilon=1e30))
    client._ledger.budget = world.agreement.budget  # type: ignore[union-attr]
    world.ask(ME, "setup", run="test-run", agreement=client.agreement.digest())
    assert world.ask(ME, "context").kind == "context"
    model, data = PreferencePredictor(a.predictor), world.groups[ME]
    plain = ShareTrainer(
        replace(a.plan, private=False), world.embeddings,
        raw_shares(data, a.plan.context), raw_shares(data, a.plan.train),
    )  # fmt: skip
    start = initial_predictor(a, 1)
    found, expected = client._local_trainer().round(start, 0, model), plain.round(start, 0, model)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected).max() > 1e-2
    assert len(found) == len(flatten(model))


@pytest.mark.parametrize("unit", UNITS)
def test_what_is_kept_is_noisy_for_every_question_and_stays(tmp_path: Path, unit: str) -> None:
    world = histogram_world(tmp_path, unit)
    world.set_up()
    kept = ClientStore(tmp_path / "clients" / ME).load()["context"]
    plan = world.agreement.plan
    assert set(kept) == {*plan.context, *plan.train}
    everything = b"".join(raw + (reply or b"") for _, raw, reply in world.watched)
    for name, shares in kept.items():
        share = np.frombuffer(shares)
        assert (share >= 0).all()
        assert share.sum() == pytest.approx(1.0)
        assert not np.array_equal(share, world.groups[ME].distribution(name))
        assert shares not in everything
    again = world.start(ME)  # after a restart nothing is drawn or paid for a second time
    reply = world.ask(ME, "context")
    assert reply.kind == "context"
    assert {q: s.tobytes() for q, s in again._shares([*plan.context, *plan.train]).items()} == kept
    assert len(Ledgered(tmp_path).rows) == 1


def test_a_kill_after_paying_repeats_the_same_histograms(tmp_path: Path) -> None:
    world = histogram_world(tmp_path)
    world.ask(ME, "setup", run="test-run", agreement=world.agreement.digest())
    client = world.members[ME]

    def killed(state: object) -> None:
        raise KeyboardInterrupt

    client._store.save = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        world.ask(ME, "context")
    lost = dict(client._state["context"])
    assert len(Ledgered(tmp_path).rows) == 1
    again = world.start(ME)
    world.ask(ME, "context")
    assert again._state["context"] == lost
    assert len(Ledgered(tmp_path).rows) == 1


def test_a_round_has_no_noise_of_its_own(tmp_path: Path) -> None:
    """Without the noise key, the same update comes out."""
    world = histogram_world(tmp_path)
    world.set_up()
    session = training(world)
    world.members[ME].handle(train_request(world, session))
    first = world.members[ME]._state["vector"]["update"]
    client = world.members[ME]
    client._trainer, client._state["noise_key"] = None, bytes(32)
    model = PreferencePredictor(world.agreement.predictor)
    again = client._local_trainer().round(initial_predictor(world.agreement, 1), 0, model)
    assert again.tobytes() == first
