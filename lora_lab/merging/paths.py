"""Paths between adapters: mixed by weights in the factors, in ΔW, at matched norm, or aligned first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.formats.keys import PREFIX
from lora_lab.adapters.lowrank import LowRank, combine, combine_factors
from lora_lab.adapters.models.bases import same_modules
from lora_lab.adapters.renames import require_shared_modules
from lora_lab.adapters.whole import with_rows_of_the_first
from lora_lab.errors import MismatchError, shorten
from lora_lab.geometry.aligning import aligned
from lora_lab.registry import Registry

Updates = Sequence[LowRank]
"""Of one module, one an adapter."""


class Products:
    """Inner products of some adapters' updates, by module, in float64; each kind computed when it is asked for."""

    def __init__(self, updates: Callable[[], Sequence[Mapping[str, LowRank]]]) -> None:
        self._updates = updates  # not held: what is mixed may be copies

    @cached_property
    def deltas(self) -> Tensor:
        """⟨ΔW_i, ΔW_j⟩, [modules, adapters, adapters]."""
        updates = self._updates()
        values = [[[a[name].inner(b[name]) for b in updates] for a in updates] for name in updates[0]]
        return torch.tensor(values, dtype=torch.float64)

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A_i A_jᵀ and B_iᵀ B_j, [modules, adapters, adapters, rank, rank], zero-padded to one rank."""
        updates = self._updates()
        names, count = list(updates[0]), len(updates)
        rank = max(u.rank for u in updates[0].values())
        A = torch.zeros(len(names), count, count, rank, rank, dtype=torch.float64)
        B = torch.zeros_like(A)
        for m, name in enumerate(names):
            for i, j in itertools.product(range(count), repeat=2):
                a, b = updates[i][name], updates[j][name]
                A[m, i, j, : a.rank, : b.rank] = a.A.double() @ b.A.double().T
                B[m, i, j, : a.rank, : b.rank] = a.B.double().T @ b.B.double()
        return A, B


@dataclass(frozen=True)
class Space:
    """How updates are mixed by weights, and all that is asked of the curve which that gives."""

    mix: Callable[[Updates, Sequence[float]], LowRank]
    """Updates of one module and their weights → the mixed update."""
    norms: Callable[[Products, Tensor], Tensor] | None = None
    """Products of the updates that are mixed and their weights → ‖ΔW‖² by module; None: the mix itself is measured."""
    prepare: Callable[[Updates], Updates] | None = None
    """What is mixed instead of the updates, all of one module together."""
    needs_delta: bool = True
    """Whether it is for adapters with a ΔW only, and not for the bare tensors of any tuner."""
    needs_factors: bool = True
    """Whether all adapters must have factors of one shape."""
    rescaled: str | None = None
    """The path that is the same but for the norms, which it keeps: their barriers tell shrinkage apart."""
    shrinks: bool = False
    """Whether lines bring that path along, as averaging alone makes ΔW shorter, whatever the adapters are."""
    mixtures: bool = True
    """Whether weighted mixtures are scored on it, besides the lines."""
    label: str = ""
    """What figures call it; its name by default."""
    place: int | None = None
    """Its place among the colours of all figures; None: one that is free, in each."""
    about: str = ""
    """What it mixes, as a formula: wᵢ is the weight of adapter i."""


class Paths:
    """Points in the span of some adapters: `mix(weights, space)` is a new adapter, the inputs stay as they are.

    A space is a name in SPACES.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        require_shared_modules(adapters)
        same_modules(adapters)
        reasons = [a.why_not_additive for a in adapters]
        if len(set(reasons)) > 1:
            odd = next(i for i, reason in enumerate(reasons) if reason != reasons[0])
            raise MismatchError(
                f"{adapters[0].source} and {adapters[odd].source} are of different tuners: "
                f"{reasons[0] or 'plain LoRA'}, against {reasons[odd] or 'plain LoRA'}"
            )
        if adapters[0].tuner != "LORA":
            _same_settings(adapters)
        self.adapters = list(adapters)
        self.additive = reasons[0] is None
        self._last: tuple[Any, list[dict[str, LowRank]]] | None = None
        self._known: dict[Any, Products] = {}

    def check(self, space: str) -> None:
        """Raise what `mix` in this space would raise, before anything is computed."""
        entry = SPACES[space]
        if entry.needs_delta and not self.additive:
            self.adapters[0].require_additive()
        self._check_others()
        if entry.needs_factors:
            self._check_factors()

    def mix(self, weights: Sequence[float], space: str) -> Adapter:
        """The adapter at these weights; one that has all the weight is returned itself."""
        if weights.count(1.0) == 1 and weights.count(0.0) == len(weights) - 1:
            return self.adapters[weights.index(1.0)]
        if not self.additive:
            return self._mix_tensors(weights)
        updates = self._mixed(weights, SPACES[space])
        mixed = self.adapters[0].with_updates(updates, source=f"{space} {self._label(weights)}")
        return replace(mixed, tensors={**mixed.tensors, **self._mix_others(weights)})

    def norm(self, weights: Sequence[float], space: str) -> float | None:
        """‖ΔW‖_F over all modules at these weights, from rank × rank cores; None where there is no ΔW."""
        if not self.additive:
            return None
        entry, used = SPACES[space], tuple(i for i, weight in enumerate(weights) if weight)
        w = torch.tensor([weights[i] for i in used], dtype=torch.float64)
        if len(used) == 1 and w[0] == 1:
            squares = self._products(used, None).deltas[:, 0, 0]
        elif entry.norms is None:
            squares = torch.tensor([update.norm() ** 2 for update in self._mixed(weights, entry).values()])
        else:
            squares = entry.norms(self._products(used, entry.prepare), w)
        return math.sqrt(max(0.0, float(squares.sum())))

    def gram(self) -> npt.NDArray[np.float64]:
        """⟨ΔW_i, ΔW_j⟩ over all modules, [adapters, adapters], from rank × rank cores."""
        gram: npt.NDArray[np.float64] = self._products(tuple(range(len(self.adapters))), None).deltas.sum(0).numpy()
        return gram

    def _mixed(self, weights: Sequence[float], entry: Space) -> dict[str, LowRank]:
        used = tuple(i for i, weight in enumerate(weights) if weight)
        updates = self._prepared(used, entry.prepare)
        return {name: entry.mix([u[name] for u in updates], [weights[i] for i in used]) for name in updates[0]}

    def _prepared(
        self, used: tuple[int, ...], prepare: Callable[[Updates], Updates] | None
    ) -> list[Mapping[str, LowRank]]:
        """What a space mixes of these adapters; only the last answer is kept, as a line's points come together."""
        updates: list[Mapping[str, LowRank]] = [self.adapters[i].updates for i in used]
        if prepare is None:
            return updates
        if self._last is None or self._last[0] != (used, prepare):
            by_module = {name: prepare([u[name] for u in updates]) for name in self.adapters[0].sites}
            self._last = (used, prepare), [{m: new[i] for m, new in by_module.items()} for i in range(len(used))]
        return list(self._last[1])

    def _products(self, used: tuple[int, ...], prepare: Callable[[Updates], Updates] | None) -> Products:
        if (used, prepare) not in self._known:
            self._known[used, prepare] = Products(lambda: self._prepared(used, prepare))
        return self._known[used, prepare]

    def _check_others(self) -> None:
        """Heads and other whole tensors are averaged in every space, so all adapters must have the same."""
        first = {key: self.adapters[0].tensors[key].shape for key in self.adapters[0].others}
        for other in self.adapters[1:]:
            theirs = {key: other.tensors[key].shape for key in other.others}
            odd = sorted(key for key in first.keys() | theirs.keys() if first.get(key) != theirs.get(key))
            if odd:
                names = shorten(key.removeprefix(PREFIX) for key in odd)
                raise MismatchError(f"{self.adapters[0].source} and {other.source} differ in whole tensors: {names}")
        for key in first:
            with_rows_of_the_first(self.adapters, key)

    def _check_factors(self) -> None:
        first = self.adapters[0]
        for other in self.adapters[1:]:
            for key, tensor in first.tensors.items():
                if key not in other.tensors or other.tensors[key].shape != tensor.shape:
                    shape = list(other.tensors[key].shape) if key in other.tensors else "missing"
                    raise MismatchError(
                        f"{first.source} and {other.source} have factors of different shapes, not to be averaged: "
                        f"{key.removeprefix(PREFIX)} is {list(tensor.shape)} and {shape}"
                        + ("; ΔW can be, which is the space delta" if self.additive else "")
                    )

    def _mix_tensors(self, weights: Sequence[float]) -> Adapter:
        """Every tensor of a tuner that has no ΔW algebra, averaged: the factor curve of any tuner."""
        scales = [{name: site.scale for name, site in a.sites.items()} for a in self.adapters]
        if any(scale != scales[0] for scale in scales):
            raise MismatchError("these adapters have different scales, and their tuner allows no folding of them")
        tensors = {key: self._mix_key(key, weights) for key in self.adapters[0].tensors}
        return replace(self.adapters[0], tensors=tensors, source=f"factors {self._label(weights)}", name="")

    def _mix_others(self, weights: Sequence[float]) -> dict[str, Tensor]:
        return {key: self._mix_key(key, weights) for key in self.adapters[0].others}

    def _mix_key(self, key: str, weights: Sequence[float]) -> Tensor:
        tensors = with_rows_of_the_first(self.adapters, key)
        if not tensors[0].is_floating_point():
            return tensors[0]
        wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
        total = torch.zeros_like(tensors[0], dtype=wide)
        for tensor, weight in zip(tensors, weights, strict=True):
            total += tensor.to(wide) * weight
        return total.to(tensors[0].dtype)

    def _label(self, weights: Sequence[float]) -> str:
        return " + ".join(f"{w:g}·{a.label}" for w, a in zip(weights, self.adapters, strict=True) if w)


