"""The coordinator as a Flower ServerApp, and Flower's grid as the federation it talks to.

A node that fails, stays silent or answers nonsense has dropped out of that exchange; what that means is
decided by the protocol, which was made for dropouts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from appa_secure.errors import RunError
from appa_secure.flower import ASK, NAME, message_type, unwrap, wrap

log = logging.getLogger(__name__)

REPLY_SECONDS = 600.0  # for one exchange: a round of local training on a slow machine
_SHORTEST, _LONGEST = 0.002, 0.25  # seconds between two looks for replies


class GridFederation:
    """Bytes to Flower nodes and back (`coordinator.rounds.Federation`).

    Which node is which client is asked once, when this is made. The answers are not proof of identity and
    need not be: a node that calls itself another client cannot sign for it.
    """

    def __init__(
        self,
        grid: Grid,
        clients: Iterable[str],
        timeout: float = REPLY_SECONDS,
        stopped: threading.Event | None = None,
    ) -> None:
        """clients: the ids in the agreement. timeout: seconds until a client that has not answered counts as
        dropped out, and until nodes that are not there yet are given up at the start. stopped: set when the
        engine has died. Raises RunError if two nodes call themselves the same client."""
        self.clients = tuple(sorted(clients))
        self._grid, self._timeout = grid, timeout
        self._stopped = stopped if stopped is not None else threading.Event()
        self._node_of = self._roll_call()

    def exchange(self, requests: Mapping[str, bytes]) -> dict[str, bytes]:
        """Send each client its request and return the replies that came. RunError if the engine has died."""
        there = {self._node_of[client]: client for client in requests if client in self._node_of}
        replies = self._send({node: requests[client] for node, client in there.items()}, ASK, self._timeout)
        return {there[node]: raw for node, raw in sorted(replies.items(), key=lambda item: there[item[0]])}

    def _roll_call(self) -> dict[str, int]:
        """Node id by client id. Waits until there are as many nodes as clients, at most `timeout` seconds."""
        found: dict[str, int] = {}
        asked: set[int] = set()
        until = time.monotonic() + self._timeout
        while len(asked) < len(self.clients) and time.monotonic() < until:
            new = sorted(set(self._grid.get_node_ids()) - asked)
            asked.update(new)
            answers = self._send(dict.fromkeys(new, b""), NAME, until - time.monotonic())
            for node, raw in sorted(answers.items()):
                client = raw.decode(errors="replace")
                if client not in self.clients:
                    log.warning("node %d belongs to no client of this run (%.80r)", node, client)
                elif client in found:
                    raise RunError(
                        f"two nodes call themselves {client}: give each its own site configuration"
                    )
                else:
                    found[client] = node
            if not new:
                self._pause(_LONGEST)
        return found

    def _send(self, requests: Mapping[int, bytes], action: str, timeout: float) -> dict[int, bytes]:
        """Replies by node id. Flower's `send_and_receive` sleeps 0.1 s (simulation) or 3 s (deployment)."""
        waiting: dict[str, int] = {}
        for node, raw in requests.items():
            # Past its time to live Flower no longer delivers a request, nor a reply to it.
            message = Message(wrap(raw), node, message_type(action), ttl=timeout)
            ids = [i for i in self._grid.push_messages([message]) if i]
            if ids:
                waiting[ids[0]] = node
            else:
                log.warning("node %d: Flower did not take the request", node)
        replies: dict[int, bytes] = {}
        until, pause = time.monotonic() + timeout, _SHORTEST
        while waiting and time.monotonic() < until:
            for message in self._grid.pull_messages(list(waiting)):
                node = waiting.pop(message.metadata.reply_to_message_id, -1)
                if node == -1:
                    continue
                try:
                    replies[node] = unwrap(message)
                except ValueError as error:
                    log.warning("node %d dropped out: %s", node, error)
                pause = _SHORTEST
            if waiting:
                self._pause(pause)
                pause = min(2 * pause, _LONGEST)
        for node in waiting.values():
            log.warning("node %d dropped out: no answer within %.0f s", node, timeout)
        return replies

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise RunError("Flower's engine has stopped: see its messages above; resume the run")


@dataclass(frozen=True)
class Job:
    """What a ServerApp is to do: `work` with a federation of `clients`."""

    clients: tuple[str, ...]
    work: Callable[[GridFederation], object]
    timeout: float = REPLY_SECONDS
    stopped: threading.Event = field(default_factory=threading.Event)


def server_app(plan: Callable[[Context], Job]) -> ServerApp:
    """The coordinator's app. `plan` gets the context (the run's configuration) and says what to do."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        job = plan(context)
        job.work(GridFederation(grid, job.clients, job.timeout, job.stopped))

    return app
