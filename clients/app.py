"""A client as a Flower ClientApp: request bytes in, reply bytes out.

How a node finds its own client (data, keys, store) is the site's business: whoever makes the app passes a
function for it. A failure inside a client leaves it only as the name of the error, because messages of errors
may quote private data.
"""

from __future__ import annotations

import fcntl
import logging
import os
import traceback
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from appa_secure.flower import ASK, NAME, unwrap, wrap
from clients.client import Client

log = logging.getLogger(__name__)


class Resident:
    """One client where several processes of a machine take turns answering for it, as Flower's workers do.

    A lock file lets one request at a time through. It also holds a mark of the process that came last:
    whoever finds another's mark has state that may be old and builds the client again from its store. So does
    the process itself after a request that failed, because memory may then be ahead of the store.
    """

    def __init__(self, client_id: str, lock: Path, build: Callable[[], Client]) -> None:
        """lock: a file of this client alone, where only the site can write; made when missing."""
        self.client_id, self._lock, self._build = client_id, lock, build
        self._client: Client | None = None
        self._mark = b""

    def handle(self, raw: bytes) -> bytes:
        """`Client.handle`, after waiting for requests to the same client in other processes."""
        self._lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._lock.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed, also by a killed process
            file.seek(0)
            fresh = file.read() == self._mark
            client = self._client if fresh and self._client is not None else self._build()
            self._client, self._mark = None, os.urandom(16)
            file.truncate(0)
            file.write(self._mark)
            file.flush()
            reply = client.handle(raw)
            self._client = client
            return reply


Find = Callable[[Context], Resident]


def client_app(find: Find) -> ClientApp:
    """The app of a node. `find` gets the node's context (its site configuration, the run's configuration)."""
    app = ClientApp()
    app.query(ASK)(_Handler(find, _ask))
    app.query(NAME)(_Handler(find, _name))
    return app


def _ask(client: Resident, raw: bytes) -> bytes:
    return client.handle(raw)


def _name(client: Resident, raw: bytes) -> bytes:
    return client.client_id.encode()


class _Handler:
    # A class and not a closure: Ray sends the app along with each message, and copies closures by value.

    def __init__(self, find: Find, answer: Callable[[Resident, bytes], bytes]) -> None:
        self._find, self._answer = find, answer

    def __call__(self, message: Message, context: Context) -> Message:
        try:
            return Message(wrap(self._answer(self._find(context), unwrap(message))), reply_to=message)
        except Exception as error:  # of any kind: a failure must neither speak nor stop the round
            name = type(error).__name__
            # Where it happened, without the message and the values.
            log.error("no answer: %s\n%s", name, "".join(traceback.format_tb(error.__traceback__)))
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, name), reply_to=message)
