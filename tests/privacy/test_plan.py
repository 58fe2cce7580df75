"""The training plan: what is asked when, and how often one unit can take part."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appa_secure.privacy.accounting import GaussianEvent
from tests.clients.world import make_plan

plans = st.builds(
    lambda questions, context, per_step, steps, unit, seed: make_plan(
        [f"t{i}" for i in range(questions)], [f"c{i}" for i in range(context)], rounds=6, local_steps=steps,
        questions_per_step=min(per_step, questions), unit=unit, seed=seed,
    ),
    st.integers(1, 25), st.integers(1, 6), st.integers(1, 12), st.integers(1, 4),
    st.sampled_from(["response", "record", "respondent"]), st.integers(0, 5),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(plans)
def test_every_question_occurs_once_per_pass(plan) -> None:
    asked = [step for r in range(plan.rounds) for step in plan.steps(r)]
    assert len(asked) == plan.rounds * plan.local_steps
    for start in range(0, len(asked) - plan.steps_per_pass + 1, plan.steps_per_pass):
        seen = Counter(q for questions in asked[start : start + plan.steps_per_pass] for q in questions)
        assert seen == Counter(plan.train)
    for questions in asked:
        assert 1 <= len(questions) <= plan.questions_per_step


@settings(max_examples=150, deadline=None)
@given(plans)
def test_participations_are_the_most_any_question_is_asked(plan) -> None:
    seen: Counter[str] = Counter()
    steps = 0
    assert plan.participations(0) == 0
    for done in range(1, plan.rounds + 1):
        for questions in plan.steps(done - 1):
            seen.update(questions)
            steps += 1
        # A person may have answered everything, and so be drawn in every step.
        assert plan.participations(done) == (steps if plan.unit == "respondent" else max(seen.values()))


@settings(max_examples=60, deadline=None)
@given(plans, st.integers(2, 5))
def test_clients_that_take_turns_are_charged_for_their_own_steps_alone(plan, turns: int) -> None:
    """In each cycle of `turns` rounds a client has one turn; which one makes no difference."""
    shared = replace(plan, turns=turns, rounds=plan.rounds * turns, training="one_group")
    for cycle in range(plan.rounds):
        for place in range(turns):
            assert shared.steps(cycle * turns + place) == plan.steps(cycle)
            assert shared.event(cycle * turns + place) == plan.event(cycle)
        # A cycle that has begun is counted whole: its turn may have been.
        assert shared.participations(cycle * turns + 1) == plan.participations(cycle + 1)


@settings(max_examples=60, deadline=None)
@given(plans)
def test_the_rounds_events_add_up_to_the_plan(plan) -> None:
    events = [plan.event(r) for r in range(plan.rounds)]
    assert sum(e.count for e in events) == plan.participations(plan.rounds)
    assert all(e == GaussianEvent(plan.noise_multiplier, plan.sample_rate, e.count) for e in events)


def test_the_schedule_changes_with_the_seed_and_the_pass_and_nothing_else() -> None:
    train = [f"t{i}" for i in range(12)]
    plan = make_plan(train, ["c0", "c1", "c2"], questions_per_step=6, rounds=8)
    assert plan.steps(0) == make_plan(
        train, ["c0", "c1", "c2"], questions_per_step=6, rounds=8, run="other"
    ).steps(0)
    assert plan.steps(0) != make_plan(
        train, ["c0", "c1", "c2"], questions_per_step=6, rounds=8, seed=2
    ).steps(0)
    assert plan.steps(0)[0] != plan.steps(2)[0]  # another pass, another order


@pytest.mark.parametrize(
    ("unit", "expected"), [("response", 0.4 * 30 * 5), ("respondent", 0.4 * 30 * 5), ("record", 0.4 * 5)]
)
def test_expected_batch_counts_sampled_terms(unit: str, expected: float) -> None:
    assert make_plan(["t"], ["c"], unit=unit).expected_batch(30.0, 5) == pytest.approx(expected)
