"""Per-example gradients, clipped per privacy unit and summed: the part of DP-SGD that bounds a unit's influence.

One forward and one backward pass give what every layer read and what came back to its outputs. The norm of an example's
gradient in a linear layer follows from these without forming it (Goodfellow, arXiv 1510.01799; Li et al., ICLR 2022,
"ghost norm"), and so does the weighted sum over examples, in the product that an ordinary backward pass would have
computed (Bu et al., ICML 2023, "book-keeping").

All examples have one private context. What the network makes of it is computed once; only what flows back differs between
examples, and is computed for all of them through the one graph. Hence a layer's inputs at context points, their inner
products, and their product with the weighted sum are needed once instead of once per example, which is why a private
step costs less than a plain one that treats every example by itself (`make bench`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from appa_secure.predictor import Shared

_UNIT = 2.0**-23  # twice float32's unit roundoff
_HUGE = 1e30  # squared lengths beyond it could overflow in products
_Call = tuple[nn.Module, Tensor, Tensor]  # layer, what it read, what it gave


class ClippedGradients:
    """While open, records the layers of `model`, for clipped sums of the gradients of a batch's examples.

    Examples must not mix in any layer after `Shared`, whose input belongs to all of them; without `Shared`, in any.
    Raises TypeError for a parameter of a layer other than `Linear` and `LayerNorm`.
    """

    def __init__(self, model: nn.Module, clip: float) -> None:
        self._clip = clip
        self._layers = [m for m in model.modules() if type(m) in (nn.Linear, nn.LayerNorm)]
        self._shared = [m for m in model.modules() if type(m) is Shared]
        self._parameters = list(model.parameters())
        owned = {p for m in self._layers for p in m.parameters()}
        if any(p not in owned for p in self._parameters):
            raise TypeError("gradients of single examples are known for Linear and LayerNorm only")
        self._calls: list[_Call] = []
        self._before: list[_Call] = []  # calls that belong to all examples
        self._handed: list[tuple[Tensor, Tensor]] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> ClippedGradients:
        self._handles = [layer.register_forward_hook(self._record) for layer in self._layers]
        self._handles += [module.register_forward_hook(self._hand) for module in self._shared]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._take()

    def _record(self, layer: nn.Module, read: tuple[Tensor, ...], gave: Tensor) -> None:
        self._calls.append((layer, read[0].detach(), gave))

    def _hand(self, module: nn.Module, given: tuple[Sequence[Tensor], int], gave: tuple[Tensor, ...]) -> None:
        if len(given[0][0]) != 1 or self._handed:
            raise TypeError("examples with a context each: give one context (1, C, 2E) for all of them")
        self._before, self._calls = self._calls, []
        self._handed = list(zip(given[0], gave, strict=True))

    def _take(self) -> tuple[list[_Call], list[_Call], list[tuple[Tensor, Tensor]]]:
        found = self._before, self._calls, self._handed
        self._before, self._calls, self._handed = [], [], []
        return found

    def sum(self, loss: Tensor, multiplicity: Tensor, units: Tensor | None = None) -> Tensor:
        """Sum over units of multiplicity times the unit's gradient, cut to L2 norm `clip` where it is longer. (P,)

        loss: sum of the terms of the n examples of the last forward pass; multiplicity: (U,); units: (U, n), a unit's
        gradient as a sum of so many times each example's; None: every example is a unit. A unit whose gradient is not
        finite, or longer than some 1e15, counts as nothing. Clipping cannot bound NaN: with parameters chosen to overflow
        on one answer only, the coordinator would see from the refused upload whether that answer was drawn.
        """
        layers = self._backward(loss)
        with torch.no_grad():
            lost = torch.stack([_lost(layer) for layer in layers]).sum(0)
            bad = ~(lost < _HUGE)
            if bool(bad.any()):
                layers = [layer.without(bad) for layer in layers]
                lost = torch.where(bad, 0.0, lost)
            lost = lost.sqrt()
            if units is None:
                squared = torch.stack([_squared(layer) for layer in layers]).sum(0)
            else:
                bad = (units.abs() @ bad.float() > 0) | ~torch.isfinite(units).all(1)
                units = torch.where(bad[:, None], 0.0, units)
                squared, lost = _unit_squared(layers, units), units.abs() @ lost
            norm = (squared + lost.square()).sqrt()
            weight = (self._clip / (norm + 1e-6)).clamp(max=1.0) * multiplicity
            weight = torch.where(bad | ~torch.isfinite(norm), 0.0, weight)
            return self._weighted(layers, weight if units is None else weight @ units)

    def _backward(self, loss: Tensor) -> list[_Layer]:
        """What each layer read, and what came back to its outputs."""
        before, own, handed = self._take()
        for calls in (before, own):
            if len({id(layer) for layer, _, _ in calls}) != len(calls):
                raise TypeError("a layer was used twice: gradients of single examples are not known there")
        sent = torch.autograd.grad(loss, [gave for _, _, gave in own] + [gave for _, gave in handed])
        found = {
            layer: _Layer(layer, read, back, read.new_zeros(0, read.shape[2]), back[:, :0])
            for (layer, read, _), back in zip(own, sent, strict=False)
        }
        if handed:
            through = torch.autograd.grad(
                [one for one, _ in handed],
                [gave for _, _, gave in before],
                [back[:, None] for back in sent[len(own) :]],
                is_grads_batched=True,
            )
            for (layer, read, _), back in zip(before, through, strict=True):
                back = back[:, 0]
                if layer not in found:
                    found[layer] = _Layer(
                        layer, read.new_zeros(len(back), 0, read.shape[2]), back[:, :0], read[0], back
                    )
                else:
                    found[layer].context, found[layer].back = read[0], back
        return list(found.values())

    def _weighted(self, layers: list[_Layer], weight: Tensor) -> Tensor:
        """Sum over examples of weight (n,) times gradient, flat in the order of the model's parameters."""
        found: dict[Tensor, Tensor] = {}
        for one in layers:
            if isinstance(one.layer, nn.Linear):
                sent = one.sent * weight[:, None, None]
                back = (weight @ one.back.flatten(1)).view(one.back.shape[1:])
                found[one.layer.weight] = sent.flatten(0, 1).T @ one.read.flatten(0, 1) + back.T @ one.context
                found[one.layer.bias] = sent.sum((0, 1)) + back.sum(0)
            else:
                found.update(zip(one.layer.parameters(), (weight @ one.formed).chunk(2), strict=True))
        return torch.cat([found[p].flatten() for p in self._parameters])


