"""Merges of the factors of one module's updates, rather than of their ΔW."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_lab.adapters.lowrank import LowRank, combine, combine_factors
from lora_lab.errors import MismatchError, OptionError, shorten, unknown
from lora_lab.geometry import aligning
from lora_lab.merging.rules import sums
from lora_lab.merging.rules.trimming import check_share


def cat(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Σ wᵢ ΔWᵢ by concatenation: what PEFT calls cat."""
    return combine(updates, weights)


def factor_average(updates: Sequence[LowRank], weights: Sequence[float], *, scale: float = 1.0) -> LowRank:
    """λ (Σ wᵢBᵢ)(Σ wᵢAᵢ) / (Σ wᵢ)²: averaged factors, which have cross terms BᵢAⱼ.

    Not an average of ΔW: it hangs on the gauge, and independent adapters lose most of their norm. The literature's
    "fusion". Adapters that leave a module alone count as 0.
    """
    present = [update for update in updates if update.rank]
    if not present:
        return updates[0]
    _require_one_rank(present, "ΔW can (average)")
    filled = [
        update if update.rank else LowRank(present[0].A * 0.0, present[0].B * 0.0, update.shape) for update in updates
    ]
    return scale * combine_factors(filled, sums.normalised(weights))


def procrustes_mean(
    updates: Sequence[LowRank], weights: Sequence[float], *, match_norm: bool = False, scale: float = 1.0
) -> LowRank:
    """The mean of the balanced factors, turned onto each other first: no rank is added.

    Of every ΔW = U S Vᵀ the factors [U√S; V√S] are turned by orthogonal matrices until they lie nearest to their
    weighted mean Z̄ (generalised Procrustes analysis, Gower 1975; geometry/aligning.py), and λ Z̄_top Z̄_botᵀ comes out,
    of the largest rank among them. Equal ΔW are their own mean; others lose norm (unrelated ones half of it or so),
    unless `match_norm` brings every module back to the weighted mean of its norms. Adapters that leave a module alone
    count as 0.
    """
    mean = aligning.procrustes_mean(updates, weights).mean
    if match_norm and (size := mean.norm()):
        norms = [share * update.norm() for share, update in zip(sums.normalised(weights), updates, strict=True)]
        mean = mean * (sum(norms) / size)
    return scale * mean


FACTORS = ("trained", "aligned")
"""In which gauge factors are merged: as they are, or balanced and turned onto each other."""


def robustmerge(
    updates: Sequence[LowRank],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    quantile: float = 0.8,
    factors: str = "trained",
    scale: float = 1.0,
) -> LowRank:
    """Trimmed factors added up, each column of B scaled by what its row of A lost.

    Of every Aₜ and Bₜ the share `density` of largest entries stays, A'ₜ and B'ₜ. With cₜₖ = Σ|Aₜ[k]| / Σ|A'ₜ[k]|,
    raised to at least the `quantile` over k, it is λ B A with A = 2 Σ A'ₜ and, column by column, B = 2 Σ cₜwₜB'ₜ / Σ cₜ
    (Zeng et al. 2025, arXiv:2502.17159): the 2s are its authors', so that a single adapter at density 1 comes out times
    4. A merge of factors: it has cross terms BᵢAⱼ, and hangs on the gauge unless `factors` is aligned, which balances
    them and turns them onto each other first (ours). As they were trained, they must be of one rank. Adapters that
    leave a module alone are left out.
    """
    check_share("density", density)
    if not 0 <= quantile <= 1:
        raise OptionError(f"quantile is {quantile:g}; a share from 0 to 1 is needed")
    if factors not in FACTORS:
        raise unknown("gauge of the factors", factors, FACTORS)
    used = [(update, weight) for update, weight in zip(updates, weights, strict=True) if update.rank]
    if not used:
        return updates[0]
    given = [update for update, _ in used]
    if factors == "aligned":
        given = aligning.procrustes_mean(given).turned
    else:
        _require_one_rank(given, "aligned ones can (factors=aligned)")
    A_sum, B_sum = (torch.zeros_like(factor, dtype=torch.float64) for factor in (given[0].A, given[0].B))
    total = given[0].A.new_zeros(given[0].rank, dtype=torch.float64)
    for update, (_, weight) in zip(given, used, strict=True):
        A, B = _largest(update.A.double(), density), _largest(update.B.double(), density)
        c = _lost(update.A.double(), A, quantile)
        A_sum, B_sum, total = A_sum + A, B_sum + c * weight * B, total + c
    B_sum = torch.where(total > 0, B_sum / total, 0.0)
    return LowRank(2 * A_sum, 2 * scale * B_sum, updates[0].shape)


def _largest(X: Tensor, density: float) -> Tensor:
    """The share of entries that are largest; the others are 0."""
    count = max(1, round(density * X.numel()))
    kept = torch.zeros_like(X).flatten()
    places = X.abs().flatten().sort(descending=True, stable=True).indices[:count]
    kept[places] = X.flatten()[places]
    return kept.reshape(X.shape)


def _lost(A: Tensor, kept: Tensor, quantile: float) -> Tensor:
    """Σ|A[k]| / Σ|A'[k]| of each row, at least the quantile of all; of a row that lost all of it, the quantile."""
    whole, left = A.abs().sum(1), kept.abs().sum(1)
    some = left > 0
    if not bool(some.any()):
        return torch.zeros_like(whole)
    c = torch.where(some, whole / left.clamp(min=torch.finfo(left.dtype).tiny), 0.0)
    return c.clamp(min=float(torch.quantile(c[some], quantile)))


def _require_one_rank(updates: Sequence[LowRank], otherwise: str) -> None:
    if len({update.rank for update in updates}) > 1:
        raise MismatchError(f"factors of ranks {shorten(u.rank for u in updates)} cannot be averaged; {otherwise}")
