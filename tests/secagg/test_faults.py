"""Random fault schedules: the exact sum of the survivors with the culprits named, or a clean abort."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from appa_secure.secagg import (
    Aborted,
    Aggregate,
    BadEncoding,
    ClientMachine,
    Continue,
    CoordinatorMachine,
    EpochReady,
    Layout,
    RemoteMisbehaviour,
    Segment,
    policy,
    shamir,
    threshold_for,
)
from appa_secure.secagg.graph import Sharing
from appa_secure.secagg.wire import Envelope, parse
from tests.secagg.faults import ABSENT, LIES, MAYBE, PHASES, PRESENT, SETUP, Hit, Trial
from tests.secagg.world import CONTEXT, LAYOUT, SESSION, World

SMALL = Layout((Segment("reward", 3, 0.0, 1.0), Segment("history", 1, -2.0, 3.0)), 32)
ROUNDS = 16
# A set-up costs the square of n in signatures, so large federations are set up rarely and used for many rounds.
SIZES = (*range(3, 10), *range(3, 10), *range(3, 16), 13, 17, 24)
LARGE = (*range(3, 13), *range(3, 13), *range(3, 13), 16, 20, 30, 45, 60)

Schedule = tuple[Hit, ...]
seen: Counter[str] = Counter()


@st.composite
def schedules(draw: st.DrawFn, n: int, phases: tuple[str, ...]) -> Schedule:
    """Up to about a third of the parties hit at random, and in some schedules a crowd that falls silent at once."""
    kinds = [(phase, what) for phase in phases for what in (*ABSENT, *MAYBE, *PRESENT, *LIES[phase])]
    hit = st.tuples(st.sampled_from(kinds), st.integers(0, n - 1), st.integers(0, 2**16))
    drawn = draw(st.lists(hit, max_size=min(n // 3 + 1, 8)))
    hits = [Hit(phase, party, what, seed) for (phase, what), party, seed in drawn]
    crowd = draw(st.sampled_from((0, 0, 0, n // 6, n // 3, n // 3 + 1)))
    if crowd:
        phase, first = draw(st.sampled_from(phases)), draw(st.integers(0, n - 1))
        hits += [Hit(phase, first + i, "request lost") for i in range(crowd)]
    return tuple(hits)


@st.composite
def epochs(draw: st.DrawFn, sizes: tuple[int, ...] = SIZES) -> tuple[int, Schedule, Schedule, Schedule]:
    n = draw(st.sampled_from(sizes))
    rounds = schedules(n, PHASES[3:])
    return n, draw(schedules(n, SETUP) if draw(st.booleans()) else st.just(())), draw(rounds), draw(rounds)


@st.composite
def rounds(draw: st.DrawFn, sizes: tuple[int, ...] = LARGE) -> tuple[int, Schedule]:
    n = draw(st.sampled_from(sizes))
    return n, draw(schedules(n, PHASES[3:]))


def play(
    plan: tuple[int, Schedule, Schedule, Schedule], prepare: Callable[[World], None] | None = None
) -> tuple[Any, ...]:
    """A fresh federation, its set-up and two rounds, every claim checked."""
    n, setup, *both = plan
    world = World(n, layout=SMALL, rounds=2, seed=n)
    if prepare is not None:
        prepare(world)
    trial = Trial(world)
    outcomes: list[Any] = [trial.setup(setup)]
    if isinstance(outcomes[0], EpochReady):
        outcomes += [trial.round(r, hits) for r, hits in enumerate(both, start=1)]
    return tuple(outcomes)


class Standing:
    """Federations that stay set up, by size; a new epoch when their rounds are used up or a client is worn out."""

    def __init__(self) -> None:
        self.trials: dict[int, Trial] = {}
        self.epoch: Counter[int] = Counter()
        self.scarred: dict[int, set[str]] = {}

    def play(self, n: int, hits: Schedule) -> Any:
        trial = self.trials.get(n)
        if trial is None:
            trial = self.trials[n] = Trial(World(n, layout=SMALL, rounds=ROUNDS if n > 12 else 64, seed=n))
        coordinator = trial.world.coordinator
        if not coordinator.rounds_left or len(self.scarred[n]) > n // 8:
            if self.epoch[n]:
                coordinator.close_epoch()
            self.epoch[n] += 1
            self.scarred[n] = set()
            trial.touched = set()
            assert isinstance(trial.setup((), self.epoch[n]), EpochReady)
        # A request that was changed on its way may have moved its receiver to a later round.
        trial.touched, trial.liars = set(self.scarred[n]), set()
        outcome = trial.round(trial.world.coordinator.last_round + 1, hits)
        names = trial.world.names
        self.scarred[n] |= {names[hit.party % n] for hit in hits if hit.what in MAYBE}
        return outcome


standing, sparse_standing = Standing(), Standing()
speed = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)


def count(outcome: Any, hits: Schedule) -> None:
    seen["faulty" if hits else "quiet"] += 1
    seen[type(outcome).__name__] += 1
    if isinstance(outcome, Aggregate) and hits:
        seen["survived"] += 1
    if isinstance(outcome, Aborted):
        seen[f"aborted: {outcome.code}"] += 1


def try_epoch(plan: tuple[int, Schedule, Schedule, Schedule]) -> None:
    for outcome, hits in zip(play(plan), plan[1:], strict=False):
        count(outcome, hits)


def try_round(plan: tuple[int, Schedule]) -> None:
    count(standing.play(*plan), plan[1])


@settings(speed, max_examples=420)
@given(epochs())
def test_any_epoch_ends_in_exact_sums_or_clean_aborts(plan: tuple[int, Schedule, Schedule, Schedule]) -> None:
    try_epoch(plan)


@settings(speed, max_examples=600)
@given(rounds())
def test_any_round_ends_in_the_exact_sum_or_a_clean_abort(plan: tuple[int, Schedule]) -> None:
    try_round(plan)


def edit(outcome: Any, **changes: Any) -> Any:
    return replace(outcome, **changes) if isinstance(outcome, Aggregate) else outcome


def gives_up(outcome: Any) -> Any:
    if isinstance(outcome, Aggregate) and outcome.dropped:
        return Aborted("uploads", outcome.round, "BelowThreshold", "somebody is missing", (), outcome.faults)
    return outcome


BROKEN_OUTCOMES: dict[str, Callable[[Any], Any]] = {
    "the sum is off by one unit": lambda o: edit(o, ring_sum=getattr(o, "ring_sum", 0) + np.uint32(1)),
    "a dropped party is counted in": lambda o: (
        edit(o, contributors=tuple(sorted(o.contributors + o.dropped)), dropped=())
        if isinstance(o, Aggregate)
        else o
    ),
    "absences are not reported": lambda o: edit(o, faults=()),
    "liars are not named": lambda o: edit(o, culprits=()),
    "an innocent is a culprit": lambda o: edit(o, culprits=("site-00",)),
    "one dropout is too many": gives_up,
}


@pytest.mark.parametrize("change", BROKEN_OUTCOMES.values(), ids=BROKEN_OUTCOMES)
def test_a_broken_coordinator_is_found_out(
    change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = CoordinatorMachine.advance
    monkeypatch.setattr(CoordinatorMachine, "advance", lambda self: change(advance(self)))
    assert found_out()


def test_a_coordinator_that_crashes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    receive = CoordinatorMachine.receive

    def careless(self: CoordinatorMachine, sender: str, message: bytes) -> None:
        try:
            receive(self, sender, message)
        except BadEncoding as error:
            raise IndexError from error

    monkeypatch.setattr(CoordinatorMachine, "receive", careless)
    assert found_out()


def test_a_client_that_forgets_what_it_answered_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stores its state before a step instead of after it."""
    upload, stored = ClientMachine.upload, ClientMachine.export_state
    before: dict[int, bytes] = {}

    def late(self: ClientMachine, message: bytes, *args: Any, **kwargs: Any) -> bytes:
        before[id(self)] = stored(self)
        return upload(self, message, np.zeros(SMALL.size), **kwargs)

    monkeypatch.setattr(ClientMachine, "upload", late)
    monkeypatch.setattr(
        ClientMachine, "export_state", lambda self: before.pop(id(self), None) or stored(self)
    )
    assert found_out()


