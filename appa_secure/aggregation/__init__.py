"""From the groups' rewards to one reward per rollout: average, min, max, log-sum-exp, APPA, maximin, or one's own.

Two forms of the same rules. The secure-sum ("blind") form splits a rule into what each group computes alone
(`segments`, `contribution`) and what the coordinator computes from the sum of those vectors (`combine`); no
function of the coordinator's side takes a per-group value. The clear form (`combine_clear`) has all rewards
in one place, for cohort mode and as the reference the blind form is tested against. `rules` says how to add one.

Pure functions on numpy arrays: no state, no randomness, no input or output.
"""

from appa_secure.aggregation.blind import combine, contribution, declared, segments, used_weight
from appa_secure.aggregation.clear import combine_clear, shares
from appa_secure.aggregation.rules import BUILT_IN, Own, Rule, Sum, Sums
from appa_secure.aggregation.spec import AggregationSpec, StepResult

__all__ = [
    "BUILT_IN",
    "AggregationSpec",
    "Own",
    "Rule",
    "StepResult",
    "Sum",
    "Sums",
    "combine",
    "combine_clear",
    "contribution",
    "declared",
    "segments",
    "shares",
    "used_weight",
]
