"""Speed of the hot paths, printed by `make bench`; ratios are taken within one run, absolutes are for orientation."""

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from appa_secure.aggregation import AggregationSpec, contribution, segments
from appa_secure.data import GroupData, Question, Responses, counts_of
from appa_secure.predictor import (
    PredictorShape,
    PreferencePredictor,
    flatten,
    log_likelihood,
    pad_options,
    together,
)
from appa_secure.privacy.noise import gaussian, sampler
from appa_secure.privacy.plan import TrainingPlan
from appa_secure.rewards import Scorer
from appa_secure.secagg import (
    ClientMachine,
    ClientPolicy,
    CoordinatorMachine,
    Directory,
    IdentityKey,
    Layout,
    Segment,
)
from appa_secure.secagg.driver import in_process, respond, run_epoch_setup, run_round
from appa_secure.secagg.masks import apply_masks
from clients.training import LocalTrainer, Trainer

pytestmark = pytest.mark.bench

# The most a private step may cost beside a plain one that treats every example by itself. Measured with other work on the
# machine: response 1.1 (width 64) and 0.9 (128), record 1.4 and 1.1, respondent 1.3 and 0.9.
LIMIT = 1.5


def median_ms(work: Callable[[], object], times: int = 9) -> tuple[float, float, float]:
    """Median, fastest and slowest wall time of `times` calls after one warm-up, in milliseconds."""
    work()
    spent = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        spent.append(1e3 * (time.perf_counter() - began))
    return statistics.median(spent), min(spent), max(spent)


def cpu_ms(work: Callable[[], object]) -> float:
    """Processor time of one call in this thread, which other work on the machine disturbs less than wall time."""
    began = time.thread_time()
    work()
    return 1e3 * (time.thread_time() - began)


def show(what: str, measured: tuple[float, float, float], note: str = "") -> None:
    print(f"\n{what:<58}{measured[0]:9.2f} ms  ({measured[1]:.2f}..{measured[2]:.2f}) {note}", end="")


def test_blind_reward_round_of_eight_groups() -> None:
    """One alignment step's secure sum: eight uploads, eight answers, opening; everything but scoring."""
    names = [f"group {i}" for i in range(8)]
    keys = {n: IdentityKey.generate() for n in names}
    directory = Directory({n: k.public_bytes() for n, k in keys.items()})
    machines = {n: ClientMachine(n, k, directory, ClientPolicy()) for n, k in keys.items()}
    spec = AggregationSpec()
    layout = Layout(tuple(Segment(*part) for part in segments(spec, 256)))
    context = hashlib.sha256(b"rollouts").digest()
    rewards = np.random.default_rng(0).random((8, 256))
    vectors = {n: contribution(spec, r, None, None, 8)[0] for n, r in zip(names, rewards, strict=True)}
    exchange = in_process(
        {n: (lambda m, n=n: respond(machines[n], m, lambda *_: (vectors[n], layout, context))) for n in names}
    )
    coordinator = CoordinatorMachine(b"bench", directory)
    began = time.perf_counter()
    run_epoch_setup(coordinator, exchange, 1)
    show("epoch set-up, 8 clients, 64 rounds", (1e3 * (time.perf_counter() - began),) * 3)
    count = iter(range(1, 60))
    show(
        f"blind round, 8 clients, {layout.size} entries (all parties together)",
        median_ms(lambda: run_round(coordinator, exchange, next(count), context, layout), 30),
    )


