"""Intruders made smaller: the leading singular directions of W + ΔW that are like none of W's."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.lowrank import LowRank, combine
from lora_lab.errors import OptionError
from lora_lab.fusing.weights import Weights
from lora_lab.geometry.intruders import THRESHOLD, TOP
from lora_lab.options import checked
from lora_lab.pruning.cost import Pruned, measured
from lora_lab.pruning.ranks import alpha_of, divisor, ranked, written
from lora_lab.scoring.execution import Cost, Execution


@dataclass(frozen=True, repr=False)
class Lowered(Pruned):
    """An adapter with smaller intruders, and what that cost."""

    intruders: Mapping[str, int]
    """Module → how many it had, where it had any."""
    cut: float
    """‖exact − written‖ / ‖exact‖ of W' − W over all modules: what ranks, and the dtype of the file, took of it."""


@checked
def lower_intruders(
    adapter: Adapter,
    *,
    base: str | os.PathLike[str],
    factor: float = 0.75,
    top: int = TOP,
    threshold: float = THRESHOLD,
    exact: bool = False,
    on: Execution = Execution(),
) -> Lowered:
    """The adapter with its intruders in this base times `factor`: ΔW + (factor − 1) Σ σ' u' v'ᵀ of W + ΔW.

    Intruders are those among the `top` leading left singular vectors of W + ΔW whose cosine with each of W's is below
    `threshold` (Shuttleworth et al. 2024, arXiv:2410.21228). That takes r + #intruders ranks, which a module gets with
    `exact`; else it is cut back to its own r, in the best way. Modules without intruders stay bit for bit. LoHa and
    LoKr become a LoRA; TunerError where ΔW is not known without the base, MismatchError where the base does not fit.
    """
    if not (math.isfinite(factor) and factor >= 0):
        raise OptionError(
            f"the factor of intruders is {factor}; a number of at least 0 is needed, below 1 to lower them"
        )
    plain = adapter.as_lora
    weights, device = Weights(Path(base), [plain]), on.place()
    if on.confirm:
        on.confirm(Cost(len(weights.modules), 0, 0, weights.seconds(device)))
    wanted: dict[str, LowRank] = {}
    counts: dict[str, int] = {}
    for done, module in enumerate(weights.modules, 1):
        update = weights.updates(module)[0]
        part = weights.decomposed(module, device).intruding(update, top, threshold)
        if part.rank:
            counts[module] = part.rank
            whole = combine([LowRank(update.A.double(), update.B.double()), part], [1.0, factor - 1.0])
            wanted[module] = _as_stored(whole, plain, module)
        on.report(done, len(weights.modules))
    lowered = _with(plain, wanted, exact=exact)
    options = {"intruders": factor, "top": top, "threshold": threshold, "base": Path(base).name, "exact": exact}
    cost = measured(adapter, lowered, options)
    return Lowered(**vars(cost), intruders=counts, cut=_cut(plain, lowered, wanted))


def _as_stored(update: LowRank, adapter: Adapter, module: str) -> LowRank:
    """ΔW [out, in] in the layout of the adapter's own updates."""
    shape, site = adapter.updates[module].shape, adapter.sites[module]
    if site.kind == "linear" and adapter.config.get("fan_in_fan_out"):
        return LowRank(update.B.T.contiguous(), update.A.T.contiguous(), shape)
    return LowRank(update.A, update.B, shape)


def _with(adapter: Adapter, wanted: Mapping[str, LowRank], *, exact: bool) -> Adapter:
    """The adapter with these updates, of their own ranks or cut to those that there are; scales stay."""
    tensors, sites = dict(adapter.tensors), dict(adapter.sites)
    for name, update in wanted.items():
        site = sites[name]
        kept = update.truncate(update.rank if exact else site.rank or 1)[0]
        tensors |= written(kept, adapter, site)
        if exact:
            scale = alpha_of(site, kept.rank, adapter.config) / divisor(kept.rank, adapter.config)
            sites[name] = replace(site, rank=kept.rank, scale=scale)
    if not exact:
        return replace(adapter, tensors=tensors)
    alphas = {name: alpha_of(adapter.sites[name], site.rank or 0, adapter.config) for name, site in sites.items()}
    return replace(adapter, tensors=tensors, sites=sites, config=ranked(adapter.config, sites, alphas))


def _cut(before: Adapter, after: Adapter, wanted: Mapping[str, LowRank]) -> float:
    lost = math.hypot(*((update - _wide(after.updates[name])).norm() for name, update in wanted.items()))
    whole = math.hypot(*(wanted.get(name, update).norm() for name, update in before.updates.items()))
    return lost / whole if whole else 0.0


def _wide(update: LowRank) -> LowRank:
    return LowRank(update.A.double(), update.B.double(), update.shape)
