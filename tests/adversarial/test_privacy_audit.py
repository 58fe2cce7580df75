"""The audit catches builds that are broken on purpose, and accuses no sound one.

What is broken is patched here, in the mechanism's own place; production code has no switch for it. The configurations
claim small epsilons, so that few canaries refute them; the noise, the sampler and the ledger are the clients' own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from appa_secure.audit.canaries import View, measure
from appa_secure.config import compose
from appa_secure.data import GroupData
from appa_secure.privacy.plan import TrainingPlan
from clients.training import Examples, LocalTrainer

SMALL = (
    "experiment=smoke", "predictor.rounds=3", "predictor.local_steps=1", "privacy.accountant=rdp", "privacy.epsilon=2",
    "privacy.context_noise=4", "privacy.sample_rate=1",
)  # fmt: skip


def views(*overrides: str, canaries: int = 112) -> dict[str, View]:
    found = measure(compose([*SMALL, *overrides]), canaries, 0.95, lambda *_: None)
    return {v.name: v for v in found}


def zeros(key: bytes, label: str, size: int, std: float) -> np.ndarray:
    return np.zeros(size)


@pytest.mark.parametrize(
    "unit",
    [("response",), ("respondent", "privacy.answers_per_unit=2"), ("record",)],
    ids=lambda unit: unit[0],
)
def test_a_sound_build_is_not_accused(unit: tuple[str, ...]) -> None:
    found = views(f"privacy.unit={unit[0]}", *unit[1:], canaries=336)
    assert set(found) == {"context", "update", "sum of updates"}
    for view in found.values():
        assert 0 < view.claimed <= 2
        assert view.bound.epsilon <= view.claimed, view
    # What is claimed could have been refuted: the check above is not empty.
    assert found["update"].bound.ceiling > found["update"].claimed


def test_the_audit_sees_through_noise_that_is_there() -> None:
    """A bound of 0 for everything would pass the test above."""
    found = views("privacy.epsilon=12", "privacy.context_noise=1", canaries=672)
    assert found["update"].bound.epsilon > 1.5
    assert found["context"].bound.epsilon > 1.5
    assert not any(view.exceeded for view in found.values())


@pytest.mark.parametrize("unit", ["response", "respondent", "record"])
def test_updates_without_noise_are_caught(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clients.training.gaussian", zeros)
    found = views(f"privacy.unit={unit}")
    assert found["update"].exceeded
    assert found["update"].bound.correct == found["update"].bound.guesses
    assert not found["context"].exceeded


@pytest.mark.parametrize("unit", ["response", "respondent", "record"])
def test_a_context_without_noise_is_caught(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clients.context.gaussian", zeros)
    found = views(f"privacy.unit={unit}")
    assert found["context"].exceeded
    assert not found["update"].exceeded


def test_a_raw_context_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client charges for its private context and keeps the true shares."""

    def raw(data: GroupData, sizes: Mapping[str, int], *_: Any) -> tuple[dict[str, np.ndarray], float]:
        return {q: data.distribution(q) for q in sizes}, 1.0

    monkeypatch.setattr("clients.client.private_histograms", raw)
    assert views()["context"].exceeded


def test_a_sampler_that_draws_more_than_is_accounted_for_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = LocalTrainer._sample

    def greedy(self: LocalTrainer, questions: Sequence[str], rng: np.random.Generator) -> Examples:
        plan, self.plan = self.plan, replace(self.plan, sample_rate=1.0)
        try:
            return sample(self, questions, rng)
        finally:
            self.plan = plan

    honest = ("privacy.sample_rate=0.1", "predictor.rounds=12", "privacy.epsilon=1.5")
    assert not views(*honest, canaries=336)["update"].exceeded
    monkeypatch.setattr(LocalTrainer, "_sample", greedy)
    assert views(*honest, canaries=336)["update"].exceeded


def test_answers_that_are_counted_twice_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each drawn answer enters the sum many times: the sensitivity is not what the noise is for."""
    sample = LocalTrainer._sample

    def twice(self: LocalTrainer, questions: Sequence[str], rng: np.random.Generator) -> Examples:
        found = sample(self, questions, rng)
        return replace(found, multiplicity=6 * found.multiplicity)

    monkeypatch.setattr(LocalTrainer, "_sample", twice)
    assert views("privacy.epsilon=1.5", canaries=224)["update"].exceeded


def test_participations_that_are_not_counted_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit is charged for one step however often it takes part."""
    monkeypatch.setattr(TrainingPlan, "participations", lambda self, rounds: min(rounds, 1))
    assert views("predictor.rounds=24", "privacy.context_noise=20", canaries=336)["update"].exceeded
