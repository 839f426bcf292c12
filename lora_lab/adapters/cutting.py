"""A dense ΔW as factors: exactly, or cut to a rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import OptionError


def factored(delta: Tensor, rank: int | None = None) -> tuple[LowRank, float]:
    """A dense ΔW as factors, with its relative Frobenius error: exactly (ΔW times an identity), or cut to a rank.

    Up to 1024 rows or columns (and four million entries) the cut is the best approximation. Beyond, it is the best
    within a space of three times the rank found by a randomised block Krylov iteration (Musco & Musco 2015,
    arXiv:1504.05477) that goes through ΔW six times, from a fixed seed: nearly the best, and the error is that of what
    came out.
    """
    dense = delta.flatten(1)
    rows, columns = dense.shape
    if rank is None or rank >= min(rows, columns):
        identity = torch.eye(min(rows, columns), dtype=dense.dtype, device=dense.device)
        A, B = (dense, identity) if rows <= columns else (identity, dense)
        return LowRank(A, B, tuple(delta.shape)), 0.0
    if rank < 1:
        raise OptionError(f"a rank of {rank} was asked for; it is at least 1")
    small = min(rows, columns) <= _SMALL and rows * columns < _FEW
    kept, captured = _best(dense, rank) if small else _krylov(dense, rank)
    total = norm_of(dense) ** 2
    lost = total - captured  # ‖ΔW‖² − ‖QᵀΔW‖², with Q the columns that are kept
    if lost < _CANCELS * total:
        lost = norm_of(torch.addmm(dense, kept.B, kept.A, alpha=-1)) ** 2
    return LowRank(kept.A, kept.B, tuple(delta.shape)), math.sqrt(lost / total) if total else 0.0


def norm_of(dense: Tensor) -> float:
    """‖ΔW‖_F, the squares of rows summed in their dtype and these sums in float64."""
    rows = torch.linalg.vector_norm(dense.flatten(1), dim=1)
    norm = float(torch.linalg.vector_norm(rows, dtype=torch.float64))
    # squares of 1e20 and of 1e-23 are no numbers of float32
    return norm if 1e-15 < norm < 1e18 else float(torch.linalg.vector_norm(dense, dtype=torch.float64))


_SMALL, _FEW = 1024, 1 << 22
_OVERSAMPLED, _ROUNDS = 8, 2
_CANCELS = 1e-2
"""Share of ‖ΔW‖² below which a difference of squares has lost digits that count."""


def _best(dense: Tensor, rank: int) -> tuple[LowRank, float]:
    """The best approximation and its ‖ΔW‖²."""
    Q, projected = None, dense.double()
    if dense.shape[0] > dense.shape[1]:
        Q, projected = torch.linalg.qr(projected)
    U, S, Vh = torch.linalg.svd(projected, full_matrices=False)
    root = S[:rank].sqrt()
    B = U[:, :rank] * root
    A, B = (root[:, None] * Vh[:rank]).to(dense.dtype), (B if Q is None else Q @ B).to(dense.dtype)
    return LowRank(A, B), float(S[:rank].square().sum())


def _krylov(dense: Tensor, rank: int) -> tuple[LowRank, float]:
    """The best approximation within span{D Ω, (D Dᵀ) D Ω, (D Dᵀ)² D Ω}, D = ΔW and Ω random, and its ‖ΔW‖².

    Every block Q of the basis is orthogonal to those before it, so that Dᵀ Q, which the next block is made from, is its
    part of the projection, too.
    """
    rows, columns = dense.shape
    width = min(rank + _OVERSAMPLED, rows, columns)
    omega = torch.randn(columns, width, generator=torch.Generator().manual_seed(0)).to(dense)
    bases: list[Tensor] = []
    projected: list[Tensor] = []
    block = dense @ omega
    narrow = dense
    for left in range(_ROUNDS, -1, -1):
        for _ in range(2):  # of a ΔW of lower rank, rounding is left the first time, which is orthogonal to nothing
            for Q in bases:
                block = block - Q @ (Q.T @ block)
            block = torch.linalg.qr(block).Q
        bases.append(block)
        projected.append(dense.T @ bases[-1])
        if not left or sum(Q.shape[1] for Q in bases) + width > min(rows, columns):
            break
        if (
            left == _ROUNDS
            and _has_bfloat16(dense)
            and norm_of(projected[0]) ** 2 < (1 - _CANCELS) * norm_of(dense) ** 2
        ):
            narrow = dense.bfloat16()  # of a space that loses so much, three digits are enough, in a third of the time
        block = (narrow @ torch.linalg.qr(projected[-1]).Q.to(narrow)).to(dense)
    Q, P = torch.cat(bases, dim=1), torch.cat(projected, dim=1).double()
    # QᵀD = Pᵀ, whose leading left singular vectors are those of its Gram matrix
    squares, U = torch.linalg.eigh(P.T @ P)
    squares, U = squares.flip(0)[:rank].clamp(min=0), U.flip(1)[:, :rank]
    fourth = squares.sqrt().sqrt()  # √ of the singular values, which both factors share
    A = (P @ U).T / fourth.clamp(min=1e-150)[:, None]
    B = Q @ (U * fourth).to(Q.dtype)
    return LowRank(A.to(dense.dtype), B), float(squares.sum())


def _has_bfloat16(dense: Tensor) -> bool:
    """Whether products of bfloat16 are faster than those of the matrix's own dtype."""
    if dense.dtype != torch.float32:
        return False
    if dense.device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dense.device.type == "cuda" and torch.cuda.is_bf16_supported()
