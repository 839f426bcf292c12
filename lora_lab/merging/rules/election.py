"""The election of signs in TIES, a block of entries at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_lab.adapters.lowrank import is_finite
from lora_lab.errors import MismatchError


class Election:
    """Means over what agrees with the elected sign of every entry, that of the weighted sum.

    Where the sum is 0 the majority of all elected signs decides, which is known after the last block: until then both
    possible means are kept.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = weights
        self._signs = 0.0
        self._open: list[tuple[Tensor, Tensor, Tensor]] = []
        """Places of entries whose sum is 0, their mean for the sign +, and for the sign −."""

    def held(self, parts: Sequence[Tensor], start: int) -> Tensor:
        """Σ wᵢTᵢ / Σ |wᵢ| over the i whose wᵢTᵢ has the elected sign; the parts Tᵢ, from entry `start` on, are used up.

        MismatchError where a sum is not finite.
        """
        total, sizes = torch.zeros_like(parts[0]), torch.zeros_like(parts[0])
        for part, weight in zip(parts, self._weights, strict=True):
            total.add_(part.mul_(weight))
            sizes.add_(part.abs())
        if not is_finite(total):
            raise MismatchError("ΔW is not finite: an adapter, a weight or an option is too large for it")
        sign = total.sign_()
        self._signs += float(sign.sum(dtype=torch.float64))
        undecided = sizes.mul_(1 - sign.abs()).flatten()
        if float(undecided.amax()):
            self._keep(parts, undecided.nonzero()[:, 0], start)
        merged, divisor = torch.zeros_like(sign), sizes.zero_()
        for part, weight in zip(parts, self._weights, strict=True):
            agreeing = part.mul_(sign).relu_()  # |wᵢTᵢ| where it has the sign, else 0
            merged.add_(agreeing)
            divisor.add_(agreeing.sign_(), alpha=abs(weight))
        return merged.mul_(sign).div_(divisor.clamp_(min=torch.finfo(divisor.dtype).tiny))

    def decide(self, merged: Tensor) -> None:
        """Fill in the entries whose sum was 0, in all blocks as a flat tensor."""
        for places, positive, negative in self._open:
            merged[places] = positive if self._signs > 0 else negative if self._signs < 0 else 0.0

    def _keep(self, parts: Sequence[Tensor], places: Tensor, start: int) -> None:
        weighted = torch.stack([part.flatten()[places] for part in parts])
        sizes = weighted.new_tensor([abs(weight) for weight in self._weights])[:, None]
        means: list[Tensor] = []
        for sign in (1, -1):
            agrees = weighted * sign > 0
            divisor = (agrees * sizes).sum(0)
            means.append(torch.where(divisor > 0, (weighted * agrees).sum(0) / divisor, 0.0))
        self._open.append((places + start, means[0], means[1]))
