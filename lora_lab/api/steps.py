"""What `import lora_lab as ll` gives: each step from a task to a figure as one function.

Adapters are given as `Adapter` or as what `load` reads, one or several; a task as a `Task`, as the name or file that
`task` takes, or None for the one that the adapters record (TrustError where a record that is not the user's own asks
for more than it may without `trust_record`). `on` says where it is computed; `progress` shows a bar.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab import tasks
from lora_lab.adapters.adapter import Adapter
from lora_lab.api.given import (
    Adapters,
    OneAdapter,
    OneTask,
    Path_,
    Results,
    TaskEach,
    TaskLike,
    adapters_of,
    check_names,
    each_task_of,
    from_options,
    kept_by,
    keywords_of,
    one_task_of,
    paths_of,
    results_of,
    task_of_given,
)
from lora_lab.api.given import answered as _answered
from lora_lab.api.given import shown as _shown
from lora_lab.errors import LoraLabWarning, OptionError
from lora_lab.options import checked
from lora_lab.results.result import Result
from lora_lab.scoring.execution import Execution
from lora_lab.tasks.task import Task

if TYPE_CHECKING:
    from lora_lab.fusing.fuse import Fused
    from lora_lab.fusing.verify import Verified


@checked
def load(
    path: Path_, *, config: Path_ | None = None, alpha: float | None = None, adapter_name: str | None = None
) -> Adapter:
    """The adapter of a folder or file of any format, a Trainer checkpoint or a hub id; see `Adapter.load`."""
    return Adapter.load(path, config=config, alpha=alpha, adapter_name=adapter_name)


@checked
def record(path: Path_, task: TaskLike = None, method: str | None = None, seed: int | None = None) -> dict[str, Any]:
    """Put task, training method and seed into the file of an adapter that another program trained; its whole record.

    Nothing else in the file is changed; without any of the three nothing is. See `lora_lab.adapters.put_record`.
    """
    from lora_lab.adapters.files.recording import put_record

    about = None if task is None else task_of_given(task).record
    given = {"task": about, "method": method, "seed": seed}
    entries = {name: value for name, value in given.items() if value is not None}
    return dict(put_record([path], entries)[0].record if entries else Adapter.load(path).record)


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

    made = from_options(Recipe, {"method": method, **recipe})
    with _shown(on, "training", progress) as where:
        return fit(task_of_given(task), made, device=where.place() if where.device else None, progress=where.progress)[
            0
        ]


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

    loaded = adapters_of(adapters)
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
        tasks=each_task_of(loaded, task, trust_record) if MERGES[method].reads_data else None,
        device=where.place(),
        place=None if where.device is None else where.place(),
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
    on: Execution | None = None,
    progress: bool = True,
    trust_record: bool = False,
    **options: Any,
) -> Adapter:
    """The adapter with the modules that a pattern keeps, a share of its entries 0, or a lower rank: in one way.

    keep: a pattern such as every-other or top-shapley:2, with the fields of `Shapley` as options (players and seed
    for all patterns, the rest for those by values, which are computed on the validation split of `task`).
    sparsity: a share, with by (the criterion), per_matrix, seed. rank, energy, the share of ‖ΔW‖² that is kept,
    cumulative or ratio: with by (the order of the ranks), as in `lora_lab.pruning.prune_rank`. intruders: their factor,
    with base, top, threshold, exact, as in `lora_lab.pruning.lower_intruders`. These functions tell what it cost. `on`
    is of Shapley values and of the base's weights.
    """
    from lora_lab import pruning

    (loaded,) = adapters_of(adapter)
    by_rank, factor = not options.keys().isdisjoint(("rank", "energy", "cumulative", "ratio")), options.get("intruders")
    if sum([keep is not None, sparsity is not None, by_rank, factor is not None]) != 1:
        raise OptionError("say how to prune, in one way: keep, sparsity, rank (energy, cumulative, ratio), intruders")
    if keep is not None:
        shown = _shown(on, "asking for coalitions", progress)
        names = kept_by(loaded, keep, partial(one_task_of, [loaded], task, trust_record), shown, options)
        return pruning.structured(loaded, names, pattern=keep).adapter
    if sparsity is not None:
        check_names("pruning by sparsity", options, keywords_of(pruning.prune_weights))
        return pruning.prune_weights(loaded, sparsity=sparsity, **options).adapter
    if factor is not None:
        given = {"factor": factor, "on": on or Execution(), **{k: v for k, v in options.items() if k != "intruders"}}
        check_names("pruning by intruders", given, keywords_of(pruning.lower_intruders))
        return pruning.lower_intruders(loaded, **given).adapter
    known = [*keywords_of(pruning.prune_rank), *(field.name for field in dataclasses.fields(pruning.RankCut))]
    check_names("pruning by rank", options, known)
    return pruning.prune_rank(loaded, **options).adapter


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

    fusion = Fusion(checkpoint_folder(os.fspath(base)), adapters_of(adapters), from_options(FuseOptions, options))
    with _shown(on, "fusing", progress) as where:
        return fusion.write(
            Path(path), force=force, inputs=paths_of(adapters), device=where.place(), progress=where.progress
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

    how = from_options(ExtractOptions, options)
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
        return verified(places[0], adapters_of(adapters), places[1], **how, device=device, progress=report)


@checked
def convert(adapter: Adapter | Path_, to: str, *, dtype: str | None = None) -> Adapter:
    """The adapter as its `save` writes it in another format (peft, diffusers, kohya, comfy, mlx), with the same ΔW.

    `dtype` (float32, bfloat16 or float16) is the type of its factors, by default their own. What the format has no
    place for is left out with a warning where it changes no weight, and refused when it is saved where it does.
    """
    from lora_lab.adapters.files.converting import converted

    (loaded,) = adapters_of(adapter)
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
    return _answered(from_options(Interpolate, options), adapters, task, trust_record, shown)


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
    """The task's metrics with only some layers' updates on; `options` are the fields of `Stability`."""
    from lora_lab.analysis.questions import Stability

    shown = _shown(on, "scoring keep-sets", progress)
    return _answered(from_options(Stability, options), adapters, task, trust_record, shown)


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
    return _answered(from_options(Shapley, options), adapters, task, trust_record, shown)


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
    return _answered(from_options(Sweep, options), adapters, task, trust_record, shown)


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
    return _answered(from_options(Evaluate, options), adapters, task, trust_record, shown, each_task_of)


@checked
def compare(
    adapters: Adapters,
    *,
    base: Path_ | None = None,
    results: Results = (),
    on: Execution | None = None,
    progress: bool = True,
    **options: Any,
) -> Result:
    """Norms, cosines, angles … of every two adapters, in a base, beside results of their merges; see `Compare`."""
    from lora_lab.analysis.comparing import Compare

    question, loaded, merges = from_options(Compare, options), adapters_of(adapters), results_of(results)
    with _shown(on, "comparing", progress) as where:
        return question.run(loaded, where, base=None if base is None else Path(base), merges=merges)


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
    from lora_lab.analysis.merge_tables.question import CompareMerges
    from lora_lab.merging.sources import base_of

    question, loaded = from_options(CompareMerges, options), adapters_of(adapters)
    tasks = each_task_of(loaded, task, trust_record)
    question.check_sets(loaded, tasks)
    base = base_of(loaded, question.base_name, trust_record=trust_record)
    with _shown(on, "merging and scoring", progress) as where:
        return question.run(loaded, tasks, where, base=base)
