"""Rules that merge matrices of one shape, entry by entry: matrices and a weight each → a matrix.

They merge ΔW itself, one module at a time, and the small matrices of KnOTS and core space (subspaces.py) alike; of
matrices given by their factors, a block of rows at a time. Everything random comes from `seed`. A weight scales its
matrix before anything else happens; the methods that take means divide by the weights again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_lab.adapters.lowrank import is_finite
from lora_lab.errors import MismatchError, OptionError, unknown
from lora_lab.merging.rules.election import Election
from lora_lab.merging.rules.rows import Matrices, Matrix, Noise, blocks, dense, like, made, sides
from lora_lab.merging.rules.trimming import Cut, check_share, cuts, cuts_of

SCOPES = ("global", "module")
"""Among what the largest entries are sought: all modules of an adapter, or each by itself."""

Keep = Callable[[Tensor, slice], Tensor]
"""Function (rows of a matrix, which may be changed, and which rows they are) → what stays of them."""


def checked(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A rule for whole matrices that raises MismatchError where a matrix or the result is not finite.

    Signs and masks would turn a NaN into 0 and nobody would know. Factors are multiplied for it.
    """
    return _checked(rule, dense)


def checked_rows(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As `checked`, for a rule that goes through its matrices by rows and takes factors as they are."""
    return _checked(rule, lambda matrix: matrix)


def _checked(rule: Callable[..., Tensor], given: Callable[[Matrix], Matrix]) -> Callable[..., Tensor]:
    @functools.wraps(rule)
    def finite_rule(stack: Matrices, weights: Sequence[float], *cuts: Sequence[Cut], **options: Any) -> Tensor:
        return finite(rule((finite(given(matrix)) for matrix in stack), weights, *cuts, **options))  # type: ignore[return-value]

    return finite_rule


def finite(matrix: Matrix) -> Matrix:
    """The matrix; MismatchError where it is not finite."""
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
    matrices = list(stack)
    return scale * _sum(matrices, _trims(matrices, density, scope, cuts), weights)


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
    matrices = list(stack)
    return scale * _elected_mean(matrices, _trims(matrices, density, scope, cuts), weights)


def dare(
    stack: Matrices, weights: Sequence[float], *, density: float = 0.5, scale: float = 1.0, seed: int = 0
) -> Tensor:
    """Sum of randomly thinned ΔW, rescaled by 1/density.

    Entries stay with probability `density` and are divided by it (Yu et al. 2023, arXiv:2311.03099). Its mean over
    seeds is task arithmetic.
    """
    matrices = list(stack)
    return scale * _sum(matrices, _thinnings(matrices, density, seed), weights)


def dare_ties(
    stack: Matrices, weights: Sequence[float], *, density: float = 0.5, scale: float = 1.0, seed: int = 0
) -> Tensor:
    """Randomly thinned as in dare, then elected and averaged as in ties."""
    matrices = list(stack)
    return scale * _elected_mean(matrices, _thinnings(matrices, density, seed), weights)


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
    check_share("density", density)
    low, high = density - window / 2, density + window / 2
    if not (window >= 0 and low > 0 and high <= 1 + 1e-9):
        raise OptionError(
            f"density {density:g} with window {window:g} gives chances from {low:g} to {high:g}; "
            "they must be above 0 and up to 1"
        )
    matrices = list(stack)
    noise = Noise(matrices, seed)
    by_size = _BySize()

    def magpruned(i: int, rows: Tensor, which: slice) -> Tensor:
        columns = rows.shape[1]
        # pᵢ = density − window/2 + window · rankᵢ / (n − 1), rank 0 the smallest of a row of n
        by_rank = low + window * torch.arange(columns, dtype=rows.dtype, device=rows.device) / max(1, columns - 1)
        chance = torch.empty_like(rows).scatter_(1, by_size(rows), by_rank.expand_as(rows))
        stays = noise.of(i, which, rows.device).neg_().add_(chance).sign_().relu_()
        return rows.mul_(stays).div_(chance)

    keeps = [functools.partial(magpruned, i) for i in range(len(matrices))]
    return scale * _elected_mean(matrices, keeps, weights)


def breadcrumbs(
    stack: Matrices, weights: Sequence[float], *, density: float = 0.9, gamma: float = 0.01, scale: float = 1.0
) -> Tensor:
    """Sum without the very largest (gamma) and the smallest entries; density stays.

    Davari & Belilovsky 2023, arXiv:2312.06795.
    """
    check_share("density", density)
    if not 0 <= gamma <= 1 - density + 1e-9:
        raise OptionError(f"gamma is {gamma:g}; with density {density:g} it must be from 0 to {1 - density:g}")

    matrices = list(stack)
    keeps = []
    for matrix in matrices:
        entries = math.prod(sides(matrix))
        top = round(gamma * entries)
        without, within = _cuts_of(matrix, top, min(entries, top + max(1, round(density * entries))))
        keeps.append(functools.partial(_between, without, within))
    return scale * _sum(matrices, keeps, weights)


def _between(without: Cut | None, within: Cut, rows: Tensor, which: slice) -> Tensor:
    """The entries within one cut, and without those of a narrower one."""
    return within.keep(rows) if without is None else within.keep(rows).sub_(without.keep(rows))


def _cuts_of(matrix: Matrix, few: int, many: int) -> tuple[Cut | None, Cut]:
    """Where the few and the many largest entries of a matrix end, in one pass for both; None where few are none."""
    counts = {1: many, 0: few} if few else {1: many}
    found = cuts(lambda: [dict.fromkeys(counts, matrix)], lambda i, total: counts[i], like(matrix).dtype)
    return found.get(0), found[1]


def _trims(matrices: Sequence[Matrix], density: float, scope: str, cuts: Sequence[Cut] | None) -> list[Keep]:
    """What leaves the largest entries alone; `cuts` know where they end where they are those of a whole adapter."""
    check_share("density", density)
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    if cuts is None:
        cuts = [cuts_of(lambda m=matrix: [{0: m}], density, like(matrix).dtype)[0] for matrix in matrices]  # type: ignore[misc]
    return [lambda rows, which, cut=cut: cut.keep(rows) for cut in cuts]  # type: ignore[misc]


def _thinnings(matrices: Sequence[Matrix], density: float, seed: int) -> list[Keep]:
    """What drops entries by chance and divides the others by the share that stays."""
    check_share("density", density)
    noise = Noise(matrices, seed)

    def thinned(i: int, rows: Tensor, which: slice) -> Tensor:
        stays = noise.of(i, which, rows.device).neg_().add_(density).sign_().relu_()  # 1 where the number is below
        return rows.mul_(stays).div_(density)

    return [functools.partial(thinned, i) for i in range(len(matrices))]


class _BySize:
    """Function (rows) → the columns of each by their size there, the smallest first; of equal sizes, the first.

    What it gives lasts until the next call, which uses its memory.
    """

    def __init__(self) -> None:
        self._keys = torch.empty((0, 0), dtype=torch.int64)

    def __call__(self, rows: Tensor) -> Tensor:
        columns = rows.shape[1]
        places = columns.bit_length()
        if rows.dtype != torch.float32 or rows.device.type != "cpu" or places > 32:
            return rows.abs().argsort(dim=1, stable=True)
        if self._keys.shape[1] != columns or len(self._keys) < len(rows):
            self._keys = torch.empty(rows.shape, dtype=torch.int64)
        # one sort of integers: the bits of the size, which order sizes, and behind them the column
        keys = self._keys[: len(rows)].copy_(rows.view(torch.int32)).bitwise_and_(0x7FFFFFFF)
        keys.bitwise_left_shift_(places).bitwise_or_(torch.arange(columns))
        keys.numpy().sort(axis=1)  # numpy's takes a twentieth of the time of torch's
        return keys.bitwise_and_((1 << places) - 1)


def _sum(matrices: Sequence[Matrix], keeps: Sequence[Keep], weights: Sequence[float]) -> Tensor:
    """Σ wᵢTᵢ of what stays of each."""
    merged = like(matrices[0])
    flat = merged.view(sides(matrices[0]))
    for rows in blocks(matrices[0]):
        for i, (matrix, keep, weight) in enumerate(zip(matrices, keeps, weights, strict=True)):
            part = keep(made(matrix, rows), rows)
            flat[rows] = part.mul_(weight) if i == 0 else flat[rows].add_(part, alpha=weight)
    return merged


def _elected_mean(matrices: Sequence[Matrix], keeps: Sequence[Keep], weights: Sequence[float]) -> Tensor:
    """Σ wᵢTᵢ / Σ |wᵢ| over the i whose wᵢTᵢ has the elected sign, of what stays of each; 0 where there is none."""
    merged = like(matrices[0])
    flat, election = merged.view(sides(matrices[0])), Election(weights)
    for rows in blocks(matrices[0]):
        parts = [keep(made(matrix, rows), rows) for matrix, keep in zip(matrices, keeps, strict=True)]
        flat[rows] = election.held(parts, rows.start * flat.shape[1])
    election.decide(flat.view(-1))
    return merged
