"""Trees of prompts and completions in packed rows: every number is that of a plain pass of one completion by itself."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
)

from coordinator.critic import CompletionScorer
from coordinator.packing import ROW, pack, packable
from coordinator.sampling import rollout

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
}
GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=256)
FULL = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=1),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2),
    "gpt2": GPT2,
}


def make(config, attention="sdpa"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention).eval()


def batch_of(heads, tails, group, seed=0):
    """(ids, attention, length): random tokens 3.. of such lengths, prompts padded left, completions right."""
    rng = np.random.default_rng(seed)
    width, length = max(heads), max(tails)
    ids, attention = np.zeros((2, len(tails), width + length), int)
    for row, tail in enumerate(tails):
        head = heads[row // group]
        prompt = np.random.default_rng([seed, row // group]).integers(3, 50, head)
        ids[row, width - head : width + tail] = [*prompt, *rng.integers(3, 50, tail)]
        attention[row, width - head : width + tail] = 1
    return torch.from_numpy(ids), torch.from_numpy(attention), length


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_slot_sees_its_prompt_and_its_own_completion_and_nothing_else(data):
    group = data.draw(st.integers(1, 4))
    heads = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=6))
    tails = data.draw(st.lists(st.integers(1, 9), min_size=len(heads) * group, max_size=len(heads) * group))
    ids, attention, length = batch_of(heads, tails, group)
    packed = pack(attention, length, group)
    assert packed.source.size(1) <= max(ROW, max(heads) + group * (max(tails) - 1))
    assert len(packed.states) == sum(tails)
    width = ids.size(1)
    taken, states = [], iter(packed.states.tolist())
    for row, tail in enumerate(tails):
        head = heads[row // group]
        text = ids[row, width - length - head : width - length + tail - 1].tolist()
        for t in range(tail):
            at, slot = divmod(next(states), packed.source.size(1))
            taken.append((at, slot))
            visible = packed.mask[at, 0, slot].nonzero().flatten()
            assert ids.flatten()[packed.source[at, visible]].tolist() == text[: head + t]
            assert packed.positions[at, visible].tolist() == list(range(head + t))
    # The prompt's last slot chooses the first token of all its completions; every other slot chooses once.
    assert len(set(taken)) == len(heads) + sum(tails) - len(tails)
    assert packed.mask.any(dim=3).all()  # an attention over nothing is not a number


@pytest.mark.parametrize("name", sorted(FULL))
@pytest.mark.parametrize("group", [1, 3])
def test_packed_passes_give_the_numbers_and_gradients_of_one_plain_pass_per_completion(name, group):
    model, oracle = make(FULL[name]), make(FULL[name])
    assert packable(model)
    heads, tails = [4, 90, 1, 30], [5, 1, 2, 1, 3, 6, 6, 6, 6, 2, 1, 4]
    heads = heads if group == 3 else heads * 3
    ids, attention, length = batch_of(heads, tails, group)
    logps, entropies, hidden = CompletionScorer(model, 0.7, True)(model, ids, attention, length, group)
    assert logps.shape == entropies.shape == hidden.shape[:2] == (12, length)
    (logps.sum() + entropies.sum() + hidden.pow(2).sum()).backward()
    total = 0.0
    for row, tail in enumerate(tails):
        text = ids[row][attention[row] > 0]
        out = oracle(input_ids=text.unsqueeze(0), output_hidden_states=True)
        logp = torch.log_softmax(out.logits[0] / 0.7, -1)[-tail - 1 : -1]
        state = out.hidden_states[-1][0, -tail - 1 : -1]
        chosen, entropy = logp[range(tail), text[-tail:]], -(logp.exp() * logp).sum(-1)
        for found, expected in ((logps, chosen), (entropies, entropy), (hidden, state)):
            assert torch.allclose(found[row, :tail], expected, atol=1e-5)
            assert (found[row, tail:] == 0).all()
        total = total + chosen.sum() + entropy.sum() + state.pow(2).sum()
    total.backward()
    theirs = dict(oracle.named_parameters())
    for name_, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name_].grad, atol=2e-4, rtol=1e-3), name_


@pytest.mark.parametrize(
    ("config", "attention"),
    [
        (MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4), "sdpa"),
        (FULL["llama"], "eager"),
    ],
)
def test_models_that_need_more_than_a_mask_are_read_row_by_row_with_equal_results(config, attention):
    model = make(config, attention)
    assert not packable(model)
    ids, mask, length = batch_of([4, 9], [5, 1, 2, 1], 2)
    logps, _, _ = CompletionScorer(model, 1.0, True)(model, ids, mask, length, 2)
    for row, tail in enumerate([5, 1, 2, 1]):
        text = ids[row][mask[row] > 0]
        with torch.no_grad():
            logp = torch.log_softmax(model(input_ids=text.unsqueeze(0)).logits[0], -1)[-tail - 1 : -1]
        assert torch.allclose(logps[row, :tail], logp[range(tail), text[-tail:]], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "attention", "n"),
    [("llama", "sdpa", 4), ("gpt2", "sdpa", 10), ("qwen2", "sdpa", 11), ("llama", "eager", 4)],
)
def test_completions_side_by_side_are_sampled_with_the_log_probs_of_a_plain_pass(name, attention, n):
    model = make(FULL[name], attention)
    prompts = [[3, 4, 5, 6, 7], [8], list(range(3, 40))]
    torch.manual_seed(1)
    drawn = rollout(model, prompts, n, 6, 0.9, list(range(25)), 0, keep_hidden=True)  # half of the tokens end
    assert len(set(drawn.mask.sum(1).tolist())) > 2
    assert len(drawn.tokens) == 3 * n
    for row, (tokens, kept) in enumerate(zip(drawn.tokens, drawn.mask, strict=True)):
        answer, prompt = tokens[kept].tolist(), prompts[row // n]
        assert all(token >= 25 for token in answer[:-1])
        assert len(answer) == 6 or answer[-1] < 25
        with torch.no_grad():
            out = model(input_ids=torch.tensor([[*prompt, *answer]]), output_hidden_states=True)
        logp = torch.log_softmax(out.logits[0] / 0.9, -1)[len(prompt) - 1 : -1]
        assert torch.allclose(drawn.logps[row][kept], logp[range(len(answer)), answer], atol=1e-5)
        assert torch.allclose(
            drawn.hidden[row][kept], out.hidden_states[-1][0, len(prompt) - 1 : -1], atol=1e-5
        )
        assert (drawn.logps[row][~kept] == 0).all()
        assert (drawn.hidden[row][~kept] == 0).all()
        assert (tokens[~kept] == 0).all()


def test_models_with_a_recurrent_state_are_not_packed():
    assert not packable(
        make(MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, vocab_size=50), "eager")
    )


def test_the_other_prompts_of_a_batch_change_nothing():
    model = make(FULL["llama"])
    alone = rollout(model, [[5, 6, 7]], 2, 4, 0.0, [1], 0)
    together = rollout(model, [[5, 6, 7], list(range(3, 30))], 2, 4, 0.0, [1], 0)
    width = alone.tokens.size(1)
    assert torch.equal(alone.tokens, together.tokens[:2, :width])
    assert torch.allclose(alone.logps, together.logps[:2, :width], atol=1e-5)
