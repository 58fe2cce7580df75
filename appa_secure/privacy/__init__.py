"""Differential privacy: noise, accounting, the ledger and the statement about it."""
