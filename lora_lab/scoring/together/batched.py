"""Many variants of one adapted model in one forward pass, each on rows of its own.

A batch is repeated for K variants, and what every adapted module adds to a row is multiplied by the gate that it has
in that row's variant (see `RowGates`); rows that are equal up to a block go through it once (see `Branches`). A first
pass is checked against passes over single variants, so that a model in which rows touch each other, or one that draws
numbers, is scored one variant after another. A gate of 0 or 1 changes no bit of a row, but a kernel may round a
matrix of more rows otherwise: scores are those of single passes bit for bit or up to rounding, as the kernels have it.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_lab.errors import LoraLabWarning
from lora_lab.scoring.execution import Batching
from lora_lab.scoring.layout import Judge, Layout, Variant
from lora_lab.scoring.remembering import calling
from lora_lab.scoring.together.branches import Branches
from lora_lab.scoring.together.rows import ApartError, RowGates
from lora_lab.tasks.task import Scores

Alone = Callable[[Variant, Mapping[str, Tensor], Judge], Scores]
"""Scores one variant on a batch, without gates."""

_LEAST, _MOST = 4, 64
"""Variants in the pass that is tried; and a pass at first, and at the most, where nobody has said how many."""
_SHARE = 0.7  # of the free memory


@dataclass
class Size:
    """How many variants go through a pass together: as asked, or doubled as long as each then takes less time."""

    asked: int | None
    most: int
    """That there is room for."""
    alone: float = float("inf")
    """Seconds that a piece of work takes in a pass over one variant."""
    _rates: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.now = self.asked or min(_LEAST, self.most)

    def took(self, count: int, seconds: float, work: int) -> None:
        """A pass over `count` took so long for so much work; two passes of a size are timed before the next."""
        if self.asked or count < self.now:
            return
        rates = self._rates.setdefault(count, [])
        rates.append(seconds / work)
        if len(rates) == 2:
            before = self._rates.get(count // 2, [self.alone])
            self._settle(count, better=min(rates) < 0.9 * min(before))

    def _settle(self, count: int, *, better: bool) -> None:
        if better and 2 * count <= min(self.most, _MOST):
            self.now = 2 * count
        elif not better and count > _LEAST:
            self.now = count // 2
            self.asked = self.now  # settled
        elif not better and min(self._rates[count]) > self.alone:
            raise ApartError(f"{count} at once take no less time each than one after another")

    def halve(self) -> None:
        """There is less room than was thought."""
        if self.now < 2:
            raise ApartError("there is no memory for two at once")
        self.now = self.most = self.now // 2
        self.asked = self.asked and self.now


class Together:
    """Scores variants of a model, several a pass; what it has learnt of the model counts for all runs.

    `alone` scores one of them. Blocks share what they can, but not in compiled passes, whose shapes never change.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, Any], layout: Layout, blocks: Sequence[nn.Module], alone: Alone
    ) -> None:
        self._model, self._layers, self._layout, self._blocks = model, layers, layout, blocks
        self._score_alone = alone
        self.computed = 0
        """Block evaluations so far, each of one variant on one batch."""
        self._ready = False
        """Whether the gates are there, and have been tried."""
        self._gates: RowGates
        self._branches: Branches
        self._size: Size
        self._compiled: Any = None

    def run(
        self,
        variants: Sequence[Variant],
        batches: Sequence[Mapping[str, Tensor]],
        judge: Judge,
        batching: Batching,
        *,
        share: bool,
    ) -> Generator[Scores]:
        """Scores over all batches of these variants, in their order.

        ApartError, before or after any of them, where they cannot go together.
        """
        self._judge, self._share = judge, share and not batching.compile
        self._ready = self._ready and self._gates.cover(variants)
        if not self._ready:
            self._gates, self._compiled = RowGates(self._layers, variants), None
            self._branches = Branches(self._layout, self._gates)
        with self._gates.placed(), calling(self._model, self._blocks if self._share else [], self._branches):
            tried = [] if self._ready else self._tried(variants, batches[0], batching)
            self._ready, done = True, 0
            while done < len(variants):
                chunk = variants[done : done + (len(tried) or self._size.now)]
                try:
                    found = [tried or self._chunk(chunk, batches[0], pad=bool(batching.compile))]
                    found += [self._chunk(chunk, batch, pad=bool(batching.compile)) for batch in batches[1:]]
                except torch.OutOfMemoryError:
                    self._size.halve()
                    self._gates.reserve(self._size.now)
                    tried = []
                    continue
                for k in range(len(chunk)):
                    yield Scores.join([each[k] for each in found])
                done, tried = done + len(chunk), []

    def _tried(self, variants: Sequence[Variant], batch: Mapping[str, Tensor], batching: Batching) -> list[Scores]:
        """Scores of the first variants on a batch, after a pass over them has given what passes over one give."""
        with _room(self._gates.device) as room:
            first = self._alone(variants[0], batch)
        asked = batching.foreseen if batching.compile else batching.at_once
        self._size = Size(asked, room.most())
        chunk = variants[: min(_LEAST, self._size.now)]  # whether they can go together hangs on no number
        self._gates.reserve(self._size.now)
        self._gates.seen = {}
        found = self._caught(chunk, batch)
        seen, self._gates.seen = self._gates.seen, {}
        self._learn(batch, len(chunk))
        for name, calls in seen.items():
            if calls != [len(chunk) * rows for rows in self._gates.seen.get(name, [])]:
                raise ApartError(f"{name}: its rows are not those of the examples")
        self._gates.seen = None
        began, before = time.perf_counter(), self.computed
        last = self._alone(chunk[-1], batch)
        self._size.alone = (time.perf_counter() - began) / max(1, self.computed - before)
        tolerance = _tolerance(self._model)
        _check_equal(first, found[0], tolerance)
        _check_equal(last, found[-1], tolerance)
        if batching.compile:
            self._compile(batching.backend, chunk, batch, last)
        return [each if _finite(each) else self._alone(v, batch) for v, each in zip(chunk, found, strict=True)]

    def _compile(self, how: str, chunk: Sequence[Variant], batch: Mapping[str, Tensor], last: Scores) -> None:
        """Compile passes; a LoraLabWarning says why not, where that fails or changes what comes out."""
        mode = "reduce-overhead" if how == "inductor" and self._gates.device.type == "cuda" else None
        self._gates.stay()
        self._compiled = torch.compile(self._model, backend=how, mode=mode, dynamic=False)
        try:
            padded = [*chunk, *[chunk[-1]] * (self._size.now - len(chunk))]
            _check_equal(last, self._pass(padded, batch)[-1], _tolerance(self._model))
        except Exception as error:  # a compiler fails in ways of its own
            self._compiled = None
            text = " ".join(str(error).split()[:30])
            warnings.warn(f"passes are not compiled: {type(error).__name__}: {text}", LoraLabWarning, stacklevel=5)

    def _caught(self, variants: Sequence[Variant], batch: Mapping[str, Tensor]) -> list[Scores]:
        """A first pass, which may fail in any way where the model or the task is not made for it."""
        try:
            return self._pass(variants, batch)
        except torch.OutOfMemoryError as error:
            raise ApartError(f"there is no memory for {len(variants)} at once") from error
        except ApartError:
            raise
        except Exception as error:
            raise ApartError(f"a pass over {len(variants)} failed: {error}") from error

    def _chunk(self, chunk: Sequence[Variant], batch: Mapping[str, Tensor], *, pad: bool) -> list[Scores]:
        """Scores of each of these on a batch."""
        padded = [*chunk, *[chunk[-1]] * (self._size.now - len(chunk) if pad else 0)]
        before, began = self.computed, time.perf_counter()
        found = self._pass(padded, batch)[: len(chunk)]
        self._size.took(len(chunk), time.perf_counter() - began, max(1, self.computed - before))
        if self._branches.unknown:
            self._learn(batch, len(padded))
        # 0 times what is no number is none, where a module that is off would not have been asked
        return [each if _finite(each) else self._alone(v, batch) for v, each in zip(chunk, found, strict=True)]

    def _pass(self, variants: Sequence[Variant], batch: Mapping[str, Tensor]) -> list[Scores]:
        """Scores of each of these, from one pass."""
        count, (rows, *other) = len(variants), {len(tensor) for tensor in batch.values()}
        if other:
            raise ApartError("the tensors of a batch have different numbers of rows")
        self._gates.write(variants)
        with self._counting(variants), self._gates.on(count):
            repeated = {name: tensor.repeat(count, *[1] * (tensor.ndim - 1)) for name, tensor in batch.items()}
            found = self._judge(self._model if self._compiled is None else self._compiled, repeated)
        if len(found) != count * rows:
            raise ApartError(f"{count} times {rows} examples have {len(found)} scores")
        return [_part(found, slice(k * rows, (k + 1) * rows)) for k in range(count)]

    def _alone(self, variant: Variant, batch: Mapping[str, Tensor]) -> Scores:
        """Scores of one, from a pass without gates."""
        with self._counting(()):
            return self._score_alone(variant, batch, self._judge)

    def _learn(self, batch: Mapping[str, Tensor], count: int) -> None:
        """Have blocks learn what has rows, from the pass before over so many and one with everything on."""
        self._alone((1.0,) * len(self._layers), batch)
        self._branches.learn(count)

    @contextlib.contextmanager
    def _counting(self, variants: Sequence[Variant]) -> Iterator[None]:
        """A pass over these, or over one."""
        self._branches.begin(variants)
        before = self._branches.computed
        yield
        whole = self._layout.blocks * max(1, len(variants))
        self.computed += self._branches.computed - before if self._share else whole


