"""Adapters made smaller: fewer modules, fewer ranks, fewer entries. Every function returns a new adapter."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_lab.adapters.adapter import Adapter, exact_targets, other_tensors, stored
from lora_lab.adapters.formats.keys import PREFIX, anchored
from lora_lab.adapters.formats.matching import by_whole
from lora_lab.adapters.formats.peft_config import pattern_values
from lora_lab.adapters.formats.sites import Site
from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import AdapterError, OptionError, TunerError, some, unknown


@dataclass(frozen=True)
class Pruned:
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


# whole modules


def structured(adapter: Adapter, names: Collection[str], *, pattern: str | None = None) -> Pruned:
    """The adapter with these modules only, see `keep_modules`; `pattern` is noted as what chose them."""
    options = {"modules": sorted(set(names))} | ({"keep": pattern} if pattern else {})
    return _measured(adapter, keep_modules(adapter, names), options)


def keep_modules(adapter: Adapter, names: Collection[str], *, source: str | None = None) -> Adapter:
    """The adapter with these modules only, for every tuner that is placed by module names.

    Tensors, heads and scales stay bit for bit; the configuration names exactly the modules that are left, so that
    PEFT makes none of the others again. Raises OptionError for a module that is not there and where none is left,
    TunerError where the configuration cannot leave a module out.
    """
    absent = sorted(set(names) - set(adapter.sites))
    if absent:
        raise OptionError(f"{adapter.label} has no module {some(absent)}; there are: {some(adapter.sites)}")
    if not names:
        raise OptionError(
            f"no module of {adapter.label} would be left; at least one is needed of: {some(adapter.sites)}"
        )
    source = f"pruned {adapter.label}" if source is None else source
    sites = {name: site for name, site in adapter.sites.items() if name in set(names)}
    if len(sites) == len(adapter.sites):
        return replace(adapter, source=source)
    _check_removable(adapter, sites)
    owned = {key: adapter.tensors[key] for site in sites.values() for key in site.keys.values()}
    tensors = {**owned, **other_tensors(adapter, sites)}
    return Adapter(tensors, _restricted(adapter, list(sites)), sites, adapter.record, source, adapter.origin)


_BY_NAMES_ONLY = ("exclude_modules", "layers_pattern", "layers_to_transform")
# Tuners that look a module's own settings up as `peft_config.pattern_values` does: pattern → the default's field.
_PATTERNS = {"rank_pattern": ("r",), "alpha_pattern": ("lora_alpha", "alpha"), "lambda_pattern": ("delora_lambda",)}
_PATTERNED = {"LORA", "LOHA", "LOKR", "HIRA", "DELORA"}
# Tuners that are no layers, or whose layers are drawn or decomposed together: fewer of them are others
_TOGETHER = {"ADAPTION_PROMPT", "FROD", "SHADOW", "TINYLORA", "UNILORA", "XLORA"}
_SHARED_BY_SIZE = {"VERA", "PVERA", "RANDLORA"}


def _check_removable(adapter: Adapter, kept: Mapping[str, Site]) -> None:
    if adapter.config.get("target_parameters") or any(s.kind == "parameter" for s in adapter.sites.values()):
        raise TunerError(
            f"{adapter.label}: target_parameters names parameters by their endings, so no module can be left out; "
            "all of them must be kept"
        )
    if adapter.tuner in _TOGETHER:
        raise TunerError(f"{adapter.label}: {adapter.tuner} sets its modules up together, so none can be left out")
    if adapter.tuner not in _SHARED_BY_SIZE:
        return
    shared = [key for key in adapter.others if not key.startswith(PREFIX)]
    longest = [max(_lengths(adapter, sites, "_lambda_b"), default=0) for sites in (kept, adapter.sites)]
    if not shared or longest[0] != longest[1]:
        raise TunerError(
            f"{adapter.label}: {adapter.tuner} shares projections that are as large as its largest module, "
            f"{'which must be kept' if shared else 'and the file lacks them, so no module can be left out'}"
        )


def _lengths(adapter: Adapter, sites: Mapping[str, Site], ending: str) -> list[int]:
    keys = [key for site in sites.values() for part, key in site.keys.items() if part.endswith(ending)]
    return [adapter.tensors[key].numel() for key in keys]


def _restricted(adapter: Adapter, names: Sequence[str]) -> dict[str, Any]:
    """The configuration for these modules alone, each with the settings that it had."""
    config = {key: value for key, value in adapter.config.items() if key not in _BY_NAMES_ONLY}
    config["target_modules"] = exact_targets(names, adapter.sites)
    if adapter.tuner in _PATTERNED:
        for field, defaults in _PATTERNS.items():
            if config.get(field):
                default = next((config[key] for key in defaults if key in config), None)
                config[field] = _anchored_values(config[field], names, default)
    if adapter.tuner == "ADALORA" and config.get("rank_pattern"):
        gone = [name for name in adapter.sites if name not in names]
        config["rank_pattern"] = {
            key: ranks
            for key, ranks in config["rank_pattern"].items()
            if not any(key.startswith(f"{name}.lora_") for name in gone)
        }
    if adapter.tuner == "IA3" and config.get("feedforward_modules") is not None:
        forward = _feedforward(names, config["feedforward_modules"])
        # A pattern, since PEFT takes listed names as endings, even in the middle of a word
        config["feedforward_modules"] = f"^({'|'.join(map(re.escape, forward))})$" if forward else []
    return config


def _anchored_values(patterns: Mapping[str, Any], names: Iterable[str], default: Any) -> dict[str, Any]:
    values = pattern_values(patterns, list(names), default)
    return {anchored(name): value for name, value in values.items() if value != default}


def _feedforward(names: Sequence[str], said: str | Collection[str]) -> list[str]:
    if isinstance(said, str):
        return by_whole([said], names)[said]
    return [name for name in names if name.endswith(tuple(said))]


# rank-one units


def keep_ranks(adapter: Adapter, kept: Mapping[str, Sequence[int]]) -> Adapter:
    """The adapter with these rank-one units (row i of A and column i of B) of each module, sliced from the tensors.

    Modules that `kept` does not name stay whole, those without a unit are removed. The dtype and each module's
    scale α/r (α/√r for rsLoRA) stay, so α follows the rank. Plain LoRA only: TunerError for anything else.
    """
    _require_ranks(adapter)
    absent = sorted(set(kept) - set(adapter.sites))
    if absent:
        raise OptionError(f"{adapter.label} has no module {some(absent)}; there are: {some(adapter.sites)}")
    for name, units in kept.items():
        _check_units(name, units, adapter.sites[name])
    left = keep_modules(adapter, [name for name in adapter.sites if len(kept.get(name, [0]))])
    tensors, sites, alphas = dict(left.tensors), dict(left.sites), {}
    for name, site in left.sites.items():
        units = sorted(kept.get(name, range(site.rank or 0)))
        alphas[name] = _alpha(site, len(units), left.config)
        if len(units) == site.rank:
            continue
        index = torch.tensor(units)
        A, B = (site.keys[part] for part in site.pair)
        tensors[A] = left.tensors[A].index_select(0, index)
        tensors[B] = left.tensors[B].index_select(1, index)
        scale = alphas[name] / _divisor(len(units), left.config)
        sites[name] = replace(site, rank=len(units), scale=scale)
    if all(sites[name] is site for name, site in left.sites.items()):
        return left
    return replace(left, tensors=tensors, sites=sites, config=_ranked(left.config, sites, alphas))


def _require_ranks(adapter: Adapter) -> None:
    reason = adapter.why_not_additive
    if reason:
        raise TunerError(f"{adapter.label}: this {adapter.tuner} adapter has no ranks to be removed: {reason}")


def _check_units(name: str, units: Sequence[int], site: Site) -> None:
    rank = site.rank or 0
    wrong = [unit for unit in units if not 0 <= unit < rank]
    if wrong:
        raise OptionError(f"{name} has no unit {some(wrong)}; its {rank} units are 0 to {rank - 1}")
    if len(set(units)) < len(units):
        raise OptionError(f"units of {name} are named twice: {some(u for u, n in Counter(units).items() if n > 1)}")


def _divisor(rank: int, config: Mapping[str, Any]) -> float:
    return math.sqrt(rank) if config.get("use_rslora") else rank


def _alpha(site: Site, rank: int, config: Mapping[str, Any]) -> float:
    """The lora_alpha that gives this site at this rank the scale that it has now, to the last bit if any number does.

    That is the float nearest to scale · divisor: those that round back to the scale lie evenly around the product.
    """
    if rank == site.rank:
        alpha: float = pattern_values(config.get("alpha_pattern") or {}, [site.name], config.get("lora_alpha"))[
            site.name
        ]
        return alpha
    alpha = float((site.scale or 0.0) * _divisor(rank, config))
    return int(alpha) if alpha.is_integer() else alpha


def _ranked(config: Mapping[str, Any], sites: Mapping[str, Site], alphas: Mapping[str, float]) -> dict[str, Any]:
    """The configuration with these ranks and alphas: the commonest of each, and a pattern for the others."""
    ranks = {name: site.rank for name, site in sites.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    changed = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {anchored(name): own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {anchored(name): own for name, own in alphas.items() if own != alpha},
    }
    if config.get("init_lora_weights") == "orthogonal":  # which PEFT has for even ranks only
        changed["init_lora_weights"] = True
    return {**config, **changed}


Units = tuple[LowRank, Sequence[int] | None]
"""ΔW with its rank-one units in the order of their worth, and which of the module's own they are (None: new ones)."""


