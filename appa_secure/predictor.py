"""The preference predictor: the GPO transformer of PluralLLM (Zhao et al., ICLR 2024; arXiv 2503.09925).

Given a group's *context*, its answers to a few questions, the network predicts the group's distribution over the
options of another question. It is a neural process: no positional encoding, every point attends to context points
only, so targets do not see each other and a question's prediction depends on that question and the context alone. That
is what makes the training loss separable (threat_model: one record, one term), which per-example clipping needs.

With x_k the embedding of "question + option k" (E,) and y_k the share of the group that prefers option k of K:

    context point of a question   (mean_k x_k,  DIRECTION * sum_k (y_k - 1/K) x_k)      (2E,)
    target point of an option     (x_k, 0)                                              (2E,)

Departures from GPO. A context question is one point, which says what the group prefers as a direction among the
embeddings; GPO takes a point (x_k, y_k) per option, whose single number y_k is lost among the E of x_k (docs/decisions,
number 12). Targets are categorical: the head returns one logit per option instead of (mean, log sigma), and the loss
is the cross entropy of the softmax over a question's options (number 6).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Shares of groups differ by about 0.06 (standard deviation, OpinionQA): this makes the difference weigh as much as a text.
DIRECTION = 30.0


@dataclass(frozen=True)
class PredictorShape:
    """Sizes of the network; the defaults are the published ones (PluralLLM, arXiv 2503.09925)."""

    embedding: int
    dim: int = 128
    layers: int = 6
    heads: int = 4
    ff: int = 128
    mlp_depth: int = 4

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"predictor.dim={self.dim} must be a multiple of predictor.heads={self.heads}")


class Shared(nn.Module):
    """Hands what one context gave to every example that has this context.

    A module, so that clients/clipping.py can see where the computation of single examples begins.
    """

    def forward(self, seen: Sequence[Tensor], examples: int) -> tuple[Tensor, ...]:
        """seen: tensors (B, ...) -> (examples, ...); B is 1 or `examples`."""
        return tuple(one.expand(examples, *one.shape[1:]) for one in seen)


class _Layer(nn.Module):
    """Pre-norm transformer layer in which every point attends to the context points."""

    def __init__(self, shape: PredictorShape) -> None:
        super().__init__()
        d = shape.dim
        self.heads = shape.heads
        self.norm_attention = nn.LayerNorm(d)
        # Plain Linear layers (not nn.MultiheadAttention), whose gradients of single examples are known.
        self.query, self.key, self.value, self.out = (nn.Linear(d, d) for _ in range(4))
        self.norm_ff = nn.LayerNorm(d)
        self.ff_in, self.ff_out = nn.Linear(d, shape.ff), nn.Linear(shape.ff, d)

    def forward(self, points: Tensor, normed: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """points, and normalised, (B, N, d), which attend to the context's keys and values (B, C, d)."""
        b, n, d = points.shape
        q, k, v = (
            part.view(b, -1, self.heads, d // self.heads).transpose(1, 2)  # (B, H, N or C, d/H)
            for part in (self.query(normed), keys, values)
        )
        # Written out: torch's fused attentions have no backward pass for the gradients of many examples at once, and which
        # of them runs is a switch of the whole process, while clients of a simulation compute side by side in threads.
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(d // self.heads), dim=3)
        mixed = (weights @ v).transpose(1, 2).reshape(b, n, d)
        points = points + self.out(mixed)
        return points + self.ff_out(F.gelu(self.ff_in(self.norm_ff(points))))


class PreferencePredictor(nn.Module):
    """GPO transformer over preference points; returns one logit per option."""

    def __init__(self, shape: PredictorShape) -> None:
        super().__init__()
        self.shape = shape
        sizes = [2 * shape.embedding] + [shape.dim] * shape.mlp_depth
        steps: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(sizes)):
            steps += [nn.Linear(a, b)] + ([nn.GELU()] if i < shape.mlp_depth - 1 else [])
        self.point = nn.Sequential(*steps)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.shared = Shared()
        self.norm = nn.LayerNorm(shape.dim)
        self.head = nn.Linear(shape.dim, 1)
        self._initialise()

    def _initialise(self) -> None:
        """Weights that keep the variance of their input (He et al. 2015; Glorot and Bengio 2010), biases 0.

        With torch's default the signal shrinks to a third in each layer of the input network, below its biases.
        """
        for module in self.point:
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, context: Tensor, targets: Tensor) -> Tensor:
        """Logits of the target options.

        context: (B, C, 2E), see `context_points`, or (1, C, 2E) for all examples; targets: (B, K, E), embeddings of the
        options. Returns (B, K). Context points see each other alone: what one context gives is computed once.
        """
        layers = cast("Sequence[_Layer]", self.layers)
        points = self.point(context)
        seen: list[Tensor] = []  # keys and values of each layer
        for i, layer in enumerate(layers):
            normed = layer.norm_attention(points)
            seen += [layer.key(normed), layer.value(normed)]
            if i + 1 < len(layers):  # what the last layer would make of the context nobody reads
                points = layer(points, normed, *seen[-2:])
        seen = list(self.shared(seen, len(targets)))
        unknown = torch.zeros_like(targets)  # what a group prefers here is what we ask for
        points = self.point(torch.cat([targets, unknown], dim=2))
        for i, layer in enumerate(layers):
            points = layer(points, layer.norm_attention(points), *seen[2 * i : 2 * i + 2])
        logits: Tensor = self.head(self.norm(points)).squeeze(2)
        return logits