@dataclass
class _Room:
    """What a pass takes of a device's memory."""

    device: torch.device
    before: int = 0
    took: int = 0

    def most(self) -> int:
        """How many such passes there is room for at once."""
        if self.device.type != "cuda" or not self.took:
            return _MOST
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        most = int(_SHARE * (torch.cuda.mem_get_info(self.device)[0] + held) / self.took)
        if most < 2:
            raise ApartError("there is no memory for two at once")
        return most


@contextlib.contextmanager
def _room(device: torch.device) -> Iterator[_Room]:
    """Measure what is computed while the context lasts."""
    room = _Room(device)
    if device.type != "cuda":
        yield room
        return
    torch.cuda.reset_peak_memory_stats(device)
    room.before = torch.cuda.memory_allocated(device)
    yield room
    room.took = torch.cuda.max_memory_allocated(device) - room.before


def _part(scores: Scores, rows: slice) -> Scores:
    columns = {name: values[rows] for name, values in scores.columns.items()}
    return Scores(columns, None if scores.logits is None else scores.logits[rows])


def _floating(scores: Scores) -> dict[str, Any]:
    found = {name: values for name, values in scores.columns.items() if values.dtype.kind == "f"}
    return found if scores.logits is None else {**found, "logits": scores.logits}


def _finite(scores: Scores) -> bool:
    return all(bool(np.isfinite(scores[name]).all()) for name in _floating(scores) if name != "logits")


def _tolerance(model: nn.Module) -> float:
    """How far apart two ways of rounding may be: ε^⅔ of the coarsest dtype (2e-5 in float32, .04 in bfloat16)."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return float(max((torch.finfo(dtype).eps for dtype in dtypes), default=1e-7) ** (2 / 3))


def _check_equal(alone: Scores, together: Scores, tolerance: float) -> None:
    """ApartError where they differ by more than rounding; what is right or wrong may hang on that."""
    numbers, others = (_floating(scores) or scores.columns for scores in (alone, together))
    for name, values in numbers.items():
        a, b = values.astype(np.float64), others[name].astype(np.float64)
        with np.errstate(invalid="ignore"):
            apart = ~((a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a - b) <= tolerance * np.maximum(1, np.abs(a))))
        if apart.any():
            raise ApartError(f"a pass over several gives another {name} than one over each: rows touch each other")
