"""The largest entries of vectors that are never held: where they end, exactly, in one pass and a sample as a rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from lora_lab.adapters.lowrank import LowRank
from lora_lab.brief import Brief
from lora_lab.errors import OptionError
from lora_lab.merging.rules.rows import Matrix, blocks, made, sides

Pieces = Callable[[], Iterable[Mapping[int, Matrix]]]
"""Goes through vectors, again and again: number of a vector → its next piece."""


@dataclass(repr=False)
class Cut(Brief):
    """The largest entries of a vector that comes in pieces: all above a size, and the first few of that very size."""

    size: Tensor
    first: int = 0
    """How many entries of exactly this size are still to come."""

    def keep(self, piece: Tensor) -> Tensor:
        """The next piece, in the order in which it was counted, with 0 in place of all other entries."""
        wide = piece.to(self.size.dtype)
        kept: Tensor = hardshrink(wide, float(self.size))
        if self.first:
            equal = (wide.abs() == self.size).flatten().nonzero()[: self.first, 0]
            kept.view(-1)[equal] = wide.reshape(-1)[equal]
            self.first -= len(equal)
        return kept.to(piece.dtype)


NO_ENTRY = Cut(torch.tensor(math.inf))
"""Of a vector without any entry."""


def cuts_of(pieces: Pieces, density: float, dtype: torch.dtype) -> dict[int, Cut]:
    """Number of a vector → where the share `density` of its largest entries ends, exact; no vector is ever held."""
    check_share("density", density)
    return cuts(pieces, lambda _, total: max(1, round(density * total)), dtype)


def cuts(pieces: Pieces, count: Callable[[int, int], int], dtype: torch.dtype) -> dict[int, Cut]:
    """Number of a vector → where its largest entries end: `count`(its number, its entries in all) of them, at least 1.

    A sample of rows tells about what size the last of them has. One pass (in float64 some more) then counts the larger
    entries and sorts those near by the bits of their floating-point numbers, which order sizes.
    """
    totals, sampled, margins = _leading(pieces, dtype, sample=True)
    wanted = {i: count(i, total) for i, total in totals.items() if total}
    ranges = {i: _near(sampled[i], wanted[i] / totals[i], margins[i], dtype) for i in wanted}
    bins = {i: min(_BINS, max(_FEWEST_BINS, 16 * totals[i])) for i in wanted}
    found = _exactly(pieces, ranges, wanted, bins, dtype)
    if len(found) < len(wanted):  # rows unlike all others
        _, all_of_it, _ = _leading(pieces, dtype, sample=False)
        ranges = {i: _near(all_of_it[i], wanted[i] / totals[i], _MARGIN, dtype) for i in wanted if i not in found}
        found |= _exactly(pieces, ranges, wanted, bins, dtype)
    return {i: found.get(i, NO_ENTRY) for i in totals}


def check_share(name: str, value: float) -> None:
    """OptionError unless it is above 0 and at most 1."""
    if not 0 < value <= 1:
        raise OptionError(f"{name} is {value:g}; a share above 0 and up to 1 is needed")


_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
_SAMPLED_FROM = 1 << 20
"""Entries of a piece from which a sample of its rows will do."""
_EVERY = 16
_MARGIN = 0.003
"""Least share of the entries on either side of what the sample says, among which the end is looked for."""
_BINS = 1 << 21
"""In which sizes near the end are counted at a time; fewer where they would cost more than another pass."""
_FEWEST_BINS = 1 << 12
_BUFFERED = 1 << 20


def _bits(block: Tensor, dtype: torch.dtype) -> Tensor:
    """The sizes of a block's entries as integers of the same order, flat; the block is used up."""
    return block.to(dtype).abs_().flatten().view(_INTEGERS[dtype])


def _lead(dtype: torch.dtype) -> int:
    """Bits of a size behind the leading sixteen."""
    return 8 * dtype.itemsize - 17


def _leading(
    pieces: Pieces, dtype: torch.dtype, *, sample: bool
) -> tuple[dict[int, int], dict[int, Tensor], dict[int, float]]:
    """Entries of each vector in all, how many of them, or of a sample, have which leading bits, and its margin."""
    totals: dict[int, int] = {}
    counts: dict[int, Tensor] = {}
    rows_seen: dict[int, int] = {}
    for piece in pieces():
        for i, matrix in piece.items():
            entries = math.prod(sides(matrix))
            totals[i] = totals.get(i, 0) + entries
            few = _thinned(matrix) if sample and entries >= _SAMPLED_FROM else matrix
            rows_seen[i] = rows_seen.get(i, 0) + sides(few)[0]
            for rows in blocks(few):
                counted = torch.bincount(_bits(made(few, rows), dtype) >> _lead(dtype), minlength=1 << 16)
                counts[i] = counts[i] + counted if i in counts else counted
    # entries of a row are alike: of shares that differ by a tenth between rows, a mean is known to 0.1/√rows
    return totals, counts, {i: max(_MARGIN, 0.4 * seen**-0.5) for i, seen in rows_seen.items() if seen}


