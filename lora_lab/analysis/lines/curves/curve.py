"""Is there a curved valley between two adapters, and is it more than kept norm?

A straight line between adapters shortens ΔW, and a curve that merely keeps its length would be called a valley. So
every curve stands beside two lines: the straight one, and the same with every module's ‖ΔW(t)‖ kept at
(1−t)‖ΔW_a‖ + t‖ΔW_b‖. Only what a curve gains over the second is a valley.

A curve spends its t where it is long, and control points are trained with t uniform. So barriers and mean losses are
given over t, and over the share of the arc length (in ‖ΔW‖) gone by.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lora_lab import files
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import described
from lora_lab.adapters.lowrank import LowRank
from lora_lab.analysis.lines.connectivity import BARRIERS
from lora_lab.analysis.lines.curves.control_points import (
    CHECKED,
    CURVES,
    Control,
    ControlTraining,
    ControlTrainings,
    Training,
)
from lora_lab.analysis.lines.landscape import Curve
from lora_lab.analysis.lines.points import LineModels, MixPoint
from lora_lab.analysis.measured import Measured, require
from lora_lab.errors import FileError, OptionError
from lora_lab.geometry.aligning import aligned
from lora_lab.merging.paths import SPACES, Paths
from lora_lab.results.kinds.analysis import MAIN_BARRIER
from lora_lab.results.result import Result, columns, finite
from lora_lab.results.stats import Floats, Sampled
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Cost, Execution
from lora_lab.scoring.gates import PASSES
from lora_lab.tasks.task import Task

LINE, MATCHED = "line", "matched line"


@dataclass(frozen=True)
class CurveSpace:
    """What is mixed on a curve."""

    space: str
    """A name in SPACES."""
    prepare: Callable[[Sequence[LowRank]], Sequence[LowRank]] | None = None
    """What takes the place of both ends' updates of one module first, with the same ΔW."""


CURVE_SPACES: Mapping[str, CurveSpace] = {
    "delta": CurveSpace("delta"),
    "aligned": CurveSpace("factors", aligned),
    "factors": CurveSpace("factors"),
}
"""Name of a space of curves → what is mixed: ΔW; the factors, b's turned onto a's first; the factors as they are."""


@dataclass(frozen=True)
class _Path:
    """One way from a to b in one space."""

    space: str
    """A name in CURVE_SPACES."""
    name: str
    point: Callable[[float], MixPoint]


def answer(question: Curve, adapters: Sequence[Adapter], task: Task, on: Execution, folder: Path | None) -> Result:
    """Train the control points, save them, and score all curves and lines together."""
    began = time.perf_counter()
    require(task, question.metric)
    trainings = {
        (space, shape): _training(question, space, shape, task)
        for space, shape in itertools.product(question.spaces, question.shapes)
    }
    run = question.run_id(adapters, task)
    trained = replace(question, metric=(), examples=None).run_id(adapters, task)  # what they hang on
    places = {key: folder / f"{_name(*key)}.safetensors" for key in trainings} if folder else {}
    for place in places.values():
        _refuse_others(place, trained)
    _tell_cost(question, adapters, task, on, trainings)
    ends = {space: _ends(adapters, space) for space in question.spaces}
    controls = _trained(trainings, ends, task, on)
    for key, place in places.items():
        made = controls[key].adapter
        replace(made, record={**made.record, "run": trained}).save(place, force=True)
    given = _Given(adapters, ends, controls)
    evaluator = Evaluator(given.adapters, task, on, split=question.split, examples=question.examples, build=LineModels)
    paths = Paths(given.adapters)
    ways, grid = given.ways(question), np.linspace(0, 1, question.points)
    lines = {(way.space, way.name): [way.point(float(t)) for t in grid] for way in ways}
    measured = Measured.of(evaluator, [*itertools.chain(*lines.values())], question.metric, question.seed)
    arcs = {key: arc_shares(paths, line) for key, line in lines.items()}
    rows = [
        {
            "space": space,
            "path": name,
            "t": float(t),
            "arc": float(arc),
            "norm": paths.norm(point.weights, point.space),
            **measured.cells(point),
        }
        for (space, name), line in lines.items()
        for t, (arc, point) in zip(grid, zip(arcs[space, name][0], line, strict=True), strict=True)
    ]
    return Result(
        question.kind,
        finite(columns(rows)),
        {
            "task": task.record,
            **question.record,
            "looks": {name: {"label": CURVES[name].label or name, "place": CURVES[name].place} for name in CURVES},
            "metrics": measured.told,
            "adapters": [described(adapter) for adapter in adapters],
        },
        finite(_summary(question, lines, measured, arcs, controls)),
        evaluator.provenance(adapters, began=began, run=run, evaluations=len(measured)),
    )


