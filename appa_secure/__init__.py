"""What both sides of a federation agree on: protocol, privacy, predictor, aggregation, data, records.

Importing this package switches the telemetry of its dependencies off. A value that is already in the environment
wins, so an operator who wants a dependency to phone home has to say so.
"""

import os

__version__ = "0.1.0"

# Flower and the Hugging Face libraries report usage by default; Ray (Flower's simulation engine) as well.
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "YES",
    "DO_NOT_TRACK": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
for _name, _value in _QUIET.items():
    os.environ.setdefault(_name, _value)
