"""Rules that merge by a weighted sum: the inner products of the ΔW and a weight each → a coefficient each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_lab.errors import OptionError

Gram = Callable[[], Tensor]
"""Gives the inner products [n, n] of n matrices, computed only when they are asked for."""


def task_arithmetic(gram: Gram, weights: Sequence[float], *, scale: float = 1.0) -> list[float]:
    """λ Σ wᵢ ΔWᵢ, λ = scale; weights may be negative.

    Ilharco et al. 2023, arXiv:2212.04089.
    """
    return [scale * weight for weight in weights]


def average(gram: Gram, weights: Sequence[float], *, scale: float = 1.0) -> list[float]:
    """λ Σ wᵢ ΔWᵢ / Σ wᵢ."""
    return [scale * weight for weight in normalised(weights)]


def slerp(gram: Gram, weights: Sequence[float], *, scale: float = 1.0) -> list[float]:
    """Mean direction on the sphere, at the mean norm.

    Of two it is the point of the great circle (spherical linear interpolation), of more the Karcher mean, found to
    1e-12. Where a matrix is 0, two point in opposite directions, or all cancel, it is the linear average.
    """
    if min(weights) < 0:
        raise OptionError(f"slerp has no negative weights, and {min(weights):g} was given")
    shares = torch.tensor(normalised(weights), dtype=torch.float64)
    products = gram()
    norms = products.diagonal().clamp(min=0).sqrt().double()
    used = shares > 0
    if not bool((norms[used] > 0).all()):
        return (scale * shares).tolist()
    norms = torch.where(used, norms, 1.0)
    cosines = (products.double() / norms[:, None] / norms).clamp(-1, 1)
    length = float(shares @ cosines @ shares)
    if float(cosines[used][:, used].min()) < -1 + 1e-9 or length < 1e-12:
        return (scale * shares).tolist()
    # m = Σ cᵢ ΔWᵢ/‖ΔWᵢ‖, a point of the sphere: cᵀ C c = 1 with C the cosines; only c and C are needed.
    # The Karcher mean has Σ sᵢ log_m(ΔWᵢ/‖ΔWᵢ‖) = 0, where log_m(x) = θ/sin θ (x − cos θ m) and cos θ = ⟨m, x⟩.
    point = shares / math.sqrt(length)
    # Descent on Σ ½ sᵢθᵢ²: on a sphere its second derivative is nowhere above 1, so that whole steps always go down.
    for _ in range(1000):
        angles = (cosines @ point).clamp(-1, 1).arccos()
        pull = shares * torch.where(angles > 1e-9, angles / angles.sin().clamp(min=1e-300), 1.0)
        step = pull - (pull * angles.cos()).sum() * point
        length = float((step @ cosines @ step).clamp(min=0).sqrt())
        if length < 1e-12:
            break
        point = math.cos(length) * point + math.sin(length) / length * step
        point = point / (point @ cosines @ point).sqrt()
    coefficients: list[float] = (scale * float(shares @ norms) * point / norms).tolist()
    return coefficients


def normalised(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum; OptionError where that is 0."""
    total = math.fsum(weights)
    if abs(total) < 1e-12 * max(1.0, *map(abs, weights)):
        raise OptionError(f"weights {', '.join(f'{w:g}' for w in weights)} sum to 0, so that they have no average")
    return [weight / total for weight in weights]
