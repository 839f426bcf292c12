"""What a merge will take, told before it begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lora_lab.files import Unread
from lora_lab.forecast import IO_SECONDS, Forecast, bytes_of, slowness
from lora_lab.merging.budgets import rank_in
from lora_lab.merging.merged import MergeOptions
from lora_lab.merging.methods import MERGES
from lora_lab.merging.sources import Sources
from lora_lab.merging.writing.spool import MOST
from lora_lab.side_by_side import usual_jobs


def forecast(
    sources: Sources,
    method: str,
    *,
    options: Mapping[str, Any] | None = None,
    jobs: int | None = None,
    **settings: Any,
) -> Forecast:
    """What the merge of these sources will take with so many jobs; `settings` are the fields of `MergeOptions`."""
    how, entry = MergeOptions(**settings), MERGES[method]
    kind = entry.kind_with(options or {})
    width = how.dtype_of(sources.adapters).itemsize
    rank, size, work, largest, widest = 0, 0, 0.0, 0, 0
    for name, shape in sources.shapes.items():
        rows, columns = shape[0], shape[1:].numel()
        together = min(rows, columns) if kind.dense and (how.exact or how.rank) else sources.rank_of(name)
        asked = rank_in(sources, name, how.rank)
        kept = together if asked is None else min(asked, together)
        rank, size = max(rank, kept), size + kept * (rows + columns) * width
        if kind.dense:
            cut = 0.0 if kept == min(rows, columns) else _CUT
            work += rows * columns * (len(sources.adapters) * kind.pace + cut)
            largest = max(largest, rows * columns)
        else:
            widest = max(widest, sources.rank_of(name) * (rows + columns))
            work += sources.rank_of(name) * (rows + columns) * kind.pace
    jobs = jobs or usual_jobs()
    given = sum(bytes_of(adapter.tensors) for adapter in sources.adapters)
    seconds = None if entry.reads_data else IO_SECONDS * (given + size) + work * slowness() * 1e-9
    passes = entry.examples_read(options or {}, sources.tasks) if sources.tasks else 0.0
    held = sum(bytes_of(_in_memory(adapter.tensors)) for adapter in sources.adapters)
    memory = held + min(size, MOST) + jobs * _COPIES * 4 * max(largest, widest)
    return Forecast(len(sources.shapes), rank, size, seconds, memory, passes)


_CUT = 18.0
"""Nanoseconds of cutting a dense ΔW to some dozens of ranks, an entry."""
_COPIES = 2
"""Of a dense ΔW, or of all factors of a module, that one merge at work holds in float32."""


def _in_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not isinstance(tensor, Unread)}
