"""The privacy statement says what holds, for whom, and what does not."""

from pathlib import Path

from appa_secure.config import compose
from appa_secure.privacy.statement import markdown, statement

ROWS = [
    {"client": "A", "epsilon": 1.0},
    {"client": "A", "epsilon": 3.0},
    {"client": "B", "epsilon": 2.5},
    {"client": "C", "epsilon": 0.5},
]


def test_epsilon_is_the_last_per_client_and_adds_up_for_a_person_in_several_groups() -> None:
    found = statement(compose(["experiment=smoke"]), ROWS, 1.2, nominal=False)
    assert found["epsilon"] == {"A": 3.0, "B": 2.5, "C": 0.5}
    assert found["epsilon_of_a_person_in_several_groups"] == {"2": 5.5, "3": 6.0}
    text = markdown(found)
    assert "ε ≤ 3.00" in text
    assert "in 3 of the groups: ε ≤ 6.00" in text


def test_repeatable_noise_is_said_in_the_headline_and_secret_noise_needs_no_warning() -> None:
    repeatable = statement(compose(["experiment=smoke"]), ROWS, 1.2, nominal=False)
    assert repeatable["secure_rng"] is False
    assert "do not know the run's seed" in markdown(repeatable).split("- Privacy unit")[0]
    secret = statement(compose(["experiment=smoke", "privacy.secure_rng=true"]), ROWS, 1.2, nominal=False)
    assert "run's seed" not in markdown(secret).split("Not covered")[0]


def test_without_privacy_nothing_is_promised() -> None:
    text = markdown(statement(compose(["experiment=smoke", "privacy=off"]), [], 0.0, nominal=False))
    assert "not private" in text
    assert "ε ≤" not in text


def test_nominal_respondents_are_named_as_an_assumption() -> None:
    config = compose(["experiment=globalopinionqa_8", f"data.path={Path(__file__).parent}"])
    assert "1000" in " ".join(statement(config, ROWS, 1.2, nominal=True)["not_covered"])
