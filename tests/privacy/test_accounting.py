"""Accounting against Opacus itself, against another library, and against the calibrated target."""

import math

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant

from appa_secure.errors import PrivacyError
from appa_secure.privacy.accounting import GaussianEvent, calibrate, epsilon

DELTA = 1e-6
EVENTS = [
    [GaussianEvent(4.0, 1.0, 1)],
    [GaussianEvent(4.0, 1.0, 1), GaussianEvent(1.2, 0.1, 40)],
    [GaussianEvent(0.9, 0.02, 300), GaussianEvent(3.0, 1.0, 2)],
]


@pytest.mark.parametrize("events", EVENTS)
@pytest.mark.parametrize(("name", "accountant"), [("rdp", RDPAccountant), ("prv", PRVAccountant)])
@pytest.mark.filterwarnings("ignore:Optimal order is the")
def test_epsilon_is_what_opacus_computes_release_by_release(events, name, accountant) -> None:
    book = accountant()
    for event in events:
        for _ in range(event.count):
            book.step(noise_multiplier=event.noise_multiplier, sample_rate=event.sample_rate)
    assert epsilon(events, DELTA, name) == pytest.approx(book.get_epsilon(DELTA), rel=1e-9)


@pytest.mark.parametrize("events", EVENTS)
def test_prv_agrees_with_another_librarys_privacy_loss_distribution(events) -> None:
    book = PLDAccountant()
    for event in events:
        inner = dp_event.GaussianDpEvent(event.noise_multiplier)
        step = inner if event.sample_rate == 1 else dp_event.PoissonSampledDpEvent(event.sample_rate, inner)
        book.compose(step, event.count)
    truth = book.get_epsilon(DELTA)
    assert epsilon(events, DELTA, "prv") == pytest.approx(truth, rel=0.02)
    assert epsilon(events, DELTA, "rdp") >= 0.999 * truth  # RDP is an upper bound, and not a wild one
    assert epsilon(events, DELTA, "rdp") <= 1.25 * truth


def test_the_gaussian_mechanism_against_its_exact_formula() -> None:
    """Balle & Wang 2018, theorem 8: delta(eps) of one Gaussian release."""

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    sigma = 4.0
    for name in ("prv", "rdp"):
        eps = epsilon([GaussianEvent(sigma, 1.0, 1)], DELTA, name)
        delta = phi(0.5 / sigma - eps * sigma) - math.exp(eps) * phi(-0.5 / sigma - eps * sigma)
        assert delta <= DELTA * 1.001, name  # never under-stated
        assert delta >= DELTA / 50


@settings(max_examples=5, deadline=None)
@given(
    noise=st.floats(0.7, 20),
    rate=st.floats(0.01, 1),
    count=st.integers(1, 50),
    more=st.integers(1, 20),
    quieter=st.floats(1.01, 2),
    delta=st.sampled_from([1e-3, 1e-6, 1e-8]),
)
def test_more_releases_less_noise_and_smaller_delta_cost_more(
    noise, rate, count, more, quieter, delta
) -> None:
    base = epsilon([GaussianEvent(noise, rate, count)], delta, "rdp")
    slack = 1e-9
    assert epsilon([GaussianEvent(noise, rate, count + more)], delta, "rdp") >= base - slack
    assert epsilon([GaussianEvent(noise / quieter, rate, count)], delta, "rdp") >= base - slack
    assert epsilon([GaussianEvent(noise, rate, count)], delta / 10, "rdp") >= base - slack
    assert (
        epsilon([GaussianEvent(noise, rate, count), GaussianEvent(5.0, 1.0, 1)], delta, "rdp") >= base - slack
    )
    split = [GaussianEvent(noise, rate, 1)] * count  # merging equal events changes nothing
    assert epsilon(split, delta, "rdp") == pytest.approx(base, rel=1e-12)


def test_releases_nobody_takes_part_in_are_free() -> None:
    assert epsilon([], DELTA, "prv") == 0.0
    assert epsilon([GaussianEvent(1.0, 0.1, 0)], DELTA, "prv") == 0.0
    one = [GaussianEvent(2.0, 1.0, 1)]
    assert epsilon([*one, GaussianEvent(1.0, 0.1, 0)], DELTA, "prv") == epsilon(one, DELTA, "prv")


