"""The coordinator's machine: collects, relays, and opens sums. It is trusted with nothing but availability.

Each phase works alike: a step returns `Continue(outbound)`; replies go to `receive(sender, message)` in any
order; `advance()` ends the phase with whoever answered. A misbehaving or silent client costs its own
participation, never the phase; what happened to it is in the `faults` of the outcome. All state is public
data; `export_state` lets a killed coordinator go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import shamir
from .coordinator_store import CoordinatorEpoch, dump, load
from .errors import (
    BadEncoding,
    BadParameters,
    BadShare,
    BelowThreshold,
    CohortTooSmall,
    CorruptState,
    IllegalEvent,
    LayoutMismatch,
    OutOfOrder,
    ProtocolError,
    ReleaseRefused,
    RemoteMisbehaviour,
    SumOutOfRange,
    UnknownParty,
    WrongRoster,
)
from .fixedpoint import Coding, Layout
from .keys import COORDINATOR, KEY_BYTES, Directory
from .masks import RingVector, ring_dtype
from .opening import Answers, reconstruct, remove_masks
from .outcomes import Aborted, Aggregate, Continue, EpochReady, Fault, Outcome
from .policy import DEFAULT_ROUNDS, EpochParameters, Release, threshold_for
from .roster import KINDS, SHARE_DIGEST_BYTES, Roster, check_bundle
from .states import CoordinatorState, coordinator_next
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
    parse,
    seal,
    verify,
)  # fmt: skip

EXPECTED = {
    CoordinatorState.BUNDLES: BUNDLE,
    CoordinatorState.SHARES: SHARES,
    CoordinatorState.ACKS: ACK,
    CoordinatorState.UPLOADS: UPLOAD,
    CoordinatorState.ANSWERS: ANSWER,
}
_SETUP = (CoordinatorState.BUNDLES, CoordinatorState.SHARES, CoordinatorState.ACKS)
_ADVANCE = {
    CoordinatorState.BUNDLES: "roster",
    CoordinatorState.SHARES: "start",
    CoordinatorState.ACKS: "ready",
    CoordinatorState.UPLOADS: "unmask",
    CoordinatorState.ANSWERS: "finish",
}


class CoordinatorMachine:
    """One session of the coordinator; states and events are in `states.COORDINATOR_TABLE`.

    `clients` defaults to the whole directory, `threshold` to ceil(2n/3). `release` mirrors the clients'
    policy, so that a sum they would refuse is not asked for; it protects nobody by itself. Raises
    `BadParameters` before any message is made.
    """

    def __init__(
        self,
        session: bytes,
        directory: Directory,
        *,
        clients: Sequence[str] | None = None,
        threshold: int | None = None,
        min_cohort: int = 5,
        rounds: int = DEFAULT_ROUNDS,
        ring_bits: int = 64,
        release: Release = "abort",
    ) -> None:
        names = tuple(sorted(directory if clients is None else clients))
        unknown = sorted(set(names) - set(directory))
        if unknown:
            raise BadParameters(f"clients not in the directory: {', '.join(unknown)}")
        if not 2 <= min_cohort <= len(names):
            raise BadParameters(
                f"min_cohort {min_cohort} for {len(names)} clients: needs 2 <= min_cohort <= clients"
            )
        if release not in ("abort", "recover"):
            raise BadParameters(f"release {release!r}: use 'abort' or 'recover'")
        t = threshold_for(len(names)) if threshold is None else threshold
        self._epoch = CoordinatorEpoch(EpochParameters(session, 1, names, t, rounds, ring_bits))
        self._directory = directory
        self._min_cohort = min_cohort
        self._release = release
        self.state = CoordinatorState.IDLE

    # -- public view

    @property
    def parameters(self) -> EpochParameters:
        return self._epoch.parameters

    @property
    def roster(self) -> tuple[str, ...]:
        """Clients between whom masks are exchanged in the current epoch; empty before it is ready."""
        return self._epoch.dealers

    @property
    def last_round(self) -> int:
        """Last round begun in the current epoch, 0 for none."""
        return self._epoch.round

    @property
    def rounds_left(self) -> int:
        return self.parameters.rounds - self._epoch.round if self._epoch.dealers else 0

    def pending(self) -> Continue:
        """The messages of the current phase whose receivers have not answered: what to send again after a
        restart.
        """
        settled = self._epoch.inbox.keys() | {fault.party for fault in self._epoch.phase_faults}
        return Continue(
            {name: message for name, message in self._epoch.outbound.items() if name not in settled}
        )

    # -- set-up

    def propose(self, epoch: int) -> Continue:
        """Begin epoch number `epoch` (from 1, increasing within a session: clients refuse a repeated one)."""
        state = coordinator_next(self.state, "propose")
        p = self.parameters
        self._epoch = CoordinatorEpoch(
            EpochParameters(p.session, epoch, p.clients, p.threshold, p.rounds, p.ring_bits)
        )
        body = {
            "clients": list(p.clients),
            "threshold": p.threshold,
            "rounds": p.rounds,
            "ring_bits": p.ring_bits,
        }
        return self._enter(state, dict.fromkeys(p.clients, self._seal(PROPOSE, 0, body)))

    def close_epoch(self) -> dict[str, bytes]:
        """End the epoch; send the returned notices so that clients destroy their secrets (no reply)."""
        state = coordinator_next(self.state, "close")
        notices = dict.fromkeys(self.parameters.clients, self._seal(CLOSE, 0, {}))
        self._epoch = CoordinatorEpoch(self.parameters)
        self.state = state
        return notices

    # -- rounds

    def begin_round(self, round_id: int, context: bytes, layout: Layout) -> Continue:
        """Ask for masked vectors of `layout`, bound to `context` (32-byte digest of what they are computed
        from).

        `round_id` in last_round + 1 .. rounds.
        """
        state = coordinator_next(self.state, "round")
        if not self._epoch.round < round_id <= self.parameters.rounds:
            raise IllegalEvent(
                f"round {round_id}: last round was {self._epoch.round} of {self.parameters.rounds}; "
                "open a new epoch when they are used up"
            )
        if len(context) != KEY_BYTES:
            raise BadParameters(f"context has {len(context)} bytes, needs a {KEY_BYTES}-byte digest")
        if layout.ring_bits != self.parameters.ring_bits:
            raise BadParameters(
                f"layout is for a {layout.ring_bits}-bit ring, the epoch for {self.parameters.ring_bits} bits"
            )
        coding = layout.preflight(len(self._epoch.dealers))
        self._epoch.round, self._epoch.context, self._epoch.layout = round_id, context, layout
        self._epoch.uploads, self._epoch.faults = {}, []
        body: dict[str, Any] = {"coding": coding.digest, "context": context, "acks": []}
        short = self._seal(ROUND, round_id, body)
        body["acks"] = [self._epoch.acks[name] for name in sorted(self._epoch.acks)]
        full = (
            self._seal(ROUND, round_id, body)
            if len(self._epoch.confirmed) < len(self._epoch.dealers)
            else short
        )
        return self._enter(
            state, {name: short if name in self._epoch.confirmed else full for name in self._epoch.dealers}
        )

    # -- one phase

    def receive(self, sender: str, message: bytes) -> None:
        """Take a reply of this phase. `sender` is who the transport says it is.

        Raises `RemoteMisbehaviour` (recorded in the faults as well) for anything but the one valid reply or a
        signed refusal; an identical repetition is ignored.
        """
        if self.state not in EXPECTED:
            raise IllegalEvent(f"'receive' is not allowed in coordinator state '{self.state.value}'")
        try:
            self._receive(sender, message)
        except RemoteMisbehaviour as error:
            self._epoch.faults.append(Fault(sender, "misbehaviour", error.code, str(error)))
            raise

    def _receive(self, sender: str, message: bytes) -> None:
        if sender not in self._directory:
            raise UnknownParty(sender, "not in the provisioned directory")
        if sender not in self._epoch.outbound:
            raise OutOfOrder(sender, "was not asked in this phase")
        if (earlier := self._epoch.inbox.get(sender)) is not None:
            if earlier.raw == message:
                return
            raise OutOfOrder(sender, "sent two different replies in one phase")
        envelope = parse(message, sender)
        verify(envelope, self._directory)
        p = self.parameters
        round_id = 0 if self.state in _SETUP else self._epoch.round
        if envelope.type == REFUSAL:
            expect(envelope, REFUSAL, p.session, p.epoch, round_id)
            code, reason = envelope.body["code"], envelope.body["reason"]
            self._epoch.faults.append(Fault(sender, "refusal", code, reason))
            return
        expect(envelope, EXPECTED[self.state], p.session, p.epoch, round_id)
        self._check(envelope)
        self._epoch.inbox[sender] = envelope

    def _check(self, envelope: Envelope) -> None:
        body, sender = envelope.body, envelope.sender
        if envelope.type == BUNDLE:
            check_bundle(envelope, self.parameters)
        elif envelope.type == SHARES:
            self._check_shares(envelope)
        elif envelope.type == ACK:
            if body["transcript"] != self._epoch.transcript:
                raise WrongRoster(sender, "acknowledges another transcript")
        elif envelope.type == UPLOAD:
            coding = self._coding()
            if (body["coding"], body["context"]) != (coding.digest, self._epoch.context):
                raise LayoutMismatch(sender, "upload is bound to another layout or context")
            if len(body["vector"]) != coding.layout.size * coding.layout.ring_bits // 8:
                raise BadEncoding(
                    sender, f"upload has {len(body['vector'])} bytes, not the size of the layout"
                )
        else:
            self._shares_of(envelope)

    def _check_shares(self, envelope: Envelope) -> None:
        roster, sender = self._require_roster(), envelope.sender
        packets = envelope.body["packets"]
        if envelope.body["roster"] != roster.digest() or len(packets) != len(roster.bundles):
            raise WrongRoster(sender, "dealt shares for another roster")
        for raw, holder in zip(packets, roster.names, strict=True):
            packet = parse(raw, sender)
            verify(packet, self._directory)
            expect(packet, PACKET, self.parameters.session, self.parameters.epoch)
            if packet.body["to"] != holder or packet.body["roster"] != roster.digest():
                raise WrongRoster(sender, f"packet for '{holder}' is for another client or another roster")
            if len(packet.body["digests"]) != SHARE_DIGEST_BYTES * KINDS * self.parameters.rounds:
                raise BadEncoding(sender, "packet: wrong number of share digests")

    def advance(self) -> Outcome:
        """End the phase with the replies that arrived."""
        if self.state not in _ADVANCE:
            raise IllegalEvent(f"'advance' is not allowed in coordinator state '{self.state.value}'")
        state = coordinator_next(self.state, _ADVANCE[self.state])
        blamed = {fault.party for fault in self._epoch.phase_faults}
        for name in sorted(self._epoch.outbound.keys() - self._epoch.inbox.keys() - blamed):
            self._epoch.faults.append(
                Fault(name, "silence", "Silence", f"{name}: no reply in phase '{self.state.value}'")
            )
        try:
            steps = {
                CoordinatorState.BUNDLES: self._send_roster,
                CoordinatorState.SHARES: self._send_start,
                CoordinatorState.ACKS: self._finish_setup,
                CoordinatorState.UPLOADS: self._send_unmask,
                CoordinatorState.ANSWERS: self._open,
            }
            return steps[self.state](state)
        except (RemoteMisbehaviour, SumOutOfRange) as error:
            return self._abort(error)

    def _send_roster(self, state: CoordinatorState) -> Outcome:
        bundles = [
            check_bundle(self._epoch.inbox[name], self.parameters) for name in sorted(self._epoch.inbox)
        ]
        self._require_parties(sorted(self._epoch.inbox), self.parameters.clients, "bundles")
        self._epoch.roster = Roster(self.parameters, tuple(bundles))
        body = {"bundles": [bundle.raw for bundle in bundles]}
        return self._enter(state, dict.fromkeys(self._epoch.roster.names, self._seal(ROSTER, 0, body)))

    def _send_start(self, state: CoordinatorState) -> Outcome:
        roster, dealers = self._require_roster(), tuple(sorted(self._epoch.inbox))
        self._require_parties(dealers, self.parameters.clients, "dealt shares")
        self._epoch.dealers = dealers
        packets: dict[str, list[bytes]] = {holder: [] for holder in roster.names}
        for dealer in dealers:
            for holder, raw in zip(roster.names, self._epoch.inbox[dealer].body["packets"], strict=True):
                packets[holder].append(raw)
                self._epoch.digests[dealer, holder] = parse(raw, dealer).body["digests"]
        names = list(dealers)
        return self._enter(
            state,
            {name: self._seal(START, 0, {"dealers": names, "packets": packets[name]}) for name in dealers},
        )

    def _finish_setup(self, state: CoordinatorState) -> Outcome:
        self._require_parties(sorted(self._epoch.inbox), self._epoch.dealers, "acknowledgements")
        self._epoch.acks = {name: envelope.raw for name, envelope in self._epoch.inbox.items()}
        self._enter(state, {})
        absent = tuple(name for name in self.parameters.clients if name not in self._epoch.dealers)
        return EpochReady(
            self.parameters.epoch,
            self._epoch.dealers,
            absent,
            self._epoch.transcript,
            tuple(self._epoch.faults),
        )

    def _send_unmask(self, state: CoordinatorState) -> Outcome:
        survivors = sorted(self._epoch.inbox)
        self._require_parties(survivors, self._epoch.dealers, "uploads")
        self._epoch.uploads = dict(self._epoch.inbox)
        self._epoch.confirmed |= self._epoch.inbox.keys()
        dropped = [name for name in self._epoch.dealers if name not in self._epoch.uploads]
        message = self._seal(UNMASK, self._epoch.round, {"survivors": survivors, "dropped": dropped})
        return self._enter(state, dict.fromkeys(survivors, message))

    def _open(self, state: CoordinatorState) -> Outcome:
        roster, coding = self._require_roster(), self._coding()
        survivors = tuple(sorted(self._epoch.uploads))
        dropped = tuple(name for name in self._epoch.dealers if name not in self._epoch.uploads)
        if len(self._epoch.inbox) < self.parameters.threshold:
            raise BelowThreshold(
                COORDINATOR,
                f"{len(self._epoch.inbox)} answers, the threshold is {self.parameters.threshold}; "
                "nothing was opened",
            )
        answers = Answers(
            survivors, dropped, {name: self._shares_of(e) for name, e in self._epoch.inbox.items()}
        )
        secrets, culprits = reconstruct(roster, self._epoch.round, answers, self._epoch.digests)
        total = coding.add([self._vector(self._epoch.uploads[name]) for name in survivors])
        remove_masks(
            total,
            roster,
            self._epoch.transcript,
            self._epoch.round,
            coding,
            self._epoch.context,
            answers,
            secrets,
        )
        decoded = coding.decode(total, len(survivors))
        for name in culprits:
            self._epoch.faults.append(
                Fault(name, "misbehaviour", BadShare.__name__, f"{name}: handed in shares it was not dealt")
            )
        aggregate = Aggregate(
            self._epoch.round, decoded, total, survivors, dropped, culprits, tuple(self._epoch.faults)
        )
        self._epoch.uploads = {}
        self._enter(state, {})
        return aggregate

    # -- storing

    def export_state(self) -> bytes:
        """Everything needed to go on after a crash; public data. Save it before messages leave."""
        return dump(self.state, self._min_cohort, self._release, self._epoch)

    @classmethod
    def restore(cls, state: bytes, directory: Directory) -> CoordinatorMachine:
        """The machine that exported `state`, in the same phase: go on with `pending()` or `driver.resume`.

        Raises `CorruptState` for damaged bytes.
        """
        phase, min_cohort, release, epoch = load(state, directory)
        p = epoch.parameters
        try:
            machine = cls(
                p.session,
                directory,
                clients=p.clients,
                threshold=p.threshold,
                min_cohort=min_cohort,
                rounds=p.rounds,
                ring_bits=p.ring_bits,
                release=release,
            )
        except (BadParameters, TypeError) as error:
            raise CorruptState(f"coordinator state holds parameters no session runs with: {error}") from None
        machine.state, machine._epoch = phase, epoch
        return machine

    # -- helpers

    def _enter(self, state: CoordinatorState, outbound: dict[str, bytes]) -> Continue:
        self._epoch.begin_phase(outbound)
        self.state = state
        return Continue(outbound)

    def _abort(self, error: ProtocolError) -> Aborted:
        phase, in_round = self.state.value, self.state not in _SETUP
        state = coordinator_next(self.state, "abort")
        culprits = (
            (error.sender,) if isinstance(error, RemoteMisbehaviour) and error.sender != COORDINATOR else ()
        )
        outcome = Aborted(
            phase,
            self._epoch.round if in_round else 0,
            error.code,
            str(error),
            culprits,
            tuple(self._epoch.faults),
        )
        if in_round:
            self._epoch.uploads = {}
            self._epoch.begin_phase({})
        else:
            self._epoch = CoordinatorEpoch(self.parameters)
        self.state = state
        return outcome

    def _require_parties(self, present: Sequence[str], expected: Sequence[str], what: str) -> None:
        missing = ", ".join(name for name in expected if name not in present)
        if self._release == "abort" and missing:
            raise ReleaseRefused(
                COORDINATOR, f"no {what} from {missing}; under release 'abort' all must take part"
            )
        if len(present) < self.parameters.threshold:
            raise BelowThreshold(
                COORDINATOR,
                f"{what} from {len(present)} clients, the threshold is {self.parameters.threshold}; "
                f"missing: {missing}",
            )
        if len(present) < self._min_cohort:
            raise CohortTooSmall(
                COORDINATOR,
                f"{what} from {len(present)} clients, the minimum cohort is {self._min_cohort}; "
                f"missing: {missing}",
            )

    def _require_roster(self) -> Roster:
        if self._epoch.roster is None:
            raise IllegalEvent("no roster yet")
        return self._epoch.roster

    def _coding(self) -> Coding:
        if self._epoch.layout is None:
            raise IllegalEvent("no round has begun")
        return self._epoch.layout.preflight(len(self._epoch.dealers))

    def _vector(self, upload: Envelope) -> RingVector:
        return np.frombuffer(upload.body["vector"], ring_dtype(self.parameters.ring_bits))

    def _shares_of(self, answer: Envelope) -> NDArray[np.uint32]:
        dropped = len(self._epoch.dealers) - len(self._epoch.uploads)
        first = shamir.unpack(answer.body["survivors"], len(self._epoch.uploads))
        second = shamir.unpack(answer.body["dropped"], dropped)
        if first is None or second is None:
            raise BadEncoding(answer.sender, "answer does not hold one share per party of the roster")
        return np.concatenate([first, second])

    def _seal(self, type_: str, round_id: int, body: dict[str, Any]) -> bytes:
        return seal(type_, self.parameters.session, self.parameters.epoch, round_id, COORDINATOR, body, None)
