"""The warmed-up policy of a run: made from public text, or taken from where another run left the same one.

It depends on public questions, the seed and the policy's options, and on nobody's preferences. Runs that differ in
anything else share it by the hash of what it is made from (`policy.cache_dir`), bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from appa_secure.agreement import Agreement
from appa_secure.config import Config
from appa_secure.data import Question
from appa_secure.journal import digest
from appa_secure.records import environment
from appa_secure.tasks import parse, prompt, random_answer
from coordinator.policies import build_policy, warm_up

_OUTCOME = "warmup.json"


def warm_policy(
    config: Config, agreement: Agreement, folder: Path, limit: int, progress: Callable[[int, float], None]
) -> dict[str, Any]:
    """Write the warmed-up policy and its tokenizer to `folder`; returns the steps and the share of valid answers.

    limit: tokens of an answer at most. progress: called with (step, loss).
    """
    kept = None
    if config.policy.cache_dir is not None:
        kept = Path(config.policy.cache_dir) / _key(config, agreement, limit)
    shutil.rmtree(folder, ignore_errors=True)
    if kept is None or not kept.is_dir():
        outcome = _make(config, agreement, folder, limit, progress)
        (folder / _OUTCOME).write_text(json.dumps(outcome))
        if kept is not None:
            _keep(folder, kept)
    else:
        shutil.copytree(kept, folder)
    found: dict[str, Any] = json.loads((folder / _OUTCOME).read_text())
    return found


def _make(
    config: Config, agreement: Agreement, folder: Path, limit: int, progress: Callable[[int, float], None]
) -> dict[str, Any]:
    c, task, style = config, agreement.task, config.task.style
    known = [agreement.questions[q] for q in (*agreement.plan.context, *agreement.plan.train)]
    questions = known + _recombined(known, c.seed)
    prompts = [prompt(q, task, style) for q in agreement.questions.values()]
    texts = [*prompts, *(random_answer(task, k, np.random.default_rng(k)) for k in range(2, 11))]
    torch.manual_seed(c.seed)
    model, tokenizer = build_policy(c.policy, texts, c.seed)
    outcome = warm_up(
        model, tokenizer, [prompt(q, task, style) for q in questions],
        lambda rng, i: random_answer(task, len(questions[i].options), np.random.default_rng(rng.getrandbits(64))),
        steps=c.policy.warmup_steps, lr=c.policy.warmup_lr, seed=c.seed,
        valid=lambda text, i: parse(text, questions[i], task) is not None, max_new_tokens=limit, progress=progress,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"valid": outcome.valid, "steps": outcome.steps}


def _key(config: Config, agreement: Agreement, limit: int) -> str:
    """Hash of all that `_make` reads, and of the versions of what computes it."""
    return digest(
        {
            "policy": config.policy.model_dump(mode="json", exclude={"cache_dir"}),
            "seed": config.seed,
            "task": [agreement.task, config.task.style, limit],
            "questions": [[q.text, list(q.options)] for q in agreement.questions.values()],
            "asked": [list(agreement.plan.context), list(agreement.plan.train)],
            "ids": list(agreement.questions),
            "packages": environment(),
        }
    )


def _keep(folder: Path, kept: Path) -> None:
    """Copy `folder` to where other runs look; whoever is first wins, and a kill leaves nothing half."""
    part = kept.with_name(f".{kept.name}.{os.getpid()}")
    shutil.copytree(folder, part, dirs_exist_ok=True)
    try:
        part.rename(kept)
    except OSError:  # another run was first, with the same content
        shutil.rmtree(part)


def _recombined(questions: list[Question], seed: int) -> list[Question]:
    """As many questions with texts and options drawn from different ones.

    A policy warmed up on them learns to count the options of a prompt instead of remembering each prompt's answer length.
    """
    rng = np.random.default_rng([seed, 0xF0])
    options = sorted({option for q in questions for option in q.options})
    sizes = [len(q.options) for q in questions]
    return [
        Question(
            f"recombined {i}", q.text, tuple(rng.choice(options, rng.choice(sizes), replace=False).tolist())
        )
        for i, q in enumerate(questions)
    ]
