"""ΔW of LoHa and LoKr as one product of two matrices, exactly: B A of a higher rank, without the base model.

Both combine two products P Q, each of them of the weight's layout (a convolution's kernel flattened behind its inputs).
LoHa's is their Hadamard product (Hyeon-Woo et al. 2022, arXiv:2108.06098), LoKr's their Kronecker product (Yeh et al.
2024, arXiv:2309.14859).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_lab.adapters.cutting import factored
from lora_lab.adapters.formats.diffusion.diffusion_names import kernel_of
from lora_lab.adapters.formats.peft.peft_config import count, number, pattern_values, patterns_of, too_large, tuner_of
from lora_lab.adapters.formats.peft.peft_format import update, why_not_additive
from lora_lab.adapters.formats.sites import Site
from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import AdapterError, shorten
from lora_lab.files import in_memory

Pair = tuple[Tensor, Tensor]

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
"""The tensors of a module, as LyCORIS and PEFT call them; those with t are cores of convolutions."""


_PARTS = {"LOHA": LOHA, "LOKR": LOKR}


def why_no_delta(config: Mapping[str, Any], sites: Collection[Site]) -> str | None:
    """Why ΔW is not known from the adapter alone, or None where it is: of LoRA, LoHa and LoKr in their plain forms."""
    parts = _PARTS.get(tuner_of(config))
    if parts is None:
        return why_not_additive(config, sites)
    strange = sorted({part for site in sites for part in site.keys}.difference(parts))
    return f"{shorten(strange)} is no part of a plain {tuner_of(config)}" if strange else None


class Updates(Mapping[str, LowRank]):
    """Module → ΔW of a LoRA, a LoHa or a LoKr, where `why_no_delta` gives no reason against it.

    Each is made when it is asked for. A LoRA's, which is its factors in float32, is kept nowhere; products are.
    """

    def __init__(self, sites: Mapping[str, Site], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        self._sites, self._tensors, self._config = sites, tensors, config
        self._tuner = tuner_of(config)
        self._scales = scales_of(sites, config) if self._tuner in _PARTS else {}
        self._made: dict[str, LowRank] = {}

    def __getitem__(self, name: str) -> LowRank:
        site = self._sites[name]
        if self._tuner not in _PARTS:
            return update(site, self._tensors, self._config)
        if name not in self._made:
            parts = _tensors_of(site, self._tensors)
            self._made[name] = PRODUCTS[self._tuner](parts, self._scales[name], name, kernel_of(name))
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._sites

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


def scales_of(names: Collection[str], config: Mapping[str, Any]) -> dict[str, float]:
    """alpha / rank of each module of a LoHa or a LoKr; AdapterError where the configuration has no numbers."""
    ranks = pattern_values(patterns_of(config, "rank_pattern"), names, config.get("r", 8))
    alphas = pattern_values(patterns_of(config, "alpha_pattern"), names, config.get("alpha", 8))
    scales = {}
    for name in names:
        rank, alpha = count(ranks[name]), number(alphas[name])
        if rank is None or alpha is None:
            raise AdapterError(f"{name}: r is {ranks[name]!r} and alpha {alphas[name]!r}; numbers are needed")
        scales[name] = alpha / rank
        if excess := too_large(scales[name]):
            raise AdapterError(f"{name}: {excess}: alpha is {alpha:.4g}, the rank {rank}")
    return scales


def measures(
    site: Site, tensors: Mapping[str, Tensor], tuner: str, scale: float
) -> tuple[tuple[int, ...], float, float]:
    """Shape, Frobenius norm and effective rank of a LoHa's or a LoKr's ΔW.

    Of LoKr without ΔW itself: the singular values of W₁ ⊗ W₂ are the products of theirs, so both numbers are, too.
    """
    parts = _tensors_of(site, tensors)
    if tuner == "LOKR":
        one, other = (LowRank(Q, P) for P, Q in _pairs_of_lokr(parts, site.name))
        shape = _shape(len(one.B) * len(other.B), one.shape[1] * other.shape[1], _kernel_of_lokr(parts, site.name))
        return shape, abs(scale) * one.norm() * other.norm(), one.effective_rank() * other.effective_rank()
    whole = PRODUCTS[tuner](parts, scale, site.name, kernel_of(site.name))
    return whole.shape, whole.norm(), whole.effective_rank()


def _tensors_of(site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {part: in_memory(tensors[key]) for part, key in site.keys.items()}


def loha(parts: Mapping[str, Tensor], scale: float, name: str, kernel: tuple[int, ...] = ()) -> LowRank:
    """scale · (P₁ Q₁) ∘ (P₂ Q₂) of rank r₁ r₂: B has the products of P's columns, A those of Q's rows.

    (Σᵢ pᵢ qᵢᵀ) ∘ (Σⱼ p'ⱼ q'ⱼᵀ) = Σᵢⱼ (pᵢ ∘ p'ⱼ)(qᵢ ∘ q'ⱼ)ᵀ. Without a core the factors do not say the shape of the
    kernel, which then is `kernel`. Raises AdapterError, with the module's `name`, for parts that do not fit together.
    """
    (P1, Q1), (P2, Q2) = (_product(parts, f"hada_w{i}", f"hada_t{i}", name) for i in (1, 2))
    if P1.shape[0] != P2.shape[0] or Q1.shape[1] != Q2.shape[1]:
        raise AdapterError(f"{name}: its two products are {_size(P1, Q1)} and {_size(P2, Q2)}; LoHa's are of one size")
    core = parts.get("hada_t1")
    shape = _shape(len(P1), Q1.shape[1], tuple(core.shape[2:]) if core is not None else kernel)
    rank = _rank(P1.shape[1] * P2.shape[1], shape, name)
    if rank is None:
        return factored(scale * ((P1 @ Q1) * (P2 @ Q2)).reshape(shape))[0]
    B = (P1[:, :, None] * P2[:, None, :]).flatten(1)
    A = (Q1[:, None, :] * Q2[None, :, :]).flatten(0, 1)
    return LowRank(A, B * scale, shape)


def lokr(parts: Mapping[str, Tensor], scale: float, name: str, kernel: tuple[int, ...] = ()) -> LowRank:
    """scale · W₁ ⊗ W₂ of rank r₁ r₂, by (P₁ Q₁) ⊗ (P₂ Q₂) = (P₁ ⊗ P₂)(Q₁ ⊗ Q₂); see `loha`."""
    (P1, Q1), (P2, Q2) = _pairs_of_lokr(parts, name)
    kernel = _kernel_of_lokr(parts, name) or kernel
    shape = _shape(len(P1) * len(P2), Q1.shape[1] * Q2.shape[1], kernel)
    rank = _rank(P1.shape[1] * P2.shape[1], shape, name)
    if rank is None:
        return factored(scale * _kron(P1 @ Q1, P2 @ Q2).reshape(shape))[0]
    return LowRank(_kron(Q1, Q2), _kron(P1, P2) * scale, shape)


PRODUCTS = {"LOHA": loha, "LOKR": lokr}
"""PEFT's tuner → ΔW of a module from its tensors, scale, name and, where they do not say it, kernel."""


