"""The client's machine: coordinator messages in, signed replies out.

What it guarantees, whatever the coordinator does (see the package docstring for the argument):

- it masks only with parties of its own directory whose keys are signed for this very proposal, never below
  its minimum cohort or threshold;
- every upload carries its self-mask and one mask per other dealer, each derived from the transcript, round,
  coding and context this client saw itself;
- for each round it releases shares once, for one partition of the roster into survivors and dropped, so never
  both kinds for one party; and only for a partition its release policy opens;
- a round is answered once: a later identical request gets the identical bytes, any other is refused, after a
  restart too;
- a rejected message changes nothing.

Every method takes one coordinator message and returns one reply; both are bytes. They raise
`RemoteMisbehaviour` (blame the named sender) or `LocalMisuse` (blame the caller). Persist `export_state()`
before a reply leaves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from numpy.typing import NDArray

from . import shamir
from .client_store import ClientEpoch, dump, load, request_digest
from .errors import (
    BadParameters,
    BadShare,
    BelowThreshold,
    BothShareKinds,
    ContextMismatch,
    LayoutMismatch,
    OutOfOrder,
    ProtocolError,
    ReleaseRefused,
    ReplayedRound,
    WrongEpoch,
    WrongRoster,
)
from .fixedpoint import Layout
from .keys import COORDINATOR, KEY_BYTES, Directory, IdentityKey, Rng, agree, x25519_public
from .masks import apply_masks, mask_key
from .policy import ClientPolicy
from .roster import (
    KINDS,
    MASK_KEY,
    SEED,
    Roster,
    open_bundle,
    pair_seed,
    seed_commitment,
    self_seed,
    share_context,
    share_digests,
    share_key,
)
from .states import ClientState, client_next
from .wire import (
    ACK,
    ANSWER,
    BUNDLE,
    CLOSE,
    PACKET,
    PROPOSE,
    REFUSAL,
    ROSTER,
    ROUND,
    SHARES,
    START,
    UNMASK,
    UPLOAD,
    Envelope,
    expect,
    named_sender,
    parse,
    peek,
    seal,
    verify,
)  # fmt: skip

NONCE_BYTES = 12


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
        if directory.get(client_id) != identity.public_bytes():
            raise BadParameters(
                f"directory does not list '{client_id}' with the public key of the given identity"
            )
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

        rounds = range(1, parameters.rounds + 1)
        encryption_private = self._rng(KEY_BYTES)
        privates = [self._rng(KEY_BYTES) for _ in rounds]
        seeds = [self._rng(KEY_BYTES) for _ in rounds]
        body = {
            "proposal": parameters.digest(),
            "encryption_key": x25519_public(encryption_private),
            "mask_keys": b"".join(map(x25519_public, privates)),
            "commitments": b"".join(
                seed_commitment(parameters, self.client_id, r, seed)
                for r, seed in zip(rounds, seeds, strict=True)
            ),
        }
        bundle = self._seal(BUNDLE, envelope, body)
        self.close_epoch()
        self._epoch = ClientEpoch(parameters, bundle, encryption_private, _rows(privates), _rows(seeds))
        self._epoch.answers[request_digest(message)] = bundle
        self._sessions[parameters.session] = parameters.epoch
        self.state = state
        return bundle

    def deal_shares(self, message: bytes) -> bytes:
        """Roster of bundles in; out: for every party of the roster an encrypted packet with its shares of
        this client's self-mask seeds and one-time mask keys of all rounds."""
        envelope = peek(message)
        if reply := self._replay(message):
            return reply
        epoch = self._current(envelope, ROSTER)
        state = client_next(self.state, ROSTER)
        roster = self._check_roster(envelope, epoch)

        p = epoch.parameters
        secrets = np.stack([epoch.seeds, epoch.mask_privates], axis=1).reshape(
            -1, KEY_BYTES
        )  # (2R, 32), round-major
        shares = shamir.share(secrets, p.threshold, len(roster.bundles), self._rng)  # (points, 2R, 9)
        private = X25519PrivateKey.from_private_bytes(epoch.encryption_private)
        digest = roster.digest()
        packets = []
        for bundle, row in zip(roster.bundles, shares, strict=True):
            holder, plain = bundle.sender, shamir.pack(row)
            key = share_key(_agree(private, bundle.encryption_key, holder), digest, p, self.client_id, holder)
            nonce = self._rng(NONCE_BYTES)
            context = share_context(p, digest, self.client_id, holder)
            packet = {
                "to": holder,
                "roster": digest,
                "nonce": nonce,
                "ciphertext": ChaCha20Poly1305(key).encrypt(nonce, plain, context),
                "digests": share_digests(p, self.client_id, holder, plain),
            }
            packets.append(self._seal(PACKET, envelope, packet))
        reply = self._seal(SHARES, envelope, {"roster": digest, "packets": packets})
        epoch.roster = roster
        epoch.answers = {request_digest(message): reply}
        self.state = state
        return reply

    def start_epoch(self, message: bytes) -> bytes:
        """Final roster and the packets for this client in; signed acknowledgement of the transcript out.

        Does all key agreement of the epoch, after which the private keys are gone from this client's state.
        """
        envelope = peek(message)
        if reply := self._replay(message):
            return reply
        epoch = self._current(envelope, START)
        state = client_next(self.state, START)
        p, roster = epoch.parameters, _roster(epoch)
        dealers = tuple(envelope.body["dealers"])
        roster.check_dealers(dealers)
        self._policy.check_cohort(dealers, "final roster")
        self._check_complete(dealers, p.clients, "final roster")
        if self.client_id not in dealers:
            raise WrongRoster(
                COORDINATOR, f"final roster leaves out '{self.client_id}', who dealt its shares"
            )
        if len(envelope.body["packets"]) != len(dealers):
            raise WrongRoster(COORDINATOR, "number of packets differs from the number of dealers")

        private = X25519PrivateKey.from_private_bytes(epoch.encryption_private)
        transcript = roster.transcript(dealers)
        held = np.stack(
            [
                self._open_packet(raw, dealer, epoch, private)
                for raw, dealer in zip(envelope.body["packets"], dealers, strict=True)
            ]
        )
        pair_seeds = np.zeros((len(dealers), p.rounds, KEY_BYTES), np.uint8)
        for r in range(1, p.rounds + 1):
            own = X25519PrivateKey.from_private_bytes(epoch.mask_privates[r - 1].tobytes())
            for row, dealer in enumerate(dealers):
                if dealer != self.client_id:
                    shared = _agree(own, roster.bundle(dealer).mask_key(r), dealer)
                    seed = pair_seed(shared, transcript, p, self.client_id, dealer, r)
                    pair_seeds[row, r - 1] = np.frombuffer(seed, np.uint8)
        reply = self._seal(ACK, envelope, {"transcript": transcript})
        epoch.dealers, epoch.transcript = dealers, transcript
        epoch.held, epoch.pair_seeds = held, pair_seeds
        epoch.mask_privates[:] = 0
        epoch.encryption_private = b""
        epoch.answers = {request_digest(message): reply}
        self.state = state
        return reply

    # -- rounds

    def upload(self, message: bytes, vector: NDArray[np.float64], *, layout: Layout, context: bytes) -> bytes:
        """Round request in, masked vector out.

        `vector` is (layout.size,) float64. `layout` and `context` (32 bytes: digest of what the vector was
        computed from) are what THIS client knows, never taken from the request: the request must agree with
        them. A value out of range raises `OutOfRange` and leaves the round unused.
        """
        envelope = peek(message)
        if reply := self._replay(message):
            return reply
        epoch = self._current(envelope, ROUND)
        state = client_next(self.state, ROUND)
        p, r = epoch.parameters, envelope.round
        if not epoch.last_round < r <= p.rounds:
            if r > p.rounds:
                raise OutOfOrder(COORDINATOR, f"round {r}, this epoch has {p.rounds}: open a new epoch")
            raise ReplayedRound(COORDINATOR, f"round {r} asked for after round {epoch.last_round}")
        if not epoch.confirmed:
            self._check_acks(envelope, epoch)
        if len(context) != KEY_BYTES:
            raise BadParameters(f"context has {len(context)} bytes, needs a {KEY_BYTES}-byte digest")
        if layout.ring_bits != p.ring_bits:
            raise BadParameters(
                f"layout is for a {layout.ring_bits}-bit ring, the epoch for {p.ring_bits} bits"
            )
        coding = layout.preflight(len(epoch.dealers))
        if envelope.body["coding"] != coding.digest:
            raise LayoutMismatch(COORDINATOR, f"round {r}: layout or scale differs from this client's")
        if envelope.body["context"] != context:
            raise ContextMismatch(COORDINATOR, f"round {r}: context differs from what this client was shown")

        masked = coding.encode(vector)
        own = self_seed(epoch.seeds[r - 1].tobytes(), epoch.transcript, p, self.client_id, r)
        add = [mask_key(own, r, coding.digest, context)]
        subtract: list[bytes] = []
        for dealer, seeds in zip(epoch.dealers, epoch.pair_seeds, strict=True):
            if dealer != self.client_id:
                key = mask_key(seeds[r - 1].tobytes(), r, coding.digest, context)
                (add if self.client_id < dealer else subtract).append(key)
        apply_masks(masked, add, subtract)
        body = {"coding": coding.digest, "context": context, "vector": masked.tobytes()}
        reply = self._seal(UPLOAD, envelope, body)
        epoch.wipe_used(masks_to=r, shares_to=r - 1)
        epoch.last_round, epoch.confirmed = r, True
        epoch.answers = {request_digest(message): reply}
        self.state = state
        return reply

    def unmask(self, message: bytes) -> bytes:
        """Partition of the roster into survivors and dropped in; this client's shares out: of the self-mask
        seed for each survivor, of the one-time mask key for each dropped party. Once per round, if the
        release policy opens it."""
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
        self._check_partition(epoch, survivors, dropped)

        rows = {dealer: row for row, dealer in enumerate(epoch.dealers)}
        shares = epoch.held[:, r - 1]  # (dealers, 2, 9)
        body = {
            "survivors": b"".join(shamir.pack(shares[rows[name], SEED]) for name in survivors),
            "dropped": b"".join(shamir.pack(shares[rows[name], MASK_KEY]) for name in dropped),
        }
        reply = self._seal(ANSWER, envelope, body)
        epoch.wipe_used(masks_to=r, shares_to=r)
        epoch.answers[request_digest(message)] = reply
        self.state = state
        return reply

    # -- refusing, closing, storing

    def refuse(self, message: bytes, error: ProtocolError) -> bytes:
        """Signed refusal of `message`, carrying the error's name and reason. Changes nothing."""
        try:
            envelope = peek(message)
            type_, session, epoch, round_id = envelope.type, envelope.session, envelope.epoch, envelope.round
        except ProtocolError:
            p = self._epoch.parameters if self._epoch else None
            type_, session, epoch, round_id = "", p.session if p else b"\0", p.epoch if p else 0, 0
        body = {"refused": type_, "code": error.code, "reason": str(error)}
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

    def _check_roster(self, envelope: Envelope, epoch: ClientEpoch) -> Roster:
        p = epoch.parameters
        bundles = []
        for raw in envelope.body["bundles"]:
            sender = named_sender(raw, COORDINATOR)
            if sender not in p.clients:
                raise WrongRoster(COORDINATOR, f"roster holds '{sender:.80}', who is not in the proposal")
            bundles.append(open_bundle(raw, sender, p, self._directory))
        roster = Roster(p, tuple(bundles))
        if self.client_id not in roster.names or roster.bundle(self.client_id).raw != epoch.bundle:
            raise WrongRoster(COORDINATOR, f"roster does not hold the bundle '{self.client_id}' sent")
        self._policy.check_cohort(roster.names, "roster")
        self._check_complete(roster.names, p.clients, "roster")
        return roster

    def _check_complete(self, parties: tuple[str, ...], expected: tuple[str, ...], where: str) -> None:
        if self._policy.release == "abort" and parties != expected:
            missing = ", ".join(sorted(set(expected) - set(parties)))
            raise ReleaseRefused(
                COORDINATOR, f"{where} lacks {missing}; under release 'abort' all must take part"
            )

    def _open_packet(
        self, raw: bytes, dealer: str, epoch: ClientEpoch, private: X25519PrivateKey
    ) -> NDArray[np.uint32]:
        """Shares (R, 2, 9) that `dealer` dealt to this client."""
        p, roster = epoch.parameters, _roster(epoch)
        envelope = parse(raw, dealer)
        verify(envelope, self._directory)
        expect(envelope, PACKET, p.session, p.epoch)
        body, digest = envelope.body, roster.digest()
        if body["to"] != self.client_id or body["roster"] != digest:
            raise WrongRoster(dealer, "its share packet is for another client or another roster")
        shared = _agree(private, roster.bundle(dealer).encryption_key, dealer)
        key = share_key(shared, digest, p, dealer, self.client_id)
        context = share_context(p, digest, dealer, self.client_id)
        try:
            plain = ChaCha20Poly1305(key).decrypt(body["nonce"], body["ciphertext"], context)
        except InvalidTag:
            raise BadShare(dealer, "its share packet does not decrypt") from None
        shares = shamir.unpack(plain, KINDS * p.rounds)
        if shares is None:
            raise BadShare(dealer, "its share packet does not hold one share of each kind per round")
        if share_digests(p, dealer, self.client_id, plain) != body["digests"]:
            raise BadShare(dealer, "its shares differ from the digests it signed")
        return shares.reshape(p.rounds, KINDS, shamir.LIMBS)

    def _check_acks(self, envelope: Envelope, epoch: ClientEpoch) -> None:
        """Enough parties signed the same transcript; one signed other transcript proves two rosters."""
        p, seen = epoch.parameters, set()
        for raw in envelope.body["acks"]:
            sender = named_sender(raw, COORDINATOR)
            if sender not in epoch.dealers or sender in seen:
                raise WrongRoster(
                    COORDINATOR, f"acknowledgement of '{sender:.80}' is repeated or not of the roster"
                )
            ack = parse(raw, sender)
            verify(ack, self._directory)
            expect(ack, ACK, p.session, p.epoch)
            if ack.body["transcript"] != epoch.transcript:
                raise WrongRoster(COORDINATOR, f"showed '{sender}' another roster than this client")
            seen.add(sender)
        needed = (
            len(epoch.dealers)
            if self._policy.release == "abort"
            else max(p.threshold, self._policy.min_cohort)
        )
        if len(seen) < needed:
            raise WrongRoster(COORDINATOR, f"{len(seen)} acknowledgements of the roster, {needed} needed")

    def _check_partition(self, epoch: ClientEpoch, survivors: list[str], dropped: list[str]) -> None:
        for name in sorted(set(survivors) & set(dropped)):
            raise BothShareKinds(COORDINATOR, f"'{name}' is named both survivor and dropped")
        if survivors != sorted(set(survivors)) or dropped != sorted(set(dropped)):
            raise WrongRoster(COORDINATOR, "survivors and dropped must be sorted and distinct")
        if set(survivors) | set(dropped) != set(epoch.dealers):
            raise WrongRoster(COORDINATOR, "survivors and dropped do not make up the roster of the epoch")
        if self.client_id not in survivors:
            raise WrongRoster(COORDINATOR, f"lists '{self.client_id}' as dropped, who uploaded in this round")
        if self._policy.release == "abort" and dropped:
            raise ReleaseRefused(
                COORDINATOR,
                f"partial sum without {', '.join(dropped)}; "
                "under release 'abort' only the whole roster's sum is opened",
            )
        if len(survivors) < epoch.parameters.threshold:
            raise BelowThreshold(
                COORDINATOR, f"{len(survivors)} survivors, the threshold is {epoch.parameters.threshold}"
            )
        self._policy.check_cohort(survivors, "set of survivors")


def _rows(secrets: list[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(secrets), np.uint8).reshape(-1, KEY_BYTES).copy()


def _roster(epoch: ClientEpoch) -> Roster:
    if epoch.roster is None:
        raise OutOfOrder(COORDINATOR, "no roster yet")
    return epoch.roster


def _agree(private: X25519PrivateKey, public: bytes, peer: str) -> bytes:
    try:
        return agree(private, public)
    except ValueError:
        raise WrongRoster(peer, "its key is a low-order point") from None
