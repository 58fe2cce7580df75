"""The privacy statement says what holds, for whom, and what does not."""

from pathlib import Path
from typing import Any

from appa_secure.config import compose
from appa_secure.privacy.accounting import GaussianEvent, epsilon
from appa_secure.privacy.statement import markdown, statement

DELTA = 1e-6


def row(client: str, *events: GaussianEvent) -> list[dict[str, Any]]:
    """A client's ledger rows, as far as the statement reads them."""
    return [
        {
            "client": client, "noise_multiplier": e.noise_multiplier, "sample_rate": e.sample_rate, "count": e.count,
            "epsilon": epsilon(events[: i + 1], DELTA, "prv"),
        }
        for i, e in enumerate(events)
    ]  # fmt: skip


CONTEXT, STEPS = GaussianEvent(8.0, 1.0, 1), GaussianEvent(2.0, 0.1, 20)
ROWS = row("A", CONTEXT, STEPS) + row("B", CONTEXT, STEPS) + row("C", CONTEXT) + row("D", CONTEXT, STEPS)


def test_epsilon_is_the_last_per_client_and_of_a_person_in_several_groups_that_of_all_their_releases() -> (
    None
):
    found = statement(compose(["experiment=smoke"]), ROWS, 1.2, nominal=False)
    one = epsilon([CONTEXT, STEPS], DELTA, "prv")
    assert found["epsilon"] == {"A": one, "B": one, "C": epsilon([CONTEXT], DELTA, "prv"), "D": one}
    several = found["epsilon_of_a_person_in_several_groups"]
    assert several == {k: epsilon([CONTEXT, STEPS] * int(k), DELTA, "prv") for k in ("2", "3")}
    assert one < several["2"] < several["3"] < 3 * one
    undrawn = found["epsilon_without_amplification"]
    assert undrawn == epsilon([CONTEXT, GaussianEvent(2.0, 1.0, 20)], DELTA, "prv") > one
    text = markdown(found)
    assert f"ε ≤ {one:.2f}**" in text
    assert f"in 3 of the groups: ε ≤ {several['3']:.2f}" in text
    assert f"ε ≤ {undrawn:.2f} instead of {one:.2f}" in text


def test_every_mechanism_is_told_with_its_parameters() -> None:
    told = markdown(statement(compose(["experiment=smoke"]), ROWS, 1.2, nominal=False))
    for fact in ("add/remove one unit", "PRV", "Poisson", "clip 1", "sample rate 0.1", "noise multiplier 1.2", "δ = 1e-06",
                 "choice of the settings", "sensitivity 1", "no choice among runs", "each round's update", "float32",
                 "Poisson sampling that is really done", "computed numerically"):  # fmt: skip
        assert fact in told, fact
    assert (
        "upper bound"
        in statement(compose(["experiment=smoke", "privacy.accountant=rdp"]), ROWS, 1.2, False)["accounting"]
    )
    once = statement(compose(["experiment=smoke", "privacy.mechanism=histogram"]), ROWS, 1.2, nominal=False)
    (only,) = once["mechanisms"]
    assert (only["kind"], only["releases"], only["noise_multiplier"]) == ("Gaussian", 1, 1.2)
    assert "DP-SGD" not in markdown(once)


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
