"""Hydra config groups; the meaning of every field stands in appa_secure/config.py."""
