"""A client's updates: each formula against a slow one, local descent, and EM that finds planted clusters."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from appa_secure.predictor import flatten, unflatten
from appa_secure.rewards import Scorer
from appa_secure.systems import SystemSpec, comparable, initial_mixture, preferences, segments
from appa_secure.tasks import parse, prompt
from clients.tuning import (
    ClusterTuner,
    PolicyTuner,
    Rollouts,
    clipped_policy_loss,
    descend,
    dpo_loss,
    group_weight,
    ipo_loss,
    own_answer,
    raised_history,
)
from coordinator.gae import policy_loss
from coordinator.policies import build_tiny, build_tokenizer
from tests.clients.world import make_questions

QUESTIONS = {q.qid: q for q in make_questions(6)}
TARGETS = {
    q: np.arange(1.0, len(x.options) + 1) / sum(range(1, len(x.options) + 1)) for q, x in QUESTIONS.items()
}
SPEC = SystemSpec(kind="grdpo", beta=0.3, eta=0.5, contrast=50.0, clip=100.0, generations=2)
QIDS = ["q0", "q0", "q1", "q1", "q2", "q2", "q3", "q3"]
TEXTS = ["1 9", "9 1", "0 1 9", "0 1 9", "1 1 1 1", "no answer", "5 5", "2 8"]


def rollouts(qids: list[str] = QIDS, texts: list[str] = TEXTS) -> Rollouts:
    return Rollouts(qids, texts, [parse(t, QUESTIONS[q], "dpa") for q, t in zip(qids, texts, strict=True)])


def scorer(flip: bool = False) -> Scorer:
    targets = {q: t[::-1] if flip else t for q, t in TARGETS.items()}
    return Scorer("wasserstein", targets, {q: x.ordinals for q, x in QUESTIONS.items()})


def tuner(spec: SystemSpec = SPEC, flip: bool = False) -> PolicyTuner:
    texts = [prompt(x, "dpa", "short") for x in QUESTIONS.values()]
    tokenizer = build_tokenizer(texts, 90)
    return PolicyTuner(
        spec, scorer(flip), QUESTIONS, TARGETS, build_tiny(tokenizer, 16, 1, 2, seed=3), tokenizer
    )


def moved(one: PolicyTuner, scale: float = 0.05) -> np.ndarray:
    """A policy that is not the reference."""
    rng = np.random.default_rng(4)
    return (one.reference + scale * rng.standard_normal(one.size)).astype(np.float32)


# -- formulas ------------------------------------------------------------------------------------------------


@given(st.floats(-30, 30), st.floats(0.01, 2))
def test_dpo_is_the_published_loss_over_its_value_at_the_reference(margin: float, beta: float) -> None:
    found = float(dpo_loss(torch.tensor(margin, dtype=torch.float64), beta))
    assert found == pytest.approx(math.log1p(math.exp(-beta * margin)) / math.log(2), abs=1e-8)


@given(st.floats(-30, 30), st.floats(0.01, 2))
def test_ipo_is_the_published_loss_over_its_value_at_the_reference(margin: float, beta: float) -> None:
    found = float(ipo_loss(torch.tensor(margin, dtype=torch.float64), beta))
    assert found == pytest.approx((margin - 1 / (2 * beta)) ** 2 / (1 / (4 * beta**2)), rel=1e-9, abs=1e-9)


def test_the_clipped_loss_is_the_one_of_the_main_path() -> None:
    torch.manual_seed(1)
    logps, old = torch.randn(6, 4) - 2, torch.randn(6, 4) - 2
    mask, advantages = torch.rand(6, 4) < 0.7, torch.randn(6, 1)
    expected, _ = policy_loss(logps, old, advantages.expand(6, 4), mask.long(), 0.2)
    torch.testing.assert_close(clipped_policy_loss(logps, old, advantages, mask, 0.2), expected)


@settings(max_examples=50)
@given(st.lists(st.lists(st.floats(0.5, 1.5), min_size=3, max_size=3), min_size=1, max_size=8))
def test_weights_without_a_normaliser_are_those_of_exponentiated_gradient(losses: list[list[float]]) -> None:
    """Inside the band, w_g / Σw is α_g of algorithm 1, renormalised in every round."""
    spec = replace(SPEC, contrast=1e6)
    alpha, histories = np.ones(3) / 3, [None] * 3
    for row in losses:
        alpha = alpha * np.exp(spec.eta * np.array(row))
        alpha /= alpha.sum()
        histories = [raised_history(h, loss, spec) for h, loss in zip(histories, row, strict=True)]
        weights = np.array([group_weight(h, spec) for h in histories])
        np.testing.assert_allclose(weights / weights.sum(), alpha, rtol=1e-9)
        assert (weights > 0).all()
        assert (weights <= 1).all()


def test_the_contrast_of_weights_has_a_bound_however_large_a_loss_is() -> None:
    spec = replace(SPEC, contrast=50.0)
    top, bottom = raised_history(None, 1e9, spec), raised_history(0.0, -1e9, spec)
    assert group_weight(top, spec) / group_weight(bottom, spec) == pytest.approx(50.0)
    assert group_weight(top, spec) == 1.0


@pytest.mark.parametrize("task", ["dpa", "opa", "choice"])
def test_an_own_answer_says_what_the_distribution_says(task: str) -> None:
    target = np.array([0.1, 0.6, 0.05, 0.25])
    question = QUESTIONS["q2"]
    answer = parse(own_answer(target, task), question, task)
    assert answer is not None
    assert answer.argmax() == 1
    if task == "dpa":
        np.testing.assert_allclose(answer, target, atol=0.04)
    if task == "opa":
        assert np.argsort(-answer).tolist() == [1, 3, 0, 2]


# -- updates of the policy -----------------------------------------------------------------------------------


def slow_logp(one: PolicyTuner, qid: str, text: str) -> torch.Tensor:
    """log π(text | question) under the model's present weights by a plain pass; gradients flow."""
    words = prompt(QUESTIONS[qid], "dpa", "short")
    start = len(one.tokenizer(words)["input_ids"])
    ids = [*one.tokenizer(f"{words} {text}")["input_ids"], one.tokenizer.eos_token_id]
    table = torch.log_softmax(one.model(input_ids=torch.tensor([ids])).logits[0], dim=-1)
    return sum(table[t - 1, ids[t]] for t in range(start, len(ids)))  # type: ignore[return-value]


