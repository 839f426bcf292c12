"""What became of a weight: base + ΔW exactly, up to rounding, times a factor, without ΔW, transposed, or otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lab.fusing.adding import as_rows, blocks, rows_of, squared
from lora_lab.fusing.changes import Change

RIGHT = ("exact", "rounding")
"""The kinds of a weight that is base + ΔW."""
_ONE = 5e-3
"""A factor is 1 where it differs by less: ΔW made in 16 bits is that far off."""
_HALVES = (torch.bfloat16, torch.float16)
_ROUNDS = 4


@dataclass(frozen=True)
class Measured:
    """One weight against what it should be."""

    kind: str
    """exact, rounding (up to that of its dtype), scaled, missing (as in the base), transposed, or other."""
    factor: float | None = None
    """By which ΔW is in it: ⟨W' − W, ΔW⟩ / ‖ΔW‖²; None where ΔW is 0."""
    residual: float | None = None
    """‖W' − (W + ΔW)‖ / ‖ΔW‖."""
    norm: float = 0.0
    """‖ΔW‖."""
    rounding: str = ""
    """In whose rounding it is, where it is right up to rounding: a dtype by name, and that it is stored in another."""


class Weight:
    """A weight in the base and in the merged checkpoint, and the ΔW that should lie between them."""

    def __init__(self, base: Tensor, merged: Tensor, change: Change, device: torch.device) -> None:
        self._base, self._merged, self._change, self._device = as_rows(base), as_rows(merged), change, device
        self._square = base.ndim == 2 and base.shape[0] == base.shape[1]
        self._wide = torch.float64 if torch.float64 in (base.dtype, merged.dtype) else torch.float32
        self._same_dtype = base.dtype == merged.dtype
        self._dtype, self._stored = effective_dtype(merged), merged.dtype
        """In whose rounding the merged weight is, though it may be stored in a wider one."""
        self._narrowed = torch.finfo(base.dtype).eps < torch.finfo(self._dtype).eps

    def measure(self) -> Measured:
        """What it is; see `Measured`."""
        norm2 = product = change2 = residual2 = 0.0
        exact = right = untouched = True
        for base, merged, delta in self._blocks():
            difference = merged - base
            norm2 += squared(delta)
            product += _sum(difference * delta)
            change2 += squared(difference)
            residual2 += squared(difference - delta)
            exact &= bool(torch.equal((base + delta).to(self._stored).to(self._wide), merged))
            right &= bool(torch.equal(self._rounded(base + delta), merged))
            untouched &= bool(torch.equal(self._rounded(base), merged))
        norm = math.sqrt(norm2)
        if not norm2:
            return Measured("exact" if not change2 else "rounding" if untouched else "other")
        told: dict[str, Any] = {"factor": product / norm2, "residual": math.sqrt(residual2) / norm, "norm": norm}
        if exact and self._same_dtype:
            return Measured("exact", **told)
        if exact or right:
            return Measured("rounding", **told, rounding=self._words())
        if untouched:
            return Measured("missing", **told)
        return self._judged(told)

    def _judged(self, told: dict[str, Any]) -> Measured:
        """The factor that explains the weight best, if what is left is rounding."""
        factor = self._refined(told["factor"])
        off = {each: self._off(each) for each in (1.0, 0.0, factor)}
        # three standard deviations of a factor that is fitted through rounding errors
        slack = 3 * off[factor][0] / math.sqrt(self._base.numel()) / told["norm"]
        near = abs(factor - 1) <= max(_ONE, slack) and off[1.0][0] <= off[1.0][1]
        if near or off[1.0][0] <= min(distance for distance, _ in off.values()):
            factor = 1.0
        elif off[0.0][0] <= off[factor][0]:
            factor = 0.0
        distance, allowed = off[factor]
        if distance <= allowed:
            kind = "rounding" if factor == 1 else "missing" if factor == 0 else "scaled"
            words = self._words() if kind == "rounding" else ""
            return Measured(kind, **{**told, "factor": factor or told["factor"]}, rounding=words)
        if self._square and (turned := self._turned()) is not None:
            return Measured("transposed", **{**told, "factor": turned})
        return Measured("other", **told)

    def _refined(self, factor: float) -> float:
        """The factor f for which round(W + f ΔW) − W is as long, along W' − W, as W' − W itself.

        Least squares alone come out short in 16 bits: entries of ΔW below half a step of W leave no trace.
        """
        for _ in range(_ROUNDS if self._dtype in _HALVES else 0):
            along = length = 0.0
            for base, merged, delta in self._blocks():
                step = self._rounded(base + factor * delta) - base
                along += _sum((merged - base) * step)
                length += squared(step)
            if not length:
                break
            factor *= along / length
        return factor

    def _off(self, factor: float, *, turned: bool = False) -> tuple[float, float]:
        """‖W' − round(W + f ΔW)‖, and what rounding on the way can make of it."""
        distance = allowed = size = 0.0
        eps = torch.finfo(self._dtype).eps
        for base, merged, delta in self._blocks(turned=turned):
            added = factor * delta
            distance += squared(merged - self._rounded(base + added))
            # of the sum, of ΔW itself, and of the base where that was cast first: half a step each
            step = merged.abs() + 2 * added.abs() + (base.abs() if self._narrowed else 0)
            allowed += squared(eps / 2 * step)
            size += squared(added)
        update = self._change.update
        bound = abs(factor) * update.bound() if update is not None else math.sqrt(size)
        return math.sqrt(distance), math.sqrt(allowed) + eps * bound  # the factors themselves may have been cast

    def _turned(self) -> float | None:
        """The factor by which the transposed ΔW is in the weight; None where it is not."""
        product = norm2 = 0.0
        for base, merged, delta in self._blocks(turned=True):
            product += _sum((merged - base) * delta)
            norm2 += squared(delta)
        factor = self._near_one(product / norm2)
        distance, allowed = self._off(factor, turned=True)
        return factor if distance <= allowed and abs(factor) > _ONE else None

    @staticmethod
    def _near_one(factor: float) -> float:
        return 1.0 if abs(factor - 1) <= _ONE else factor

    def _blocks(self, *, turned: bool = False) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(W, W', ΔW) a few rows at a time, wide."""
        whole = self._change.dense() if turned else None
        for rows in blocks(self._base):
            delta = rows_of(self._change, rows, self._device) if whole is None else whole.T[rows].to(self._device)
            base, merged = (part[rows].to(self._device, self._wide) for part in (self._base, self._merged))
            yield base, merged, delta.to(self._wide)

    def _rounded(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype).to(self._stored).to(self._wide)

    def _words(self) -> str:
        name, stored = (str(dtype).removeprefix("torch.") for dtype in (self._dtype, self._stored))
        return name if name == stored else f"{name}, stored as {stored}"


def effective_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of fewest digits that holds all of a tensor: that in whose rounding it is, however it is stored."""
    for dtype in _HALVES:
        if torch.finfo(dtype).eps > torch.finfo(tensor.dtype).eps and torch.equal(
            tensor.to(dtype).to(tensor.dtype), tensor
        ):
            return dtype
    return tensor.dtype


def _sum(tensor: Tensor) -> float:
    return float(tensor.sum(dtype=torch.float64))
