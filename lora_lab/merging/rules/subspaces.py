"""Merges of one module's updates through the bases that they share, in factor space: no ΔW is ever made.

With T updates of rank r, everything is done on factors of Tr columns and on Tr × Tr cores, in float64. Bases come from
singular vectors of ΔW, so that nothing hangs on the gauge (B R, R⁻¹A); `lego` is the exception, and says so.
Directions below the resolution of the factors' dtype are no directions: they are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_lab.adapters.lowrank import Basis, LowRank, combine
from lora_lab.brief import Brief
from lora_lab.errors import OptionError, unknown
from lora_lab.extras import needs

Updates = Sequence[LowRank]


@dataclass(frozen=True, repr=False)
class Subspace(Brief):
    """Updates in the bases that they share: a matrix each, and the way back from a merged matrix to a ΔW."""

    cores: list[Tensor]
    back: Callable[[Tensor], LowRank]


def knots(updates: Updates) -> Subspace:
    """Merged by an inner rule in the joint column space.

    [ΔW₁ … ΔW_T] = U S [V₁ … V_T]ᵀ; the S Vᵢᵀ are merged by `inner`, and U is put before them (Stoica et al. 2024,
    arXiv:2410.19735). `inner` and its options are those of any rule for matrices.
    """
    U = _columns(updates)
    cores = [(U.T @ u.B.double()) @ u.A.double() for u in updates]  # Uᵀ ΔWᵢ = S Vᵢᵀ
    return Subspace(cores, lambda merged: LowRank(merged, U, updates[0].shape))


def core_space(updates: Updates, *, bases: str = "delta") -> Subspace:
    """Merged by an inner rule in the joint column and row spaces.

    Mᵢ = Uᵀ ΔWᵢ V in bases U of all columns and V of all rows; the Mᵢ are merged by `inner`, and U M Vᵀ is the result:
    nothing of any ΔWᵢ is lost (Panariello et al. 2025, arXiv:2509.17786). The bases are the left singular vectors of
    [ΔW₁ … ΔW_T] and the right ones of all ΔWᵢ below each other; with `bases` factors they are, as in the paper, those
    of [B₁ … B_T] and of all Aᵢ below each other, which hang on their gauge. With averaging inside it is averaging.
    """
    if bases not in BASES:
        raise unknown("kind of bases", bases, BASES)
    joint = BASES[bases]
    U, V = joint(updates), joint([LowRank(u.B.T, u.A.T) for u in updates])
    cores = [(U.T @ u.B.double()) @ (u.A.double() @ V) for u in updates]
    return Subspace(cores, lambda merged: LowRank(merged @ V.T, U, updates[0].shape))


def ctm(updates: Updates, *, rank: int | None = None, beta: float = 0.0) -> Subspace:
    """Merged by an inner rule in `rank` common directions of columns and rows.

    Compress, then merge (He et al. 2026, arXiv:2606.03723). In the core space Mₜ = UᵀΔWₜV, bases P and Q of `rank`
    columns each (by default, the largest rank among the ΔWₜ) are found that maximise Σ‖PᵀXₜQ‖² for proxies Xₜ, the Mₜ
    brought to the norm β‖Mₜ‖ + (1 − β)·mean‖M‖, by turns (Tucker-2 by HOOI, from the singular vectors, until a round
    gains less than 1e-6 of it, 1,000 rounds at most). The PᵀMₜQ are merged by `inner`; what comes out has that rank,
    and nothing is cut afterwards. With a sum inside it is no better than the sum cut by its SVD, which is the nearest.
    """
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise OptionError(f"rank is {rank}; a whole number of at least 1 is needed")
    if not 0 <= beta <= 1:
        raise OptionError(f"beta is {beta:g}; a share from 0 to 1 is needed")
    U, V = _columns(updates), _columns([LowRank(u.B.T, u.A.T) for u in updates])
    cores = torch.stack([(U.T @ u.B.double()) @ (u.A.double() @ V) for u in updates])
    norms = torch.linalg.matrix_norm(cores)
    wanted = beta * norms + (1 - beta) * norms.mean()
    proxies = cores * torch.where(norms > 0, wanted / norms, 0.0)[:, None, None]
    P, Q = _tucker(proxies, max(u.rank for u in updates) if rank is None else rank)
    left, right = U @ P, V @ Q
    return Subspace(list(P.T @ cores @ Q), lambda merged: LowRank(merged @ right.T, left, updates[0].shape))


def _tucker(X: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """P and Q with at most `rank` orthonormal columns for which Σ‖PᵀXₜQ‖² is largest, of X [T, rows, columns]."""
    Q = _leading(X.mT, rank)
    before = 0.0
    for _ in range(1000):
        P = _leading(X @ Q, rank)
        Q = _leading(X.mT @ P, rank)
        held = float((P.T @ X @ Q).square().sum())
        if held <= before * (1 + 1e-6):
            break
        before = held
    return P, Q


def _leading(X: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors of Σ XₜXₜᵀ of X [T, n, m], largest first, a sign each as in `_signed`."""
    beside = X.transpose(0, 1).flatten(1)  # [X₁ … X_T]
    return _signed(torch.linalg.eigh(beside @ beside.T).eigenvectors.flip(1)[:, :rank])