def slow_logps(one: PolicyTuner, vector: np.ndarray) -> np.ndarray:
    unflatten(one.model, vector)
    with torch.no_grad():
        return np.array([float(slow_logp(one, q, t)) for q, t in zip(QIDS, TEXTS, strict=True)])


@pytest.mark.parametrize("kind", ["grdpo", "gripo"])
def test_the_update_is_the_gradient_of_the_loss_on_the_clients_own_labels(kind: str) -> None:
    one = tuner(replace(SPEC, kind=kind))
    vector, labels = (
        moved(one),
        [1, 0, 1, -1],
    )  # by hand: more mass on later options; readable beats unreadable
    assert preferences(scorer().score(QIDS, rollouts().answers)).tolist() == [1, 0, 1, -1]
    reference = slow_logps(one, one.reference)
    unflatten(one.model, vector)
    total, losses = np.zeros(one.size), []
    for pair, label in enumerate(labels):
        if not label:
            continue
        a, b = 2 * pair, 2 * pair + 1
        if label < 0:
            a, b = b, a
        margin = slow_logp(one, QIDS[a], TEXTS[a]) - reference[a]
        margin = margin - (slow_logp(one, QIDS[b], TEXTS[b]) - reference[b])
        if kind == "grdpo":
            loss = -torch.log(torch.sigmoid(SPEC.beta * margin)) / math.log(2)
        else:
            loss = (margin - 1 / (2 * SPEC.beta)) ** 2 * 4 * SPEC.beta**2
        parts = torch.autograd.grad(loss, list(one.model.parameters()))
        total += torch.cat([p.flatten() for p in parts]).double().numpy() / 3
        losses.append(float(loss.detach()))
    sent, history = one.contribution(vector, rollouts(), None, 1)
    assert history == pytest.approx(SPEC.eta * (np.mean(losses) - 1), abs=1e-4)
    weight = group_weight(history, SPEC)
    np.testing.assert_allclose(sent[:-3], weight * total, atol=2e-4 * np.abs(total).max())
    rewards = scorer().score(QIDS, rollouts().answers)
    assert sent[-3:] == pytest.approx([weight, np.nanmean(rewards), np.nanmean(rewards) ** 2])


