"""Are adapters linearly connected? Curves between them, barriers, and how much of a barrier is shrinkage.

Three curves lie between two adapters a and b, and they are not the same:

* factors: A(t) = (1−t)A_a + tA_b, and B(t) likewise. What the literature on merging LoRA seeds mostly draws. It
  depends on the gauge (B R, R⁻¹A), and halfway between independent adapters ‖ΔW‖ has about halved.
* delta: ΔW(t) = (1−t)ΔW_a + tΔW_b, exact by concatenation. factors − delta = −t(1−t)(B_a − B_b)(A_a − A_b).
* matched: the factor curve with every module's ΔW(t) rescaled to (1−t)‖ΔW_a‖ + t‖ΔW_b‖. What is left of the
  barrier here is no shrinkage; the share that is gone was.

And aligned: the factor curve after both adapters are brought to their balanced gauge and b's factors are rotated
onto a's (orthogonal Procrustes), which takes the arbitrary part of the gauge away.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import described, labels_of, method_of
from lora_lab.analysis.behaviour import Texts, along, calibration, not_defined
from lora_lab.analysis.lines.points import LineModels, MixPoint
from lora_lab.analysis.measured import Measured, chosen, require
from lora_lab.analysis.questions import Interpolate as Interpolate
from lora_lab.analysis.questions import in_words
from lora_lab.errors import OptionError
from lora_lab.merging.paths import SPACES, Paths
from lora_lab.registry import Registry
from lora_lab.results.kinds.analysis import MAIN_BARRIER
from lora_lab.results.result import Result, columns, finite, grouped
from lora_lab.results.stats import Floats, Sampled, mean_and_spread
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Execution
from lora_lab.tasks.task import Task


@dataclass(frozen=True)
class Barrier:
    """A barrier of a curve."""

    profile: Callable[[Floats, Floats], Floats]
    """How bad points are [points, k] over t [points] → [rows, k], the largest row of which is the barrier."""
    least: float = 0.0
    """Below which it cannot be, as the ends are points of the grid."""
    itself: bool = False
    """Whether it is a value of the metric itself, and not how much worse that becomes."""
    about: str = ""
    """Its formula and source; L(t) is how bad the point at t is."""

    def __call__(self, L: Floats, t: Floats) -> Floats:
        """The profile."""
        return self.profile(L, t)

    def of(self, measured: Measured, line: Sequence[MixPoint], metric: str, t: Floats) -> dict[str, float]:
        """Its value on a line, in units of the metric, with its interval; NaN where the metric has no value."""
        sampled = measured.values(line, metric) if self.itself else measured.worse(line, metric)
        value, low, high = sampled.largest(lambda L: self(L, t))
        return {"value": value, "low": float(np.maximum(self.least, low)), "high": high}

    def by_example(self, measured: Measured, line: Sequence[MixPoint], metric: str, t: Floats) -> Floats:
        """Numbers of the examples that vary as its value does: what moving the means towards each of them does to it.

        d/dh P(m + h(x − m)) at h = 0, with P the row of the profile that is the barrier, m the means of the points and
        x the examples. Ends of the grid, at which a barrier is 0 whatever the examples are, tell nothing of it.
        """
        x = measured.influence(line, metric)
        x = -x if measured.metrics[metric].higher and not self.itself else x
        m = x.mean(1, keepdims=True)
        at, rows = self(m, t), (self(m + _STEP * (x - m), t) - self(m, t)) / _STEP
        varies = np.ptp(rows, axis=1) > _STEP
        found: Floats = rows[int(np.where(varies, at[:, 0], -np.inf).argmax())]
        return found


_STEP = 1e-6
"""Of derivatives of profiles, which are linear but for where another end or point becomes the largest."""

BARRIERS = Registry(
    "barrier",
    "lora_lab.barriers",
    Barrier,
    {
        "frankle": Barrier(
            lambda L, t: L - (L[0] + L[-1]) / 2,
            about="max L(t) − ½(L(0) + L(1)): Frankle et al. 2020, arXiv:1912.05671",
        ),
        "entezari": Barrier(
            lambda L, t: L - (1 - t)[:, None] * L[0] - t[:, None] * L[-1],
            about="max [L(t) − (1−t)L(0) − tL(1)], above the chord: Entezari et al. 2022, arXiv:2110.06296",
        ),
        "max_end": Barrier(lambda L, t: L - np.maximum(L[0], L[-1]), about="max L(t) − max(L(0), L(1))"),
        "midpoint": Barrier(
            lambda L, t: L[[len(t) // 2]] if len(t) % 2 else np.full((1, L.shape[1]), np.nan),
            least=-math.inf,
            itself=True,
            about="the metric itself at t = ½; of an even number of points none",
        ),
    },
)
"""Barriers of a curve, as profiles whose largest row is the barrier: how bad L each point is over t → [rows, k].

