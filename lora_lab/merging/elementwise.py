"""Rules that merge matrices of one shape, entry by entry or as a sum: matrices and a weight each → a matrix.

They merge ΔW itself, one module at a time, and the small matrices of KnOTS and core space (subspaces.py) alike.
Everything random comes from `seed`. A weight scales its matrix before anything else happens; the methods that take
means divide by the weights again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_lab.adapters.lowrank import is_finite
from lora_lab.brief import Brief
from lora_lab.errors import MismatchError, OptionError, unknown

Matrices = Iterable[Tensor]
"""Of one shape; gone through once, so that a generator saves the memory of all of them at a time."""

Gram = Callable[[], Tensor]
"""Gives the inner products [n, n] of n matrices, computed only when they are asked for."""

# sums: coefficients of the matrices, from their inner products alone


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


# entry by entry


def checked(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A rule that raises MismatchError where a matrix or the result is not finite.

    Signs and masks would turn a NaN into 0 and nobody would know.
    """

    @functools.wraps(rule)
    def finite_rule(stack: Matrices, weights: Sequence[float], *cuts: Sequence[Cut], **options: Any) -> Tensor:
        return _finite(rule(map(_finite, stack), weights, *cuts, **options))

    return finite_rule


def _finite(matrix: Tensor) -> Tensor:
    if not is_finite(matrix):
        raise MismatchError("ΔW is not finite: an adapter, a weight or an option is too large for it")
    return matrix


def magnitude(
    stack: Matrices,
    weights: Sequence[float],
    cuts: Sequence[Cut] | None = None,
    *,
    density: float = 0.2,
    scope: str = "global",
    scale: float = 1.0,
) -> Tensor:
    """Sum of the largest entries of each, a share of `density`.

    `scope` as in ties.
    """
    return scale * _sum(_trimmed(stack, density, scope, cuts), weights)


def ties(
    stack: Matrices,
    weights: Sequence[float],
    cuts: Sequence[Cut] | None = None,
    *,
    density: float = 0.2,
    scope: str = "global",
    scale: float = 1.0,
) -> Tensor:
    """Trim to the largest entries, elect signs, average what agrees.

    Yadav et al. 2023, arXiv:2306.01708, Alg. 1. Every adapter keeps the share `density` of its largest entries (of
    entries that tie, the first): of all its modules together, as the paper does (`scope` global; of matrices given
    alone, of each), or the same share in every module (`module`, as PEFT and mergekit do). The elected sign is that of
    the weighted sum; where the sum is 0 it is the majority of all elected signs of the module (of the whole vector in
    the original code). Weights, which the paper has not, enter the election and the mean, not the trimming.
    """
    return scale * _elected_mean(list(_trimmed(stack, density, scope, cuts)), weights)


def dare(
    stack: Matrices, weights: Sequence[float], *, density: float = 0.5, scale: float = 1.0, seed: int = 0
) -> Tensor:
    """Sum of randomly thinned ΔW, rescaled by 1/density.

    Entries stay with probability `density` and are divided by it (Yu et al. 2023, arXiv:2311.03099). Its mean over
    seeds is task arithmetic.
    """
    _check_share("density", density)
    return scale * _sum(_thinned(stack, density, seed), weights)


def dare_ties(
    stack: Matrices, weights: Sequence[float], *, density: float = 0.5, scale: float = 1.0, seed: int = 0
) -> Tensor:
    """Randomly thinned as in dare, then elected and averaged as in ties."""
    _check_share("density", density)
    return scale * _elected_mean(list(_thinned(stack, density, seed)), weights)


