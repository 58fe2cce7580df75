"""A whole run whose members change while it aligns: one of seven groups leaves, and returns with a new key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from appa_secure import launch
from appa_secure.agreement import REWARD
from appa_secure.cli import app
from appa_secure.config import compose
from appa_secure.data.synthetic import GROUPS
from appa_secure.errors import ConfigError
from appa_secure.journal import read_journal
from appa_secure.membership import FILE
from appa_secure.records import verify
from appa_secure.secagg.keys import IdentityKey
from clients.client import Client
from clients.store import IDENTITY
from coordinator.reward import FederatedReward
from coordinator.rounds import Rounds, Summed

STEPS, LEAVES, RETURNS = 6, 3, 5  # the change is made before the step


def options(root: Path) -> list[str]:
    return [
        "experiment=smoke", "name=run", f"output_root={root / 'runs'}", f"federation.client_root={root / 'clients'}",
        "data.group_count=7", f"ppo.steps={STEPS}", "evaluation.truth=false", "evaluation.every=0",
    ]  # fmt: skip


class Watch:
    """What each client put into each reward sum, and what was opened."""

    def __init__(self, patch: pytest.MonkeyPatch, run: Path, leaver: str) -> None:
        self.vectors: dict[int, dict[str, np.ndarray]] = {}
        self.opened: dict[int, tuple[Summed, Any]] = {}
        self.spent: dict[str, list[dict[str, Any]]] = {}
        send, total, step = Client._send, Rounds.sum, FederatedReward.step

        def sending(client: Client, kind: str, body: Any, vector: np.ndarray, *rest: Any) -> bytes:
            if kind == "score":
                self.vectors.setdefault(body["step"], {})[client.client_id] = np.array(vector)
            return send(client, kind, body, vector, *rest)

        def summing(rounds: Rounds, session: str, kind: str, payload: Any, layout: Any) -> Any:
            found = total(rounds, session, kind, payload, layout)
            if session == REWARD and isinstance(found, Summed):
                self.opened[payload["step"]] = found, layout
            return found

        def stepping(reward: FederatedReward, number: int, *rest: Any) -> Any:
            if number == 1:
                self.spent = ledgers(run)
            if number == LEAVES:
                launch.change_members(run, leave=[leaver])
            if number == RETURNS:
                done = CliRunner().invoke(app, ["members", str(run), "--join", leaver, "--rotate", leaver])
                assert done.exit_code == 0, done.output
            return step(reward, number, *rest)

        patch.setattr(Client, "_send", sending)
        patch.setattr(Rounds, "sum", summing)
        patch.setattr(FederatedReward, "step", stepping)


def ledgers(run: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        str(path.relative_to(run.parents[1])): read_journal(path)
        for path in (*run.parents[1].glob("clients/*/*/ledger.jsonl"), run / "privacy_ledger.jsonl")
    }


@pytest.mark.timeout(600)
def test_one_of_seven_leaves_and_returns_with_a_new_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose(options(tmp_path))
    run = tmp_path / "runs" / "run"
    names = list(GROUPS)[:7]
    leaver = names[2]
    watch = Watch(monkeypatch, run, leaver)
    assert launch.run(config) == run

    assert sorted(watch.opened) == list(range(1, STEPS + 1))  # every step, without a discarded one
    for step, (found, layout) in watch.opened.items():
        due = {*names} - ({leaver} if LEAVES <= step < RETURNS else set())
        assert set(found.contributors) == due
        assert set(watch.vectors[step]) == due  # nobody else even answered
        coding = layout.preflight(len(due))
        clear = coding.decode(
            coding.add([coding.encode_clear(watch.vectors[step][c]) for c in sorted(due)]), len(due)
        )
        np.testing.assert_array_equal(found.sum, clear)

    after = ledgers(run)
    assert after == watch.spent  # alignment, leaving and returning cost nothing
    assert len(after) == 8
    assert len(list(read_journal(run / "metrics.jsonl"))) == STEPS + config.predictor.rounds
    summary = json.loads((run / "summary.json").read_text())
    assert summary["secagg"]["membership_changes"] == 2
    verify(run / "transcript.jsonl", summary["transcript_head"])
    gone, back = [row for row in read_journal(run / "transcript.jsonl") if row["event"] == "membership"]
    assert (gone["left"], gone["joined"], gone["version"]) == ([leaver], [], 1)
    assert (back["left"], back["joined"], back["version"]) == ([], [leaver], 2)
    parts = launch.prepare(config, run)
    seed = (parts.site(leaver) / IDENTITY).read_bytes()
    assert back["clients"][leaver]["key"] == IdentityKey.from_seed(seed).public_bytes().hex()
    assert back["clients"][leaver]["key"] != parts.agreement.directory[leaver].hex()
    assert seed not in b"".join(
        p.read_bytes() for p in run.rglob("*") if p.is_file()
    )  # no key in the run directory
    repeated = [row["repeated"] for row in read_journal(run / "rewards.jsonl")]
    print(f"\nanswers left out as scored with other members, of 8 per step: {repeated}")
    assert repeated[: LEAVES - 1] == [0] * (LEAVES - 1)

    for change, words in (
        ({"leave": names[:3]}, "4 parties would be left, secagg.min_cohort=5"),
        ({"join": ["Nobody"]}, "Nobody: not among this run's clients"),
    ):
        before = (run / FILE).read_bytes()
        with pytest.raises(ConfigError, match=words):
            launch.change_members(run, **change)  # type: ignore[arg-type]
        assert (run / FILE).read_bytes() == before