def _same_settings(adapters: Sequence[Adapter]) -> None:
    """Tuners other than LoRA compute from settings that cannot be folded into their tensors: all must be equal."""
    first = adapters[0].config
    for other in adapters[1:]:
        for name in sorted((first.keys() | other.config.keys()) - _HARMLESS):
            if (first.get(name) or None) != (other.config.get(name) or None):
                raise MismatchError(
                    f"{adapters[0].source} and {other.source} cannot be mixed: {name} is {first.get(name)!r} and "
                    f"{other.config.get(name)!r}, which {adapters[0].tuner} computes with"
                )


# Settings that say where an adapter goes or how it was trained, not what it computes.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "init_weights",
        "layers_pattern",
        "layers_to_transform",
        "module_dropout",
        "modules_to_save",
        "peft_version",
        "rank_dropout",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)


def matched(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """The factor average, rescaled to the weighted mean of the norms; 0 where the factors cancel."""
    mixed = combine_factors(updates, weights)
    norm = math.sqrt(max(0.0, mixed.inner(mixed)))
    size = math.prod(
        sum(abs(weight) * float(factor.double().norm()) for factor, weight in zip(factors, weights, strict=True))
        for factors in ([u.A for u in updates], [u.B for u in updates])
    )
    target = sum(weight * math.sqrt(max(0.0, u.inner(u))) for u, weight in zip(updates, weights, strict=True))
    return mixed * (target / norm if norm > _CANCELLED * size else 0.0)


def matched_delta(updates: Updates, weights: Sequence[float]) -> LowRank:
    """Σ wᵢ ΔWᵢ, rescaled to the weighted mean of the norms; 0 where the updates cancel."""
    mixed, norms = combine(updates, weights), [update.norm() for update in updates]
    norm, size = mixed.norm(), sum(abs(weight) * each for each, weight in zip(norms, weights, strict=True))
    target = sum(weight * each for each, weight in zip(norms, weights, strict=True))
    return mixed * (target / norm if norm > _CANCELLED * size else 0.0)


def delta_norms(products: Products, weights: Tensor) -> Tensor:
    """‖Σ wᵢΔWᵢ‖² = Σᵢⱼ wᵢwⱼ ⟨ΔWᵢ, ΔWⱼ⟩ by module."""
    return torch.einsum("i,j,mij->m", weights, weights, products.deltas)


def factor_norms(products: Products, weights: Tensor) -> Tensor:
    """‖(Σ wᵢBᵢ)(Σ wᵢAᵢ)‖² by module: the inner product of Σᵢⱼ wᵢwⱼ AᵢAⱼᵀ and Σᵢⱼ wᵢwⱼ BᵢᵀBⱼ."""
    A, B = (torch.einsum("i,j,mijrs->mrs", weights, weights, gram) for gram in products.factors)
    return torch.einsum("mrs,mrs->m", A, B)


def matched_norms(products: Products, weights: Tensor) -> Tensor:
    """(Σ wᵢ‖ΔWᵢ‖)² by module, 0 where the factors cancel."""
    # Σ |wᵢ| ‖Fᵢ‖_F of the factors F whose inner products these are
    A, B = (torch.einsum("miirr->mi", gram).clamp(min=0).sqrt() @ weights.abs() for gram in products.factors)
    targets = (products.deltas.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt() @ weights).square()
    return torch.where(factor_norms(products, weights) > (_CANCELLED * A * B).square(), targets, 0.0)


def matched_delta_norms(products: Products, weights: Tensor) -> Tensor:
    """(Σ wᵢ‖ΔWᵢ‖)² by module, 0 where the updates cancel."""
    norms = products.deltas.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    cancelled = delta_norms(products, weights) <= (_CANCELLED * (norms @ weights.abs())).square()
    return torch.where(cancelled, 0.0, (norms @ weights).square())


_CANCELLED = 1e-6
"""Norm of a mixed ΔW, relative to that of its factors before they were added, at which it is rounding."""


SPACES = Registry(
    "space",
    "lora_lab.spaces",
    Space,
    {
        "factors": Space(
            combine_factors,
            factor_norms,
            needs_delta=False,
            rescaled="matched",
            shrinks=True,
            label="factors A, B averaged",
            place=1,
            about="ΔW = (Σ wᵢBᵢ)(Σ wᵢAᵢ)",
        ),
        "matched": Space(
            matched,
            matched_norms,
            mixtures=False,
            label="factors, ‖ΔW‖ matched",
            place=4,
            about="that of factors, rescaled in every module to ‖ΔW‖ = Σ wᵢ‖ΔWᵢ‖",
        ),
        "delta": Space(
            combine,
            delta_norms,
            needs_factors=False,
            rescaled="matched-delta",
            label="ΔW averaged",
            place=0,
            about="ΔW = Σ wᵢΔWᵢ, without error",
        ),
        "matched-delta": Space(
            matched_delta,
            matched_delta_norms,
            needs_factors=False,
            mixtures=False,
            label="ΔW averaged, ‖ΔW‖ matched",
            place=3,
            about="that of delta, rescaled in every module to ‖ΔW‖ = Σ wᵢ‖ΔWᵢ‖",
        ),
        "aligned": Space(
            combine_factors,
            factor_norms,
            aligned,
            mixtures=False,
            label="factors aligned first",
            place=2,
            about="that of factors, of factors that are balanced and rotated onto the first adapter's (Procrustes)",
        ),
    },
)
"""What can be averaged between adapters, by the name that is a space to users."""
