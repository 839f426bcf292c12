"""A folder of shards that is made over several runs: what a killed run has finished is not done again."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_lab import files
from lora_lab.errors import FileError
from lora_lab.files.workplace import locked

_JOURNAL = "done.json"
_CONTENT = "checkpoint"


class Shards:
    """The shards that are there already, and what was told of each when it was made."""

    def __init__(self, place: Path, key: str) -> None:
        self.folder = place / _CONTENT
        self._journal, self._key = place / _JOURNAL, key
        self.done: dict[str, Any] = {}
        """File → what `finish` was told."""
        if self._journal.exists():
            said = files.read_json(self._journal)
            shards = said.get("shards")
            if said.get("key") == key and isinstance(shards, dict):
                self.done = {name: entry["told"] for name, entry in shards.items() if self._size(name) == entry["size"]}
        if not self.done:  # of another question, or nothing yet
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)

    def finish(self, name: str, told: Mapping[str, Any]) -> None:
        """Note that a shard is whole."""
        done = {**self.done, name: dict(told)}
        shards = {name: {"size": self._size(name), "told": entry} for name, entry in done.items()}
        files.write_json(self._journal, {"key": self._key, "shards": shards})
        self.done = done

    def _size(self, name: str) -> int | None:
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None


@contextlib.contextmanager
def resumed(path: Path, key: str) -> Iterator[Shards]:
    """Shards for the folder `path`, made beside it; when the block ends, they take its place whole.

    After an error or a kill they stay, for the next run with the same key. One run at a time.
    """
    place = place_of(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir(mode=0o700, exist_ok=True)  # so that nobody else can put shards there
        _require_own(place)
        lock = locked(place)
    except OSError as error:
        raise (
            error if isinstance(error, FileError) else FileError(f"{path}: cannot be written ({error.strerror})")
        ) from error
    if lock is None:
        raise FileError(f"{path}: another process is writing it")
    try:
        shards = Shards(place, key)
        yield shards
        with files.replacing(path) as beside:
            os.rename(shards.folder, beside)
        shutil.rmtree(place, ignore_errors=True)
    finally:
        os.close(lock)


def place_of(path: Path) -> Path:
    """Where the shards of `path` are made."""
    return path.parent / f".{path.name}.unfinished"


def _require_own(place: Path) -> None:
    status = place.lstat()
    own = not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o077)
    if not stat.S_ISDIR(status.st_mode) or not own:
        raise FileError(f"{place}: unfinished shards would be kept there, and it is not a folder of yours alone")
