"""Two adapters mixed in one layer at a time: which layers a barrier between them comes from.

ΔW of one layer (or group) goes straight from one adapter's to the other's while all others stay as one of them has
them, and the same with the other adapter as the one that stays: two barriers a layer (Adilova et al. 2023,
arXiv:2307.06966). Both adapters lie side by side as one of the sum of their ranks, so that a mixture is a factor on
each rank, and layers before the mixed one are computed once.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import described, labels_of
from lora_lab.adapters.groups import players
from lora_lab.adapters.lowrank import combine
from lora_lab.analysis.lines.connectivity import BARRIERS
from lora_lab.analysis.lines.landscape import Layerwise
from lora_lab.analysis.measured import Measured, require
from lora_lab.errors import OptionError
from lora_lab.merging.paths import Paths
from lora_lab.results.kinds.analysis import MAIN_BARRIER
from lora_lab.results.result import Result, columns, fingerprint, finite
from lora_lab.results.stats import Floats, Sampled
from lora_lab.scoring.changes import LayerMask
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Cost, Execution
from lora_lab.tasks.task import Task


@dataclass(frozen=True)
class RankFactors(LayerMask):
    """A factor for every rank of every module; of large adapters these are many, so its key is a hash of them."""

    @cached_property
    def key(self) -> str:
        """Equal for equal factors."""
        return f"ranks:{fingerprint(self.states)}"


class _Half:
    """One adapter stays, and the other takes its place layer by layer."""

    def __init__(self, question: Layerwise, stays: Adapter, comes: Adapter, task: Task, on: Execution) -> None:
        self._ranks = {name: (stays.updates[name].rank, comes.updates[name].rank) for name in stays.updates}
        both = {name: combine([stays.updates[name], comes.updates[name]], [1.0, 1.0]) for name in stays.updates}
        self.evaluator = Evaluator(
            [stays.with_updates(both, source=stays.source)], task, on, split=question.split, examples=question.examples
        )
        self.grid = np.linspace(0, 1, question.points)
        groups = players(stays, question.players).units
        modules = {label: {name for name, _ in units} for label, units in groups.items()}
        self.lines = {label: [self._mask(held, float(t)) for t in self.grid] for label, held in modules.items()}
        self.masks = list({mask.key: mask for mask in itertools.chain(*self.lines.values())}.values())

    def _mask(self, mixed: set[str], t: float) -> RankFactors:
        states = []
        for name in self.evaluator.names:
            own, other = self._ranks[name]
            share = t if name in mixed else 0.0
            states.append((1 - share,) * own + (share,) * other)
        return RankFactors(tuple(states))


def answer(question: Layerwise, adapters: Sequence[Adapter], task: Task, on: Execution) -> Result:
    """A row for every point of every layer's line, from both sides."""
    began = time.perf_counter()
    require(task, question.metric)
    names = labels_of(adapters)
    halves = [_Half(question, adapters[i], adapters[1 - i], task, on) for i in (0, 1)]
    if on.confirm:
        on.confirm(sum((half.evaluator.cost(half.masks) for half in halves), Cost(0, 0, 0, 0.0)))
    rows: list[dict[str, Any]] = []
    barriers: list[dict[str, Any]] = []
    for i, half in enumerate(halves):
        measured = Measured.of(half.evaluator, half.masks, question.metric, question.seed)
        for group, line in half.lines.items():
            who = {"group": group, "others": names[i], "index": i}
            rows += [{**who, "t": float(t), **measured.cells(mask)} for t, mask in zip(half.grid, line, strict=True)]
            for metric in measured.metrics:
                barriers.append({**who, "metric": metric, **_barrier(measured.worse(line, metric), half.grid)})
    return Result(
        question.kind,
        finite(columns(rows)),
        {
            "task": task.record,
            **question.record,
            "metrics": measured.told,
            "adapters": [described(adapter) for adapter in adapters],
        },
        finite({"barriers": barriers}),
        halves[0].evaluator.provenance(adapters, began=began, run=question.run_id(adapters, task)),
    )


def check(question: Layerwise, adapters: Sequence[Adapter]) -> None:
    """Raise what `answer` would raise for this question about these adapters."""
    if len(adapters) != 2:
        raise OptionError(f"layers are mixed one at a time between two adapters; {len(adapters)} were given")
    Paths(adapters).check("delta")
    found = players(adapters[0], question.players)
    if any(rank is not None for units in found.units.values() for _, rank in units):
        raise OptionError(f"players {found.kind}: whole modules are mixed; layer, module, type … can be")


def _barrier(line: Sampled, grid: Floats) -> dict[str, float]:
    """The rise above the chord, and what the whole exchange of the layer costs, both with paired intervals."""
    value, low, high = line.largest(lambda L: BARRIERS[MAIN_BARRIER](L, grid))
    swap = line.estimate(lambda L: L[-1] - L[0])
    return {
        "value": value,
        "low": float(np.maximum(0.0, low)),
        "high": high,
        **dict(zip(("exchange", "exchange_low", "exchange_high"), swap, strict=True)),
    }
