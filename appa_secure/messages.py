"""Messages between the coordinator and a client, around the secure-aggregation messages they carry.

A message is the canonical CBOR map {version, kind, body}. Every kind has a fixed set of fields (`REQUESTS`, `REPLIES`);
anything else is refused and names the sender. This table is the complete list of what crosses the trust boundary:

kind     request                                   reply
setup    run id, digest of the public agreement    - (refuses when the client's own agreement differs)
context  -                                         ledger row; the private context itself stays at the client
secagg   one message of a key set-up or unmasking  the client's signed message
train    predictor parameters, round request       masked update, ledger row
freeze   final predictor                           -
score    rollouts, round request (`paper`: and Z)  masked reward vector (in clear mode: coded, not masked), ledger row of
                                                   its output noise, if any
policy   warmed-up policy and its tokenizer         -
tune     model parameters, rollouts, round request  masked update of a policy or reward model, and scalars beside it
truth    parameters to predict with, or none       true and predicted distributions; only where a site set evaluation.truth
weight   step                                      the weight used in it; only where a site set evaluation.truth
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from appa_secure.errors import AppaError
from appa_secure.secagg import cbor
from appa_secure.secagg.errors import BadEncoding

VERSION = 1

# Field forms: text, uint, bytes, [text], [uint]
REQUESTS: dict[str, dict[str, str]] = {
    "setup": {"run": "text", "agreement": "bytes"},
    "context": {},
    "secagg": {"session": "text", "message": "bytes"},
    "train": {"session": "text", "message": "bytes", "round": "uint", "parameters": "bytes"},
    "freeze": {"parameters": "bytes"},
    "score": {
        "session": "text", "message": "bytes", "step": "uint", "opened": "uint", "z": "bytes",
        "questions": "[text]", "answers": "[text]",
    },
    "policy": {"config": "text", "tokenizer": "text", "pad": "text", "end": "text", "weights": "bytes"},
    "tune": {
        "session": "text", "message": "bytes", "step": "uint", "opened": "uint", "parameters": "bytes",
        "questions": "[text]", "answers": "[text]",
    },
    "truth": {"parameters": "bytes"},
    "weight": {"step": "uint"},
}  # fmt: skip
REPLIES: dict[str, dict[str, str]] = {
    "setup": {},
    "context": {"ledger": "bytes"},
    "secagg": {"message": "bytes"},
    "train": {"message": "bytes", "ledger": "bytes"},
    "freeze": {},
    "score": {"message": "bytes", "ledger": "bytes"},
    "policy": {},
    "tune": {"message": "bytes"},
    "truth": {"distributions": "bytes", "predictions": "bytes"},
    "weight": {"weight": "bytes"},
    "refusal": {"code": "text", "reason": "text"},
}


class Refused(AppaError):
    """A client refused a request; `client`, `code` and `reason` say who and why."""

    def __init__(self, client: str, code: str, reason: str) -> None:
        super().__init__(f"client {client!r} refused: {reason} ({code})")
        self.client, self.code, self.reason = client, code, reason


@dataclass(frozen=True)
class Message:
    """A decoded message; `body` has exactly the fields of its kind."""

    kind: str
    body: Mapping[str, Any]


def pack(table: Mapping[str, Mapping[str, str]], kind: str, **body: Any) -> bytes:
    """Encode a message of `table` (REQUESTS or REPLIES). Raises BadEncoding for a body that does not fit its kind."""
    _check("this side", table, kind, body)
    return cbor.encode({"version": VERSION, "kind": kind, "body": body})


def unpack(table: Mapping[str, Mapping[str, str]], raw: bytes, sender: str) -> Message:
    """Decode strictly; raises BadEncoding naming `sender` for anything but a message of `table`."""
    try:
        fields = cbor.decode(raw)
    except cbor.NotCanonical as error:
        raise BadEncoding(sender, f"message: {error}") from None
    if not isinstance(fields, dict) or set(fields) != {"version", "kind", "body"}:
        raise BadEncoding(sender, "message is not {version, kind, body}")
    if fields["version"] != VERSION:
        raise BadEncoding(sender, f"message version {fields['version']!r:.40}, this side speaks {VERSION}")
    if not isinstance(fields["kind"], str) or not isinstance(fields["body"], dict):
        raise BadEncoding(sender, "message kind is not text, or its body is not a map")
    _check(sender, table, fields["kind"], fields["body"])
    return Message(fields["kind"], fields["body"])


def _check(sender: str, table: Mapping[str, Mapping[str, str]], kind: str, body: Mapping[str, Any]) -> None:
    forms = table.get(kind)
    if forms is None:
        raise BadEncoding(sender, f"unknown message kind {kind!r:.40}")
    if set(body) != set(forms):
        raise BadEncoding(sender, f"{kind}: fields {sorted(body)} are not {sorted(forms)}")
    for name, form in forms.items():
        if not _fits(body[name], form):
            raise BadEncoding(sender, f"{kind}.{name} is not of the form {form}")


_KINDS: dict[str, type] = {"text": str, "bytes": bytes, "uint": int}


def _fits(value: Any, form: str) -> bool:
    if not form.startswith("["):
        return _is(type(value), _KINDS[form])
    if not isinstance(value, list):
        return False
    item = form[1:-1]
    if item in _KINDS:  # a step sends thousands of texts: each type that occurs is looked at once
        return all(_is(kind, _KINDS[item]) for kind in set(map(type, value)))
    return all(_fits(part, item) for part in value)


def _is(found: type, kind: type) -> bool:
    return issubclass(found, kind) and found is not bool


def digest(kind: str, body: Mapping[str, Any]) -> bytes:
    """The 32-byte context a masked upload is bound to: everything the upload was computed from, except the round request."""
    return hashlib.sha256(cbor.encode([kind, {k: v for k, v in body.items() if k != "message"}])).digest()


def pack_float(value: float | None) -> bytes:
    """A float64 as 8 bytes, None as no bytes."""
    return b"" if value is None else struct.pack("<d", value)


def unpack_float(raw: bytes, sender: str, name: str) -> float | None:
    """Inverse of `pack_float`; raises BadEncoding for another length or a value that is not finite."""
    if not raw:
        return None
    if len(raw) != 8 or not np.isfinite(value := struct.unpack("<d", raw)[0]):
        raise BadEncoding(sender, f"{name} is not one finite float64")
    return float(value)


def unpack_vector(raw: bytes, sender: str, name: str, size: int) -> np.ndarray:
    """A float32 vector (size,) from little-endian bytes; raises BadEncoding for another length or NaN."""
    if len(raw) != 4 * size:
        raise BadEncoding(sender, f"{name} has {len(raw)} bytes, {4 * size} are due")
    vector = np.frombuffer(raw, dtype="<f4").copy()
    if not np.isfinite(vector).all():
        raise BadEncoding(sender, f"{name} holds values that are not finite")
    return vector


def unpack_rows(raw: bytes, sender: str, name: str) -> list[dict[str, Any]]:
    """A list of JSON objects, as ledger rows travel; raises BadEncoding for anything else."""
    try:
        rows = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadEncoding(sender, f"{name} is not JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadEncoding(sender, f"{name} is not a list of objects")
    return rows


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")
