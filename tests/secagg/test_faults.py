"""Random fault schedules: the exact sum of the survivors with the culprits named, or a clean abort."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from appa_secure.secagg import (
    Aborted,
    Aggregate,
    BadEncoding,
    ClientMachine,
    CoordinatorMachine,
    EpochReady,
    Layout,
    Segment,
)
from tests.secagg.faults import ABSENT, LIES, MAYBE, PHASES, PRESENT, SETUP, Hit, Trial
from tests.secagg.world import World

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
def epochs(draw: st.DrawFn) -> tuple[int, Schedule, Schedule, Schedule]:
    n = draw(st.sampled_from(SIZES))
    rounds = schedules(n, PHASES[3:])
    return n, draw(schedules(n, SETUP) if draw(st.booleans()) else st.just(())), draw(rounds), draw(rounds)


@st.composite
def rounds(draw: st.DrawFn) -> tuple[int, Schedule]:
    n = draw(st.sampled_from(LARGE))
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


standing = Standing()
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


@pytest.mark.xfail(
    strict=True,
    reason="a secret is opened with the shares of its first holders, by name, as many as the threshold: the others are "
    "not compared with their digests unless a secret fails, so a liar among them does no harm and is not named",
)
def test_a_wrong_share_that_was_not_needed_is_named_too() -> None:
    world = World(6)
    trial = Trial(world)
    assert isinstance(trial.setup(()), EpochReady)
    outcome = trial.round(1, (Hit("unmask", 5, "wrong shares"),))
    assert isinstance(outcome, Aggregate)
    assert outcome.culprits == ("site-05",)


@pytest.mark.bench
@pytest.mark.timeout(7200)
def test_twenty_thousand_schedules() -> None:
    """The two tests of random schedules, at length; says how they ended."""
    began = time.monotonic()
    seen.clear()
    settings(speed, max_examples=6_000)(given(epochs())(try_epoch))()
    settings(speed, max_examples=14_000)(given(rounds())(try_round))()
    print(f"\n20,000 schedules in {time.monotonic() - began:.0f} s: {dict(seen.most_common())}", end="")
    assert seen["survived"] > 5_000
    assert seen["Aborted"] > 500