def check(question: Curve, adapters: Sequence[Adapter]) -> None:
    """Raise what `answer` would raise for this question about these adapters."""
    if len(adapters) != 2:
        raise OptionError(f"a curve goes from one adapter to another; {len(adapters)} were given")
    for name in ("shapes", "spaces"):
        if not getattr(question, name):
            raise OptionError(f"no {name[:-1]} of a curve was named")
    for adapter in adapters:
        adapter.require_additive()
    paths = Paths(adapters)
    for space in question.spaces:
        there = CURVE_SPACES[space]
        paths.check("delta" if there.prepare else there.space)  # what is prepared has factors of one shape


def arc_shares(paths: Paths, line: Sequence[MixPoint]) -> tuple[Floats, float]:
    """How much of its length a line of points has behind it at each of them, and that length in ‖ΔW‖.

    The length is that of the chords between neighbours: √Σ over modules ‖ΔW(tᵢ₊₁) − ΔW(tᵢ)‖².
    """
    gone, before = [0.0], None
    for point in line:
        now = paths.mix(point.weights, point.space).updates
        if before is not None:
            squares = [(now[name] - before[name]).norm() ** 2 for name in now]
            gone.append(gone[-1] + math.sqrt(sum(squares)))
        before = now
    return np.array(gone) / (gone[-1] or 1.0), gone[-1]


def _training(question: Curve, space: str, shape: str, task: Task) -> Training:
    """How a control point is trained, the task's defaults filled in."""
    return Training(
        shape,
        CURVE_SPACES[space].space,
        question.steps or task.steps,
        question.learning_rate or task.learning_rate,
        question.batch_size or task.train_batch_size,
        question.rank,
        question.checks,
        question.seed,
    )


def _name(space: str, shape: str) -> str:
    """The file of a control point."""
    return f"curve-{shape}-{space}"


def _refuse_others(place: Path, run: str) -> None:
    """FileError where something lies in a control point's place that this very question has not put there."""
    if place.exists():
        try:
            mine = (made := Adapter.load(place)).origin.own and made.record.get("run") == run
        except (FileError, OptionError):
            mine = False
        if not mine:
            files.refuse_existing(place, force=False)


def _tell_cost(
    question: Curve, adapters: Sequence[Adapter], task: Task, on: Execution, trainings: Mapping[Any, Training]
) -> None:
    """Tell what training and scoring would take, in passes over the split; nothing is known of checkpoints here."""
    if not on.confirm:
        return
    probe = Evaluator(adapters, task, on, split=question.split, examples=question.examples)
    points = len(question.spaces) * (len(question.shapes) + 2) * (question.points - 2) + 2
    trained = sum(PASSES * how.steps * how.batch_size for how in trainings.values())
    checked = sum((how.checks + 1) * len(CHECKED) * len(task.split("validation")) for how in trainings.values())
    passes = points + (trained + checked) / probe.examples
    on.confirm(Cost(round(passes), 0, 0, probe.seconds(passes)))


def _ends(adapters: Sequence[Adapter], space: str) -> list[Adapter]:
    """Both adapters with the factors that are mixed in a space; the adapters themselves where these are their own."""
    prepare = CURVE_SPACES[space].prepare
    if prepare is None:
        return list(adapters)
    pairs = {name: prepare([adapter.updates[name] for adapter in adapters]) for name in adapters[0].updates}
    return [
        adapter.with_updates({name: pair[i] for name, pair in pairs.items()}, source=adapter.source)
        for i, adapter in enumerate(adapters)
    ]


def _trained(
    trainings: Mapping[tuple[str, str], Training],
    ends: Mapping[str, Sequence[Adapter]],
    task: Task,
    on: Execution,
) -> dict[tuple[str, str], Control]:
    """The control point of every curve, each from its checkpoint on where there is one; side by side in workers."""
    done, total = dict.fromkeys(trainings, 0), sum(how.steps for how in trainings.values())

    def hear(key: tuple[str, str], steps: int, _: int) -> None:
        done[key] = steps
        on.report(sum(done.values()), total)

    device, pairs = on.place(), {key: ends[key[0]] for key in trainings}
    if on.workers:
        setup = ControlTrainings.of(pairs, trainings, task, str(device), on.cache)
        controls = {}
        for key, (control, told) in zip(trainings, on.workers.map(setup, list(trainings), None, hear), strict=True):
            controls[key] = control
            for warning in told:
                warnings.warn(warning, stacklevel=2)
        return controls
    return {
        key: ControlTraining(pairs[key], how, task, device).train(on.cache, partial(hear, key))
        for key, how in trainings.items()
    }