def _pairs_of_lokr(parts: Mapping[str, Tensor], name: str) -> tuple[Pair, Pair]:
    (P1, Q1), (P2, Q2) = _product(parts, "lokr_w1", None, name), _product(parts, "lokr_w2", "lokr_t2", name)
    dtype = torch.promote_types(P1.dtype, P2.dtype)
    return (P1.to(dtype), Q1.to(dtype)), (P2.to(dtype), Q2.to(dtype))


def _kernel_of_lokr(parts: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The kernel, by the core or the second matrix where that is whole; else by the module's name."""
    shaped = parts.get("lokr_t2", parts.get("lokr_w2", parts.get("lokr_w2_b")))
    said = () if shaped is None else tuple(shaped.shape[2:])
    return said or kernel_of(name)


def _shape(rows: int, columns: int, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Of a weight whose columns are inputs and kernel together, as far as the kernel fits."""
    size = math.prod(kernel)
    return (rows, columns // size, *kernel) if size and columns % size == 0 else (rows, columns)


def _rank(rank: int, shape: tuple[int, ...], name: str) -> int | None:
    """The rank, or None where it is above that of any matrix of this shape; AdapterError for what fills no memory."""
    rows, columns = shape[0], math.prod(shape[1:])
    if min(rank, rows, columns) * (rows + columns) > _MOST:
        raise AdapterError(f"{name}: a ΔW of {rows} × {columns} at rank {min(rank, rows, columns)} is too large")
    return None if rank > min(rows, columns) else rank


_MOST = 2**31
"""Numbers of both factors."""


def _product(parts: Mapping[str, Tensor], stem: str, core: str | None, name: str) -> Pair:
    """P [rows, r] and Q [r, columns] of one of the two products; a whole matrix is one of itself and an identity."""
    whole, a, b = (_of(parts, key) for key in (stem, f"{stem}_a", f"{stem}_b"))
    t = _of(parts, core) if core else None
    if whole is not None and whole.ndim >= 2:
        flat = whole.flatten(1)
        identity = torch.eye(min(flat.shape), dtype=flat.dtype, device=flat.device)
        return (identity, flat) if flat.shape[0] <= flat.shape[1] else (flat, identity)
    if a is None or b is None:
        raise AdapterError(f"{name}: {stem}{'_a and ' + stem + '_b are' if a is b else '_a or _b is'} missing")
    if t is not None and a.ndim == b.ndim == 2 and t.ndim > 2 and t.shape[:2] == (len(a), len(b)):
        return a.T, torch.einsum("ijk,jc->ick", t.flatten(2), b).flatten(1)  # Σⱼ t[i, j, k] b[j, c]
    if t is None and a.ndim == 2 and b.ndim >= 2 and a.shape[1] == len(b):
        return a, b.flatten(1)
    shapes = [list(part.shape) for part in (t, a, b) if part is not None]
    raise AdapterError(f"{name}: tensors of {stem} of shapes {' and '.join(map(str, shapes))} do not fit together")


def _kron(one: Tensor, other: Tensor) -> Tensor:
    """The Kronecker product; torch.kron refuses some matrices that lie transposed in memory."""
    product = one[:, None, :, None] * other[None, :, None, :]
    return product.reshape(len(one) * len(other), one.shape[1] * other.shape[1])


def wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 where it is that."""
    plain: Tensor = in_memory(tensor)
    return plain if plain.dtype == torch.float64 else plain.float()


def _of(parts: Mapping[str, Tensor], key: str) -> Tensor | None:
    return wide(parts[key]) if key in parts else None


def _size(P: Tensor, Q: Tensor) -> str:
    return f"{len(P)} × {Q.shape[1]}"
