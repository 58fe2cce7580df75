"""The sampling loop against the model's own forward pass and transformers' ``generate``."""

import pytest
import torch

from coordinator.policies import build_tiny, build_tokenizer
from coordinator.sampling import rollout, sample

PROMPTS = ["which way | left | right =", "how much tea | none | some | all of it =", "why ="]


@pytest.fixture(scope="module")
def policy():
    tokenizer = build_tokenizer(PROMPTS, 70)
    return build_tiny(tokenizer, dim=16, layers=2, heads=2, seed=0).eval(), tokenizer


def test_greedy_completions_are_those_of_generate(policy):
    model, tokenizer = policy
    encoded = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    keep = {k: encoded[k] for k in ("input_ids", "attention_mask")}
    expected = model.generate(**keep, do_sample=False, max_new_tokens=8)[:, keep["input_ids"].size(1) :]
    drawn = rollout(model, tokenizer(PROMPTS)["input_ids"], 1, 8, 0.0, [tokenizer.eos_token_id], 0)
    width = expected.size(1)
    assert drawn.tokens.size(1) == width
    assert torch.equal(drawn.tokens[drawn.mask], expected[drawn.mask])


def test_log_probs_masks_and_states_are_those_of_a_plain_forward_pass(policy):
    model, tokenizer = policy
    ids = tokenizer(PROMPTS)["input_ids"]
    ends = list(range(20, 40))  # many tokens end a completion, so that lengths differ
    drawn = rollout(model, ids, 3, 6, 0.7, ends, tokenizer.pad_token_id, keep_hidden=True)
    assert len({int(n) for n in drawn.mask.sum(1)}) > 1
    for row in range(9):
        prompt, completion = ids[row // 3], drawn.tokens[row][drawn.mask[row]].tolist()
        assert all(token not in ends for token in completion[:-1])
        assert len(completion) == 6 or completion[-1] in ends
        with torch.no_grad():
            out = model(input_ids=torch.tensor([[*prompt, *completion]]), output_hidden_states=True)
        logp = torch.log_softmax(out.logits[0] / 0.7, -1)[len(prompt) - 1 : -1]
        n = len(completion)
        assert torch.allclose(drawn.logps[row, :n], logp[range(n), completion], atol=1e-5)
        assert (drawn.logps[row, n:] == 0).all()
        assert (drawn.tokens[row, n:] == tokenizer.pad_token_id).all()
        assert torch.allclose(
            drawn.hidden[row, :n], out.hidden_states[-1][0, len(prompt) - 1 : -1], atol=1e-5
        )


def test_samples_follow_the_distribution_of_the_model(policy):
    model, tokenizer = policy
    ids = tokenizer(PROMPTS[:1])["input_ids"]
    with torch.no_grad():
        expected = torch.softmax(model(input_ids=torch.tensor(ids)).logits[0, -1] * 4, -1)
    drawn = rollout(model, ids, 20000, 1, 0.25, [tokenizer.eos_token_id], 0).tokens.flatten()
    seen = torch.bincount(drawn, minlength=len(expected)) / 20000
    assert (seen - expected).abs().max() < 0.02


def test_evaluation_samples_depend_on_the_seed_alone_and_disturb_nothing(policy):
    model, tokenizer = policy
    model.train()
    before = torch.get_rng_state()
    first = sample(model, tokenizer, PROMPTS, 4, seed=5, max_new_tokens=4)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    torch.manual_seed(99)
    assert sample(model, tokenizer, PROMPTS, 4, seed=5, max_new_tokens=4) == first
    assert sample(model, tokenizer, PROMPTS, 4, seed=6, max_new_tokens=4) != first
    assert [len(texts) for texts in first] == [4, 4, 4]
    model.eval()
