"""PPO steps of our trainer beside those of TRL 1.12's PPOTrainer, the last one TRL had, in one run:

    .venv/bin/python -m tests.bench.ppo [--reps 10] [--markdown FILE] [experiment=... data.path=... any override]

The peer's TRL is installed into a folder of its own under .appa_cache, without its dependencies, and stands before this
environment's packages on the path of the peer's process alone. Each side is a process with one thread that holds a
trainer in the middle of its training; the sides take steps in turns, and a step is timed from the end of the one before.

Both sides: the same warmed-up policy in float32, prompts of the same questions, answers sampled until they end, the same
longest answer, batch, epochs, minibatches, clip ranges, KL weight, optimiser and learning rate (so small that the policy
and with it the length of its answers stays what it is), rewards that are a fixed function of the answer's tokens, no
checkpoints, no logs, no gradient checkpointing.

ours   `coordinator.ppo.PPOTrainer`: each prompt is read once for its completions; the critic is a head on the policy's
       own trunk; the policy's log-probabilities at sampling time are those the sampler computed.
peer   `trl.experimental.ppo.PPOTrainer`: one completion for each row of the batch; the value model is a second model of
       the policy's size, as that trainer wants it; its reward model is a stub without weights. A batch is drawn
       from the same questions, 256 rows at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REPO = Path(__file__).resolve().parents[2]
PEER = "trl==1.12.0"
WARM = 2  # steps of each side before anything is measured
LEARNING_RATE = 1e-7


def fixed_reward(tokens: Sequence[int]) -> float:
    """In [0, 1], from the tokens of an answer."""
    return sum(tokens) % 11 / 10


class Turns:
    """The worker's end of the line: reports a step's times, and goes on when it is told to."""

    def __init__(self) -> None:
        # Whatever a library prints goes to stderr.
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.begin = (time.perf_counter(), time.process_time())

    def step(self, tokens: float) -> None:
        """tokens: mean number of tokens of a rollout, prompt and answer."""
        now = time.perf_counter(), time.process_time()
        spent = [b - a for a, b in zip(self.begin, now, strict=True)]
        print(json.dumps([*spent, tokens]), file=self.out, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # the other end has seen enough
        self.begin = (time.perf_counter(), time.process_time())


def ours(job: SimpleNamespace, turns: Turns) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from coordinator.ppo import PPOTrainer, make_config

    tokenizer = AutoTokenizer.from_pretrained(job.folder)
    read = []

    def reward(completion_ids: Any, prompts: Any, **_: Any) -> list[float]:
        read[:] = [
            len(tokenizer(p)["input_ids"]) + len(c) for p, c in zip(prompts, completion_ids, strict=True)
        ]
        return [fixed_reward(ids) for ids in completion_ids]

    PPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.folder),
        reward_funcs=[reward],
        args=make_config(job.ppo, f"{job.folder}/ours", 1, job.length),
        train_dataset=Dataset.from_dict({"prompt": job.prompts}),
        processing_class=tokenizer,
        on_step=lambda _: turns.step(statistics.mean(read)),
    ).train()


def peer(job: SimpleNamespace, turns: Turns) -> None:
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(job.folder)
    tokenizer.padding_side = "left"
    read = []

    class Stub(torch.nn.Module):
        """In the place of a reward model: the "state" of a position is what `fixed_reward` says up to there."""

        base_model_prefix = "backbone"

        def __init__(self) -> None:
            super().__init__()
            self.score = torch.nn.Identity()

        def backbone(self, input_ids: Any, attention_mask: Any, **_: Any) -> Any:
            read.extend(attention_mask.sum(dim=1).tolist())
            return SimpleNamespace(hidden_states=[(input_ids.cumsum(1) % 11 / 10).unsqueeze(-1)])

    class End(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.step(statistics.mean(read))
            read.clear()

    p = job.ppo
    rollouts = p.prompts_per_step * p.generations
    value = AutoModelForSequenceClassification.from_pretrained(job.folder, num_labels=1)
    value.config.pad_token_id = tokenizer.pad_token_id
    config = PPOConfig(
        output_dir=f"{job.folder}/peer", seed=1, use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=rollouts, gradient_accumulation_steps=1, total_episodes=p.steps * rollouts,
        num_mini_batches=rollouts // p.minibatch_size, num_ppo_epochs=p.epochs, response_length=job.length,
        local_rollout_forward_batch_size=job.peer_chunk, stop_token="eos", temperature=p.temperature, kl_coef=p.kl_coef,
        cliprange=p.clip, cliprange_value=p.value_clip, vf_coef=p.value_coef, gamma=p.gamma, lam=p.lam, learning_rate=p.lr,
        max_grad_norm=p.max_grad_norm, num_sample_generations=0, save_strategy="no", report_to=[], logging_strategy="no",
    )  # fmt: skip
    PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(job.folder),
        ref_model=AutoModelForCausalLM.from_pretrained(job.folder),
        reward_model=Stub(),
        value_model=value,
        # Every prompt as often as it takes to fill a batch.
        train_dataset=Dataset.from_dict(
            {"input_ids": [tokenizer(p)["input_ids"] for p in job.prompts] * -(-rollouts // len(job.prompts))}
        ),
        callbacks=[End()],
    ).train()


class Side:
    """One process that takes a step when it is asked to."""

    def __init__(self, kind: str, job: dict[str, Any], before: Sequence[str] = ()) -> None:
        path = os.pathsep.join([*before, str(REPO)])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        env |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        command = [sys.executable, "-m", "tests.bench.ppo", "--worker", kind]
        self.log = Path(tempfile.mkstemp(dir=job["folder"], suffix=".log")[1])
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=REPO,
                env=env,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.send(json.dumps(job))

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def wait(self) -> tuple[float, float, float]:
        """Wall and processor seconds of the step in progress, and mean tokens of its rollouts."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker ended: {self.log.read_text()[-3000:]}")
        wall, processor, tokens = json.loads(line)
        return wall, processor, tokens

    def step(self) -> tuple[float, float, float]:
        self.send("go")
        return self.wait()

    def end(self) -> None:
        self.process.communicate()


