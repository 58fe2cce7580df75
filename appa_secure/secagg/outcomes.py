"""What a coordinator step leads to. Outcomes carry their outbound bytes or their reason; nothing is
swallowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .masks import RingVector


@dataclass(frozen=True)
class Fault:
    """One thing that went wrong with one party, with its reason. `accused`: whom a refusal blames. `more`: further ones of
    this kind and party in the same phase, which were counted and not kept."""

    party: str
    kind: Literal["refusal", "misbehaviour", "silence"]
    code: str
    reason: str
    accused: str = ""
    more: int = 0


@dataclass(frozen=True)
class Continue:
    """Send these messages, hand the replies to `receive`, then call `advance`."""

    outbound: Mapping[str, bytes]


@dataclass(frozen=True)
class EpochReady:
    """Rounds may begin. `absent`: clients of the proposal that are not in the roster. `culprits`, `disputes`: as in
    `Aborted`; rounds can be opened with them all the same."""

    epoch: int
    roster: tuple[str, ...]
    absent: tuple[str, ...]
    transcript: bytes
    faults: tuple[Fault, ...]
    culprits: tuple[str, ...] = ()
    disputes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Aggregate:
    """The sum of `contributors`, decoded (L,) float64 and as it stood in the ring.

    `dropped`: roster members not in the sum. `culprits`: who handed in shares that their dealers never dealt
    (their own uploads are in the sum all the same).
    """

    round: int
    sum: NDArray[np.float64]
    ring_sum: RingVector
    contributors: tuple[str, ...]
    dropped: tuple[str, ...]
    culprits: tuple[str, ...]
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Aborted:
    """Nothing was opened. `round` is 0 for set-up; `culprits` names the parties the abort is due to, where known.

    `disputes`: pairs (accuser, accused) of set-up, no party in two of them. One of the two lies, and nobody can see
    which. Whoever leaves out both, and the culprits, loses at most one honest party per liar.
    """

    phase: str
    round: int
    code: str
    reason: str
    culprits: tuple[str, ...]
    faults: tuple[Fault, ...]
    disputes: tuple[tuple[str, str], ...] = ()


Outcome = Continue | EpochReady | Aggregate | Aborted
