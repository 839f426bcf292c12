"""What `import lora_lab as ll` gives: each step from a task to a figure as one function.

Adapters are given as `Adapter` or as what `load` reads, one or several; a task as a `Task`, as the name or file that
`task` takes, or None for the one that the adapters record (TrustError where a record that is not the user's own asks
for more than it may without `trust_record`). `on` says where it is computed; `progress` shows a bar.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from lora_lab import tasks
from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import LoraLabWarning, OptionError, unknown
from lora_lab.options import checked
from lora_lab.progress import bar
from lora_lab.results.result import Result
from lora_lab.scoring.execution import Execution
from lora_lab.tasks.choosing import task_of, tasks_of
from lora_lab.tasks.task import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lora_lab.analysis.question import Question
    from lora_lab.fusing.fuse import Fused
    from lora_lab.fusing.verify import Verified

Path_ = str | os.PathLike[str]
Adapters = Annotated[Adapter | Path_ | Sequence[Adapter | Path_], "an adapter, what `load` reads, or a list of them"]
OneAdapter = Annotated[Adapter | Path_, "an adapter or what `load` reads"]
OneTask = Annotated[Task | Path_, "a task, the name of one or a task file"]
TaskLike = Annotated[Task | Path_ | None, "a task, the name of one or a task file"]
TaskEach = Annotated[
    Task | Path_ | Sequence[Task | Path_] | None, "a task, the name of one, a task file, or a list of one an adapter"
]
Results = Annotated[Result | Path_ | Sequence[Result | Path_], "a result, its file, or a list of them"]
Made = TypeVar("Made")


@checked
def load(
    path: Path_, *, config: Path_ | None = None, alpha: float | None = None, adapter_name: str | None = None
) -> Adapter:
    """The adapter of a PEFT folder, a lone file, a Trainer checkpoint or a hub id; see `Adapter.load`."""
    return Adapter.load(path, config=config, alpha=alpha, adapter_name=adapter_name)


@checked
def task(name: Path_) -> Task:
    """The built-in task of this name (digits/relabel …), or the one that a TOML file describes."""
    return tasks.from_name(os.fspath(name))


@checked
def train(
    task: OneTask, method: str = "coto", *, on: Execution | None = None, progress: bool = True, **recipe: Any
) -> Adapter:
    """An adapter trained on the task; `recipe` are the other fields of `Recipe` (seed, steps, rank …).

    `lora_lab.training.train` gives the log of the run beside it.
    """
    from lora_lab.training.fit import train as fit
    from lora_lab.training.recipe import Recipe

    made = _made(Recipe, {"method": method, **recipe})
    with _shown(on, "training", progress) as where:
        return fit(_task(task), made, device=where.place() if where.device else None, progress=where.progress)[0]


@checked
def merge(
    adapters: Adapters,
    method: str = "task-arithmetic",
    task: TaskEach = None,
    *,
    on: Execution | None = None,
    progress: bool = True,
    trust_record: bool = False,
    **options: Any,
) -> Adapter:
    """One adapter out of several by a method of `lora_lab.merging.MERGES`; its record tells the error of ΔW.

    `options` are the method's (density=0.2 …), the fields of `MergeOptions` (coefficient, rank, heads, dtype), weights,
    one an adapter, and base, the folder or hub id of the model, for adapters whose ΔW hangs on it. A method that looks
    at data takes `task`, one for all or one an adapter. Heads kept apart are written by `lora_lab.merging.save` alone.
    """
    from lora_lab.adapters.renames import require_shared_modules
    from lora_lab.merging import merged
    from lora_lab.merging.methods import MERGES
    from lora_lab.merging.sources import Sources, base_of

    loaded = _adapters(adapters)
    require_shared_modules(loaded)
    common = {
        field.name: options.pop(field.name)
        for field in dataclasses.fields(merged.MergeOptions)
        if field.name in options
    }
    weights, base = options.pop("weights", None), options.pop("base", None)
    where = on or Execution()
    sources = Sources(
        loaded,
        weights,
        base=base_of(loaded, base, trust_record=trust_record),
        tasks=_tasks(loaded, task, trust_record) if MERGES[method].reads_data else None,
        device=where.place(),
    )
    with _shown(where, f"merging by {method}", progress) as told:
        made = merged.merge(sources, method, options=options, progress=told.progress, **common)
    if made.heads:
        raise OptionError("heads kept apart are no part of an adapter; lora_lab.merging.save writes them beside it")
    return made.adapter


@checked
def prune(
    adapter: OneAdapter,
    task: TaskLike = None,
    *,
    keep: str | None = None,
    sparsity: float | None = None,
    rank: int | None = None,
    on: Execution | None = None,
    progress: bool = True,
    trust_record: bool = False,
    **options: Any,
) -> Adapter:
    """The adapter with the modules that a pattern keeps, a share of its entries 0, or a lower rank: in one way.

    keep: a pattern such as every-other or top-shapley:2, with the fields of `Shapley` as options (players and seed
    for all patterns, the rest for those by Shapley values, which are computed on the validation split of `task`).
    sparsity: a share, with by (the criterion), per_matrix, seed. rank, energy, the share of ‖ΔW‖² that is kept,
    cumulative or ratio: with by (the order of the ranks), as in `lora_lab.pruning.prune_rank`. What it cost is told by
    the functions of `lora_lab.pruning`. `on` and `progress` are of the Shapley values; all else is computed here.
    """
    from lora_lab import pruning

    (loaded,) = _adapters(adapter)
    by_rank = rank is not None or not options.keys().isdisjoint(("energy", "cumulative", "ratio"))
    if sum([keep is not None, sparsity is not None, by_rank]) != 1:
        raise OptionError("say how to prune, in one way: keep, sparsity, or rank (or energy, cumulative, ratio)")
    if keep is not None:
        shown = _shown(on, "asking for coalitions", progress)
        names = _kept(loaded, keep, partial(_task_of, [loaded], task, trust_record), shown, options)
        return pruning.structured(loaded, names, pattern=keep).adapter
    if sparsity is not None:
        _check_names("pruning by sparsity", options, _keywords(pruning.prune_weights))
        return pruning.prune_weights(loaded, sparsity=sparsity, **options).adapter
    _check_names("pruning by rank", options, _keywords(pruning.prune_rank))
    return pruning.prune_rank(loaded, rank=rank, **options).adapter


@checked
def fuse(
    base: Path_,
    adapters: Adapters,
    path: Path_,
    *,
    force: bool = False,
    on: Execution | None = None,
    progress: bool = True,
    **options: Any,
) -> Fused:
    """The checkpoint base + Σ coefficient · ΔW as the folder `path`, and what rounding to the base's dtype took.

    `base` is a folder or file on this machine, or a hub id in its cache; `options` are the fields of `FuseOptions`. One
    tensor at a time is in memory; a run that was killed goes on where it was.
    """
    from lora_lab.fusing.fuse import FuseOptions, Fusion
    from lora_lab.hub import checkpoint_folder

    fusion = Fusion(checkpoint_folder(os.fspath(base)), _adapters(adapters), _made(FuseOptions, options))
    with _shown(on, "fusing", progress) as where:
        return fusion.write(
            Path(path), force=force, inputs=_paths(adapters), device=where.place(), progress=where.progress
        )


@checked
def extract(
    base: Path_, tuned: Path_, *, on: Execution | None = None, progress: bool = True, **options: Any
) -> Adapter:
    """The LoRA adapter whose ΔW is tuned − base, of two checkpoints; `options` are the fields of `ExtractOptions`.

    Its record tells the error. `lora_lab.fusing.extract.extract` gives that of every module, and what differs besides.
    """
    from lora_lab.fusing.extract import ExtractOptions
    from lora_lab.fusing.extract import extract as extracted
    from lora_lab.hub import checkpoint_folder

    how = _made(ExtractOptions, options)
    before, after = (checkpoint_folder(os.fspath(path)) for path in (base, tuned))
    with _shown(on, "extracting", progress) as where:
        return extracted(before, after, how, device=where.place(), progress=where.progress).adapter


@checked
def verify(
    base: Path_,
    adapters: Adapters,
    merged: Path_,
    *,
    coefficients: Sequence[float] = (),
    heads: str | None = None,
    on: Execution | None = None,
    progress: bool = True,
) -> Verified:
    """Whether the checkpoint `merged` is base + Σ coefficient · ΔW: `.right`, `.verdict`, and a finding a parameter."""
    from lora_lab.fusing.verify import verify as verified
    from lora_lab.hub import checkpoint_folder

    places = [checkpoint_folder(os.fspath(path)) for path in (base, merged)]
    how: Any = {"coefficients": coefficients, "heads": heads}
    with _shown(on, "verifying", progress) as where:
        device, report = where.place(), where.progress
        return verified(places[0], _adapters(adapters), places[1], **how, device=device, progress=report)


@checked
def convert(adapter: Adapter | Path_, to: str, *, dtype: str | None = None) -> Adapter:
    """The adapter as its `save` writes it in another format (peft, diffusers, kohya, mlx), with the same ΔW.

    `dtype` (float32, bfloat16 or float16) is the type of its factors, by default their own. What the format has no
    place for is left out with a warning where it changes no weight, and refused when it is saved where it does.
    """
    from lora_lab.adapters.converting import converted

    (loaded,) = _adapters(adapter)
    made = converted(loaded, to, dtype)
    for change in made.changes:
        warnings.warn(f"{loaded.label}: {change}", LoraLabWarning, stacklevel=2)
    return made.adapter


@checked
def interpolate(
    adapters: Adapters,
    task: TaskLike = None,
    *,
    on: Execution | None = None,
    progress: bool = True,
    trust_record: bool = False,
    **options: Any,
) -> Result:
    """Loss and accuracy on the lines between adapters, with barriers; `options` are the fields of `Interpolate`."""
    from lora_lab.analysis.questions import Interpolate

    shown = _shown(on, "interpolating", progress)
    return _answered(_made(Interpolate, options), adapters, task, trust_record, shown)


@checked
def stability(
    adapters: Adapters,
    task: TaskLike = None,
    *,
    on: Execution | None = None,
    progress: bool = True,
    trust_record: bool = False,
    **options: Any,
) -> Result:
    """Accuracy and loss with only some layers' updates on; `options` are the fields of `Stability`."""
    from lora_lab.analysis.questions import Stability

    shown = _shown(on, "scoring keep-sets", progress)
    return _answered(_made(Stability, options), adapters, task, trust_record, shown)