def test_mask_expansion_against_raw_aes() -> None:
    """Masking 10^6 32-bit entries for 7 peers, against the keystream alone."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    vector, keys = np.zeros(10**6, dtype=np.uint32), [bytes([i]) * 32 for i in range(8)]
    zeros, out = bytes(1 << 18), bytearray((1 << 18) + 16)

    def raw() -> None:
        for key in keys:
            stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
            for _ in range(-(-vector.nbytes // len(zeros))):
                stream.update_into(zeros, out)

    masked, plain = median_ms(lambda: apply_masks(vector, keys, [])), median_ms(raw)
    show("mask 10^6 entries with 8 masks", masked, f"{100 * plain[0] / masked[0]:.0f} % of raw AES-256-CTR")


@pytest.mark.parametrize("unit", ["response", "record", "respondent"])
@pytest.mark.parametrize("shape", [PredictorShape(384, 64, 3), PredictorShape(384)], ids=["small", "gpo"])
def test_private_step_against_plain_step(unit: str, shape: PredictorShape) -> None:
    """A whole DP-SGD step (sample, clip, sum, noise) against plain gradient steps on the same distinct examples.

    One plain step computes every example with its own copy of the context; the other, which needs no gradients of single
    examples, reads the context once for all questions. They take turns, and a ratio is the median over the turns.
    """
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    questions = [Question(f"q{i}", f"Question {i}?", ("a", "b", "c", "d")) for i in range(84)]
    qids = [q.qid for q in questions]
    embeddings = {q: rng.standard_normal((4, 384)).astype(np.float32) for q in qids}
    asked = np.argsort(rng.random((200, 84)), axis=1)[:, :30]  # 200 people, 30 answers each
    answers = Responses(np.repeat(np.arange(200), 30), asked.ravel(), rng.integers(0, 4, 6000))
    data = GroupData("g", counts_of(questions, answers, "g"), responses=answers)
    plan = TrainingPlan(
        run="bench", seed=1, train=tuple(qids[20:]), context=tuple(qids[:20]), rounds=1, local_steps=1,
        questions_per_step=64, lr=0.1, private=True, unit=unit, clip=1.0, sample_rate=1.0,
        noise_multiplier=1.0, answers_per_unit=30 if unit == "respondent" else 1,
    )  # fmt: skip
    context = {q: np.full(4, 0.25) for q in qids[:20]}
    dp = LocalTrainer(plan, data, embeddings, context, 70.0, qids, bytes(32))
    model = PreferencePredictor(shape)
    start = flatten(model)
    examples = dp._sample(plan.steps(0)[0], sampler(bytes(32), "bench"))
    targets, mask = pad_options([embeddings[q] for q in plan.steps(0)[0]])
    at, wanted = torch.from_numpy(examples.question), torch.from_numpy(examples.target).float()
    parts = np.array_split(np.arange(len(at)), -(-len(at) // 256))

    class Plain(Trainer):
        def _step(self, model: PreferencePredictor, questions: Sequence[str], label: str) -> None:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for rows in parts:
                logits = model(self.points.expand(len(rows), -1, -1), targets[at[rows]])
                (-(wanted[rows] * log_likelihood(logits, mask[at[rows]])).sum()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    asked = torch.zeros(mask.shape).index_add(0, at, wanted)

    class Together(Trainer):
        def _step(self, model: PreferencePredictor, questions: Sequence[str], label: str) -> None:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            (-(asked * log_likelihood(together(model, self.points, targets), mask)).sum()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    steps = (dp, Plain(plan, embeddings, context), Together(plan, embeddings, context))
    turns = [
        tuple(cpu_ms(lambda t=t: t.round(start, 0, model)) for t in steps)
        for _ in range(12 if shape.dim < 100 else 6)
    ][1:]
    private, simple, least = (statistics.median(t[i] for t in turns) for i in range(3))
    ratio, of_least = (statistics.median(t[0] / t[i] for t in turns) for i in (1, 2))
    show(
        f"DP-SGD step, {unit}, width {shape.dim}, {len(at)} examples",
        (private, min(t[0] for t in turns), max(t[0] for t in turns)),
        f"{ratio:.2f} x the plain step ({simple:.1f} ms), {of_least:.1f} x with one context ({least:.1f} ms)",
    )
    assert ratio <= LIMIT


def test_scoring_and_noise() -> None:
    rng = np.random.default_rng(0)
    qids = [f"q{i}" for i in range(300)]
    scorer = Scorer(
        "wasserstein", {q: np.full(4, 0.25) for q in qids}, dict.fromkeys(qids, (1.0, 2.0, 3.0, 4.0))
    )
    asked = [qids[i] for i in rng.integers(300, size=256)]
    answers = list(rng.dirichlet(np.ones(4), 256))
    show("score 256 rollouts at one client", median_ms(lambda: scorer.score(asked, answers)))
    show("137,793 Gaussian draws from AES-CTR", median_ms(lambda: gaussian(bytes(32), "bench", 137_793, 1.0)))
