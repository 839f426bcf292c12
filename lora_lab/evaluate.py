"""An adapter's score on a task."""

from __future__ import annotations

import torch

from lora_lab import task as tasks
from lora_lab.adapter import Adapter
from lora_lab.attach import attach
from lora_lab.errors import MismatchError
from lora_lab.task import Scores, Task

TASK_HELP = (
    "say on which with --task NAME (`lora-lab tasks` lists them) or --task FILE.toml, a file such as: "
    'kind = "text-classification" / base = "path/to/model" / data = "reviews.csv" / text = "text" / label = "label" '
    "(one a line; `lora-lab tasks --example text-classification` prints a commented one)"
)


def score(task: Task, adapter: Adapter | None, split: str = "test", *, device: torch.device | None = None) -> Scores:
    """Per-example scores of the task's base model with the adapter on (None: the base alone)."""
    model = task.build_model().to(device or tasks.resolve_device())
    if adapter is None:
        return task.score(model, split)
    with attach(model, adapter) as attached:
        return task.score(attached.model, split)


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
