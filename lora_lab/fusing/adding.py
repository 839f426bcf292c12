"""ΔW added to a tensor in its own dtype, some rows at a time, with what rounding takes of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lab.adapters.lowrank import all_finite
from lora_lab.errors import MismatchError
from lora_lab.fusing.changes import Change

_ENTRIES = 2**20
"""Of the rows that are computed at a time: 4 MB in float32, which an allocator keeps and gives out again."""


@dataclass(frozen=True)
class Rounding:
    """How much was added to a tensor, and how much of it rounding to the tensor's dtype took away."""

    norm: float
    """‖ΔW‖."""
    lost: float
    """‖stored − (W + ΔW)‖."""

    @property
    def share(self) -> float:
        """The relative error of ΔW."""
        return self.lost / self.norm if self.norm else 0.0


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same to the last bit, NaN included, in one dtype and shape."""
    if one is other:
        return True
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if not one.numel():
        return True
    return torch.equal(*(part.contiguous().reshape(-1).view(torch.uint8) for part in (one, other)))


def squared(tensor: Tensor) -> float:
    """‖·‖², summed in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def blocks(tensor: Tensor) -> list[slice]:
    """Rows of a tensor that together have at most a million entries."""
    rows = tensor.shape[0] if tensor.ndim else 1
    step = max(1, _ENTRIES // max(1, tensor.numel() // max(1, rows)))
    return [slice(start, start + step) for start in range(0, rows, step)]


def as_rows(tensor: Tensor) -> Tensor:
    """The tensor as a matrix: a vector as a column, the kernel of a convolution or a stack by its first axis."""
    return tensor.reshape(-1, 1) if tensor.ndim < 2 else tensor.flatten(1)


def add(tensor: Tensor, change: Change, name: str, device: torch.device | None = None) -> Rounding:
    """Add what a change adds to the tensor in place: computed in float32 or wider, and rounded once.

    MismatchError where the dtype cannot hold the sum.
    """
    matrix, device = as_rows(tensor), device or torch.device("cpu")
    norm = lost = 0.0
    for rows in blocks(matrix):
        added = rows_of(change, rows, device)
        wide = matrix[rows].to(device, torch.promote_types(added.dtype, torch.float32))
        wide = wide.add_(added) if wide.data_ptr() != matrix[rows].data_ptr() else wide + added
        rounded = wide.to(tensor.dtype)
        if not all_finite(rounded):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise MismatchError(f"{name}: the sum has entries that {kind} cannot hold, or is not finite")
        norm += squared(added)
        matrix[rows] = rounded.to(matrix.device)
        lost += squared(wide.sub_(rounded))
    return Rounding(norm**0.5, lost**0.5)


def rows_of(change: Change, rows: slice, device: torch.device) -> Tensor:
    """These rows of what a change adds, as a matrix."""
    parts = []
    if change.update is not None:
        parts.append(change.update.B[rows].to(device) @ change.update.A.to(device))
    if change.delta is not None:
        parts.append(as_rows(change.delta)[rows].to(device))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]
