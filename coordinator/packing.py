"""Prompts with their completions as trees, several of them in one row: no padding is read, and no prompt twice.

A tree is a prompt followed by all its completions. A token sees its own prompt and what stands before it in its own
completion, and its position is the one it has in the completion's text, so every number is that of a pass of one
completion by itself. This holds for models that look at other tokens through masked attention alone.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

# Slots of a row that holds several short trees. Longer rows leave fewer slots empty, shorter ones waste less attention.
ROW = 128


@dataclass(frozen=True)
class Packed:
    """R rows of L slots that hold the N trees of a batch of B completions, each without its last token."""

    source: Tensor  # (R, L) int64: which element of the flattened (B, P + T) batch stands in a slot; 0 on empty slots
    positions: Tensor  # (R, L) int64
    mask: Tensor  # (R, 1, L, L) bool: whether the slot of axis 2 sees that of axis 3; an empty one sees empty ones
    states: (
        Tensor  # (M,) int64: flat index of the slot that chooses a token, for the M tokens of all completions
    )


def packable(base: PreTrainedModel) -> bool:
    """Whether the model computes with a mask of any form and positions of any order, and with nothing else."""
    config = base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    return (
        base.config._attn_implementation == "sdpa"
        and "position_ids" in inspect.signature(base.forward).parameters
        and not base._is_stateful
        and kinds == {"full_attention"}
        and (window is None or hasattr(config, "layer_types"))
    )


def pack(attention: Tensor, length: int, group: int) -> Packed:
    """Lay out a batch.

    Args:
        attention: (B, P + T), prompts padded on the left, completions on the right; rows are runs of ``group``
            completions of one prompt.
        length: T.
    """
    kept = attention.cpu().numpy() > 0
    prompt = kept.shape[1] - length
    heads = kept[::group, :prompt].sum(axis=1)  # (N,)
    tails = np.maximum(kept[:, prompt:].sum(axis=1) - 1, 0)  # (B,), the last token chooses nothing
    sizes = heads + tails.reshape(-1, group).sum(axis=1)  # (N,)
    rows = _fill(sizes, max(int(sizes.max()), ROW))
    shape = (len(rows), max(int(sizes[row].sum()) for row in rows))
    source, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    tree = np.full(shape, -1)
    branch = np.zeros(shape, np.int64)  # 0 in the prompt
    states = np.zeros((len(kept), length), np.int64)  # 0 on padding
    width = kept.shape[1]
    for r, row in enumerate(rows):
        at = 0
        for n in row:
            head, first = int(heads[n]), n * group
            begin, root = at, r * shape[1] + at + head - 1
            source[r, at : at + head] = first * width + prompt - head + np.arange(head)
            positions[r, at : at + head] = np.arange(head)
            at += head
            for b in range(first, first + group):
                tail = int(tails[b])
                source[r, at : at + tail] = b * width + prompt + np.arange(tail)
                positions[r, at : at + tail] = head + np.arange(tail)
                branch[r, at : at + tail] = 1 + b - first
                states[b, 0] = root
                states[b, 1 : 1 + tail] = r * shape[1] + at + np.arange(tail)
                at += tail
            tree[r, begin:at] = n
    order, where = np.arange(shape[1]), attention.device
    mask = tree[:, :, None] == tree[:, None, :]
    mask &= (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    mask &= order[:, None] >= order
    chosen = states[kept[:, prompt:]]
    found = (torch.from_numpy(x).to(where) for x in (source, positions, mask[:, None], chosen))
    return Packed(*found)


def _fill(sizes: Any, room: int) -> list[list[int]]:
    """Trees of each row: the longest first, each into the first row that has room for it."""
    rows: list[list[int]] = []
    left: list[int] = []
    for n in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[n])
        fits = next((r for r, free in enumerate(left) if free >= size), None)
        if fits is None:
            rows.append([n])
            left.append(room - size)
        else:
            rows[fits].append(n)
            left[fits] -= size
    return rows
