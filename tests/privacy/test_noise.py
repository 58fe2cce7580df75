"""The noise: its distribution, its determinism, and that no two uses share it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from appa_secure.privacy.noise import gaussian, sampler

KEY = bytes(range(32))
N = 200_000


def test_draws_are_normal() -> None:
    x = gaussian(KEY, "shape", N, 3.0)
    assert x.dtype == np.float64
    assert x.shape == (N,)
    assert stats.kstest(x / 3.0, "norm").pvalue > 1e-3
    # KS is weak in the tails, where privacy is lost.
    for sigmas in (2.0, 3.0, 4.0):
        expected = N * math.erfc(sigmas / math.sqrt(2))
        assert abs(np.sum(np.abs(x / 3.0) > sigmas) - expected) < 5 * math.sqrt(expected) + 1
    assert np.isfinite(x).all()
    assert np.abs(x).max() < 8.6 * 3.0


def test_draws_are_uncorrelated_within_and_across_labels() -> None:
    x = gaussian(KEY, "a", N, 1.0)
    others = [
        gaussian(KEY, "b", N, 1.0),
        gaussian(bytes(32), "a", N, 1.0),
        x[::-1],
        np.roll(x, 1),
        np.roll(x, N // 2),
    ]
    for y in others:
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / math.sqrt(N)
        assert abs(np.corrcoef(x**2, y**2)[0, 1]) < 5 / math.sqrt(N)  # also the pairs of one radius


@settings(max_examples=50, deadline=None)
@given(label=st.text(max_size=20), size=st.integers(1, 50), key=st.binary(min_size=32, max_size=32))
def test_the_same_name_gives_the_same_noise_and_another_name_other_noise(label, size, key) -> None:
    first = gaussian(key, label, size, 1.0)
    np.testing.assert_array_equal(first, gaussian(key, label, size, 1.0))
    assert len(first) == size
    for other in (
        gaussian(key, label + "/", size, 1.0),
        gaussian(bytes([key[0] ^ 1]) + key[1:], label, size, 1.0),
    ):
        assert not np.intersect1d(first, other).size
    np.testing.assert_allclose(gaussian(key, label, size, 2.5), 2.5 * first, rtol=1e-15)


def test_no_label_of_a_run_repeats_another_ones_stream() -> None:
    """Labels that could be confused when glued together: step 1 of round 11 and step 11 of round 1, and so
    on.
    """
    labels = [
        "dp-sgd/r/1/x/11",
        "dp-sgd/r/11/x/1",
        "dp-sgd/r/1/x/1",
        "sample/r/1/x/1",
        "context/r",
        "context/r/1",
    ]
    draws = np.concatenate([gaussian(KEY, label, 1000, 1.0) for label in labels])
    assert len(np.unique(draws)) == len(draws)


def test_no_noise_on_request_and_none_negative() -> None:
    assert not gaussian(KEY, "zero", 10, 0.0).any()
    assert gaussian(KEY, "none", 0, 1.0).shape == (0,)
    for std in (-1.0, math.nan):
        with pytest.raises(ValueError, match="std"):
            gaussian(KEY, "bad", 1, std)


def test_sampler_is_keyed_and_labelled() -> None:
    assert sampler(KEY, "a").random(4).tolist() == sampler(KEY, "a").random(4).tolist()
    assert sampler(KEY, "a").random(4).tolist() != sampler(KEY, "b").random(4).tolist()
    assert sampler(KEY, "a").random(4).tolist() != sampler(bytes(32), "a").random(4).tolist()
    assert stats.kstest(sampler(KEY, "uniform").random(20_000), "uniform").pvalue > 1e-3
