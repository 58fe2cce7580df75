"""What one client keeps: its keys, its private state and its ledger, in a directory of its own.

The directory never lies inside a run directory. State is written and fsynced before the answer that depends on it
leaves the client; a client killed at any instant therefore never answers one round in two ways.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from appa_secure.errors import RunError
from appa_secure.journal import atomic_write
from appa_secure.membership import FILE as MEMBERSHIP
from appa_secure.secagg import cbor

IDENTITY = "identity.seed"  # secret


class ClientStore:
    """A directory with `state.cbor` and `scored.bin` (secret), `ledger.jsonl`, `output_ledger.jsonl` where there is
    output noise, `policy.cbor` (public) where clients train the policy; and what the operator puts there."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        os.chmod(root, 0o700)
        self.root = root
        self.ledger_path = root / "ledger.jsonl"
        self.scored_path = root / "scored.bin"
        self.output_ledger_path = root / "output_ledger.jsonl"
        self._path = root / "state.cbor"
        self._policy = root / "policy.cbor"
        for leftover in root.glob(
            ".*.tmp"
        ):  # of a process killed while saving: secrets of a state nobody keeps
            leftover.unlink()

    def __repr__(self) -> str:
        return f"ClientStore({self.root.name!r})"

    def load(self) -> dict[str, Any]:
        """The stored state, empty for a new client. Raises RunError when the file is damaged."""
        if not self._path.exists():
            return {}
        try:
            state = cbor.decode(self._path.read_bytes())
        except cbor.NotCanonical as error:
            raise RunError(
                f"{self.root.name}/state.cbor is damaged ({error}): restore it from a copy"
            ) from None
        if not isinstance(state, dict):
            raise RunError(f"{self.root.name}/state.cbor is not a client state: restore it from a copy")
        return state

    def adopt(self, origin: ClientStore, run: str, parameters: str, questions: Collection[str]) -> None:
        """Start from what this client kept of another run's predictor: private context, predictions and ledger.

        An act of the site's operator, before the client of the new run first answers; later calls change nothing.
        run: id of the other run; parameters: SHA-256 of its predictor, hex; questions: ids of the survey. The
        ledger comes first, so that a kill in between leaves no release that is not accounted for. Raises RunError where
        the other store holds something else.
        """
        if self._path.exists():
            return
        state = origin.load()
        whole = state.get("run") == run and state.get("frozen") == parameters
        if not whole or set(state["predicted"]) != set(questions):
            raise RunError(
                f"{origin.root} does not hold this client's part of run {run}: repeat that run under another name"
            )
        if origin.ledger_path.exists():
            atomic_write(self.ledger_path, origin.ledger_path.read_bytes())
        self.save({k: state[k] for k in ("context", "per_question", "predicted", "frozen") if k in state})

    def membership(self) -> bytes | None:
        """What this site's operator says of who takes part from the next epoch on; None before any change."""
        path = self.root / MEMBERSHIP
        return path.read_bytes() if path.exists() else None

    def new_identity(self) -> bytes | None:
        """The 32-byte seed of a signing key that replaces this client's, as its operator left it; else None."""
        path = self.root / IDENTITY
        return path.read_bytes() if path.exists() else None

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state atomically; returns when it is on disk."""
        atomic_write(self._path, cbor.encode(state))
        os.chmod(self._path, 0o600)

    def keep_policy(self, body: Mapping[str, Any]) -> None:
        """Keep the warmed-up policy apart from the state, which is written with every answer."""
        atomic_write(self._policy, cbor.encode(dict(body)))

    def policy(self) -> dict[str, Any] | None:
        """The policy that was kept; None where there is none."""
        body = cbor.decode(self._policy.read_bytes()) if self._policy.exists() else None
        return body if isinstance(body, dict) else None
