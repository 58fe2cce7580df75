"""Answers as tokens: log-probabilities against a plain forward pass, and a policy that survives being sent."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from appa_secure.language import adapted, answer_ids, answer_logits, answer_logps, pack_policy, unpack_policy
from appa_secure.predictor import flatten, unflatten
from coordinator.policies import build_tiny, build_tokenizer

PROMPTS = ["Do you drink tea? | Often | Never = 2 :", "Safe? | not | a little | very = 3 :"]
ANSWERS = ["3 7", "10 0", "1 2 3", "4"]


@pytest.fixture
def policy():
    tokenizer = build_tokenizer(PROMPTS, 90)
    return build_tiny(tokenizer, 16, 2, 2, seed=3), tokenizer


def tokens(tokenizer) -> tuple[list[list[int]], list[list[int]]]:
    prompts = [tokenizer(p)["input_ids"] for p in PROMPTS]
    rows = [answer_ids(tokenizer, PROMPTS[i // 2], prompts[i // 2], a) for i, a in enumerate(ANSWERS)]
    return prompts, rows


def slow_logps(model, prompt: Sequence[int], answer: Sequence[int], temperature: float) -> list[float]:
    """One sequence at a time, without padding or cache."""
    logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0] / temperature
    table = torch.log_softmax(logits, dim=-1)
    return [float(table[len(prompt) + t - 1, token]) for t, token in enumerate(answer)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_a_plain_pass(policy, temperature: float) -> None:
    model, tokenizer = policy
    prompts, rows = tokens(tokenizer)
    with torch.no_grad():
        logps, mask = answer_logps(model, tokenizer.pad_token_id, prompts, rows, temperature)
        for i, row in enumerate(rows):
            expected = slow_logps(model, prompts[i // 2], row, temperature)
            np.testing.assert_allclose(logps[i][mask[i]], expected, rtol=1e-4, atol=1e-5)
    assert mask.sum(1).tolist() == [len(row) for row in rows]
    assert logps[~mask].abs().max() == 0


def test_gradients_flow_into_the_shared_prompt(policy) -> None:
    model, tokenizer = policy
    prompts, rows = tokens(tokenizer)
    logps, _ = answer_logps(model, tokenizer.pad_token_id, prompts, rows, 1.0)
    logps.sum().backward()
    fast = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    total = 0.0
    for i, row in enumerate(rows):
        logits = model(input_ids=torch.tensor([[*prompts[i // 2], *row]])).logits[0]
        table, start = torch.log_softmax(logits, dim=-1), len(prompts[i // 2])
        total = total + sum(table[start + t - 1, token] for t, token in enumerate(row))
    total.backward()
    slow = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-5)


def test_answers_of_one_token(policy) -> None:
    model, tokenizer = policy
    prompts, _ = tokens(tokenizer)
    logits, labels = answer_logits(model, tokenizer.pad_token_id, prompts, [[5], [6]])
    assert logits.shape[:2] == labels.shape == (2, 1)


def test_a_policy_survives_being_sent(policy) -> None:
    model, tokenizer = policy
    body = pack_policy(model, tokenizer)
    assert "_name_or_path" not in body["config"]
    there, words = unpack_policy(body, lambda raw, size: np.frombuffer(raw, dtype="<f4"))
    np.testing.assert_array_equal(flatten(there), flatten(model))
    assert words(PROMPTS)["input_ids"] == tokenizer(PROMPTS)["input_ids"]
    prompts, rows = tokens(words)
    with torch.no_grad():
        for a, b in zip(
            answer_logits(model, 0, prompts, rows), answer_logits(there, 0, prompts, rows), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_with_an_adapter_the_vector_is_the_adapter(policy) -> None:
    model, tokenizer = policy
    whole, before = len(flatten(model)), {k: v.clone() for k, v in model.state_dict().items()}
    small = adapted(model, {"r": 2, "alpha": 4, "dropout": 0.5, "target_modules": None})
    vector = flatten(small)
    assert 0 < len(vector) < whole
    unflatten(small, vector + 0.1)
    base = small.get_base_model().state_dict()
    for name, value in before.items():
        found = base.get(name, base.get(name.replace(".weight", ".base_layer.weight")))
        torch.testing.assert_close(found, value, rtol=0, atol=0)
    prompts, rows = tokens(tokenizer)
    first = answer_logps(small, 0, prompts, rows, 1.0)[0]
    torch.testing.assert_close(first, answer_logps(small, 0, prompts, rows, 1.0)[0])  # dropout is off
