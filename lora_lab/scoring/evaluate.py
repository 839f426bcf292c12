"""An adapter's score on a task."""

from __future__ import annotations

import torch

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.models.attached import attach
from lora_lab.tasks.task import Scores, Task, resolve_device


def score(
    task: Task,
    adapter: Adapter | None,
    split: str = "test",
    *,
    device: torch.device | None = None,
    keep_logits: bool = False,
) -> Scores:
    """Per-example scores of the task's base model with the adapter on (None: the base alone)."""
    model = task.model_on(device or resolve_device())
    if adapter is None:
        return task.score(model, split, keep_logits=keep_logits)
    with attach(model, adapter) as attached:
        return task.score(attached.model, split, keep_logits=keep_logits)
