"""What a pruning cost: the error of ΔW, and the modules, ranks and bytes that are left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lora_lab.adapters.adapter import Adapter
from lora_lab.brief import Brief
from lora_lab.forecast import bytes_of
from lora_lab.side_by_side import in_order


@dataclass(frozen=True, repr=False)
class Pruned(Brief):
    """A pruned adapter and what the pruning cost."""

    adapter: Adapter
    error: float | None
    """Relative Frobenius error of ΔW over all modules together (0 for ΔW = 0); None for a tuner without ΔW."""
    errors: Mapping[str, float]
    """Module → its relative error: 1 where it was removed, 0 where ΔW is the same. Empty for a tuner without ΔW."""
    sparsity: float | None
    """Share of zeros among the entries that were to be pruned; None where modules or ranks were removed."""
    modules: tuple[int, int]
    """Modules kept, of how many."""
    ranks: tuple[int, int] | None
    """Sum of the ranks kept, of how many; None for a tuner without ranks."""
    bytes: tuple[int, int]
    """Size of all tensors before and after."""


def measured(
    before: Adapter,
    after: Adapter,
    options: Mapping[str, Any] | None = None,
    *,
    lost: tuple[Mapping[str, float], Mapping[str, float]] | None = None,
    jobs: int = 1,
    place: torch.device | None = None,
) -> Pruned:
    """`after` with its record (for given options) and its cost; `lost` are ‖lost‖² and ‖ΔW‖² by module, if known.

    Else so many modules are measured at a time, on the device `place`.
    """
    if lost is None and before.why_no_delta is None:
        names = list(before.updates)
        after.updates  # noqa: B018  (made once, before the threads ask for it)
        calls = (partial(_measured, name, before, after, place or torch.device("cpu")) for name in names)
        pairs = dict(zip(names, in_order(calls, jobs), strict=True))
        lost = {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}
    gone, all_of_it = lost or ({}, {})
    error = None if lost is None else _ratio(math.fsum(gone.values()), math.fsum(all_of_it.values()))
    ranks = [[site.rank for site in adapter.sites.values()] for adapter in (after, before)]
    has_ranks = all(rank is not None for rank in ranks[1])
    return Pruned(
        adapter=after if options is None else recorded(before, after, options),
        error=error,
        errors={name: _ratio(gone[name], all_of_it[name]) for name in gone},
        sparsity=None,
        modules=(len(after.sites), len(before.sites)),
        ranks=(sum(r or 0 for r in ranks[0]), sum(r or 0 for r in ranks[1])) if has_ranks else None,
        bytes=(bytes_of(before.tensors), bytes_of(after.tensors)),
    )


def _measured(name: str, before: Adapter, after: Adapter, place: torch.device) -> tuple[float, float]:
    """‖ΔW_before − ΔW_after‖² and ‖ΔW_before‖² of one module."""
    update = before.updates[name].to(place)
    if name not in after.sites:
        return update.norm() ** 2, update.norm() ** 2
    sites = before.sites[name], after.sites[name]
    if sites[0].scale == sites[1].scale and all(
        part in sites[1].keys and before.tensors[key] is after.tensors[sites[1].keys[part]]
        for part, key in sites[0].keys.items()
    ):
        return 0.0, update.norm() ** 2
    lost, norm = update.distance(after.updates[name].to(place))
    return lost**2, norm**2


def _ratio(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole else 0.0


def recorded(before: Adapter, after: Adapter, options: Mapping[str, Any]) -> Adapter:
    """`after` with one more entry in its record's list of prunings."""
    earlier = before.record.get("pruned") or []
    entries = list(earlier) if isinstance(earlier, list | tuple) else [earlier]
    record = {**before.record, "pruned": [*entries, {**options, "from": before.label}]}
    return replace(after, record=record, source=f"pruned {before.label}", name="")
