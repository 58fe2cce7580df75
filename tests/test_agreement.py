"""The agreement: everything safety depends on is in the digest, and each client's policies come from it."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from appa_secure.aggregation import AggregationSpec, segments
from appa_secure.agreement import (
    PREDICTOR,
    REWARD,
    SYSTEM,
    Agreement,
    context_multiplier,
    make_agreement,
    make_plan,
)
from appa_secure.config import Config, compose
from appa_secure.data import Question, Split
from appa_secure.errors import ConfigError, PrivacyError
from appa_secure.predictor import PreferencePredictor
from appa_secure.privacy.accounting import GaussianEvent, epsilon
from appa_secure.privacy.ledger import Budget
from appa_secure.secagg.keys import Directory, IdentityKey
from appa_secure.secagg.policy import threshold_for
from appa_secure.systems import SystemSpec
from tests.clients.world import SHAPE, make_questions, make_world

QUESTIONS = make_questions(20)
SPLIT = Split(*(tuple(q.qid for q in part) for part in (QUESTIONS[:4], QUESTIONS[4:16], QUESTIONS[16:])))


@pytest.fixture
def agreement(tmp_path: Path):
    return make_world(tmp_path).agreement


def config(**privacy) -> Config:
    return Config.model_validate(
        {"privacy": {"accountant": "rdp", **privacy}, "predictor": {"rounds": 30, "questions_per_step": 4}}
    )


def test_every_agreed_field_changes_the_digest(agreement) -> None:
    other_key = IdentityKey.from_seed(bytes(32)).public_bytes()
    keys = {c: agreement.directory[c] for c in agreement.clients}
    changes = {
        "context_noise": 5.0, "reward": "js", "mode": "clear", "release": "recover", "threshold": 0.8,
        "min_cohort": 4, "ring_bits": 32, "rounds_per_epoch": 5, "embedder": "hf",
        "groups": {**agreement.groups, "g0": "g1"},
        "directory": Directory({**keys, "g0": other_key}),
        "questions": {q: replace(x, text=f"Well, {x.text}") for q, x in agreement.questions.items()},
    }  # fmt: skip
    changed = [replace(agreement, **{name: value}) for name, value in changes.items()]
    plans = {
        "run": "x", "seed": 2, "train": ("q4",), "context": ("q0",), "rounds": 9, "local_steps": 2,
        "clip": 2.0, "questions_per_step": 2, "lr": 0.2, "private": False,
        "unit": "record",
        "sample_rate": 0.1, "noise_multiplier": 1.0, "answers_per_unit": 7, "mechanism": "histogram",
        "training": "pooled", "turns": 5,
    }  # fmt: skip
    assert {f.name for f in fields(agreement.plan)} == set(plans)
    changed += [replace(agreement, plan=replace(agreement.plan, **{k: v})) for k, v in plans.items()]
    budgets = [(1, 1e-6, "rdp", "response"), (1e3, 1e-5, "rdp", "response"),
               (1e3, 1e-6, "prv", "response"), (1e3, 1e-6, "rdp", "record")]  # fmt: skip
    changed += [replace(agreement, budget=Budget(*b)) for b in budgets]
    specs = [AggregationSpec(kind="min"), AggregationSpec(variant="paper"), AggregationSpec(decay=0.5)]
    changed += [replace(agreement, aggregation=spec) for spec in specs]
    changed.append(replace(agreement, predictor=replace(SHAPE, ff=9)))
    changed += [replace(agreement, max_weight=100), replace(agreement, true_rewards=True)]
    changed.append(replace(agreement, origin="ab"))
    systems = {
        "kind": "sft", "beta": 0.2, "eta": 0.2, "contrast": 9.0, "local_steps": 2, "lr": 0.2, "clip": 2.0, "ratio_clip": 0.3,
        "kl_coef": 0.1, "human_weight": 2.0, "format_reward": 0.0, "labels": "raw", "generations": 4, "temperature": 0.5,
        "clusters": 3, "free_rounds": 1, "style": "instruct", "adapter": "{}",
    }  # fmt: skip
    assert {f.name for f in fields(agreement.system)} == set(systems)
    changed += [replace(agreement, system=replace(agreement.system, **{k: v})) for k, v in systems.items()]
    for options in (("option 0", "else"), ("option 1", "option 0")):
        question = Question("q0", "Question 0?", options, (0, 1))
        changed.append(replace(agreement, questions={**agreement.questions, "q0": question}))
    reordered = dict(reversed(list(agreement.questions.items())))  # respondents' rows refer to positions
    changed.append(replace(agreement, questions=reordered))
    digests = [a.digest() for a in changed]
    assert agreement.digest() not in digests
    assert len(set(digests)) == len(digests)


def test_what_is_each_sites_own_is_not_agreed(agreement) -> None:
    assert replace(agreement, truth=True).digest() == agreement.digest()
    assert replace(agreement, secure_rng=True).digest() == agreement.digest()
    assert (
        replace(agreement, version=2, period=1).digest() == agreement.digest()
    )  # the founding one is agreed
    agreed = {f.name for f in fields(agreement)} - {"truth", "secure_rng", "version", "period"}
    assert agreed == {
        "plan", "budget", "context_noise", "questions", "reward", "aggregation", "predictor", "groups",
        "directory", "mode", "release", "threshold", "min_cohort", "ring_bits", "rounds_per_epoch",
        "embedder", "output", "max_weight", "true_rewards", "system", "origin",
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "session"), [("appa", REWARD), ("grdpo", SYSTEM), ("maxmin", SYSTEM)])
def test_in_blind_mode_nothing_of_one_group_is_opened_without_all(agreement, kind: str, session: str) -> None:
    agreement = replace(agreement, system=SystemSpec(kind=kind))
    sessions = agreement.sessions("g0")
    assert set(sessions) == {PREDICTOR, session}
    for directory, policy in sessions.values():
        assert policy.release == "abort"
        assert policy.min_cohort == agreement.min_cohort
        assert policy.threshold_fraction == agreement.threshold
        assert policy.ring_bits == agreement.ring_bits
        assert set(directory) == set(agreement.clients)


def test_members_private_updates_may_be_opened_without_all_but_not_their_raw_ones(tmp_path: Path) -> None:
    a = make_world(tmp_path, groups=2, members=3, mode="cohort", release="abort").agreement
    assert a.sessions("g0 #0")[PREDICTOR][1].release == "recover"
    without_noise = replace(a, plan=replace(a.plan, private=False))
    assert without_noise.sessions("g0 #0")[PREDICTOR][1].release == "abort"
    assert a.sessions("g0 #0")["reward/g0"][1].release == "abort"


def test_a_cohort_sums_inside_the_group_only(tmp_path: Path) -> None:
    a = make_world(tmp_path, groups=2, members=3, mode="cohort", release="recover").agreement
    sessions = a.sessions("g1 #0")
    assert set(sessions) == {PREDICTOR, "reward/g1"}
    assert set(sessions["reward/g1"][0]) == {"g1 #0", "g1 #1", "g1 #2"}
    assert set(sessions[PREDICTOR][0]) == set(a.clients)
    assert a.reward_session("g1") == "reward/g1"
    assert a.reward_layout(7).size == 7


def test_sessions_have_names_of_their_own(agreement) -> None:
    other_run = replace(agreement, plan=replace(agreement.plan, run="other"))
    names = [
        a.session_id(s) for a in (agreement, other_run) for s in (PREDICTOR, REWARD, "reward/g0", "reward/g1")
    ]
    assert len(set(names)) == len(names)
    assert all(len(name) == 16 for name in names)


@pytest.mark.parametrize(
    "spec",
    [AggregationSpec(kind=k) for k in ("average", "min", "max", "appa")] + [AggregationSpec(variant="paper")],
)
def test_layouts_cover_what_clients_send_with_headroom(agreement, spec) -> None:
    a = replace(agreement, aggregation=spec)
    layout = a.reward_layout(6)
    assert [(s.name, s.size, s.lo, s.hi) for s in layout.segments] == [*segments(spec, 6)]
    coding = layout.preflight(8)  # refuses where a sum could wrap or too few bits are left
    assert (coding.error_bound[:6] < 1e-12).all()  # the rewards themselves
    assert a.predictor_layout.size == a.predictor_size
    assert a.predictor_size == sum(p.numel() for p in PreferencePredictor(SHAPE).parameters())
    assert (a.predictor_layout.preflight(100).error_bound < 1e-8).all()


def test_clients_thresholds_and_task(agreement) -> None:
    assert agreement.clients == ("g0", "g1", "g2", "g3", "g4")
    assert agreement.threshold_of(5) == threshold_for(5, 0.667) == 4
    assert agreement.task == "dpa"
    assert agreement.question_order == tuple(agreement.questions)


@pytest.mark.parametrize("unit", ["response", "record", "respondent"])
def test_the_plan_spends_the_budget_and_no_more(unit: str) -> None:
    bound = 4 if unit == "respondent" else 1
    c = config(unit=unit, epsilon=6.0, answers_per_unit=bound, context_noise=12.0)
    plan = make_plan(c, "run", SPLIT)
    count = 30 if unit == "respondent" else 10  # 12 questions, 4 per step: each question every third round
    assert plan.participations(30) == count
    context = GaussianEvent(context_multiplier(c), 1.0, 1)
    assert context_multiplier(c) == 12.0 / np.sqrt(bound)

    def cost(noise: float) -> float:
        return epsilon([context, GaussianEvent(noise, c.privacy.sample_rate, count)], c.privacy.delta, "rdp")

    assert cost(plan.noise_multiplier) <= 6.0 < cost(plan.noise_multiplier / 1.01)


@pytest.mark.parametrize("unit", ["response", "record", "respondent"])
def test_histograms_are_the_plans_one_event_and_take_the_whole_budget(unit: str, tmp_path: Path) -> None:
    bound = 4 if unit == "respondent" else 1
    c = config(unit=unit, epsilon=2.0, answers_per_unit=bound, mechanism="histogram")
    plan = make_plan(c, "run", SPLIT)
    assert not plan.noisy_rounds
    assert plan.released == SPLIT.context + SPLIT.train
    a = replace(make_world(tmp_path).agreement, plan=plan)
    name, std, event = a.histogram_release
    assert (name, event) == ("histograms", GaussianEvent(plan.noise_multiplier, 1.0, 1))
    assert std == pytest.approx(plan.noise_multiplier * np.sqrt(bound))
    assert epsilon([event], c.privacy.delta, "rdp") <= 2.0
    louder = replace(event, noise_multiplier=event.noise_multiplier / 1.01)
    assert epsilon([louder], c.privacy.delta, "rdp") > 2.0
    off = make_plan(config(enabled=False, mechanism="histogram"), "run", SPLIT)
    assert off.released == SPLIT.context  # without privacy there is nothing to release


def test_training_on_one_group_per_round_is_charged_for_that_groups_turns() -> None:
    """30 rounds of 5 groups are 6 turns each; 12 questions, 4 per step: each question in every third turn."""
    whole = config(epsilon=6.0, context_noise=12.0)
    training = whole.predictor.model_copy(update={"training": "one_group"})
    plan = make_plan(whole.model_copy(update={"predictor": training}), "run", SPLIT, 5)
    assert (plan.training, plan.turns, plan.participations(30)) == ("one_group", 5, 2)
    everybody = make_plan(whole, "run", SPLIT, 5)
    assert (everybody.turns, everybody.participations(30)) == (1, 10)
    assert plan.noise_multiplier < everybody.noise_multiplier


def test_without_privacy_there_is_no_noise_and_without_room_no_plan() -> None:
    assert make_plan(config(enabled=False), "run", SPLIT).noise_multiplier == 0.0
    with pytest.raises(PrivacyError, match="context_noise"):
        make_plan(config(epsilon=0.5, context_noise=1.0), "run", SPLIT)


def test_a_configuration_becomes_an_agreement(agreement) -> None:
    groups = {c: c for c in agreement.clients}
    made = make_agreement(
        config(enabled=False), "run", QUESTIONS, SPLIT, groups, agreement.directory, 5, "minilm"
    )
    assert made.release == "abort"
    assert not made.plan.private
    assert made.plan.train == SPLIT.train
    assert made.question_order == tuple(q.qid for q in QUESTIONS)  # held-out ones too: they are scored later
    assert made.predictor.embedding == 5
    assert made.truth is Config().evaluation.truth


def with_output(agreement: Agreement, *overrides: str, groups: Mapping[str, str] | None = None) -> Agreement:
    return make_agreement(
        compose(["privacy=off", "data.group_count=5", *overrides]), "run", QUESTIONS, SPLIT,
        groups or {c: c for c in agreement.clients}, agreement.directory, 5, "minilm",
    )  # fmt: skip


def test_output_noise_is_planned_for_all_steps_and_the_fewest_honest(agreement) -> None:
    assert with_output(agreement).output is None
    made = with_output(agreement, "secagg.output_epsilon=8", "secagg.release=noise", "ppo.steps=7")
    assert made.output is not None
    # Five clients, threshold 4: two may collude, and two honest ones may be all there are.
    assert (made.output.honest, made.output.colluders, made.output.releases) == (2, 2, 7)
    assert epsilon([made.output.event] * 7, 1e-6, "rdp") <= 8.0
    assert made.reward_layout(3).noise == made.output.noise
    assert made.predictor_layout.noise is None
    releases = {name: policy.release for name, (_, policy) in made.sessions("g0").items()}
    assert releases == {PREDICTOR: "abort", REWARD: "noise"}
    assert made.sessions("g0")[REWARD][1].colluders == 2
    whole = with_output(agreement, "secagg.output_epsilon=8", "secagg.colluders=0")
    assert whole.output is not None
    assert whole.release == "abort"
    assert whole.output.honest == 5
    assert len({a.digest() for a in (made, whole, with_output(agreement))}) == 3


def test_in_a_cohort_the_noise_counts_members_of_the_smallest_group(tmp_path: Path) -> None:
    a = make_world(tmp_path, groups=2, members=5, mode="cohort", release="recover").agreement
    options = ("secagg=cohort", "federation.members_per_group=5", "secagg.output_epsilon=8", "ppo.steps=3")
    made = with_output(a, *options, groups=a.groups)
    assert made.output is not None
    assert (made.release, made.summed_together, made.output.honest) == ("recover", 5, 2)
    assert [s.name for s in made.reward_layout(3).segments] == ["r"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("secagg.output_epsilon=8", "secagg.colluders=3"), r"secagg\.colluders=3: .*stands 0\.\.2"),
        (("secagg.output_epsilon=0.001",), r"secagg\.output_epsilon=0\.001: no noise keeps ppo\.steps=60"),
        (
            ("secagg.output_epsilon=0.3", "ppo.steps=100000", "ppo.prompts_per_step=4096"),
            r"secagg\.output_epsilon=0\.3: output noise.*larger epsilon",
        ),
    ],
)
def test_output_noise_that_cannot_be_is_refused_before_any_work(agreement, options, said) -> None:
    with pytest.raises(ConfigError, match=said):
        with_output(agreement, *options)
