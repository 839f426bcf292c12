"""Metrics on the plane through three adapters: the smallest picture that shows whether they share a basin.

The plane is that of ΔW with the inner product ⟨X, Y⟩ = Σ over modules tr(XᵀY), as Garipov et al. 2018
(arXiv:1802.10026) draw it for weights: a is its origin, x points to b, and y is what is left of c − a. All lengths and
angles come from the 3 × 3 Gram matrix, and that from rank × rank cores. A point is three weights that sum to 1, so that
ΔW there is exactly Σ wᵢ ΔWᵢ.

Norm-matched are the points with ‖ΔW‖ = Σ wᵢ ‖ΔWᵢ‖ / Σ wᵢ, over the adapters: the curve through them on which no loss
comes of ΔW being shorter than theirs. The straight lines between the adapters lie inside of it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import described, labels_of
from lora_lab.analysis.lines.landscape import Plane
from lora_lab.analysis.lines.points import LineModels, MixPoint
from lora_lab.analysis.measured import Measured, require
from lora_lab.brief import Brief
from lora_lab.errors import MismatchError, OptionError
from lora_lab.merging.paths import Paths
from lora_lab.results.result import Result, columns, finite
from lora_lab.results.stats import Floats, half_width
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Cost, Execution
from lora_lab.tasks.task import Task

SPACE = "delta"
"""What is mixed: ΔW, in which a plane is flat."""

_DEPENDENT = 1e-6
"""Distance of a point from what the others span, by its distance from the first: less is rounding."""


@dataclass(frozen=True, repr=False)
class Axes(Brief):
    """Coordinates on the plane through three points, of which only inner products are known."""

    gram: Floats
    """[3, 3] ⟨ΔWᵢ, ΔWⱼ⟩; zeros of the base."""
    corners: Floats
    """[3, 2] x and y of each."""

    @classmethod
    def of(cls, gram: Floats, names: Sequence[str]) -> Axes:
        """From a Gram matrix; MismatchError where the three points lie on one line."""
        # ⟨p − a, q − a⟩ for p, q of b, c
        to = gram[1:, 1:] - gram[0, 1:] - gram[1:, :1] + gram[0, 0]
        length = math.sqrt(max(0.0, to[0, 0]))
        size = math.sqrt(float(gram.diagonal().max()))
        for i, j in itertools.combinations(range(3), 2):
            if gram[i, i] + gram[j, j] - 2 * gram[i, j] <= (_DEPENDENT * size) ** 2:
                raise MismatchError(f"{names[i]} and {names[j]} have one ΔW, so no plane goes through them")
        along = to[0, 1] / length
        height, reach = math.sqrt(max(0.0, to[1, 1] - along**2)), math.sqrt(max(0.0, to[1, 1]))
        if height <= _DEPENDENT * max(reach, size):
            raise MismatchError(
                f"{', '.join(names)} lie on one line in ΔW: {names[2]} is {height:.1e} away from that through the "
                "others; a plane needs three that are linearly independent"
            )
        return cls(gram, np.array([[0.0, 0.0], [length, 0.0], [along, height]]))

    def weights(self, x: float, y: float) -> tuple[float, float, float]:
        """Weights (1 − α − β, α, β) of the point a + α(b − a) + β(c − a) at these coordinates."""
        (_, (length, _), (along, height)) = self.corners
        beta = y / height
        alpha = (x - beta * along) / length
        return 1 - alpha - beta, float(alpha), float(beta)

    def norm(self, weights: Sequence[float]) -> float:
        """‖Σ wᵢ ΔWᵢ‖."""
        return math.sqrt(max(0.0, float(np.array(weights) @ self.gram @ np.array(weights))))

    def matched_norm(self, weights: Sequence[float], count: int) -> float:
        """The weighted mean of the norms of the first `count` points; NaN where their weights sum to 0 or less."""
        w = np.array(weights[:count])
        return float(w @ np.sqrt(self.gram.diagonal()[:count]) / w.sum()) if w.sum() > 0 else math.nan

    def grid(self, points: int, margin: float) -> list[tuple[float, float]]:
        """`points` × `points` coordinates, y by y, over the corners and a margin around them."""
        low, high = self.corners.min(0), self.corners.max(0)
        room = margin * float((high - low).max())
        xs, ys = (np.linspace(low[i] - room, high[i] + room, points) for i in (0, 1))
        return [(float(x), float(y)) for y in ys for x in xs]


def answer(question: Plane, adapters: Sequence[Adapter], task: Task, on: Execution) -> Result:
    """The grid, and its three corners."""
    began = time.perf_counter()
    require(task, question.metric)
    evaluator = Evaluator(adapters, task, on, split=question.split, examples=question.examples, build=LineModels)
    axes, count = _axes(question, adapters), len(adapters)
    places = axes.grid(question.points, question.margin)
    grid = [_point(axes.weights(x, y), count) for x, y in places]
    corners = [_point([float(i == j) for j in range(3)], count) for i in range(3)]
    if on.confirm:
        passes = len(grid) + len(corners)
        on.confirm(Cost(passes, 0, 0, evaluator.seconds(passes)))
    measured = Measured.of(evaluator, [*corners, *grid], question.metric, question.seed)

    def row(x: float, y: float, point: MixPoint) -> dict[str, Any]:
        weights = axes.weights(x, y)
        norms = {"norm": axes.norm(weights), "matched_norm": axes.matched_norm(weights, count)}
        return {"x": x, "y": y, "weights": list(weights), **norms, **measured.cells(point)}

    names = _names(question, adapters)
    ends = [
        {"adapter": name, **row(float(x), float(y), point)}
        for name, (x, y), point in zip(names, axes.corners, corners, strict=True)
    ]
    gains = [{"metric": name, **_gain(measured, name, [*corners, *grid], places)} for name in measured.metrics]
    return Result(
        question.kind,
        finite(columns([row(x, y, point) for (x, y), point in zip(places, grid, strict=True)])),
        {
            "task": task.record,
            **question.record,
            "metrics": measured.told,
            "adapters": [described(adapter) for adapter in adapters],
        },
        finite({"corners": ends, "gains": gains, "gram": axes.gram.tolist()}),
        evaluator.provenance(adapters, began=began, run=question.run_id(adapters, task), evaluations=len(measured)),
    )


def check(question: Plane, adapters: Sequence[Adapter]) -> None:
    """Raise what `answer` would raise for this question about these adapters."""
    needed = 2 if question.base else 3
    if len(adapters) != needed:
        other = "two adapters and the base" if question.base else "three adapters, or two and the base (`base`)"
        raise OptionError(f"a plane goes through {other}; {len(adapters)} were given")
    Paths(adapters).check(SPACE)
    if question.base and adapters[0].others:
        raise MismatchError(
            f"{adapters[0].source}: brings whole tensors of its own, such as a head, which the base has not; a plane "
            "through three adapters can be drawn"
        )
    _axes(question, adapters)


def _axes(question: Plane, adapters: Sequence[Adapter]) -> Axes:
    gram = np.zeros((3, 3))
    gram[: len(adapters), : len(adapters)] = Paths(adapters).gram()
    return Axes.of(gram, _names(question, adapters))


def _names(question: Plane, adapters: Sequence[Adapter]) -> list[str]:
    return [*labels_of(adapters), *["base"] * question.base]


def _point(weights: Sequence[float], count: int) -> MixPoint:
    """The point, the base's weight left out."""
    return MixPoint(tuple(weights[:count]), SPACE)


