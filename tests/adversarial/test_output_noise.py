"""Participation differencing of a whole client's rewards, under every release policy.

The coordinator has the rollouts scored twice, the second time claiming that the victim dropped out. Few institutions in
blind mode: under `recover` the difference is the victim's vector; under `abort` there is no second sum; under `noise`
both sums exist, are paid for, and tell worlds apart no better than the budget's (ε, δ) allows.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from appa_secure.aggregation import AggregationSpec, combine
from appa_secure.agreement import REWARD
from appa_secure.journal import read_journal
from appa_secure.messages import REPLIES, REQUESTS, Message, pack, unpack
from appa_secure.privacy.accounting import GaussianEvent, epsilon
from appa_secure.privacy.ledger import check_rows
from appa_secure.privacy.output import plan_output
from appa_secure.secagg import Aggregate, Layout, OutputNoise, Segment
from appa_secure.secagg.wire import peek
from clients.scoring import parsed
from coordinator.rounds import NotOpened, Rounds, Summed
from tests.clients.drive import score_body
from tests.clients.world import World, make_world
from tests.coordinator.test_rounds import ready, reward_sum, update_sum
from tests.secagg.world import World as Protocol

VICTIM = "g2"


def without_the_victim(client: str, request: Message) -> bool:
    return client == VICTIM and request.kind == "score"


def noisy(root: Path, budget: float = 8.0, releases: int = 4, **changes: object) -> World:
    plan = plan_output(budget, 1e-6, releases, 3, 1)  # 5 groups, threshold 4, one of them may collude
    return ready(root, output=plan, release=changes.pop("release", "noise"), **changes)


def both_sums(world: World, rounds: Rounds, times: int = 1) -> tuple[Summed | NotOpened, Summed | NotOpened]:
    """The sum over everybody and the one without the victim, of the same rollouts, `times` over."""
    body = score_body(world)
    body |= {name: body[name] * times for name in ("questions", "answers")}
    layout = world.agreement.reward_layout(2 * times)
    everybody = rounds.sum(REWARD, "score", body, layout)
    world.lose = without_the_victim
    partial = rounds.sum(REWARD, "score", body, layout)
    world.lose = None
    return everybody, partial


def victims_rewards(world: World) -> np.ndarray:
    scorer = world.members[VICTIM]._targets()
    body = score_body(world)
    return scorer.score(body["questions"], parsed(body, world.agreement))


# -- the attack on a blind run of five groups ----------------------------------------------------------------


def test_under_recover_the_difference_is_the_victims_rewards(tmp_path: Path) -> None:
    world = ready(tmp_path, release="recover")
    with world.run_dir() as run:
        everybody, partial = both_sums(world, world.rounds(run))
    assert isinstance(everybody, Summed)
    assert isinstance(partial, Summed)
    np.testing.assert_allclose((everybody.sum - partial.sum)[:2], victims_rewards(world), atol=1e-9)


@pytest.mark.parametrize("with_noise", [False, True])
def test_under_abort_there_is_no_second_sum(tmp_path: Path, with_noise: bool) -> None:
    world = noisy(tmp_path, release="abort") if with_noise else ready(tmp_path, release="abort")
    with world.run_dir() as run:
        everybody, partial = both_sums(world, world.rounds(run))
    assert isinstance(everybody, Summed)
    assert isinstance(partial, NotOpened)


def test_under_noise_the_difference_has_the_noise_of_both_sums(tmp_path: Path) -> None:
    """Not the victim's noise alone, which is all that would be left if a repeated question had the same noise."""
    world, times = noisy(tmp_path), 60
    coding = world.agreement.reward_layout(2 * times).preflight(5)
    with world.run_dir() as run:
        everybody, partial = both_sums(world, world.rounds(run), times)
    assert isinstance(everybody, Summed)
    assert isinstance(partial, Summed)
    assert partial.dropped == (VICTIM,)
    found = (everybody.sum - partial.sum)[: 2 * times]
    off = (found - np.tile(victims_rewards(world), times)) / coding.noise_std(9)[: 2 * times]
    # Standard normal if the noise is that of five and four clients; a ninth of the variance for the victim's alone.
    assert 1e-4 < stats.chi2.cdf((off**2).sum(), len(off)) < 1 - 1e-4


def test_every_opened_sum_is_paid_for_and_the_last_is_the_last(tmp_path: Path) -> None:
    """Asking for one step again and again is charged each time, until every client refuses."""
    world = noisy(tmp_path, releases=3)
    with world.run_dir() as run:
        rounds = world.rounds(run)
        for number in range(1, 4):
            assert isinstance(reward_sum(world, rounds), Summed)
            rows = read_journal(world.root / "clients" / VICTIM / "output_ledger.jsonl")
            assert len(rows) == number
        refused = reward_sum(world, rounds)
    assert isinstance(refused, NotOpened)
    assert refused.unpaid
    assert "secagg.output_epsilon=8.0" in refused.reason
    assert {(row["unit"], row["adjacency"]) for row in rows} == {("client", "replace")}
    assert check_rows(rows)[VICTIM] <= 8.0
    assert rows[-1]["epsilon"] == epsilon([world.agreement.output.event] * 3, 1e-6, "rdp")


