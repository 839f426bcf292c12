"""Where a file or folder is made before it takes its place whole: beside it, locked, and cleared away afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lora_lab.errors import FileError, LoraLabError

if sys.platform != "win32":
    import fcntl


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A free path beside `path`: what the block writes there, file or folder, takes its place at the end.

    Where `path` is a link, it stays one, and what it leads to is replaced. What killed runs left beside is removed.
    """
    asked, path = path, Path(os.path.realpath(path)) if path.is_symlink() else path
    with _workplace(asked, path) as workplace:
        beside = workplace / path.name
        try:
            yield beside
            if not (beside.is_dir() and path.is_dir() and _exchange(beside, path)):
                _put(beside, path, workplace / _replaced(path.name))
        except LoraLabError as error:  # of a file inside the folder: name the place that was asked for
            raise type(error)(*(str(part).replace(str(beside), str(asked)) for part in error.args)) from error
        except OSError as error:
            raise FileError(f"{asked}: cannot be written ({error.strerror or error})") from error


def _put(beside: Path, path: Path, replaced: Path) -> None:
    """Two renames for a folder, which cannot take the place of another in one; the old one comes back on failure."""
    try:
        if beside.is_dir() and path.exists():
            path.rename(replaced)
        beside.replace(path)
    finally:
        if replaced.exists() and not path.exists():
            replaced.rename(path)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two places in one step, where the system can: a kill in between would leave neither in its place."""
    if sys.platform != "linux":
        return False
    try:
        swap = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)
    done: bool = swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
    return done


@contextlib.contextmanager
def _workplace(asked: Path, path: Path) -> Iterator[Path]:
    """A folder of its own beside `path`, locked for as long as it is used, and gone afterwards."""
    name = "long" if _is_long(path.name) else path.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(path.parent)
        lock = None
        while lock is None:  # cleared away by another run in the moment before it was locked: once more
            workplace = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".part", dir=path.parent))
            lock = locked(workplace)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{asked}: cannot be written ({reason})") from error
    try:
        yield workplace
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
        os.close(lock)


_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}\.part")


def _clear_leftovers(folder: Path) -> None:
    """Remove what runs that were killed outright were writing here; what is still being written is locked."""
    for entry in list(os.scandir(folder)):
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None or not entry.is_dir(follow_symlinks=False):
            continue
        left = Path(entry.path)
        with contextlib.suppress(OSError):
            path = folder / _made_for(left, match["name"])
            lock = locked(left) if _made_here(left, path.name) else None
            if lock is None:
                continue
            replaced = left / _replaced(path.name)
            if replaced.exists() and not path.exists():  # killed between the two renames
                replaced.rename(path)
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _made_here(left: Path, name: str) -> bool:
    """Whether such a folder holds nothing but what `replacing` puts there."""
    ours = {name, _replaced(name)}
    return all(each in ours or _LEFTOVER.fullmatch(each) for each in os.listdir(left))


def _is_long(name: str) -> bool:
    """Whether a name leaves no room for what a workplace's own adds to it: names have 255 bytes at the most."""
    return len(os.fsencode(name)) >= 200


def _made_for(left: Path, said: str) -> str:
    """The name of what is made in a workplace; that of a long one lies within."""
    return next((name for name in os.listdir(left) if _is_long(name)), said) if said == "long" else said


def _replaced(name: str) -> str:
    return "old" if name == "replaced" else "replaced"


def locked(folder: Path) -> int | None:
    """A descriptor that holds the lock on a folder until it is closed; None if another process has it, or has had."""
    if sys.platform == "win32":  # nothing is locked there, and so nothing counts as left over
        return os.open(os.devnull, os.O_RDONLY) if not any(folder.iterdir()) else None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there = os.path.samestat(os.fstat(handle), folder.stat())
    except (FileNotFoundError, BlockingIOError):
        there = False
    except OSError:  # a file system without locks
        there = not any(folder.iterdir())
    if not there:
        os.close(handle)
        return None
    return handle
