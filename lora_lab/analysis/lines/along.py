"""Scores along training: do runs become mergeable and prunable early, or only once they are good?

At every step at which all runs have a checkpoint: each of them alone, with only some modules kept, the midpoint of the
line between every two runs of one method, and the average of ΔW of all runs of a method where they are three or more
(of two it is the midpoint in delta). Every model is held against the mean of its members alone.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import labels_of, method_of
from lora_lab.adapters.formats.lookup import checkpoints_in
from lora_lab.adapters.naming import named
from lora_lab.analysis.lines.landscape import Checkpoints
from lora_lab.analysis.lines.points import LineModels, MixPoint
from lora_lab.analysis.measured import Measured, cells, require
from lora_lab.errors import FileError, LoraLabError, OptionError, shorten
from lora_lab.merging.paths import SPACES, Paths
from lora_lab.pruning import patterns
from lora_lab.pruning.modules import keep_modules
from lora_lab.results.result import Result, columns, finite
from lora_lab.scoring.changes import Change
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.examples import Examples
from lora_lab.scoring.execution import Cost, Execution
from lora_lab.tasks import digests
from lora_lab.tasks.task import Scores, Task
from lora_lab.training.recipe import METHODS
from lora_lab.training.schedule import Schedule


@dataclass(frozen=True)
class Kept(Change):
    """One of the adapters with only the modules that a pattern keeps."""

    index: int
    pattern: str

    @property
    def key(self) -> str:
        """Which adapter, the pattern, and the code that prunes."""
        return f"kept:{self.index}:{self.pattern} {digests.of_transforms()}"

    def apply(self, models: LineModels, examples: Examples) -> Scores:
        """Scores of the pruned adapter; DivergedError where they are not finite."""
        adapter = models.adapters[self.index]
        modules = patterns.keep(patterns.choice_of(adapter), self.pattern)
        with models.wearing(keep_modules(adapter, modules)) as model:
            scores = models.score(model, examples)
        models.tasks[0].require_finite(scores, f" with {self.pattern} of {adapter.source}")
        return scores


@dataclass(frozen=True)
class Run:
    """The checkpoints of one training."""

    label: str
    method: str | None
    """As it records it."""
    name: str
    """Its method, or of one that records none its label."""
    seed: Any
    at: Mapping[int, int]
    """Optimiser step → the checkpoint's place among the adapters."""


_AVERAGED = {True: "delta", False: "factors"}
"""Whether there is a ΔW of two factors → what the average of all runs of a method is an average of."""

Point = tuple[dict[str, Any], list[int], Change]
"""What a row says of a model, the adapters that it is made of, and the model."""


