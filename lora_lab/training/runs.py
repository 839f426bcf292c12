"""Several trainings side by side, a process and a thread each, or a worker of a cluster each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.errors import DivergedError, FileError, LoraLabError, LoraLabNote, OptionError
from lora_lab.files.disk import refuse_existing
from lora_lab.files.trust import recordable
from lora_lab.results.result import Result, fingerprint, finite, provenance
from lora_lab.scoring.processes import end_with_parent
from lora_lab.scoring.workers import Workers

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
    replace it. A single job runs in this process. `progress` gets optimiser steps over all jobs. With `workers`, a
    worker trains each and sends it back to be saved here, and `progress` gets jobs; checkpoints lie where the worker
    runs.
    """
    if processes is not None and processes < 1:
        raise OptionError(f"{processes} jobs side by side; at least 1 is needed")
    if workers and processes is not None:
        raise OptionError("--jobs counts processes of this machine; with --ray, the workers are the cluster's")
    if workers and _processes() > 1:
        raise OptionError("torchrun has several processes train one adapter, --ray several adapters: one of the two")
    if _processes() > 1:  # torchrun's: all of them train one job after the other, together
        processes = 1
    paths = [job.path for job in jobs]
    if len(set(paths)) < len(paths):
        raise OptionError("two of these runs would write the same file")
    kept = {} if force else _kept(jobs)
    left = [job for i, job in enumerate(jobs) if i not in kept]
    trained = iter(_train_left(left, processes, force, progress, workers) if left else [])
    return [kept[i] if i in kept else next(trained) for i in range(len(jobs))]


def _train_left(
    jobs: Sequence[Job], processes: int | None, force: bool, progress: Progress | None, workers: Workers | None
) -> list[Result]:
    for job in jobs if is_first() else ():
        refuse_existing(job.path, *job.beside, force=force or _begun(job))
    if workers:
        return _train_in(workers, jobs, force, progress)
    processes = min(processes or os.cpu_count() or 1, len(jobs))
    if processes == 1:
        return [_run(job, force, _Total(progress, len(jobs), i)) for i, job in enumerate(jobs)]
    # spawn, not fork: torch's threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    done = context.RawArray("q", 2 * len(jobs))  # of every job the steps that are done, and all of them
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin_worker, initargs=(done,)) as executor:
        with _deaf():
            futures = [executor.submit(_run_in_worker, job, force, i) for i, job in enumerate(jobs)]
        try:
            while wait(futures, timeout=0.5).not_done:
                if progress and any(done[1::2]):
                    progress(sum(done[::2]), max(done[1::2]) * len(jobs))
                if any(future.done() and future.exception() for future in futures):
                    break
            return [future.result() for future in futures]
        except BaseException as error:
            executor.shutdown(wait=False, cancel_futures=True)
            for worker in set(multiprocessing.active_children()) - set(others):
                worker.terminate()
            if isinstance(error, BrokenProcessPool):
                raise LoraLabError("a process that trained was ended from outside, for its memory perhaps") from error
            raise


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
    if not job.path.exists():
        return None
    log = _log_of(job, seen)
    if log is None:
        return None
    from lora_lab.adapters.adapter import Adapter

    try:
        adapter = Adapter.load(job.path)
    except LoraLabError:
        return None
    record = {key: value for key, value in adapter.record.items() if key != "metrics"}
    wanted, found = recordable(log.parameters.get("record")), adapter.record.get("metrics")
    metrics = {name: log.summary.get(name) for name in found} if isinstance(found, dict) else None
    whole = fingerprint([finite(recordable(record)), finite(found)]) == fingerprint([wanted, metrics])
    return log if adapter.origin.own and whole else None


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
        task = tasks.from_record(job.task)
        seen[key] = task, data_of(task)
    task, data = seen[key]
    recipe = job.recipe.for_task(task)
    wanted = [finite(recordable(job.task)), recipe.method, recipe.seed, recipe_record(recipe), data]
    record = recordable(log.parameters.get("record"))
    if not isinstance(record, dict):
        return None
    found = [*(record.get(name) for name in ("task", "method", "seed", "recipe")), log.provenance.get("data")]
    return log if fingerprint(found) == fingerprint(wanted) else None


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Processes that are started here do not hear Ctrl-C: this one does, and ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _processes() -> int:
    """How many processes train together, as torchrun and accelerate say it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


class _Total:
    """Progress of one job within all of them."""

    def __init__(self, progress: Progress | None, jobs: int, index: int) -> None:
        self._progress, self._jobs, self._index = progress, jobs, index

    def __call__(self, step: int, steps: int) -> None:
        if self._progress:
            self._progress(self._index * steps + step, self._jobs * steps)


_done: Any = None
"""In a worker: what it tells of its steps."""


def _begin_worker(done: Any) -> None:
    global _done

    end_with_parent()  # before torch, whose import takes seconds
    import torch

    torch.set_num_threads(1)
    _done = done


def _run_in_worker(job: Job, force: bool, index: int) -> Result:
    def report(step: int, steps: int) -> None:
        _done[2 * index : 2 * index + 2] = [step, steps]

    return _run(job, force, report)


def _train_in(workers: Workers, jobs: Sequence[Job], force: bool, progress: Progress | None) -> list[Result]:
    logs: dict[Path, Result] = {}
    command = provenance()["command"]

    def keep(job: Job, trained: tuple[Adapter | None, Result]) -> None:
        adapter, log = trained
        logs[job.path] = replace(log, provenance={**log.provenance, "command": command})
        _save(job, adapter, logs[job.path], force)
        if progress:
            progress(len(logs), len(jobs))

    workers.map(_Trainer(), [replace(job, device=workers.device) for job in jobs], keep)
    return [logs[job.path] for job in jobs]


@dataclass(frozen=True)
class _Trainer:
    """Trains jobs in a worker."""

    fingerprint: str = "train"

    def __call__(self) -> Callable[[Job], tuple[Adapter | None, Result]]:
        return lambda job: _trained(job, None)


def _run(job: Job, force: bool, progress: Progress) -> Result:
    adapter, log = _trained(job, progress)
    if is_first():
        _save(job, adapter, log, force)
    return log


def _trained(job: Job, progress: Progress | None) -> tuple[Adapter | None, Result]:
    """The adapter and its log; no adapter where the job may diverge and does."""
    import torch

    from lora_lab import tasks
    from lora_lab.tasks.task import resolve_device
    from lora_lab.training.fit import train

    chosen = tasks.from_record(job.task)
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
        )
    except DivergedError as error:
        if not job.may_diverge:
            raise
        return None, Result("train", {}, {"recipe": job.recipe.method}, {"diverged": str(error)})
    finally:
        torch.set_num_threads(threads)


def _save(job: Job, adapter: Adapter | None, log: Result, force: bool) -> None:
    from lora_lab import plots

    if adapter is None:
        return
    json, *figures = job.beside
    log.save(json)
    adapter.save(job.path, force=force)  # after its log: where there is an adapter, the training is finished
    plots.save(plots.figure([log]), *figures, force=True)
