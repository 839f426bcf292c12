"""Adapters of lower rank: rank-one units cut from the factors, or new ones by the SVD of ΔW."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_lab.adapters.adapter import Adapter, stored
from lora_lab.adapters.formats.keys import anchored
from lora_lab.adapters.formats.peft.peft_config import pattern_values
from lora_lab.adapters.formats.sites import Site
from lora_lab.adapters.lowrank import LowRank
from lora_lab.brief import Brief
from lora_lab.errors import AdapterError, OptionError, TunerError, shorten
from lora_lab.options import check_options, checked
from lora_lab.pruning.cost import Pruned, measured
from lora_lab.pruning.modules import keep_modules
from lora_lab.registry import Registry
from lora_lab.side_by_side import in_order, one_core_each, usual_jobs


def keep_ranks(adapter: Adapter, kept: Mapping[str, Sequence[int]]) -> Adapter:
    """The adapter with these rank-one units (row i of A and column i of B) of each module, sliced from the tensors.

    Modules that `kept` does not name stay whole, those without a unit are removed. The dtype and each module's
    scale α/r (α/√r for rsLoRA) stay, so α follows the rank. Plain LoRA only: TunerError for anything else.
    """
    require_ranks(adapter)
    absent = sorted(set(kept) - set(adapter.sites))
    if absent:
        raise OptionError(f"{adapter.label} has no module {shorten(absent)}; there are: {shorten(adapter.sites)}")
    for name, units in kept.items():
        _check_units(name, units, adapter.sites[name])
    left = keep_modules(adapter, [name for name in adapter.sites if len(kept.get(name, [0]))])
    tensors, sites, alphas = dict(left.tensors), dict(left.sites), {}
    for name, site in left.sites.items():
        units = sorted(kept.get(name, range(site.rank or 0)))
        alphas[name] = alpha_of(site, len(units), left.config)
        if len(units) == site.rank:
            continue
        index = torch.tensor(units)
        for key, axis in zip((site.keys[part] for part in site.pair), (0, 1), strict=True):
            if left.tensors[key].shape[axis] > len(units):  # else it has these units alone
                tensors[key] = left.tensors[key].index_select(axis, index)
        scale = alphas[name] / divisor(len(units), left.config)
        sites[name] = replace(site, rank=len(units), scale=scale)
    if all(sites[name] is site for name, site in left.sites.items()):
        return left
    return replace(left, tensors=tensors, sites=sites, config=ranked(left.config, sites, alphas))


def require_ranks(adapter: Adapter) -> None:
    """TunerError for a tuner without ranks that could be removed."""
    reason = adapter.why_not_additive
    if reason:
        raise TunerError(f"{adapter.label}: this {adapter.tuner} adapter has no ranks to be removed: {reason}")


def _check_units(name: str, units: Sequence[int], site: Site) -> None:
    rank = site.rank or 0
    wrong = [unit for unit in units if not 0 <= unit < rank]
    if wrong:
        raise OptionError(f"{name} has no unit {shorten(wrong)}; its {rank} units are 0 to {rank - 1}")
    if len(set(units)) < len(units):
        raise OptionError(f"units of {name} are named twice: {shorten(u for u, n in Counter(units).items() if n > 1)}")


def divisor(rank: int, config: Mapping[str, Any]) -> float:
    """By what lora_alpha is divided to give the scale: r, or √r for rsLoRA."""
    return math.sqrt(rank) if config.get("use_rslora") else rank


def alpha_of(site: Site, rank: int, config: Mapping[str, Any]) -> float:
    """The lora_alpha that gives this site at this rank the scale that it has now, to the last bit if any number does.

    That is the float nearest to scale · divisor: those that round back to the scale lie evenly around the product.
    """
    if rank == site.rank:
        alpha: float = pattern_values(config.get("alpha_pattern") or {}, [site.name], config.get("lora_alpha"))[
            site.name
        ]
        return alpha
    alpha = float((site.scale or 0.0) * divisor(rank, config))
    return int(alpha) if alpha.is_integer() else alpha


def ranked(config: Mapping[str, Any], sites: Mapping[str, Site], alphas: Mapping[str, float]) -> dict[str, Any]:
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


def svd(update: LowRank, generator: np.random.Generator) -> Units:
    """The singular triplets, so that the first k of them are the best approximation of rank k."""
    if update.vanishes(0.0):
        return update, range(update.rank)
    ordered, _, S = update.cut(update.rank)
    ordered.__dict__["products"] = S[: update.rank].square().diag()  # the triplets are orthogonal
    return ordered, None


def units(update: LowRank, generator: np.random.Generator) -> Units:
    """The module's own units by ‖b_i‖‖a_i‖, which is the norm of each; of two that tie, the first comes first."""
    size = update.A.double().norm(dim=1) * update.B.double().norm(dim=0)
    order = size.argsort(descending=True, stable=True)
    return LowRank(update.A[order], update.B[:, order], update.shape), order.tolist()


