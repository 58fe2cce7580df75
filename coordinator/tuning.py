"""Policies that the clients train: `grdpo`, `gripo`, `fedrlhf` and `sft`, one masked sum per round.

A round: the coordinator samples answers from the policy, as it does for PPO, and sends them with the policy's
parameters; each client answers with its own update, times its own weight; the coordinator opens the sums and takes one
Adam step on their ratio. What is opened: the weighted sum of the updates, the sum of the weights, and two numbers for
the fairness index.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from appa_secure.aggregation.spec import jain_to_index
from appa_secure.agreement import SYSTEM, Agreement
from appa_secure.config import Config
from appa_secure.errors import RunError
from appa_secure.language import adapted, pack_policy
from appa_secure.predictor import flatten, unflatten
from appa_secure.records import RunDir
from appa_secure.tasks import parse, prompt
from coordinator.predictor import adam, decay, save_state
from coordinator.rounds import NotOpened, Rounds, Summed, ask
from coordinator.sampling import sample

_PATIENCE = 5  # rounds in a row that may be discarded before the run stops and says who is missing
Record = Callable[[dict[str, Any], dict[str, Any]], None]


def ask_patiently(rounds: Rounds, payload: dict[str, Any], size: int) -> Summed:
    """One `tune` sum, asked again while it is discarded. Raises RunError when it stays so."""
    for _ in range(_PATIENCE):
        summed = rounds.sum(SYSTEM, "tune", payload, rounds.agreement.system_layout(size))
        if isinstance(summed, Summed):
            return summed
    assert isinstance(summed, NotOpened)
    raise RunError(
        f"round {payload['step']} was discarded {_PATIENCE} times, the last because: {summed.reason}"
    )


def tune_policy(
    config: Config,
    agreement: Agreement,
    rounds: Rounds,
    run: RunDir,
    model: Any,
    tokenizer: Any,
    new_tokens: int,
    seen: Callable[..., None] | None,
    record: Record,
) -> Any:
    """Train `model` for ppo.steps rounds, or go on with it; returns it (with its adapter, if it has one).

    The state after each round is on disk before the next begins. seen, record: as for PPO (`Pipeline`).
    """
    ppo, questions, task = config.ppo, agreement.questions, agreement.task
    ask(rounds.federation, "policy", **pack_policy(model, tokenizer))
    model = adapted(model, None if config.policy.lora is None else config.policy.lora.model_dump())
    path = run.path("policy") / "tuning.npz"
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        with np.load(path) as stored:
            done, theta, m, v = int(stored["round"]), stored["theta"], stored["m"], stored["v"]
    else:
        done, theta = 0, flatten(model)
        m, v = np.zeros_like(theta), np.zeros_like(theta)
    if run.metrics.truncate_after(done) or done:
        run.transcript.resume("align", done)
    while done < ppo.steps:
        began = time.perf_counter()
        step = done + 1
        unflatten(model, theta)
        chosen = asked_questions(agreement.plan.train, ppo.prompts_per_step, step, config.seed)
        prompts = [prompt(questions[q], task, config.task.style) for q in chosen]
        seed = int(np.random.default_rng([config.seed, 0x7E, step]).integers(2**31))
        drawn = sample(model, tokenizer, prompts, ppo.generations, ppo.temperature, new_tokens, seed)
        qids = [q for q in chosen for _ in range(ppo.generations)]
        texts = [text for row in drawn for text in row]
        payload = {
            "step": step, "opened": done, "parameters": theta.astype("<f4").tobytes(), "questions": qids, "answers": texts,
        }  # fmt: skip
        generated = time.perf_counter()
        summed = ask_patiently(rounds, payload, len(theta))
        seconds_reward = time.perf_counter() - generated
        weight, reward, reward2 = summed.sum[-3:].tolist()
        groups = len(summed.contributors)
        theta, m, v = (
            x.astype(np.float32)
            for x in adam(
                theta, m, v, summed.sum[:-3] / weight, step, config.system.server_lr * decay(step, ppo.steps)
            )
        )
        answers = [parse(t, questions[q], task) for q, t in zip(qids, texts, strict=True)]
        malformed = sum(a is None for a in answers)
        jain = reward * reward / (groups * reward2) if reward2 > 0 else 1.0
        row = {
            "malformed": malformed, "opened": True, "weights": None,
            "result": {
                "fi": float(jain_to_index(np.array(min(jain, 1.0)), config.aggregation.fi)), "branch": config.system.kind,
                "alpha_sum": weight,
            },
        }  # fmt: skip
        readable = 1.0 - malformed / len(texts)
        metrics = {
            "step": step, "reward": readable * reward / groups + (1.0 - readable) * config.task.format_penalty,
            "seconds": time.perf_counter() - began, "seconds_reward": seconds_reward,
        }  # fmt: skip
        # Measured and reported first: a kill before the state is written repeats the round, and leaves none out.
        if seen is not None:
            seen(step, qids, answers, row)
        record(metrics, row)
        done = step
        save_state(path, {"round": np.array(done), "theta": theta, "m": m, "v": v})
    unflatten(model, theta)
    return model


def asked_questions(train: Sequence[str], count: int, step: int, seed: int) -> list[str]:
    """The questions of round number `step` (from 1): one seeded permutation of all of them after the other."""
    wanted = range((step - 1) * count, step * count)
    orders = {
        i: np.random.default_rng([seed, 0xA5, i]).permutation(len(train))
        for i in {at // len(train) for at in wanted}
    }
    return [train[int(orders[at // len(train)][at % len(train)])] for at in wanted]
