"""The leading singular directions of W + ΔW beside those of W: intruders, and the share of ΔW among the leading ones.

**Dense**: W itself is decomposed once. All else is of the rank of ΔW, in the basis of W's singular vectors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_lab.adapters.lowrank import LowRank
from lora_lab.brief import Brief
from lora_lab.errors import MismatchError
from lora_lab.geometry.canonical import Canonical

Floats = npt.NDArray[np.float64]

TOP, THRESHOLD = 10, 0.5
"""Leading directions of W + ΔW that are looked at, and the cosine below which one of them is an intruder (PEFT's)."""

_ROUNDING = 1e-7
"""Of σ₁: smaller singular values of W are rounding, and their vectors any basis of what is left."""
_DENSE = 256
"""Directions up to which all eigenvectors are computed and not the leading ones alone."""


@dataclass(frozen=True, repr=False)
class Inside(Brief):
    """Where ΔW lies in W, for one module."""

    similarities: Floats
    """Of each leading left vector u' of W + ΔW, largest first: max |u'ᵀu| over all left vectors u of W."""
    values: Floats
    """Their singular values."""
    left: tuple[float, float]
    """‖UᵀΔW‖² / ‖ΔW‖² for W's leading left vectors U, and what random directions would have; NaN for ΔW = 0."""
    right: tuple[float, float]
    """The same of its right vectors."""
    norm: float
    """‖W‖."""
    sigma: float
    """σ₁ of W."""

    def intruders(self, threshold: float = THRESHOLD) -> int:
        """How many of the leading vectors are like none of W's."""
        return int((self.similarities < threshold).sum())


class Weight:
    """A weight W [out, in] by its singular vectors: by the eigenvectors of W Wᵀ, or of WᵀW where that is smaller.

    In float64, so that the square loses nothing down to 1e-7 of σ₁. MismatchError where W is not finite.
    """

    def __init__(self, W: Tensor, device: torch.device | None = None) -> None:
        self._W = W.to(device=device, dtype=torch.float64)
        if not bool(torch.isfinite(self._W).all()):
            raise MismatchError("the weight is not finite")
        self.scale = float(self._W.abs().max()) or 1.0  # squares of 1e200 leave float64
        self._W = self._W / self.scale
        self.tall = W.shape[0] > W.shape[1]
        if self.tall:  # all below is of Wᵀ, with left and right exchanged
            self._W = self._W.T
        squared, self._E = torch.linalg.eigh(self._W @ self._W.T)
        squared, self._E = squared.flip(0).clamp(min=0), self._E.flip(1)
        values = squared.sqrt()
        self.rank = int((values > _ROUNDING * values[0]).sum()) if float(values[0]) else 0
        self._values = values.cpu().numpy()

    @property
    def singular_values(self) -> Floats:
        """Those that are not rounding, largest first."""
        found: Floats = self._values[: self.rank] * self.scale
        return found

    def inside(self, update: LowRank, top: int = TOP) -> Inside:
        """Where ΔW lies in this weight."""
        moved = self._moved(update)
        c, values = moved.leading(top)
        near, far = moved.similarities(c, values)
        shares = moved.shares(min(top, self.rank))
        left, right = shares[::-1] if self.tall else shares
        own = float(np.linalg.norm(self._values)) * self.scale
        largest = far if self.tall else near
        return Inside(largest, values * self.scale, left, right, own, float(self._values[0]) * self.scale)

    def intruding(self, update: LowRank, top: int = TOP, threshold: float = THRESHOLD) -> LowRank:
        """Σ σ' u' v'ᵀ over the intruders among the leading directions of W + ΔW, of as many ranks (0 for none)."""
        moved = self._moved(update)
        c, values = moved.leading(top)
        found = moved.similarities(c, values)[1 if self.tall else 0] < threshold
        near = self._E @ torch.from_numpy(c[:, found]).to(self._E)
        far = (self._W.T @ near).cpu() + moved.A.T @ (moved.B.T @ near.cpu())  # W'ᵀu' = σ' v'
        near, far = near.cpu(), far * self.scale
        if self.tall:
            near, far = far, near
        return LowRank(far.T.contiguous(), near.contiguous(), update.shape)

    def _moved(self, update: LowRank) -> _Moved:
        form = Canonical(update)
        U, S, V = form.triplets()
        B, A = U * (S / self.scale), V.T  # orthonormal rows of A: no product of two cancels
        if self.tall:
            B, A = V * (S / self.scale), U.T
        E, W = self._E, self._W
        near = (E.T @ B.to(E)).cpu().numpy()
        mixed = (E.T @ (W @ A.T.to(W))).cpu().numpy()
        return _Moved(self._values, self.rank, near, mixed, B, A, self._W.shape[1])


@dataclass(frozen=True, repr=False)
class _Moved(Brief):
    """W + B A in the basis E of W's own vectors on its smaller side, A Aᵀ = 1."""

    values: Floats
    rank: int
    near: Floats
    """Eᵀ B."""
    mixed: Floats
    """Eᵀ W Aᵀ = diag(σ) (A F)ᵀ for W's vectors F on the other side."""
    B: Tensor
    A: Tensor
    width: int

    def leading(self, top: int) -> tuple[Floats, Floats]:
        """Coordinates [n, k] of the leading vectors, and their singular values: no more than are not rounding.

        They are eigenvectors of Eᵀ W' W'ᵀ E = diag(σ²) + M Nᵀ + N Mᵀ + N Nᵀ for N = EᵀB and M = EᵀWAᵀ.
        """
        n = len(self.values)
        count = min(top, n)
        squares, near, mixed = self.values**2, self.near, self.mixed
        if n <= max(_DENSE, 4 * count):
            found, c = np.linalg.eigh(np.diag(squares) + mixed @ near.T + near @ (mixed + near).T)
        else:
            from scipy.sparse.linalg import LinearOperator, eigsh

            def product(x: Floats) -> Floats:
                x = x.reshape(n, -1)
                inner = near.T @ x
                made: Floats = squares[:, None] * x + mixed @ inner + near @ (mixed.T @ x + inner)
                return made

            operator = LinearOperator((n, n), matvec=product, matmat=product, dtype=np.float64)
            found, c = eigsh(operator, count, v0=np.ones(n))
        order = np.argsort(found)[::-1][:count]
        values = np.sqrt(found[order].clip(min=0))
        kept = values > _ROUNDING * max(values[0], self.values[0])
        return c[:, order][:, kept], values[kept]

    def similarities(self, c: Floats, values: Floats) -> tuple[Floats, Floats]:
        """For the smaller side and the other one: max |cos| of each leading vector with any of W's.

        On the other side v'ᵀv_j = u'ᵀ W' Wᵀ u_j / (σ' σ_j) = (c_j σ_j² + (Nᵀc)·M_j) / (σ' σ_j).
        """
        if not self.rank or not len(values):
            return np.zeros(len(values)), np.zeros(len(values))
        sigma = self.values[: self.rank, None]
        own = c[: self.rank]
        other = own * sigma / values + (self.mixed[: self.rank] / sigma) @ (self.near.T @ c) / values
        return np.abs(own).max(0), np.abs(other).max(0)

    def shares(self, count: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """Shares of ‖BA‖² among W's leading vectors, on the smaller side and on the other, with those of chance."""
        total = float(self.B.square().sum())
        chance = (count / len(self.values), count / self.width)
        if not total:
            return (math.nan, chance[0]), (math.nan, chance[1])
        size = self.B.norm(dim=0).numpy()  # the columns of B are orthogonal
        far = self.mixed[:count] / self.values[:count, None] if count else self.mixed[:0]
        shared = float(np.square(self.near[:count]).sum()), float(np.square(far * size).sum())
        return (shared[0] / total, chance[0]), (shared[1] / total, chance[1])


def rows_of(
    inside: Sequence[Mapping[str, Inside]],
    norms: Sequence[Mapping[str, float]],
    labels: Sequence[str],
    parts: Sequence[tuple[str, str, Sequence[str]]],
    threshold: float,
) -> list[dict[str, Any]]:
    """Every adapter in every part (level, name, modules): intruders in all, and the shares of its ‖ΔW‖² together.

    `inside` and `norms` (‖ΔW‖) are by module, for each adapter.
    """
    rows = []
    for level, group, modules in parts:
        for label, places, sizes in zip(labels, inside, norms, strict=True):
            held = [(places[name], sizes[name]) for name in modules if name in places]
            if not held:
                continue
            found = [each.similarities for each, _ in held]
            row = {"adapter": label, "level": level, "group": group, "modules": len(held)}
            row |= {"intruders": sum(each.intruders(threshold) for each, _ in held), "looked_at": sum(map(len, found))}
            row["least_similar"] = min((float(each.min()) for each in found if len(each)), default=None)
            row |= _shares("left", held) | _shares("right", held)
            own, base = (math.hypot(*part) for part in zip(*((size, each.norm) for each, size in held), strict=True))
            row["norm_ratio"] = own / base if base else None
            row["similarities"] = found[0].tolist() if level == "module" else None
            rows.append(row)
    return rows


def _shares(side: str, held: Sequence[tuple[Inside, float]]) -> dict[str, float | None]:
    """Of several modules, ΔW is one block-diagonal matrix: the shares by ‖ΔW‖², beside what chance would give."""
    sizes = [(getattr(each, side), norm**2) for each, norm in held if norm]
    total = sum(size for _, size in sizes)
    if not total:
        return {f"{side}_share": None, f"{side}_over_chance": None}
    share, chance = (sum(values[k] * size for values, size in sizes) / total for k in (0, 1))
    return {f"{side}_share": share, f"{side}_over_chance": share / chance if chance else None}
