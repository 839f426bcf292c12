"""Adapters merged into one by a method of methods.py, and what it cost."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_lab import escape
from lora_lab.adapters.adapter import Adapter, of_sites, plain_site
from lora_lab.adapters.cutting import factored, norm_of
from lora_lab.adapters.describe import labels_of
from lora_lab.adapters.files.converting import DTYPES
from lora_lab.adapters.formats.peft import peft_format
from lora_lab.adapters.formats.sites import Site
from lora_lab.adapters.lowrank import LowRank, is_finite
from lora_lab.adapters.renames import require_shared_modules
from lora_lab.adapters.whole import HEADS, Whole, merge_heads, token_settings
from lora_lab.brief import Brief
from lora_lab.errors import LoraLabWarning, MismatchError, OptionError, shorten
from lora_lab.files.trust import Origin
from lora_lab.merging.budgets import RANKS, check_rank, rank_in
from lora_lab.merging.kinds import Delta
from lora_lab.merging.methods import MERGES, check
from lora_lab.merging.sources import Sources
from lora_lab.merging.writing.spool import Spool
from lora_lab.options import check_options, checked, option
from lora_lab.side_by_side import in_order, one_core_each, usual_jobs

_CANCELLED = 1e-12
"""Norm of ΔW, relative to the size of its factors, at which it is rounding and stands for 0."""


@dataclass(frozen=True)
class MergeOptions:
    """What a merge is besides its method; OptionError for what cannot be."""

    coefficient: float = option(1.0, "The merged ΔW is multiplied by it.", title="the coefficient")
    rank: int | str | None = option(
        None,
        "Cut to this rank, the error is told: a number, largest (of the adapters, in each module) or sum (of theirs). "
        "By default exact, but what works on single entries, whose ΔW has no low rank, is cut to the sum.",
        least=1,
        choices=lambda: RANKS,
    )
    exact: bool = option(False, "Cut nothing: what works on single entries is written whole, as large as the model.")
    heads: str | None = option(
        None,
        "Heads that differ: keep-own (each its own, beside it), average (a plain mean), or first.",
        choices=lambda: HEADS,
        title="way with heads",
    )
    dtype: str | None = option(
        None,
        "float32, bfloat16 or float16 (fp32, bf16, fp16), of the file; by default that of the adapters, the widest of "
        "them.",
        choices=lambda: DTYPES,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.exact and self.rank is not None:
            raise OptionError(f"a rank of {self.rank} and exact are both asked for; a cut is not exact")

    def dtype_of(self, adapters: Sequence[Adapter]) -> torch.dtype:
        """The dtype asked for, or the narrowest that holds all numbers of the adapters' factors, at most float32."""
        if self.dtype is not None:
            return DTYPES[self.dtype]
        kinds = {a.tensors[key].dtype for a in adapters for site in a.sites.values() for key in site.keys.values()}
        wide = {kind for kind in kinds if kind in (torch.bfloat16, torch.float16)}
        return wide.pop() if len(wide) == 1 and wide == kinds else torch.float32


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
    jobs: int | None = None,
    spool: Spool | None = None,
    **settings: Any,
) -> Merged:
    """The adapter that a method of MERGES makes of the sources.

    `options` are the method's, `settings` the fields of `MergeOptions`. Exact at the rank that the method needs, or
    cut to the `rank` asked for (see budgets.py) with its error; a dense ΔW is cut to the sum of the sources' ranks
    unless `exact`. `heads` says what becomes of heads and other whole tensors where the sources differ in them:
    keep-own (each its own, beside the adapter), average, first. `trials` of a search (search.py) go into the record.
    `jobs` modules are merged at a time (by default up to four), with the same numbers for any; a method that looks at
    data goes its own way. Merged modules are put into the `spool`; those that it has from a killed run are done.
    """
    how = MergeOptions(**settings)
    every_option = _every_option(method, options or {}, how)
    require_shared_modules(sources.adapters)
    check_rank(sources, how.rank)
    _tell_formats(sources.adapters)
    whole = merge_heads(sources.adapters, _file_names(sources.adapters), how.heads)
    dtype = how.dtype_of(sources.adapters)
    spool, like = Spool() if spool is None else spool, sources.like

    def finished(name: str, result: Delta | Callable[[], Delta]) -> tuple[str, Site, dict[str, Tensor], _Stored]:
        made = result() if callable(result) else result
        rank = rank_in(sources, name, how.rank)
        if rank is None and isinstance(made, Tensor) and not how.exact:
            rank = sources.rank_of(name)
        update, each = _finished(made, rank, how.coefficient, dtype, f"{method}: ΔW of {name}")
        site, factors = plain_site(name, update, like)
        return name, site, {key: factor.to(dtype) for key, factor in factors.items()}, each

    at_a_time = 1 if MERGES[method].reads_data else jobs or usual_jobs()
    with contextlib.nullcontext() if MERGES[method].reads_data else one_core_each():
        pairs = MERGES[method].calls(sources.telling(progress), **every_option)
        calls = (partial(finished, *pair) for pair in pairs if pair[0] not in spool)
        for name, site, factors, each in in_order(calls, at_a_time):
            spool.add(name, [each.error, each.norm, site.kind, site.rank, dict(site.keys)], factors)
            if progress:
                progress(len(spool), len(sources.modules))
    adapter, told = _spooled(spool, sources, f"{method} of {shorten(labels_of(sources.adapters))}")
    record = {
        "method": method,
        "options": every_option,
        **{name: getattr(how, name) for name in ("coefficient", "rank", "heads", "exact")},
        "dtype": str(dtype).removeprefix("torch."),
        "error": _error(told, adapter),
        "trials": trials,
        **_inputs(sources, adapter),
    }
    adapter = replace(_with_whole(adapter, whole), record=_record(sources, record), origin=_origin(sources.adapters))
    weights, error, errors = record["weights"], record["error"], {name: each.error for name, each in told.items()}
    return Merged(adapter, method, every_option, weights, error, errors, whole.apart, sources.absent)


