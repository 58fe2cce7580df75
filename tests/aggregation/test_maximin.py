"""The project's own rule: its weights against a slow loop, its convergence to the group-maximin point by measurement."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appa_secure.aggregation import AggregationSpec, combine, combine_clear, contribution
from appa_secure.aggregation.history import averaging_decay, next_history, ramped


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_history_is_the_average_weighted_by_the_number_of_the_step(means):
    history = None
    for step, mean in enumerate(means, start=1):
        history = next_history(history, mean, averaging_decay(step))
    steps = len(means)
    expected = sum(2 * s * mean for s, mean in enumerate(means, start=1)) / (steps * (steps + 1))
    assert history == pytest.approx(expected, abs=1e-12)


@given(st.integers(2, 6), st.integers(1, 5), st.floats(0, 1), st.integers(1, 30), st.integers(0, 2**32))
def test_rewards_equal_the_formula_at_every_step(groups, batch, dial, ramp, seed):
    rng = np.random.default_rng(seed)
    lo, hi, temperature = 0.3, 0.8, 0.05
    spec = AggregationSpec(kind="maximin", dial=dial, ramp=ramp, band=(lo, hi), temperature=temperature)
    own = [None] * groups
    seen = np.zeros((0, groups))
    z = None
    for step in range(1, 7):
        r = rng.random((groups, batch))
        vectors = []
        for g in range(groups):
            vector, own[g] = contribution(spec, r[g], own[g], z, groups, step)
            vectors.append(vector)
        result = combine(spec, sum(vectors), batch, groups)
        weights = [1.0] * groups
        if len(seen):
            factor = np.arange(1, len(seen) + 1)
            h = (factor @ seen) / factor.sum()
            gain = min(1, (step - 1) / ramp)
            weights = [math.exp(-gain * (min(max(x, lo), hi) - lo) / temperature) for x in h]
        total = sum(weights)
        for i in range(batch):
            expected = sum(((1 - dial) / groups + dial * w / total) * r[g, i] for g, w in enumerate(weights))
            assert result.rewards[i] == pytest.approx(expected, abs=1e-9)
        assert result.alpha_sum == pytest.approx(total)
        seen = np.vstack([seen, r.mean(axis=1)])
        z = 1.0


def test_the_weights_contrast_has_a_public_cap():
    spec = AggregationSpec(kind="maximin", dial=1.0, ramp=1, band=(0.8, 0.9), temperature=0.05)
    _, _, weights = combine_clear(spec, np.full((3, 1), 0.9), np.array([0.0, 0.95, 1.0]), step=100)
    assert weights.max() / weights.min() == pytest.approx(math.exp(2.0))
    mixed = AggregationSpec(kind="maximin", dial=0.4, ramp=1, temperature=0.01, band=(0.8, 0.9))
    _, _, weights = combine_clear(mixed, np.full((3, 1), 0.9), np.array([0.0, 0.95, 1.0]), step=100)
    assert weights.min() >= 0.6 / 3
    assert ramped(1, 7) == 0.0
    assert ramped(8, 7) == ramped(99, 7) == 1.0


def game(rng, groups=4, answers=6):
    """AS of each answer for each group: two groups want opposite things, the others agree with everyone."""
    table = rng.uniform(0.7, 0.95, (groups, answers))
    table[0], table[1] = np.linspace(0.4, 0.9, answers), np.linspace(0.95, 0.5, answers)
    return table


def best_worst(table):
    """max over mixtures of min over groups, by a linear program."""
    from appa_secure.ceilings.programs import matrix_game

    return matrix_game(table.T)[1]


def play(spec, table, steps):
    """A policy that answers best to the weights at once, the hardest case: histories and the last worst scores."""
    h, z, worst = None, None, []
    for step in range(1, steps + 1):
        _, _, weights = combine_clear(spec, np.full((len(table), 1), 0.5), h, z, step=step)
        chosen = table[:, [int(np.argmax(weights @ table))]]
        result, h, _ = combine_clear(spec, chosen, h, z, step=step)
        z = result.z_next if spec.kind == "appa" else 1.0
        worst.append(h.min())
    return np.array(worst)


@pytest.mark.parametrize("seed", range(5))
def test_histories_converge_to_the_maximin_while_appas_swing(seed):
    """The bound of decision 21: T·log G + 2D²/(T·(t+2)) once the ramp is over; D = 0.55 here."""
    table = game(np.random.default_rng(seed))
    best, temperature = best_worst(table), 0.02
    spec = AggregationSpec(kind="maximin", dial=1.0, temperature=temperature, band=(0.45, 0.95), ramp=50)
    ours = play(spec, table, 2000)
    bound = temperature * math.log(len(table)) + 2 * 0.55**2 / (temperature * 2002)
    assert best - ours[-1] <= bound
    assert np.ptp(ours[-100:]) < 0.005
    appa = play(AggregationSpec(tau=1.0, a=0.0), table, 2000)
    assert np.ptp(appa[-100:]) > 5 * np.ptp(ours[-100:])
