"""Arithmetic behind the figures."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appa_secure.report.plots import shorten, smooth, spread

values = st.lists(st.floats(-1, 1), min_size=1, max_size=12)


@given(values=values, gap=st.floats(0.001, 0.5))
def test_spread_labels_never_overlap_and_keep_their_order(values: list[float], gap: float) -> None:
    places = spread(values, gap)
    for i, j in ((i, j) for i in range(len(values)) for j in range(len(values)) if i != j):
        assert abs(places[i] - places[j]) >= gap * (1 - 1e-6)
        if values[i] < values[j]:
            assert places[i] < places[j]
    assert sum(places) == pytest.approx(sum(values), abs=1e-6), "labels stay around their values as a whole"


def test_labels_that_do_not_collide_stay_where_they_are() -> None:
    assert spread([0.5, 0.1, 0.9], 0.1) == [0.5, 0.1, 0.9]


@given(values=values, reach=st.integers(0, 5))
def test_smooth_is_the_mean_of_the_neighbours(values: list[float], reach: int) -> None:
    for index, value in enumerate(smooth(values, reach)):
        near = [values[k] for k in range(len(values)) if abs(k - index) <= reach]
        assert value == pytest.approx(sum(near) / len(near))


def test_names_are_cut_to_fit() -> None:
    assert shorten("a\n b") == "a b"
    assert shorten("x" * 30, 10) == "x" * 9 + "…"
