"""policy=tabular through the whole path: blind equals clear, a killed run ends as if it had not been, lies pay."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from appa_secure import agreement, launch
from appa_secure.aggregation import shares
from appa_secure.aggregation.blind import own_history, own_weight
from appa_secure.config import Config, compose
from appa_secure.manipulation import Lie, Population, play, rules, study
from appa_secure.privacy.ledger import check_rows
from appa_secure.records import read_journal
from appa_secure.report import plots
from appa_secure.rewards import KINDS
from appa_secure.secagg.errors import BadEncoding
from appa_secure.tabular import TabularPolicy
from clients.client import Client
from clients.scoring import parsed
from coordinator import tabular

SMALL = [
    "experiment=tabular_conflict", "data.questions=12", "data.respondents=60", "data.answers_per_respondent=10",
    "data.min_responses=5", "data.heldout_fraction=0.1", "ppo.steps=4", "ppo.prompts_per_step=8", "ppo.minibatch_size=16",
    "ppo.checkpoint_every=2", "aggregation.band=[0.5,0.6]", "evaluation.every=1", "evaluation.bootstrap=100",
]  # fmt: skip


WIDE = ("aggregation.band=[0.6,0.85]", "aggregation.ramp=2")  # holds the histories


def configured(root: Path, *overrides: str) -> Config:
    places = [f"output_root={root}/runs", f"federation.client_root={root}/clients", "name=run"]
    return compose([*SMALL, *places, *overrides])


def rows(run: Path, name: str) -> list[dict]:
    return [
        {k: v for k, v in row.items() if not k.startswith(("seconds", "check"))}
        for row in read_journal(run / name)
    ]


def outcome(run: Path) -> dict:
    summary = json.loads((run / "summary.json").read_text())
    kept = ("alignment", "ceiling", "share_of_gain", "stamp")
    files = {name: rows(run, name) for name in ("rewards.jsonl", "measurement.jsonl", "metrics.jsonl")}
    return {**{k: summary[k] for k in kept}, **files, "policy": (run / "policy" / tabular.FILE).read_bytes()}


def test_blind_equals_clear_and_a_killed_run_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blind = outcome(launch.run(configured(tmp_path / "blind", *WIDE)))
    clear = outcome(launch.run(configured(tmp_path / "clear", "secagg=clear", *WIDE)))
    assert blind == clear
    assert blind["stamp"] == "not private"
    assert (tmp_path / "blind" / "runs" / "run" / "policy" / "STAMP").read_text() == "not private\n"
    assert [row["step"] for row in blind["metrics.jsonl"]] == [1, 2, 3, 4]
    assert blind["rewards.jsonl"][-1]["result"]["branch"] == "weighted"
    # After four steps answers suit the groups better than the uniform ones before more often than not.
    rates = blind["alignment"]["train"]["after"]["win_rate"]
    assert rates["avg"] == pytest.approx(np.mean(list(rates["per_group"].values())))
    assert 0.5 < rates["avg"] < 1.0
    assert "win_rate" not in blind["alignment"]["train"]["before"]
    # Rewards are true, so what is measured of a step is what histories are made of: weights follow from it.
    rule = configured(tmp_path / "blind", *WIDE).aggregation.spec
    history: dict[str, float | None] = {}
    for number, row in enumerate(blind["measurement.jsonl"], 1):
        scores = row["per_group"]
        used = [own_weight(rule, history.get(g), r, number == 1, number) for g, r in scores.items()]
        expected = shares(rule, np.array(used)).tolist()
        assert row["weights"] == pytest.approx(dict(zip(scores, expected, strict=True)), rel=1e-9)
        history = {g: own_history(rule, history.get(g), r, number) for g, r in scores.items()}
    assert len(set(row["weights"].values())) > 1

    class Killed(BaseException):
        pass

    real = TabularPolicy.update
    left = [3]

    def update(self: TabularPolicy, *args: object) -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed
        real(self, *args)  # type: ignore[arg-type]

    config = configured(tmp_path / "killed", *WIDE)
    monkeypatch.setattr(TabularPolicy, "update", update)
    with pytest.raises(Killed):
        launch.run(config)
    monkeypatch.undo()
    again = outcome(launch.run(config, resume=tmp_path / "killed" / "runs" / "run"))
    assert again == blind


# Every task's rewards and every rule, each at least once.
TASKS = {
    "js": "average", "wasserstein": "min", "cosine": "max", "kl": "lse", "borda": "appa aggregation.tau=1.0",
    "kendall": "appa aggregation.variant=paper aggregation.band=[0.0,1.0] aggregation.tau=1.0", "binary": "maximin",
    "choice": "appa aggregation.fi_scope=batch aggregation.fi=cov",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_reward_runs_blind_and_clear_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """One command: configuration, run, summary with ceilings of that reward; the same rewards at every step."""
    monkeypatch.setattr(plots, "_draw", lambda height, paint: "<svg/>")  # drawing is what takes time
    options = [
        f"task.reward={kind}",
        "ppo.steps=2",
        "aggregation.ramp=2",
        *f"aggregation={TASKS[kind]}".split(),
    ]
    found = {}
    for mode in ("blind", "clear"):
        run = launch.run(configured(tmp_path / mode, f"secagg={mode}", *options))
        found[mode] = outcome(run)
    assert found["blind"] == found["clear"]
    steps = found["blind"]["rewards.jsonl"]
    assert [row["opened"] for row in steps] == [True] * 2
    assert all(0 <= r <= 1 for row in steps for r in row["rewards"])
    for split in ("train", "heldout"):
        after, top = found["blind"]["alignment"][split]["after"], found["blind"]["ceiling"][split]
        assert after["malformed"] == 0.0
        assert after["avg"] <= top["avg"] + 1e-6
        assert after["min"] <= top["min"] + 1e-6
        assert top["question_min"]["min"] <= top["min"] + 1e-6
        assert top["pooled"]["avg"] == pytest.approx(
            top["avg"], abs=1e-5
        )  # everybody answers everything here
    assert found["blind"]["share_of_gain"]["train"] is None or found["blind"]["share_of_gain"]["train"] <= 1


def rewards(client: Client, body: dict[str, list[str]]) -> np.ndarray:
    return client._scoring.rewards(client.agreement, body["questions"], parsed(body, client.agreement))


def test_a_spent_budget_of_output_noise_ends_the_run_early_with_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise for two sums, as if the other two steps had been lost to dropouts; the clients refuse the third."""
    real = agreement.plan_output
    monkeypatch.setattr(
        agreement,
        "plan_output",
        lambda epsilon, delta, steps, *parties: real(epsilon, delta, steps // 2, *parties),
    )
    config = configured(
        tmp_path,
        "aggregation=average",
        "secagg.release=noise",
        "secagg.output_epsilon=40",
        "ppo.checkpoint_every=1",
    )
    run = launch.run(config)
    summary = json.loads((run / "summary.json").read_text())
    assert "alignment step 3" in summary["stopped"]
    assert "secagg.output_epsilon=40" in summary["stopped"]
    assert [row["step"] for row in rows(run, "metrics.jsonl")] == [1, 2]
    assert [row["step"] for row in rows(run, "rewards.jsonl") if row["result"] is not None] == [1, 2]
    assert any(row.get("reason") == summary["stopped"] for row in read_journal(run / "transcript.jsonl"))
    paid = check_rows(read_journal(run / "output_ledger.jsonl"))
    assert len(paid) == config.data.group_count
    assert 39 < max(paid.values()) <= 40
    assert int(load_file(run / "policy" / tabular.FILE)["step"]) == 2  # the policy after the last opened step
    assert summary["alignment"]["train"]["after"] != summary["alignment"]["train"]["before"]


def test_rewards_from_true_answers_are_refused_by_a_site_that_does_not_allow_measuring(
    tmp_path: Path,
) -> None:
    from dataclasses import replace

    from tests.clients.world import make_world

    world = make_world(tmp_path, true_rewards=True, truth=False)
    world.set_up()
    reply = world.ask(
        "g0",
        "score",
        session="reward",
        message=b"",
        step=1,
        opened=0,
        z=b"",
        questions=["q3"],
        answers=["1 1"],
    )
    assert reply.kind == "refusal"
    assert "evaluation.truth is off" in reply.body["reason"]
    allowed = world.members["g0"]
    allowed.agreement = replace(world.agreement, truth=True)
    body = {"questions": ["q3", "q4"], "answers": ["1 1", "1 0 1"]}
    np.testing.assert_allclose(
        allowed._targets().score(["q3"], [np.array([0.5, 0.5])]), rewards(allowed, body)[0]
    )


def test_a_question_a_group_was_not_asked_counts_as_the_mean_of_the_others(tmp_path: Path) -> None:
    from tests.clients.world import make_world

    world = make_world(tmp_path, true_rewards=True, truth=True)
    client = world.members["g0"]
    del client._data.counts["q4"]
    body = {"questions": ["q3", "q4", "q5"], "answers": ["1 1", "1 0 1", "3 0 0 1"]}
    found = rewards(client, body)
    assert found[1] == pytest.approx((found[0] + found[2]) / 2)
    with pytest.raises(BadEncoding):
        rewards(client, {**body, "questions": ["q3", "q4", "unknown"]})


def test_a_lie_about_the_history_pays_where_there_are_weights_and_only_there(tmp_path: Path) -> None:
    config = configured(tmp_path, "ppo.steps=60", "aggregation.ramp=20", "aggregation.band=[0.5,0.64]")
    population = Population(config)
    options = rules(config, population)
    gain = {}
    for name in ("average", "maximin"):
        honest, _ = play(population, options[name], config, 1)
        gains = [
            play(population, options[name], config, 1, Lie((g,), history=True))[0][g] - honest[g]
            for g in range(len(population.names))
        ]
        gain[name] = float(np.mean(gains))
    assert gain["average"] == 0.0  # nothing there depends on a history
    assert gain["maximin"] > 0.005


def test_the_study_writes_a_table_and_a_plot_of_every_rule_and_lie(tmp_path: Path) -> None:
    config = configured(tmp_path, "ppo.steps=2", "data.groups=null", "data.group_count=5")
    said: list[str] = []
    folder = study(config, tmp_path / "study", said.append)
    found = json.loads((folder / "manipulation.json").read_text())
    assert found["stamp"] == "not private"
    assert len(found["rows"]) == len(said) == 8 * 3
    assert {row["lie"] for row in found["rows"]} == {"history", "rewards", "two"}
    assert all(len(row["gains"]) == 5 for row in found["rows"])
    assert (folder / "manipulation.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "manipulation.md").read_text().count("\n") == 26