def random(update: LowRank, generator: np.random.Generator) -> Units:
    """The module's own units in an order drawn at random."""
    numbers = generator.permutation(update.rank).tolist()
    order = torch.tensor(numbers)
    return LowRank(update.A[order], update.B[:, order], update.shape), numbers


@dataclass(frozen=True)
class RankOrder:
    """An order of rank-one units by their worth, in which the last ones go first."""

    order: Callable[[LowRank, np.random.Generator], Units]
    random: bool = False
    """Whether the seed decides, so that a mean over draws is wanted."""


RANK_ORDERS = Registry(
    "order of ranks",
    "lora_lab.rank_orders",
    RankOrder,
    {"svd": RankOrder(svd), "units": RankOrder(units), "random": RankOrder(random, random=True)},
)
"""How ranks are ordered, by name."""


@dataclass(frozen=True)
class _Share:
    """A way to say how few of a module's leading units will do."""

    count: Callable[[LowRank, float], int]
    legal: Callable[[float], bool]
    needed: str


@dataclass(frozen=True)
class RankCut:
    """How far ranks are cut; OptionError unless it is a rank, one of the shares, or both."""

    rank: int | None = None
    """Units of each module that are kept, with a share the most of them."""
    energy: float | None = None
    """The share of ‖ΔW‖² that is kept, 1 − ‖lost‖²/‖ΔW‖²."""
    cumulative: float | None = None
    """The share of the sum of the units' norms that is kept."""
    ratio: float | None = None
    """By what a module's largest norm is divided to give the least that is kept."""

    def __post_init__(self) -> None:
        check_options(self)
        if len(self.shares) > 1 or not (self.shares or self.rank is not None):
            told = f"both of {' and '.join(self.shares)}" if self.shares else f"none of rank, {', '.join(_SHARES)}"
            raise OptionError(f"{told} given; a rank, one of {', '.join(_SHARES)}, or both of the two is needed")
        if self.rank is not None and self.rank < 1:
            raise OptionError(f"a rank of {self.rank} was asked for; it is at least 1")
        for name, value in self.shares.items():
            if not _SHARES[name].legal(value):
                raise OptionError(f"{name} is {value}; {_SHARES[name].needed} is needed")

    @property
    def shares(self) -> dict[str, float]:
        """What is given but for the rank."""
        return {name: getattr(self, name) for name in _SHARES if getattr(self, name) is not None}

    def count(self, ordered: LowRank) -> int:
        """How many of a module's units, in their order, are kept."""
        counts = [_SHARES[share].count(ordered, value) for share, value in self.shares.items()]
        return min([ordered.rank, *counts, *([self.rank] if self.rank else [])])


@checked
def prune_rank(
    adapter: Adapter,
    *,
    by: str = "svd",
    seed: int = 0,
    jobs: int | None = None,
    place: torch.device | None = None,
    **cut: Any,
) -> Pruned:
    """The adapter at a lower rank: the first units of each module in the order that `by` (see RANK_ORDERS) gives.

    `cut` are the fields of RankCut: either `rank` units of each, or, with `rank` as the most of them, as few as keep
    the share `energy` of its ‖ΔW‖², or the share `cumulative` of the sum of its units' norms, or all whose norm is
    above the largest divided by `ratio`. Of the SVD's units the norms are the singular values σ: kohya's sv_fro F is
    the energy F², its sv_cumulative and sv_ratio are these. A module whose own rank is no larger stays bit for bit;
    with a share, modules whose ΔW is 0 are removed. Scales stay. New factors (svd) are rounded to the dtype of the old.
    LoHa and LoKr become a LoRA; TunerError where ΔW is not known without the base model. `jobs` modules are cut at a
    time (by default up to four, fewer on fewer cores), with the same numbers for any of them; each is moved to `place`
    for it.
    """
    how = RankCut(**cut)
    if how.ratio is not None and RANK_ORDERS[by].random:
        raise OptionError(f"units in an order drawn at random ({by}) are not cut by a ratio of their norms")
    before = adapter
    if before.why_no_delta is None:
        adapter = before.as_lora
    require_ranks(adapter)
    tensors, kept = dict(adapter.tensors), {}
    generator = np.random.default_rng(seed)
    at_a_time = 1 if RANK_ORDERS[by].random else jobs or usual_jobs()  # draws come one after the other
    with one_core_each():
        calls = (
            partial(_cut, adapter, name, how, by, generator, place or torch.device("cpu"))
            for name in sorted(adapter.sites)
            if how.shares or how.rank is None or how.rank < (adapter.sites[name].rank or 0)
        )
        for each in in_order(calls, at_a_time):
            if each is not None:
                kept[each.module] = each.units
                tensors |= each.tensors
    if kept and all(name in kept and not kept[name] for name in adapter.sites):
        raise AdapterError(f"{adapter.label}: nothing would be left: ΔW is 0 in all {len(adapter.sites)} modules")
    pruned = keep_ranks(replace(adapter, tensors=tensors), kept)
    options: dict[str, Any] = {"rank": how.rank} if how.rank is not None else {}
    options |= {**how.shares, "by": by} | ({"seed": seed} if RANK_ORDERS[by].random else {})
    with one_core_each():
        return measured(before, pruned, options, jobs=jobs or usual_jobs(), place=place)