def _every_option(method: str, options: Mapping[str, Any], how: MergeOptions) -> dict[str, Any]:
    """The options of the method, those that are not given at their defaults; OptionError for what cannot be."""
    given = check(method, options)
    if isinstance(how.rank, int) and "rank" in MERGES[method].defaults(given):
        given.setdefault("rank", how.rank)  # a method that merges within a rank, so that nothing is to be cut
    return {name: v for name, v in {**MERGES[method].defaults(given), **given}.items() if v is not None}


def _spooled(spool: Spool, sources: Sources, source: str) -> tuple[Adapter, dict[str, _Stored]]:
    """The adapter of the merged modules, and what is told of each, in their order."""
    sites: dict[str, Site] = {}
    tensors: dict[str, Tensor] = {}
    told: dict[str, _Stored] = {}
    for name in sources.modules:
        if name in spool:
            error, norm, kind, rank, keys = spool.told[name]
            told[name], sites[name] = _Stored(error, norm), Site(name, kind, keys, rank, 1.0)
            tensors |= spool.tensors(name)
    return of_sites(sites, tensors, like=sources.like, source=source), told


def _inputs(sources: Sources, merged: Adapter) -> dict[str, Any]:
    """What the record says of the adapters, which they are and how they are weighed, and of the ranks they came to."""
    names = labels_of(sources.adapters)
    return {
        "weights": sources.weights.record,
        "inputs": [{"adapter": n, **_brief(a)} for n, a in zip(names, sources.adapters, strict=True)],
        "absent": {name: len(absent) for name, absent in zip(names, sources.absent, strict=True) if absent},
        "ranks": _range([site.rank or 0 for site in merged.sites.values()]),
    }


def _tell_formats(adapters: Sequence[Adapter]) -> None:
    """A warning where the adapters come from files of several formats: the merged one is in the first one's."""
    formats = {adapter.layout.format: adapter.source for adapter in reversed(adapters)}
    if len(formats) > 1:
        listed = ", ".join(f"{source} ({name})" for name, source in reversed(formats.items()))
        warnings.warn(
            f"adapters of several formats: {listed}; what comes out is in {adapters[0].layout.format}'s",
            LoraLabWarning,
            stacklevel=3,
        )


