"""Messages on the wire.

A message is the canonical CBOR array [payload, proof]. The payload is the canonical CBOR map {version, type,
session, epoch, round, sender, body}. Bodies have a fixed set of fields per type (`BODIES`). The proof says who wrote
the payload, every field of it:

- of what other clients read, or what must be shown to others later (set-up, refusals): Ed25519 over
  bind("message", SHA-256(payload));
- of uploads and answers, which only the coordinator reads, and which are on the path of every round: HMAC-SHA256
  under a key that this client and the coordinator agreed on in the set-up. It covers the request that is answered and
  the round's context too (`reply_mac`);
- of the coordinator's messages: nothing. The coordinator is not trusted, a client acts on nothing in them that it has
  not checked against signed client messages or its own policy, so whoever forges one is no stronger than a dishonest
  coordinator.

Confidentiality towards the network is the transport's (TLS).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from . import cbor
from .errors import BadEncoding, BadMac, BadParameters, BadSignature, UnknownParty, WrongEpoch
from .keys import COORDINATOR, VERSION, Directory, IdentityKey, bind

SIGNATURE_BYTES = 64
MAC_BYTES = 32
MAX_SESSION_BYTES = 64

PROPOSE, BUNDLE = "propose", "bundle"
ROSTER, SHARES, PACKET = "roster", "shares", "packet"
START, READY, ACK = "start", "ready", "ack"
ROUND, UPLOAD = "round", "upload"
UNMASK, ANSWER = "unmask", "answer"
CLOSE, REFUSAL = "close", "refusal"
WITH_MAC = frozenset({UPLOAD, ANSWER})

# Field forms: uint, text, bytes (any length), bytes:N (exactly N), [text], [bytes]
BODIES: dict[str, dict[str, str]] = {
    PROPOSE: {
        "clients": "[text]",
        "threshold": "uint",
        "rounds": "uint",
        "ring_bits": "uint",
        "coordinator_key": "bytes:32",
    },
    BUNDLE: {
        "proposal": "bytes:32",
        "encryption_key": "bytes:32",
        "mask_keys": "bytes",
        "commitments": "bytes",
    },
    ROSTER: {"bundles": "[bytes]"},
    SHARES: {"roster": "bytes:32", "packets": "[bytes]"},
    PACKET: {
        "to": "text",
        "roster": "bytes:32",
        "nonce": "bytes:12",
        "ciphertext": "bytes",
        "digests": "bytes",
    },
    START: {"dealers": "[text]", "packets": "[bytes]"},
    READY: {"ack": "bytes", "table": "bytes"},
    ACK: {"transcript": "bytes:32"},
    ROUND: {"coding": "bytes:32", "context": "bytes:32", "acks": "[bytes]"},
    UPLOAD: {"coding": "bytes:32", "context": "bytes:32", "vector": "bytes"},
    UNMASK: {"survivors": "[text]", "dropped": "[text]"},
    ANSWER: {"shares": "bytes", "checks": "bytes", "seeds": "bytes"},
    CLOSE: {},
    REFUSAL: {"refused": "text", "code": "text", "reason": "text", "accused": "text"},
}

_ENVELOPE = {
    "version": "uint", "type": "text", "session": "bytes", "epoch": "uint", "round": "uint", "sender": "text",
}  # fmt: skip


@dataclass(frozen=True)
class Envelope:
    """A structurally valid message. Its proof has NOT been checked unless `verify` or `verify_reply` was called on it."""

    type: str
    session: bytes
    epoch: int
    round: int
    sender: str
    body: Mapping[str, Any]
    payload: bytes
    proof: bytes
    raw: bytes


def seal(
    type_: str,
    session: bytes,
    epoch: int,
    round_id: int,
    sender: str,
    body: Mapping[str, Any],
    identity: IdentityKey | None,
) -> bytes:
    """The message as bytes; signed when `identity` is given (clients), without a proof otherwise (coordinator)."""
    payload = _payload(type_, session, epoch, round_id, sender, body)
    return cbor.encode([payload, identity.sign(_signed(payload)) if identity else b""])


def seal_reply(
    type_: str, sender: str, body: Mapping[str, Any], request: Envelope, context: bytes, key: bytes
) -> bytes:
    """An upload or answer to `request` in a round of `context`, authenticated under the client's reply key."""
    payload = _payload(type_, request.session, request.epoch, request.round, sender, body)
    return cbor.encode([payload, reply_mac(key, payload, request.raw, context)])


def reply_mac(key: bytes, payload: bytes, request: bytes, context: bytes) -> bytes:
    """HMAC-SHA256 (RFC 2104) of a reply, of the very request it answers, and of the round's context. So a request that
    was changed on its way costs the reply, and nobody is blamed for an answer to a question that was not asked."""
    return hmac.digest(key, bind("reply", _sha256(payload), request_digest(request), context), "sha256")


@lru_cache(maxsize=4)  # the same request goes to all clients
def request_digest(message: bytes) -> bytes:
    """Names a request: in a client's memory of its replies, and in their authentication."""
    return _sha256(message)


