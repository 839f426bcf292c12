"""What a step of a recipe hangs on: all that it reads, as it is now."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.cli import verbs
from lora_lab.cli.program import check
from lora_lab.errors import LoraLabError

if TYPE_CHECKING:
    from lora_lab.cli.options import Reading
    from lora_lab.cli.studies.recipes import Step
    from lora_lab.tasks.task import Task

_HASHED = 2**30
"""Bytes of a file or folder up to which its content is hashed; of a larger one, names, sizes and times are."""


def stamp(step: Step) -> list[Any]:
    """The step's words, what lies at every path among them, the data it looks at, and the version."""
    from importlib.metadata import version

    read = {str(path): content_of(path) for path in places(step)}
    return [step.verb, [*step.arguments, *step.positional], read, _data(step), version("lora-lab")]


def places(step: Step) -> list[Path]:
    """The files and folders that its values name; with a lone file, the configuration beside it, which is read, too."""
    return list(dict.fromkeys(path for name in sorted(set(step.inputs)) for path in _places(name)))


def content_of(path: Path) -> str | None:
    """What a file or folder holds, in a few letters: of its content, or of names, sizes and times where it is large."""
    from lora_lab.files import file_hash

    if not path.exists():
        return None
    parts = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    sizes = [(p.relative_to(path).as_posix(), p.stat()) for p in parts]
    if sum(status.st_size for _, status in sizes) <= _HASHED:
        names = repr([(name, status.st_size) for name, status in sizes])
        return f"{file_hash(path)}-{hashlib.sha256(names.encode()).hexdigest()[:8]}"
    told = [(name, s.st_size, s.st_mtime_ns) for name, s in sizes]
    return "by-time-" + hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def as_called(step: Step) -> dict[str, Any]:
    """The step as its output's record will tell of it."""
    check(step.words())
    return verbs.step()


def holds(output: Path, step: Mapping[str, Any]) -> bool:
    """Whether what lies at an output says in its record that this step made it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recipe = _record(next(iter(step)), output).get("recipe")
    except LoraLabError:  # something else
        return False
    return json.dumps(recipe, sort_keys=True) == json.dumps({"steps": [step]}, sort_keys=True)


def _record(verb: str, output: Path) -> Mapping[str, Any]:
    """What an output tells of how it was made."""
    from lora_lab.adapters.adapter import Adapter
    from lora_lab.files import read_json
    from lora_lab.results.result import Result

    if verb == "fuse":
        return read_json(output / "fuse.json")
    return Result.load(output).provenance if verb == "evaluate" else Adapter.load(output).record


def bytes_below(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    parts = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sum(part.stat().st_size for part in parts)


def _places(name: str) -> list[Path]:
    """Where a value leads if it is a path.

    A hub id leads to its folder in the cache, which is called by its commit.
    """
    from lora_lab.hub import cached_folder

    try:
        path = Path(name).expanduser()
        if path.is_file():
            return [part for part in (path, path.with_name("adapter_config.json")) if part.exists()]
        if path.exists():
            return [path]
    except (OSError, ValueError, RuntimeError):  # a text that can be no path: too long, with a NUL, ~nobody
        return []
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return []
    repo, _, revision = name.partition("@")
    found = [cached_folder(repo, revision or None, file=file) for file in ("config.json", "adapter_config.json")]
    return [folder for folder in found if folder is not None]


def _data(step: Step) -> list[str] | None:
    """Of the tasks that a step looks at, a hash of each split's examples, base model and scoring; None for no task."""
    from lora_lab.cli.options import OneTask, Reading, TaskEach
    from lora_lab.results.result import fingerprint
    from lora_lab.scoring.examples import examples_of

    if step.verb not in ("evaluate", "merge", "prune"):
        return None
    options = {str(name).replace("-", "_"): value for name, value in step.options.items()}
    named = options.get("adapters", options.get("adapter"))
    paths = [str(path) for path in (named if isinstance(named, list) else [named])]
    loading = Reading(options.get("config"), options.get("alpha"), options.get("adapter_name"))
    given, trust = options.get("task"), options.get("trust_record") is True
    tasks: Sequence[Task]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not _looks(step.verb, options) and not _needs_base(step.verb, options, loading, paths):
                return None
            adapters = loading.load(paths)
            if step.verb == "prune":
                tasks = [OneTask(given, trust).of(adapters)]
            else:
                tasks = TaskEach([given] if isinstance(given, str) else given, trust).of(adapters)
    except LoraLabError as error:  # which the step itself will tell
        return [str(error)]
    hashes = []
    for task in dict.fromkeys(tasks):
        for split in ("train", "validation", "test"):
            try:
                hashes.append(fingerprint(examples_of(task, split)))
            except LoraLabError as error:  # a split that there is not
                hashes.append(str(error))
    return hashes


def _looks(verb: str, options: Mapping[str, Any]) -> bool:
    """Whether a step's options say that it looks at data."""
    from lora_lab.merging.methods import MERGES
    from lora_lab.pruning.patterns import KEEPS

    if verb == "merge":
        method = MERGES.get(str(options.get("method")))
        return bool(options.get("task") or options.get("search") or (method and method.reads_data))
    pattern = KEEPS.get(str(options.get("keep")).partition(":")[0])
    return verb == "evaluate" or bool(pattern and pattern.valued)


def _needs_base(verb: str, options: Mapping[str, Any], loading: Reading, paths: Sequence[str]) -> bool:
    """Whether a merge takes the base model that the task of an adapter names (DoRA …)."""
    if verb != "merge" or options.get("base"):
        return False
    return any(adapter.why_not_additive is not None for adapter in loading.load(paths))