@dataclass
class _Layer:
    """One layer's inputs and the gradients of the n examples' losses with respect to its outputs.

    read (n, K, p), sent (n, K, q): at an example's own K points; context (C, p), back (n, C, q): at the points that all
    examples share. The gradient of a linear layer for one example is the sum over its K + C points of sent' read.
    """

    layer: nn.Module
    read: Tensor
    sent: Tensor
    context: Tensor
    back: Tensor

    @cached_property
    def formed(self) -> Tensor:
        """Gradients (n, 2p) of a LayerNorm's weight and bias."""
        assert isinstance(self.layer, nn.LayerNorm)
        shape, eps = self.layer.normalized_shape, self.layer.eps
        own, shared = (F.layer_norm(x, shape, eps=eps) for x in (self.read, self.context))
        scale = (self.sent * own).sum(1) + (self.back * shared).sum(1)
        return torch.cat([scale, self.sent.sum(1) + self.back.sum(1)], dim=1)

    def without(self, bad: Tensor) -> _Layer:
        """With zeros in place of the examples that are `bad` (n,)."""
        keep = ~bad[:, None, None]
        read, sent, back = (torch.where(keep, x, 0.0) for x in (self.read, self.sent, self.back))
        # Where a shared input is not finite, all examples are bad.
        return _Layer(self.layer, read, sent, self.context.nan_to_num(0.0, 0.0, 0.0), back)