def common_checkpoints(runs: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The checkpoint folders of every step that all runs have, run by run; a run is the folder that they lie in.

    FileError for a folder without checkpoints, OptionError for a run that is given twice, or no common step.
    """
    found: dict[Path, dict[int, Path]] = {}
    for run in map(Path, runs):
        inside = checkpoints_in(run)
        if not inside:
            lacks = "holds no checkpoint-STEP folder with an adapter" if run.is_dir() else "no such folder"
            raise FileError(
                f"{run}: {lacks}; the folder that a Trainer writes its checkpoints to is needed, such as the "
                "NAME.checkpoints that training with `save_every` leaves"
            )
        if any(run.resolve() == other.resolve() for other in found):
            raise OptionError(f"{run}: is given twice")
        found[run] = inside
    shared = _common({str(run): inside for run, inside in found.items()}) if found else []
    return [inside[step] for inside in found.values() for step in shared]


def _common(steps: Mapping[str, Mapping[int, Any]]) -> list[int]:
    """The steps that all runs have; OptionError without one."""
    (first, shared), *others = ((run, set(at)) for run, at in steps.items())
    for i, (run, at) in enumerate(others):
        if not shared & at:
            before = f"the {i + 1} runs before it share" if i else f"{first} has"
            raise OptionError(
                f"no step is common to the checkpoints of these {len(steps)} runs: {run} has {shorten(sorted(at))}; "
                f"{before} {shorten(sorted(shared))}"
            )
        shared = shared & at
    return sorted(shared)


def runs_of(adapters: Sequence[Adapter]) -> list[Run]:
    """The runs, in the order of their first checkpoints; OptionError for an adapter that is no checkpoint."""
    found: dict[Path, dict[int, int]] = {}
    for i, adapter in enumerate(adapters):
        step = re.fullmatch(r"checkpoint-(\d+)", Path(adapter.source).name)
        if step is None:
            raise OptionError(f"{adapter.source}: is no checkpoint of a run; a folder checkpoint-STEP is needed")
        found.setdefault(Path(adapter.source).parent, {})[int(step[1])] = i
    firsts = [_run(run, [adapters[i] for _, i in sorted(at.items())]) for run, at in found.items()]
    return [
        Run(label, first.record.get("method"), method_of(first, label), first.record.get("seed"), at)
        for first, label, at in zip(firsts, labels_of(firsts), found.values(), strict=True)
    ]


def named_runs(
    adapters: Sequence[Adapter], labels: Sequence[str] = (), groups: Sequence[tuple[str, str]] = ()
) -> list[Adapter]:
    """The checkpoints with the names and training methods that the user gives to their runs, one label a run.

    Patterns are of a run's folder, its name or its label; OptionError as in `naming.named`.
    """
    made, runs = list(adapters), runs_of(adapters)
    if not (labels or groups):
        return made
    firsts = [_run(Path(each[0].source).parent, each) for run in runs for each in [[made[i] for i in run.at.values()]]]
    for run, like in zip(runs, named(firsts, labels, groups), strict=True):
        method = {"method": like.record["method"]} if "method" in like.record else {}
        for i in run.at.values():
            record = {**made[i].record, **method}
            made[i] = replace(made[i], name=like.name if labels else "", record=record)
    return made


def _run(folder: Path, checkpoints: Sequence[Adapter]) -> Adapter:
    """A run as one adapter: its first checkpoint, called as all of them are or as its folder is."""
    names = {checkpoint.name for checkpoint in checkpoints}
    source = str(folder).removesuffix(".checkpoints")
    return replace(checkpoints[0], source=source, name=names.pop() if len(names) == 1 else "")


def answer(question: Checkpoints, adapters: Sequence[Adapter], task: Task, on: Execution) -> Result:
    """All models at every step; the cost is told before anything is computed."""
    began = time.perf_counter()
    require(task, question.metric)
    evaluator = Evaluator(adapters, task, on, split=question.split, examples=question.examples, build=LineModels)
    runs = runs_of(adapters)
    steps, spaces = _steps(runs), _spaces(question, adapters)
    averaged = _AVERAGED[evaluator.models.paths.additive]
    points = [point for step in steps for point in _points(question, runs, step, (spaces, averaged), len(adapters))]
    changes = {change.key: change for *_, change in points}
    if on.confirm:
        on.confirm(Cost(len(changes), 0, 0, evaluator.seconds(len(changes))))
    measured = Measured.of(evaluator, list(changes.values()), question.metric, question.seed)
    rows = [
        {**head, "p": _shared_probability(adapters, members, head["step"]), **_cells(measured, change, ends)}
        for head, members, change in points
        for ends in [[_alone(i, len(adapters)) for i in members]]
    ]
    return Result(
        question.kind,
        finite(columns(rows)),
        {
            "task": task.record,
            **question.record,
            "spaces": spaces,
            "steps": steps,
            "metrics": measured.told,
            "runs": finite([{"label": run.label, "method": run.method, "seed": run.seed} for run in runs]),
        },
        {},
        evaluator.provenance(adapters, began=began, run=question.run_id(adapters, task), evaluations=len(measured)),
    )


def check(question: Checkpoints, adapters: Sequence[Adapter]) -> None:
    """Raise what `answer` would raise for this question about these adapters."""
    runs = runs_of(adapters)
    steps = _steps(runs)
    Paths(adapters)  # all of one tuner, in the same modules
    if getattr(patterns.KEEPS.get(question.keep.partition(":")[0]), "valued", False):
        raise OptionError(
            f"pattern {question.keep!r}: chooses by values that cost far more than the checkpoints' scores; one "
            "without is needed, such as every-other or top-norm:3"
        )
    patterns.keep(patterns.choice_of(adapters[0]), question.keep)
    for members in _sets(runs):
        mixed = Paths([adapters[run.at[step]] for _, run in members for step in steps])
        for space in [*_spaces(question, adapters), _AVERAGED[mixed.additive]] if len(members) > 1 else []:
            mixed.check(space)


def _steps(runs: Sequence[Run]) -> list[int]:
    return _common({run.label: run.at for run in runs})


def _spaces(question: Checkpoints, adapters: Sequence[Adapter]) -> list[str]:
    """The spaces asked for; of the default, those that this tuner allows."""
    if adapters[0].why_not_additive and question.spaces == Checkpoints.spaces:
        return [space for space in question.spaces if not SPACES[space].needs_delta]
    return list(dict.fromkeys(question.spaces))


def _sets(runs: Sequence[Run]) -> list[list[tuple[int, Run]]]:
    """Runs of one method, each with its place; those that record none are one set."""
    found: dict[str | None, list[tuple[int, Run]]] = {}
    for i, run in enumerate(runs):
        found.setdefault(run.method, []).append((i, run))
    return list(found.values())


def _points(
    question: Checkpoints, runs: Sequence[Run], step: int, spaces: tuple[Sequence[str], str], count: int
) -> Iterator[Point]:
    """All models of one step; `spaces` are those of midpoints and that of averages."""

    def point(model: str, space: str | None, members: Sequence[tuple[int, Run]], change: Change | None = None) -> Point:
        indices, names = [i for i, _ in members], sorted({run.name for _, run in members})
        places = [run.at[step] for _, run in members]
        head = {"step": step, "model": model, "space": space, "members": [run.label for _, run in members]}
        head |= {"indices": indices, "method": " – ".join(names)}
        return head, places, change or _mean(places, count, str(space))

    for each in enumerate(runs):
        place = each[1].at[step]
        yield point("alone", None, [each], _alone(place, count))
        yield point("pruned", None, [each], Kept(place, question.keep))
    for members in _sets(runs):
        for pair in itertools.combinations(members, 2):
            for space in spaces[0]:
                yield point("midpoint", space, pair)
        if len(members) > 2:
            yield point("average", spaces[1], members)


def _mean(places: Sequence[int], count: int, space: str) -> MixPoint:
    """The mean of some of the adapters."""
    return MixPoint(tuple(1 / len(places) if i in places else 0.0 for i in range(count)), space)


def _alone(place: int, count: int) -> MixPoint:
    """An adapter itself, which is the same in every space."""
    return _mean([place], count, "alone")


def _cells(measured: Measured, change: Change, ends: Sequence[MixPoint]) -> dict[str, float]:
    """Each metric, and how much worse it is than the mean of the ends, on the same resampled examples."""
    found = measured.cells(change)
    for name in measured.metrics:
        worse = measured.worse([change, *ends], name).estimate(lambda L: L[0] - L[1:].mean(0))
        found |= cells(f"{name}_worse", worse)
    return found


def _shared_probability(adapters: Sequence[Adapter], members: Sequence[int], step: int) -> float | None:
    """p of the members' schedule; None without one, and where they differ."""
    found = {_probability(adapters[i].record, step) for i in members}
    return found.pop() if len(found) == 1 else None


def _probability(record: Mapping[str, Any], step: int) -> float | None:
    """p(t) after so many steps, by the schedule that a run of `train` or a `CoToCallback` has recorded."""
    try:
        if coto := record.get("coto"):
            return Schedule(**coto["schedule"]).probability(step, coto["steps"])
        recipe, law = record["recipe"], METHODS[record["method"]].law
        if law is None:
            return None
        return Schedule(recipe["ramp"], recipe["p0"], recipe["stage"], law).probability(step, recipe["steps"])
    except (LookupError, TypeError, ValueError, LoraLabError):  # a record may be anybody's
        return None
