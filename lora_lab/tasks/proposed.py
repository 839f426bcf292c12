"""The task file that would fit an adapter which records no task: of the kind that its base model is for."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator

from lora_lab import tasks
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.models.bases import configuration_of

_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
"""PEFT's task_type → how the names of transformers' classes for it end."""


def kinds_for(adapter: Adapter) -> list[str]:
    """The kinds of tasks that fit its model, those of what it was trained as first; none where nothing is known."""
    names = list(_classes(adapter))
    for name in names:
        fitting = [kind for kind, entry in tasks.KINDS.items() if any(name.endswith(end) for end in entry.fits)]
        if fitting:
            return fitting
    return []


def task_file_for(adapter: Adapter, kind: str | None = None) -> str:
    """The lines of a task file of this kind, or of the first that fits, with the adapter's base where it names one."""
    kind = kind or next(iter(kinds_for(adapter)), next(iter(tasks.KINDS)))
    content = tomllib.loads(tasks.example(kind))
    content["base"] = adapter.base_model or content.get("base")
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in content.items())


def _classes(adapter: Adapter) -> Iterator[str]:
    """Names of classes, surest first: what PEFT was told, the class that was wrapped, those of the base's folder."""
    said = _CLASSES.get(str(adapter.config.get("task_type")).removeprefix("TaskType."))
    if said:
        yield said
    wrapped = adapter.config.get("auto_mapping")
    if isinstance(wrapped, dict):
        yield str(wrapped.get("base_model_class"))
    named = (configuration_of(adapter) or {}).get("architectures")
    if isinstance(named, list):
        yield from map(str, named)
