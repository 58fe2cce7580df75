"""Runs at the aggregator: holds the policy, sees only sums and differentially private artefacts."""
