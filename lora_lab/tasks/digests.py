"""Hashes by which stored scores are known to be stale: of a base model's files, and of the code that scores."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from lora_lab import files
from lora_lab.errors import FileError
from lora_lab.files.ownership import foreign
from lora_lab.registry import REGISTRIES

_YOUNG = 2.0  # seconds: the coarsest times that file systems in use keep (FAT); younger files may change unnoticed
_OWN = "lora_lab"
_TRANSFORMS = (
    "merging/**/*.py",
    "pruning/**/*.py",
    "adapters/lowrank.py",
    "adapters/cutting.py",
    "geometry/aligning.py",
    "geometry/canonical.py",
    "geometry/intruders.py",
    "geometry/nulls.py",
)
"""The files of this package that make adapters out of adapters, and the algebra of ΔW."""


def of_base(name: str) -> str:
    """What changes when a base model does: of a folder, a hash of its files' contents; else the name."""
    folder = Path(name)
    return of_folder(folder) if folder.is_dir() else name


def of_folder(folder: Path) -> str:
    """SHA-256 over names and contents of a folder's files, those of its subfolders among them.

    Hidden ones are left out, and so is what this program itself wrote there. A file is read again only where its size,
    its times or its inode have changed since, or where it changed so lately that this could not be seen.
    """
    hashes = _Known()
    digest = hashlib.sha256()
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        digest.update(f"{len(os.fsencode(name))} ".encode() + os.fsencode(name) + hashes.of(path).encode())
    hashes.save()
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise FileError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent) / name
            if not name.startswith(".") and path.is_file() and (path.stat().st_size == 0 or foreign(path)):
                yield path


class _Known:
    """Hashes of files as they were when last read, in the user's cache."""

    def __init__(self) -> None:
        self._place = cache() / "hashes.json"
        self._hashes: dict[str, Any] = {}
        self._new = False
        if self._place.exists():
            with contextlib.suppress(FileError):  # damaged: all is read again
                self._hashes = files.read_json(self._place)

    def of(self, path: Path) -> str:
        """SHA-256 of a file."""
        try:
            with path.open("rb") as file:
                state = _state(os.fstat(file.fileno()))
                key = str(path.resolve())
                entry = self._hashes.get(key)
                if isinstance(entry, list) and entry[:-1] == state and isinstance(entry[-1], str):
                    return entry[-1]
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                settled = _state(os.fstat(file.fileno())) == state and _is_settled(state)
        except OSError as error:
            raise FileError(f"{path}: cannot be read ({error.strerror})") from error
        if settled:
            self._hashes[key] = [*state, digest]
        elif entry is not None:
            del self._hashes[key]
        self._new = self._new or settled or entry is not None
        return digest

    def save(self) -> None:
        """Remember them, without the files that are gone; a cache that cannot be written is none."""
        if not self._new:
            return
        here = {key: entry for key, entry in self._hashes.items() if os.path.exists(key)}
        with contextlib.suppress(FileError):
            files.write_json(self._place, here)


def _state(status: os.stat_result) -> list[int]:
    """What changes when a file does; ctime too, since a program can set mtime back, and ctime only with the clock."""
    assert stat.S_ISREG(status.st_mode)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def _is_settled(state: list[int]) -> bool:
    """Whether a later change would show: the file is older than the grain of its times, and its clock not ahead."""
    return max(state[1], state[2]) < (time.time() - _YOUNG) * 1e9


