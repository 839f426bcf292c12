"""The task that `lora-lab.toml` names in a folder of adapters: what a file says for adapters that record none.

Such a file beside adapters may have come with them. It is judged as a stranger's record is (see files/trust.py): it may
name a built-in task, or a task file within its own folder, whose base and data lie in there or on the hub; never code.
The command line takes the file in the current folder for words of the user's, and reads it before any adapter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lora_lab import tasks
from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import OptionError, TrustError
from lora_lab.files.toml import FOLDER_FILE, read_toml
from lora_lab.files.trust import WAYS, Origin, Reach, judged
from lora_lab.tasks.python.python_file import is_python
from lora_lab.tasks.task import Task


def task_beside(adapter: Adapter, *, trust_record: bool = False) -> Task | None:
    """The task of the file in the adapter's folder, or beside that; None where there is no such file or task.

    TrustError where it reaches further than a stranger's record may, OptionError where `task` is no text.
    """
    for place in _places(adapter):
        if not os.path.lexists(place):
            continue
        if not trust_record:
            Reach(str(place.parent)).require(place, f"{adapter.source}: beside it,")
        named = read_toml(place, "a file of defaults").get("task")
        if named is None:
            continue
        if not isinstance(named, str):
            raise OptionError(f"{place}: task is {named!r}; a built-in task or a task file in quotes is needed")
        return _judged(place, named, adapter, trust_record)
    return None


def _places(adapter: Adapter) -> Iterator[Path]:
    folder = adapter.origin.folder
    if folder is not None:
        yield Path(folder, FOLDER_FILE)
        if os.path.isdir(adapter.source):  # not in the hub's cache, whose folders are no one's
            yield Path(folder).parent / FOLDER_FILE


def _judged(place: Path, named: str, adapter: Adapter, trust_record: bool) -> Task:
    if is_python(named):
        raise TrustError(f"{place}: names the task {named}, whose code runs only where you name it; {WAYS}")
    if named in list(tasks.TASKS):
        return tasks.from_name(named)
    folder, path = place.parent, place.parent / named
    if not trust_record:
        Reach(str(folder)).require(path, f"{place}: its task")
    content = read_toml(path, "a task file")
    origin = Origin(folder=str(path.parent if trust_record else folder))
    reach = judged(content, origin, adapter.config, str(path), trust_record=trust_record)
    return tasks.from_record(content, base=path.parent, where=str(path), reach=reach)
