"""A client's state of one epoch and its encoding for the client's own private store.

The encoding holds secrets: it never leaves the client, and it must be on disk BEFORE a reply leaves (persist,
then send), because a client restored from an older state could answer a round a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import cbor
from .errors import BadParameters, CorruptState, ProtocolError
from .keys import COORDINATOR, KEY_BYTES, Directory
from .policy import EpochParameters
from .roster import Roster, open_bundle
from .schedule import ANSWER_KEY, KINDS, MASK_KEY, SEED
from .shamir import LIMBS
from .states import ClientState
from .wire import named_sender

STATE_VERSION = 3
Secrets = NDArray[np.uint8]  # (..., 32), zeroed when used up


def _no_secrets() -> Secrets:
    return np.zeros((0, 0, KEY_BYTES), np.uint8)


def _no_shares() -> NDArray[np.uint32]:
    return np.zeros((0, 0, KINDS, LIMBS), np.uint32)


@dataclass(repr=False)
class ClientEpoch:
    """Secrets and public values of one epoch. Row r - 1 of the arrays belongs to round r."""

    parameters: EpochParameters
    bundle: bytes
    encryption_private: bytes  # emptied once the shares are received
    secrets: Secrets  # (R, KINDS, 32); mask keys are zeroed once the pair seeds are made
    roster: Roster | None = None
    holders: tuple[str, ...] = ()  # who holds this client's shares
    dealers: tuple[str, ...] = ()
    wards: tuple[str, ...] = ()  # whose shares this client holds
    peers: tuple[str, ...] = ()  # with whom it masks
    transcript: bytes = b""
    reply_key: bytes = b""  # authenticates uploads and answers to the coordinator
    pair_seeds: Secrets = field(default_factory=_no_secrets)  # (R, peers, 32)
    held: NDArray[np.uint32] = field(default_factory=_no_shares)  # (R, wards, KINDS, 9)
    context: bytes = b""  # of the open round
    checks: bytes = b""  # of the pair seeds of the open round, 16 bytes per peer
    confirmed: bool = False  # the acknowledgements of the others were seen
    last_round: int = 0
    answers: dict[bytes, bytes] = field(default_factory=dict)  # SHA-256 of a request -> the reply it got

    def wipe_masks(self, to: int) -> None:
        """Zero what masks of rounds 1..to are derived from."""
        self.secrets[:to, [SEED, MASK_KEY]] = 0
        self.pair_seeds[:to] = 0

    def wipe_shares(self, to: int) -> None:
        """Zero what answers of rounds 1..to are made of."""
        self.secrets[:to, ANSWER_KEY] = 0
        self.held[:to] = 0

    def wipe(self) -> None:
        """Zero everything secret."""
        self.encryption_private = self.reply_key = b""
        self.secrets[:] = 0
        self.wipe_masks(self.parameters.rounds)
        self.wipe_shares(self.parameters.rounds)
        self.answers.clear()


def dump(
    client_id: str,
    public: bytes,
    sessions: Mapping[bytes, int],
    state: ClientState,
    epoch: ClientEpoch | None,
) -> bytes:
    """The whole client state; SECRET."""
    return cbor.encode(
        {
            "version": STATE_VERSION,
            "client": client_id,
            "identity": public,
            "sessions": [[session, number] for session, number in sorted(sessions.items())],
            "state": state.value,
            "epoch": _dump_epoch(epoch) if epoch else {},
        }
    )


def _dump_epoch(epoch: ClientEpoch) -> dict[str, Any]:
    p = epoch.parameters
    return {
        "parameters": dump_parameters(p),
        "bundle": epoch.bundle,
        "encryption_private": epoch.encryption_private,
        "secrets": epoch.secrets.tobytes(),
        "roster": [bundle.raw for bundle in epoch.roster.bundles] if epoch.roster else [],
        "holders": list(epoch.holders),
        "dealers": list(epoch.dealers),
        "wards": list(epoch.wards),
        "peers": list(epoch.peers),
        "reply_key": epoch.reply_key,
        "pair_seeds": epoch.pair_seeds.tobytes(),
        "held": epoch.held.astype("<u4").tobytes(),
        "context": epoch.context,
        "checks": epoch.checks,
        "confirmed": int(epoch.confirmed),
        "last_round": epoch.last_round,
        "answers": [[key, reply] for key, reply in epoch.answers.items()],
    }


def load(
    data: bytes, client_id: str, public: bytes, directory: Directory
) -> tuple[dict[bytes, int], ClientState, ClientEpoch | None]:
    """Inverse of `dump`; raises `CorruptState` when the bytes are damaged or belong to another client."""
    try:
        fields = cbor.decode(data)
        if (
            fields["version"] != STATE_VERSION
            or fields["client"] != client_id
            or fields["identity"] != public
        ):
            raise CorruptState(
                f"stored state is not version {STATE_VERSION} of client '{client_id}' with this identity"
            )
        sessions = dict(fields["sessions"])
        epoch = _load_epoch(fields["epoch"], directory) if fields["epoch"] else None
        return sessions, ClientState(fields["state"]), epoch
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, ProtocolError) as error:
        if isinstance(error, CorruptState):
            raise
        raise CorruptState(
            f"stored state of client '{client_id}' cannot be read: {type(error).__name__}"
        ) from None


def _load_epoch(fields: Mapping[str, Any], directory: Directory) -> ClientEpoch:
    parameters = load_parameters(fields["parameters"])
    rounds = parameters.rounds
    roster = load_roster(parameters, fields["roster"], directory)
    dealers, wards, peers = (tuple(fields[name]) for name in ("dealers", "wards", "peers"))
    if dealers and roster is None:
        raise BadParameters("dealers without a roster")
    return ClientEpoch(
        parameters=parameters,
        bundle=fields["bundle"],
        encryption_private=fields["encryption_private"],
        secrets=_secrets(fields["secrets"], (rounds, KINDS, KEY_BYTES)),
        roster=roster,
        holders=tuple(fields["holders"]),
        dealers=dealers,
        wards=wards,
        peers=peers,
        transcript=roster.transcript(dealers) if roster and dealers else b"",
        reply_key=fields["reply_key"],
        pair_seeds=_secrets(fields["pair_seeds"], (rounds if dealers else 0, len(peers), KEY_BYTES)),
        held=np.frombuffer(fields["held"], "<u4")
        .reshape(rounds if dealers else 0, len(wards), KINDS, LIMBS)
        .astype(np.uint32),
        context=fields["context"],
        checks=fields["checks"],
        confirmed=bool(fields["confirmed"]),
        last_round=fields["last_round"],
        answers=dict(fields["answers"]),
    )


def dump_parameters(p: EpochParameters) -> list[Any]:
    return [p.session, p.epoch, list(p.clients), p.threshold, p.coordinator_key, p.rounds, p.ring_bits]


def load_parameters(fields: list[Any]) -> EpochParameters:
    session, number, clients, *others = fields
    return EpochParameters(session, number, tuple(clients), *others)


def load_roster(parameters: EpochParameters, bundles: list[bytes], directory: Directory) -> Roster | None:
    """The roster from stored bundles, verified again; None when there are none yet."""
    if not bundles:
        return None
    return Roster(
        parameters,
        tuple(open_bundle(raw, named_sender(raw, COORDINATOR), parameters, directory) for raw in bundles),
    )


def _secrets(data: bytes, shape: tuple[int, ...]) -> Secrets:
    return np.frombuffer(data, np.uint8).reshape(shape).copy()
