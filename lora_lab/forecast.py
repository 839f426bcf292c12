"""What something long will take, told before it begins: rank, bytes, time and memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IO_SECONDS = 3e-9
"""Seconds a byte that is read or written: to copy, hash and check it."""
_PRODUCT = 0.4
"""Nanoseconds of an entry of a product of rank 16 on the machine that the paces of forecasts are from."""


@dataclass(frozen=True)
class Forecast:
    """What making an adapter of others will take."""

    modules: int
    rank: int
    """The largest of a module."""
    bytes: int
    """Of the tensors that will be written, at the most."""
    seconds: float | None
    """Of a core, within a factor of two or so; None for a method that looks at data, where the model decides."""
    memory: int
    """Bytes at a time, at the most."""
    passes: float = 0.0
    """Forward passes of one example, of a method that looks at data; a backward pass is counted as two."""

    @property
    def is_long(self) -> bool:
        """Whether somebody should know of it: more than ten seconds, half a gigabyte, or a thousand passes."""
        return (self.seconds or 0.0) > 10 or self.bytes > 5e8 or self.passes > 1000


def slowness() -> float:
    """How much slower this machine is than the one of the paces, by a product that takes some milliseconds."""
    import torch

    A, B = torch.ones(16, 4096), torch.ones(256, 16)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        B @ A
        times.append(time.perf_counter() - began)
    return min(times) * 1e9 / (256 * 4096) / _PRODUCT


def bytes_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """Of all tensors together."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
