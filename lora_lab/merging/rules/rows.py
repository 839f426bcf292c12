"""Matrices that are gone through in blocks of rows that stay in a processor's cache, made block by block from factors.

A ΔW of 4096 × 14336 is 235 MB; made whole, every step of a rule for single entries would wait for memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lora_lab.adapters.lowrank import LowRank

Matrix = Tensor | LowRank
"""A matrix (or a kernel, whose first dimension counts the rows), or the factors that its rows are made from."""

Matrices = Iterable[Matrix]
"""Of one shape; gone through once, so that a generator saves the memory of all of them at a time."""

_BLOCK = 1 << 17
"""Entries of a block."""
_WHOLE = 1 << 22
"""Entries below which random numbers are drawn for whole matrices, one after the other."""


def dense(matrix: Matrix) -> Tensor:
    """The matrix itself."""
    return matrix.delta() if isinstance(matrix, LowRank) else matrix


def like(matrix: Matrix) -> Tensor:
    """An empty matrix of its shape, dtype and device."""
    example = matrix.A if isinstance(matrix, LowRank) else matrix
    return torch.empty(matrix.shape, dtype=example.dtype, device=example.device)


def sides(matrix: Matrix) -> tuple[int, int]:
    """Rows and columns; a vector is one row."""
    shape = torch.Size(matrix.shape)
    return (shape[0], shape[1:].numel()) if len(shape) > 1 else (1, shape.numel())


def blocks(matrix: Matrix) -> Iterator[slice]:
    """The rows of each block."""
    rows, columns = sides(matrix)
    step = max(1, _BLOCK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def made(matrix: Matrix, rows: slice) -> Tensor:
    """These rows [rows, columns] in memory of their own."""
    if isinstance(matrix, LowRank):
        return matrix.B[rows] @ matrix.A
    return matrix.reshape(sides(matrix))[rows].clone()


class Noise:
    """Numbers in [0, 1), the same on every device: for matrices of one shape, a number an entry, by rows in order.

    For small matrices they come from one stream, matrix after matrix; a large one has a stream of its own, so that
    blocks of rows can be drawn of all matrices in turn.
    """

    def __init__(self, matrices: Sequence[Matrix], seed: int) -> None:
        rows, columns = sides(matrices[0])
        self._columns, self._drawn = columns, []
        if rows * columns < _WHOLE:
            generator = torch.Generator().manual_seed(seed)
            self._drawn = [torch.rand((rows, columns), generator=generator) for _ in matrices]
        # numpy's generator takes half of the time of torch's
        self._streams = [np.random.Generator(np.random.SFC64([seed, i])) for i, _ in enumerate(matrices)]

    def of(self, index: int, rows: slice, device: torch.device) -> Tensor:
        """The numbers of these rows of a matrix [rows, columns], which may be changed; in float32."""
        if self._drawn:
            return self._drawn[index][rows].to(device, copy=True)
        shape = (rows.stop - rows.start, self._columns)
        if self._columns % 2:  # half of a number of 64 bits is left over for the next block
            return torch.from_numpy(self._streams[index].random(shape, dtype=np.float32)).to(device)
        # the same numbers, (32 random bits >> 8) / 2²⁴, in two thirds of the time
        raw = self._streams[index].bit_generator.random_raw(shape[0] * shape[1] // 2).astype("<u8", copy=False)
        bits = torch.from_numpy(raw.view(np.int32)).view(shape).bitwise_right_shift_(8).bitwise_and_((1 << 24) - 1)
        return bits.float().mul_(2.0**-24).to(device)
