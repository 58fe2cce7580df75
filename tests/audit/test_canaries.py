"""The canaries are what they are said to be, and the adversary's model of a client is the client."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from appa_secure.audit import canaries
from appa_secure.audit.canaries import Asked, clear_agreement, measure
from appa_secure.audit.survey import CanarySurvey
from appa_secure.audit.whitebox import WhiteBox
from appa_secure.config import Config, compose
from appa_secure.errors import ConfigError
from clients.client import Client
from clients.store import ClientStore

UNITS = [("response", 1), ("respondent", 2), ("record", 1)]
MECHANISMS = ["dpsgd", "histogram"]
QUESTIONS, CONTEXT = 8, 3


def config(unit: str, width: int, *more: str) -> Config:
    return compose(
        [
            "experiment=smoke", f"privacy.unit={unit}", f"privacy.answers_per_unit={width}", "privacy.sample_rate=1",
            "privacy.accountant=rdp", "predictor.rounds=3", "predictor.local_steps=1", "predictor.questions_per_step=4",
            *more,
        ]
    )  # fmt: skip


def zeros(key: bytes, label: str, size: int, std: float) -> np.ndarray:
    return np.zeros(size)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize(("unit", "width"), UNITS)
def test_the_adversary_reads_every_coin_when_there_is_no_noise(
    unit: str, width: int, mechanism: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Least squares gives the coins back only if the gradients, clipping, schedule and scale are the client's."""
    monkeypatch.setattr("clients.training.gaussian", zeros)
    monkeypatch.setattr("clients.context.gaussian", zeros)
    settled = config(unit, width, f"privacy.mechanism={mechanism}")
    survey = CanarySurvey(settled, QUESTIONS, CONTEXT, limit=100)
    agreement = clear_agreement(settled, survey, 1)
    assert agreement.histogram_release[1] == survey.noise
    box = WhiteBox(agreement, survey, seed=1)
    rng = np.random.default_rng(3)
    context = rng.random(len(survey.context_cells)) < 0.5
    train = rng.random(len(survey.train_cells)) < 0.5
    (name,) = agreement.groups

    def start(store: ClientStore) -> Client:
        return Client(
            name, survey.data(name, context, train), agreement, survey.embeddings, store,
            canaries._identity(settled, name), noise_key=bytes(32),
        )  # fmt: skip

    asked = Asked(start, ClientStore(tmp_path))
    shares, per_question = asked.stolen()
    found = box.estimates(lambda index: asked.update(index, box.parameters), per_question)
    np.testing.assert_allclose(found, train, atol=5e-3)
    np.testing.assert_array_equal(box.scores(found) > 0, train)
    evidence = survey.first_scores(shares)
    coins = np.concatenate([context, train])[: survey.first_release]
    assert len(coins) == len(context) + (len(train) if mechanism == "histogram" else 0)
    if unit == "record":
        np.testing.assert_array_equal(evidence > 0, coins)
    else:
        np.testing.assert_allclose(evidence, width * (coins - 0.5), atol=1e-6)
    assert len(asked.training_rows) == (settled.predictor.rounds if mechanism == "dpsgd" else 0)
    asked.restart()
    assert len(asked.context_rows) == 1
    again = asked.stolen()[0]
    assert all((again[q] == shares[q]).all() for q in shares)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize(("unit", "width"), UNITS)
def test_each_canary_is_one_unit_within_its_bound(unit: str, width: int, mechanism: str) -> None:
    """Taking one canary out changes the data by one unit: one answer, one person's, or one distribution."""
    survey = CanarySurvey(
        config(unit, width, f"privacy.mechanism={mechanism}"), QUESTIONS, CONTEXT, limit=100
    )
    context = np.ones(len(survey.context_cells), dtype=bool)
    train = np.ones(len(survey.train_cells), dtype=bool)
    everything = survey.data("g", context, train)
    for coins, kind in ((context, "context"), (train, "train")):
        for i in range(len(coins)):
            less = coins.copy()
            less[i] = False
            data = survey.data("g", *((less, train) if kind == "context" else (context, less)))
            changed = {q: everything.counts[q] - data.counts[q] for q in data.counts}
            moved = {q: d for q, d in changed.items() if d.any()}
            if unit == "record" and (kind == "context" or mechanism == "histogram"):
                assert len(moved) == 1
                (q,) = moved
                distance = np.linalg.norm(everything.distribution(q) - data.distribution(q))
                assert 0.9 < distance <= 1.0
            else:
                assert len(moved) == width
                assert all(d.sum() == 1 and d.max() == 1 and d.min() == 0 for d in moved.values())
            if unit == "respondent":
                assert everything.responses is not None
                assert data.responses is not None
                people = [set(r.respondent.tolist()) for r in (everything.responses, data.responses)]
                assert len(people[0]) - len(people[1]) == 1


def test_gradients_of_canaries_are_longer_than_the_clipping_norm_and_nearly_orthogonal() -> None:
    settled = config("response", 1, "privacy.clip=40")
    survey = CanarySurvey(settled, QUESTIONS, CONTEXT, limit=100)
    box = WhiteBox(clear_agreement(settled, survey, 1), survey, seed=1)
    lengths = np.linalg.norm(box.gradients, axis=1)
    assert (lengths > settled.privacy.clip).all()
    cosines = box.gradients @ box.gradients.T / np.outer(lengths, lengths)
    assert np.abs(cosines - np.eye(len(lengths))).max() < 0.5


def test_memory_limits_the_canaries_of_a_client() -> None:
    assert len(CanarySurvey(config("response", 1), QUESTIONS, CONTEXT, limit=5).train_cells) == 5
    fewer = CanarySurvey(config("response", 1, "privacy.mechanism=histogram"), QUESTIONS, CONTEXT, limit=5)
    assert len(fewer.counted) == CONTEXT + 5
    assert len(CanarySurvey(config("respondent", 3), QUESTIONS, CONTEXT, limit=100).train_cells) == 2


def test_without_privacy_there_is_nothing_to_audit() -> None:
    with pytest.raises(ConfigError, match="claims nothing"):
        measure(compose(["experiment=smoke", "privacy=off"]), 100, 0.95, lambda *_: None)
