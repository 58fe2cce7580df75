"""What both sides agree on about a system: layouts, labels of pairs, reward models."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from appa_secure.agreement import make_system
from appa_secure.config import Config
from appa_secure.predictor import flatten
from appa_secure.systems import (
    KINDS,
    AnswerReward,
    SystemSpec,
    comparable,
    initial_mixture,
    log_likelihood,
    preferences,
    segments,
)

REWARDS = st.lists(
    st.one_of(st.just(math.nan), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=2, max_size=12
)


@given(REWARDS)
def test_labels_of_pairs_are_what_comparing_one_by_one_says(values: list[float]) -> None:
    values = values[: len(values) // 2 * 2]
    expected = []
    for a, b in zip(values[0::2], values[1::2], strict=True):
        readable = (not math.isnan(a), not math.isnan(b))
        if readable == (True, True):
            expected.append((a > b) - (a < b))
        else:  # an answer that cannot be read loses to every other
            expected.append(int(readable[0]) - int(readable[1]))
    assert preferences(np.array(values)).tolist() == expected


@given(
    st.lists(st.floats(-20, 20), min_size=4, max_size=4),
    st.lists(st.sampled_from([-1, 0, 1]), min_size=2, max_size=2),
)
def test_the_likelihood_of_preferences_is_bradley_terrys(values: list[float], labels: list[int]) -> None:
    found = float(log_likelihood(torch.tensor(values, dtype=torch.float64), torch.tensor(labels)))
    terms = []
    for (a, b), label in zip((values[:2], values[2:]), labels, strict=True):
        if label:
            better, other = (a, b) if label > 0 else (b, a)
            # P(better wins) = exp(r_b) / (exp(r_b) + exp(r_o))
            terms.append(-math.log1p(math.exp(other - better)))
    assert found == pytest.approx(np.mean(terms) if terms else -math.log(2))


@pytest.mark.parametrize("cumulative", [False, True])
def test_a_reward_is_the_distance_to_an_ideal_point_of_the_question(cumulative: bool) -> None:
    rng = np.random.default_rng(1)
    embeddings = {q: rng.standard_normal((k, 4)).astype(np.float32) for q, k in (("a", 3), ("b", 2))}
    qids, answers = ["a", "b", "a"], [np.array([1.0, 0.5, 0.0]), np.array([0.3, 0.7]), np.array([0, 1.0, 0])]
    model = AnswerReward(4, cumulative)
    with torch.no_grad():
        found = model(comparable(embeddings, qids, answers))
        for r, q, a in zip(found.tolist(), qids, answers, strict=True):
            x = embeddings[q]
            logits = model.net(
                torch.from_numpy(np.concatenate([x, np.tile(x.mean(axis=0), (len(x), 1))], axis=1))
            )
            gap = a / a.sum() - torch.softmax(logits[:, 0], dim=0).numpy()
            expected = -np.exp(2.0) * (np.square(np.cumsum(gap) if cumulative else gap)).sum()
            assert r == pytest.approx(expected, rel=1e-4)


def test_reward_models_begin_apart_and_the_same_every_time() -> None:
    first, again = initial_mixture(3, 5, seed=1), initial_mixture(3, 5, seed=1)
    np.testing.assert_array_equal(first, again)
    assert first.shape == (3, len(flatten(AnswerReward(5, True))))
    assert len(np.unique(first[:, 5])) == 3
    assert not np.array_equal(first, initial_mixture(3, 5, seed=2))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "appa"])
def test_layouts_hold_the_largest_update_and_leave_precision(kind: str) -> None:
    spec = SystemSpec(kind=kind, clip=2.0, local_steps=3, clusters=2)
    parts = {name: (size, lo, hi) for name, size, lo, hi in segments(spec, 100)}
    size, lo, hi = parts["update"]
    assert (size, lo, hi) == (200 if kind == "maxmin" else 100, -6.0, 6.0)
    assert all(lo < hi for _, lo, hi in parts.values())


def test_every_system_option_reaches_both_sides() -> None:
    base = make_system(Config())
    changed = Config.model_validate(
        {
            "system": {
                "kind": "sft", "beta": 0.2, "eta": 0.3, "contrast": 7.0, "human_weight": 2.0, "labels": "raw", "clusters": 3,
                "free_rounds": 4, "local_steps": 5, "lr": 0.7, "clip": 9.0,
            },
            "ppo": {"clip": 0.3, "kl_coef": 0.5, "generations": 8, "temperature": 0.9},
            "task": {"style": "instruct", "format_penalty": 0.25}, "policy": {"lora": {"r": 3}},
        }
    )  # fmt: skip
    spec = make_system(changed)
    assert all(getattr(base, name) != getattr(spec, name) for name in SystemSpec.__dataclass_fields__)
