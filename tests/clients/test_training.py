"""Local DP-SGD against a slow oracle: one autograd pass per answer, clipped, summed; noise and scale."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from scipy import stats

from appa_secure.data import GroupData, Responses
from appa_secure.data.survey import counts_of
from appa_secure.predictor import (
    PreferencePredictor,
    Shared,
    context_points,
    flatten,
    log_likelihood,
    pad_options,
    unflatten,
)
from appa_secure.privacy.noise import gaussian, sampler
from clients.clipping import ClippedGradients
from clients.context import raw_shares
from clients.sampling import Examples, bounded_answers, respondents
from clients.training import LocalTrainer, ShareTrainer, Trainer
from tests.clients.world import KEY, SHAPE, make_embeddings, make_group, make_plan, make_questions

QUESTIONS = make_questions(10)
QIDS = [q.qid for q in QUESTIONS]
EMBEDDINGS = make_embeddings(QUESTIONS)
CONTEXT = {q: np.full(len(EMBEDDINGS[q]), 1.0 / len(EMBEDDINGS[q])) for q in QIDS[:3]}
TRAIN = QIDS[3:]
P = len(flatten(PreferencePredictor(SHAPE)))


def trainer(data: GroupData, **plan: Any) -> LocalTrainer:
    settled = make_plan(TRAIN, QIDS[:3], **plan)
    return LocalTrainer(settled, data, EMBEDDINGS, CONTEXT, 20.0, QIDS, KEY)


def plain(data: GroupData, **plan: Any) -> ShareTrainer:
    settled = make_plan(TRAIN, QIDS[:3], private=False, noise_multiplier=0.0, **plan)
    return ShareTrainer(settled, EMBEDDINGS, CONTEXT, raw_shares(data, TRAIN))


def model(scale: float = 1.0) -> PreferencePredictor:
    torch.manual_seed(5)
    net = PreferencePredictor(SHAPE)
    unflatten(net, flatten(net) * np.float32(scale))
    return net


def points(context: Sequence[str]) -> torch.Tensor:
    return context_points([EMBEDDINGS[q] for q in context], [CONTEXT[q] for q in context])


def gradient(net: PreferencePredictor, question: str, target: np.ndarray, seen: torch.Tensor) -> np.ndarray:
    """(P,) gradient of one answer's cross entropy, by plain autograd on an unwrapped network."""
    logits = net(seen[None], torch.from_numpy(EMBEDDINGS[question])[None])[0]
    loss = -(torch.from_numpy(target).float() * torch.log_softmax(logits, 0)).sum()
    return (
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(net.parameters()))]).double().numpy()
    )


def clipped(vector: np.ndarray, clip: float) -> np.ndarray:
    return vector * min(1.0, clip / np.linalg.norm(vector))


def summed(
    net: PreferencePredictor, questions: Sequence[str], seen: torch.Tensor, examples: Examples, clip: float
) -> np.ndarray:
    """(P,) what a step adds up before any noise."""
    local = trainer(make_group("g", QUESTIONS), clip=clip)
    local.points = seen
    return local._clipped_sum(net, questions, examples)


def one_hot(question: str, option: int) -> np.ndarray:
    return np.eye(len(EMBEDDINGS[question]))[option]


def cells_of(answers: Sequence[tuple[str, int]], questions: Sequence[str], times: Sequence[int]) -> Examples:
    width = max(len(EMBEDDINGS[q]) for q in questions)
    target = np.zeros((len(answers), width))
    for row, (_, option) in enumerate(answers):
        target[row, option] = 1.0
    index = np.array([questions.index(q) for q, _ in answers], dtype=np.int64)
    return Examples(index, target, np.array(times, dtype=np.int64))


CLIPS = [0.05, 1.0, 50.0]  # all clipped, some, none