@dataclass(frozen=True, repr=False)
class _Cut(Brief):
    """The units that a module keeps, and its new tensors where they are new ones."""

    module: str
    units: Sequence[int]
    tensors: Mapping[str, Tensor]


def _cut(
    adapter: Adapter, name: str, how: RankCut, by: str, generator: np.random.Generator, place: torch.device
) -> _Cut | None:
    """What a module keeps; None where that is all of it."""
    update = adapter.updates[name].to(place)
    ordered, numbers = RANK_ORDERS[by].order(update, generator)
    count = how.count(ordered)
    if count >= update.rank:
        return None
    tensors = {}
    if numbers is None:
        left = LowRank(ordered.A[:count], ordered.B[:, :count], ordered.shape).to(torch.device("cpu"))
        tensors = written(left, adapter, adapter.sites[name])
    return _Cut(name, list(range(count) if numbers is None else numbers[:count]), tensors)


def _enough(ordered: LowRank, energy: float) -> int:
    """How few of the leading units keep this share of ‖ΔW‖²; 0 for ΔW = 0."""
    gram = ordered.products
    # ‖units k and later‖² is the sum over the lower right corner of their inner products
    lost = gram.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    total = ordered.norm() ** 2
    if not total:
        return 0
    # the last digits that energy = 1 asks for are rounding
    allowed = (1 - energy) * total + 4 * torch.finfo(torch.float64).eps * float(gram.diagonal().sum())
    return next(k for k, value in enumerate([*lost.tolist()[1:], 0.0], 1) if value <= allowed)


def _norms(ordered: LowRank) -> list[float]:
    """‖b_i‖‖a_i‖ of each unit: its singular value, where the units are the SVD's."""
    size = ordered.A.double().norm(dim=1) * ordered.B.double().norm(dim=0)
    return [float(value) for value in size]


def _enough_norm(ordered: LowRank, share: float) -> int:
    """The least k with σ_1 + … + σ_k ≥ share · Σ σ_i, of the norms of the units in their order; 0 for ΔW = 0."""
    sums = np.cumsum(_norms(ordered))
    if not len(sums) or not sums[-1]:
        return 0
    allowed = share * sums[-1] - 4 * float(np.finfo(np.float64).eps) * sums[-1]  # the last digits are rounding
    return int(np.searchsorted(sums, allowed)) + 1


def _above(ordered: LowRank, ratio: float) -> int:
    """How many units, at least one, have σ_i > σ_1 / ratio, of their norms; 0 for ΔW = 0."""
    norms = _norms(ordered)
    largest = max(norms, default=0.0)
    return max(1, sum(norm > largest / ratio for norm in norms)) if largest else 0


_A_SHARE = "a share above 0 and up to 1"
_SHARES = {
    "energy": _Share(_enough, lambda value: 0 < value <= 1, _A_SHARE),
    "cumulative": _Share(_enough_norm, lambda value: 0 < value <= 1, _A_SHARE),
    "ratio": _Share(_above, lambda value: 1 <= value < math.inf, "a number of at least 1"),
}


def written(update: LowRank, adapter: Adapter, site: Site) -> dict[str, Tensor]:
    """The site's tensors with the factors of `update`, at the site's scale and in its dtypes and layout."""
    factors = stored(update * (1 / (site.scale or 1.0)), site.kind, bool(adapter.config.get("fan_in_fan_out")))
    keys = [site.keys[part] for part in site.pair]
    return {key: new.to(adapter.tensors[key].dtype) for key, new in zip(keys, factors, strict=True)}
