"""Attacks on what is computed from the clients' data: each must succeed without privacy and fail with it.

An attack that fails against the unprotected build would show nothing by failing against the protected one.
"""

from __future__ import annotations

import pytest

from appa_secure.audit import membership, reconstruction
from appa_secure.config import compose
from appa_secure.errors import ConfigError
from appa_secure.progress import Progress

WORLD = ("experiment=smoke", "privacy.accountant=rdp")
TRAINED = (
    *WORLD, "predictor.rounds=30", "predictor.dim=32", "predictor.layers=2", "predictor.local_steps=1",
    "predictor.server_lr=0.01", "data.questions=40", "data.respondents=200", "privacy.sample_rate=1",
)  # fmt: skip


def test_rewards_give_a_raw_context_away_and_nothing_of_one_person_in_a_private_one() -> None:
    """Neighbouring data sets: one person more or less in a context cell, everything else known to the adversary."""
    found = reconstruction.attack(compose([*WORLD, "privacy.context_noise=8"]), 3, lambda *_: None)
    raw, private = found["raw"], found["private"]
    assert raw.hits == len(raw.more) >= 18
    assert raw.exact > 0.98
    assert private.at_chance
    assert private.interval[0] <= private.limit < 0.53
    # What is left of the true counts is what noise of that size leaves by accident.
    assert private.exact < private.exact_by_noise + 0.1


@pytest.mark.parametrize("seed", [1])
def test_membership_in_the_predictors_data_is_seen_without_privacy_only(seed: int) -> None:
    config = compose([*TRAINED, f"seed={seed}"])
    control = membership.attack(membership.without_privacy(config), Progress())
    assert control.predictor().low > 0.6
    private = membership.attack(config, Progress())
    # The attack's direction is fixed beforehand: to be seen, members must score higher.
    assert private.predictor().low <= 0.5
    assert private.answers().low <= 0.5
    assert {len(control.targets), len(private.targets)} == {216}


def test_rewards_give_away_as_much_of_a_histogram_as_its_noise_allows() -> None:
    """The whole budget is in one release: with this noise the one more person is often found, and the report says so."""
    config = compose([*WORLD, "privacy.mechanism=histogram", "privacy.epsilon=8"])
    private = reconstruction.attack(config, 3, lambda *_: None)["private"]
    assert 0.7 < private.limit < 0.9
    low, high = private.interval
    assert low <= private.limit
    assert not private.at_chance
    assert high > private.limit - 0.05  # the attack comes near what is possible


POLICY = (
    *TRAINED, "predictor.rounds=60", "data.questions=60", "data.group_count=3", "secagg=clear", "ppo.steps=100",
    "ppo.prompts_per_step=32", "ppo.generations=4", "ppo.minibatch_size=64", "ppo.epochs=2", "ppo.kl_coef=0.005",
    "ppo.checkpoint_every=100", "policy.warmup_steps=200",
)  # fmt: skip


def test_a_table_is_no_language_model_to_attack() -> None:
    with pytest.raises(ConfigError, match="no language model"):
        membership.attack(compose([*WORLD, "policy=tabular"]), Progress(), language_model=True)


@pytest.mark.slow
def test_membership_shows_in_a_language_models_answers_without_privacy_only() -> None:
    """The run's own policy, trained by PPO. Three groups, so that one answer is a third of the reward."""
    config = compose([*POLICY])
    control = membership.attack(membership.without_privacy(config), Progress(), language_model=True)
    assert control.answers().low > 0.5
    private = membership.attack(config, Progress(), language_model=True)
    assert private.answers().low <= 0.5
    assert len(private.targets) == len(control.targets) == 129


@pytest.mark.slow
def test_membership_shows_in_the_stand_ins_answers_without_privacy() -> None:
    """It is paid by the mean over eight groups: one answer among them shows only over many targets."""
    config = compose(
        [*TRAINED, "data.questions=120", "data.respondents=400", "predictor.rounds=120", "predictor.dim=64"]
    )
    control = membership.attack(membership.without_privacy(config), Progress())
    assert control.answers().low > 0.5
    assert membership.attack(config, Progress()).answers().at_chance
