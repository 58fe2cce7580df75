"""The transition tables: everything that moves a machine stands here.

A (state, event) pair that is not listed is illegal: it raises and changes nothing. Machines validate first,
compute, and move last, so an exception leaves them where they were.
"""

from __future__ import annotations

from enum import Enum

from .errors import IllegalEvent, OutOfOrder
from .keys import COORDINATOR


class ClientState(Enum):
    IDLE = "idle"
    BUNDLED = "bundled"  # own keys made, bundle sent
    DEALT = "dealt"  # own shares sent
    READY = "ready"  # shares of the others held, no round open
    UPLOADED = "uploaded"  # masked vector sent, round not yet opened


class CoordinatorState(Enum):
    IDLE = "idle"
    BUNDLES = "bundles"  # waiting for bundles
    SHARES = "shares"  # waiting for dealt shares
    ACKS = "acks"  # waiting for acknowledgements
    READY = "ready"
    UPLOADS = "uploads"  # waiting for masked vectors
    ANSWERS = "answers"  # waiting for unmasking shares


_C, _K = ClientState, CoordinatorState

CLIENT_TABLE: dict[tuple[ClientState, str], ClientState] = {
    # A new epoch may begin at any time; it destroys what is left of the old one.
    **{(state, "propose"): _C.BUNDLED for state in ClientState},
    (_C.BUNDLED, "roster"): _C.DEALT,
    (_C.DEALT, "start"): _C.READY,
    (_C.READY, "round"): _C.UPLOADED,
    (_C.UPLOADED, "round"): _C.UPLOADED,  # the coordinator gave the last round up; it can never be opened now
    (_C.UPLOADED, "unmask"): _C.READY,
    **{(state, "close"): _C.IDLE for state in ClientState if state is not _C.IDLE},
}

COORDINATOR_TABLE: dict[tuple[CoordinatorState, str], CoordinatorState] = {
    (_K.IDLE, "propose"): _K.BUNDLES,
    (_K.BUNDLES, "roster"): _K.SHARES,
    (_K.SHARES, "start"): _K.ACKS,
    (_K.ACKS, "ready"): _K.READY,
    (_K.READY, "round"): _K.UPLOADS,
    (_K.UPLOADS, "unmask"): _K.ANSWERS,
    (_K.ANSWERS, "finish"): _K.READY,
    **{(state, "abort"): _K.IDLE for state in (_K.BUNDLES, _K.SHARES, _K.ACKS)},
    **{(state, "abort"): _K.READY for state in (_K.UPLOADS, _K.ANSWERS)},
    **{(state, "close"): _K.IDLE for state in CoordinatorState if state is not _K.IDLE},
}


def client_next(state: ClientState, event: str) -> ClientState:
    """The state after a coordinator's message; raises `OutOfOrder` naming the coordinator when there is
    none.
    """
    if (state, event) not in CLIENT_TABLE:
        raise OutOfOrder(COORDINATOR, f"'{event}' is not allowed in client state '{state.value}'")
    return CLIENT_TABLE[state, event]


def coordinator_next(state: CoordinatorState, event: str) -> CoordinatorState:
    """The state after a local step; raises `IllegalEvent` when there is none."""
    if (state, event) not in COORDINATOR_TABLE:
        raise IllegalEvent(f"'{event}' is not allowed in coordinator state '{state.value}'")
    return COORDINATOR_TABLE[state, event]
