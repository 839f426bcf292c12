"""Updates that are changed before another method merges them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_lab.adapters.lowrank import Basis, LowRank
from lora_lab.errors import unknown

CALIBRATIONS = ("balanced", "raw")
"""Whose B are looked at: those of the balanced factors, which hang on no gauge, or those that were trained."""


def pico(updates: Sequence[LowRank], *, calibration: str = "balanced") -> list[LowRank]:
    """Merged by `inner` once output directions that many share are scaled down.

    Tang & Yang 2026, arXiv:2604.16826. With [B₁ … B_T] = U Σ Vᵀ and shareⱼ = σⱼ² / Σσ², direction uⱼ of every Bₜ is
    multiplied by αⱼ = 1 / (1 + (T − 1) shareⱼ); the merged ΔW is brought to the mean of the ‖wₜΔWₜ‖ as they were
    before, so that `scale` of the inner method counts for nothing. Nothing is to be tuned. How large a Bₜ is beside
    its Aₜ hangs on the gauge: with `calibration` raw they are those that were trained, as in the paper; balanced takes
    U√S of ΔWₜ = U S Vᵀ (ours). A single adapter comes out as it is. T counts those that change the module.
    """
    if calibration not in CALIBRATIONS:
        raise unknown("calibration", calibration, CALIBRATIONS)
    wide = [LowRank(update.A.double(), update.B.double(), update.shape) for update in updates]
    if calibration == "balanced":
        wide = [update.balanced() for update in wide]
    basis = Basis(torch.cat([update.B for update in wide], dim=1))
    left, sizes, _ = torch.linalg.svd(basis.R, full_matrices=False)
    energy = sizes.square()
    if not float(energy.sum()):
        return list(updates)
    U = basis.times(left)
    less = 1 / (1 + (len(updates) - 1) * energy / energy.sum()) - 1  # αⱼ − 1
    calibrated = []
    for before, update in zip(updates, wide, strict=True):
        B = update.B + U @ (less[:, None] * (U.T @ update.B))  # B + U diag(α − 1) Uᵀ B
        calibrated.append(LowRank(update.A.to(before.A.dtype), B.to(before.A.dtype), before.shape))
    return calibrated