@checked
def shapley(
    adapters: Adapters,
    task: TaskLike = None,
    *,
    on: Execution | None = None,
    progress: bool = True,
    trust_record: bool = False,
    **options: Any,
) -> Result:
    """What each layer (module, type …) of an adapter contributes; `options` are the fields of `Shapley`."""
    from lora_lab.analysis.questions import Shapley

    shown = _shown(on, "asking for coalitions", progress)
    return _answered(_made(Shapley, options), adapters, task, trust_record, shown)


@checked
def sweep(
    adapters: Adapters,
    task: TaskLike = None,
    *,
    on: Execution | None = None,
    progress: bool = True,
    trust_record: bool = False,
    **options: Any,
) -> Result:
    """Adapters pruned in every way beside random controls; `options` are the fields of `Sweep`."""
    from lora_lab.analysis.questions import Sweep

    shown = _shown(on, "scoring pruned adapters", progress)
    return _answered(_made(Sweep, options), adapters, task, trust_record, shown)


@checked
def evaluate(
    adapters: Adapters,
    task: TaskEach = None,
    *,
    on: Execution | None = None,
    progress: bool = True,
    trust_record: bool = False,
    **options: Any,
) -> Result:
    """Scores of adapters and of their bases, with 95 % intervals; `options` are the fields of `Evaluate`."""
    from lora_lab.analysis.questions import Evaluate

    shown = _shown(on, "evaluating", progress)
    return _answered(_made(Evaluate, options), adapters, task, trust_record, shown, _tasks)