def parse(raw: bytes, sender: str) -> Envelope:
    """Decode a message that arrived from `sender`; raises `BadEncoding` naming it for anything but the
    canonical form.
    """
    try:
        outer = cbor.decode(raw)
        if not (
            isinstance(outer, list) and len(outer) == 2 and all(isinstance(part, bytes) for part in outer)
        ):
            raise BadEncoding(sender, "message is not [payload, proof]")
        payload, proof = outer
        fields = cbor.decode(payload)
    except cbor.NotCanonical as error:
        raise BadEncoding(sender, f"message: {error}") from None
    if not isinstance(fields, dict):
        raise BadEncoding(sender, "payload is not a map")
    if fields.get("version") != VERSION:
        raise BadEncoding(
            sender, f"protocol version {fields.get('version')!r:.40}, this side speaks {VERSION}"
        )
    body = fields.pop("body", None)
    _check_fields(sender, "envelope", fields, _ENVELOPE)
    forms = BODIES.get(fields["type"])
    if forms is None:
        raise BadEncoding(sender, f"unknown message type {fields['type']!r:.40}")
    if not isinstance(body, dict):
        raise BadEncoding(sender, f"{fields['type']}: body is missing or not a map")
    _check_fields(sender, fields["type"], body, forms)
    if fields["sender"] != sender:
        raise BadEncoding(sender, f"message names {fields['sender']!r:.80} as its sender")
    if not 0 < len(fields["session"]) <= MAX_SESSION_BYTES:
        raise BadEncoding(
            sender, f"session has {len(fields['session'])} bytes, allowed 1..{MAX_SESSION_BYTES}"
        )
    due = 0 if sender == COORDINATOR else MAC_BYTES if fields["type"] in WITH_MAC else SIGNATURE_BYTES
    if len(proof) != due:
        raise BadEncoding(sender, f"proof of a {fields['type']} message has {len(proof)} bytes, needs {due}")
    return Envelope(
        fields["type"],
        fields["session"],
        fields["epoch"],
        fields["round"],
        sender,
        body,
        payload,
        proof,
        raw,
    )


def verify(envelope: Envelope, directory: Directory) -> None:
    """Raise unless the envelope's sender is in the directory and signed it."""
    if envelope.sender not in directory:
        raise UnknownParty(envelope.sender, "not in the provisioned directory")
    if not directory.verifies(envelope.sender, _signed(envelope.payload), envelope.proof):
        raise BadSignature(envelope.sender, f"signature on its {envelope.type} message does not verify")


def verify_reply(envelope: Envelope, key: bytes, request: bytes, context: bytes) -> None:
    """Raise unless the holder of `key` wrote this in answer to `request`, in a round of `context`."""
    if not hmac.compare_digest(reply_mac(key, envelope.payload, request, context), envelope.proof):
        raise BadMac(envelope.sender, f"its {envelope.type} is not authentic, or answers another request")


def expect(envelope: Envelope, type_: str, session: bytes, epoch: int, round_id: int = 0) -> None:
    """Raise unless the envelope is of this type, session, epoch and round."""
    if envelope.type != type_:
        raise BadEncoding(envelope.sender, f"sent a {envelope.type} message where {type_} was due")
    if (envelope.session, envelope.epoch) != (session, epoch):
        raise WrongEpoch(
            envelope.sender, f"{type_} for another session or epoch {envelope.epoch}, current is {epoch}"
        )
    if envelope.round != round_id:
        raise WrongEpoch(envelope.sender, f"{type_} for round {envelope.round}, due is {round_id}")


@lru_cache(maxsize=2)  # dispatching and handling look at the same message
def peek(raw: bytes) -> Envelope:
    """A coordinator message: structure checked, nothing believed."""
    return parse(raw, COORDINATOR)


def named_sender(raw: bytes, carrier: str) -> str:
    """The sender named inside a relayed message, to be confirmed by `parse` and `verify`; errors blame the
    carrier.
    """
    try:
        outer = cbor.decode(raw)
        fields = (
            cbor.decode(outer[0])
            if isinstance(outer, list) and outer and isinstance(outer[0], bytes)
            else None
        )
    except cbor.NotCanonical as error:
        raise BadEncoding(carrier, f"relayed message: {error}") from None
    sender = fields.get("sender") if isinstance(fields, dict) else None
    if not isinstance(sender, str):
        raise BadEncoding(carrier, "relayed message names no sender")
    return sender


def check_session(session: bytes) -> None:
    """Session ids: 1..64 bytes."""
    if not 0 < len(session) <= MAX_SESSION_BYTES:
        raise BadParameters(f"session id has {len(session)} bytes, allowed 1..{MAX_SESSION_BYTES}")


def _payload(
    type_: str, session: bytes, epoch: int, round_id: int, sender: str, body: Mapping[str, Any]
) -> bytes:
    return cbor.encode(
        {
            "version": VERSION,
            "type": type_,
            "session": session,
            "epoch": epoch,
            "round": round_id,
            "sender": sender,
            "body": body,
        }
    )


def _signed(payload: bytes) -> bytes:
    return bind("message", _sha256(payload))


def _sha256(message: bytes) -> bytes:
    return hashlib.sha256(message).digest()


def _check_fields(sender: str, where: str, fields: Mapping[str, Any], forms: Mapping[str, str]) -> None:
    if fields.keys() != forms.keys():
        unknown, missing = sorted(fields.keys() - forms.keys()), sorted(forms.keys() - fields.keys())
        raise BadEncoding(sender, f"{where}: unknown fields {unknown!r:.80}, missing fields {missing}")
    for name, form in forms.items():
        if not _has_form(fields[name], form):
            raise BadEncoding(sender, f"{where}: field '{name}' is not {form}")


def _has_form(value: Any, form: str) -> bool:
    if form == "uint":
        return isinstance(value, int)
    if form == "text":
        return isinstance(value, str)
    if form.startswith("bytes"):
        return isinstance(value, bytes) and (form == "bytes" or len(value) == int(form[6:]))
    kind = str if form == "[text]" else bytes
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
