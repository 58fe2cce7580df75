"""Speed of the hot paths, printed by `make bench`; ratios are taken within one run, absolutes are for orientation."""

import hashlib
import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from appa_secure.aggregation import AggregationSpec, contribution, segments
from appa_secure.data import GroupData
from appa_secure.predictor import PredictorShape, PreferencePredictor, flatten
from appa_secure.privacy.noise import gaussian
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
from clients.context import raw_shares
from clients.training import LocalTrainer, ShareTrainer, Trainer

pytestmark = pytest.mark.bench


def median_ms(work: Callable[[], object], times: int = 9) -> tuple[float, float, float]:
    """Median, fastest and slowest wall time of `times` calls after one warm-up, in milliseconds."""
    work()
    spent = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        spent.append(1e3 * (time.perf_counter() - began))
    return statistics.median(spent), min(spent), max(spent)


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


@pytest.mark.parametrize("unit", ["response", "record"])
def test_private_step_against_plain_step(unit: str) -> None:
    """A DP-SGD step of one client against the non-private step on the same questions."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    qids = [f"q{i}" for i in range(308)]
    embeddings = {q: rng.standard_normal((4, 384)).astype(np.float32) for q in qids}
    data = GroupData("g", {q: rng.integers(50, 300, 4).astype(float) for q in qids})
    model = PreferencePredictor(PredictorShape(384, 64, 3))
    start = flatten(model)

    def trainer(private: bool) -> Trainer:
        plan = TrainingPlan(
            run="bench", seed=1, train=tuple(qids[20:]), context=tuple(qids[:20]), rounds=1, local_steps=1,
            questions_per_step=64, lr=0.1, private=private, unit=unit, clip=1.0, sample_rate=0.5,
            noise_multiplier=1.0, answers_per_unit=1,
        )  # fmt: skip
        shares = {q: np.full(4, 0.25) for q in qids[:20]}
        if not private:
            return ShareTrainer(plan, embeddings, shares, raw_shares(data, plan.train))
        return LocalTrainer(plan, data, embeddings, shares, 700.0, qids, bytes(32))

    dp, sgd = trainer(True), trainer(False)
    private = median_ms(lambda: dp.round(start, 0, model), 5)
    plain = median_ms(lambda: sgd.round(start, 0, model), 5)
    show(f"DP-SGD step, unit {unit}", private, f"{private[0] / plain[0]:.1f} x the non-private step")


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
