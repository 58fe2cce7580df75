"""Runs inside an institution: the only code that ever touches raw preferences."""