@checked
def compare_merges(
    adapters: Adapters,
    task: TaskEach = None,
    *,
    on: Execution | None = None,
    progress: bool = True,
    trust_record: bool = False,
    **options: Any,
) -> Result:
    """Accuracy of every merge on the tasks of its adapters; `options` are the fields of `CompareMerges`."""
    from lora_lab.analysis.questions import CompareMerges
    from lora_lab.merging.sources import base_of

    question, loaded = _made(CompareMerges, options), _adapters(adapters)
    tasks = _tasks(loaded, task, trust_record)
    question.check_sets(loaded, tasks)
    base = base_of(loaded, question.base_name, trust_record=trust_record)
    with _shown(on, "merging and scoring", progress) as where:
        return question.run(loaded, tasks, where, base=base)


@checked
def figure(results: Results, kind: str | None = None, *, width: str = "double") -> Figure:
    """The matplotlib figure of one or more results (or their files) of one kind; `kind` chooses another view."""
    from lora_lab import plots

    several = [results] if isinstance(results, Result | str | os.PathLike) else results
    loaded = [result if isinstance(result, Result) else Result.load(Path(result)) for result in several]
    return plots.figure(loaded, kind=kind, width=width)


def _answered(
    question: Question,
    adapters: Adapters,
    task: Any,
    trust_record: bool,
    shown: contextlib.AbstractContextManager[Execution],
    of: Callable[[Sequence[Adapter], Any, bool], Any] | None = None,
) -> Result:
    """The answer to a question about these adapters, on the task that they share, or on what `of` makes of theirs."""
    loaded = _adapters(adapters)
    question.check(loaded)
    with shown as where:
        return question.run(loaded, (of or _task_of)(loaded, task, trust_record), where)


