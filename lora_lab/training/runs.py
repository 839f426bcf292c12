"""Several trainings side by side, a process and a thread each, or a worker of a cluster each."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.errors import DivergedError, FileError, LoraLabError, LoraLabNote, LoraLabWarning, OptionError
from lora_lab.files.disk import refuse_existing
from lora_lab.files.trust import recordable
from lora_lab.results.result import Result, fingerprint, finite, provenance
from lora_lab.scoring.sharing.worker import report, telling
from lora_lab.scoring.sharing.workers import Workers, open_workers

if TYPE_CHECKING:
    from lora_lab.adapters.adapter import Adapter
    from lora_lab.training.recipe import Recipe

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """One training and where its adapter goes."""

    task: Mapping[str, Any]
    """The task's record."""
    recipe: Recipe
    path: Path
    device: str | None = None
    report_to: str = "none"
    format: str | None = None
    """In which the adapter is written; None for PEFT's."""
    may_diverge: bool = False
    """Whether a training whose loss is no number is a result (with `summary["diverged"]`), and no error."""

    @property
    def beside(self) -> tuple[Path, Path, Path]:
        """The log of the run and its figure."""
        stem = self.path.name.removesuffix(".safetensors")
        json, pdf, png = (self.path.with_name(f"{stem}.train.{ending}") for ending in ("json", "pdf", "png"))
        return json, pdf, png

    @property
    def checkpoints(self) -> Path:
        """The folder of its Trainer checkpoints."""
        return self.path.with_name(self.path.name.removesuffix(".safetensors") + ".checkpoints")


