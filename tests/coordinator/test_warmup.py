"""The warmed-up policy is made once for all runs that would make the same one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appa_secure.agreement import Agreement
from appa_secure.config import compose
from coordinator import warmup
from tests.clients.world import make_world


@pytest.fixture
def agreement(tmp_path: Path) -> Agreement:
    return make_world(tmp_path / "world").agreement


class Made:
    """Warms policies up and counts how often there was something to do."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.times, self.steps = root, 0, 0
        self._make = warmup._make
        monkeypatch.setattr(warmup, "_make", self.make)

    def make(self, *args: Any) -> Any:
        self.times += 1
        return self._make(*args)

    def __call__(self, name: str, agreement: Agreement, *overrides: str) -> tuple[bytes, dict[str, Any]]:
        config = compose(
            [
                "experiment=smoke",
                "policy.warmup_steps=2",
                f"policy.cache_dir={self.root / 'kept'}",
                *overrides,
            ]
        )
        outcome = warmup.warm_policy(config, agreement, self.root / name, 12, lambda step, loss: None)
        return (self.root / name / "model.safetensors").read_bytes(), outcome


def test_a_copy_is_what_would_have_been_made(
    tmp_path: Path, agreement: Agreement, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(tmp_path, monkeypatch)
    first = made("first", agreement)
    other_run = ("aggregation=min", "ppo.steps=9", "privacy.epsilon=1", "name=x")
    assert made("second", agreement, *other_run) == first
    assert made.times == 1
    assert made("alone", agreement, "policy.cache_dir=null") == first
    assert made.times == 2
    names = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("first", "second", "alone")]
    assert names[0] == names[1] == names[2]


def test_whatever_it_is_made_from_makes_another(
    tmp_path: Path, agreement: Agreement, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(tmp_path, monkeypatch)
    made("first", agreement)
    found = [made(f"o{i}", agreement, o)[0] for i, o in enumerate(("seed=2", "policy.dim=32"))]
    plan = replace(agreement.plan, train=agreement.plan.train[:-1])
    found.append(made("split", replace(agreement, plan=plan))[0])
    qid, question = next(iter(agreement.questions.items()))
    questions = {**agreement.questions, qid: replace(question, text="Something else?")}
    found.append(made("text", replace(agreement, questions=questions))[0])
    assert made.times == 5
    assert len(set(found)) == 4


def test_what_a_kill_leaves_half_is_not_taken_and_the_first_of_two_wins(
    tmp_path: Path, agreement: Agreement, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(tmp_path, monkeypatch)
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, target: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        made("first", agreement)
    monkeypatch.setattr(Path, "rename", rename)
    whole = made("second", agreement)
    assert made.times == 2
    (kept,) = (p for p in (tmp_path / "kept").iterdir() if not p.name.startswith("."))
    warmup._keep(tmp_path / "second", kept)  # another run, at the same time
    assert made("third", agreement) == whole
    assert made.times == 2
