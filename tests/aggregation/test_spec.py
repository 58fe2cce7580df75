"""Options are checked once, where they are made, and the message names the field."""

import math

import pytest

from appa_secure.aggregation import AggregationSpec


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "median"), ("kind", "no_such_module:rule"), ("kind", "math:pi"), ("kind", ":"), ("band", (0.5, 0.5)),
        ("band", (-0.1, 1.0)), ("dial", 1.1), ("ramp", 0), ("variant", "verbatim"), ("fi", "gini"), ("fi_scope", "step"),
        ("tau", 1.01), ("tau", -0.1), ("tau", math.nan), ("temperature", 0.001), ("temperature", math.inf),
        ("decay", 1.0), ("decay", -0.1), ("a", 16.5), ("a", -17.0), ("sharpness", 0.0), ("sharpness", 33.0),
        ("alpha_tolerance", 0.0), ("h0", 1.5),
    ],
)  # fmt: skip
def test_impossible_options_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"aggregation\.{field}"):
        AggregationSpec(**{field: value})


def test_defaults_are_the_published_values():
    spec = AggregationSpec()
    assert (spec.kind, spec.tau, spec.temperature, spec.decay, spec.h0) == ("appa", 0.99, 0.1, 0.8, None)