def test_it_is_paid_before_the_upload_leaves_and_refused_before_anything_is_made(tmp_path: Path) -> None:
    world = noisy(tmp_path, releases=1)
    ledger = world.root / "clients" / VICTIM / "output_ledger.jsonl"
    with world.run_dir() as run:
        rounds = world.rounds(run)
        assert isinstance(reward_sum(world, rounds), Summed)
        machine = world.members[VICTIM]._machines[REWARD]
        before = machine.export_state()
        assert isinstance(reward_sum(world, rounds), NotOpened)
        assert machine.export_state() == before  # no upload of the second round exists anywhere
    assert len(read_journal(ledger)) == 1
    # Every upload that left came with the row that paid for it.
    for client, request, reply in world.watched:
        if reply is None or unpack(REQUESTS, request, "test").kind != "score":
            continue
        answer = unpack(REPLIES, reply, client)
        if answer.kind == "score":
            (row,) = read_journal(world.root / "clients" / client / "output_ledger.jsonl")
            assert row["release"].encode() in answer.body["ledger"]


def test_a_client_killed_at_any_moment_repeats_its_upload_and_pays_once(tmp_path: Path) -> None:
    """After the payment, before the state is stored: the restarted client makes the same bytes for the same row."""
    world = noisy(tmp_path)
    store, answered = world.root / "clients" / VICTIM / "state.cbor", []
    with world.run_dir() as run:
        rounds = world.rounds(run)
        assert isinstance(reward_sum(world, rounds), Summed)
        kept = store.read_bytes()

        def killed(client: str, request: Message) -> bool:
            if client != VICTIM or request.kind != "score":
                return False
            raw = pack(REQUESTS, "score", **request.body)
            answered.append(unpack(REPLIES, world.members[VICTIM].handle(raw), VICTIM))
            store.write_bytes(kept)  # the payment is on disk, the answer is not
            answered.append(unpack(REPLIES, world.start(VICTIM).handle(raw), VICTIM))
            return True

        world.lose = killed
        reward_sum(world, rounds, 2, 1)
    assert answered[0].kind == "score"
    assert answered[0].body["message"] == answered[1].body["message"]
    assert json.loads(answered[0].body["ledger"]) == json.loads(answered[1].body["ledger"])
    assert len(read_journal(world.root / "clients" / VICTIM / "output_ledger.jsonl")) == 2


def test_predictor_updates_have_no_output_noise_and_are_opened_whole_only(tmp_path: Path) -> None:
    world = noisy(tmp_path)
    assert world.agreement.predictor_release == "abort"
    with world.run_dir() as run:
        world.lose = lambda client, request: client == VICTIM and request.kind == "train"
        untrained = make_world(tmp_path / "untrained", output=world.agreement.output, release="noise")
        untrained.set_up()
        untrained.lose = world.lose
        found = update_sum(untrained, untrained.rounds(run))
    assert isinstance(found, NotOpened)
    assert VICTIM in found.reason


def test_another_context_in_the_same_round_would_be_another_payment_and_other_noise(tmp_path: Path) -> None:
    """Noise is a function of everything the upload depends on, so no two uploads differ by their vectors alone."""
    world = Protocol(
        6, release="noise", layout=Layout((Segment("v", 50, 0.0, 1.0),), 64, OutputNoise(2.0, 4))
    )
    world.setup()
    keys = {
        world.noise_key("site-00", 1), world.noise_key("site-00", 2), world.noise_key("site-01", 1),
        world.noise_key("site-00", 1, bytes(32)),
    }  # fmt: skip
    assert len(keys) == 4


# -- the bound -----------------------------------------------------------------------------------------------

HONEST, PARTIES, SIZE, ROUNDS = 3, 6, 40, 120


def advantage_allowed(multiplier: float, releases: int) -> float:
    """The most that true and false positive rate of any test can differ: over the (ε, δ) of the accountant."""
    best = 1.0
    for delta in (1e-6, 1e-3, 1e-2, 0.03, 0.1, 0.2):
        e = epsilon([GaussianEvent(multiplier, 1.0, releases)], delta, "rdp")
        best = min(best, (math.exp(e) - 1 + 2 * delta) / (math.exp(e) + 1))
    return best


