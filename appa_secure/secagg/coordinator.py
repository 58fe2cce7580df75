"""The coordinator's machine: collects, relays, and opens sums. It is trusted with nothing but availability.

Each phase works alike: a step returns `Continue(outbound)`; replies go to `receive(sender, message)` in any
order; `advance()` ends the phase with whoever answered. A misbehaving or silent client costs its own
participation, never the phase; what happened to it is in the `faults` of the outcome. `export_state` lets a killed
coordinator go on; its only secrets are the keys that replies are authenticated with.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from .coordinator_checks import accusations, check_parties, check_ready, check_shares, check_upload
from .coordinator_phases import (
    close_notices,
    coding_of,
    keep_setup,
    open_sum,
    opening_of,
    proposals,
    roster_of,
    rosters,
    round_requests,
    starts,
    unmask_requests,
)
from .coordinator_store import CoordinatorEpoch, dump, load
from .errors import (
    BadParameters,
    CorruptState,
    IllegalEvent,
    OutOfOrder,
    ProtocolError,
    RemoteMisbehaviour,
    SumOutOfRange,
    UnknownParty,
)
from .fixedpoint import Layout
from .keys import COORDINATOR, KEY_BYTES, Directory, Rng, x25519_public
from .opening import Opening
from .outcomes import Aborted, Continue, Fault, Outcome
from .policy import DEFAULT_ROUNDS, RELEASES, EpochParameters, Release, threshold_for
from .roster import check_bundle
from .states import CoordinatorState, coordinator_next
from .wire import (
    ANSWER,
    BUNDLE,
    READY,
    REFUSAL,
    SHARES,
    UPLOAD,
    WITH_MAC,
    Envelope,
    expect,
    parse,
    verify,
    verify_reply,
)  # fmt: skip

EXPECTED = {
    CoordinatorState.BUNDLES: BUNDLE,
    CoordinatorState.SHARES: SHARES,
    CoordinatorState.ACKS: READY,
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
        rng: Rng = os.urandom,
    ) -> None:
        names = tuple(sorted(directory if clients is None else clients))
        unknown = sorted(set(names) - set(directory))
        if unknown:
            raise BadParameters(f"clients not in the directory: {', '.join(unknown)}")
        if not 2 <= min_cohort <= len(names):
            raise BadParameters(
                f"min_cohort {min_cohort} for {len(names)} clients: needs 2 <= min_cohort <= clients"
            )
        if release not in RELEASES:
            raise BadParameters(f"release {release!r}: use one of {', '.join(RELEASES)}")
        t = threshold_for(len(names)) if threshold is None else threshold
        private = rng(KEY_BYTES)
        parameters = EpochParameters(session, 1, names, t, x25519_public(private), rounds, ring_bits)
        self._epoch = CoordinatorEpoch(parameters, private)
        self._rng = rng
        self._directory = directory
        self._min_cohort = min_cohort
        self._release = release
        self.state = CoordinatorState.IDLE
        self._opening: Opening | None = None  # made from the state when it is needed

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
        settled = self._epoch.settled.keys() | {fault.party for fault in self._epoch.phase_faults}
        return Continue(
            {name: message for name, message in self._epoch.outbound.items() if name not in settled}
        )

    # -- set-up

    def propose(self, epoch: int) -> Continue:
        """Begin epoch number `epoch` (from 1, increasing within a session: clients refuse a repeated one), with a
        fresh key of the coordinator."""
        state = coordinator_next(self.state, "propose")
        private = self._rng(KEY_BYTES)
        parameters = replace(self.parameters, epoch=epoch, coordinator_key=x25519_public(private))
        self._epoch = CoordinatorEpoch(parameters, private)
        return self._enter(state, proposals(self._epoch))

    def close_epoch(self) -> dict[str, bytes]:
        """End the epoch; send the returned notices so that clients destroy their secrets (no reply)."""
        state = coordinator_next(self.state, "close")
        notices = close_notices(self._epoch)
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
        self._epoch.total, self._epoch.survivors, self._epoch.faults = coding.add([]), (), []
        return self._enter(state, round_requests(self._epoch))

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
            self._epoch.note(Fault(sender, "misbehaviour", error.code, str(error)))
            raise

    def _receive(self, sender: str, message: bytes) -> None:
        if sender not in self._directory:
            raise UnknownParty(sender, "not in the provisioned directory")
        if sender not in self._epoch.outbound:
            raise OutOfOrder(sender, "was not asked in this phase")
        envelope = parse(message, sender)
        if (earlier := self._epoch.settled.get(sender)) is not None:
            # Whatever carries the proof of the counted reply is a repetition of it, or a forgery: ignored.
            if earlier == envelope.proof:
                return
            raise OutOfOrder(sender, "sent two different replies in one phase")
        p = self.parameters
        round_id = 0 if self.state in _SETUP else self._epoch.round
        due = REFUSAL if envelope.type == REFUSAL else EXPECTED[self.state]
        expect(envelope, due, p.session, p.epoch, round_id)
        if due in WITH_MAC:
            request, key = self._epoch.outbound[sender], self._epoch.reply_keys[sender]
            verify_reply(envelope, key, request, self._epoch.context)
        else:
            verify(envelope, self._directory)
        if due == REFUSAL:
            body = envelope.body
            self._epoch.note(Fault(sender, "refusal", body["code"], body["reason"], body["accused"]))
            return
        self._accept(envelope)
        self._epoch.settled[sender] = envelope.proof

    def _accept(self, envelope: Envelope) -> None:
        """Check a reply and keep it; of an upload only its part of the sum."""
        epoch = self._epoch
        if envelope.type == UPLOAD:
            check_upload(envelope, coding_of(epoch), epoch.context)
            assert epoch.total is not None
            vector = np.frombuffer(envelope.body["vector"], epoch.total.dtype)
            np.add(epoch.total, vector, out=epoch.total)
            return
        if envelope.type == BUNDLE:
            check_bundle(envelope, self.parameters)
        elif envelope.type == SHARES:
            check_shares(envelope, roster_of(epoch), self._directory)
        elif envelope.type == READY:
            check_ready(envelope, epoch, self._directory)
        else:
            self._require_opening().check(envelope)
        epoch.inbox[envelope.sender] = envelope

    def advance(self) -> Outcome:
        """End the phase with the replies that arrived."""
        if self.state not in _ADVANCE:
            raise IllegalEvent(f"'advance' is not allowed in coordinator state '{self.state.value}'")
        state = coordinator_next(self.state, _ADVANCE[self.state])
        blamed = {fault.party for fault in self._epoch.phase_faults}
        for name in sorted(self._epoch.outbound.keys() - self._epoch.settled.keys() - blamed):
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
        self._require_parties(self._epoch.inbox, self.parameters.clients, "bundles")
        return self._enter(state, rosters(self._epoch))

    def _send_start(self, state: CoordinatorState) -> Outcome:
        self._require_parties(self._epoch.inbox, self.parameters.clients, "dealt shares")
        return self._enter(state, starts(self._epoch))

    def _finish_setup(self, state: CoordinatorState) -> Outcome:
        self._require_parties(self._epoch.inbox, self._epoch.dealers, "acknowledgements")
        ready = keep_setup(self._epoch)
        self._enter(state, {})
        return ready

    def _send_unmask(self, state: CoordinatorState) -> Outcome:
        self._require_parties(self._epoch.settled, self._epoch.dealers, "uploads")
        self._epoch.survivors = tuple(sorted(self._epoch.settled))
        self._epoch.confirmed |= self._epoch.settled.keys()
        return self._enter(state, unmask_requests(self._epoch, self._require_opening()))

    def _open(self, state: CoordinatorState) -> Outcome:
        aggregate = open_sum(self._epoch, self._require_opening())
        self._close_round(state)
        return aggregate

    # -- storing

    def export_state(self) -> bytes:
        """Everything needed to go on after a crash. Save it before messages leave. SECRET: with the reply keys in it
        replies can be forged to this coordinator (not read)."""
        return dump(self.state, self._min_cohort, self._release, self._epoch)

    @classmethod
    def restore(cls, state: bytes, directory: Directory, rng: Rng = os.urandom) -> CoordinatorMachine:
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
                rng=rng,
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
        culprits, disputes = accusations(self._epoch) if self.state is CoordinatorState.ACKS else ((), ())
        if isinstance(error, RemoteMisbehaviour) and error.sender != COORDINATOR:
            culprits = (error.sender,)
        outcome = Aborted(
            phase,
            self._epoch.round if in_round else 0,
            error.code,
            str(error),
            culprits,
            tuple(self._epoch.faults),
            disputes,
        )
        if in_round:
            self._close_round(state)
        else:
            self._epoch = CoordinatorEpoch(self.parameters)
            self.state = state
        return outcome

    def _close_round(self, state: CoordinatorState) -> None:
        self._epoch.total, self._epoch.survivors, self._opening = None, (), None
        self._enter(state, {})

    def _require_parties(self, present: Collection[str], expected: Sequence[str], what: str) -> None:
        threshold, complete = self.parameters.threshold, self._release == "abort"
        check_parties(present, expected, what, threshold, self._min_cohort, complete)

    def _require_opening(self) -> Opening:
        if self._opening is None:
            self._opening = opening_of(self._epoch)
        return self._opening
