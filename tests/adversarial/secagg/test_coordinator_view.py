"""What uploads look like to the coordinator: uniform, and the same for all inputs with the same sum."""

from __future__ import annotations

import numpy as np
from scipy.stats import binom, chi2

from appa_secure.secagg import Aggregate, Layout, Segment
from tests.secagg.world import World

WIDE = Layout((Segment("reward", 4096, 0.0, 1.0),))


def test_masked_uploads_are_uniform_bytes() -> None:
    """Chi-square over byte values of every upload; the unmasked encoding fails the same test by far."""
    world = World(4, layout=WIDE, rounds=2, seed="chi")
    world.setup()
    assert isinstance(world.round(1), Aggregate)
    bound = chi2.ppf(1 - 1e-6, 255)
    for name in world.names:
        assert _chi_square(world.uploads[name]) < bound
    plain = WIDE.preflight(4).encode(world.vectors["site-00"]).tobytes()
    assert _chi_square(plain) > bound


def test_equal_vectors_in_two_rounds_give_unrelated_uploads() -> None:
    world = World(4, layout=WIDE, rounds=2, seed="two")
    world.setup()
    seen = []
    for r in (1, 2):
        world.round(r)
        seen.append(np.frombuffer(world.uploads["site-00"], "<u8"))
    difference = seen[0] - seen[1]
    assert _chi_square(difference.tobytes()) < chi2.ppf(1 - 1e-6, 255)
    assert len(np.unique(difference)) == WIDE.size


def test_a_distinguisher_learns_nothing_from_same_sum_inputs() -> None:
    """Two input sets with one sum: a linear rule fitted on half the rounds guesses the others at chance."""
    layout = Layout((Segment("reward", 8, 0.0, 1.0),))
    rounds = 120
    low, high = np.full(8, 0.1), np.full(8, 0.9)
    world = World(3, layout=layout, rounds=rounds, seed="view")
    world.setup()
    labels = np.random.default_rng(5).integers(0, 2, rounds)
    views = []
    for r, label in enumerate(labels, start=1):
        ordered = (low, high) if label else (high, low)
        world.vectors = {"site-00": ordered[0], "site-01": ordered[1], "site-02": np.full(8, 0.5)}
        outcome = world.round(r)
        assert isinstance(outcome, Aggregate)
        np.testing.assert_allclose(outcome.sum, 1.5, atol=1e-10)
        upload = np.concatenate([np.frombuffer(world.uploads[n], "<u8") for n in world.names])
        views.append(upload / 2.0**63 - 1)
    x, y = np.array(views), 2.0 * labels - 1
    half = rounds // 2
    weights, *_ = np.linalg.lstsq(x[:half], y[:half], rcond=None)
    hits = int((np.sign(x[half:] @ weights) == y[half:]).sum())
    assert binom.ppf(1e-4, half, 0.5) <= hits <= binom.ppf(1 - 1e-4, half, 0.5)
    # the same rule on unmasked uploads is perfect: the test can fail
    coding = layout.preflight(3)
    clear = np.array([coding.encode(low if label else high) / 2.0**51 for label in labels])
    weights, *_ = np.linalg.lstsq(np.c_[clear[:half], np.ones(half)], y[:half], rcond=None)
    assert (np.sign(np.c_[clear[half:], np.ones(half)] @ weights) == y[half:]).all()


def _chi_square(data: bytes) -> float:
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    expected = len(data) / 256
    return float(((counts - expected) ** 2 / expected).sum())
