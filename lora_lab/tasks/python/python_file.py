"""Python files that the user names for a task: loaded, and their errors told by their own line."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from lora_lab.errors import FileError, OptionError, TaskError, shorten, unknown

if TYPE_CHECKING:
    from lora_lab.tasks.task import Task

_NAMED = re.compile(r"(?P<path>.+\.py)(?::(?P<name>\w+))?", re.DOTALL)


def is_python(name: str) -> bool:
    """Whether a task's name is that of a Python file, PATH.py or PATH.py:NAME."""
    return _NAMED.fullmatch(name) is not None


def from_python(name: str) -> Task:
    """The task that PATH.py:NAME names: a Task, or a function without arguments that gives one.

    Without NAME, the only one that the file has. It runs the file: only for names that the user has typed.
    """
    from lora_lab.tasks.task import Task

    found = _NAMED.fullmatch(name)
    assert found is not None
    path, wanted = Path(found["path"]).expanduser(), found["name"]
    module = _loaded(path)
    tasks = [each for each, value in vars(module).items() if isinstance(value, Task)]
    if wanted is None:
        if len(tasks) != 1:
            told = f"holds {len(tasks)} tasks ({shorten(tasks)})" if tasks else "holds no task of its own"
            raise OptionError(f"{path}: {told}; {path}:NAME names one, or a function that gives one")
        wanted = tasks[0]
    if wanted not in vars(module):
        raise unknown(f"name in {path}:", wanted, tasks or [each for each in vars(module) if not each.startswith("_")])
    task = getattr(module, wanted)
    if callable(task) and not isinstance(task, Task):
        try:
            task = task()
        except Exception as error:
            raise TaskError(f"{path}: {wanted}(): {line_of(error)}") from error
    if not isinstance(task, Task):
        kind = type(task).__name__
        raise OptionError(f"{path}: {wanted} is a {kind}; a Task, or a function that gives one, is needed")
    task.file = f"{found['path']}:{wanted}"
    if task.name == "own":
        task.name = wanted
    return task


def _loaded(path: Path) -> ModuleType:
    """The file as a module, run anew each time: it may have changed."""
    if not path.is_file():
        raise FileError(f"{path}: no such Python file")
    called = f"lora_lab_task_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(called, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[called] = module
    sys.path.insert(0, str(path.resolve().parent))  # for modules that lie beside it, as Python does for a script
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[called]
        raise TaskError(f"{path}: {line_of(error)}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def line_of(error: BaseException) -> str:
    """An error of the user's code in one line: the last of their own lines that it came through, and what it said."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _theirs(frame.filename)]
    said = (str(error).strip() or "no message").partition("\n")[0]
    place = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}: " if frames else ""
    return f"{place}{type(error).__name__}: {said}"


def _theirs(filename: str) -> bool:
    """Whether a line is the user's: not of this package, nor of an installed one, nor Python's own."""
    path = Path(filename)
    others = (Path(__file__).parents[2], Path(sysconfig.get_path("stdlib")))
    installed = {"site-packages", "dist-packages"} & {*path.parts}
    return not (filename.startswith("<frozen") or installed or any(path.is_relative_to(each) for each in others))
