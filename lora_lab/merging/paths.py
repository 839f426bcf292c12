"""Adapters mixed by weights: in the factors, in ΔW, at matched norm, or aligned first (see connect.py)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from lora_lab.adapters.adapter import Adapter, same_modules
from lora_lab.adapters.formats.keys import PREFIX
from lora_lab.adapters.lowrank import LowRank, combine, combine_factors
from lora_lab.adapters.renames import require_shared_modules
from lora_lab.adapters.whole import with_rows_of_the_first
from lora_lab.errors import MismatchError, OptionError, some


class Mixer:
    """Points in the span of some adapters: `mix(weights, space)` is a new adapter, the inputs stay as they are."""

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

    def check(self, space: str) -> None:
        """Raise what `mix` in this space would raise, before anything is computed."""
        if space not in SPACES:
            raise OptionError(f"unknown space {space!r}; there are: {', '.join(SPACES)}")
        if space != "factors" and not self.additive:
            self.adapters[0].require_additive()
        self._check_others()
        if space != "delta":
            self._check_factors()

    def mix(self, weights: Sequence[float], space: str) -> Adapter:
        """The adapter at these weights; one that has all the weight is returned itself."""
        if weights.count(1.0) == 1 and weights.count(0.0) == len(weights) - 1:
            return self.adapters[weights.index(1.0)]
        if not self.additive:
            return self._mix_tensors(weights)
        used = [i for i, weight in enumerate(weights) if weight]
        chosen = [weights[i] for i in used]
        source, given = SPACES[space], self._updates(space, used)
        updates = {name: source([each[name] for each in given], chosen) for name in self.adapters[0].sites}
        mixed = self.adapters[0].with_updates(updates, source=f"{space} {self._label(weights)}")
        return replace(mixed, tensors={**mixed.tensors, **self._mix_others(weights)})

    def norm(self, weights: Sequence[float], space: str) -> float | None:
        """‖ΔW‖_F over all modules at these weights, from rank × rank cores; None where there is no ΔW."""
        if not self.additive:
            return None
        w = torch.tensor(weights, dtype=torch.float64)
        if space == "delta" or (torch.count_nonzero(w) == 1 and 1.0 in weights):
            squares = torch.einsum("i,j,mij->m", w, w, self._inner)
        else:
            used = [i for i, weight in enumerate(weights) if weight]
            A, B = self._grams(space, used)
            size = _size(A, w[used]) * _size(B, w[used])
            A, B = (torch.einsum("i,j,mijrs->mrs", w[used], w[used], gram) for gram in (A, B))
            squares = torch.einsum("mrs,mrs->m", A, B)
            if space == "matched":
                targets = (self._inner.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt() @ w).square()
                squares = torch.where(squares > (_CANCELLED * size).square(), targets, 0.0)
        return math.sqrt(max(0.0, float(squares.sum())))

    def _updates(self, space: str, used: Sequence[int]) -> list[dict[str, LowRank]]:
        """The updates of these adapters; aligned, all are rotated onto the first of them."""
        if space != "aligned":
            return [self.adapters[i].updates for i in used]
        return [self._aligned(used[0], i) for i in used]

    def _aligned(self, first: int, index: int) -> dict[str, LowRank]:
        """An adapter's balanced factors, rotated onto those of another."""
        if (first, index) not in self._rotated:
            if index == first:
                found = {name: update.balanced() for name, update in self.adapters[index].updates.items()}
            else:
                own, onto = self._aligned(index, index), self._aligned(first, first)
                found = {name: update.rotated_to(onto[name]) for name, update in own.items()}
            self._rotated[first, index] = found
        return self._rotated[first, index]

    @cached_property
    def _rotated(self) -> dict[tuple[int, int], dict[str, LowRank]]:
        return {}

    @cached_property
    def _inner(self) -> Tensor:
        """⟨ΔW_i, ΔW_j⟩ by module, [modules, adapters, adapters], float64."""
        updates = [adapter.updates for adapter in self.adapters]
        values = [[[a[name].inner(b[name]) for b in updates] for a in updates] for name in self.adapters[0].sites]
        return torch.tensor(values, dtype=torch.float64)

    @cached_property
    def _gram_cache(self) -> dict[tuple[str, tuple[int, ...]], tuple[Tensor, Tensor]]:
        return {}

    def _grams(self, space: str, used: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A_i A_jᵀ and B_iᵀ B_j by module, [modules, used, used, rank, rank], zero-padded to one rank."""
        key = (space, tuple(used))
        if key not in self._gram_cache:
            updates = self._updates(space, used)
            rank = max(u.rank for u in updates[0].values())
            shape = (len(self.adapters[0].sites), len(updates), len(updates), rank, rank)
            A, B = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
            for m, name in enumerate(self.adapters[0].sites):
                for i, j in itertools.product(range(len(updates)), repeat=2):
                    a, b = updates[i][name], updates[j][name]
                    A[m, i, j, : a.rank, : b.rank] = a.A.double() @ b.A.double().T
                    B[m, i, j, : a.rank, : b.rank] = a.B.double().T @ b.B.double()
            self._gram_cache[key] = A, B
        return self._gram_cache[key]

    def _check_others(self) -> None:
        """Heads and other whole tensors are averaged in every space, so all adapters must have the same."""
        first = {key: self.adapters[0].tensors[key].shape for key in self.adapters[0].others}
        for other in self.adapters[1:]:
            theirs = {key: other.tensors[key].shape for key in other.others}
            odd = sorted(key for key in first.keys() | theirs.keys() if first.get(key) != theirs.get(key))
            if odd:
                names = some(key.removeprefix(PREFIX) for key in odd)
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
                        + ("; ΔW can be: --space delta" if self.additive else "")
                    )

    def _mix_tensors(self, weights: Sequence[float]) -> Adapter:
        """Every tensor of a tuner that has no ΔW algebra, averaged: the factor curve of any tuner."""
        scales = [{name: site.scale for name, site in a.sites.items()} for a in self.adapters]
        if any(each != scales[0] for each in scales):
            raise MismatchError("these adapters have different scales, and their tuner allows no folding of them")
        tensors = {key: self._mix_key(key, weights) for key in self.adapters[0].tensors}
        return replace(self.adapters[0], tensors=tensors, source=f"factors {self._label(weights)}")

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


def _size(grams: Tensor, weights: Tensor) -> Tensor:
    """Σ |wᵢ| ‖Fᵢ‖_F by module, of the factors F whose inner products these are."""
    norms = torch.einsum("miirr->mi", grams).clamp(min=0).sqrt()
    return norms @ weights.abs()


_CANCELLED = 1e-6
"""Norm of a mixed ΔW, relative to that of its factors before they were added, at which it is rounding."""


SPACES: dict[str, Callable[[Sequence[LowRank], Sequence[float]], LowRank]] = {
    "factors": combine_factors,
    "matched": matched,
    "delta": combine,
    "aligned": combine_factors,
}
"""How updates of one module are mixed: function (updates, weights) → update."""