def test_fedrlhf_at_the_global_policy_is_the_policy_gradient_of_its_own_reward() -> None:
    spec = replace(SPEC, kind="fedrlhf", kl_coef=0.2, human_weight=0.5, format_reward=0.1)
    one = tuner(spec)
    vector = moved(one)
    drift = slow_logps(one, vector) - slow_logps(one, one.reference)
    unflatten(one.model, vector)
    own = scorer().score(QIDS, rollouts().answers)
    reward = [0.1 if np.isnan(r) else 0.5 * r for r in own] - 0.2 * drift
    advantage = np.array([reward[i] - reward[i ^ 1] for i in range(8)])  # less the other answer's
    advantage /= advantage.std()
    tokens = [len(one.tokenizer(t, add_special_tokens=False)["input_ids"]) + 1 for t in TEXTS]
    loss = -sum(
        a * slow_logp(one, q, t) for a, q, t in zip(advantage, QIDS, TEXTS, strict=True)
    ) / sum(tokens)  # fmt: skip
    parts = torch.autograd.grad(loss, list(one.model.parameters()))
    expected = torch.cat([p.flatten() for p in parts]).numpy()
    sent, history = one.contribution(vector, rollouts(), None, 1)
    np.testing.assert_allclose(sent[:-3], expected, atol=1e-3 * np.abs(expected).max())
    assert (sent[-3], history) == (1.0, 0.0)


def test_sft_raises_the_likelihood_of_the_clients_own_answers() -> None:
    one = tuner(replace(SPEC, kind="sft", clip=1.0))
    vector = one.reference.copy()

    def nll() -> float:
        unflatten(one.model, vector)
        with torch.no_grad():
            return -float(sum(slow_logp(one, q, own_answer(TARGETS[q], "dpa")) for q in set(QIDS)))

    before = nll()
    for step in range(5):
        vector = (vector - 0.2 * one.contribution(vector, rollouts(), None, step)[0][:-3]).astype(np.float32)
    assert nll() < 0.9 * before


def test_several_local_steps_add_up_and_stay_within_the_layout() -> None:
    spec = replace(SPEC, kind="sft", clip=0.5, local_steps=3, lr=0.2)
    one = tuner(spec)
    sent, _ = one.contribution(one.reference, rollouts(), None, 1)
    total, vector = np.zeros(one.size), one.reference
    for _ in range(3):
        single, _ = replaced(one, local_steps=1).contribution(vector, rollouts(), None, 1)
        assert np.linalg.norm(single[:-3]) <= 0.5 * (1 + 1e-6)
        total += single[:-3]
        vector = (one.reference - 0.2 * total).astype(np.float32)
    np.testing.assert_allclose(sent[:-3], total, atol=1e-6)
    limits = np.concatenate([[hi] * size for _, size, _, hi in segments(spec, one.size)])
    assert (np.abs(sent) <= limits).all()


def replaced(one: PolicyTuner, **changes: object) -> PolicyTuner:
    return tuner(replace(one.spec, **changes))


def test_a_policy_that_overflows_gives_zeros_and_not_a_telling_refusal() -> None:
    one = tuner()
    sent, history = one.contribution(np.full(one.size, 1e30, dtype=np.float32), rollouts(), 0.25, 1)
    assert not sent[:-3].any()
    assert history == 0.25
    assert np.isfinite(sent).all()


def test_rollouts_without_any_preference_move_nothing() -> None:
    one = tuner()
    sent, history = one.contribution(moved(one), rollouts(["q0", "q0"], ["1 9", "1 9"]), None, 1)
    assert not sent[:-3].any()
    assert history == 0.0


def test_opposite_groups_send_opposite_gradients_at_the_reference() -> None:
    here, there = tuner(), tuner(flip=True)
    texts = ["1 9", "9 1", "0 1 9", "9 1 0"]
    a, b = (t.contribution(t.reference, rollouts(QIDS[:4], texts), None, 1)[0][:-3] for t in (here, there))
    np.testing.assert_allclose(a, -b, atol=1e-5 * np.abs(a).max())
    assert np.abs(a).max() > 0


