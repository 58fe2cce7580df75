"""What a client does not do, and why."""

from __future__ import annotations

from dataclasses import dataclass

from appa_secure.errors import AppaError


@dataclass(frozen=True)
class Refusal(AppaError):
    """Internal: a request that this client's own configuration does not allow."""

    code: str
    reason: str
