"""Trainings at several settings; the best is chosen on validation data, so that methods meet at their own best."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_lab.errors import TaskError, unknown
from lora_lab.files.disk import refuse_existing
from lora_lab.files.trust import recordable
from lora_lab.results.result import Result, columns, fingerprint, finite, provenance
from lora_lab.scoring.sharing.workers import Workers
from lora_lab.tasks.scores.metrics import Metric
from lora_lab.training.runs import Job, Seen, finished, is_first, there, train_all

Setting = Mapping[str, Any]
"""Field of the recipe → value."""


def settings_of(given: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """All combinations of the values given for some fields; one, empty, where there is one value each."""
    names = [name for name, values in given.items() if len(values) > 1]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(given[name] for name in names))]


def train_best(
    jobs: Sequence[Job],
    settings: Sequence[Setting],
    *,
    metric: Sequence[str] = (),
    processes: int | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    workers: Workers | None = None,
) -> tuple[list[Result], Result]:
    """Train every job (a seed each, of one task) at every setting and keep the best; its logs, and what all gave.

    Best is the setting that is best by the first `metric`, or the task's main one, on the validation split, a mean over
    the jobs (then by the others): the highest accuracy, or of a language model the lowest loss. Its adapters go to the
    jobs' paths, with all that was tried in their records; the others stay in the folder `tried` beside them, from which
    a killed run goes on. A setting whose training diverges is kept as a row and never chosen.
    """
    from lora_lab import tasks

    task, paths = jobs[0].task, [job.path for job in jobs]
    built = tasks.from_spec(task)
    for name in metric:
        if built.metrics and name not in built.usual:
            raise unknown(f"metric that trainings on {built.name} are judged by:", name, list(built.usual))
    began = time.perf_counter()
    trials = [_trial(job, setting) for setting in settings for job in jobs]
    seen: Seen = {}
    known = {i: log for i, trial in enumerate(trials) if (log := finished(trial, seen)) is not None}
    for i, path in enumerate(paths) if is_first() else ():
        logs_there = [known[k] for k in range(i, len(trials), len(jobs)) if k in known]
        refuse_existing(path, force=force or _chosen_before(jobs[i], logs_there))
    left = [i for i in range(len(trials)) if i not in known]
    if left:
        done = train_all([trials[i] for i in left], processes=processes, force=True, progress=progress, workers=workers)
        known |= dict(zip(left, done, strict=True))
    logs = [[known[k * len(jobs) + i] for i in range(len(jobs))] for k in range(len(settings))]
    there = dict.fromkeys(name for each in logs for log in each for name in _validated(log))
    metrics = [name for name in dict.fromkeys((*metric, *built.metrics, *there)) if name in there]
    rows = [{**setting, **_mean(each, metrics)} for setting, each in zip(settings, logs, strict=True)]
    able = [k for k, row in enumerate(rows) if all(row[name] is not None for name in metrics)] if metrics else []
    if not able:
        raise TaskError(f"training diverged at every setting: {_words(settings)}; lower the learning rates")
    best = min(able, key=lambda k: [_rank(rows[k][name], built.metric(name)) for name in metrics])
    for k, row in enumerate(rows):
        row["chosen"] = k == best
    chosen = trials[best * len(jobs) : (best + 1) * len(jobs)]
    for trial, log, path in zip(chosen, logs[best], paths, strict=True) if is_first() else ():
        _keep(trial, log, path, rows)
    trained = [
        {"method": job.recipe.method, "seed": job.recipe.seed, **setting, **_mean([log], metrics), "chosen": k == best}
        for k, setting in enumerate(settings)
        for job, log in zip(jobs, logs[k], strict=True)
    ]
    said = {"task": recordable(task), "options": list(settings[0]), "criterion": metrics[0]}
    made = provenance(elapsed_s=time.perf_counter() - began, seeds=[job.recipe.seed for job in jobs])
    return logs[best], Result("tuning", columns(trained), said, {"settings": rows}, made)


def _trial(job: Job, setting: Setting) -> Job:
    """The job at a setting, its adapter in the folder `tried`."""
    words = "-".join(f"{name}={value}" for name, value in setting.items())
    path = job.path.parent / "tried" / f"{job.path.name.removesuffix('.safetensors')}-{words}.safetensors"
    return dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, **setting), path=path, may_diverge=True)


def _chosen_before(job: Job, logs: Sequence[Result]) -> bool:
    """Whether the job's adapter is what an earlier call has chosen among the trainings of these logs."""
    adapter = there(job)
    if adapter is None or not adapter.origin.own or "tuning" not in adapter.record:
        return False
    names = ("task", "method", "seed", "recipe", "metrics")
    found = fingerprint([finite(adapter.record.get(name)) for name in names])
    records = [
        recordable(log.parameters["record"]) | {"metrics": {"validation": log.summary["validation"]}} for log in logs
    ]
    return any(fingerprint([record.get(name) for name in names]) == found for record in records)


def _validated(log: Result) -> dict[str, Any]:
    """Metric of a training's validation → its value; empty where it diverged."""
    return {name: value for name, value in log.summary.get("validation", {}).items() if name != "examples"}


def _mean(logs: Sequence[Result], metrics: Sequence[str]) -> dict[str, Any]:
    """The same as means over the seeds, None where one of them has none."""
    found = [_validated(log) for log in logs]
    if any(each.get(name) is None for each in found for name in metrics):
        return dict.fromkeys(metrics)
    return {name: float(np.mean([each[name] for each in found])) for name in metrics}


def _rank(value: float, metric: Metric) -> float:
    """The smaller the better; of what differs by rounding alone, the next metric decides."""
    return round(-value if metric.higher else value, 12)


def _keep(job: Job, log: Result, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from lora_lab import plots
    from lora_lab.adapters.adapter import Adapter

    adapter = Adapter.load(job.path)
    record = {**adapter.record, "tuning": [dict(row) for row in rows]}
    dataclasses.replace(adapter, record=record).save(path, force=True)  # what stands there has been looked at
    json, *figures = dataclasses.replace(job, path=path).beside
    log.save(json)
    plots.save(plots.figure([log]), *figures, force=True)


def _words(settings: Sequence[Setting]) -> str:
    return "; ".join(", ".join(f"{name} {value}" for name, value in setting.items()) for setting in settings)
