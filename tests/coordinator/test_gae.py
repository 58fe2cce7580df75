"""The arithmetic of PPO against slow references written from the papers, one token at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.gae import (
    gae,
    leave_one_out,
    masked_mean,
    masked_moments,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)


@st.composite
def batches(draw):
    """(seed, lengths, T): completions of 0..T tokens, padded to T."""
    width = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(0, width), min_size=1, max_size=5))
    return draw(st.integers(0, 2**31)), lengths, width


def tensors(batch, count):
    """``count`` random (B, T) tensors with rubbish on the padding, and the mask."""
    seed, lengths, width = batch
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[1.0 if t < n else 0.0 for t in range(width)] for n in lengths], dtype=torch.float64)
    values = [torch.randn(mask.shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [v.where(mask > 0, torch.full_like(v, 1e30)) for v in values], mask


@given(batches(), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_gae_is_the_double_sum_of_equation_16(batch, gamma, lam):
    (rewards, values), mask = tensors(batch, 2)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(batch[1]):
        v = [*values[row, :length].tolist(), 0.0]
        delta = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(mask.size(1)):
            expected = math.fsum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-9)
            assert returns[row, t].item() == pytest.approx(expected + v[t] if t < length else 0.0, abs=1e-9)


def test_gae_with_lambda_1_is_the_discounted_return_less_the_value():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 0.25, 0.125]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3), 0.5, 1.0)
    assert returns.tolist() == [[3.0, 4.0, 4.0]]
    assert advantages.tolist() == [[2.5, 3.75, 3.875]]


@given(batches(), st.floats(0, 2))
@settings(max_examples=60, deadline=None)
def test_token_rewards_put_the_kl_on_every_token_and_the_score_on_the_last(batch, kl_coef):
    (logps, ref), mask = tensors(batch, 2)
    scores = torch.arange(1.0, len(batch[1]) + 1, dtype=torch.float64)
    rewards = token_rewards(scores, logps, ref, mask, kl_coef)
    for row, length in enumerate(batch[1]):
        for t in range(mask.size(1)):
            expected = 0.0
            if t < length:
                expected = -kl_coef * (logps[row, t].item() - ref[row, t].item())
            if t == length - 1:
                expected += row + 1.0
            assert rewards[row, t].item() == pytest.approx(expected, abs=1e-9)


def test_a_completion_that_ends_at_once_keeps_its_score():
    mask = torch.tensor([[1.0, 0.0, 0.0]])
    rewards = token_rewards(torch.tensor([0.7]), torch.zeros(1, 3), None, mask, 0.1)
    advantages, returns = gae(rewards, torch.tensor([[0.2, 9.0, 9.0]]), mask, 1.0, 0.95)
    assert rewards.tolist() == [[pytest.approx(0.7), 0.0, 0.0]]
    assert advantages.tolist() == [[pytest.approx(0.5), 0.0, 0.0]]
    assert returns.tolist() == [[pytest.approx(0.7), 0.0, 0.0]]


@given(batches(), st.floats(0.01, 0.5))
@settings(max_examples=60, deadline=None)
def test_policy_loss_is_equation_7(batch, clip):
    (logps, old, advantages), mask = tensors(batch, 3)
    loss, share = policy_loss(logps, old, advantages, mask, clip)
    terms, clipped = [], 0
    for row, length in enumerate(batch[1]):
        for t in range(length):
            ratio, a = math.exp(logps[row, t].item() - old[row, t].item()), advantages[row, t].item()
            bounded = min(max(ratio, 1 - clip), 1 + clip)
            terms.append(-min(ratio * a, bounded * a))
            clipped += bounded * a < ratio * a
    count = max(len(terms), 1)
    assert loss.item() == pytest.approx(math.fsum(terms) / count, abs=1e-9)
    assert share.item() == pytest.approx(clipped / count)


def test_the_clipped_side_of_the_policy_loss_has_no_gradient():
    logps = torch.tensor([[math.log(1.5), math.log(0.5)]], requires_grad=True)
    old, mask = torch.zeros(1, 2), torch.ones(1, 2)
    policy_loss(logps, old, torch.tensor([[1.0, -1.0]]), mask, 0.2)[0].backward()
    assert logps.grad.tolist() == [[0.0, 0.0]]
    logps.grad = None
    policy_loss(logps, old, torch.tensor([[-1.0, 1.0]]), mask, 0.2)[0].backward()
    assert logps.grad.tolist() == [[pytest.approx(0.75), pytest.approx(-0.25)]]


@given(batches(), st.one_of(st.none(), st.floats(0.01, 1.0)))
@settings(max_examples=60, deadline=None)
def test_value_loss_takes_the_larger_of_two_squared_errors(batch, clip):
    (values, old, returns), mask = tensors(batch, 3)
    loss, _ = value_loss(values, old, returns, mask, clip)
    terms = []
    for row, length in enumerate(batch[1]):
        for t in range(length):
            v, before, target = (x[row, t].item() for x in (values, old, returns))
            error = (v - target) ** 2
            if clip is not None:
                error = max(error, (before + min(max(v - before, -clip), clip) - target) ** 2)
            terms.append(0.5 * error)
    assert loss.item() == pytest.approx(math.fsum(terms) / max(len(terms), 1), abs=1e-9)


@given(batches())
@settings(max_examples=60, deadline=None)
def test_whitened_tokens_have_mean_0_and_variance_1_and_padding_stays_0(batch):
    (x,), mask = tensors(batch, 1)
    white = whiten(x, mask)
    kept = white[mask > 0].numpy()
    assert (white[mask == 0] == 0).all()
    if len(kept) > 1:
        assert np.mean(kept) == pytest.approx(0.0, abs=1e-6)
        assert np.var(kept) == pytest.approx(1.0, abs=1e-3)
    else:
        assert (kept == 0).all()


def test_moments_of_two_processes_add_up():
    x, mask = torch.randn(6, 4), (torch.rand(6, 4) > 0.3).float()
    both = masked_moments(x[:2], mask[:2]) + masked_moments(x[2:], mask[2:])
    assert torch.allclose(
        whiten(x, mask), torch.cat([whiten(x[:2], mask[:2], both), whiten(x[2:], mask[2:], both)])
    )


@given(
    st.lists(st.lists(st.one_of(st.none(), st.floats(-5, 5)), min_size=3, max_size=3), min_size=1, max_size=4)
)
@settings(max_examples=60, deadline=None)
def test_leave_one_out_takes_the_mean_of_the_scored_siblings(prompts):
    flat = torch.tensor([math.nan if x is None else x for row in prompts for x in row], dtype=torch.float64)
    centred = leave_one_out(flat, 3).tolist()
    for p, row in enumerate(prompts):
        for i, score in enumerate(row):
            others = [x for k, x in enumerate(row) if k != i and x is not None]
            if score is None:
                assert math.isnan(centred[3 * p + i])
            else:
                expected = score - sum(others) / len(others) if others else 0.0
                assert centred[3 * p + i] == pytest.approx(expected, abs=1e-9)


def test_an_empty_mask_gives_zero_with_a_zero_gradient():
    x = torch.full((2, 3), torch.nan, requires_grad=True)
    masked_mean(x, torch.zeros(2, 3)).backward()
    assert x.grad.tolist() == [[0.0] * 3] * 2