def della(
    stack: Matrices,
    weights: Sequence[float],
    *,
    density: float = 0.5,
    window: float = 0.2,
    scale: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Thinned by the rank of magnitude, then elected and averaged as in ties.

    Deep et al. 2024, arXiv:2406.11617. Within every row an entry's chance to stay rises with the rank of its size,
    from density − window/2 to density + window/2; what stays is divided by its chance.
    """
    _check_share("density", density)
    low, high = density - window / 2, density + window / 2
    if not (window >= 0 and low > 0 and high <= 1 + 1e-9):
        raise OptionError(
            f"density {density:g} with window {window:g} gives chances from {low:g} to {high:g}; "
            "they must be above 0 and up to 1"
        )
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for matrix in stack:
        rows = matrix.flatten(1) if matrix.ndim > 1 else matrix  # of a kernel, too, a row is an output
        # pᵢ = density − window/2 + window · rankᵢ / (n − 1), rank 0 the smallest of a row of n
        order = rows.abs().argsort(dim=-1, stable=True).argsort(dim=-1)
        chance = (low + window * order.to(matrix.dtype) / max(1, rows.shape[-1] - 1)).reshape(matrix.shape)
        kept.append(torch.where(_uniform(matrix, generator) < chance, matrix / chance, 0.0))
    return scale * _elected_mean(kept, weights)


def breadcrumbs(
    stack: Matrices, weights: Sequence[float], *, density: float = 0.9, gamma: float = 0.01, scale: float = 1.0
) -> Tensor:
    """Sum without the very largest (gamma) and the smallest entries; density stays.

    Davari & Belilovsky 2023, arXiv:2312.06795.
    """
    _check_share("density", density)
    if not 0 <= gamma <= 1 - density + 1e-9:
        raise OptionError(f"gamma is {gamma:g}; with density {density:g} it must be from 0 to {1 - density:g}")

    def inside(matrix: Tensor) -> Tensor:
        top = round(gamma * matrix.numel())
        return matrix * (_largest(matrix, top + _count(density, matrix)) & ~_largest(matrix, top))

    return scale * _sum((inside(matrix) for matrix in stack), weights)


def summed(coefficients: Callable[..., list[float]]) -> Callable[..., Tensor]:
    """Coefficients of a sum as a rule for matrices."""

    @functools.wraps(coefficients)
    def rule(stack: Matrices, weights: Sequence[float], **options: Any) -> Tensor:
        matrices = list(stack)

        def gram() -> Tensor:
            flat = torch.stack([matrix.flatten() for matrix in matrices]).double()
            return flat @ flat.T

        return _sum(matrices, coefficients(gram, weights, **options))

    return checked(rule)


def normalised(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum; OptionError where that is 0."""
    total = math.fsum(weights)
    if abs(total) < 1e-12 * max(1.0, *map(abs, weights)):
        raise OptionError(f"weights {', '.join(f'{w:g}' for w in weights)} sum to 0, so that they have no average")
    return [weight / total for weight in weights]


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise OptionError(f"{name} is {value:g}; a share above 0 and up to 1 is needed")


def _count(density: float, matrix: Tensor) -> int:
    return max(1, round(density * matrix.numel()))


def _largest(matrix: Tensor, count: int) -> Tensor:
    """Mask of the `count` entries of largest size; of those that tie at the threshold, the first in order."""
    size = matrix.abs().flatten()
    if count >= size.numel():
        return torch.ones_like(matrix, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(matrix, dtype=torch.bool)
    threshold = size.kthvalue(size.numel() - count + 1).values
    mask = size > threshold
    mask[(size == threshold).nonzero()[: count - int(mask.sum()), 0]] = True
    return mask.reshape(matrix.shape)


def _trimmed(stack: Matrices, density: float, scope: str, cuts: Sequence[Cut] | None) -> Iterator[Tensor]:
    """The matrices without all but their largest entries, which `cuts` know where they are those of a whole adapter."""
    _check_share("density", density)
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    if cuts is None:
        return (matrix * _largest(matrix, _count(density, matrix)) for matrix in stack)
    return (matrix * cut.mask(matrix) for matrix, cut in zip(stack, cuts, strict=True))


SCOPES = ("global", "module")
"""Among what the largest entries are sought: all modules of an adapter, or each by itself."""


@dataclass(repr=False)
class Cut(Brief):
    """The largest entries of a vector that comes in pieces: all above a size, and the first few of that very size."""

    size: Tensor
    first: int
    """How many entries of exactly this size are still to come."""

    def mask(self, matrix: Tensor) -> Tensor:
        """Where the next piece has them; the pieces are to come in the order in which they were counted."""
        sizes = matrix.abs().flatten().to(self.size.dtype)
        mask = sizes > self.size
        equal = (sizes == self.size).nonzero()[: self.first, 0]
        mask[equal] = True
        self.first -= len(equal)
        return mask.reshape(matrix.shape)


NO_ENTRY = Cut(torch.tensor(math.inf), 0)
"""Of a vector without any entry."""


def cuts_of(pieces: Callable[[], Iterable[Mapping[int, Tensor]]], density: float, dtype: torch.dtype) -> dict[int, Cut]:
    """Number of a vector → where the share `density` of its largest entries ends, exact; no vector is ever held.

    `pieces` goes through the vectors again and again, as number → next piece: twice in float32, three times in
    float64. Sizes are sorted by the bits of their floating-point numbers, the leading bits first.
    """
    _check_share("density", density)
    integer, rounds = _BITS[dtype]
    leading: dict[int, int] = {}  # the bits of the size at the end of the share that are known so far
    left: dict[int, int] = {}  # entries of the share that are still to be found among those of these bits
    for shift, width in rounds:
        counts: dict[int, Tensor] = {}
        for piece in pieces():
            for i, matrix in piece.items():
                bits = matrix.abs().to(dtype).flatten().view(integer)
                if i in leading:
                    bits = bits[bits >> (shift + width) == leading[i]]
                counted = torch.bincount((bits >> shift) & ((1 << width) - 1), minlength=1 << width)
                counts[i] = counts[i] + counted if i in counts else counted
        for i, counted in counts.items():
            left.setdefault(i, max(1, round(density * int(counted.sum()))))
            # the bin in which the share ends: the largest with as many entries in it and above as are left
            above = counted.flip(0).cumsum(0)
            larger = int((above < left[i]).sum())  # bins of larger sizes, all of which stay
            left[i] -= int(above[larger - 1]) if larger else 0
            leading[i] = leading.get(i, 0) << width | len(counted) - 1 - larger
    return {i: Cut(torch.tensor(bits, dtype=integer).view(dtype), left[i]) for i, bits in leading.items()}


# Of a size, bits without the sign: the leading ones, then the next: (shift, width).
_BITS = {
    torch.float32: (torch.int32, ((15, 16), (0, 15))),
    torch.float64: (torch.int64, ((42, 21), (21, 21), (0, 21))),
}


def _sum(matrices: Matrices, weights: Sequence[float]) -> Tensor:
    total = torch.zeros(())
    for i, (matrix, weight) in enumerate(zip(matrices, weights, strict=True)):
        total = matrix * weight if i == 0 else total.add_(matrix, alpha=weight)
    return total


def _elected_mean(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ wᵢTᵢ / Σ |wᵢ| over the i whose wᵢTᵢ has the elected sign; 0 where there is none."""
    merged = _finite(_sum(matrices, weights)).sign_().contiguous()
    merged.masked_fill_(merged == 0, float(merged.sum(dtype=torch.float64).sign()))
    flat = merged.view(-1)
    parts = [matrix.reshape(-1) for matrix in matrices]
    for start in range(0, len(flat), _CHUNK):  # in pieces that stay in the cache
        chunk = slice(start, start + _CHUNK)
        total, divisor = torch.zeros_like(flat[chunk]), torch.zeros_like(flat[chunk])
        for part, weight in zip(parts, weights, strict=True):
            weighted = part[chunk] * weight
            agrees = (weighted * flat[chunk]) > 0
            total += weighted * agrees
            divisor.add_(agrees, alpha=abs(weight))
        flat[chunk] = torch.where(divisor > 0, total / divisor, 0.0)
    return merged


_CHUNK = 1 << 17


def _thinned(stack: Matrices, density: float, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for matrix in stack:
        yield torch.where(_uniform(matrix, generator) < density, matrix / density, 0.0)


def _uniform(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """One number in [0, 1) an entry, the same ones on every device."""
    return torch.rand(matrix.shape, generator=generator, dtype=torch.float32).to(matrix.device)