@pytest.mark.parametrize("multiplier", [1.0, 3.0])
def test_the_best_attacker_is_within_the_bound(multiplier: float) -> None:
    """It knows every other client's vector and noise but those of the fewest honest survivors, chooses who drops out,
    and tests two worlds in which the victim sends the two ends of the layout. Nobody in its position can do more: the
    likelihood ratio of (almost) Gaussian sums is the sum of the entries."""
    layout = Layout((Segment("v", SIZE, 0.0, 1.0),), 64, OutputNoise(multiplier, HONEST))
    world = Protocol(PARTIES, release="noise", layout=layout, colluders=1, rounds=ROUNDS)
    world.setup()
    coding, victim, colluder = layout.preflight(PARTIES), world.names[0], world.names[-1]
    guesses: dict[float, list[float]] = {0.0: [], 1.0: []}
    for number in range(1, ROUNDS + 1):
        world.vectors[victim] = np.full(SIZE, float(number % 2))
        # Threshold 4 of 6: two claimed dropouts, and one survivor is the coordinator's own.
        world.inbound = lambda n, e: None if e.type == "upload" and n in world.names[1:3] else e.raw
        opened = world.round(number)
        assert isinstance(opened, Aggregate)
        assert len(opened.contributors) == HONEST + 1
        own = coding.encode(world.vectors[colluder])
        coding.add_noise(own, world.noise_key(colluder, number))
        others = coding.add([coding.encode(world.vectors[n]) for n in world.names[3:5]])
        left = (opened.ring_sum - own - others).view(np.int64)
        guesses[float(number % 2)].append(float(left.sum()))
    middle = SIZE * 2 ** coding.bits[0] / 2
    hits = sum(g > middle for g in guesses[1.0]) + sum(g <= middle for g in guesses[0.0])
    # true - false positive rate is 2 * accuracy - 1 for a threshold in the middle
    lowest = 2 * stats.binomtest(hits, ROUNDS).proportion_ci(0.999).low - 1
    assert lowest <= advantage_allowed(multiplier, 1)
    # And it is the bound of the mechanism, not some larger noise: near 2 Φ(1 / 2z) - 1.
    expected = 2 * stats.norm.cdf(1 / (2 * multiplier)) - 1
    assert abs(2 * hits / ROUNDS - 1 - expected) < 4 * 2 * math.sqrt(0.25 / ROUNDS)


def test_what_is_estimated_of_a_victim_is_off_by_the_noise_at_least() -> None:
    """The same attacker estimates the vector instead: its error has the standard deviation that was promised."""
    layout = Layout((Segment("v", 2000, 0.0, 1.0),), 64, OutputNoise(2.0, HONEST))
    world = Protocol(PARTIES, release="noise", layout=layout, colluders=1, rounds=1)
    world.setup()
    coding, colluder = layout.preflight(PARTIES), world.names[-1]
    world.inbound = lambda n, e: None if e.type == "upload" and n in world.names[1:3] else e.raw
    opened = world.round(1)
    assert isinstance(opened, Aggregate)
    own = coding.encode(world.vectors[colluder])
    coding.add_noise(own, world.noise_key(colluder, 1))
    known = coding.add([own, *(coding.encode(world.vectors[n]) for n in world.names[3:5])])
    error = (opened.ring_sum - known - coding.encode(world.vectors[world.names[0]])).view(np.int64)
    promised = 2.0**2 * coding.distance_squared
    assert (error.astype(float) ** 2).sum() / promised >= stats.chi2.ppf(1e-4, 2000)


# -- rewards from noisy sums ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["appa", "average", "lse", "maximin"])
@pytest.mark.parametrize("a", [-4.0, 0.0, 1.0])
def test_whatever_the_noise_the_result_is_a_result(kind: str, a: float) -> None:
    """Rewards, fairness index and soft minimum stay in their ranges, for sums far out of theirs."""
    spec, rng = AggregationSpec(kind=kind, tau=1.0, a=a), np.random.default_rng(3)
    from appa_secure.aggregation import segments

    size = sum(part[1] for part in segments(spec, 7))
    for scale in (1e-3, 1.0, 1e3):
        for _ in range(50):
            sums = rng.normal(0, scale, size) * 8
            found = combine(spec, sums, 7, 8, noisy=True)
            assert ((found.rewards >= 0) & (found.rewards <= 1)).all()
            assert 1 / 8 - 1e-9 <= found.fi <= 1
            assert 0 <= found.h_mean <= 1
            assert 1 / 8 - 1e-9 <= found.h_jain <= 1
            if kind == "appa":
                assert -1e-9 <= found.soft_min <= 1 + 1e-9
                assert 0 < found.z_next <= 8
    with pytest.raises(ValueError, match="leaves"):
        combine(spec, np.full(size, 1e4), 7, 8)


def test_the_round_request_names_the_release(tmp_path: Path) -> None:
    world = noisy(tmp_path)
    with world.run_dir() as run:
        assert isinstance(reward_sum(world, world.rounds(run)), Summed)
    (row,) = read_journal(world.root / "clients" / VICTIM / "output_ledger.jsonl")
    requests = [unpack(REQUESTS, q, "t") for c, q, _ in world.watched if c == VICTIM]
    (asked,) = [r for r in requests if r.kind == "score"]
    round_ = peek(asked.body["message"])
    assert row["release"].startswith(f"{REWARD}/{round_.epoch}/{round_.round}/")
