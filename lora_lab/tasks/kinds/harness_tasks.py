"""The tasks of lm-evaluation-harness as it builds them: found by name, placed on a split, their code kept out."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_lab.errors import LoraLabError, LoraLabWarning, OptionError, TaskError, TrustError, shorten, unknown
from lora_lab.extras import needs
from lora_lab.files.trust import WAYS, Reach

SPLITS = {"train": "training_split", "validation": "validation_split", "test": None}
"""Split → the harness's key of it; None for the one that it scores itself: test, else validation."""

_CODE = re.compile(r"!function|^\s*(class|custom_dataset|unsafe_code|hf_evaluate|trust_remote_code)\s*:", re.MULTILINE)
"""What in a task's YAML runs code of its own, or fetches some."""


def loaded(settings: Any, reach: Reach, where: str) -> list[Any]:
    """The tasks that `settings` name, built anew; groups give all of theirs.

    OptionError for a name that is none, TrustError for code that a record which is not the user's own would run, and
    TaskError where a task or its data cannot be had.
    """
    manager = _manager(settings, reach, where)
    for name in settings.tasks:
        if name not in manager.task_index:
            raise unknown(f"task of lm-eval in {where.removeprefix('task ')}:", name, manager.all_tasks)
        if reach.folder is not None:
            _refuse_code(manager.task_index[name], where)
    with telling(f"{where}: lm-eval's {shorten(settings.tasks)}"), quiet():
        return list(manager.load(list(settings.tasks))["tasks"].values())


def placed_on(task: Any, split: str, settings: Any, where: str) -> Any:
    """The task, which from now on scores this split, with as many examples in a prompt as `settings` say."""
    key = SPLITS[split]
    if key is not None:
        name = task.get_config(key)
        if name is None:
            raise TaskError(f"{where}: lm-eval's {task.task_name} has no {split} split; test is what it scores")
        task.set_config("test_split", name)
    shots = settings.num_fewshot
    task.set_config("num_fewshot", shots if shots is not None else task.get_config("num_fewshot") or 0)
    task.set_fewshot_seed(settings.fewshot_seed)
    return task


def metrics_of(task: Any, where: str) -> list[str]:
    """Names of a task's metrics that are means over examples, each by every filter; a warning names the others.

    TaskError where there is none.
    """
    from lm_eval.api.metrics import mean

    aggregated = task.aggregation()
    means = [name for name, how in aggregated.items() if how is mean]
    others = shorten([name for name in aggregated if name not in means])
    if not means:
        raise TaskError(f"{where}: no metric of lm-eval's {task.task_name} is a mean over examples ({others})")
    if len(means) < len(aggregated):
        told = f"{where}: {others} of {task.task_name} is no mean over examples, and is left out"
        warnings.warn(told, LoraLabWarning, stacklevel=3)
    filters = [each.name for each in getattr(task, "_filters", [])] or ["none"]
    return [called(name, each) for each in filters for name in means]


def called(metric: str, filtered: str) -> str:
    """A metric and its filter, as the harness's tables have them."""
    return metric if filtered == "none" else f"{metric},{filtered}"


def prompt_and_answer(task: Any, document: Any, where: str) -> tuple[str, str]:
    """An example's prompt, without others before it, and its right answer."""
    prompt, right = task.doc_to_text(document), task.doc_to_target(document)
    right = right[0] if isinstance(right, list) else right
    if isinstance(right, int) and task.config.doc_to_choice is not None:
        right = task.doc_to_choice(document)[right]
    if not isinstance(prompt, str):
        raise TaskError(f"{where}: lm-eval's {task.task_name} has several prompts an example, and is for scoring only")
    return prompt, f"{task.config.target_delimiter}{right}"


def _manager(settings: Any, reach: Reach, where: str) -> Any:
    with needs("lm-eval", "a task of lm-evaluation-harness"), quiet():
        from lm_eval.tasks import TaskManager
    include = settings.include
    if include is None:
        return TaskManager()
    if not reach.quotes:
        raise TrustError(f"{where}: its record names the folder {include!r}, whose code would run; {WAYS}")
    if not os.path.isdir(include):
        raise OptionError(f"{where}: include = {include!r} is no folder")
    alone = TaskManager(include_path=include, include_defaults=False)  # to read all of the harness's takes seconds
    known = all(name in alone.task_index for name in settings.tasks)
    return alone if known else TaskManager(include_path=include)


def _refuse_code(entry: Any, where: str) -> None:
    """TrustError for a task of a foreign record that is a group, or runs code beyond the harness's own."""
    if entry.kind.name != "TASK" or entry.yaml_path is None:
        raise TrustError(f"{where}: {entry.name} of its record is no single task of lm-eval; {WAYS}")
    for path in _with_includes(Path(entry.yaml_path)):
        if _CODE.search(path.read_text()):
            raise TrustError(f"{where}: {entry.name} of its record runs code of its own ({path.name}); {WAYS}")


def _with_includes(path: Path) -> Iterator[Path]:
    """A task's YAML and all that it includes."""
    import yaml

    yield path
    plain = re.sub(r"!function", "", path.read_text())
    content = yaml.safe_load(plain)
    named = content.get("include", []) if isinstance(content, dict) else []
    for name in [named] if isinstance(named, str) else named:
        yield from _with_includes(path.parent / name)


def hashed(told: Sequence[str]) -> bytes:
    """SHA-256 of some texts."""
    return hashlib.sha256(json.dumps(list(told)).encode()).digest()


def described(value: object) -> str:
    """What JSON has no word for: functions by their name, anything else by its type and text."""
    name = getattr(value, "__qualname__", None)
    return f"{getattr(value, '__module__', '')}.{name}" if name else f"{type(value).__name__} {value}"


@contextlib.contextmanager
def telling(where: str) -> Iterator[None]:
    """TaskError in one line for what the harness, its tasks and the readers of its data raise."""
    try:
        yield
    except LoraLabError:
        raise
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise TaskError(f"{where}: {type(error).__name__}: {said}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's own log and bars of progress."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
