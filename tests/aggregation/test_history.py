"""History and weight of one group, against the formulas of APPA section 1."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appa_secure.aggregation.history import next_history, weight


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0, 0.99))
def test_history_is_the_exponential_average_started_at_the_first_mean(means, decay):
    history = None
    for mean in means:
        history = next_history(history, mean, decay)
    steps = len(means)
    expected = decay ** (steps - 1) * means[0]
    expected += sum((1 - decay) * decay ** (steps - 1 - t) * means[t] for t in range(1, steps))
    assert history == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.floats(0.05, 2))
def test_weights_are_the_reverse_softmax(histories, temperature):
    z = sum(math.exp(-h / temperature) for h in histories)
    weights = [weight(h, z, len(histories), temperature) for h in histories]
    # The published form, softmax of (1 - h)/T.
    terms = [math.exp((1 - h) / temperature) for h in histories]
    assert weights == pytest.approx([term / sum(terms) for term in terms], rel=1e-9)


def test_contrast_of_weights_is_as_the_design_states():
    z = math.exp(-8.0) + math.exp(-7.5)
    assert weight(0.75, z, 2, 0.1) / weight(0.8, z, 2, 0.1) == pytest.approx(1.65, abs=0.01)


def test_uniform_without_normaliser_or_history_and_capped_for_a_returning_group():
    assert weight(None, None, 8, 0.1) == weight(0.3, None, 8, 0.1) == weight(None, 0.01, 8, 0.1) == 1 / 8
    assert weight(0.1, 8 * math.exp(-8.0), 9, 0.1) == 1.0


@pytest.mark.parametrize("z", [0.0, -1.0, math.nan, math.inf, 4.5e-6, 8.2])
def test_a_normaliser_no_histories_can_give_is_refused(z):
    with pytest.raises(ValueError, match="z="):
        weight(0.5, z, 8, 0.1)


def test_out_of_range_history_is_refused():
    with pytest.raises(ValueError, match="history"):
        weight(1.2, 1.0, 8, 0.1)
    with pytest.raises(ValueError, match="history"):
        next_history(-0.1, 0.5, 0.8)
    with pytest.raises(ValueError, match="groups"):
        weight(0.5, 1.0, 0, 0.1)