@pytest.mark.parametrize(
    ("target", "accountant", "rate", "count"),
    [
        (8.0, "rdp", 0.1, 60),
        (1.0, "rdp", 0.02, 200),
        (8.0, "prv", 1.0, 10),
        (1.0, "prv", 1.0, 5),
        (2.0, "prv", 0.1, 30),
    ],
)
def test_calibration_meets_its_target_from_below_and_wastes_no_noise(target, accountant, rate, count) -> None:
    fixed = [GaussianEvent(15.0, 1.0, 1)]
    noise = calibrate(target, DELTA, accountant, fixed, rate, count)
    assert epsilon([*fixed, GaussianEvent(noise, rate, count)], DELTA, accountant) <= target
    assert epsilon([*fixed, GaussianEvent(noise / 1.01, rate, count)], DELTA, accountant) > target


def test_calibration_refuses_what_cannot_be_reached() -> None:
    spent = [GaussianEvent(0.5, 1.0, 1)]
    with pytest.raises(PrivacyError, match="context_noise"):
        calibrate(1.0, DELTA, "rdp", spent, 0.1, 10)
    with pytest.raises(PrivacyError, match="no noise reaches"):
        calibrate(1e-6, DELTA, "rdp", [], 1.0, 100)


@pytest.mark.parametrize(
    ("event", "word"),
    [
        ((0.0, 0.1, 1), "noise_multiplier"), ((-1.0, 0.1, 1), "noise_multiplier"),
        ((math.nan, 0.1, 1), "noise_multiplier"), ((math.inf, 0.1, 1), "noise_multiplier"),
        ((1.0, 0.0, 1), "sample_rate"), ((1.0, 1.01, 1), "sample_rate"), ((1.0, 0.1, -1), "count"),
    ],
)  # fmt: skip
def test_impossible_events_are_refused_by_name(event, word) -> None:
    with pytest.raises(PrivacyError, match=word):
        GaussianEvent(*event)


def test_impossible_questions_are_refused() -> None:
    for delta in (0.0, 1.0, -1e-6, math.nan):
        with pytest.raises(PrivacyError, match="delta"):
            epsilon([GaussianEvent(1.0, 1.0, 1)], delta, "rdp")
    with pytest.raises(PrivacyError, match="'gdp'"):
        epsilon([GaussianEvent(1.0, 1.0, 1)], DELTA, "gdp")


@settings(max_examples=4, deadline=None)
@given(
    context=st.floats(2, 30),
    noise=st.floats(0.8, 20),
    rate=st.sampled_from([0.05, 0.1, 0.5, 1.0]),
    count=st.integers(1, 60),
    groups=st.integers(1, 3),
)
def test_three_accountants_agree_on_what_a_client_releases(context, noise, rate, count, groups) -> None:
    """Context and rounds, at one client or at the three a person may be counted in: PLD = PRV within 2 %, RDP above."""
    events = [GaussianEvent(context, 1.0, 1), GaussianEvent(noise, rate, count)] * groups
    book = PLDAccountant()
    for event in events:
        inner = dp_event.GaussianDpEvent(event.noise_multiplier)
        book.compose(
            inner if event.sample_rate == 1 else dp_event.PoissonSampledDpEvent(event.sample_rate, inner),
            event.count,
        )
    pld, prv, rdp = book.get_epsilon(DELTA), epsilon(events, DELTA, "prv"), epsilon(events, DELTA, "rdp")
    assert prv == pytest.approx(pld, rel=0.02, abs=0.02)
    assert prv <= rdp * 1.001 + 0.02


@pytest.mark.parametrize("name", ["prv", "rdp"])
def test_a_person_in_three_groups_loses_less_than_three_times_as_much(name) -> None:
    """Joint accounting against basic composition (sum of epsilons at the sum of deltas), which it must not exceed."""
    mine = [GaussianEvent(8.0, 1.0, 1), GaussianEvent(2.0, 0.1, 60)]
    alone, joint = epsilon(mine, DELTA, name), epsilon(mine * 3, DELTA, name)
    assert alone < joint < 3 * alone