def _adapters(given: Adapters) -> list[Adapter]:
    several = [given] if isinstance(given, Adapter | str | os.PathLike) else given
    return [adapter if isinstance(adapter, Adapter) else load(adapter) for adapter in several]


def _paths(given: Adapters) -> list[Path]:
    """The adapters that are files, which no output may replace."""
    several = [given] if isinstance(given, Adapter | str | os.PathLike) else given
    return [Path(each) for each in several if not isinstance(each, Adapter)]


def _task(given: OneTask) -> Task:
    return given if isinstance(given, Task) else task(given)


def _task_of(adapters: Sequence[Adapter], given: TaskLike, trust_record: bool) -> Task:
    return task_of(*adapters, trust_record=trust_record) if given is None else _task(given)


def _tasks(adapters: Sequence[Adapter], given: TaskEach, trust_record: bool) -> list[Task]:
    """A task for each adapter: its own, or the one for all, or one given for each of them."""
    if given is None:
        return tasks_of(adapters, trust_record=trust_record)
    several = [_task(given)] if isinstance(given, Task | str | os.PathLike) else [_task(each) for each in given]
    if len(several) not in (1, len(adapters)):
        raise OptionError(f"{len(adapters)} adapters and {len(several)} tasks; one for all, or one an adapter")
    return several * len(adapters) if len(several) == 1 else several


def _kept(
    adapter: Adapter,
    pattern: str,
    task: Callable[[], Task],
    shown: contextlib.AbstractContextManager[Execution],
    options: Mapping[str, Any],
) -> list[str]:
    """The modules that a pattern keeps; Shapley values are computed for those alone that are by them."""
    from lora_lab.analysis.questions import Shapley
    from lora_lab.pruning.patterns import choice_of, keep

    question = _made(Shapley, {"split": "validation", **options})
    choice = choice_of(adapter, by=question.players, seed=question.seed)

    def shapley() -> dict[str, float]:
        with shown as where:
            return question.values(adapter, task(), where)

    return keep(dataclasses.replace(choice, shapley=shapley), pattern)


@contextlib.contextmanager
def _shown(on: Execution | None, what: str, progress: bool) -> Iterator[Execution]:
    """The execution, with a bar unless it tells somebody already or none is wanted."""
    on = on or Execution()
    if not progress or on.progress:
        yield on
        return
    with bar(what) as report:
        yield dataclasses.replace(on, progress=report)


def _made(cls: type[Made], options: Mapping[str, Any]) -> Made:
    """A dataclass from keywords, where a list, or one text alone, stands for a tuple; OptionError for another name."""
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    _check_names(cls.__name__, options, list(defaults))
    return cls(
        **{name: _tupled(value) if isinstance(defaults[name], tuple) else value for name, value in options.items()}
    )


def _tupled(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _check_names(what: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in options:
        if name not in known:
            raise unknown(f"option of {what}", name, known)


def _keywords(function: Callable[..., Any]) -> list[str]:
    parameters = signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