# Each breaks one or more of the broken machines here; the search alone meets a lie that matters only now and then.
TELLING: tuple[tuple[int, Schedule, Schedule, Schedule], ...] = (
    (4, (), (Hit("round", 0, "request lost"),), (Hit("unmask", 1, "wrong shares", 3),)),
    (6, (Hit("roster", 2, "other seeds"),), (), (Hit("round", 2, "request lost"),)),
    (9, (Hit("start", 2, "crash"),), (Hit("round", 1, "crash"), Hit("unmask", 0, "twice")), ()),
)


def found_out() -> bool:
    """Whether some schedule makes a claim fail; if none does, the claims are worth nothing."""

    def fails(plan: tuple[int, Schedule, Schedule, Schedule]) -> bool:
        try:
            play(plan)
        except Exception:
            return True
        return False

    if any(fails(plan) for plan in TELLING):
        return True
    try:
        find(
            epochs(),
            fails,
            settings=settings(speed, max_examples=400, phases=[Phase.generate], database=None),
        )
    except NoSuchExample:
        return False
    return True


def test_the_claims_hold_for_the_schedules_that_find_broken_machines() -> None:
    """Without a break nothing is found: the tests above do not succeed for another reason."""
    for plan in TELLING:
        play(plan)


@pytest.mark.parametrize("seed", range(4))
def test_a_low_order_key_costs_its_owner_only(seed: int) -> None:
    """Its bundle is refused with its name; relayed, it would make every honest client refuse the roster."""
    world = World(6)
    outcome = Trial(world).setup((Hit("propose", 0, "low-order key", seed),))
    assert isinstance(outcome, EpochReady)
    assert outcome.absent == ("site-00",)
    assert [(fault.party, fault.code) for fault in outcome.faults] == [("site-00", "WrongRoster")]