def _gain(
    measured: Measured, metric: str, points: Sequence[MixPoint], places: Sequence[tuple[float, float]]
) -> dict[str, float]:
    """By how much a point of the grid is better than the corners, with its interval, and where it lies.

    Of the points, the corners come first. The best point and the best corner are chosen on every other example and
    compared on the rest, so that having looked at many points does not pass for a gain. The interval of a mean is by
    Student's t over its examples, that of a statistic by bootstrap.
    """
    chosen_by, rest = measured.every_other(0).bad(points, metric), measured.every_other(1)
    chosen_by = np.where(np.isfinite(chosen_by), chosen_by, np.inf)
    corner, point = int(chosen_by[:3].argmin()), 3 + int(chosen_by[3:].argmin())
    x, y = places[point - 3]
    value, low, high = _less(rest, metric, points[corner], points[point])
    return {"value": value, "low": low, "high": high, "x": x, "y": y}


def _less(measured: Measured, metric: str, first: MixPoint, second: MixPoint) -> tuple[float, float, float]:
    """How much worse the first is than the second, with its interval; NaN of too few examples."""
    values = measured.examples([first, second], metric)
    if measured.size < 2:
        return math.nan, math.nan, math.nan
    if values is None:
        return measured.worse([first, second], metric).estimate(lambda L: L[0] - L[1])
    differences = values[0] - values[1]
    value, half = float(differences.mean()), half_width(differences)
    return value, value - half, value + half
