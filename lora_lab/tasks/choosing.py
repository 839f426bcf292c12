"""The tasks of adapters: the one that is given, or those that their records name, as far as these may."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_lab import tasks
from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import MismatchError, OptionError, shorten
from lora_lab.files.trust import judged
from lora_lab.results.result import fingerprint
from lora_lab.tasks.task import Task

_EXAMPLE = (
    'kind = "text-classification" / base = "path/to/model" / data = "reviews.csv" / text = "text" / label = "label"'
)


def tasks_of(adapters: Sequence[Adapter], given: Sequence[str] = (), *, trust_record: bool = False) -> list[Task]:
    """A task for each adapter: its own, or the one that is given for all, or one given for each of them."""
    if len(given) > 1 and len(given) != len(adapters):
        raise OptionError(f"{len(adapters)} adapters and {len(given)} tasks; one for all, or one an adapter")
    names: list[str | None] = [*given] or [None]
    names = names * len(adapters) if len(names) == 1 else names
    built: dict[str, Task] = {}  # equal tasks load their data once
    chosen = []
    for adapter, name in zip(adapters, names, strict=True):
        task = task_of(adapter, given=name, trust_record=trust_record)
        chosen.append(built.setdefault(fingerprint(task.record), task))
    return chosen


def task_of(*adapters: Adapter, given: str | None = None, trust_record: bool = False) -> Task:
    """The task named by the user, or else the one that the adapters' records agree on.

    TrustError where a record that is not the user's own asks for more than it may without `trust_record`.
    """
    if given is not None:
        return tasks.from_name(given)
    records = [adapter.record.get("task") for adapter in adapters]
    for adapter, record in zip(adapters, records, strict=True):
        if not record or not isinstance(record, dict):
            raise MismatchError(
                f"{adapter.source}: carries no record of its task; `task` says on which: a built-in one "
                f"({shorten(tasks.TASKS)}) or a file such as: {_EXAMPLE} (one a line)"
            )
    first = records[0]
    for adapter, record in zip(adapters, records, strict=True):
        if record != first:
            raise MismatchError(
                f"{adapters[0].source} and {adapter.source} were trained on different tasks, "
                f"{_difference(first, record)}; `task` names one for both"
            )
    assert isinstance(first, dict)
    # of equal records, one of the user's own speaks for all
    speaker = next((adapter for adapter in adapters if adapter.origin.own), adapters[0])
    reach = judged(first, speaker.origin, speaker.config, speaker.source, trust_record=trust_record)
    base = _beside(first, speaker) if reach.folder is None else Path(reach.folder)
    return tasks.from_record(first, base=base, where=f"the record of {speaker.source}", reach=reach)


def _beside(record: Mapping[str, Any], adapter: Adapter) -> Path:
    """Where a record's relative paths begin: the current folder, or the adapter's, if the base is only found there."""
    base, folder = record.get("base"), Path(adapter.source).parent
    if not isinstance(base, str):
        return Path()
    return folder if not os.path.exists(base) and base and os.path.isdir(folder / base) else Path()


def _difference(first: object, second: object) -> str:
    """How two records of tasks differ, in words: by name, or by the first key."""
    if not isinstance(first, dict) or not isinstance(second, dict):
        return f"{first} and {second}"
    if "name" in first and "name" in second:
        return f"{first['name']} and {second['name']}"
    key = next(key for key in {**first, **second} if first.get(key) != second.get(key))
    return f"whose {key} is {first.get(key)!r} and {second.get(key)!r}"
