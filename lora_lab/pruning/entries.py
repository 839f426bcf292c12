"""Adapters with single entries set to zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.formats.sites import Site
from lora_lab.adapters.lowrank import LowRank
from lora_lab.brief import Brief
from lora_lab.errors import AdapterError, OptionError
from lora_lab.options import checked
from lora_lab.pruning.cost import Pruned, measured, recorded
from lora_lab.pruning.ranks import keep_ranks
from lora_lab.registry import Registry
from lora_lab.side_by_side import in_order, one_core_each, usual_jobs


@checked
def prune_weights(
    adapter: Adapter,
    *,
    sparsity: float,
    by: str = "magnitude",
    per_matrix: bool = False,
    seed: int = 0,
    rank: int | None = None,
    jobs: int | None = None,
    place: torch.device | None = None,
) -> Pruned:
    """The adapter with the share `sparsity` of its entries set to zero: those of the lowest score (see CRITERIA).

    Exactly round(sparsity · count) are chosen, over all tensors together or `per_matrix`; of entries that tie, the
    first ones. magnitude and random choose among the tuner's own tensors (of LoRA's, A and B), whose dtype stays;
    plain LoRA then loses the units and modules that came out as zero, any other tuner keeps its shapes.
    delta-magnitude chooses among the entries of ΔW (plain LoRA only) and factors what is left at its full numerical
    rank, or at `rank`; `jobs` modules are factored at a time (by default up to four, fewer on fewer cores), with the
    same numbers for any of them, each on the device `place`. Raises AdapterError where nothing would be left.
    """
    criterion = CRITERIA[by]
    if not 0 <= sparsity <= 1:
        raise OptionError(f"sparsity is {sparsity}; a share from 0 to 1 is needed")
    if rank is not None and not criterion.of_delta:
        names = ", ".join(name for name, other in CRITERIA.items() if other.of_delta)
        raise OptionError(f"{by} keeps the factors, so a rank of {rank} cannot be had; it is an option of: {names}")
    if rank is not None and rank < 1:
        raise OptionError(f"a rank of {rank} was asked for; it is at least 1")
    options = {"sparsity": sparsity, "by": by, "per_matrix": per_matrix, "seed": seed}
    masks = partial(_masks, score=criterion.score, sparsity=sparsity, per_matrix=per_matrix, seed=seed)
    with one_core_each():
        if criterion.of_delta:
            thinned = partial(_thinned, sparsity=sparsity, rank=rank, place=place or torch.device("cpu"))
            pruned = _in_deltas(adapter, masks, sparsity, thinned, jobs or usual_jobs())
        else:
            pruned = _in_tensors(adapter, masks, sparsity)
    return replace(pruned, adapter=recorded(adapter, pruned.adapter, options | ({"rank": rank} if rank else {})))


Score = Callable[[Tensor, torch.Generator], Tensor]
"""Function (tensor, generator) → a score ≥ 0 for every entry; the lowest ones are pruned."""


def magnitude(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """|entry|."""
    return tensor.abs()


def random(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform noise: each choice of entries is as likely."""
    return torch.rand(tensor.shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Criterion:
    """Which entries go: those of the lowest score."""

    score: Score
    of_delta: bool = False
    """Whether entries of ΔW are chosen, which only plain LoRA has, rather than those of the tuner's own tensors."""
    random: bool = False
    """Whether the seed decides, so that a mean over draws is wanted."""
    about: str = ""
    """Which entries go, in a few words."""


Masks = Callable[[Callable[[], Iterable[Tensor]]], Iterator[Tensor]]
"""Function (what gives the tensors, again and again) → for each of them, which entries go."""


def _in_tensors(adapter: Adapter, masks: Masks, sparsity: float) -> Pruned:
    keys = _prunable(adapter)
    wide = torch.float64 if any(adapter.tensors[key].dtype == torch.float64 for key in keys) else torch.float32

    def parts() -> Iterator[Tensor]:
        return (adapter.tensors[key].to(wide) for key in keys)

    tensors, zeros, total = dict(adapter.tensors), 0, 0
    for key, mask in zip(keys, masks(parts), strict=True):
        tensors[key] = adapter.tensors[key].masked_fill(mask, 0)
        zeros += int((tensors[key] == 0).sum())
        total += mask.numel()
    _check_left(adapter, zeros < total or not sparsity, sparsity)
    changed = replace(adapter, tensors=tensors, source=f"pruned {adapter.label}", name="")
    if sparsity and adapter.why_not_additive is None:
        alive = {name: _alive(changed, site) for name, site in adapter.sites.items()}
        _check_left(adapter, any(alive.values()), sparsity)
        changed = replace(keep_ranks(changed, alive), source=changed.source)
    return replace(measured(adapter, changed), sparsity=zeros / total if total else 0.0)


def _prunable(adapter: Adapter) -> list[str]:
    lora = adapter.tuner == "LORA"
    keys = [key for site in adapter.sites.values() for part, key in site.keys.items() if not lora or part in site.pair]
    return [key for key in keys if adapter.tensors[key].is_floating_point()]


def _alive(adapter: Adapter, site: Site) -> list[int]:
    """Units whose row of A and column of B both hold something."""
    A, B = (adapter.tensors[site.keys[part]] for part in site.pair)
    there = (A != 0).flatten(1).any(1) & (B != 0).transpose(0, 1).flatten(1).any(1)
    return [int(unit) for unit in there.nonzero().flatten()]


def _in_deltas(
    adapter: Adapter, masks: Masks, sparsity: float, thin: Callable[[LowRank, Tensor], _Thinned], jobs: int
) -> Pruned:
    wide = max((update.A.dtype for update in adapter.updates.values()), key=lambda dtype: dtype.itemsize)

    def parts() -> Iterator[Tensor]:
        return (update.delta().to(wide) for update in adapter.updates.values())

    masked = zip(adapter.updates.values(), masks(parts), strict=True)
    calls = (partial(thin, update, mask) for update, mask in masked)
    thinned = dict(zip(adapter.updates, in_order(calls, jobs), strict=True))
    zeros, total = (sum(getattr(each, part) for each in thinned.values()) for part in ("zeros", "entries"))
    _check_left(adapter, zeros < total or not sparsity, sparsity)
    updates = {name: each.update for name, each in thinned.items() if each.update is not None}
    lost = {name: each.lost for name, each in thinned.items()}, {name: each.whole for name, each in thinned.items()}
    pruned = measured(adapter, adapter.with_updates(updates, source=f"pruned {adapter.label}"), lost=lost)
    return replace(pruned, sparsity=zeros / total)


@dataclass(frozen=True, repr=False)
class _Thinned(Brief):
    """ΔW of a module without some of its entries."""

    update: LowRank | None
    """As factors; None for 0."""
    zeros: int
    entries: int
    lost: float
    """‖ΔW lost‖²."""
    whole: float
    """‖ΔW‖²."""


def _thinned(update: LowRank, mask: Tensor, *, sparsity: float, rank: int | None, place: torch.device) -> _Thinned:
    update = update.to(place)
    dense = update.delta()
    left = dense.masked_fill(mask.to(place), 0)
    kept = update if torch.equal(left, dense) and (left.any() or not sparsity) else _factored(left)
    if rank is not None and kept is not None and kept.rank > rank:
        kept = kept.truncate(rank)[0]
    lost = float((dense - (0 if kept is None else kept.delta())).double().square().sum())
    kept_here = None if kept is None else kept.to(torch.device("cpu"))
    return _Thinned(kept_here, int((left == 0).sum()), left.numel(), lost, float(dense.double().square().sum()))


def _factored(dense: Tensor) -> LowRank | None:
    """Balanced factors of the numerical rank; None for zero."""
    U, S, Vh = torch.linalg.svd(dense.flatten(1).double(), full_matrices=False)
    limit = S[0] * max(dense.shape[0], math.prod(dense.shape[1:])) * torch.finfo(dense.dtype).eps
    count = int((limit < S).sum())
    if not count:
        return None
    root = S[:count].sqrt()
    A, B = root[:, None] * Vh[:count], U[:, :count] * root
    return LowRank(A.to(dense.dtype), B.to(dense.dtype), tuple(dense.shape))


def _masks(
    parts: Callable[[], Iterable[Tensor]], score: Score, sparsity: float, per_matrix: bool, seed: int
) -> Iterator[Tensor]:
    """For each tensor, which entries go; one tensor at a time is held, and `parts` is gone through several times."""

    def scores() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return (score(part, generator) for part in parts())

    if per_matrix:
        for each in scores():
            yield next(_lowest(lambda each=each: [each], round(sparsity * each.numel())))  # type: ignore[misc]
    else:
        yield from _lowest(scores, round(sparsity * sum(part.numel() for part in parts())))


def _lowest(scores: Callable[[], Iterable[Tensor]], count: int) -> Iterator[Tensor]:
    """Masks of the `count` lowest scores over all tensors; of scores that tie, the first ones."""
    threshold, ties = nth_smallest(scores, count) if count else (-1, 0)
    for each in scores():
        bits = _bits(each)
        tied = bits == threshold
        taken = tied & (tied.cumsum(0) <= ties)
        ties -= int(taken.sum())
        yield ((bits < threshold) | taken).reshape(each.shape)


def nth_smallest(parts: Callable[[], Iterable[Tensor]], count: int) -> tuple[int, int]:
    """The bit pattern of the count-th smallest (from 1) value ≥ 0 of all tensors, and how many of its equals count.

    Exact, with one tensor at a time in memory: floats ≥ 0 are ordered as their bits are, so the value is found
    16 bits at a time, each by a histogram of the values that share the bits found so far. All have one dtype.
    """
    width, prefix = next((8 * part.itemsize for part in parts()), 0), 0
    for shift in range(width - 16, -1, -16):
        histogram = torch.zeros(1 << 16, dtype=torch.int64)
        for part in parts():
            bits = _bits(part)
            if shift + 16 < width:
                bits = bits[bits >> (shift + 16) == prefix]
            histogram += torch.bincount(((bits >> shift) & 0xFFFF).long(), minlength=1 << 16)
        below = histogram.cumsum(0)
        digit = int(torch.searchsorted(below, count))
        count -= int(below[digit] - histogram[digit])
        prefix = prefix << 16 | digit
    return prefix, count


def _bits(values: Tensor) -> Tensor:
    """The bits of values ≥ 0 as integers, flat."""
    return values.abs().contiguous().flatten().view(torch.int64 if values.itemsize == 8 else torch.int32)


def _check_left(adapter: Adapter, left: bool, sparsity: float) -> None:
    if not left:
        raise AdapterError(f"{adapter.label}: at sparsity {sparsity:g} nothing would be left; a lower one is needed")


CRITERIA = Registry(
    "criterion",
    "lora_lab.criteria",
    Criterion,
    {
        "magnitude": Criterion(magnitude, about="the smallest |entries| of A and B"),
        "random": Criterion(random, random=True, about="entries of A and B drawn by the seed: a control"),
        "delta-magnitude": Criterion(magnitude, of_delta=True, about="the smallest |entries| of ΔW itself"),
    },
)
"""How entries are chosen, by name."""
