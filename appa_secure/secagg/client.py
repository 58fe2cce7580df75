"""The client's machine: coordinator messages in, authentic replies out.

What it guarantees, whatever the coordinator does (see the package docstring for the argument):

- it masks only with parties of its own directory whose keys are signed for this very proposal, never below
  its minimum cohort or threshold;
- every upload carries its self-mask and one mask per other dealer, each derived from the transcript, round,
  coding and context this client saw itself;
- for each round it releases shares once, for one partition of the roster into survivors and dropped, so never
  both kinds for one party; and only for a partition its release policy opens;
- every upload and answer is authenticated to the coordinator of this proposal, for the very request it answers;
- a round is answered once: a later identical request gets the identical bytes, any other is refused, after a
  restart too;
- a rejected message changes nothing.

Every method takes one coordinator message and returns one reply; both are bytes. They raise
`RemoteMisbehaviour` (blame the named sender) or `LocalMisuse` (blame the caller). Persist `export_state()`
before a reply leaves.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from numpy.typing import NDArray

from . import dealing, shamir
from .client_checks import (
    check_acks,
    check_partition,
    check_roster,
    check_round,
    check_start,
)
from .client_store import ClientEpoch, dump, load
from .errors import (
    BadParameters,
    ContextMismatch,
    LayoutMismatch,
    OutOfOrder,
    ProtocolError,
    RemoteMisbehaviour,
    ReplayedRound,
    WrongEpoch,
)
from .fixedpoint import Layout
from .graph import choose_holders
from .keys import COORDINATOR, KEY_BYTES, Directory, IdentityKey, Rng
from .masks import apply_masks, mask_key
from .policy import ClientPolicy
from .roster import Roster
from .schedule import (
    ANSWER_KEY,
    CHECK_BYTES,
    MASK_KEY,
    SEED,
    answer_key,
    noise_key,
    pair_check,
    reply_key,
    self_seed,
    split,
)
from .states import ClientState, client_next
from .wire import (
    ACK,
    ANSWER,
    BUNDLE,
    CLOSE,
    PROPOSE,
    READY,
    REFUSAL,
    ROSTER,
    ROUND,
    SHARES,
    START,
    UNMASK,
    UPLOAD,
    Envelope,
    expect,
    peek,
    request_digest,
    seal,
    seal_reply,
)  # fmt: skip

PayForNoise = Callable[[], bytes]
"""Pays for one noisy release, durably, and returns the 32-byte secret its noise is derived from; raises to refuse."""


class ClientMachine:
    """One client. See the module docstring; states and events are in `states.CLIENT_TABLE`."""

    def __init__(
        self,
        client_id: str,
        identity: IdentityKey,
        directory: Directory,
        policy: ClientPolicy,
        rng: Rng = os.urandom,
    ) -> None:
        _check_listed(client_id, identity, directory)
        self.client_id = client_id
        self.state = ClientState.IDLE
        self._identity = identity
        self._directory = directory
        self._policy = policy
        self._rng = rng
        self._sessions: dict[bytes, int] = {}  # session -> last epoch taken part in
        self._epoch: ClientEpoch | None = None

    # -- set-up

    def open_epoch(self, message: bytes) -> bytes:
        """Proposal in, signed bundle of fresh public keys and commitments out. Destroys an older epoch."""
        envelope = peek(message)
        if reply := self._replay(message):
            return reply
        if envelope.type != PROPOSE or envelope.round != 0:
            raise OutOfOrder(COORDINATOR, f"sent '{envelope.type}' where '{PROPOSE}' was due")
        state = client_next(self.state, PROPOSE)
        if envelope.epoch <= self._sessions.get(envelope.session, 0):
            raise ReplayedRound(COORDINATOR, f"epoch {envelope.epoch} of this session was opened before")
        parameters = self._policy.accept(envelope, self.client_id, self._directory)

        encryption_private = self._rng(KEY_BYTES)
        secrets = dealing.make_secrets(parameters.rounds, self._rng)
        body = dealing.bundle_body(parameters, self.client_id, encryption_private, secrets)
        bundle = self._seal(BUNDLE, envelope, body)
        self.close_epoch()
        self._epoch = ClientEpoch(parameters, bundle, encryption_private, secrets)
        self._epoch.answers[request_digest(message)] = bundle
        self._sessions[parameters.session] = parameters.epoch
        self.state = state
        return bundle

    def deal_shares(self, message: bytes) -> bytes:
        """Roster of bundles in; out: for each of this client's holders an encrypted packet with its shares of
        the client's secrets of all rounds. On a sparse graph the client draws its holders here."""
        envelope = peek(message)
        if reply := self._replay(message):
            return reply
        epoch = self._current(envelope, ROSTER)
        state = client_next(self.state, ROSTER)
        roster = check_roster(envelope, epoch, self.client_id, self._directory, self._policy)
        degree = epoch.parameters.sharing.degree
        holders = choose_holders(roster.names, self.client_id, degree, self._rng)
        packets = dealing.deal(epoch, roster, self.client_id, holders, self._identity, self._rng)
        reply = self._seal(SHARES, envelope, {"roster": roster.digest(), "packets": packets})
        epoch.roster, epoch.holders = roster, holders
        epoch.answers = {request_digest(message): reply}
        self.state = state
        return reply

    def start_epoch(self, message: bytes) -> bytes:
        """Final roster and the packets for this client in; out: signed acknowledgement of the transcript, and
        the client's pair seeds sealed under its own mask keys.

        Does all key agreement of the epoch, that with the coordinator included, after which the private keys are gone
        from this client's state.
        """
        envelope = peek(message)
        if reply := self._replay(message):
            return reply
        epoch = self._current(envelope, START)
        state = client_next(self.state, START)
        roster = _roster(epoch)
        dealers, packets = check_start(envelope, epoch, roster, self.client_id, self._directory, self._policy)
        private = X25519PrivateKey.from_private_bytes(epoch.encryption_private)
        held = np.stack(
            [dealing.open_packet(packet, self.client_id, epoch, roster, private) for packet in packets],
            axis=1,
        )  # (R, wards, KINDS, 9)
        wards = tuple(packet.sender for packet in packets)
        peers = dealing.peers_of(self.client_id, epoch.holders, wards, dealers)
        transcript = roster.transcript(dealers)
        pair_seeds = dealing.make_pair_seeds(epoch, roster, transcript, self.client_id, peers)
        table = dealing.seal_pair_seeds(epoch, transcript, self.client_id, pair_seeds)
        shared = dealing.agree_with(private, epoch.parameters.coordinator_key, COORDINATOR)
        ack = self._seal(ACK, envelope, {"transcript": transcript})
        reply = self._seal(READY, envelope, {"ack": ack, "table": table})
        epoch.dealers, epoch.wards, epoch.peers, epoch.transcript = dealers, wards, tuple(peers), transcript
        epoch.held, epoch.pair_seeds = held, pair_seeds
        epoch.reply_key = reply_key(shared, transcript, epoch.parameters, self.client_id)
        epoch.secrets[:, MASK_KEY] = 0
        epoch.encryption_private = b""
        epoch.answers = {request_digest(message): reply}
        self.state = state
        return reply

    # -- rounds

    def upload(
        self,
        message: bytes,
        vector: NDArray[np.float64],
        *,
        layout: Layout,
        context: bytes,
        noise: PayForNoise | None = None,
    ) -> bytes:
        """Round request in, masked vector out.

        `vector` is (layout.size,) float64. `layout` and `context` (32 bytes: digest of what the vector was
        computed from) are what THIS client knows, never taken from the request: the request must agree with
        them. A value out of range raises `OutOfRange` and leaves the round unused.

        A layout with output noise needs `noise`: called when every check has passed and nothing has changed, it pays
        for the release and returns the client's 32-byte secret for noise. What it raises leaves the round unused.
        """
        envelope = peek(message)
        if reply := self._replay(message):
            return reply
        epoch = self._current(envelope, ROUND)
        state = client_next(self.state, ROUND)
        check_round(envelope, epoch)
        if not epoch.confirmed:
            check_acks(envelope, epoch, self._directory, self._policy)
        p, r = epoch.parameters, envelope.round
        if len(context) != KEY_BYTES:
            raise BadParameters(f"context has {len(context)} bytes, needs a {KEY_BYTES}-byte digest")
        if layout.ring_bits != p.ring_bits:
            raise BadParameters(
                f"layout is for a {layout.ring_bits}-bit ring, the epoch for {p.ring_bits} bits"
            )
        self._policy.check_noise(layout, p)
        coding = layout.preflight(len(epoch.dealers))
        if envelope.body["coding"] != coding.digest:
            raise LayoutMismatch(COORDINATOR, f"round {r}: layout or scale differs from this client's")
        if envelope.body["context"] != context:
            raise ContextMismatch(COORDINATOR, f"round {r}: context differs from what this client was shown")

        masked = coding.encode(vector)
        if coding.variance:
            if noise is None:
                raise BadParameters("a layout with output noise needs the client's secret for noise")
            coding.add_noise(masked, noise_key(noise(), p, self.client_id, r, coding.digest, context))
        own = self_seed(epoch.secrets[r - 1, SEED].tobytes(), epoch.transcript, p, self.client_id, r)
        add = [mask_key(own, r, coding.digest, context)]
        subtract: list[bytes] = []
        checks = bytearray()
        for peer, row in zip(epoch.peers, epoch.pair_seeds[r - 1], strict=True):
            seed = row.tobytes()
            checks += pair_check(seed)
            (add if self.client_id < peer else subtract).append(mask_key(seed, r, coding.digest, context))
        apply_masks(masked, add, subtract)
        body = {"coding": coding.digest, "context": context, "vector": masked.tobytes()}
        del masked  # its bytes are in the body now; vectors can be long
        reply = seal_reply(UPLOAD, self.client_id, body, envelope, context, epoch.reply_key)
        epoch.wipe_masks(r)
        epoch.wipe_shares(r - 1)
        epoch.last_round, epoch.confirmed, epoch.checks, epoch.context = r, True, bytes(checks), context
        epoch.answers = {request_digest(message): reply}
        self.state = state
        return reply

    def unmask(self, message: bytes) -> bytes:
        """Partition of the roster into survivors and dropped in; out, once per round, and if the release policy
        opens it: for each ward that survived a share of its answer key, for each that dropped a share of its
        one-time mask key; checks of the pair seeds with dropped peers; and, sealed under this client's own
        answer key, shares of the self-mask seeds of the wards that survived."""
        envelope = peek(message)
        if reply := self._replay(message):
            return reply
        epoch = self._current(envelope, UNMASK)
        r = envelope.round
        if r < epoch.last_round or (r == epoch.last_round and self.state is ClientState.READY):
            raise ReplayedRound(COORDINATOR, f"round {r} was answered or given up before")
        state = client_next(self.state, UNMASK)
        if r != epoch.last_round:
            raise OutOfOrder(
                COORDINATOR, f"unmask request for round {r}, the open round is {epoch.last_round}"
            )
        survivors, dropped = envelope.body["survivors"], envelope.body["dropped"]
        check_partition(epoch, self.client_id, survivors, dropped, self._policy)

        gone = frozenset(dropped)
        kinds = np.array([MASK_KEY if ward in gone else ANSWER_KEY for ward in epoch.wards])
        shares = epoch.held[r - 1]  # (wards, KINDS, 9)
        secret = epoch.secrets[r - 1, ANSWER_KEY].tobytes()
        key = answer_key(secret, epoch.transcript, epoch.parameters, self.client_id, r)
        seeds = shamir.pack(shares[kinds == ANSWER_KEY, SEED])
        checks = zip(epoch.peers, split(epoch.checks, CHECK_BYTES), strict=True)
        body = {
            "shares": shamir.pack(shares[np.arange(len(kinds)), kinds]),
            "checks": b"".join(check for peer, check in checks if peer in gone),
            "seeds": ChaCha20Poly1305(key).encrypt(dealing.ONE_TIME_NONCE, seeds, None),
        }
        reply = seal_reply(ANSWER, self.client_id, body, envelope, epoch.context, epoch.reply_key)
        epoch.wipe_shares(r)
        epoch.checks = b""
        epoch.answers[request_digest(message)] = reply
        self.state = state
        return reply

    # -- refusing, closing, storing

    def refuse(self, message: bytes, error: ProtocolError) -> bytes:
        """Signed refusal of `message`, carrying the error's name and reason, and whom it blames. Changes nothing."""
        try:
            envelope = peek(message)
            type_, session, epoch, round_id = envelope.type, envelope.session, envelope.epoch, envelope.round
        except ProtocolError:
            p = self._epoch.parameters if self._epoch else None
            type_, session, epoch, round_id = "", p.session if p else b"\0", p.epoch if p else 0, 0
        accused = error.sender if isinstance(error, RemoteMisbehaviour) else ""
        body = {"refused": type_, "code": error.code, "reason": str(error), "accused": accused}
        return seal(REFUSAL, session, epoch, round_id, self.client_id, body, self._identity)

    def close(self, message: bytes) -> None:
        """Coordinator's notice that the epoch is over: destroys its secrets. No reply."""
        envelope = peek(message)
        self._current(envelope, CLOSE)
        client_next(self.state, CLOSE)
        self.close_epoch()

    def close_epoch(self) -> None:
        """Destroy the secrets of the current epoch, if there is one. The memory of used epochs stays."""
        if self._epoch is not None:
            self._epoch.wipe()
        self._epoch = None
        self.state = ClientState.IDLE

    def update_directory(self, directory: Directory, identity: IdentityKey | None = None) -> None:
        """From now on the parties of `directory` may take part: some joined, left, or rotated their key, this
        client itself if `identity` is its new key.

        The site's own decision: no message leads here. Ends the current epoch, whose roster was verified against
        the old directory. Epoch numbers stay used, so that nobody ever signs two transcripts of one epoch. Raises
        `BadParameters`, and changes nothing, unless `directory` lists this client with its key. Persist
        `export_state()` together with the new directory and key.
        """
        identity = identity or self._identity
        _check_listed(self.client_id, identity, directory)
        self.close_epoch()
        self._directory, self._identity = directory, identity

    def export_state(self) -> bytes:
        """Everything needed to go on after a crash. SECRET: for this client's private store only."""
        return dump(self.client_id, self._identity.public_bytes(), self._sessions, self.state, self._epoch)

    @classmethod
    def restore(
        cls,
        state: bytes,
        client_id: str,
        identity: IdentityKey,
        directory: Directory,
        policy: ClientPolicy,
        rng: Rng = os.urandom,
    ) -> ClientMachine:
        """The machine that exported `state`; raises `CorruptState` for damaged or foreign bytes."""
        machine = cls(client_id, identity, directory, policy, rng)
        machine._sessions, machine.state, machine._epoch = load(
            state, client_id, identity.public_bytes(), directory
        )
        return machine

    # -- checks

    def _replay(self, message: bytes) -> bytes | None:
        return self._epoch.answers.get(request_digest(message)) if self._epoch else None

    def _current(self, envelope: Envelope, type_: str) -> ClientEpoch:
        if self._epoch is None:
            raise WrongEpoch(COORDINATOR, f"'{envelope.type}' without an open epoch")
        round_id = envelope.round if type_ in (ROUND, UNMASK) else 0
        expect(envelope, type_, self._epoch.parameters.session, self._epoch.parameters.epoch, round_id)
        return self._epoch

    def _seal(self, type_: str, request: Envelope, body: Mapping[str, object]) -> bytes:
        return seal(
            type_, request.session, request.epoch, request.round, self.client_id, body, self._identity
        )


def _check_listed(client_id: str, identity: IdentityKey, directory: Directory) -> None:
    if directory.get(client_id) != identity.public_bytes():
        raise BadParameters(
            f"directory does not list '{client_id}' with the public key of the given identity"
        )


def _roster(epoch: ClientEpoch) -> Roster:
    if epoch.roster is None:
        raise OutOfOrder(COORDINATOR, "no roster yet")
    return epoch.roster