def _with_whole(adapter: Adapter, whole: Whole) -> Adapter:
    """The adapter with heads and other whole tensors, of which its configuration knows."""
    config = token_settings(adapter.config, whole.tokens)
    if whole.apart:  # PEFT would make heads anew that the file does not hold
        parts = config.get("modules_to_save") or []
        saved = [part for part in parts if any(f".{part}." in key for key in whole.tensors)]
        # by its task_type, too, PEFT would look for a head in the file
        headless: dict[str, Any] = {} if saved else {"task_type": None}
        config = {**config, "modules_to_save": saved or None, **headless}
    factors = {key for site in adapter.sites.values() for key in site.keys.values()}
    tensors = {key: tensor for key, tensor in adapter.tensors.items() if key in factors}
    return replace(adapter, config=config, tensors={**tensors, **whole.tensors})


def _range(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}"


@dataclass(frozen=True)
class _Stored:
    """What is told of a module that was merged."""

    error: float
    norm: float | None
    """‖ΔW‖; None where nothing was lost, so that nobody needed it."""


def _error(told: Mapping[str, _Stored], adapter: Adapter) -> float:
    """‖lost‖ / ‖ΔW‖ over all modules, from ‖lost_m‖ = error_m ‖ΔW_m‖."""
    if not any(each.error for each in told.values()):
        return 0.0
    squares, lost = [], []
    for name, each in told.items():
        norm = each.norm
        if norm is None:
            norm = peft_format.update(adapter.sites[name], adapter.tensors, adapter.config).norm()
        squares.append(norm**2)
        lost.append((each.error * norm) ** 2)
    total = math.fsum(squares)
    return math.sqrt(math.fsum(lost) / total) if total else 0.0


def _finished(
    merged: LowRank | Tensor, rank: int | None, coefficient: float, dtype: torch.dtype, what: str
) -> tuple[LowRank, _Stored]:
    """The update with the numbers that will be stored, cut to the rank, and what is told of it."""
    too_large = f"{what} is not finite: an adapter, a weight or an option is too large for it"
    if not is_finite(merged):
        raise MismatchError(too_large)
    error, norm = 0.0, None
    if isinstance(merged, Tensor):
        norm = norm_of(merged)
        update, error = factored(merged, rank)
    elif rank is not None and rank < merged.rank:
        update, error, S = merged.cut(rank)
        norm = float(S.norm())
    else:
        update = merged
    if update.rank > min(update.B.shape[0], update.A.shape[1]):
        update = factored(update.delta())[0]
    if coefficient != 1:
        update = update * coefficient
        norm = None if norm is None else norm * abs(coefficient)
    if update is not merged and not is_finite(update):
        raise MismatchError(too_large)
    # or no factors at all, which PEFT has no rank for
    if update.vanishes(_CANCELLED) if norm is None else norm <= _CANCELLED * update.bound():
        rows, columns = update.B.shape[0], update.A.shape[1]
        return LowRank(torch.zeros(1, columns), torch.zeros(rows, 1), update.shape), _Stored(error, 0.0)
    return _rounded(update, dtype, error, norm, what)


def _rounded(
    update: LowRank, dtype: torch.dtype, error: float, norm: float | None, what: str
) -> tuple[LowRank, _Stored]:
    """The update in float32, with entries that `dtype` has, and what is told of it."""
    A, B = update.A.float().cpu(), update.B.float().cpu()
    stored = LowRank(A.to(dtype).float(), B.to(dtype).float(), update.shape)
    same = dtype == torch.float32 or (torch.equal(stored.A, A) and torch.equal(stored.B, B))
    if same and update.A.dtype == torch.float32:  # which is known to be finite
        return stored, _Stored(error, norm)
    if not all(all(map(math.isfinite, map(float, factor.aminmax()))) for factor in (stored.A, stored.B)):
        raise OptionError(f"{what} has entries that {str(dtype).removeprefix('torch.')} cannot hold; float32 can")
    if same:
        return stored, _Stored(error, norm)
    # B'A' − BA = (B' − B) A' + B (A' − A), which loses no digits
    lost = LowRank(torch.cat([stored.A, stored.A - A]), torch.cat([stored.B - B, B], dim=1), update.shape)
    rounding = lost.rough_norm() if lost.rank < min(len(B), A.shape[1]) else float(lost.delta().norm())
    norm = update.norm() if norm is None else norm
    return stored, _Stored(math.hypot(error, rounding / norm), norm)


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