def tsv(updates: Updates, weights: Sequence[float], *, share: float | None = None, scale: float = 1.0) -> LowRank:
    """TSV-M: leading singular triplets of each, made orthogonal together.

    Gargiulo et al. 2024, arXiv:2412.00081: of each one's triplets ⌊min(rows, columns) / T⌋, so that all of them have
    room, at least one (of a low rank that is often all; or the share `share` of them, rounded up); U and V are replaced
    by their polar factors. Weights scale the singular values.
    """
    if share is not None and not 0 < share <= 1:
        raise OptionError(f"share is {share:g}; a share of the triplets above 0 and up to 1 is needed")
    parts = []
    for update, weight in zip(updates, weights, strict=True):
        U, S, Vh = _svd(update)
        room = max(1, min(update.B.shape[0], update.A.shape[1]) // len(updates))
        k = room if share is None else math.ceil(share * len(S) - 1e-9)
        parts.append((U[:, :k], weight * S[:k], Vh[:k]))
    U, S, Vh = _joined(parts)
    # λ P(U) diag(w₁S₁ … w_TS_T) P(V)ᵀ, P(X) the nearest matrix to X with orthonormal columns
    return _product(_polar(U, updates[0].A.dtype), scale * S, _polar(Vh.T, updates[0].A.dtype).T, updates)


def iso_c(updates: Updates, weights: Sequence[float], *, scale: float = 1.0) -> LowRank:
    """Iso-C: the sum with all singular values at their mean.

    Marczak et al. 2025, arXiv:2502.04959. Within the span of the factors: in the full space, null directions would be
    raised to the mean as well.
    """
    U, S, Vh = _svd(combine(updates, weights))
    return _product(U, scale * _flat(S), Vh, updates)


def iso_cts(updates: Updates, weights: Sequence[float], *, common: float = 0.8, scale: float = 1.0) -> LowRank:
    """Iso-CTS: leading directions of the sum and each one's own, all of one size.

    Marczak et al. 2025, arXiv:2502.04959, Alg. 2. Of the k directions of Σ wᵢΔWᵢ, the share `common` stays; the rest
    is dealt out evenly to what each wᵢΔWᵢ has orthogonally to the common column space. U and V are then replaced by
    their polar factors, and all singular values by their mean.
    """
    if not 0 <= common <= 1:
        raise OptionError(f"common is {common:g}; a share from 0 to 1 is needed")
    U, S, Vh = _svd(combine(updates, weights))
    unique = min(round((len(S) - int(common * len(S))) / len(updates)), len(S) // len(updates))
    kept = len(S) - unique * len(updates)
    parts = [(U[:, :kept], S[:kept], Vh[:kept])]
    for update, weight in zip(updates, weights, strict=True):
        B = weight * update.B.double()
        size = abs(weight) * float(update.singular_values().amax(0)) if update.rank else 0.0
        # what (I − U Uᵀ) wᵢΔWᵢ, U the common columns, has of leading directions
        beside = _svd(LowRank(update.A.double(), B - U[:, :kept] @ (U[:, :kept].T @ B)), update.A.dtype, size)
        parts.append((beside[0][:, :unique], beside[1][:unique], beside[2][:unique]))
    U, S, Vh = _joined(parts)
    return _product(_polar(U, updates[0].A.dtype), scale * _flat(S), _polar(Vh.T, updates[0].A.dtype).T, updates)


def lego(
    updates: Updates, weights: Sequence[float], *, clusters: int | None = None, scale: float = 1.0, seed: int = 0
) -> LowRank:
    """LoRA-LEGO: rank-1 units pooled and clustered by k-means.

    Zhao et al. 2024, arXiv:2409.16167. A unit is its [aₖ, bₖ] with ‖aₖ‖ = ‖bₖ‖ and the largest entry of aₖ positive;
    equal units of one adapter are one of their summed ΔW. A centroid is rescaled to its members' mean norm, the output
    to √(r/K), r the largest rank and K = `clusters` (r by default), also where there are fewer different units than K.
    Units are those of the factors as they are: this method depends on the gauge.
    """
    with needs("data", "the merge by clusters of units"):
        from sklearn.cluster import KMeans

    if clusters is not None and (not isinstance(clusters, int) or clusters < 1):
        raise OptionError(f"clusters is {clusters}; a whole number of at least 1 is needed")
    rank = max(update.rank for update in updates)
    wanted = rank if clusters is None else clusters
    units = torch.cat([_units(update * weight) for update, weight in zip(updates, weights, strict=True)])
    units = units[units.norm(dim=1) > 0]
    if not len(units):
        return updates[0] * 0.0
    count = min(wanted, len(torch.unique(units, dim=0)))
    cluster_of = KMeans(count, n_init=10, random_state=seed).fit_predict(units.cpu().numpy())
    merged = []
    for cluster in range(count):
        members = units[torch.from_numpy(np.flatnonzero(cluster_of == cluster)).to(units.device)]
        if not len(members):
            continue
        centre = members.mean(0)
        # the mean of the members, at the mean of their norms
        merged.append(centre * members.norm(dim=1).mean() / centre.norm().clamp(min=torch.finfo(centre.dtype).tiny))
    centres, columns = torch.stack(merged), updates[0].A.shape[1]
    A, B = centres[:, :columns], centres[:, columns:]
    return LowRank(A, scale * math.sqrt(rank / wanted) * B.T, updates[0].shape)


def _factor_columns(updates: Updates) -> Tensor:
    """Left singular vectors [rows, k] of [B₁ … B_T], a sign each so that the largest entry is positive."""
    basis = Basis(torch.cat([u.B.double() for u in updates], dim=1))
    U, S, _ = torch.linalg.svd(basis.R, full_matrices=False)
    return _signed(basis.times(U[:, _real(S, updates[0].A.dtype)]))


def _columns(updates: Updates) -> Tensor:
    """Left singular vectors [rows, k] of [ΔW₁ … ΔW_T], a sign each so that the largest entry is positive."""
    basis = Basis(torch.cat([u.B.double() for u in updates], dim=1))
    cores = []
    for R_B, update in zip(basis.R.split([u.rank for u in updates], dim=1), updates, strict=True):
        cores.append(R_B @ Basis(update.A.double().T).R.T)
    U, S, _ = torch.linalg.svd(torch.cat(cores, dim=1), full_matrices=False)
    return _signed(basis.times(U[:, _real(S, updates[0].A.dtype)]))


BASES: dict[str, Callable[[Updates], Tensor]] = {"delta": _columns, "factors": _factor_columns}
"""Whose left singular vectors are the bases: of the ΔW, which do not hang on the gauge, or of the factors."""


def _signed(U: Tensor) -> Tensor:
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign() if U.numel() else 1.0
    signed: Tensor = U * sign
    return signed


def _svd(update: LowRank, dtype: torch.dtype | None = None, size: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triplets of ΔW that the factors' dtype can tell from none, beside others of this size."""
    U, S, Vh = update.svd()
    real = _real(S, dtype or update.A.dtype, size)
    return U[:, real], S[real], Vh[real]


def _real(S: Tensor, dtype: torch.dtype, size: float = 0.0) -> Tensor:
    if not len(S):
        return torch.zeros_like(S, dtype=torch.bool)
    threshold = max(float(S.max()), size) * 8 * torch.finfo(dtype).eps
    real: Tensor = (threshold < S) & (S > 0)
    return real


def _joined(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = zip(*parts, strict=True)
    return torch.cat(U, dim=1), torch.cat(S), torch.cat(Vh)


def _polar(X: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest matrix with orthonormal columns, P Qᵀ of X = P S Qᵀ, without what `dtype` cannot tell from null."""
    Q, R = torch.linalg.qr(X)
    U, S, Vh = torch.linalg.svd(R, full_matrices=False)
    real = _real(S, dtype)
    nearest: Tensor = Q @ U[:, real] @ Vh[real]
    return nearest


def _flat(S: Tensor) -> Tensor:
    return torch.full_like(S, float(S.mean())) if len(S) else S


def _product(U: Tensor, S: Tensor, Vh: Tensor, updates: Updates) -> LowRank:
    """U diag(S) Vh, the singular values shared out evenly."""
    root = S.abs().sqrt()
    return LowRank(root[:, None] * Vh, U * (S.sign() * root), updates[0].shape)


def _units(update: LowRank) -> Tensor:
    """The different rank-1 units [≤ rank, columns + rows], balanced and signed; equal ones are added."""
    A, B = update.A.double(), update.B.double().T
    a, b = A.norm(dim=1, keepdim=True), B.norm(dim=1, keepdim=True)
    sign = A.gather(1, A.abs().argmax(1, keepdim=True)).sign()
    root = (b / a.clamp(min=1e-300)).sqrt()
    size = torch.where((a > 0) & (b > 0), root, 0.0)
    units = torch.cat([sign * size * A, sign * torch.where(size > 0, B / size.clamp(min=1e-300), 0.0)], dim=1)
    different, times = torch.unique(units, dim=0, return_counts=True)
    scaled: Tensor = different * times.double().sqrt()[:, None]
    return scaled