def svd(update: LowRank) -> Units:
    """The singular triplets, so that the first k of them are the best approximation of rank k."""
    if not update.norm():
        return update, range(update.rank)
    return update.truncate(update.rank)[0], None


def units(update: LowRank) -> Units:
    """The module's own units by ‖b_i‖‖a_i‖, which is the norm of each; of two that tie, the first comes first."""
    size = update.A.double().norm(dim=1) * update.B.double().norm(dim=0)
    order = size.argsort(descending=True, stable=True)
    return LowRank(update.A[order], update.B[:, order], update.shape), order.tolist()


RANKS: dict[str, Callable[[LowRank], Units]] = {"svd": svd, "units": units}
"""How ranks are ordered: function (update) → `Units`."""


def prune_rank(adapter: Adapter, *, rank: int | None = None, energy: float | None = None, by: str = "svd") -> Pruned:
    """The adapter at a lower rank: the first units of each module in the order that `by` (see RANKS) gives.

    Either `rank` units of each, or as few as keep the share `energy` of its ‖ΔW‖² (1 − ‖lost‖²/‖ΔW‖²). A module
    whose own rank is no larger stays bit for bit; with `energy`, modules whose ΔW is 0 are removed. Scales stay.
    New factors (svd) are rounded to the dtype of the old. Plain LoRA only: TunerError for anything else.
    """
    if by not in RANKS:
        raise unknown("criterion", by, RANKS)
    if (rank is None) == (energy is None):
        raise OptionError(f"{'neither' if rank is None else 'both'} of rank and energy given; exactly one is needed")
    if rank is not None and rank < 1:
        raise OptionError(f"a rank of {rank} was asked for; it is at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise OptionError(f"energy is {energy}; a share above 0 and up to 1 is needed")
    _require_ranks(adapter)
    tensors, kept = dict(adapter.tensors), {}
    for name, update in adapter.updates.items():
        if rank is not None and rank >= update.rank:
            continue
        ordered, own = RANKS[by](update)
        count = min(rank or update.rank, ordered.rank) if energy is None else _enough(ordered, energy)
        if count >= update.rank:
            continue
        kept[name] = list(range(count) if own is None else own[:count])
        if own is None:
            tensors |= _written(ordered, adapter, adapter.sites[name])
    if kept and all(name in kept and not kept[name] for name in adapter.sites):
        raise AdapterError(f"{adapter.label}: nothing would be left: ΔW is 0 in all {len(adapter.sites)} modules")
    pruned = keep_ranks(replace(adapter, tensors=tensors), kept)
    options = {"rank": rank} if energy is None else {"energy": energy}
    return _measured(adapter, pruned, {**options, "by": by})


def _enough(ordered: LowRank, energy: float) -> int:
    """How few of the leading units keep this share of ‖ΔW‖²; 0 for ΔW = 0."""
    gram = (ordered.A.double() @ ordered.A.double().T) * (ordered.B.double().T @ ordered.B.double())
    # ‖units k and later‖² is the sum over the lower right corner of their inner products
    lost = gram.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    total = ordered.norm() ** 2
    if not total:
        return 0
    # the last digits that energy = 1 asks for are rounding
    allowed = (1 - energy) * total + 4 * torch.finfo(torch.float64).eps * float(gram.diagonal().sum())
    return next(k for k, value in enumerate([*lost.tolist()[1:], 0.0], 1) if value <= allowed)


def _written(update: LowRank, adapter: Adapter, site: Site) -> dict[str, Tensor]:
    """The site's tensors with the factors of `update`, at the site's scale and in its dtypes and layout."""
    factors = stored(update * (1 / (site.scale or 1.0)), site.kind, bool(adapter.config.get("fan_in_fan_out")))
    keys = [site.keys[part] for part in site.pair]
    return {key: new.to(adapter.tensors[key].dtype) for key, new in zip(keys, factors, strict=True)}


# single entries


def prune_weights(
    adapter: Adapter,
    *,
    sparsity: float,
    by: str = "magnitude",
    per_matrix: bool = False,
    seed: int = 0,
    rank: int | None = None,
) -> Pruned:
    """The adapter with the share `sparsity` of its entries set to zero: those of the lowest score (see WEIGHTS).

    Exactly round(sparsity · count) are chosen, over all tensors together or `per_matrix`; of entries that tie, the
    first ones. magnitude and random choose among the tuner's own tensors (of LoRA's, A and B), whose dtype stays;
    plain LoRA then loses the units and modules that came out as zero, any other tuner keeps its shapes.
    delta-magnitude chooses among the entries of ΔW (plain LoRA only) and factors what is left at its full numerical
    rank, or at `rank`. Raises AdapterError where nothing would be left.
    """
    if by not in WEIGHTS:
        raise unknown("criterion", by, WEIGHTS)
    if not 0 <= sparsity <= 1:
        raise OptionError(f"sparsity is {sparsity}; a share from 0 to 1 is needed")
    place, score = WEIGHTS[by]
    if rank is not None and place is not _in_deltas:
        names = ", ".join(name for name, (where, _) in WEIGHTS.items() if where is _in_deltas)
        raise OptionError(f"{by} keeps the factors, so a rank of {rank} cannot be had; it is an option of: {names}")
    if rank is not None and rank < 1:
        raise OptionError(f"a rank of {rank} was asked for; it is at least 1")
    options = {"sparsity": sparsity, "by": by, "per_matrix": per_matrix, "seed": seed}
    pruned = place(adapter, score, sparsity, per_matrix, seed, rank)
    return replace(pruned, adapter=_recorded(adapter, pruned.adapter, options | ({"rank": rank} if rank else {})))


Score = Callable[[Tensor, torch.Generator], Tensor]
"""Function (tensor, generator) → a score ≥ 0 for every entry; the lowest ones are pruned."""


def magnitude(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """|entry|."""
    return tensor.abs()


def random(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform noise: each choice of entries is as likely."""
    return torch.rand(tensor.shape, generator=generator, dtype=torch.float64)


class _Place(Protocol):
    def __call__(
        self, adapter: Adapter, score: Score, sparsity: float, per_matrix: bool, seed: int, rank: int | None
    ) -> Pruned: ...


def _in_tensors(
    adapter: Adapter, score: Score, sparsity: float, per_matrix: bool, seed: int, rank: int | None
) -> Pruned:
    keys = _prunable(adapter)
    wide = torch.float64 if any(adapter.tensors[key].dtype == torch.float64 for key in keys) else torch.float32

    def parts() -> Iterator[Tensor]:
        return (adapter.tensors[key].to(wide) for key in keys)

    tensors, zeros, total = dict(adapter.tensors), 0, 0
    for key, mask in zip(keys, _masks(parts, score, sparsity, per_matrix, seed), strict=True):
        tensors[key] = adapter.tensors[key].masked_fill(mask, 0)
        zeros += int((tensors[key] == 0).sum())
        total += mask.numel()
    _check_left(adapter, zeros < total or not sparsity, sparsity)
    changed = replace(adapter, tensors=tensors, source=f"pruned {adapter.label}")
    if sparsity and adapter.why_not_additive is None:
        alive = {name: _alive(changed, site) for name, site in adapter.sites.items()}
        _check_left(adapter, any(alive.values()), sparsity)
        changed = replace(keep_ranks(changed, alive), source=changed.source)
    return replace(_measured(adapter, changed), sparsity=zeros / total if total else 0.0)


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
    adapter: Adapter, score: Score, sparsity: float, per_matrix: bool, seed: int, rank: int | None
) -> Pruned:
    adapter.require_additive()
    wide = max((update.A.dtype for update in adapter.updates.values()), key=lambda dtype: dtype.itemsize)

    def parts() -> Iterator[Tensor]:
        return (update.delta().to(wide) for update in adapter.updates.values())

    updates, lost, whole = {}, {}, {}
    zeros, total = 0, 0
    masks = _masks(parts, score, sparsity, per_matrix, seed)
    for (name, update), mask in zip(adapter.updates.items(), masks, strict=True):
        dense = update.delta()
        left = dense.masked_fill(mask, 0)
        zeros, total = zeros + int((left == 0).sum()), total + left.numel()
        whole[name] = float(dense.double().square().sum())
        kept = update if torch.equal(left, dense) and (left.any() or not sparsity) else _factored(left)
        if rank is not None and kept is not None and kept.rank > rank:
            kept = kept.truncate(rank)[0]
        lost[name] = float((dense - (0 if kept is None else kept.delta())).double().square().sum())
        if kept is not None:
            updates[name] = kept
    _check_left(adapter, zeros < total or not sparsity, sparsity)
    pruned = _measured(adapter, adapter.with_updates(updates, source=f"pruned {adapter.label}"), lost=(lost, whole))
    return replace(pruned, sparsity=zeros / total)


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


WEIGHTS: dict[str, tuple[_Place, Score]] = {
    "magnitude": (_in_tensors, magnitude),
    "random": (_in_tensors, random),
    "delta-magnitude": (_in_deltas, magnitude),
}
"""How entries are chosen: among those of the tensors or of ΔW, and the score by which they go."""


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


# what it cost


def _measured(
    before: Adapter,
    after: Adapter,
    options: Mapping[str, Any] | None = None,
    *,
    lost: tuple[Mapping[str, float], Mapping[str, float]] | None = None,
) -> Pruned:
    """`after` with its record (for given options) and its cost; `lost` are ‖lost‖² and ‖ΔW‖² by module, if known."""
    if lost is None and before.why_not_additive is None:
        whole = {name: update.norm() ** 2 for name, update in before.updates.items()}
        lost = {name: _lost(name, before, after) for name in whole}, whole
    gone, all_of_it = lost or ({}, {})
    error = None if lost is None else _ratio(math.fsum(gone.values()), math.fsum(all_of_it.values()))
    ranks = [[site.rank for site in adapter.sites.values()] for adapter in (after, before)]
    has_ranks = all(rank is not None for rank in ranks[1])
    return Pruned(
        adapter=after if options is None else _recorded(before, after, options),
        error=error,
        errors={name: _ratio(gone[name], all_of_it[name]) for name in gone},
        sparsity=None,
        modules=(len(after.sites), len(before.sites)),
        ranks=(sum(r or 0 for r in ranks[0]), sum(r or 0 for r in ranks[1])) if has_ranks else None,
        bytes=(_bytes(before), _bytes(after)),
    )


def _lost(name: str, before: Adapter, after: Adapter) -> float:
    """‖ΔW_before − ΔW_after‖² of one module."""
    if name not in after.sites:
        return before.updates[name].norm() ** 2
    sites = before.sites[name], after.sites[name]
    if sites[0].scale == sites[1].scale and all(
        before.tensors[sites[0].keys[part]] is after.tensors[sites[1].keys[part]] for part in sites[0].pair
    ):
        return 0.0
    return (before.updates[name] - after.updates[name]).norm() ** 2


def _ratio(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole else 0.0


def _bytes(adapter: Adapter) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in adapter.tensors.values())


def _recorded(before: Adapter, after: Adapter, options: Mapping[str, Any]) -> Adapter:
    """`after` with one more entry in its record's list of prunings."""
    earlier = before.record.get("pruned") or []
    entries = list(earlier) if isinstance(earlier, list | tuple) else [earlier]
    record = {**before.record, "pruned": [*entries, {**options, "from": before.label}]}
    return replace(after, record=record, source=f"pruned {before.label}")


def needs_delta(criterion: str) -> bool:
    """Whether a criterion of WEIGHTS looks at ΔW, which only plain LoRA has."""
    return WEIGHTS[criterion][0] is _in_deltas