L is the metric where less is better, else its negative (of a share, what is left to 1), so that a barrier in accuracy
is accuracy lost. The maximum is over the grid, ends included, so that the first three are never negative; with noise
it is above 0 even where there is no barrier, and the interval tells.
"""


def answer(question: Interpolate, adapters: Sequence[Adapter], task: Task, on: Execution) -> Result:
    """Curves, mixtures and barriers."""
    began = time.perf_counter()
    require(task, question.metric)
    texts = Texts.read(Path(question.behaviour)) if question.behaviour else None
    evaluator = Evaluator(adapters, task, on, split=question.split, examples=question.examples, build=LineModels)
    paths: Paths = evaluator.models.paths
    spaces, grid = _with_matched(paths, question.spaces), np.linspace(0, 1, question.points)
    pairs = list(itertools.combinations(range(len(adapters)), 2))
    lines = {
        (pair, space): [_on_line(pair, float(t), len(adapters), space) for t in grid]
        for pair in pairs
        for space in spaces
    }
    mixtures = _ratio_points(question.ratios, len(adapters), _mixture_spaces(question))
    points = [*itertools.chain(*lines.values()), *(point for _, point in mixtures)]
    lacking = not_defined(task, evaluator.examples) if texts else []
    measured = _measured(question, evaluator, points, texts)
    if on.by_example:
        on.by_example("rows", list(measured.influence(points, next(iter(measured.metrics)))))
        on.by_example("barriers", _behind_barriers(lines, measured, grid))
    rows = [
        {**_who(adapters, pair), "t": float(t), "ratio": None, **_cells(point, measured, paths)}
        for (pair, _), line in lines.items()
        for t, point in zip(grid, line, strict=True)
    ]
    for (members, ratio), point in mixtures:
        rows.append({**_who(adapters, members), "t": None, "ratio": ratio, **_cells(point, measured, paths)})
    return Result(
        question.kind,
        finite(columns(rows)),
        {
            "task": task.record,
            **question.record,
            "spaces": spaces,
            "looks": {name: {"label": SPACES[name].label or name, "place": SPACES[name].place} for name in spaces},
            "metrics": measured.told,
            **({"texts": texts.record, "not_defined": lacking} if texts else {}),
            "adapters": [described(a) for a in adapters],
        },
        finite(_summary(adapters, spaces, lines, measured, grid)),
        evaluator.provenance(adapters, began=began, run=question.run_id(adapters, task), evaluations=len(measured)),
    )


def _measured(question: Interpolate, evaluator: Evaluator, points: Sequence[MixPoint], texts: Texts | None) -> Measured:
    """The points by the metrics asked for; with texts beside the task also by these, and by the task's calibration."""
    if texts is None:
        return Measured.of(evaluator, points, question.metric, question.seed)
    task, asked = evaluator.task, question.metric
    if not asked and task.metrics:
        asked = (*chosen(task, ()), *calibration(task, evaluator.examples))
    measured = Measured.of(evaluator, points, asked, question.seed)
    return measured.beside(along(evaluator, points, texts, question.seed)) if task.why_no_texts is None else measured


def check(question: Interpolate, adapters: Sequence[Adapter]) -> None:
    """Raise what `answer` would raise for this question about these adapters."""
    if len(adapters) < 2:
        raise OptionError("a line needs two adapters or more")
    if question.ratios and not _mixture_spaces(question):
        names = " and ".join(name for name, space in SPACES.items() if space.mixtures)
        raise OptionError(f"mixtures are scored in {names}; name one of them as the space, too")
    paths = Paths(adapters)
    for space in _with_matched(paths, question.spaces):
        paths.check(space)
    for ratio in question.ratios:
        if not all(0 <= weight < math.inf for weight in ratio) or not any(ratio):
            raise OptionError(f"ratio {in_words(ratio)!r}: weights of 0 or more are needed, not all of them 0")
        if not 2 <= len(ratio) <= len(adapters):
            raise OptionError(
                f"ratio {in_words(ratio)!r} has {len(ratio)} weights; with {len(adapters)} adapters, 2 to "
                f"{len(adapters)} are possible"
            )


def _mixture_spaces(question: Interpolate) -> list[str]:
    return [space for space in question.spaces if SPACES[space].mixtures]


def _with_matched(paths: Paths, spaces: Sequence[str]) -> list[str]:
    """The spaces asked for, each with its rescaled twin, wherever there is a ΔW to rescale."""
    if not paths.additive and tuple(spaces) == Interpolate.spaces:  # the default, as far as this tuner allows it
        return [space for space in spaces if not SPACES[space].needs_delta]
    brought = [
        (space, SPACES[space].rescaled if SPACES[space].shrinks and paths.additive else None) for space in spaces
    ]
    return list(dict.fromkeys(space for pair in brought for space in pair if space))


def _on_line(pair: tuple[int, int], t: float, count: int, space: str) -> MixPoint:
    weights = [0.0] * count
    weights[pair[0]], weights[pair[1]] = 1 - t, t
    return MixPoint(tuple(weights), space)


