"""The preference predictor: separable, indifferent to order, and the same however questions are batched."""

import numpy as np
import pytest
import torch

from appa_secure.predictor import (
    DIRECTION,
    PredictorShape,
    PreferencePredictor,
    context_points,
    flatten,
    log_likelihood,
    pad_options,
    predict,
    unflatten,
)

E = 6
SHAPE = PredictorShape(embedding=E, dim=16, layers=2, heads=4, ff=24, mlp_depth=3)


@pytest.fixture
def model() -> PreferencePredictor:
    torch.manual_seed(1)
    return PreferencePredictor(SHAPE).eval()


def questions(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((int(rng.integers(2, 6)), E)).astype(np.float32) for _ in range(count)]


def context(count: int = 3, seed: int = 9) -> torch.Tensor:
    embeddings = questions(count, seed)
    rng = np.random.default_rng(seed)
    return context_points(embeddings, [rng.dirichlet(np.ones(len(e))) for e in embeddings])


def test_a_context_point_is_the_question_and_the_direction_of_the_preference() -> None:
    embeddings, rng = questions(3), np.random.default_rng(0)
    shares = [rng.dirichlet(np.ones(len(e))) for e in embeddings]
    points = context_points(embeddings, shares)
    assert points.shape == (3, 2 * E)
    assert points.dtype == torch.float32
    for row, e, y in zip(points.numpy(), embeddings, shares, strict=True):
        np.testing.assert_allclose(row[:E], sum(e) / len(e), rtol=1e-5)
        direction = sum((share - 1 / len(e)) * x for share, x in zip(y, e, strict=True))
        np.testing.assert_allclose(row[E:], DIRECTION * direction, rtol=1e-4, atol=1e-5)
    even = context_points(embeddings, [np.full(len(e), 1 / len(e)) for e in embeddings])
    np.testing.assert_allclose(even[:, E:].numpy(), 0.0, atol=1e-5)  # no preference, no direction


def test_options_are_padded_and_the_padding_is_marked() -> None:
    embeddings = questions(5)
    padded, mask = pad_options(embeddings)
    assert padded.shape == (5, max(map(len, embeddings)), E)
    for row, real, e in zip(padded.numpy(), mask.numpy(), embeddings, strict=True):
        assert real.tolist() == [True] * len(e) + [False] * (padded.shape[1] - len(e))
        np.testing.assert_array_equal(row[real], e)
        assert not row[~real].any()


def test_a_question_is_predicted_alike_alone_and_among_others(model) -> None:
    """Targets attend to the context only; a batch, in chunks of 128, is no more than each question."""
    many, seen = questions(150), context()
    together = predict(model, seen, many)
    for i in (0, 1, 127, 128, 149):
        (alone,) = predict(model, seen, [many[i]])
        assert alone.shape == (len(many[i]),)
        assert alone.sum() == pytest.approx(1.0)
        np.testing.assert_allclose(together[i], alone, atol=1e-6)
    with torch.no_grad():
        logits = model(seen[None], torch.from_numpy(many[0])[None]).double().numpy()[0]
    np.testing.assert_allclose(together[0], np.exp(logits) / np.exp(logits).sum(), atol=1e-6)


def test_one_records_loss_has_no_gradient_through_another_question(model) -> None:
    """The separable loss of the privacy analysis: a term is a function of its own question and the context."""
    padded, mask = pad_options(questions(4))
    targets = padded.clone().requires_grad_()
    seen = context().clone().requires_grad_()
    likely = log_likelihood(model(seen.expand(4, -1, -1), targets), mask)
    (-likely[2][mask[2]].sum()).backward()
    assert targets.grad is not None
    assert targets.grad[2][mask[2]].abs().sum() > 0
    assert not targets.grad[[0, 1, 3]].any()
    assert not targets.grad[2][~mask[2]].any()
    assert seen.grad is not None
    assert seen.grad.abs().sum() > 0


def test_the_order_of_points_does_not_matter(model) -> None:
    seen, (question,) = context(4), questions(1)
    (straight,) = predict(model, seen, [question])
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(predict(model, seen[order], [question])[0], straight, atol=1e-6)
    np.testing.assert_allclose(predict(model, seen, [question[::-1].copy()])[0], straight[::-1], atol=1e-6)


def test_the_context_is_used_also_its_shares(model) -> None:
    (question,) = questions(1)
    seen = context()
    other = seen.clone()
    other[:, E:] *= -1
    assert np.abs(predict(model, seen, [question])[0] - predict(model, other, [question])[0]).max() > 1e-3


def test_log_likelihood_is_a_masked_log_softmax() -> None:
    logits = torch.tensor([[1.0, 2.0, 50.0], [0.5, -0.5, 0.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    p = log_likelihood(logits, mask).exp()
    torch.testing.assert_close(p.sum(1), torch.ones(2))
    assert p[0, 2] == 0
    torch.testing.assert_close(p[0, :2], torch.softmax(logits[0, :2], 0))


def test_parameters_survive_the_way_through_one_vector(model) -> None:
    vector = flatten(model)
    assert vector.dtype == np.float32
    assert len(vector) == sum(p.numel() for p in model.parameters())
    torch.manual_seed(2)
    other = PreferencePredictor(SHAPE)
    unflatten(other, vector)
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    vector[:] = 0  # a copy, not a view
    assert flatten(model).any()
    for wrong in (vector[:-1], np.append(vector, 0), vector[None]):
        with pytest.raises(ValueError, match="shape"):
            unflatten(other, wrong)


def test_shapes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"predictor\.dim=10.*predictor\.heads=4"):
        PredictorShape(embedding=E, dim=10, heads=4)


def test_it_learns_a_preference_from_its_context() -> None:
    """Groups differ only in their context: what they like there says what they like elsewhere."""
    torch.manual_seed(0)
    model = PreferencePredictor(PredictorShape(embedding=E, dim=16, layers=1, heads=2, ff=16, mlp_depth=2))
    rng = np.random.default_rng(0)
    taste = rng.standard_normal((4, E))
    known, asked = [q[:2] for q in questions(4, 1)], [q[:2] for q in questions(12, 2)]

    def shares(group: int, question: np.ndarray) -> np.ndarray:
        score = np.exp(2 * question @ taste[group])
        return score / score.sum()

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    targets, mask = pad_options(asked)
    losses = []
    for step in range(120):
        group = step % 4
        seen = context_points(known, [shares(group, q) for q in known])
        wanted = torch.tensor(np.stack([shares(group, q) for q in asked]), dtype=torch.float32)
        loss = -(wanted * log_likelihood(model(seen.expand(12, -1, -1), targets), mask)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-8:]) < np.mean(losses[:8]) - 0.1
    contexts = [context_points(known, [shares(g, q) for q in known]) for g in range(4)]
    predicted = [np.stack(predict(model, seen, asked)) for seen in contexts]  # (4, 12, 2)
    true = [np.stack([shares(g, q) for q in asked]) for g in range(4)]
    for g in range(4):
        own = np.abs(predicted[g] - true[g]).mean()
        assert own < 0.7 * np.abs(np.mean(predicted, axis=0) - true[g]).mean()
