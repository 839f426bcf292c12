"""What a merge will take, told before it begins: rank, bytes, time and memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lora_lab.merging.merged import MergeOptions
from lora_lab.merging.methods import MERGES
from lora_lab.merging.side_by_side import usual_jobs
from lora_lab.merging.sources import Sources


@dataclass(frozen=True)
class Forecast:
    """What a merge will take."""

    modules: int
    rank: int
    """The largest of a module."""
    bytes: int
    """Of the tensors that will be written, at the most."""
    seconds: float | None
    """Of a core, within a factor of two or so; None for a method that looks at data, where the model decides."""
    memory: int
    """Bytes at a time, at the most."""

    @property
    def is_long(self) -> bool:
        """Whether somebody should know of it beforehand: more than ten seconds, or half a gigabyte."""
        return (self.seconds or 0.0) > 10 or self.bytes > 5e8


def forecast(sources: Sources, method: str, *, jobs: int | None = None, **settings: Any) -> Forecast:
    """What the merge of these sources will take with so many jobs; `settings` are the fields of `MergeOptions`."""
    how, kind = MergeOptions(**settings), MERGES[method].kind
    width = how.dtype_of(sources.adapters).itemsize
    rank, size, work, largest = 0, 0, 0.0, 0
    for name, shape in sources.shapes.items():
        rows, columns = shape[0], shape[1:].numel()
        together = min(rows, columns) if kind.dense and how.exact else sources.rank_of(name)
        kept = together if how.rank is None else min(how.rank, together)
        rank, size = max(rank, kept), size + kept * (rows + columns) * width
        if kind.dense:
            cut = 0.0 if kept == min(rows, columns) else _CUT
            work += rows * columns * (len(sources.adapters) * kind.pace + cut)
            largest = max(largest, rows * columns)
        else:
            work += sources.rank_of(name) * (rows + columns) * kind.pace
    jobs = jobs or usual_jobs()
    given = sum(_bytes(adapter.tensors) for adapter in sources.adapters)
    seconds = None if MERGES[method].reads_data else _SHARE_OF_IO * (given + size) + work * _slowness() * 1e-9
    return Forecast(len(sources.shapes), rank, size, seconds, given + size + jobs * _DENSE_COPIES * 4 * largest)


_CUT = 18.0
"""Nanoseconds of cutting a dense ΔW to some dozens of ranks, an entry."""
_SHARE_OF_IO = 3e-9
"""Seconds a byte that is read or written: to copy, hash and check it."""
_DENSE_COPIES = 2
_PRODUCT = 0.4
"""Nanoseconds of an entry of a product of rank 16 on the machine that the other numbers are from."""


def _slowness() -> float:
    """How much slower this machine is than that one, by a product that takes some milliseconds."""
    A, B = torch.ones(16, 4096), torch.ones(256, 16)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        B @ A
        times.append(time.perf_counter() - began)
    return min(times) * 1e9 / (256 * 4096) / _PRODUCT


def _bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
