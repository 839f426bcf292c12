"""Merges that undo what the sum of several ΔW does on each other's inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import OptionError
from lora_lab.merging.rules.subspaces import core_space


def wudi(
    updates: Sequence[LowRank],
    weights: Sequence[float],
    *,
    steps: int | None = None,
    rate: float = 1.0,
    ridge: float = 0.1,
    scale: float = 1.0,
) -> LowRank:
    """The W nearest to each ΔW on the inputs which that one reads, or some steps towards it.

    Cheng et al. 2025, arXiv:2503.08099: min over W of Σ ‖(W − ΔWₜ)ΔWₜᵀ‖² / ‖ΔWₜ‖², from the sum of the ΔWₜ, each times
    its weight. Without `steps` its minimum, where `ridge`, times the mean eigenvalue of H = Σ ΔWₜᵀΔWₜ/‖ΔWₜ‖², holds
    directions that hardly any ΔW reads at their sum, as it must where the Aₜ are nearly the same; at ridge 0 and with
    independent row spaces it is [ΔW₁A₁ᵀ …][A Aᵀ]⁻¹A, A all Aₜ below each other. With `steps`, so many steps of gradient
    descent from the sum instead, each of `rate` times the inverse of H's largest eigenvalue. The authors' 300 steps of
    Adam on dense entries stop early, too, but hang on the basis and leave the rows' span, as ours do not.
    """
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 0):
        raise OptionError(f"steps is {steps}; a whole number of at least 0 is needed")
    if not 0 < rate < 2:
        raise OptionError(f"rate is {rate:g}; a number above 0 and below 2 is needed")
    if not ridge >= 0:
        raise OptionError(f"ridge is {ridge:g}; a number of at least 0 is needed")
    shared = core_space([update * weight for update, weight in zip(updates, weights, strict=True)])
    cores = torch.stack(shared.cores)  # Mₜ = Uᵀ wₜΔWₜ V
    total = cores.sum(0)
    sizes = cores.square().sum((1, 2))
    shares = torch.where(sizes > 0, 1 / sizes, 0.0)
    grams = cores.mT @ cores * shares[:, None, None]
    h, Q = torch.linalg.eigh(grams.sum(0))
    if not len(h) or not float(h.max()) > 0:
        return scale * shared.back(total)
    # −½ the gradient at the sum S: Σ (Mₜ − S) MₜᵀMₜ / ‖Mₜ‖²
    slope = ((cores - total) @ grams).sum(0)
    if steps is None:
        factors = 1 / (h + ridge * h.mean())
    else:  # Σ (1 − ηh)^i over the steps i, η = rate / max h
        eta = rate / h.max()
        factors = torch.where(h > 1e-12 * h.max(), (1 - (1 - eta * h) ** steps) / h, eta * steps)
    return scale * shared.back(total + slope @ (Q * factors) @ Q.T)