def train_all(
    jobs: Sequence[Job],
    *,
    processes: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> list[Result]:
    """Train every job and save its adapter, log and figure; the logs, in the order of the jobs.

    A job that is finished already (see `finished`) is kept, with a note, so that a killed call goes on where it was;
    `force` trains it again. Nothing starts if anything else is in an output's place and `force` does not allow to
    replace it. Several jobs are trained in so many `processes` of a thread each (by default as many as there are
    cores), or by the `workers` given, a single one in this process; all are saved here, and checkpoints lie where they
    are trained. `progress` gets optimiser steps over all jobs; from a cluster, which does not tell them, jobs.
    """
    if processes is not None and processes < 1:
        raise OptionError(f"{processes} jobs side by side; at least 1 is needed")
    if workers and processes is not None:
        raise OptionError(
            "jobs side by side are counted in processes of this machine, or given as workers: one of the two"
        )
    if _together() > 1:  # torchrun's processes: all of them train one job after the other, together
        if workers:
            raise OptionError(
                "torchrun has several processes train one adapter, workers several adapters: one of the two"
            )
        processes = 1
    paths = [job.path for job in jobs]
    if len(set(paths)) < len(paths):
        raise OptionError("two of these runs would write the same file")
    kept = {} if force else _kept(jobs)
    left = [job for i, job in enumerate(jobs) if i not in kept]
    for job in left if is_first() else ():
        refuse_existing(job.path, *job.beside, force=force or _begun(job))
    logs = {jobs[i].path: log for i, log in kept.items()}
    if left:
        logs |= _train_left(left, min(processes or os.cpu_count() or 1, len(left)), force, progress, workers)
    return [logs[path] for path in paths]


def _train_left(
    jobs: Sequence[Job], processes: int, force: bool, progress: Progress | None, workers: Workers | None
) -> dict[Path, Result]:
    """The log of every job by the path of its adapter, once they are trained and saved."""
    logs: dict[Path, Result] = {}
    steps: dict[Path, tuple[int, int]] = {}

    def hear(job: Job, done: int, total: int) -> None:
        steps[job.path] = done, total
        if progress:
            progress(sum(done for done, _ in steps.values()), total * len(jobs))

    def keep(job: Job, trained: Trained) -> None:
        adapter, log, told = trained
        for warning in told:
            warnings.warn(warning, stacklevel=2)
        logs[job.path] = replace(log, provenance={**log.provenance, "command": command})
        if is_first():
            _save(job, adapter, logs[job.path], force)
        if progress and not steps:
            progress(len(logs), len(jobs))

    command = provenance()["command"]
    if workers is None and processes == 1:
        for job in jobs:
            keep(job, (*_trained(job, partial(hear, job)), ()))
        return logs
    with contextlib.ExitStack() as opened:
        if workers:
            jobs = [replace(job, device=workers.device) for job in jobs]
        else:
            workers = opened.enter_context(open_workers(processes, device=jobs[0].device, threads=1))
        assert workers is not None
        workers.map(_Trainer(), jobs, keep, hear)
    return logs


def _kept(jobs: Sequence[Job]) -> dict[int, Result]:
    """Place → log of every job that is finished; a figure that is missing is drawn."""
    from lora_lab import plots

    seen: Seen = {}
    kept = {i: log for i, job in enumerate(jobs) if (log := finished(job, seen)) is not None}
    for i, log in kept.items():
        _, *figures = jobs[i].beside
        if is_first() and not all(path.exists() for path in figures):
            plots.save(plots.figure([log]), *figures, force=True)
        warnings.warn(f"{jobs[i].path}: this very training is there already, and kept", LoraLabNote, stacklevel=3)
    return kept


Seen = dict[str, tuple[Any, str]]
"""Tasks that were built already, with their data's hash, by the fingerprint of their record."""


def finished(job: Job, seen: Seen) -> Result | None:
    """The log of this very training, if an earlier call has finished it: its adapter and its log are whole.

    They are if the adapter is signed as this user's own, its record is the log's, and both are of the job's task, data,
    method, seed and recipe.
    """
    log = _log_of(job, seen) if job.path.exists() else None
    adapter = there(job) if log is not None else None
    if log is None or adapter is None:
        return None
    record = {key: value for key, value in adapter.record.items() if key != "metrics"}
    wanted, found = recordable(log.parameters.get("record")), adapter.record.get("metrics")
    metrics = {name: log.summary.get(name) for name in found} if isinstance(found, dict) else None
    whole = fingerprint([finite(recordable(record)), finite(found)]) == fingerprint([wanted, metrics])
    return log if adapter.origin.own and whole else None


def there(job: Job) -> Adapter | None:
    """The adapter that lies at the job's path, if it can be read and is in the job's format."""
    from lora_lab.adapters.adapter import Adapter
    from lora_lab.adapters.formats.registry import PEFT

    if not job.path.exists():
        return None
    try:
        adapter = Adapter.load(job.path)
    except LoraLabError:
        return None
    return adapter if adapter.layout.format == (job.format or PEFT) else None


def _begun(job: Job) -> bool:
    """Whether what lies in the outputs' place is this very training's, killed before its adapter was written."""
    return not job.path.exists() and _log_of(job, {}) is not None


def _log_of(job: Job, seen: Seen) -> Result | None:
    """The log beside the job's adapter, if it is of the job's task, data, method, seed and recipe."""
    if not job.beside[0].exists():
        return None
    from lora_lab import tasks
    from lora_lab.training.fit import data_of, recipe_record

    try:
        log = Result.load(job.beside[0])
    except (FileError, ValueError):
        return None
    key = fingerprint(job.task)
    if key not in seen:
        task = tasks.from_spec(job.task)
        seen[key] = task, data_of(task)
    task, data = seen[key]
    recipe = job.recipe.for_task(task)
    wanted = [finite(recordable(job.task)), recipe.method, recipe.seed, recipe_record(recipe), data]
    record = recordable(log.parameters.get("record"))
    if not isinstance(record, dict):
        return None
    found = [*(record.get(name) for name in ("task", "method", "seed", "recipe")), log.provenance.get("data")]
    return log if fingerprint(found) == fingerprint(wanted) else None


def _together() -> int:
    """How many processes train together, as torchrun and accelerate say it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


Trained = tuple["Adapter | None", Result, Sequence[Warning]]
"""The adapter (None where the job may diverge, and did), its log, and what there was to be told meanwhile."""


@dataclass(frozen=True)
class _Trainer:
    """Trains jobs in a worker."""

    fingerprint: str = "train"

    def __call__(self) -> Callable[[Job], Trained]:
        return self._train

    def _train(self, job: Job) -> Trained:
        (adapter, log), told = telling(partial(_trained, job, report))
        return adapter, log, told


def _trained(job: Job, progress: Progress | None) -> tuple[Adapter | None, Result]:
    """The adapter and its log; no adapter where the job may diverge and does."""
    import torch

    from lora_lab import tasks
    from lora_lab.tasks.task import resolve_device
    from lora_lab.training.fit import train

    chosen = tasks.from_spec(job.task)
    threads = torch.get_num_threads()
    torch.set_num_threads(chosen.threads or threads)
    try:
        return train(
            chosen,
            job.recipe,
            device=resolve_device(job.device),
            checkpoints=job.checkpoints,
            report_to=job.report_to,
            progress=progress,
            written_as=job.format,
        )
    except DivergedError as error:
        if not job.may_diverge:
            raise
        return None, Result("train", {}, {"recipe": job.recipe.method}, {"diverged": str(error)})
    finally:
        torch.set_num_threads(threads)


def _save(job: Job, adapter: Adapter | None, log: Result, force: bool) -> None:
    from lora_lab import plots
    from lora_lab.adapters.files.converting import converted

    if adapter is None:
        return
    json, *figures = job.beside
    log.save(json)
    made = converted(adapter, job.format)
    for change in made.changes:
        warnings.warn(f"{job.path}: {change}", LoraLabWarning, stacklevel=2)
    made.adapter.save(job.path, force=force)  # after its log: where there is an adapter, the training is finished
    plots.save(plots.figure([log]), *figures, force=True)
