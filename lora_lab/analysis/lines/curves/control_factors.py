"""What a model is given on a curve, made of the factors of both ends and of the control point; and gradients back."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_lab.adapters.adapter import Adapter, stored, stored_transposed
from lora_lab.adapters.lowrank import LowRank
from lora_lab.adapters.models.attached import Attached


class ControlFactors:
    """The factors of both ends and of the control point on a device; gradients are taken of the latter.

    Mixed by weights, factors are summed, A(t) = Σ wᵢ Aᵢ and B(t) = Σ wᵢ Bᵢ, or ΔW is: A(t) has the rows of all Aᵢ,
    B(t) the columns of all wᵢ Bᵢ.
    """

    def __init__(self, ends: Sequence[Adapter], start: Adapter, device: torch.device, *, summed: bool) -> None:
        self._start = start
        self._modules = list(start.sites)
        self._others = [key for key in start.others if start.tensors[key].is_floating_point()]
        self._fan = bool(start.config.get("fan_in_fan_out"))
        three = ends[0], start, ends[1]
        self._updates = [[each.updates[name] for each in three] for name in self._modules]
        factors = [[[getattr(each, factor) for each in of_one] for of_one in self._updates] for factor in "AB"]
        wholes = [[each.tensors[key] for each in three] for key in self._others]
        self._A = _Mixture(factors[0], device, axis=None if summed else 0, weighted=summed)
        self._B = _Mixture(factors[1], device, axis=None if summed else 1)
        self._whole = _Mixture(wholes, device)
        pairs = zip(self._A.leaves, self._B.leaves, strict=True)
        self.leaves = [*itertools.chain.from_iterable(pairs), *self._whole.leaves]

    def mixed(self, weights: Sequence[float]) -> list[Tensor]:
        """What the model is given at these weights, in the order of `live`."""
        found: list[Tensor] = []
        for name, A, B, of_one in zip(
            self._modules, self._A.at(weights), self._B.at(weights), self._updates, strict=True
        ):
            found += stored(LowRank(A, B, of_one[0].shape), self._start.sites[name].kind, self._fan)
        return found + self._whole.at(weights)

    def take_gradients(self, gradients: Sequence[Tensor | None], weights: Sequence[float]) -> None:
        """Give the leaves their part of the gradients of what `mixed` gave at these weights."""
        count = 2 * len(self._modules)
        pairs = [
            self._of_factors(gradients[i : i + 2], self._start.sites[name].kind)
            for i, name in zip(range(0, count, 2), self._modules, strict=True)
        ]
        self._A.take([A for A, _ in pairs], weights)
        self._B.take([B for _, B in pairs], weights)
        self._whole.take(gradients[count:], weights)

    def _of_factors(self, pair: Sequence[Tensor | None], kind: str) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of A and B from those of what `stored` made of them."""
        first, second = (None if each is None else each.flatten(1) for each in pair)
        if stored_transposed(kind, self._fan):
            return (None if second is None else second.T), (None if first is None else first.T)
        return first, second

    def live(self, attached: Attached, start: Adapter) -> list[Tensor]:
        """The model's own tensors that `mixed` is for, with the control point as it starts in their place."""
        attached.set(start)
        keys = [key for name in self._modules for key in start.sites[name].keys.values()]
        return attached.live([*keys, *self._others])

    def adapter(self, leaves: Sequence[Tensor]) -> Adapter:
        """The adapter with these values of the leaves."""
        values = [leaf.detach().cpu() for leaf in leaves]
        updates = {
            name: LowRank(values[2 * i], values[2 * i + 1], self._updates[i][1].shape)
            for i, name in enumerate(self._modules)
        }
        made = self._start.with_updates(updates, source=self._start.source)
        whole = dict(zip(self._others, values[2 * len(self._modules) :], strict=True))
        return dataclasses.replace(made, tensors={**made.tensors, **whole})


class _Mixture:
    """Tensors of which each is made of one of either end's and one of the control point's, a leaf.

    They are weighted sums; with an axis the three lie one behind the other along it, weighted or as they are. All of
    them lie in one vector, so that mixing takes a few operations and no graph, whatever their number.
    """

    def __init__(
        self, parts: Sequence[Sequence[Tensor]], device: torch.device, *, axis: int | None = None, weighted: bool = True
    ) -> None:
        self.leaves = [leaf.to(device, copy=True).requires_grad_(True) for _, leaf, _ in parts]
        self._axis, self._weighted = axis, weighted
        self._starts = [0 if axis is None else first.shape[axis] for first, _, _ in parts]
        apart = [[_apart(three, k, axis).to(device) for three in parts] for k in range(3)]
        self._shapes = [each.shape for each in apart[0]]
        self._flat = [torch.cat([torch.zeros(0, device=device), *(each.flatten() for each in one)]) for one in apart]
        self._slots = [self._part(i, each) for i, each in enumerate(self._split(self._flat[1]))]

    def at(self, weights: Sequence[float]) -> list[Tensor]:
        """All of them at these weights, without a graph."""
        with torch.no_grad():
            for slot, leaf in zip(self._slots, self.leaves, strict=True):
                slot.copy_(leaf)
            a, c, b = (flat * w if self._weighted else flat for flat, w in zip(self._flat, weights, strict=True))
            pairs = zip(self._split(a + c + b), self.leaves, strict=True)
            return [each.to(leaf.dtype) for each, leaf in pairs]

    def take(self, gradients: Sequence[Tensor | None], weights: Sequence[float]) -> None:
        """Give the leaves what comes to them of the gradients of all; none where there is none."""
        for i, (leaf, gradient) in enumerate(zip(self.leaves, gradients, strict=True)):
            part = None if gradient is None else self._part(i, gradient)
            leaf.grad = None if part is None else part * (weights[1] if self._weighted else 1.0)

    def _split(self, flat: Tensor) -> list[Tensor]:
        pieces = torch.split_with_sizes(flat, [math.prod(shape) for shape in self._shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def _part(self, i: int, mixed: Tensor) -> Tensor:
        """Where the i-th leaf lies in what is made of it."""
        if self._axis is None:
            return mixed
        return mixed.narrow(self._axis, self._starts[i], self.leaves[i].shape[self._axis])


def _apart(three: Sequence[Tensor], k: int, axis: int | None) -> Tensor:
    """The k-th of them, with zeros in the places of the others."""
    if axis is None:
        return three[k]
    return torch.cat([each if i == k else torch.zeros_like(each) for i, each in enumerate(three)], axis)
