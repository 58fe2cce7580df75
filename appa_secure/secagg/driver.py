"""Drives the machines over any transport: in process, Flower's engine, or a deployment.

A transport is `exchange(outbound) -> replies`: bytes by client id, in both directions; a client missing from
the replies dropped out. Client side, `respond` turns one incoming message into one reply, refusals included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from .client import ClientMachine, PayForNoise
from .coordinator import CoordinatorMachine
from .errors import OutOfOrder, ProtocolError, RemoteMisbehaviour
from .fixedpoint import Layout
from .keys import COORDINATOR
from .outcomes import Aborted, Aggregate, Continue, EpochReady, Outcome
from .wire import CLOSE, PROPOSE, ROSTER, ROUND, START, UNMASK, peek

Exchange = Callable[[Mapping[str, bytes]], Mapping[str, bytes]]
Handler = Callable[[bytes], bytes | None]
Contribution = tuple[NDArray[np.float64], Layout, bytes]
"""What a client puts into a round: its vector, the layout it encodes with, and the 32-byte context it
computed it from.
"""

Contribute = Callable[[int, int, bytes], Contribution]
"""Called with (epoch, round, context digest the coordinator claims); may raise a `ProtocolError` to refuse
the round.
"""


def in_process(clients: Mapping[str, Handler]) -> Exchange:
    """A transport to handlers in this process. A handler that returns None has dropped out."""

    def exchange(outbound: Mapping[str, bytes]) -> dict[str, bytes]:
        replies = {}
        for name, message in outbound.items():
            reply = clients[name](message)
            if reply is not None:
                replies[name] = reply
        return replies

    return exchange


def respond(
    machine: ClientMachine,
    message: bytes,
    contribute: Contribute | None = None,
    noise: PayForNoise | None = None,
) -> bytes | None:
    """The client's reply to one coordinator message: a protocol reply, a signed refusal with its reason, or
    None for a notice that takes no reply. `contribute` supplies the vector when a round is asked for, `noise` pays for
    its output noise where its layout has some."""
    try:
        request = peek(message)
        if request.type == ROUND and contribute is not None:
            vector, layout, context = contribute(request.epoch, request.round, request.body["context"])
            return machine.upload(message, vector, layout=layout, context=context, noise=noise)
        if request.type == CLOSE:
            machine.close(message)
            return None
        steps = {
            PROPOSE: machine.open_epoch,
            ROSTER: machine.deal_shares,
            START: machine.start_epoch,
            UNMASK: machine.unmask,
        }
        if request.type not in steps:
            raise OutOfOrder(COORDINATOR, f"no '{request.type}' message is due")
        return steps[request.type](message)
    except ProtocolError as error:
        return machine.refuse(message, error)


def run_epoch_setup(coordinator: CoordinatorMachine, exchange: Exchange, epoch: int) -> EpochReady | Aborted:
    """Set epoch number `epoch` up: three exchanges."""
    outcome = resume(coordinator, exchange, coordinator.propose(epoch))
    assert isinstance(outcome, EpochReady | Aborted)
    return outcome


def run_round(
    coordinator: CoordinatorMachine, exchange: Exchange, round_id: int, context: bytes, layout: Layout
) -> Aggregate | Aborted:
    """One secure sum: two exchanges."""
    outcome = resume(coordinator, exchange, coordinator.begin_round(round_id, context, layout))
    assert isinstance(outcome, Aggregate | Aborted)
    return outcome


def resume(coordinator: CoordinatorMachine, exchange: Exchange, step: Continue | None = None) -> Outcome:
    """Run phases to the next final outcome, from `step` or, after a restore, from what is still
    unanswered.
    """
    outcome: Outcome = step or coordinator.pending()
    while isinstance(outcome, Continue):
        for sender, reply in exchange(outcome.outbound).items():
            try:
                coordinator.receive(sender, reply)
            except RemoteMisbehaviour:
                continue  # recorded by the machine, reported in the outcome's faults
        outcome = coordinator.advance()
    return outcome


def close_epoch(coordinator: CoordinatorMachine, exchange: Exchange) -> None:
    """End the epoch on all sides."""
    exchange(coordinator.close_epoch())
