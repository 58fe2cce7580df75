"""What the secure sums S1, S2, E say about single groups: power-sum leakage, carried out.

Per rollout the coordinator learns Σ r, Σ r² and one exponential sum of G unknown rewards.

 - G = 2: S1 and S2 give both rewards. G = 3 with E: all three. Up to order, that is: not who has which.
 - Groups that agree: S2·G = S1² says that every reward is S1/G, for any G.
 - G >= 5, one rollout: not identified. Different multisets with the same sums exist; what follows for every
   single reward is an interval, mean ± std·sqrt(G-1) (Samuelson's inequality), which no bound from S1 and S2
   improves.
 - Many answers to one question: rewards are a known function of an unknown distribution per group, so every
   answer adds equations and no unknowns. The multiset of the groups' distributions is then identified for
   any G, from S1 alone. Secure sums hide who has which distribution, not which distributions there are: what
   protects the latter is differential privacy of the predictor behind the rewards.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from appa_secure.aggregation import AggregationSpec, contribution, segments
from appa_secure.rewards import score


def sums(rewards, spec=None):
    """The segments the coordinator sees for groups' rewards (G, B) in a first step (equal weights)."""
    spec = spec or AggregationSpec()
    groups, batch = rewards.shape
    total = sum(contribution(spec, row, None, None, groups)[0] for row in rewards)
    parts, start = {}, 0
    for name, size, _, _ in segments(spec, batch):
        parts[name] = total[start : start + size]
        start += size
    return parts


@given(st.floats(0, 1), st.floats(0, 1))
def test_two_groups_are_an_open_book(a, b):
    seen = sums(np.array([[a], [b]]))
    s1, s2 = seen["S1"][0], seen["S2"][0]
    half_gap = np.sqrt(max(2 * s2 - s1 * s1, 0)) / 2
    found = [s1 / 2 - half_gap, s1 / 2 + half_gap]
    assert found == pytest.approx(sorted([a, b]), abs=1e-7)


@given(st.lists(st.integers(0, 50), min_size=3, max_size=3))
def test_three_groups_are_solved_with_the_exponential_sum(steps):
    rewards = np.array(steps) / 50
    seen = sums(rewards[:, None])
    mean, square, exponential = seen["S1"][0] / 3, seen["S2"][0] / 3, seen["E"][0] / seen["A"][0]
    radius = np.sqrt(max(square - mean * mean, 0) * 2)
    # S1 and S2 leave a circle; up to order it is an arc of 60 degrees, along which Σ exp(r) is monotone.
    on_circle = lambda angle: mean + radius * np.cos(angle + 2 * np.pi / 3 * np.arange(3))  # noqa: E731
    excess = lambda angle: np.expm1(on_circle(angle)).sum() / 3 - exponential  # noqa: E731
    ends = excess(0.0), excess(np.pi / 3)
    if radius < 1e-6 or ends[0] * ends[1] >= 0:  # all equal, or at an end of the arc
        angle = 0.0 if abs(ends[0]) <= abs(ends[1]) else np.pi / 3
    else:
        angle = brentq(excess, 0.0, np.pi / 3, xtol=1e-14)
    assert np.sort(on_circle(angle)) == pytest.approx(np.sort(rewards), abs=1e-4)


@pytest.mark.parametrize("groups", [5, 8, 30])
def test_groups_that_agree_are_an_open_book_at_any_size(groups):
    rewards = np.tile(np.random.default_rng(groups).random(4), (groups, 1))
    seen = sums(rewards)
    np.testing.assert_allclose(groups * seen["S2"], seen["S1"] ** 2)
    np.testing.assert_allclose(seen["S1"] / groups, rewards[0])


@pytest.mark.parametrize("groups", [4, 5, 8])
@pytest.mark.parametrize("variant", ["weighted", "paper"])
def test_beyond_three_groups_one_rollout_has_many_explanations(groups, variant):
    """Walk along a direction that changes no sum to first order, and correct: same sums, another multiset."""
    spec = AggregationSpec(variant=variant)
    rewards = np.linspace(0.2, 0.9, groups) + np.random.default_rng(7).uniform(-0.02, 0.02, groups)

    def seen(r):
        return np.array([sums(r[:, None], spec)[name][0] for name in ("S1", "S2", "E")])

    def jacobian(r):
        scale = 1.0 if variant == "weighted" else 1.0 / groups
        return np.stack([np.ones(groups), 2 * r, np.exp(r * scale) * scale])

    target = seen(rewards)
    direction = np.linalg.svd(jacobian(rewards))[2][-1]
    for step in (0.02, -0.02):
        moved = rewards + step * direction
        for _ in range(20):
            moved = moved - np.linalg.lstsq(jacobian(moved), seen(moved) - target)[0]
        np.testing.assert_allclose(seen(moved), target, rtol=0, atol=1e-14 * groups)
        assert ((moved > 0) & (moved < 1)).all()
        assert np.abs(np.sort(moved) - np.sort(rewards)).max() > 5e-3


@given(st.lists(st.floats(0, 1), min_size=5, max_size=9))
def test_what_remains_known_is_an_interval_around_the_mean(values):
    rewards = np.array(values)
    seen = sums(rewards[:, None])
    groups, mean = len(rewards), seen["S1"][0] / len(rewards)
    reach = np.sqrt(max(seen["S2"][0] / groups - mean**2, 0) * (groups - 1))
    assert (np.abs(rewards - mean) <= reach + 1e-7).all()


def test_the_interval_is_sharp():
    rewards = np.array([0.2, 0.8, 0.8, 0.8, 0.8])
    seen = sums(rewards[:, None])
    mean = seen["S1"][0] / 5
    assert mean - np.sqrt((seen["S2"][0] / 5 - mean**2) * 4) == pytest.approx(0.2)


@pytest.mark.parametrize("groups", [5, 8])
def test_many_answers_to_one_question_give_the_multiset_of_distributions_away(groups):
    """Two options, answer x, W1: r = 1 - |x - p_g|, so G - S1 = Σ|x - p_g| has a kink at each p_g."""
    rng = np.random.default_rng(groups)
    secret = np.sort((rng.choice(10, size=groups, replace=False) + rng.uniform(0.05, 0.95, groups)) / 10)
    answers = np.arange(11) / 10  # what a policy may write, 0..10 of 10
    p, x = np.meshgrid(secret, answers, indexing="ij")
    pairs = np.stack([p.ravel(), 1 - p.ravel()], axis=1), np.stack([x.ravel(), 1 - x.ravel()], axis=1)
    rewards = score("wasserstein", pairs[1], pairs[0], np.tile([0.0, 1.0], (p.size, 1))).reshape(p.shape)
    distance = groups - sums(rewards)["S1"]  # (11,) Σ_g |x - p_g|, from S1 alone

    found = []
    below = 0  # how many p_g lie left of the cell
    for left, d_left, d_right in zip(answers[:-1], distance[:-1], distance[1:], strict=True):
        # A cell without a p_g has slope 2·below - G; one p_g inside lifts it by 2·(right - p_g)/width.
        lift = (d_right - d_left) / 0.1 - (2 * below - groups)
        if lift > 1e-6:
            found.append(left + 0.1 * (1 - lift / 2))
            below += 1
    np.testing.assert_allclose(found, secret, atol=1e-9)