def _thinned(matrix: Matrix) -> Matrix:
    """Every sixteenth row."""
    if isinstance(matrix, LowRank):
        return LowRank(matrix.A, matrix.B[::_EVERY])
    return matrix.reshape(sides(matrix))[::_EVERY]


def _near(counts: Tensor, share: float, margin: float, dtype: torch.dtype) -> tuple[int, int]:
    """From which size to below which one, as bits, the end of the largest entries of this share must lie."""
    above = counts.flip(0).cumsum(0)  # entries of at least the leading bits 65535, 65534 …
    total = int(above[-1])
    first = int((above <= (share - margin) * total).sum())
    last = min(int((above < (share + margin) * total).sum()), len(above) - 1)
    return (65535 - last) << _lead(dtype), (65536 - first) << _lead(dtype)


def _exactly(
    pieces: Pieces,
    ranges: Mapping[int, tuple[int, int]],
    wanted: Mapping[int, int],
    bins: Mapping[int, int],
    dtype: torch.dtype,
) -> dict[int, Cut]:
    """The cuts of the vectors whose end lies in its range, counted in so many bins; the others are left out."""
    left, open_ranges, found = dict(wanted), dict(ranges), {}
    while open_ranges:
        shifts = {i: max(0, math.ceil(math.log2((high - low) / bins[i]))) for i, (low, high) in open_ranges.items()}
        counted = _counted(pieces, open_ranges, shifts, dtype)
        narrower = {}
        for i, (low, high) in open_ranges.items():
            above, inside = counted[i]
            missing = left[i] - (above if high == ranges[i][1] and low == ranges[i][0] else 0)
            if not 0 < missing <= int(inside.sum()):
                continue
            reached = inside.flip(0).cumsum(0)  # entries in the last bin, in the last two …
            larger = int((reached < missing).sum())
            place = len(inside) - 1 - larger
            left[i] = missing - (int(reached[larger - 1]) if larger else 0)
            begin = low + (place << shifts[i])
            if shifts[i]:
                narrower[i] = (begin, min(high, begin + (1 << shifts[i])))
            else:
                # where all entries of this size stay, it is a cut just below it
                whole = left[i] == int(inside[place])
                size = torch.tensor(max(0, begin - whole), dtype=_INTEGERS[dtype]).view(dtype)
                found[i] = Cut(size, 0 if whole else left[i])
        open_ranges = narrower
    return found


def _counted(
    pieces: Pieces, ranges: Mapping[int, tuple[int, int]], shifts: Mapping[int, int], dtype: torch.dtype
) -> dict[int, tuple[int, Tensor]]:
    """For each vector, how many entries are above its range, and how many in each bin of the range."""
    above = dict.fromkeys(ranges, 0)
    bins = {i: torch.zeros(((high - low - 1) >> shifts[i]) + 1, dtype=torch.int64) for i, (low, high) in ranges.items()}
    buffers: dict[int, list[Tensor]] = {i: [] for i in ranges}
    buffered = dict.fromkeys(ranges, 0)

    def empty(i: int) -> None:
        if buffers[i]:
            places = (torch.cat(buffers[i]).long() - ranges[i][0]) >> shifts[i]
            bins[i] += torch.bincount(places, minlength=len(bins[i])).cpu()
            buffers[i].clear()
            buffered[i] = 0

    for piece in pieces():
        of_one: dict[int, list[int]] = {}  # vectors with the same matrix, whose rows are made once
        for i in ranges.keys() & piece.keys():
            of_one.setdefault(id(piece[i]), []).append(i)
        for alike in of_one.values():
            matrix = piece[alike[0]]
            for rows in blocks(matrix):
                bits = _bits(made(matrix, rows), dtype)
                for i in alike:
                    larger, near = _split(bits, *ranges[i])
                    above[i] += larger
                    buffers[i].append(near)
                    buffered[i] += near.numel()
                    if buffered[i] >= _BUFFERED:
                        empty(i)
    for i in ranges:
        empty(i)
    return {i: (above[i], bins[i]) for i in ranges}


def _split(bits: Tensor, low: int, high: int) -> tuple[int, Tensor]:
    """How many are at least `high`, and those from `low` to below it."""
    if bits.device.type != "cpu":
        larger = bits >= high
        return int(larger.sum()), bits[(bits >= low) & ~larger]
    plain = bits.numpy()  # whose comparisons take a tenth of the time of torch's
    above, near = plain >= high, plain >= low
    np.not_equal(near, above, out=near)
    return int(np.count_nonzero(above)), torch.from_numpy(plain[np.flatnonzero(near)])