def cache() -> Path:
    """Where this user's computer keeps what can be computed again."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lora-lab"


def of_code(instance: object) -> str:
    """A hash of the code that an object of a class of the user's own runs, and of its plain attributes.

    The functions of its classes and attributes and all that these call, as far as it is neither this package's nor an
    installed one's; empty for an object that is all this package's own. Comments and line numbers do not count.
    """
    walk = _Walk()
    for cls in type(instance).__mro__:
        for name, member in sorted(vars(cls).items()):
            function = _function(member)
            if function is not None and not _installed(function.__module__):
                walk.add(f"{cls.__qualname__}.{name}", function)
        if not _installed(cls.__module__):
            walk.add_plain(cls.__qualname__, vars(cls))
    attributes = {key: value for key, value in vars(instance).items() if not _is_cache(type(instance), key)}
    walk.add_plain("instance", attributes)
    return "" if walk.empty else walk.digest.hexdigest()


def of_entries() -> str:
    """A hash of the code of all entries of registries that are neither this package's nor an installed one's.

    It counts in what stored scores hang on: whoever edits a merge of their own gets new numbers. Empty without any.
    """
    walk = _Walk()
    for registry in sorted(REGISTRIES.values(), key=lambda registry: registry.group):
        for name, entry in sorted(registry.added.items()):
            fields = vars(entry) if dataclasses.is_dataclass(entry) else {"entry": entry}
            for field, value in sorted(fields.items()):
                walk.add_value(f"{registry.group} {name} {field}", value)
    return "" if walk.empty else walk.digest.hexdigest()


@functools.cache
def of_transforms(package: Path = Path(__file__).parents[1]) -> str:
    """A hash of this package's code that makes adapters out of adapters: merges, prunings and points between them.

    It counts in what their scores are kept under, so that a method that has changed is asked again. Read once.
    """
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _TRANSFORMS for path in package.glob(pattern)}):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def _is_cache(cls: type, name: str) -> bool:
    return isinstance(getattr(cls, name, None), functools.cached_property)


class _Walk:
    """Functions with all that they reach, each once."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.empty = True
        self._seen: set[int] = set()

    def add(self, name: str, function: Any) -> None:
        """A function by its bytecode, defaults and closure, then what it names in its module."""
        if id(function) in self._seen:
            return
        self._seen.add(id(function))
        self.empty = False
        self._tell(name)
        self._code(function.__code__)
        closure = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
        fixed = [value for value in closure if not isinstance(value, list | dict)]  # those are where results are kept
        for value in [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *fixed]:
            self.add_value(name, value)
        names = sorted(_names(function.__code__))
        modules = [value for value in map(function.__globals__.get, names) if isinstance(value, ModuleType)]
        for found in (function.__globals__, *(vars(each) for each in modules if not _installed(each.__name__))):
            for named in names:
                if named in found:
                    self.add_value(named, found[named])

    def add_plain(self, name: str, attributes: Mapping[str, Any]) -> None:
        """Attributes that are plain values or functions; private ones are caches, `dtype` is known only afterwards."""
        for key, value in sorted(attributes.items()):
            if not key.startswith("_") and key != "dtype":
                self.add_value(f"{name}.{key}", value)

    def _code(self, code: CodeType) -> None:
        self._tell(repr((code.co_code, code.co_names, code.co_varnames)))
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self._code(constant)
            else:
                self._tell(repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant))

    def add_value(self, name: str, value: Any) -> None:
        """A plain value, an array, or a function with all that it reaches."""
        function = _function(value)
        if function is not None:
            if not _installed(function.__module__):
                self.add(name, function)
        elif isinstance(value, type):
            if not _installed(value.__module__) and id(value) not in self._seen:
                self._seen.add(id(value))
                for key, member in sorted(vars(value).items()):
                    self.add_value(f"{name}.{key}", member)
        elif isinstance(value, functools.partial):
            for each in (value.func, *value.args, *value.keywords.values()):
                self.add_value(name, each)
        elif _plain(value):
            self._tell(f"{name} = {value!r}")
        elif isinstance(value, torch.Tensor | np.ndarray):
            array = value.detach().cpu().contiguous().flatten() if isinstance(value, torch.Tensor) else value
            self._tell(f"{name} = {value.dtype} {tuple(value.shape)}")
            self.digest.update(
                (array.view(torch.uint8).numpy() if isinstance(array, torch.Tensor) else array).tobytes()
            )

    def _tell(self, text: str) -> None:
        self.digest.update(f"{len(text)} {text}".encode("utf-8", "backslashreplace"))


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | complex | str | bytes)


def _function(member: Any) -> Any:
    """The function behind a method or property; None for anything else. Wrappers hold what they wrap in a closure."""
    if isinstance(member, property):
        member = member.fget
    elif isinstance(member, functools.cached_property):
        member = member.func
    elif isinstance(member, classmethod | staticmethod | MethodType):
        member = member.__func__
    return member if isinstance(member, FunctionType) else None


def _names(code: CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _installed(module: str | None) -> bool:
    """Whether a module is this package's, Python's own, or lies among installed packages."""
    top = (module or "builtins").partition(".")[0]
    if top == "__main__":
        return False
    if top == _OWN or top in sys.stdlib_module_names:
        return True
    path = getattr(sys.modules.get(module or ""), "__file__", None)
    return path is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(path).parts)
