"""How this project's bytes travel in Flower messages: one record with one field, and nothing beside it.

Flower carries; it is not trusted. Who said what, to whom and in which round is settled by the signed messages
inside (`appa_secure.messages`, `appa_secure.secagg`). Metrics, example counts and node states, which Flower
apps usually send along, would tell the coordinator about one client, so there is no place for them here.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, Message, MessageType, RecordDict

ASK = "ask"  # a request of the coordinator; answered by the client's reply
NAME = "name"  # "whose node are you?"; answered by the client's id, which the agreement publishes anyway
_RECORD, _FIELD = "appa-secure", "bytes"


def message_type(action: str) -> str:
    """Flower's name of `action` (ASK or NAME)."""
    return f"{MessageType.QUERY}.{action}"


def wrap(raw: bytes) -> RecordDict:
    """The content of a message that carries `raw`."""
    return RecordDict({_RECORD: ConfigRecord({_FIELD: raw})})


def unwrap(message: Message) -> bytes:
    """What `message` carries. Raises ValueError for an error message and for content of any other shape."""
    if message.has_error():
        raise ValueError(f"error {message.error.code}: {message.error.reason}")
    record = message.content.get(_RECORD) if len(message.content) == 1 else None
    raw = record.get(_FIELD) if isinstance(record, ConfigRecord) and len(record) == 1 else None
    if not isinstance(raw, bytes):
        raise ValueError(f"the message must hold one record {_RECORD!r} with one field {_FIELD!r} of bytes")
    return raw