@pytest.mark.parametrize("lie", ["wrong shares", "one wrong share"])
@pytest.mark.parametrize("silent", [(), (0,)], ids=["all there", "one silent in the round"])
def test_a_wrong_share_that_was_not_needed_is_named_too(lie: str, silent: tuple[int, ...]) -> None:
    """A secret is opened with the shares of its first holders, by name; the others' are checked all the same."""
    world = World(7)
    trial = Trial(world)
    assert isinstance(trial.setup(()), EpochReady)
    hits = [Hit("round", party, "request lost") for party in silent]
    outcome = trial.round(1, (*hits, Hit("unmask", 6, lie)))
    assert isinstance(outcome, Aggregate)
    assert outcome.culprits == ("site-06",)


def test_a_dealer_whose_shares_do_not_belong_together_is_named_and_survived(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its last holder got a share that is on no polynomial with the others', with a true digest of it. Nobody else is
    blamed, and the secret still comes out of the others' shares."""
    world = World(7)
    honest, dealer = shamir.share, world.clients["site-02"]

    def crooked(*args: Any) -> np.ndarray:
        shares = honest(*args)
        shares[-1, :, 0] ^= 1
        return shares

    deal = dealer.deal_shares

    def deal_badly(message: bytes) -> bytes:
        with monkeypatch.context() as patch:
            patch.setattr(shamir, "share", crooked)
            return deal(message)

    monkeypatch.setattr(dealer, "deal_shares", deal_badly)
    assert isinstance(world.setup(), EpochReady)
    outcome = world.round(1)
    assert isinstance(outcome, Aggregate)
    assert outcome.culprits == ("site-02",)
    assert "do not belong together" in outcome.faults[0].reason
    np.testing.assert_array_equal(outcome.ring_sum, world.ring_sum(world.names))


# -- set-up: packets that do not open


def garbling(world: World, lies: dict[str, Sequence[str]]) -> None:
    """The liars' packets for those listed do not decrypt; everything about them that others can check is right."""

    def garble(name: str, envelope: Envelope) -> bytes:
        if envelope.type != "shares" or name not in lies:
            return envelope.raw
        packets = []
        for raw in envelope.body["packets"]:
            packet = parse(raw, name)
            broken = bytes(len(packet.body["ciphertext"]))
            garbled = world.reseal(packet, {**packet.body, "ciphertext": broken})
            packets.append(garbled if packet.body["to"] in lies[name] else raw)
        return world.reseal(envelope, {**envelope.body, "packets": packets})

    world.inbound = garble


def accusing(world: World, lies: dict[str, str]) -> None:
    """The liars say that somebody's packet does not open, which does."""

    def accuse(name: str, envelope: Envelope) -> bytes:
        if envelope.type != "ready" or name not in lies:
            return envelope.raw
        body = {"refused": "start", "code": "BadShare", "reason": "no", "accused": lies[name]}
        return world.reseal(envelope, body, type="refusal")

    world.inbound = accuse


@pytest.mark.parametrize("release", ["abort", "recover"])
def test_a_dealer_whose_packets_nobody_can_open_is_the_culprit(release: str) -> None:
    world = World(7, release=release)
    garbling(world, {"site-03": [name for name in world.names if name != "site-03"]})
    outcome = world.setup()
    assert isinstance(outcome, Aborted)
    assert (outcome.culprits, outcome.disputes) == (("site-03",), ())
    assert {f.accused for f in outcome.faults if f.kind == "refusal"} == {"site-03"}


@pytest.mark.parametrize("release", ["abort", "recover"])
def test_one_packet_that_does_not_open_is_a_dispute_of_two(release: str) -> None:
    """Nobody but its holder can tell, and the holder may lie: both are named, and nobody else."""
    outcomes = []
    for lie in (
        lambda w: garbling(w, {"site-03": ["site-01"]}),
        lambda w: accusing(w, {"site-01": "site-03"}),
    ):
        world = World(7, release=release)
        lie(world)
        outcomes.append(world.setup())
    for outcome in outcomes:
        assert isinstance(outcome, Aborted if release == "abort" else EpochReady)
        assert (outcome.culprits, outcome.disputes) == ((), (("site-01", "site-03"),))


def test_a_lone_accuser_takes_one_with_it_at_most() -> None:
    world = World(7)
    accusing(world, {"site-00": "site-04"})
    ready = world.setup()
    assert isinstance(ready, EpochReady)
    assert ready.disputes == (("site-00", "site-04"),)
    outcome = world.round(
        1
    )  # the accuser has not acknowledged; everybody else goes on, the accused among them
    assert isinstance(outcome, Aggregate)
    assert "site-04" in outcome.contributors


def test_accusations_of_oneself_of_strangers_or_for_other_reasons_count_for_nothing() -> None:
    world = World(7)
    accusing(world, {"site-00": "site-00", "site-01": "nobody"})
    ready = world.setup()
    assert isinstance(ready, EpochReady)
    assert (ready.culprits, ready.disputes) == ((), ())


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_leaving_out_culprits_and_disputed_pairs_ends_in_a_set_up(data: st.DataObject) -> None:
    """Liars, as many as an epoch stands, garble packets and accuse as they like. The coordinator starts again without
    whoever was named: no more honest clients are lost than liars, and every attempt loses a liar."""
    n = data.draw(st.integers(5, 12), label="n")
    world = World(n, rounds=1, seed=n)
    most = max(1, world.coordinator.parameters.sharing.corrupt)
    others = st.sets(st.sampled_from(world.names), min_size=1)
    garbled = data.draw(st.dictionaries(st.sampled_from(world.names), others, max_size=most), label="garbled")
    room = most - len(garbled)
    claims = st.dictionaries(st.sampled_from(world.names), st.sampled_from(world.names), max_size=room)
    accused = data.draw(claims, label="accused")
    liars = set(garbled) | set(accused)
    left, attempts = set(world.names), 0
    while True:
        garbling(world, {k: sorted(v) for k, v in garbled.items()})
        first = world.inbound
        accusing(world, accused)
        second = world.inbound
        world.inbound = lambda name, e, a=first, b=second: (b if e.type == "ready" else a)(name, e)
        attempts += 1
        outcome = world.setup(attempts)
        assert set(outcome.culprits) <= liars
        assert all(set(pair) & liars for pair in outcome.disputes)
        out = set(outcome.culprits).union(*outcome.disputes)
        if not out:
            assert isinstance(outcome, EpochReady)
            break
        assert out & liars
        left -= out
        if len(left) < 3 or not left - liars:
            break
        world.coordinator = CoordinatorMachine(
            SESSION,
            world.directory,
            clients=sorted(left),
            min_cohort=2,
            rounds=1,
            ring_bits=64,
            release="recover",
        )
    gone = set(world.names) - left
    assert len(gone - liars) <= len(gone & liars)
    assert attempts <= len(liars) + 1


# -- junk


def test_junk_does_not_fill_the_coordinators_memory() -> None:
    world = World(4)
    world.setup()
    step = world.coordinator.begin_round(1, CONTEXT, LAYOUT)
    genuine = {name: world.answer(name, message) for name, message in step.outbound.items()}
    for i in range(300):
        for sender in ("site-00", f"stranger-{i}" * 400):
            with pytest.raises(RemoteMisbehaviour):
                world.coordinator.receive(sender, b"\xff" * i)
    refusal = parse(
        world.clients["site-01"].refuse(step.outbound["site-01"], BadEncoding("coordinator", "no")), "site-01"
    )
    for i in range(50):
        body = {**refusal.body, "reason": f"{i}" * 50_000, "accused": "x" * 50_000}
        world.coordinator.receive("site-01", world.reseal(refusal, body))
    stored = len(world.coordinator.export_state())
    for name, reply in genuine.items():
        world.coordinator.receive(name, reply)
    faults = world.coordinator._epoch.faults
    kept = Counter(fault.party[:8] for fault in faults)
    assert kept == {"site-00": 4, "stranger": 4, "site-01": 4}
    assert sum(1 + fault.more for fault in faults) == 300 + 300 + 50
    assert stored < 60_000
    world.coordinator = CoordinatorMachine.restore(world.coordinator.export_state(), world.directory)
    assert world.coordinator._epoch.faults == faults
    outcome = world.coordinator.advance()
    assert isinstance(outcome, Continue)


def test_junk_in_a_clients_name_does_not_hide_its_accusation() -> None:
    """What anybody can send is counted apart from what the client signed."""
    world = World(7)
    garbling(world, {"site-03": [name for name in world.names if name != "site-03"]})
    first = world.inbound

    def flood(name: str, envelope: Envelope) -> bytes | None:
        if world.coordinator.state.value == "acks":
            for _ in range(20):
                with pytest.raises(RemoteMisbehaviour):
                    world.coordinator.receive(name, b"junk")
        return first(name, envelope)

    world.inbound = flood
    outcome = world.setup()
    assert isinstance(outcome, Aborted)
    assert outcome.culprits == ("site-03",)


# -- the sparse graph


@contextmanager
def sparse_graph(n: int) -> Iterator[None]:
    """Nine holders each for n parties, so that a federation of two dozen has a sparse graph; failure probabilities play
    no part in whether sums are exact and liars named."""
    t = threshold_for(n)
    sharing = Sharing(degree=8, threshold=6, quorum=t, acks=t, smallest_group=2, corrupt=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "COMPLETE_UP_TO", 10)
        patch.setattr(policy, "sparse", lambda parties: sharing)
        yield


SPARSE = (14, 18, 24)


def try_sparse_epoch(plan: tuple[int, Schedule, Schedule, Schedule]) -> None:
    with sparse_graph(plan[0]):
        try_epoch(plan)


def try_sparse_round(plan: tuple[int, Schedule]) -> None:
    with sparse_graph(plan[0]):
        count(sparse_standing.play(*plan), plan[1])


@settings(speed, max_examples=25)
@given(epochs(SPARSE))
@example((14, tuple(Hit("roster", party, "request lost", 0) for party in range(4)), (), ()))
def test_any_epoch_on_a_sparse_graph(plan: tuple[int, Schedule, Schedule, Schedule]) -> None:
    try_sparse_epoch(plan)


@settings(speed, max_examples=150)
@given(rounds(SPARSE))
def test_any_round_on_a_sparse_graph(plan: tuple[int, Schedule]) -> None:
    try_sparse_round(plan)


@pytest.mark.bench
@pytest.mark.timeout(7200)
def test_twenty_thousand_schedules() -> None:
    """The two tests of random schedules, at length; says how they ended."""
    began = time.monotonic()
    seen.clear()
    settings(speed, max_examples=6_000)(given(epochs())(try_epoch))()
    settings(speed, max_examples=11_500)(given(rounds())(try_round))()
    settings(speed, max_examples=500)(given(epochs(SPARSE))(try_sparse_epoch))()
    settings(speed, max_examples=1_900)(given(rounds(SPARSE))(try_sparse_round))()
    settings(speed, max_examples=100)(
        given(rounds((101, 120)))(try_round)
    )()  # real parameters, nothing replaced
    print(f"\n20,000 schedules in {time.monotonic() - began:.0f} s: {dict(seen.most_common())}", end="")
    assert seen["survived"] > 5_000
    assert seen["Aborted"] > 500