def _lost(one: _Layer) -> Tensor:
    """Square of what rounding may take from the length of each example's gradient in a layer, (n,).

    In a linear layer the gradient of an example is sum_t g_t a_t', over points t, and its squared norm is
    sum_{s,t} (a_s . a_t)(g_s . g_t). Where terms cancel, rounding can make that too small, and parameters could be chosen
    for it. An inner product of k terms is off by at most k u / (1 - k u) times the product of the lengths (Higham,
    Accuracy and Stability of Numerical Algorithms, 2002, section 3.1), in any order of summation; hence a layer's sum by
    that, with k = outputs + 2 T + 8, times the square of sum_t |a_t||g_t|: one rounding for each a_s . a_t, which is
    computed in float64, `outputs` for g_s . g_t, T for the sum over s and T for the sum over t. Twice u leaves room for
    the sum over layers. The same holds for the product of two examples' gradients, with the product of their sums.

    A LayerNorm's gradient is formed, and its squared norm has as many terms as entries.
    """
    if isinstance(one.layer, nn.LayerNorm):
        return (one.formed.shape[1] + 8) * _UNIT * one.formed.square().sum(1)
    # The bias reads 1 everywhere.
    own = (one.sent.norm(dim=2) * one.read.norm(dim=2).square().add(1.0).sqrt()).sum(1)
    shared = one.back.norm(dim=2) @ one.context.norm(dim=1).square().add(1.0).sqrt()
    terms = one.sent.shape[2] + 2 * (one.sent.shape[1] + one.back.shape[1]) + 8
    return terms * _UNIT * (own + shared).square()


def _inputs(one: Tensor, other: Tensor) -> Tensor:
    """Inner products of a linear layer's inputs (..., s, p) and (..., t, p), plus 1 for the bias: (..., s, t)."""
    return (one.double() @ other.double().transpose(-2, -1) + 1.0).float()


def _squared(one: _Layer) -> Tensor:
    """Squared norms of the examples' gradients in a layer, (n,)."""
    if isinstance(one.layer, nn.LayerNorm):
        return one.formed.square().sum(1)
    own = _inputs(one.read, one.read).mul_(one.sent @ one.sent.transpose(1, 2))
    mixed = _inputs(one.read, one.context).mul_(one.sent @ one.back.transpose(1, 2))
    shared = (one.back @ one.back.transpose(1, 2)).mul_(_inputs(one.context, one.context))
    return own.sum(2).sum(1) + 2.0 * mixed.sum(2).sum(1) + shared.sum(2).sum(1)


def _products(one: _Layer) -> Tensor:
    """Inner products (n, n) of the examples' gradients in a layer: G_ij = sum_{s,t} (a_is . a_jt)(g_is . g_jt)."""
    if isinstance(one.layer, nn.LayerNorm):
        return one.formed @ one.formed.T
    n, points = one.sent.shape[:2]
    read, sent = one.read.flatten(0, 1), one.sent.flatten(0, 1)
    own = _inputs(read, read).mul_(sent @ sent.T).view(n, points, n, points).sum(3).sum(1)
    # Context with context, and twice own with context, are the symmetric part of one product. It is summed point by
    # point, so that no sum has more terms than `_lost` counts.
    among, across = _inputs(one.context, one.context), _inputs(one.read, one.context)
    other = torch.baddbmm(among @ one.back, across.transpose(1, 2), one.sent, alpha=2.0)
    shared = torch.zeros(n, n)
    for point in range(one.back.shape[1]):
        shared.addmm_(one.back[:, point], other[:, point].T)
    return own + (shared + shared.T) / 2


def _unit_squared(layers: list[_Layer], units: Tensor) -> Tensor:
    """Squared norms (U,) of sums of gradients: for a row u of `units` (U, n), u' G u with G the inner products."""
    products = torch.zeros(units.shape[1], units.shape[1], dtype=torch.float64)
    for one in layers:
        products += _products(one)
    exact = units.double()
    return ((exact @ products) * exact).sum(1).clamp(min=0.0).float()
