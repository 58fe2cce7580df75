"""The privacy ledger of one client: what was spent, written before the release it pays for.

A row is one paid release. Its `release` names it (mechanism and round); asking for the same release again is free,
because the client then repeats the same bytes and nothing new is published. Rows are appended to a checksummed
journal and are on disk before `charge` returns, so a kill at any point can only over-count.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appa_secure.errors import PrivacyError
from appa_secure.journal import Journal
from appa_secure.privacy.accounting import GaussianEvent, epsilon

# What a row holds; numbers are finite.
ROW_FIELDS: dict[str, Any] = {
    "release": str, "client": str, "mechanism": str, "noise_multiplier": float, "sample_rate": float, "count": int,
    "unit": str, "adjacency": str, "delta": float, "accountant": str, "epsilon": float,
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """The most a client may spend: epsilon at delta under one accountant, for one privacy unit; set by `field`."""

    epsilon: float
    delta: float
    accountant: str
    unit: str
    field: str = "privacy.epsilon"
    adjacency: str = "add/remove"


class Ledger:
    """Append-only account of one client against its budget."""

    def __init__(self, path: Path, client: str, budget: Budget) -> None:
        self.client, self.budget = client, budget
        self._journal = Journal(path)
        for row in self._journal:
            if row["client"] != client or row["unit"] != budget.unit or row["delta"] != budget.delta:
                raise PrivacyError(
                    f"{path.name} belongs to client {row['client']!r}, unit {row['unit']}, delta {row['delta']}: "
                    "a budget is kept per client, unit and delta; use another federation.client_root for another run"
                )

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, oldest first."""
        return list(self._journal)

    @property
    def spent(self) -> float:
        """Epsilon spent so far, as the last row states it; 0 before the first."""
        rows = self.rows
        return float(rows[-1]["epsilon"]) if rows else 0.0

    def charge(self, release: str, event: GaussianEvent, mechanism: str | None = None) -> dict[str, Any]:
        """Pay for `release` and return its row; a release that was paid already returns its old row.

        `event.count` is by how much the number of this mechanism's releases that one unit takes part in grows with
        this release (0 where only other units took part more often). `mechanism` names what is accounted for as a
        Gaussian and is none. Raises PrivacyError, with nothing written, when
        the budget would be exceeded or the name was used for another event.
        """
        for row in self._journal:
            if row["release"] == release:
                if _event(row) != event:
                    raise PrivacyError(f"release {release!r} was paid for as {_event(row)}, not as {event}")
                return row
        total = epsilon(
            [*(_event(row) for row in self._journal), event], self.budget.delta, self.budget.accountant
        )
        if total > self.budget.epsilon:
            raise PrivacyError(
                f"client {self.client!r}: release {release!r} would bring epsilon to {total:.4f}, above "
                f"{self.budget.field}={self.budget.epsilon}; raise the budget or plan fewer releases"
            )
        row = {
            "release": release,
            "client": self.client,
            "mechanism": mechanism
            or ("gaussian" if event.sample_rate == 1 else "poisson-subsampled gaussian"),
            "noise_multiplier": float(event.noise_multiplier),
            "sample_rate": float(event.sample_rate),
            "count": event.count,
            "unit": self.budget.unit,
            "adjacency": self.budget.adjacency,
            "delta": self.budget.delta,
            "accountant": self.budget.accountant,
            "epsilon": total,
        }
        self._journal.append(row)
        return row

    def close(self) -> None:
        """Give the file back."""
        self._journal.close()


def _event(row: dict[str, Any]) -> GaussianEvent:
    return GaussianEvent(float(row["noise_multiplier"]), float(row["sample_rate"]), int(row["count"]))


def check_rows(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Recompute every row's epsilon from the events before it; returns epsilon per client.

    For auditors. Raises PrivacyError naming the first row whose epsilon is lower than its events cost, a release
    paid twice, or a client whose rows disagree on unit, delta or accountant.
    """
    events: dict[str, list[GaussianEvent]] = {}
    terms: dict[str, tuple[Any, ...]] = {}
    paid: set[tuple[str, str]] = set()
    spent: dict[str, float] = {}
    for number, row in enumerate(rows, 1):
        client = row["client"]
        if not re.fullmatch(r"[^\n]+", client):
            raise PrivacyError(f"ledger row {number}: empty client name")
        if (client, row["release"]) in paid:
            raise PrivacyError(f"ledger row {number}: release {row['release']!r} of {client!r} occurs twice")
        paid.add((client, row["release"]))
        if terms.setdefault(client, (row["unit"], row["delta"], row["accountant"])) != (
            row["unit"], row["delta"], row["accountant"],
        ):  # fmt: skip
            raise PrivacyError(f"ledger row {number}: {client!r} changed its unit, delta or accountant")
        events.setdefault(client, []).append(_event(row))
        cost = epsilon(events[client], row["delta"], row["accountant"])
        if row["epsilon"] < cost - 1e-9:
            raise PrivacyError(f"ledger row {number} states epsilon {row['epsilon']}, its events cost {cost}")
        spent[client] = row["epsilon"]
    return spent
