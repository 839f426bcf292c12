"""The tasks of adapters: the one that is given, or those that their records name, as far as these may."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_lab import tasks
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.models.bases import difference_of, folder_of
from lora_lab.errors import LoraLabNote, MismatchError, OptionError, shorten
from lora_lab.files.trust import judged
from lora_lab.results.result import fingerprint
from lora_lab.tasks.beside import task_beside
from lora_lab.tasks.proposed import kinds_for, task_file_for
from lora_lab.tasks.task import Task


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
        chosen.append(built.setdefault(fingerprint(task.spec), task))
    return chosen


def task_of(*adapters: Adapter, given: str | None = None, trust_record: bool = False) -> Task:
    """The task named by the user, or else the one that the adapters' records agree on.

    TrustError where a record that is not the user's own asks for more than it may without `trust_record`.
    """
    if given is not None:
        return tasks.from_name(given)
    records = [_recorded(adapter) for adapter in adapters]
    if not any(records) and (task := _beside_all(adapters, trust_record)):
        return task
    for adapter, record in zip(adapters, records, strict=True):
        if not record:
            raise MismatchError(_without(adapter))
    # of equal records, one of the user's own speaks for all
    speaker = next((adapter for adapter in adapters if adapter.origin.own), adapters[0])
    first = _recorded(speaker)
    for adapter, record in zip(adapters, records, strict=True):
        if record != first and not _of_one_base(speaker, adapter, first, record):
            pair = (speaker, adapter) if speaker is adapters[0] else (adapter, speaker)
            raise MismatchError(
                f"{pair[0].source} and {pair[1].source} were trained on different tasks, "
                f"{_difference(*(_recorded(each) for each in pair))}; `task` names one for both"
            )
    reach = judged(first, speaker.origin, speaker.config, speaker.source, trust_record=trust_record)
    base = _beside(first, speaker) if reach.folder is None else Path(reach.folder)
    return tasks.from_record(first, base=base, where=f"the record of {speaker.source}", reach=reach)


def _recorded(adapter: Adapter) -> dict[str, Any]:
    """The task's record, empty where there is none."""
    record = adapter.record.get("task")
    return record if isinstance(record, dict) else {}


def _beside_all(adapters: Sequence[Adapter], trust_record: bool) -> Task | None:
    """The task of the file beside adapters that record none, where it is the same for all of them."""
    first, *others = (task_beside(adapter, trust_record=trust_record) for adapter in adapters)
    return first if first and all(each and each.record == first.record for each in others) else None


def _without(adapter: Adapter) -> str:
    """What to tell of an adapter whose task is not known."""
    kinds, lines = kinds_for(adapter), " / ".join(task_file_for(adapter).splitlines())
    others = f"; it may be of kind {', '.join(kinds[1:])}, too" if kinds[1:] else ""
    return (
        f"{adapter.source}: carries no record of its task; `task` says on which: a built-in one "
        f"({shorten(tasks.TASKS)}) or a file such as: {lines} (one a line{others})"
    )


def _of_one_base(adapter: Adapter, other: Adapter, first: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether two records name one base by two names, and agree in all else; which of them is scored on is told."""
    if first.keys() != record.keys() or any(first[key] != record[key] for key in first if key != "base"):
        return False
    names = [str(each.get("base")) for each in (first, record)]
    mine, theirs = (folder_of(name, a.origin) for name, a in zip(names, (adapter, other), strict=True))
    if difference_of(mine, theirs, *names) is not None:
        return False
    told = f"{names[0]!r} and {names[1]!r} are one base under two names: configuration and norms are the same"
    warnings.warn(f"{told}; all are scored on {names[0]!r}", LoraLabNote, stacklevel=4)
    return True


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
