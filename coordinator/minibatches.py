"""The order in which a PPO run sees its prompts, and how a rollout batch becomes minibatches."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler


class PromptSampler(Sampler[int]):
    """Dataset indices of a whole run, in the order TRL's batching expects.

    Prompts come from one seeded permutation of the dataset after the other, without dropping a remainder. The
    order depends on the seed and the position alone, so a resumed run sees the prompts an undisturbed one
    would.
    """

    def __init__(
        self, size: int, prompts: int, generations: int, repeats: int, steps: int, seed: int
    ) -> None:
        """``prompts`` per PPO step, each ``generations`` times in a row; a batch recurs ``repeats`` times."""
        self.size, self.prompts, self.generations = size, prompts, generations
        self.repeats, self.steps, self.seed = repeats, steps, seed

    def _stream(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(self.size, generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        stream = self._stream()
        for _ in range(self.steps):
            batch = [i for i in (next(stream) for _ in range(self.prompts)) for _ in range(self.generations)]
            for _ in range(self.repeats):
                yield from batch

    def __len__(self) -> int:
        return self.prompts * self.generations * self.repeats * self.steps


def shuffled(batch: dict[str, Tensor], parts: int, group: int) -> list[dict[str, Tensor]]:
    """Split the rows of a batch into ``parts`` at random, by the global generator (which checkpoints hold).

    Runs of ``group`` rows, the completions of one prompt, stay together, so that they can share a pass.
    """
    rows = batch["prompt_ids"].size(0)
    order = torch.randperm(rows // group).unsqueeze(1) * group + torch.arange(group)
    chosen = order.flatten().to(batch["prompt_ids"].device).chunk(parts)
    return [{name: x[part] for name, x in batch.items()} for part in chosen]


def trimmed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch without the columns that are padding in every row: prompts on the left, the rest on the right."""
    first = int(batch["prompt_mask"].any(dim=0).int().argmax())
    length = max(1, int(batch["completion_mask"].sum(dim=1).max()))
    return {name: x[:, first:] if name.startswith("prompt") else x[:, :length] for name, x in batch.items()}
