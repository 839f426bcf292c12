"""An adapter's score on a task."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_lab import tasks
from lora_lab.adapter import Adapter
from lora_lab.attach import attach
from lora_lab.errors import MismatchError
from lora_lab.result import Result, columns, fingerprint, provenance
from lora_lab.stats import Sampled
from lora_lab.task import Scores, Task, resolve_device

TASK_HELP = (
    "say on which with --task NAME (`lora-lab tasks` lists them) or --task FILE.toml, a file such as: "
    'kind = "text-classification" / base = "path/to/model" / data = "reviews.csv" / text = "text" / label = "label" '
    "(one a line; `lora-lab tasks --example text-classification` prints a commented one)"
)


def score(task: Task, adapter: Adapter | None, split: str = "test", *, device: torch.device | None = None) -> Scores:
    """Per-example scores of the task's base model with the adapter on (None: the base alone)."""
    model = task.build_model().to(device or resolve_device())
    if adapter is None:
        return task.score(model, split)
    with attach(model, adapter) as attached:
        return task.score(attached.model, split)


def evaluate(
    adapters: Sequence[Adapter],
    *,
    given: str | None = None,
    split: str = "test",
    base: bool = True,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Every adapter on its own task (or the one given), and every base model alone, with 95 % intervals."""
    began = time.perf_counter()
    found = [task_of(adapter, given=given) for adapter in adapters]
    shared = {fingerprint(task.record): task for task in reversed(found)}  # equal tasks load their data once
    runs: list[tuple[Adapter | None, Task]] = [*((None, task) for task in shared.values() if base)]
    runs += [(adapter, shared[fingerprint(task.record)]) for adapter, task in zip(adapters, found, strict=True)]
    rows = []
    for i, (adapter, task) in enumerate(runs):
        scores = score(task, adapter, split, device=device)
        rows.append({**_described(adapter, task), "examples": len(scores), **_estimates(scores, seed)})
        if progress:
            progress(i + 1, len(runs))
    return Result(
        "evaluate",
        columns(rows),
        {"split": split, "tasks": [task.record for task in shared.values()], "seed": seed},
        {},
        provenance(
            inputs=[Path(a.source) for a in adapters], elapsed_s=time.perf_counter() - began, examples=len(scores)
        ),
    )


def _described(adapter: Adapter | None, task: Task) -> dict[str, Any]:
    record = adapter.record if adapter else {}
    label = adapter.label if adapter else "(base model alone)"
    return {"adapter": label, "task": task.name, "method": record.get("method"), "seed": record.get("seed")}


def _estimates(scores: Scores, seed: int) -> dict[str, float]:
    sampled = Sampled.of(np.stack([scores.loss, scores.correct.astype(np.float64)]), seed=seed)
    cells: dict[str, float] = {}
    for i, name in enumerate(("loss", "accuracy")):
        value, low, high = sampled[[i]].estimate(lambda means: means[0])
        cells |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return cells


def task_of(*adapters: Adapter, given: str | None = None) -> Task:
    """The task named by the user, or else the one that the adapters' records agree on."""
    if given is not None:
        return tasks.from_name(given)
    records = [adapter.record.get("task") for adapter in adapters]
    for adapter, record in zip(adapters, records, strict=True):
        if not record:
            raise MismatchError(f"{adapter.source}: carries no record of its task; {TASK_HELP}")
    first = records[0]
    for adapter, record in zip(adapters, records, strict=True):
        if record != first:
            raise MismatchError(
                f"{adapters[0].source} and {adapter.source} were trained on different tasks, "
                f"{_name(first)} and {_name(record)}; choose one with --task"
            )
    assert isinstance(first, dict)
    return tasks.from_record(first, where=f"the record of {adapters[0].source}")


def _name(record: object) -> str:
    return str(record.get("name", record)) if isinstance(record, dict) else str(record)
