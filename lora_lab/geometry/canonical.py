"""ΔW in a form that no change of gauge (BR, R⁻¹A) touches: its singular triplets, and a short hash."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lora_lab.adapters.formats.keys import natural_key
from lora_lab.adapters.lowrank import Basis, LowRank

DIGITS = 4
"""Digits of ‖ΔW‖, and of projections of ΔW / ‖ΔW‖, that a hash hangs on."""

_ROUNDING = 1e-6
"""Of the largest singular value: smaller ones are what rounding to float32 leaves, no direction of ΔW."""
_PROJECTIONS = 8


class Canonical:
    """ΔW = (Q_B U) diag(S) (Q_A V)ᵀ of one module in float64, by QR of both factors and the SVD of their core.

    Of U, S and V only the leading `rank` triplets are kept: those that are not rounding, and of these as few as hold
    the share `energy` of ‖ΔW‖². `left` and `right` are Q_B and Q_A, of which nothing is written down.
    """

    def __init__(self, update: LowRank, energy: float = 1.0) -> None:
        self.update = update
        self._B, self._A = update.B.double(), update.A.double()
        self.left, self.right = Basis(self._B), Basis(self._A.T)
        self.core = self.left.R @ self.right.R.T
        U, S, Vh = torch.linalg.svd(self.core, full_matrices=False)
        self.singular_values = S
        """All min(rank, rows, columns) of them, largest first."""
        self.norm = math.hypot(*S.tolist())
        self.rank = _kept(S, energy)
        self.U, self.S, self.V = U[:, : self.rank], S[: self.rank], Vh[: self.rank].T

    def __repr__(self) -> str:
        return f"Canonical({self.update!r}, {self.rank} directions)"

    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        """Left singular vectors [rows, k], singular values [k] and right singular vectors [columns, k].

        The entry of largest size of every left vector is positive (the first of several that tie), so that all gauges
        of one ΔW give the same where no two singular values are equal.
        """
        left, right = self.left.times(self.U), self.right.times(self.V)
        if not self.rank:
            return left, self.S, right
        size = left.abs()
        # Of two that tie, rounding would choose another in every gauge: the first within 0.1 % of the largest.
        first = (size > 0.999 * size.amax(0)).byte().argmax(0, keepdim=True)
        sign = left.gather(0, first).sign()
        return left * sign, self.S, right * sign

    def effective_rank(self) -> float:
        """exp of the entropy of the normalised singular values; 0 for ΔW = 0."""
        total = float(self.singular_values.sum())
        return float(torch.special.entr(self.singular_values / total).sum().exp()) if total else 0.0

    def stable_rank(self) -> float:
        """‖ΔW‖² / σ₁²; 0 for ΔW = 0."""
        return (self.norm / float(self.S[0])) ** 2 if self.rank else 0.0

    def sketch(self, name: str) -> Tensor:
        """The eight numbers uᵀ ΔW v for fixed vectors of signs u and v, with signs that hang on the module's name."""
        u, v = _signs(0, self._B.shape[0]), _signs(1, self._A.shape[1])
        projected: Tensor = ((u @ self._B) * (v @ self._A.T)).sum(1)
        byte = hashlib.sha256(name.encode()).digest()[0]
        return projected * torch.tensor([1.0 - 2 * (byte >> k & 1) for k in range(_PROJECTIONS)], dtype=torch.float64)


def _kept(S: Tensor, energy: float) -> int:
    if not len(S) or not float(S[0]):
        return 0
    rank = int((_ROUNDING * S[0] < S).sum())
    squares = (S[:rank] / S[0]).square()  # those of the values themselves may leave float64
    held = squares.cumsum(0) / squares.sum()
    return min(rank, 1 + int((held < energy * (1 - 1e-12)).sum()))


def delta_hash(updates: Mapping[str, LowRank], digits: int = DIGITS) -> str:
    """Twelve hexadecimal digits that all gauges of one ΔW share: of its norm and eight projections, rounded.

    ‖ΔW‖ is rounded to so many significant digits, and the projections Σ ⟨ΔW, u vᵀ⟩ / ‖ΔW‖ onto fixed signs u and v to
    so many decimals; modules where ΔW = 0 do not count. A difference of relative size ε changes the hash with
    probability of about 20 ε · 10^digits: in float32, one gauge in 50 gets another hash at 4 digits.
    """
    sketches, norms = {}, {}
    for name, update in updates.items():
        form = Canonical(update)
        sketches[name], norms[name] = form.sketch(name), form.norm
    return hash_of(sketches, norms, digits)


def hash_of(sketches: Mapping[str, Tensor], norms: Mapping[str, float], digits: int = DIGITS) -> str:
    """The hash from the sketch and the norm of every module."""
    norm = math.hypot(*norms.values())
    if not norm:
        return hashlib.sha256(b"0").hexdigest()[:12]
    total = sum((sketches[name] for name in sorted(sketches, key=natural_key)), torch.zeros(_PROJECTIONS).double())
    # + 0 makes 0 of −0
    rounded = [f"{norm:.{digits - 1}e}", *(f"{round(float(value), digits) + 0.0:.{digits}f}" for value in total / norm)]
    return hashlib.sha256(" ".join(rounded).encode()).hexdigest()[:12]


@functools.lru_cache(maxsize=8)
def _signs(seed: int, count: int) -> Tensor:
    """[8, count] of ±1: the bits of a stream of random numbers that numpy promises never to change."""
    words = np.random.PCG64(seed).random_raw(count)
    bits = words >> np.arange(_PROJECTIONS, dtype=np.uint64)[:, None] & np.uint64(1)
    return torch.from_numpy(1.0 - 2.0 * bits.astype(np.float64))
