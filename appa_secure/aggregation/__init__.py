"""From the groups' rewards to one reward per rollout: APPA, average, min, max.

Two forms of the same rules. The secure-sum ("blind") form splits a rule into what each group computes alone
(`segments`, `contribution`) and what the coordinator computes from the sum of those vectors (`combine`); no
function of the coordinator's side takes a per-group value. The clear form (`combine_clear`) has all rewards
in one place, for cohort mode and as the reference the blind form is tested against.

Pure functions on numpy arrays: no state, no randomness, no input or output.
"""

from appa_secure.aggregation.blind import combine, contribution, segments
from appa_secure.aggregation.clear import combine_clear
from appa_secure.aggregation.spec import AggregationSpec, StepResult

__all__ = [
    "AggregationSpec",
    "StepResult",
    "combine",
    "combine_clear",
    "contribution",
    "segments",
]