@pytest.mark.parametrize("clip", CLIPS)
def test_responses_with_multiplicities_equal_one_gradient_per_answer(clip: float) -> None:
    net, seen, questions = model(3.0), points(QIDS[:2]), TRAIN[:4]
    cells = [(q, k) for q in questions for k in range(len(EMBEDDINGS[q]))]
    times = [(3 * i) % 5 for i in range(len(cells))]
    expected = np.zeros(P)
    for (q, k), n in zip(cells, times, strict=True):
        for _ in range(n):
            expected += clipped(gradient(net, q, one_hot(q, k), seen), clip)
    found = summed(net, questions, seen, cells_of(cells, questions, times), clip)
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("clip", CLIPS)
def test_records_equal_one_gradient_per_distribution(clip: float) -> None:
    data, net, seen = make_group("g", QUESTIONS), model(3.0), points(QIDS[:2])
    local = trainer(data, unit="record", sample_rate=0.6, clip=clip)
    examples = local._sample(TRAIN, sampler(KEY, "draw"))
    assert 0 < len(examples.question) < len(TRAIN)
    expected = sum(
        clipped(gradient(net, TRAIN[i], data.distribution(TRAIN[i]), seen), clip) for i in examples.question
    )
    found = summed(net, TRAIN, seen, examples, clip)
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("clip", CLIPS)
def test_respondents_are_clipped_as_persons_not_as_answers(clip: float) -> None:
    data, net, seen = make_group("g", QUESTIONS, people=25), model(3.0), points(QIDS[:2])
    local = trainer(data, unit="respondent", answers_per_unit=3, clip=clip)
    examples = respondents(local.people, TRAIN, 0.5, 4, sampler(KEY, "draw"))
    drawn = [
        p
        for p, u in zip(local.people, sampler(KEY, "draw").random(len(local.people)), strict=True)
        if u < 0.5
    ]
    assert 0 < len(drawn) < len(local.people)
    expected = np.zeros(P)
    for person in drawn:
        whole = sum((gradient(net, q, one_hot(q, k), seen) for q, k in local.people[person]), np.zeros(P))
        if whole.any():
            expected += clipped(whole, clip)
    found = summed(net, TRAIN, seen, examples, clip)
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1.0, np.abs(expected).max()))


def test_more_examples_than_one_chunk_holds_give_the_same_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen, questions = model(), points(QIDS[:1]), TRAIN[:2]
    monkeypatch.setattr("clients.training._CHUNK", 64)
    cells = [(questions[i % 2], i % 2) for i in range(150)]
    examples = cells_of(cells, questions, [1] * 150)
    batches: list[int] = []
    net.register_forward_pre_hook(lambda _, given: batches.append(len(given[1])))
    once = [clipped(gradient(net, questions[i], one_hot(questions[i], i), seen), 0.5) for i in range(2)]
    np.testing.assert_allclose(
        summed(net, questions, seen, examples, 0.5), 75 * (once[0] + once[1]), rtol=1e-4, atol=1e-3
    )
    assert batches[-3:] == [50, 50, 50]


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_sums_equal_opacus_hooks_on_examples_with_a_context_each() -> None:
    """Opacus forms every example's gradient, with the context copied for each; ours reads it once."""
    net, seen = model(3.0), points(QIDS[:3])
    cells = [(q, k) for q in TRAIN for k in range(len(EMBEDDINGS[q]))]
    examples = cells_of(cells, TRAIN, [1 + i % 3 for i in range(len(cells))])
    targets, mask = pad_options([EMBEDDINGS[q] for q in TRAIN])
    at, wanted = torch.from_numpy(examples.question), torch.from_numpy(examples.target).float()
    hooked = GradSampleModule(model(3.0), loss_reduction="sum")
    likely = log_likelihood(hooked(seen.expand(len(at), -1, -1), targets[at]), mask[at])
    (-(wanted * likely.masked_fill(~mask[at], 0.0)).sum()).backward()
    formed = torch.cat([p.grad_sample.flatten(1) for p in hooked.parameters()], dim=1).double().numpy()
    lengths = np.linalg.norm(formed, axis=1)
    clip = float(np.median(lengths))
    expected = (examples.multiplicity * np.minimum(1.0, clip / lengths)) @ formed
    np.testing.assert_allclose(
        summed(net, TRAIN, seen, examples, clip), expected, atol=2e-4 * np.abs(expected).max()
    )
    # The same answers as those of persons, each with every third answer.
    units = np.array([[float(i % 3 == j) for i in range(len(cells))] for j in range(3)], dtype=np.float32)
    persons = units @ formed
    lengths = np.linalg.norm(persons, axis=1)
    clip = float(np.median(lengths))
    expected = np.minimum(1.0, clip / lengths) @ persons
    owned = Examples(examples.question, examples.target, np.ones(3, dtype=np.int64), units)
    np.testing.assert_allclose(
        summed(net, TRAIN, seen, owned, clip), expected, atol=2e-4 * np.abs(expected).max()
    )


