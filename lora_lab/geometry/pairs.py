"""Two ΔW of one module beside each other: inner product, distance, and the angles between their subspaces."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_lab.adapters.lowrank import Basis, LowRank
from lora_lab.brief import Brief
from lora_lab.geometry.canonical import Canonical

Floats = npt.NDArray[np.float64]

_NEAR = 0.995
"""A cosine above which its angle comes from the sine: near 1 a cosine hardly changes, and half its digits go."""
_CANCELS = 1e-6
"""‖ΔW₁ − ΔW₂‖² / (‖ΔW₁‖² + ‖ΔW₂‖²) below which too many digits of inner products cancel."""

_BLOCK = 2**22
"""Entries of ΔW in memory at a time where they are made."""


@dataclass(frozen=True, repr=False)
class Side(Brief):
    """How two subspaces of dimensions k and l in d dimensions lie: those of the columns or of the rows of ΔW."""

    angles: Floats
    """The min(k, l) principal angles, smallest first, in radians."""
    shared: float
    """‖Q₁ᵀQ₂‖² = Σ cos², from 0 to min(k, l)."""
    chance: float
    """Its expectation for random subspaces, k l / d."""


@dataclass(frozen=True, repr=False)
class ModulePair(Brief):
    """What is measured between two ΔW of one shape."""

    inner: float
    distance: float
    left: Side
    right: Side
    signs: tuple[int, int] | None = None
    """Entries of equal sign, and entries that have one in both, where they were counted."""
    top_share: float | None = None
    """Largest share of one direction in [B₁, B₂]: σ₁² / Σσ² of the balanced B = U√S; None where both are 0."""


def module_pair(one: Canonical, other: Canonical, *, signs: bool = False) -> ModulePair:
    """Inner product, distance and both sides of two ΔW of one module; with `signs`, those of their entries, too."""
    left, right = one.left.cross(other.left), one.right.cross(other.right)
    # ⟨Q_B K Q_Aᵀ, Q_B' K' Q_A'ᵀ⟩ = tr(Kᵀ (Q_BᵀQ_B') K' (Q_AᵀQ_A')ᵀ)
    inner = float((one.core.T @ left @ other.core * right).sum())
    total = one.norm**2 + other.norm**2
    squared = total - 2 * inner
    close = squared < _CANCELS * total
    return ModulePair(
        inner,
        (one.update - other.update).norm() if close else math.sqrt(squared),
        _side(one.left, one.U, other.left, other.U, left, one.update.B.shape[0]),
        _side(one.right, one.V, other.right, other.V, right, one.update.A.shape[1]),
        sign_agreement(one.update, other.update) if signs else None,
        _top_share(one, other, left),
    )


def _top_share(one: Canonical, other: Canonical, left: Tensor) -> float | None:
    """σ₁² / Σσ² of [U₁√S₁, U₂√S₂], by the eigenvalues of its Gram matrix: how much one direction has of both.

    Pico's share (arXiv:2604.16826), in the balanced gauge.
    """
    total = float(one.S.sum() + other.S.sum())
    if not total:
        return None
    roots = [(form.S / total).sqrt() for form in (one, other)]
    cross = roots[0][:, None] * (one.U.T @ left @ other.U) * roots[1]
    gram = torch.cat(
        [torch.cat([roots[0].square().diag(), cross], 1), torch.cat([cross.T, roots[1].square().diag()], 1)]
    )
    return float(torch.linalg.eigvalsh(gram)[-1])


def sign_agreement(one: LowRank, other: LowRank) -> tuple[int, int]:
    """Entries at which two ΔW have the same sign, and entries at which both are not 0: **dense**, by blocks of rows."""
    same = counted = 0
    rows = max(1, _BLOCK // max(1, one.A.shape[1]))
    (B, A), (other_B, other_A) = ([_near_one(factor) for factor in (each.B, each.A)] for each in (one, other))
    for start in range(0, len(B), rows):
        signs = torch.sign(B[start : start + rows] @ A)
        signs *= torch.sign(other_B[start : start + rows] @ other_A)
        same += int((signs > 0).sum())
        counted += int(torch.count_nonzero(signs))
    return same, counted


def _near_one(factor: Tensor) -> Tensor:
    """The factor by a power of 2, which changes no sign: in float32, products of 1e-25 are 0 and of 1e20 infinite."""
    return torch.ldexp(factor, -torch.frexp(factor.abs().max()).exponent) if factor.numel() else factor


def gaussian_agreement(cosine: float) -> float:
    """The share of equal signs of normal variables with this correlation: ½ + arcsin(ρ) / π (Sheppard 1899)."""
    return 0.5 + math.asin(max(-1.0, min(1.0, cosine))) / math.pi


def _side(one: Basis, X: Tensor, other: Basis, Y: Tensor, cross: Tensor, dimensions: int) -> Side:
    angles = _angles(one, X, other, Y, X.T @ cross @ Y)
    return Side(angles, float((np.cos(angles) ** 2).sum()), X.shape[1] * Y.shape[1] / dimensions)


def principal_angles(one: Canonical, other: Canonical) -> tuple[Floats, Floats]:
    """The angles between the column spaces and between the row spaces of two ΔW, smallest first, in radians."""
    pair = module_pair(one, other)
    return pair.left.angles, pair.right.angles


def _angles(one: Basis, X: Tensor, other: Basis, Y: Tensor, cosines: Tensor) -> Floats:
    """Of the subspaces Q X and Q' Y, whose (QX)ᵀQ'Y is `cosines`; small ones by the sine (Björck & Golub 1973)."""
    if X.shape[1] < Y.shape[1]:
        return _angles(other, Y, one, X, cosines.T)
    if not Y.shape[1]:
        return np.zeros(0)
    cos = torch.linalg.svdvals(cosines).clamp(max=1)
    angles = torch.arccos(cos)
    if float(cos[0]) > _NEAR:
        P, Q = one.times(X), other.times(Y)
        sines = torch.linalg.svdvals(Q - P @ (P.T @ Q)).clamp(max=1).flip(0)
        angles = torch.where(cos > _NEAR, torch.arcsin(sines), angles)
    found: Floats = angles.numpy(force=True)
    return found
