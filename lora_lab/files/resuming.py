"""Shards that are made over several runs: what a killed run has finished is not done again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_lab.errors import FileError
from lora_lab.files.disk import read_json, replacing, write_json
from lora_lab.files.workplace import locked

_JOURNAL = "done.json"
_CONTENT = "checkpoint"


class Shards:
    """The shards that are there already, and what was told of each when it was made.

    Their folder is made when it is first needed. `key` says what they must have been made for; it is asked for where
    there are some, or when the first one is finished.
    """

    def __init__(self, path: Path, key: Callable[[], str]) -> None:
        self._path, self._place, self._key = path, place_of(path), key
        self.folder = self._place / _CONTENT
        self._journal = self._place / _JOURNAL
        self._made_for = ""
        self._lock: int | None = None
        self.done: dict[str, Any] = {}
        """File → what `finish` was told."""
        if os.path.lexists(self._place):
            self.begin()

    def begin(self) -> None:
        """Make the folder, and lock it: one run at a time."""
        if self._lock is not None:
            return
        try:
            self._place.parent.mkdir(parents=True, exist_ok=True)
            self._place.mkdir(mode=0o700, exist_ok=True)  # so that nobody else can put shards there
            _require_own(self._place)
            self._lock = locked(self._place)
        except OSError as error:
            if isinstance(error, FileError):
                raise
            raise FileError(f"{self._path}: cannot be written ({error.strerror})") from error
        if self._lock is None:
            raise FileError(f"{self._path}: another process is writing it")
        self._made_for = self._key()
        if self._journal.exists():
            said = read_json(self._journal)
            shards = said.get("shards")
            if said.get("key") == self._made_for and isinstance(shards, dict):
                self.done = {name: entry["told"] for name, entry in shards.items() if self._size(name) == entry["size"]}
        if not self.done:  # of another question, or nothing yet
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)

    def finish(self, name: str, told: Mapping[str, Any]) -> None:
        """Note that a shard is whole."""
        done = {**self.done, name: dict(told)}
        shards = {name: {"size": self._size(name), "told": entry} for name, entry in done.items()}
        write_json(self._journal, {"key": self._made_for, "shards": shards})
        self.done = done

    def end(self, *, keep: bool) -> None:
        """Let go of the folder; without `keep`, or where nothing was finished, it goes."""
        if self._lock is None:
            return
        if not (keep and self.done):
            shutil.rmtree(self._place, ignore_errors=True)
        os.close(self._lock)
        self._lock = None

    def _size(self, name: str) -> int | None:
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None


@contextlib.contextmanager
def unfinished(path: Path, key: Callable[[], str]) -> Iterator[Shards]:
    """Shards of what becomes `path`, made beside it, and gone when the block ends.

    After an error or a kill they stay, for the next run with the same key.
    """
    shards = Shards(path, key)
    keep = True
    try:
        yield shards
        keep = False
    finally:
        shards.end(keep=keep)


@contextlib.contextmanager
def resumed(path: Path, key: str) -> Iterator[Shards]:
    """As `unfinished`, for shards that are files of the folder `path`: in the end they take its place, whole."""
    with unfinished(path, lambda: key) as shards:
        shards.begin()
        yield shards
        with replacing(path) as beside:
            os.rename(shards.folder, beside)


def place_of(path: Path) -> Path:
    """Where the shards of `path` are made."""
    name = path.name
    if len(os.fsencode(name)) >= 200:  # of the 255 bytes that a name has at the most
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return path.parent / f".{name}.unfinished"


def _require_own(place: Path) -> None:
    status = place.lstat()
    own = not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o077)
    if not stat.S_ISDIR(status.st_mode) or not own:
        raise FileError(f"{place}: unfinished shards would be kept there, and it is not a folder of yours alone")
