"""Adapters merged into one by a method of methods.py, and what it cost."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_lab import escape
from lora_lab.adapters.adapter import Adapter, from_updates
from lora_lab.adapters.converting import DTYPES
from lora_lab.adapters.cutting import factored
from lora_lab.adapters.describe import labels_of
from lora_lab.adapters.lowrank import LowRank, is_finite
from lora_lab.adapters.renames import require_shared_modules
from lora_lab.adapters.whole import HEADS, Whole, merge_heads, token_settings
from lora_lab.brief import Brief
from lora_lab.errors import LoraLabWarning, MismatchError, OptionError, shorten
from lora_lab.files.trust import Origin
from lora_lab.merging.methods import MERGES, check
from lora_lab.merging.sources import Sources
from lora_lab.options import check_options, checked, option

_CANCELLED = 1e-12
"""Norm of ΔW, relative to the size of its factors, at which it is rounding and stands for 0."""


@dataclass(frozen=True)
class MergeOptions:
    """What a merge is besides its method; OptionError for what cannot be."""

    coefficient: float = option(1.0, "The merged ΔW is multiplied by it.", title="the coefficient")
    rank: int | None = option(None, "Cut to this rank, the error is told; by default exact.", least=1)
    heads: str | None = option(
        None,
        "Heads that differ: keep-own (each its own, beside it), average (a plain mean), or first.",
        choices=lambda: HEADS,
        title="way with heads",
    )
    dtype: str = option("float32", "float32, bfloat16 or float16, of the file.", choices=lambda: DTYPES)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, repr=False)
class Merged(Brief):
    """A merged adapter and how it came to be."""

    adapter: Adapter
    method: str
    options: Mapping[str, Any]
    weights: Any
    error: float
    """Relative Frobenius error of ΔW over all modules, from the rank and the dtype asked for; 0: exact."""
    errors: Mapping[str, float]
    """Module → its relative error."""
    heads: Mapping[str, Mapping[str, Tensor]]
    """With keep-own: label of a source → its own whole tensors, written beside the adapter."""
    absent: Sequence[Sequence[str]]
    """For each source, the modules that it leaves alone, where its ΔW is 0."""


@checked
def merge(
    sources: Sources,
    method: str = "task-arithmetic",
    *,
    options: Mapping[str, Any] | None = None,
    trials: Sequence[Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Merged:
    """The adapter that a method of MERGES makes of the sources.

    `options` are the method's, `settings` the fields of `MergeOptions`. Exact at the rank that the method needs, or cut
    to the `rank` asked for with its error. `heads` says what becomes of heads and other whole tensors where the sources
    differ in them: keep-own (each its own, beside the adapter), average, first. `trials` of a search (search.py) go
    into the record.
    """
    given, how = check(method, options or {}), MergeOptions(**settings)
    require_shared_modules(sources.adapters)
    formats = {adapter.layout.format: adapter.source for adapter in reversed(sources.adapters)}
    if len(formats) > 1:
        told = ", ".join(f"{source} ({name})" for name, source in reversed(formats.items()))
        warnings.warn(
            f"adapters of several formats: {told}; what comes out is in {sources.adapters[0].layout.format}'s",
            LoraLabWarning,
            stacklevel=2,
        )
    whole = merge_heads(sources.adapters, _file_names(sources.adapters), how.heads)
    every_option = {n: v for n, v in {**MERGES[method].defaults(given), **given}.items() if v is not None}
    updates: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    norms: dict[str, float] = {}
    for done, (name, result) in enumerate(MERGES[method](sources, **every_option), 1):
        updates[name], errors[name], norms[name] = _finished(result, how, name, method)
        if progress:
            progress(done, len(sources.modules))
    # ‖lost‖ / ‖ΔW‖ over all modules, from ‖lost_m‖ = error_m ‖ΔW_m‖
    total = math.sqrt(math.fsum(norm**2 for norm in norms.values()))
    lost = math.sqrt(math.fsum((errors[name] * norms[name]) ** 2 for name in norms))
    names = labels_of(sources.adapters)
    record = {
        "method": method,
        "options": every_option,
        "coefficient": how.coefficient,
        "weights": sources.weights.record,
        "rank": how.rank,
        "heads": how.heads,
        "dtype": how.dtype,
        "error": lost / total if total else 0.0,
        "ranks": _range([update.rank for update in updates.values()]),
        "trials": trials,
        "inputs": [{"adapter": n, **_brief(a)} for n, a in zip(names, sources.adapters, strict=True)],
        "absent": {name: len(absent) for name, absent in zip(names, sources.absent, strict=True) if absent},
    }
    adapter = from_updates(updates, like=sources.like, source=f"{method} of {shorten(names)}")
    adapter = _with_whole(adapter, whole, DTYPES[how.dtype])
    adapter = replace(adapter, record=_record(sources, record), origin=_origin(sources.adapters))
    return Merged(
        adapter, method, every_option, record["weights"], record["error"], errors, whole.apart, sources.absent
    )


def _with_whole(adapter: Adapter, whole: Whole, dtype: torch.dtype) -> Adapter:
    """The adapter in its dtype with heads and other whole tensors, of which its configuration knows."""
    config = token_settings(adapter.config, whole.tokens)
    if whole.apart:  # PEFT would make heads anew that the file does not hold
        parts = config.get("modules_to_save") or []
        saved = [part for part in parts if any(f".{part}." in key for key in whole.tensors)]
        # by its task_type, too, PEFT would look for a head in the file
        headless: dict[str, Any] = {} if saved else {"task_type": None}
        config = {**config, "modules_to_save": saved or None, **headless}
    factors = {key for site in adapter.sites.values() for key in site.keys.values()}
    tensors = {key: tensor.to(dtype) for key, tensor in adapter.tensors.items() if key in factors}
    return replace(adapter, config=config, tensors={**tensors, **whole.tensors})


def _range(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}"


def _finished(merged: LowRank | Tensor, how: MergeOptions, name: str, method: str) -> tuple[LowRank, float, float]:
    """The update as it will be stored, its relative error and its norm."""
    too_large = f"{method}: ΔW of {name} is not finite: an adapter, a weight or an option is too large for it"
    if not is_finite(merged):
        raise MismatchError(too_large)
    if isinstance(merged, Tensor):
        norm = float(merged.norm(dtype=torch.float64) if merged.dtype == torch.float64 else merged.norm())
        update, error = factored(merged, how.rank)
    else:
        norm = merged.norm()
        update, error = (merged, 0.0) if how.rank is None or how.rank >= merged.rank else merged.truncate(how.rank)
        if update.rank > min(update.B.shape[0], update.A.shape[1]):
            update = factored(update.delta())[0]
    norm, update = norm * abs(how.coefficient), update * how.coefficient
    if not is_finite(update):
        raise MismatchError(too_large)
    if norm <= _CANCELLED * update.bound():  # or no factors at all, which PEFT has no rank for
        norm = 0.0
        rows, columns = update.B.shape[0], update.A.shape[1]
        update = LowRank(torch.zeros(1, columns), torch.zeros(rows, 1), update.shape)
    dtype, wide = DTYPES[how.dtype], torch.float32
    stored = LowRank(update.A.to(dtype).to(wide), update.B.to(dtype).to(wide), update.shape)
    if not (torch.isfinite(stored.A).all() and torch.isfinite(stored.B).all()):
        raise OptionError(f"{name} has entries that {how.dtype} cannot hold; float32 can")
    if dtype != wide and norm:
        error = math.hypot(error, (stored - LowRank(update.A.to(wide), update.B.to(wide), update.shape)).norm() / norm)
    return stored, error, norm


def _file_names(adapters: Sequence[Adapter]) -> list[str]:
    """A different name for a file for each adapter; letters of one case are one letter to some file systems."""
    names = [escape.file_name(label) for label in labels_of(adapters)]
    if len({name.lower() for name in names}) == len(names):
        return names
    return [f"{name}-{i}" for i, name in enumerate(names)]


def _brief(adapter: Adapter) -> dict[str, Any]:
    record = adapter.record
    return {name: record[name] for name in ("task", "method", "seed") if record.get(name) is not None}


def _record(sources: Sources, made: Mapping[str, Any]) -> dict[str, Any]:
    """What all sources agree on, and the merge."""
    records = [adapter.record for adapter in sources.adapters]
    common = {
        name: records[0][name]
        for name in ("task", "method", "base_config")
        if all(name in record and record[name] == records[0].get(name) for record in records)
    }
    return {**common, "merge": dict(made)}


def _origin(adapters: Sequence[Adapter]) -> Origin:
    """Of what is merged of these: the user's own where every task among their records is."""
    return Origin.of_all(adapter.origin for adapter in adapters if adapter.record.get("task"))