def test_a_context_for_each_example_is_refused() -> None:
    net, targets = model(), torch.from_numpy(np.stack([EMBEDDINGS[TRAIN[0]]] * 2))
    with ClippedGradients(net, 1.0), pytest.raises(TypeError, match="one context"):
        net(points(QIDS[:2]).expand(2, -1, -1), targets)


# -- sensitivity: the claim that the noise is scaled to ------------------------------------------------------


def test_one_more_response_moves_the_sum_by_at_most_the_clipping_norm() -> None:
    clip = 0.3
    net, seen, questions = model(10.0), points(QIDS[:2]), TRAIN[:4]
    cells = [(q, k) for q in questions for k in range(len(EMBEDDINGS[q]))]
    base = [2] * len(cells)
    before = summed(net, questions, seen, cells_of(cells, questions, base), clip)
    moves = []
    for i in range(len(cells)):
        after = summed(
            net, questions, seen, cells_of(cells, questions, [n + (j == i) for j, n in enumerate(base)]), clip
        )
        moves.append(np.linalg.norm(after - before))
    assert max(moves) <= clip * (1 + 1e-4)
    assert max(moves) > 0.9 * clip  # the bound is used, so the test would see a missing clip


def test_one_more_respondent_moves_the_sum_by_at_most_the_clipping_norm() -> None:
    clip = 0.3
    data, net, seen = make_group("g", QUESTIONS, people=12), model(10.0), points(QIDS[:2])
    people = trainer(data, unit="respondent", answers_per_unit=4).people

    def total(who: list[int]) -> np.ndarray:
        return summed(
            net,
            TRAIN,
            seen,
            respondents({p: people[p] for p in who}, TRAIN, 1.1, 4, sampler(KEY, "x")),
            clip,
        )

    everyone = list(people)
    whole = total(everyone)
    moves = [np.linalg.norm(whole - total([p for p in everyone if p != gone])) for gone in everyone]
    assert max(moves) <= clip * (1 + 2e-3)  # float32: without one person the others' batch rounds differently
    assert max(moves) > 0.9 * clip


@pytest.mark.parametrize("units", [False, True])
def test_an_overflowing_gradient_counts_as_nothing_and_spoils_nobody_elses(units: bool) -> None:
    """Parameters that overflow on one answer must not make the sum, or its refusal, a signal."""
    layer = torch.nn.Linear(3, 2)
    read = torch.full((4, 1, 3), 1e-2)
    read[1], read[2], read[3] = float("nan"), float("inf"), 1e30  # the last: finite, but its norm is not
    owned = None
    if units:  # three people: the healthy answer, the healthy and all bad ones, only bad ones
        owned = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1]])
    with ClippedGradients(layer, 1.0) as gradients:
        found = gradients.sum(layer(read).mul(0.1).sum(), torch.ones(3 if units else 4), owned)
    torch.testing.assert_close(found, torch.tensor([1e-3] * 6 + [0.1] * 2))


