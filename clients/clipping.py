"""Per-example gradients, clipped per privacy unit and summed: the part of DP-SGD that bounds a unit's influence.

One forward and one backward pass give what every layer read and what came back to its outputs. The norm of an example's
gradient in a linear layer follows from these without forming it (Goodfellow, arXiv 1510.01799; Li et al., ICLR 2022,
"ghost norm"), and so does the weighted sum over examples, in the product that an ordinary backward pass would have
computed (Bu et al., ICML 2023, "book-keeping"). Opacus's hooks form every example's gradient and compute the ordinary
one besides: 2.1 to 2.7 times a plain step on the same examples, against 1.45 to 1.6 here (`make bench`). Where gradients must be
formed, for the sum of one person's answers and for layer norms, they are Opacus's.
"""

from __future__ import annotations

from types import TracebackType

import torch
from opacus.grad_sample.layer_norm import compute_layer_norm_grad_sample
from opacus.grad_sample.linear import compute_linear_grad_sample
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# What float32 may lose of a squared norm, relative to the square of the terms' lengths added up. Measured: below 1e-6.
_ROUNDING = 2e-5
_SAMPLERS = {nn.Linear: compute_linear_grad_sample, nn.LayerNorm: compute_layer_norm_grad_sample}


class ClippedGradients:
    """While open, records the layers of `model`, for clipped sums of the gradients of a batch's examples.

    Examples must not mix in any layer. Raises TypeError for a parameter of a layer other than `Linear` and `LayerNorm`.
    """

    def __init__(self, model: nn.Module, clip: float) -> None:
        self._clip = clip
        self._layers = [m for m in model.modules() if type(m) in _SAMPLERS]
        self._parameters = list(model.parameters())
        owned = {p for m in self._layers for p in m.parameters()}
        if any(p not in owned for p in self._parameters):
            raise TypeError("gradients of single examples are known for Linear and LayerNorm only")
        self._calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> ClippedGradients:
        self._handles = [layer.register_forward_hook(self._record) for layer in self._layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._calls.clear()

    def _record(self, layer: nn.Module, read: tuple[Tensor, ...], gave: Tensor) -> None:
        self._calls.append((layer, read[0].detach(), gave))

    def sum(self, loss: Tensor, multiplicity: Tensor, units: Tensor | None = None) -> Tensor:
        """Sum over units of multiplicity times the unit's gradient, cut to L2 norm `clip` where it is longer. (P,)

        loss: sum of the terms of the n examples of the last forward pass; multiplicity: (U,); units: (U, n), how often
        each unit has each example, None: every example is a unit. A unit whose gradient or its norm is not finite counts
        as nothing. Clipping cannot bound NaN: with parameters chosen to overflow on one answer only, the coordinator
        would see from the refused upload whether that answer was drawn.
        """
        calls = self._calls
        self._calls = []
        if len({id(layer) for layer, _, _ in calls}) != len(calls):
            raise TypeError("a layer was used twice: gradients of single examples are not known there")
        backward = torch.autograd.grad(loss, [gave for _, _, gave in calls])
        with torch.no_grad():
            layers = [(layer, read, sent) for (layer, read, _), sent in zip(calls, backward, strict=True)]
            squared, reach = _norms(layers)
            bad = ~torch.isfinite(squared + reach)
            if bool(bad.any()):
                keep = ~bad[:, None, None]
                layers = [(m, torch.where(keep, a, 0.0), torch.where(keep, g, 0.0)) for m, a, g in layers]
                reach = torch.where(bad, 0.0, reach)
            if units is not None:
                squared, reach = _unit_norms(layers, units), units @ reach
                bad = (units @ bad.float()) > 0
            norm = (squared + _ROUNDING * reach.square()).sqrt()
            weight = (self._clip / (norm + 1e-6)).clamp(max=1.0) * multiplicity
            weight = torch.where(bad | ~torch.isfinite(norm), 0.0, weight)
            return self._weighted(layers, weight if units is None else weight @ units)

    def _weighted(self, layers: list[tuple[nn.Module, Tensor, Tensor]], weight: Tensor) -> Tensor:
        """Sum over examples of weight (n,) times gradient, flat in the order of the model's parameters."""
        found: dict[Tensor, Tensor] = {}
        for layer, read, sent in layers:
            sent = sent * weight[:, None, None]
            if isinstance(layer, nn.Linear):
                found[layer.weight] = sent.flatten(0, 1).T @ read.flatten(0, 1)
                found[layer.bias] = sent.sum((0, 1))
            else:
                per_example = compute_layer_norm_grad_sample(layer, [read], sent)
                found.update({p: g.sum(0) for p, g in per_example.items()})
        return torch.cat([found[p].flatten() for p in self._parameters])


def _norms(layers: list[tuple[nn.Module, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Squared norms of the examples' gradients (n,), and the length (n,) they would have if no two terms cancelled.

    In a linear layer the gradient of an example is sum_t g_t a_t', over positions t, and its squared norm is
    sum_{s,t} (a_s . a_t)(g_s . g_t). Where terms cancel, rounding can make that too small: parameters could be chosen for
    it. The second figure, per layer sum_t |a_t||g_t|, bounds how much.
    """
    squared, reach = torch.zeros(()), torch.zeros(())
    for layer, read, sent in layers:
        if isinstance(layer, nn.Linear):
            seen = (read @ read.transpose(1, 2)).add_(1.0)  # (n, T, T); the bias reads 1 everywhere
            back = sent @ sent.transpose(1, 2)
            lengths = (seen.diagonal(dim1=1, dim2=2) * back.diagonal(dim1=1, dim2=2)).sqrt()
            squared = squared + seen.mul_(back).sum((1, 2))
            reach = reach + lengths.sum(1).square()
        else:
            for gradient in compute_layer_norm_grad_sample(layer, [read], sent).values():
                squared = squared + gradient.square().sum(1)
    return squared, reach.sqrt()


def _unit_norms(layers: list[tuple[nn.Module, Tensor, Tensor]], units: Tensor) -> Tensor:
    """Squared norms (U,) of the sums of gradients that units (U, n) own, layer by layer to spare memory."""
    squared = torch.zeros(len(units))
    for layer, read, sent in layers:
        for gradient in _SAMPLERS[type(layer)](layer, [read], sent).values():
            squared = squared + (units @ gradient.flatten(1)).square().sum(1)
    return squared