class _Given:
    """The adapters that curves are made of: both ends, those with other factors, and the control points."""

    def __init__(
        self,
        adapters: Sequence[Adapter],
        ends: Mapping[str, Sequence[Adapter]],
        controls: Mapping[tuple[str, str], Control],
    ) -> None:
        self.adapters = list(adapters)
        self._ends: dict[str, tuple[int, int]] = {}
        self._controls: dict[tuple[str, str], int] = {}
        for space, (a, b) in ends.items():
            own = a is adapters[0]
            self._ends[space] = (0, 1) if own else (len(self.adapters), len(self.adapters) + 1)
            self.adapters += [] if own else [a, b]
        for key, control in controls.items():
            self._controls[key] = len(self.adapters)
            self.adapters.append(control.adapter)

    def ways(self, question: Curve) -> list[_Path]:
        """The straight line, that at kept norm, and every curve, in each space."""
        found = []
        for space in question.spaces:
            mixed = CURVE_SPACES[space].space
            twin = SPACES[mixed].rescaled
            for name, there in ((LINE, mixed), (MATCHED, twin)):
                if there:
                    found.append(self._way(space, name, there, lambda t: (1 - t, 0.0, t), None))
            for shape in question.shapes:
                control = self._controls[space, shape]
                found.append(self._way(space, shape, mixed, CURVES[shape].weights, control))
        return found

    def _way(
        self, space: str, name: str, mixed: str, weights: Callable[[float], Sequence[float]], control: int | None
    ) -> _Path:
        a, b = self._ends[space]

        def point(t: float) -> MixPoint:
            shares = [0.0] * len(self.adapters)
            if t in (0.0, 1.0):  # the ends are the adapters themselves, in whatever factors
                shares[int(t)] = 1.0
            else:
                shares[a], middle, shares[b] = weights(t)
                if control is not None:
                    shares[control] = middle
            return MixPoint(tuple(shares), mixed)

        return _Path(space, name, point)


def _summary(
    question: Curve,
    lines: Mapping[tuple[str, str], Sequence[MixPoint]],
    measured: Measured,
    arcs: Mapping[tuple[str, str], tuple[Floats, float]],
    controls: Mapping[tuple[str, str], Control],
) -> dict[str, Any]:
    grid = np.linspace(0, 1, question.points)
    barriers, means, gains = [], [], []
    for (space, name), line in lines.items():
        for metric in measured.metrics:
            who = {"space": space, "path": name, "metric": metric}
            for by, places in (("t", grid), ("arc", arcs[space, name][0])):
                for barrier in BARRIERS if by == "t" else (MAIN_BARRIER,):
                    found = BARRIERS[barrier].of(measured, line, metric, places)
                    barriers.append({**who, "by": by, "barrier": barrier, **found})
                value, low, high = measured.values(line, metric).estimate(partial(_mean_over, places))
                means.append({**who, "by": by, "value": value, "low": low, "high": high})
            if name in question.shapes:
                for other in (LINE, MATCHED):
                    if (space, other) in lines:
                        gain = _gain(measured.worse(lines[space, other], metric), measured.worse(line, metric), grid)
                        gains.append({**who, "over": other, **gain})
    told = [
        {
            "space": space,
            "path": shape,
            "length": arcs[space, shape][1],
            "line_length": arcs[space, LINE][1],
            "rank": max(update.rank for update in control.adapter.updates.values()),
            "step": control.step,
            "trace": list(control.trace),
        }
        for (space, shape), control in controls.items()
    ]
    return {"barriers": barriers, "means": means, "gains": gains, "controls": told}


def _mean_over(places: Floats, L: Floats) -> Floats:
    """∫ L over the places of its points by the trapezoidal rule, [points, k] → [k]."""
    mean: Floats = (np.diff(places)[:, None] * (L[1:] + L[:-1]) / 2).sum(0, keepdims=True)[0]
    return mean


def _gain(line: Sampled, curve: Sampled, grid: Floats) -> dict[str, float]:
    """By how much the curve's barrier is lower than the line's, with a paired interval."""
    both, n, main = line.with_points(curve), len(grid), BARRIERS[MAIN_BARRIER]
    value, low, high = both.largest(lambda L: main(L[:n], grid), lambda L: main(L[n:], grid))
    return {"value": value, "low": low, "high": high}