def _ratio_points(
    ratios: Sequence[Sequence[float]], count: int, spaces: Sequence[str]
) -> list[tuple[tuple[tuple[int, ...], str], MixPoint]]:
    points = []
    for ratio, space in itertools.product(ratios, spaces):
        for members in itertools.combinations(range(count), len(ratio)):
            weights = [0.0] * count
            for member, weight in zip(members, ratio, strict=True):
                weights[member] = weight / sum(ratio)
            label = ":".join(f"{weight:g}" for weight in ratio)
            points.append(((members, label), MixPoint(tuple(weights), space)))
    return points


def _who(adapters: Sequence[Adapter], members: Sequence[int]) -> dict[str, Any]:
    """Labels and places of the members, and their method; of several methods, or of unknown ones, all their names."""
    names = labels_of(adapters)
    methods = sorted({method_of(adapters[i], names[i]) for i in members})
    return {
        "members": [adapters[i].label for i in members],
        "indices": list(members),
        "method": " – ".join(methods),
    }


def _cells(point: MixPoint, measured: Measured, paths: Paths) -> dict[str, Any]:
    """What a row says of its point."""
    norm = paths.norm(point.weights, point.space)
    return {"space": point.space, "weights": list(point.weights), "norm": norm, **measured.cells(point)}


Lines = Mapping[tuple[tuple[int, int], str], Sequence[MixPoint]]
"""(pair, space) → the points on the line."""


def _summary(
    adapters: Sequence[Adapter], spaces: Sequence[str], lines: Lines, measured: Measured, grid: Floats
) -> dict[str, Any]:
    barriers = []
    for ((pair, space), line), metric in itertools.product(lines.items(), measured.metrics):
        who = {**_who(adapters, pair), "space": space, "metric": metric}
        for name, barrier in BARRIERS.items():
            barriers.append({**who, "barrier": name, **barrier.of(measured, line, metric, grid)})
    summary: dict[str, Any] = {"barriers": barriers}
    for space in [space for space in spaces if SPACES[space].rescaled in spaces][:1]:
        summary["shrinkage"] = [
            {
                **_who(adapters, pair),
                "space": space,
                "metric": metric,
                **_shrinkage(
                    measured.worse(line, metric), measured.worse(lines[pair, str(SPACES[space].rescaled)], metric), grid
                ),
            }
            for (pair, there), line in lines.items()
            for metric in measured.metrics
            if there == space
        ]
    if len(adapters) > 2:
        summary["matrix"] = _matrix(len(adapters), barriers)
        summary["over_pairs"] = _over_pairs(barriers)
    return summary


def _behind_barriers(lines: Lines, measured: Measured, grid: Floats) -> list[Floats]:
    """For each of the summary's barriers, in order."""
    return [
        barrier.by_example(measured, line, metric, grid)
        for line, metric in itertools.product(lines.values(), measured.metrics)
        for barrier in BARRIERS.values()
    ]


def _shrinkage(factors: Sampled, matched: Sampled, grid: Floats) -> dict[str, float]:
    """A curve's barrier, what keeping the norms takes away of it, and what stays.

    `removed` is a paired difference: its interval comes from one resampling of both curves.
    """
    both = factors.with_points(matched)
    n, above_chord = len(grid), BARRIERS[MAIN_BARRIER]

    def of_factors(L: Floats) -> Floats:
        return above_chord(L[:n], grid)

    def of_matched(L: Floats) -> Floats:
        return above_chord(L[n:], grid)

    cells: dict[str, float] = {}
    for name, profiles in (("barrier", [of_factors]), ("stays", [of_matched]), ("removed", [of_factors, of_matched])):
        value, low, high = both.largest(*profiles)
        low = low if name == "removed" else float(np.maximum(0.0, low))
        cells |= {name: value, f"{name}_low": low, f"{name}_high": high}
    cells["share"] = cells["removed"] / cells["barrier"] if cells["barrier"] > 0 else math.nan
    return cells


def _matrix(count: int, barriers: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[list[float]]]]:
    """Space → metric → Entezari barriers between all adapters, symmetric, zero on the diagonal."""
    tables: dict[str, dict[str, list[list[float]]]] = {}
    for row in barriers:
        if row["barrier"] == MAIN_BARRIER:
            empty = [[0.0] * count for _ in range(count)]
            table = tables.setdefault(row["space"], {}).setdefault(row["metric"], empty)
            i, j = row["indices"]
            table[i][j] = table[j][i] = row["value"]
    return tables


def _over_pairs(barriers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation of every barrier over the pairs of one method (pairs share adapters)."""
    means = []
    for head, rows in grouped(barriers, "method", "space", "metric", "barrier"):
        mean, spread = mean_and_spread(np.array([row["value"] for row in rows]))
        means.append({**head, "mean": mean, "spread": spread, "pairs": len(rows)})
    return means
