"""How far one privacy unit can move what a mechanism releases, in L2 norm, before the noise.

Adjacency is add/remove of one unit. The contribution bounds that these figures rest on are enforced in
`clients/context.py` and `clients/training.py`; `tests/privacy/test_sensitivity.py` goes through all neighbours of small
data sets. Noise of standard deviation s on a release of sensitivity d has the noise multiplier s / d.
"""

from __future__ import annotations

import math


def histograms(unit: str, answers_per_unit: int) -> float:
    """L2 sensitivity of the histograms of any number of questions, released together, in counts.

    response: one count changes by 1. respondent: at most `answers_per_unit` counts, of different questions, change by
    1 each. record (in shares): one question's distribution appears or disappears, and none is longer than 1.
    """
    return math.sqrt(answers_per_unit) if unit == "respondent" else 1.0


def gradient_sum(clip: float) -> float:
    """L2 sensitivity of the sum of clipped gradients in one DP-SGD step: each unit adds one vector of at most `clip`."""
    return clip
