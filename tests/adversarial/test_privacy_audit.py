"""The audit catches builds that are broken on purpose, and accuses no sound one.

What is broken is patched here, in the mechanism's own place; production code has no switch for it. The configurations
claim small epsilons, so that few canaries refute them; the noise, the sampler and the ledger are the clients' own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from appa_secure.audit.canaries import View, measure
from appa_secure.config import compose
from appa_secure.data import GroupData
from appa_secure.privacy.noise import gaussian
from appa_secure.privacy.plan import TrainingPlan
from clients.client import Client
from clients.context import private_histograms, raw_shares
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
        assert not view.exceeded, view
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


# -- privacy.mechanism=histogram: all counts in one release, training is post-processing ----------------------------

# A claim of 8 and 64 clients: what is lost by so few is less than what a second release gains.
HISTOGRAM = ("privacy.mechanism=histogram", "privacy.epsilon=8", "predictor.rounds=1")


def histogram_views(unit: str = "response", clients: int = 64) -> dict[str, View]:
    width = 6 if unit == "respondent" else 1
    canaries = clients * (14 // width)
    return views(*HISTOGRAM, f"privacy.unit={unit}", f"privacy.answers_per_unit={width}", canaries=canaries)


@pytest.mark.parametrize("unit", ["response", "respondent", "record"])
def test_honest_histograms_are_not_accused(unit: str) -> None:
    found = histogram_views(unit)
    assert set(found) == {"histograms", "update", "sum of updates"}
    for view in found.values():
        assert 7.5 < view.claimed <= 8
        assert not view.exceeded, view
    # Both could have been refuted, and the audit sees the noise that is there.
    assert all(found[name].ceiling > 8 for name in ("histograms", "update"))
    assert found["histograms"].measured > (0.5 if unit == "record" else 3)


@pytest.mark.parametrize("unit", ["response", "respondent", "record"])
def test_histograms_without_noise_are_caught(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clients.context.gaussian", zeros)
    found = histogram_views(unit, clients=24)
    assert found["histograms"].exceeded
    assert found["update"].exceeded  # they show what they were computed from


def test_histograms_with_noise_for_the_wrong_sensitivity_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A respondent moves six counts; the noise is for one."""

    def weak(data: GroupData, sizes: Any, unit: str, width: int, noise: float, *rest: Any) -> Any:
        return private_histograms(data, sizes, unit, width, noise / width**0.5, *rest)

    monkeypatch.setattr("clients.client.private_histograms", weak)
    assert histogram_views("respondent")["histograms"].exceeded


def test_histograms_released_twice_and_paid_once_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that forgets its release draws new noise when it is asked again; the ledger takes it for the old one."""
    release_twice(monkeypatch)
    found = histogram_views()
    assert found["histograms"].exceeded
    assert found["histograms"].bound.epsilon < 8  # the bound for any mechanism alone would not have seen it


def test_a_context_released_twice_and_paid_once_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ("privacy.epsilon=12", "privacy.context_noise=0.7", "predictor.rounds=1")
    assert not views(*overrides, canaries=64 * 14)["context"].exceeded
    release_twice(monkeypatch)
    assert views(*overrides, canaries=64 * 14)["context"].exceeded


def release_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    handle, context, releases = Client.handle, Client._context, itertools.count()

    def forgetful_handle(self: Client, raw: bytes) -> bytes:
        self._state["answered"].pop("context", None)
        return handle(self, raw)

    def forgetful_context(self: Client, body: Mapping[str, Any]) -> bytes:
        self._state["context"] = {}
        return context(self, body)

    def fresh(key: bytes, label: str, size: int, std: float) -> np.ndarray:
        return gaussian(key, f"{label}/{next(releases)}", size, std)

    monkeypatch.setattr(Client, "handle", forgetful_handle)
    monkeypatch.setattr(Client, "_context", forgetful_context)
    monkeypatch.setattr("clients.context.gaussian", fresh)


def test_training_on_true_shares_instead_of_the_histograms_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = Client._shares

    def raw(self: Client, questions: Sequence[str]) -> dict[str, np.ndarray]:
        true = questions == self.agreement.plan.train
        return raw_shares(self._data, questions) if true else shares(self, questions)

    monkeypatch.setattr(Client, "_shares", raw)
    found = histogram_views(clients=24)
    assert found["update"].exceeded
    assert not found["histograms"].exceeded
