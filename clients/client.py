"""One institution's client: coordinator messages in, replies out; the only holder of raw preferences.

`Client.handle` is the whole interface. It validates a request, computes, writes its new state to its own store and only
then returns the reply. A byte-identical repetition of the last request of a kind gets the identical reply, so a
coordinator that crashed before storing an answer can ask again without a second release.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from appa_secure.agreement import PREDICTOR, SYSTEM, Agreement
from appa_secure.data import GroupData
from appa_secure.errors import ConfigError, PrivacyError
from appa_secure.membership import Membership, renewed
from appa_secure.messages import (
    REPLIES,
    REQUESTS,
    Message,
    digest,
    pack,
    pack_float,
    unpack,
    unpack_float,
    unpack_vector,
)
from appa_secure.predictor import PreferencePredictor, context_points, predict, unflatten
from appa_secure.privacy.ledger import Ledger
from appa_secure.privacy.noise import subkey
from appa_secure.rewards import Scorer
from appa_secure.secagg.client import ClientMachine, PayForNoise
from appa_secure.secagg.driver import respond
from appa_secure.secagg.errors import ProtocolError, RemoteMisbehaviour, ReplayedRound
from appa_secure.secagg.keys import COORDINATOR, IdentityKey
from appa_secure.secagg.wire import PROPOSE, peek
from clients.context import private_histograms, raw_shares
from clients.errors import Refusal
from clients.scoring import Scoring
from clients.store import ClientStore
from clients.training import LocalTrainer, ShareTrainer, Trainer
from clients.tuning import Tuner, make_tuner, read_rollouts

_INTO_SUMS = ("train", "secagg", "score", "tune")  # requests whose answers can open a sum


class Client:
    """State and answers of one client; see the module docstring."""

    def __init__(
        self,
        client_id: str,
        data: GroupData,
        agreement: Agreement,
        embeddings: Mapping[str, np.ndarray],
        store: ClientStore,
        identity: IdentityKey,
        noise_key: bytes | None = None,
        rng: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """agreement: what this site agreed to, from its own configuration. noise_key: 32 bytes when the noise is to be
        reproducible from the run's seed; None draws a secret one once (privacy.secure_rng)."""
        if agreement.plan.private and agreement.plan.unit == "respondent" and data.responses is None:
            raise PrivacyError(
                f"client {client_id!r}: privacy.unit=respondent needs to know which answers are one person's; use data with "
                "respondents, or privacy.unit=response"
            )
        self.client_id, self._data, self._founding = client_id, data, agreement
        self._embeddings, self._store, self._identity, self._rng = dict(embeddings), store, identity, rng
        self._state = store.load()
        if "noise_key" not in self._state:
            # New, or handed over by `ClientStore.adopt`: then with a context and predictions, and all else its own.
            fresh: dict[str, Any] = {
                "machines": {},
                "answered": {},
                "history": {},
                "context": {},
                "vector": {},
            }
            key = noise_key if noise_key is not None else rng(32)
            self._state = {**fresh, "noise_key": key, **self._state}
        # What this site's operator changed since the run was founded, as far as it has come into force.
        stored = self._state.get("membership")
        self.agreement = renewed(agreement, Membership.decode(stored)) if stored else agreement
        if self._state.get("identity"):
            self._identity = IdentityKey.from_seed(self._state["identity"])
        self._ledger = (
            Ledger(store.ledger_path, client_id, agreement.budget) if agreement.plan.private else None
        )
        self._machines: dict[str, ClientMachine] = {}
        self._model = PreferencePredictor(agreement.predictor)
        self._trainer: Trainer | None = None
        self._scoring = Scoring(client_id, data, agreement, store, self._state)
        self._tuning: Tuner | None = None
        self._handlers: dict[str, Callable[[Mapping[str, Any]], bytes]] = {
            "setup": self._setup,
            "context": self._context,
            "secagg": self._secagg,
            "train": self._train,
            "freeze": self._freeze,
            "score": self._score,
            "policy": self._policy,
            "tune": self._tune,
            "truth": self._truth,
            "weight": self._weight,
        }

    def __repr__(self) -> str:
        return f"Client({self.client_id!r})"

    def handle(self, raw: bytes) -> bytes:
        """Answer one request. What this client does not accept is answered with a refusal that says why."""
        try:
            request = unpack(REQUESTS, raw, COORDINATOR)
            last = self._state["answered"].get(request.kind)
            asked = hashlib.sha256(raw).digest()
            if last is not None and last[0] == asked:
                return bytes(last[1])
            reply = self._answer(request)
        except (ProtocolError, PrivacyError, Refusal) as error:
            code = error.code if isinstance(error, ProtocolError | Refusal) else type(error).__name__
            reason = error.reason if isinstance(error, Refusal) else str(error)
            return pack(REPLIES, "refusal", code=code, reason=reason)
        self._state["answered"][request.kind] = [asked, reply]
        self._save()
        return reply

    def _answer(self, request: Message) -> bytes:
        if request.kind != "setup" and not self._state.get("run"):
            raise Refusal("OutOfOrder", f"{request.kind} before setup")
        system = self.agreement.system
        if request.kind in ("score", "policy", "tune") and request.kind not in system.requests:
            raise Refusal("NotAgreed", f"{request.kind} has no part in the agreed system={system.kind}")
        if request.kind in _INTO_SUMS:
            aligning = bool(self._state.get("predicted")) or self.agreement.true_rewards
            self._renew(now=aligning and self._begins_epoch(request))
        return self._handlers[request.kind](request.body)

    def _save(self) -> None:
        for session, machine in self._machines.items():
            self._state["machines"][session] = machine.export_state()
        self._store.save(self._state)

    # -- set-up ----------------------------------------------------------------------------------------------------

    def _setup(self, body: Mapping[str, Any]) -> bytes:
        mine = self._founding
        if self.client_id not in self.agreement.groups:
            self._renew(now=True)  # one that joins later
            if self.client_id not in self.agreement.groups:
                raise Refusal("NotAMember", "this site's operator has not made it a member of the run")
        if body["agreement"] != mine.digest():
            raise Refusal(
                "AgreementMismatch", "the coordinator's configuration of this run differs from this site's"
            )
        if body["run"] != mine.plan.run:
            raise Refusal("AgreementMismatch", f"run {body['run']!r} is not the agreed {mine.plan.run!r}")
        self._state["run"] = mine.plan.run
        return pack(REPLIES, "setup")

    def _context(self, body: Mapping[str, Any]) -> bytes:
        a, plan = self.agreement, self.agreement.plan
        # Which questions a group was asked is public; the others would enter as pure noise.
        sizes = {q: len(self._embeddings[q]) for q in plan.released if self._data.has(q)}
        if not any(q in sizes for q in plan.context):
            raise Refusal(
                "NoContext", "this group was asked none of the context questions; raise data.context"
            )
        rows: list[dict[str, Any]] = []
        if not self._state["context"]:
            if a.origin:
                # The ledger holds the origin's release, by the same name: a second one would seem paid for.
                raise Refusal(
                    "OutOfOrder", "the agreed run starts from another one's context, and there is none"
                )
            if plan.private:
                assert self._ledger is not None
                name, std, event = a.histogram_release
                rows = [self._ledger.charge(name, event)]
                shares, per_question = private_histograms(
                    self._data, sizes, plan.unit, plan.answers_per_unit, std, self._state["noise_key"],
                    f"{name}/{plan.run}", a.question_order,
                )  # fmt: skip
            else:
                shares, per_question = raw_shares(self._data, sizes), 1.0
            self._state["context"] = {q: s.tobytes() for q, s in shares.items()}
            self._state["per_question"] = pack_float(per_question)
        return pack(REPLIES, "context", ledger=json.dumps(rows).encode())

    def _shares(self, questions: Sequence[str]) -> dict[str, np.ndarray]:
        """The shares that were released at the beginning, of those of `questions` that the group was asked."""
        if not self._state["context"]:
            raise Refusal("OutOfOrder", "the private context has not been made yet")
        # In the plan's order: a reloaded state lists its keys in another, and sums of floats depend on it.
        kept = self._state["context"]
        return {q: np.frombuffer(kept[q]).copy() for q in questions if q in kept}

    # -- secure aggregation ----------------------------------------------------------------------------------------

    def _machine(self, session: str) -> ClientMachine:
        if session not in self._machines:
            sessions = self.agreement.sessions(self.client_id)
            if session not in sessions:
                raise Refusal("UnknownSession", f"session {session!r} is not one of {sorted(sessions)}")
            directory, policy = sessions[session]
            stored = self._state["machines"].get(session)
            self._machines[session] = (
                ClientMachine(self.client_id, self._identity, directory, policy, self._rng)
                if stored is None
                else ClientMachine.restore(
                    stored, self.client_id, self._identity, directory, policy, self._rng
                )
            )
        return self._machines[session]

    def _begins_epoch(self, request: Message) -> bool:
        """Whether a request proposes an epoch; without masks there are none, and any step may begin one."""
        if request.kind != "secagg":
            return self.agreement.clear
        try:
            return peek(request.body["message"]).type == PROPOSE
        except ProtocolError:
            return False

    def _renew(self, now: bool) -> None:
        """Take over what this site's operator says of who takes part, if it is news.

        Who is told to leave stops at once. The others open what the epoch in progress opens, with everyone who began
        it, and follow when the next is proposed (`now`), in alignment only. Raises Refusal, and changes nothing, for a
        membership no site should follow.
        """
        raw = self._store.membership()
        try:
            news = Membership.decode(raw) if raw is not None else None
            if news is None or news.run != self.agreement.plan.run or news.version <= self.agreement.version:
                return
            if self.client_id not in news.groups:
                for session in [*self._state["machines"]]:
                    self._machine(session).close_epoch()
                self._save()
                raise Refusal("Withdrawn", f"this site left the run with membership {news.version}")
            if not now:
                return
            agreement, identity = renewed(self.agreement, news), self._identity
            if news.directory[self.client_id] != identity.public_bytes():
                seed = self._store.new_identity()
                if seed is None or len(seed) != 32:
                    raise ConfigError(
                        "the membership lists a new key of this site, but there is no identity.seed"
                    )
                identity = IdentityKey.from_seed(seed)
                if news.directory[self.client_id] != identity.public_bytes():
                    raise ConfigError("the membership lists a key of this site that is not its own")
                self._state["identity"] = seed
        except ConfigError as error:
            raise Refusal("BadMembership", str(error)) from None
        machines = {session: self._machine(session) for session in self._state["machines"]}
        if agreement.period != self.agreement.period:
            self._scoring.restart()
        self.agreement, self._identity, self._state["membership"] = agreement, identity, raw
        sessions = agreement.sessions(self.client_id)
        for session, machine in machines.items():
            machine.update_directory(sessions[session][0], identity)
        self._save()

    def _secagg(self, body: Mapping[str, Any]) -> bytes:
        machine, message = self._machine(body["session"]), body["message"]
        reply = respond(machine, message)
        return pack(REPLIES, "secagg", message=reply or b"")

    def _check_session(self, body: Mapping[str, Any], due: str) -> None:
        """Each session has a release policy of its own; a vector travels in no other."""
        if body["session"] != due:
            raise Refusal("WrongSession", f"session {body['session']!r:.80}, this vector travels in {due!r}")

    def _send(
        self,
        kind: str,
        body: Mapping[str, Any],
        vector: np.ndarray,
        layout: Any,
        noise: PayForNoise | None = None,
    ) -> bytes:
        """The masked upload of `vector`; in clear mode its coding without masks."""
        if self.agreement.clear:
            return layout.preflight(len(self.agreement.clients)).encode_clear(vector).tobytes()
        return self._machine(body["session"]).upload(
            body["message"], vector, layout=layout, context=digest(kind, body), noise=noise
        )

    # -- predictor -------------------------------------------------------------------------------------------------

    def _train(self, body: Mapping[str, Any]) -> bytes:
        plan, index = self.agreement.plan, body["round"]
        if index >= plan.rounds:
            raise Refusal("PlanExceeded", f"predictor round {index + 1}, the agreed plan has {plan.rounds}")
        if plan.training != "federated":
            # The noise of such a plan is right for the curator's releases, not for this client's own.
            raise Refusal("NotAllowed", f"predictor.training={plan.training}: clients send no updates")
        self._check_session(body, PREDICTOR)
        if self._state.get("predicted"):
            # The answered rounds are forgotten with the updates: answering again would be a release nobody paid for.
            raise Refusal("OutOfOrder", "the predictor is final; training is over")
        start = unpack_vector(
            body["parameters"], COORDINATOR, "train.parameters", self.agreement.predictor_size
        )
        asked = hashlib.sha256(body["parameters"]).digest()
        done = self._state["vector"]
        if done and done["round"] > index:
            raise ReplayedRound(COORDINATOR, f"predictor round {index + 1} was answered before")
        if done and done["round"] == index and done["asked"] != asked:
            raise ReplayedRound(COORDINATOR, f"predictor round {index + 1} was answered for other parameters")
        trainer = self._local_trainer()
        rows: list[dict[str, Any]] = []
        if self._ledger is not None and plan.noisy_rounds:
            # Rounds this client missed are paid for too: a later round's own event assumes that they took place.
            first = min(done["round"] + 1, index) if done else 0
            rows = [self._ledger.charge(f"predictor/{i + 1}", plan.event(i)) for i in range(first, index + 1)]
        if done and done["round"] == index:
            # Asked again after a crash of the coordinator: the same release.
            update = np.frombuffer(done["update"])
        else:
            update = trainer.round(start, index, self._model)
            self._state["vector"] = {"round": index, "asked": asked, "update": update.tobytes()}
        message = self._send("train", body, update, self.agreement.predictor_layout)
        return pack(REPLIES, "train", message=message, ledger=json.dumps(rows).encode())

    def _local_trainer(self) -> Trainer:
        if self._trainer is None:
            plan, context = self.agreement.plan, self._shares(self.agreement.plan.context)
            if plan.noisy_rounds:
                per_question = unpack_float(self._state.get("per_question", b""), "own store", "per_question")
                self._trainer = LocalTrainer(
                    plan, self._data, self._embeddings, context, per_question or 1.0,
                    self.agreement.question_order, self._state["noise_key"],
                )  # fmt: skip
            else:
                shares = self._shares(plan.train) if plan.private else raw_shares(self._data, plan.train)
                self._trainer = ShareTrainer(plan, self._embeddings, context, shares)
        return self._trainer

    def _freeze(self, body: Mapping[str, Any]) -> bytes:
        """Compute this group's predicted preferences once; afterwards neither predictor nor updates are kept."""
        vector = unpack_vector(
            body["parameters"], COORDINATOR, "freeze.parameters", self.agreement.predictor_size
        )
        if self._state["history"]:
            raise Refusal("OutOfOrder", "alignment has begun; the predictor cannot change any more")
        self._state["predicted"] = {q: p.tobytes() for q, p in self._predictions(vector, "freeze").items()}
        self._state["frozen"] = hashlib.sha256(body["parameters"]).hexdigest()
        self._state["vector"] = {}
        for kind in ("train", "truth"):  # their answers are out of date
            self._state["answered"].pop(kind, None)
        self._scoring.forget_targets()
        self._tuning = None
        return pack(REPLIES, "freeze")

    def _predictions(self, vector: np.ndarray, kind: str) -> dict[str, np.ndarray]:
        """This group's predicted preferences for every question under the predictor's parameters `vector` (P,)."""
        unflatten(self._model, vector)
        plan, asked = self.agreement.plan, self.agreement.question_order
        shares = self._shares(plan.context)
        points = context_points([self._embeddings[q] for q in shares], list(shares.values()))
        predicted = predict(self._model, points, [self._embeddings[q] for q in asked])
        if not all(np.isfinite(p).all() for p in predicted):
            raise RemoteMisbehaviour(COORDINATOR, f"{kind}: the predictor's answers are not finite numbers")
        return dict(zip(asked, predicted, strict=True))

    # -- alignment -------------------------------------------------------------------------------------------------

    def _targets(self) -> Scorer:
        return self._scoring.targets(self.agreement)

    def _score(self, body: Mapping[str, Any]) -> bytes:
        a = self.agreement
        self._check_session(body, a.reward_session(a.groups[self.client_id]))
        vector = self._scoring.vector(a, body)
        rows: list[dict[str, Any]] = []

        def pay() -> bytes:
            rows.append(self._scoring.charge_output(a, body))
            return subkey(self._state["noise_key"], "output-noise")

        message = self._send("score", body, vector, a.reward_layout(len(body["questions"])), pay)
        return pack(REPLIES, "score", message=message, ledger=json.dumps(rows).encode())

    def _policy(self, body: Mapping[str, Any]) -> bytes:
        """The policy that clients will train, and keep as the reference."""
        if self._state["history"]:
            raise Refusal("OutOfOrder", "alignment has begun; the reference policy cannot change any more")
        self._tuning = self._tuner(body)
        self._store.keep_policy(body)
        return pack(REPLIES, "policy")

    def _tuner(self, policy: Mapping[str, Any] | None) -> Tuner:
        key = self._state["noise_key"]
        return make_tuner(self.agreement, self._targets(), self._data, self._embeddings, policy, key)

    def _tune(self, body: Mapping[str, Any]) -> bytes:
        a, step = self.agreement, body["step"]
        self._check_session(body, SYSTEM)
        if self._tuning is None:
            self._tuning = self._tuner(self._store.policy())
        rollouts = read_rollouts(body, a)
        vector = unpack_vector(body["parameters"], COORDINATOR, "tune.parameters", self._tuning.asked)
        before, _ = self._scoring.committed(a, step, body["opened"])
        sent, after = self._tuning.contribution(vector, rollouts, before, step)
        self._state["history"].update(pending=pack_float(after), pending_step=step)
        return pack(
            REPLIES, "tune", message=self._send("tune", body, sent, a.system_layout(self._tuning.size))
        )

    # -- measurement -----------------------------------------------------------------------------------------------

    def _truth(self, body: Mapping[str, Any]) -> bytes:
        """True and predicted distributions, for measuring a simulation; refused where evaluation.truth is off.

        With parameters: the predictions they would give, so that training can be measured while it goes on.
        """
        if not self.agreement.truth:
            raise Refusal(
                "NotAllowed", "evaluation.truth is off at this site: true distributions never leave it"
            )
        known = {q: self._data.distribution(q) for q in self.agreement.questions if self._data.has(q)}
        if raw := body["parameters"]:
            size = self.agreement.predictor_size
            predicted = self._predictions(unpack_vector(raw, COORDINATOR, "truth.parameters", size), "truth")
        else:
            predicted = {q: np.frombuffer(p) for q, p in self._state.get("predicted", {}).items()}
        tables = {"distributions": known, "predictions": predicted}
        return pack(
            REPLIES, "truth",
            **{n: json.dumps({q: p.tolist() for q, p in t.items()}).encode() for n, t in tables.items()},
        )  # fmt: skip

    def _weight(self, body: Mapping[str, Any]) -> bytes:
        return pack(REPLIES, "weight", weight=self._scoring.weight(self.agreement, body["step"]))