@pytest.mark.parametrize("units", [False, True])
def test_norms_hold_where_terms_cancel(units: bool) -> None:
    """Parameters can be chosen so that huge terms nearly cancel; float32 norms alone would miss what is left of them."""
    rng = torch.Generator().manual_seed(1)
    clip, longest = 1.0, 0.0
    for size in (1e0, 1e2, 1e4, 1e6):
        layer = torch.nn.Linear(64, 16, bias=True)
        read = size * torch.randn(20, 2, 64, generator=rng)
        read[:, 1] = read[:, 0] * (1 + 1e-4 * torch.randn(20, 64, generator=rng))
        weight = torch.randn(20, 1, 16, generator=rng)
        owned = torch.eye(20) if units else None
        for i in range(20):
            chosen = torch.zeros(20)
            chosen[i] = 1.0
            with ClippedGradients(layer, clip) as gradients:
                out = layer(read)
                loss = ((out[:, :1] - out[:, 1:]) * weight).sum()  # the two positions' gradients cancel
                longest = max(longest, float(gradients.sum(loss, chosen, owned).double().norm()))
    assert longest <= clip * (1 + 1e-4)


@pytest.mark.parametrize("units", [False, True])
def test_norms_hold_where_terms_of_a_shared_context_cancel(units: bool) -> None:
    """As above, for points that all examples share: between them, with an example's own, and between a unit's examples."""

    class Cancelling(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.shared = torch.nn.Linear(64, 16), Shared()

        def forward(self, context: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
            (seen,) = self.shared([self.layer(context)], len(own))
            return seen[:, 0] - 2.0 * seen[:, 1] + self.layer(own)[:, 0]

    rng = torch.Generator().manual_seed(1)
    clip, longest = 1.0, 0.0
    for size in (1e0, 1e2, 1e4, 1e6):
        net = Cancelling()
        base = size * torch.randn(64, generator=rng)
        near = base * (1 + 1e-4 * torch.randn(22, 64, generator=rng))
        weight = torch.randn(20, 16, generator=rng)
        owned = torch.eye(20)
        if units:  # sums of two examples whose gradients are nearly opposite
            weight[10:] = -weight[:10] * (1 + 1e-4 * torch.randn(10, 16, generator=rng))
            owned = torch.eye(10).repeat(1, 2)
        for i in range(len(owned)):
            chosen = torch.zeros(len(owned))
            chosen[i] = 1.0
            with ClippedGradients(net, clip) as gradients:
                loss = (net(near[None, :2], near[2:, None]) * weight).sum()
                longest = max(
                    longest, float(gradients.sum(loss, chosen, owned if units else None).double().norm())
                )
    assert longest <= clip * (1 + 1e-4)


def test_a_layer_that_cannot_be_clipped_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear and LayerNorm"):
        ClippedGradients(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Bilinear(2, 2, 1)), 1.0)
    layer = torch.nn.Linear(2, 2)
    with ClippedGradients(layer, 1.0) as gradients, pytest.raises(TypeError, match="twice"):
        gradients.sum(layer(layer(torch.ones(3, 1, 2))).sum(), torch.ones(3))


def test_a_person_contributes_at_most_the_bound_chosen_at_random_and_only_training_answers() -> None:
    data = make_group("g", QUESTIONS, people=300, answers=9)
    plan = make_plan(TRAIN, QIDS[:3], unit="respondent", answers_per_unit=2)
    people = bounded_answers(data, plan, QIDS, KEY)
    assert data.responses is not None
    given: dict[int, set[tuple[str, int]]] = defaultdict(set)
    for person, q, k in zip(
        data.responses.respondent, data.responses.question, data.responses.option, strict=True
    ):
        given[int(person)].add((QIDS[q], int(k)))
    seen: dict[str, int] = defaultdict(int)
    for person, rows in people.items():
        assert len(rows) == len({q for q, _ in rows}) == 2
        assert set(rows) <= {row for row in given[person] if row[0] in TRAIN}
        for q, _ in rows:
            seen[q] += 1
    # Uniformly chosen: no question is favoured for its place in the file.
    asked = np.array([sum(any(q == t for q, _ in rows) for rows in given.values()) for t in TRAIN])
    expected = asked * sum(seen.values()) / asked.sum()
    assert stats.chisquare([seen[t] for t in TRAIN], expected).pvalue > 1e-4
    assert people == bounded_answers(data, plan, QIDS, KEY)  # the same ones in every round
    assert people != bounded_answers(data, plan, QIDS, bytes(32))


# -- sampling ------------------------------------------------------------------------------------------------


def test_every_response_is_drawn_independently_at_the_rate() -> None:
    rate, draws = 0.3, 4000
    data = make_group("g", QUESTIONS, people=30)
    local = trainer(data, sample_rate=rate)
    question = TRAIN[1]
    have = data.counts[question]
    rng = sampler(KEY, "many")
    taken = np.zeros((draws, len(have)))
    for i in range(draws):
        examples = local._sample([question], rng)
        for row, n in zip(examples.target, examples.multiplicity, strict=True):
            taken[i, int(row.argmax())] = n
    for k, n in enumerate(have):
        mean, variance = n * rate, n * rate * (1 - rate)
        assert abs(taken[:, k].mean() - mean) < 5 * np.sqrt(variance / draws) + 1e-9
        assert abs(taken[:, k].var() - variance) < 5 * variance * np.sqrt(2 / draws) + 0.05
        frequencies = np.bincount(taken[:, k].astype(int), minlength=int(n) + 1)
        expected = stats.binom.pmf(np.arange(len(frequencies)), n, rate) * draws
        keep = expected > 5
        assert (
            stats.chisquare(
                frequencies[keep], expected[keep] * frequencies[keep].sum() / expected[keep].sum()
            ).pvalue
            > 1e-4
        )
    if len(have) > 1:
        assert abs(np.corrcoef(taken.T)[0, 1]) < 5 / np.sqrt(draws)


@pytest.mark.parametrize("unit", ["record", "respondent"])
def test_records_and_respondents_are_a_poisson_sample(unit: str) -> None:
    rate, draws = 0.25, 3000
    data = make_group(
        "g", QUESTIONS, people=20, answers=10
    )  # everybody answers everything, so nobody drops out
    local = trainer(data, unit=unit, sample_rate=rate, answers_per_unit=20)
    rng = sampler(KEY, "many")
    units = len(TRAIN) if unit == "record" else 20
    sizes = np.array([len(local._sample(TRAIN, rng).multiplicity) for _ in range(draws)])
    assert abs(sizes.mean() - units * rate) < 5 * np.sqrt(units * rate * (1 - rate) / draws)
    assert abs(sizes.var() - units * rate * (1 - rate)) < 5 * units * rate * (1 - rate) * np.sqrt(2 / draws)


# -- a whole step --------------------------------------------------------------------------------------------


def run(local: Trainer, net: PreferencePredictor, round_index: int = 0) -> np.ndarray:
    start = flatten(net)
    out = local.round(start, round_index, net)
    unflatten(net, start)
    return out


def test_the_pseudo_gradient_is_the_clipped_sum_plus_noise_times_the_public_scale() -> None:
    data, net = make_group("g", QUESTIONS), model()
    local = trainer(data, noise_multiplier=1.5, clip=0.4, lr=0.5)
    questions, *_ = local.plan.steps(0)
    start = flatten(net).astype(np.float64)
    label = f"{local.plan.run}/0/{hashlib.sha256(start.tobytes()).hexdigest()}/0"
    examples = local._sample(questions, sampler(KEY, f"sample/{label}"))
    clean = summed(net, questions, points(QIDS[:3]), examples, 0.4)
    noise = gaussian(KEY, f"dp-sgd/{label}", P, 1.5 * 0.4)
    scale = 1.0 / local.plan.expected_batch(20.0, len(questions))
    np.testing.assert_allclose(run(local, net), (clean + noise) * scale, atol=1e-4)


def empty_like(data: GroupData) -> GroupData:
    """A group that was asked the context questions only."""
    responses = data.responses
    assert responses is not None
    keep = responses.question < 3
    left = Responses(responses.respondent[keep], responses.question[keep], responses.option[keep])
    return GroupData("empty", counts_of(QUESTIONS, left, "empty"), responses=left)


@pytest.mark.parametrize("unit", ["response", "record", "respondent"])
def test_an_empty_draw_still_releases_noise_of_the_stated_size(unit: str) -> None:
    local = trainer(
        empty_like(make_group("g", QUESTIONS)), unit=unit, noise_multiplier=1.5, clip=0.4, rounds=12
    )
    net = model(0.0)  # zero parameters: no rounding hides the noise
    scale = 1.0 / max(1.0, local.plan.expected_batch(20.0, len(local.plan.steps(0)[0])))
    draws = np.concatenate([run(local, net, r) for r in range(12) if len(local.plan.steps(r)[0]) == 4])
    assert stats.kstest(draws / (1.5 * 0.4 * scale), "norm").pvalue > 1e-4


def test_the_noise_is_named_by_round_and_parameters_and_repeats_for_the_same() -> None:
    local, net = trainer(make_group("g", QUESTIONS)), model()
    first = run(local, net)
    np.testing.assert_array_equal(first, run(local, net))  # after a crash: the same release, not a second one
    again = trainer(make_group("g", QUESTIONS))
    np.testing.assert_array_equal(first, run(again, net))
    assert np.abs(first - run(local, net, 1)).max() > 1e-3
    other = model()
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-4
    assert np.linalg.norm(first - run(local, other)) > 0.1 * np.linalg.norm(first)


def test_the_scale_knows_the_private_estimate_only() -> None:
    """Neighbouring data, same draw: outputs differ by one clipped gradient, not by another normalisation."""
    small, large = make_group("g", QUESTIONS, people=30), make_group("g", QUESTIONS, people=3000, seed=1)
    for data in (small, large):
        local = trainer(data, sample_rate=1e-9, clip=0.4, noise_multiplier=1.0)  # nobody is ever drawn
        net = model(0.0)
        noise = run(local, net)
        expected = local.plan.expected_batch(20.0, len(local.plan.steps(0)[0]))
        assert noise.std() == pytest.approx(0.4 / max(1.0, expected), rel=0.1)
    np.testing.assert_array_equal(*(run(trainer(d, sample_rate=1e-9), model(0.0)) for d in (small, large)))


def test_questions_the_group_was_not_asked_are_left_out() -> None:
    data = make_group("g", QUESTIONS)
    counts = {q: np.zeros_like(c) if q in TRAIN[::2] else c for q, c in data.counts.items()}
    local = trainer(GroupData("g", counts), unit="response")
    assert set(local.counts) == set(TRAIN[1::2])
    assert np.isfinite(run(local, model())).all()


def test_without_privacy_a_round_is_plain_gradient_descent_on_true_shares() -> None:
    data, net = make_group("g", QUESTIONS), model()
    local = plain(data, lr=0.01)
    questions, *_ = local.plan.steps(0)
    expected = np.mean([gradient(net, q, data.distribution(q), points(QIDS[:3])) for q in questions], axis=0)
    np.testing.assert_allclose(run(local, net), expected, atol=1e-3)


def test_several_local_steps_move_on_from_each_other() -> None:
    data, net = make_group("g", QUESTIONS), model()
    local = plain(data, local_steps=3, lr=0.05)
    theta = flatten(net).astype(np.float64)
    start = theta.copy()
    for questions in local.plan.steps(0):
        walker = model()
        unflatten(walker, theta)
        theta = theta - 0.05 * np.mean(
            [gradient(walker, q, data.distribution(q), points(QIDS[:3])) for q in questions], axis=0
        )
    np.testing.assert_allclose(run(local, net), (start - theta) / 0.05, atol=1e-3)