def log_likelihood(logits: Tensor, mask: Tensor) -> Tensor:
    """Log-softmax over a question's real options; logits, mask (B, K), padding gets -inf."""
    return torch.log_softmax(logits.masked_fill(~mask, float("-inf")), dim=1)


def context_points(embeddings: list[np.ndarray], shares: list[np.ndarray]) -> Tensor:
    """Context points (C, 2E), one per question, from option embeddings (K, E) and preference shares (K,)."""
    rows = [
        np.concatenate([e.mean(axis=0), DIRECTION * ((s - 1.0 / len(s)) @ e)])
        for e, s in zip(embeddings, shares, strict=True)
    ]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def pad_options(embeddings: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Stack per-question option embeddings (K_i, E) to (Q, K, E) float32 and a mask (Q, K) of real options."""
    width = max(len(e) for e in embeddings)
    out = np.zeros((len(embeddings), width, embeddings[0].shape[1]), dtype=np.float32)
    mask = np.zeros((len(embeddings), width), dtype=bool)
    for i, e in enumerate(embeddings):
        out[i, : len(e)], mask[i, : len(e)] = e, True
    return torch.from_numpy(out), torch.from_numpy(mask)


def together(model: PreferencePredictor, context: Tensor, targets: Tensor) -> Tensor:
    """Logits (Q, K) of Q questions (Q, K, E) under one context (C, 2E), in one pass over the context.

    Targets attend to the context alone, so all options of all questions can be targets of one example: the same numbers
    as an example per question up to rounding, with 1/Q of the work on the context.
    """
    asked, options = targets.shape[:2]
    return model(context[None], targets.reshape(1, asked * options, -1)).view(asked, options)


@torch.no_grad()
def predict(model: PreferencePredictor, context: Tensor, embeddings: list[np.ndarray]) -> list[np.ndarray]:
    """Predicted preference distributions, one (K_i,) float64 array per question.

    context: (C, 2E) of one group; embeddings: per-question option embeddings (K_i, E).
    """
    model.eval()
    targets, mask = pad_options(embeddings)
    out: list[np.ndarray] = []
    for start in range(0, len(embeddings), 128):
        part, keep = targets[start : start + 128], mask[start : start + 128]
        p = log_likelihood(together(model, context, part), keep).exp().double().numpy()
        out += [row[m] / row[m].sum() for row, m in zip(p, keep.numpy(), strict=True)]
    return out


def flatten(model: nn.Module) -> np.ndarray:
    """All trained parameters as one float32 vector (P,), in the order of `named_parameters`."""
    return torch.cat([p.detach().reshape(-1) for p in _trained(model)]).numpy().copy()


def unflatten(model: nn.Module, vector: np.ndarray) -> None:
    """Load a vector made by `flatten`. Raises ValueError when its length does not fit."""
    size = sum(p.numel() for p in _trained(model))
    if vector.shape != (size,):
        raise ValueError(f"parameter vector has shape {vector.shape}, the network needs ({size},)")
    flat, at = torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float32)), 0
    with torch.no_grad():
        for p in _trained(model):
            p.copy_(flat[at : at + p.numel()].view_as(p))
            at += p.numel()


def _trained(model: nn.Module) -> list[nn.Parameter]:
    """With an adapter on top, the adapter alone."""
    return [p for p in model.parameters() if p.requires_grad]