# -- clusters ------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(9)
EMBEDDINGS = {q: RNG.standard_normal((len(x.options), 4)).astype(np.float32) for q, x in QUESTIONS.items()}
MIXED = SystemSpec(kind="maxmin", clusters=2, free_rounds=0, clip=10.0)


def pairs(count: int = 40) -> Rollouts:
    rng = np.random.default_rng(2)
    qids = [q for q in rng.choice(list(QUESTIONS), count).tolist() for _ in range(2)]
    return rollouts(qids, [" ".join(map(str, rng.integers(1, 11, len(QUESTIONS[q].options)))) for q in qids])


def clients() -> list[ClusterTuner]:
    """Three that like later options, two that like earlier ones."""
    return [ClusterTuner(MIXED, scorer(flip=g >= 3), EMBEDDINGS, drawn=g % 2) for g in range(5)]


def em_round(
    everyone: list[ClusterTuner], theta: np.ndarray, data: Rollouts, step: int
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    found = [c.contribution(theta.ravel().astype(np.float32), data, None, step) for c in everyone]
    total = np.sum([sent for sent, _ in found], axis=0)
    update, members = np.split(total[:-1], [theta.size])
    gradient = update.reshape(theta.shape) / np.maximum(members, 1)[:, None]
    return gradient, total[-1:] / len(everyone), [int(k) for _, k in found]


def test_em_never_lowers_the_likelihood_and_finds_the_planted_clusters() -> None:
    everyone, data = clients(), pairs()
    theta = initial_mixture(2, 4, seed=1).astype(np.float64)
    likelihoods, chosen = [], []
    for step in range(1, 61):
        gradient, likelihood, chosen = em_round(everyone, theta, data, step)
        likelihoods.append(float(likelihood[0]))
        theta = theta - 0.2 * gradient
    # Small steps on fixed data: the E-step takes the larger of two, the M-step climbs it.
    assert (np.diff(likelihoods) > -1e-6).all()
    assert likelihoods[-1] > likelihoods[0] + 0.1
    assert len(set(chosen[:3])) == len(set(chosen[3:])) == 1
    assert chosen[0] != chosen[3]


def test_a_client_takes_the_likeliest_model_and_sends_nothing_for_the_others() -> None:
    everyone, data = clients(), pairs()
    theta = initial_mixture(2, 4, seed=3)
    for client in everyone[:1] + everyone[-1:]:
        sent, chosen = client.contribution(theta.ravel(), data, None, 1)
        labels = preferences(client.scorer.score(data.qids, data.answers))
        likelihoods = []
        for model in theta:
            unflatten(client.model, model)
            with torch.no_grad():
                r = client.model(comparable(EMBEDDINGS, data.qids, data.answers)).numpy()
            margin = (r[0::2] - r[1::2]) * labels
            likelihoods.append(
                float(np.mean([-math.log1p(math.exp(-m)) for m, s in zip(margin, labels, strict=True) if s]))
            )
        k = int(chosen)
        assert k == int(np.argmax(likelihoods))
        update = sent[: theta.size].reshape(theta.shape)
        assert update[k].any()
        assert not update[1 - k].any()
        assert sent[theta.size : -1].tolist() == [float(i == k) for i in range(2)]
        assert sent[-1] == pytest.approx(likelihoods[k], abs=1e-5)


def test_in_free_rounds_a_client_keeps_the_cluster_it_drew() -> None:
    client = ClusterTuner(replace(MIXED, free_rounds=2), scorer(), EMBEDDINGS, drawn=1)
    theta = initial_mixture(2, 4, seed=3)
    choices = {client.contribution(theta.ravel(), pairs(), None, step)[1] for step in (1, 2)}
    assert choices == {1.0}
    best = {client.contribution(order.ravel(), pairs(), None, 3)[1] for order in (theta, theta[::-1].copy())}
    assert best == {0.0, 1.0}  # from then on the likelihood decides, whatever the model's number


def test_descent_reports_the_loss_where_it_began() -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    start = np.array([3.0, 4.0], dtype=np.float32)
    update, loss = descend(
        model, start, lambda: (model.weight**2).sum(), SystemSpec(clip=100.0, local_steps=2, lr=0.25)
    )
    assert loss == 25.0
    np.testing.assert_allclose(update, 2 * start + start)  # gradient 2w at w, then at w/2
    assert flatten(model).shape == (2,)
