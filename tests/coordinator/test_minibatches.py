"""The order of prompts over a run, and minibatches that lose and mix up nothing."""

import torch

from coordinator.minibatches import PromptSampler, shuffled, trimmed


def test_prompts_follow_seeded_permutations_without_a_remainder():
    order = list(PromptSampler(size=5, prompts=3, generations=2, repeats=2, steps=5, seed=1))
    assert len(order) == len(PromptSampler(5, 3, 2, 2, 5, 1)) == 3 * 2 * 2 * 5
    batches = [order[i : i + 6] for i in range(0, len(order), 6)]
    assert batches[::2] == batches[1::2]  # every batch recurs for its updates
    drawn = [i for batch in batches[::2] for i in batch[::2]]
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == sorted(drawn[10:15]) == list(range(5))
    assert order != list(PromptSampler(5, 3, 2, 2, 5, 2))


def test_minibatches_hold_every_row_once_and_keep_the_completions_of_a_prompt_together():
    rows = torch.arange(12)
    batch = {"prompt_ids": rows.unsqueeze(1), "returns": rows.unsqueeze(1) * 10.0}
    parts = shuffled(batch, parts=3, group=2)
    drawn = torch.cat([part["prompt_ids"] for part in parts]).flatten()
    assert [len(part["prompt_ids"]) for part in parts] == [4, 4, 4]
    assert sorted(drawn.tolist()) == rows.tolist()
    assert drawn.tolist() != rows.tolist()
    assert torch.equal(torch.cat([part["returns"] for part in parts]).flatten(), drawn * 10.0)
    pairs = drawn.view(-1, 2)
    assert torch.equal(pairs[:, 0] + 1, pairs[:, 1])
    assert (pairs[:, 0] % 2 == 0).all()


def test_trimming_takes_only_columns_that_are_padding_in_every_row():
    batch = {
        "prompt_ids": torch.tensor([[0, 0, 5], [0, 6, 7]]),
        "prompt_mask": torch.tensor([[0, 0, 1], [0, 1, 1]]),
        "completion_ids": torch.tensor([[1, 2, 0, 0], [3, 0, 0, 0]]),
        "completion_mask": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]),
        "advantages": torch.tensor([[0.1, 0.2, 0.0, 0.0], [0.3, 0.0, 0.0, 0.0]]),
    }
    short = trimmed(batch)
    assert short["prompt_ids"].tolist() == [[0, 5], [6, 7]]
    assert short["completion_ids"].tolist() == [[1, 2], [3, 0]]
    assert short["advantages"].shape == (2, 2)
    assert all(short["completion_mask"].sum(1) == torch.tensor([2, 1]))