def install_peer() -> str:
    """The folder that holds the peer's TRL and nothing else; made once."""
    folder = REPO / ".appa_cache" / PEER.replace("==", "-")
    if not (folder / "trl" / "__init__.py").exists():
        print(f"installing {PEER} into {folder}", file=sys.stderr)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "-q",
            "install",
            "--no-deps",
            "--upgrade",
        ]
        subprocess.run([*pip, "--target", str(folder), PEER], check=True)
    return str(folder)


def make_policy(overrides: Sequence[str], folder: str) -> dict[str, Any]:
    """The warmed-up policy of a run's configuration in `folder`, and what its trainer would be given."""
    import random

    import numpy as np

    from appa_secure import data as surveys
    from appa_secure.config import compose
    from appa_secure.rewards import task_of
    from appa_secure.tasks import completion_length, parse, prompt, random_answer
    from coordinator.policies import build_policy, warm_up

    config = compose(list(overrides))
    questions = surveys.load(config.data, config.seed).questions
    task, style = task_of(config.task.reward), config.task.style
    prompts = [prompt(q, task, style) for q in questions]
    length = completion_length(task, max(len(q.options) for q in questions))
    texts = [*prompts, *(random_answer(task, k, np.random.default_rng(k)) for k in range(2, 11))]
    model, tokenizer = build_policy(config.policy, texts, config.seed)

    def answer(draw: random.Random, i: int) -> str:
        return random_answer(task, len(questions[i].options), np.random.default_rng(draw.getrandbits(64)))

    warm_up(
        model, tokenizer, prompts, answer, steps=config.policy.warmup_steps, lr=config.policy.warmup_lr, seed=config.seed,
        valid=lambda text, i: parse(text, questions[i], task) is not None, max_new_tokens=length,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ppo = {
        **config.ppo.model_dump(),
        "lr": LEARNING_RATE,
        "device": "cpu",
        "checkpoint_every": 0,
        "steps": 10**6,
    }
    return {"folder": folder, "prompts": prompts, "length": length, "ppo": ppo}


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Median (smallest to largest)."""
    return f"{form(statistics.median(values))} ({form(min(values))} to {form(max(values))})"


def measure(overrides: Sequence[str], reps: int, chunk: int) -> str:
    """The table, in Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        job = {**make_policy(overrides, folder), "peer_chunk": chunk}
        p = job["ppo"]
        rollouts = p["prompts_per_step"] * p["generations"]
        pairs = {**p, "prompts_per_step": rollouts // 2, "generations": 2}
        sides = {
            f"peer, {rollouts} rows": Side("peer", job, [install_peer()]),
            f"ours, {p['prompts_per_step']} prompts x {p['generations']}": Side("ours", job),
            f"ours, {rollouts // 2} prompts x 2": Side("ours", {**job, "ppo": pairs}),
        }
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in sides}
        for side in sides.values():
            side.wait()
        for turn in range(WARM - 1 + reps):
            for name, side in sides.items():
                step = side.step()
                if turn >= WARM - 1:
                    found[name].append(step)
        for side in sides.values():
            side.end()
    first = next(iter(found))
    lines = [
        f"{reps} steps of each side in turns; {rollouts} rollouts a step, {p['epochs']} epochs, minibatches of "
        f"{p['minibatch_size']}, answers of at most {job['length']} tokens; median (smallest to largest). "
        f"Python {platform.python_version()}, {platform.machine()}, one thread each; TRL {PEER.partition('==')[2]} "
        f"reads {chunk} rows at a time.",
        "",
        "| | rollouts per second | seconds per step | processor seconds | peer / ours | processor | tokens per rollout |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, steps in found.items():
        cells = [
            spread([rollouts / s[0] for s in steps], "{:.1f}".format),
            spread([s[0] for s in steps], "{:.2f}".format),
            spread([s[1] for s in steps], "{:.2f}".format),
        ]
        for clock in (0, 1):  # each step beside the peer's of the same turn
            ratios = [theirs[clock] / s[clock] for theirs, s in zip(found[first], steps, strict=True)]
            cells.append("" if name == first else spread(ratios, "{:.2f}x".format))
        lines.append(f"| {' | '.join([name, *cells, f'{statistics.mean(s[2] for s in steps):.1f}'])} |")
    return "\n".join(lines)


def work(kind: str) -> None:
    turns = Turns()
    import torch

    torch.set_num_threads(1)
    job = SimpleNamespace(**json.loads(sys.stdin.readline()))
    job.ppo = SimpleNamespace(**job.ppo)
    {"ours": ours, "peer": peer}[kind](job, turns)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", choices=["ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--reps", type=int, default=10, help="steps of each side that are measured")
    parser.add_argument("--chunk", type=int, default=256, help="local_rollout_forward_batch_size of the peer")
    parser.add_argument("overrides", nargs="*", default=None, help="as of appa-secure run")
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
        return
    synthetic = [
        "experiment=opinionqa_dense",
        "data=synthetic",
        "data.questions=380",
        "data.ordinal_only=true",
    ]
    print(measure(args.overrides or [*synthetic, "data.path=null"], args.reps, args.chunk))


if __name__ == "__main__":
    main()
