"""Every result below some folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_lab import files
from lora_lab.errors import FileError, OptionError
from lora_lab.results.result import Result

_LARGEST = 2**28
"""Bytes of a file that is read: a result of a million rows has half of that."""
_OURS = "lora-lab result"
"""How the format of every version of a result begins."""


@dataclass(frozen=True, repr=False)
class Collected:
    """What lies in some folders."""

    results: list[tuple[str, Result]]
    """Each with its place: the path below the folder that was named."""
    unread: list[tuple[str, str]]
    """Files that are damaged, or no JSON though they are called so: their place, and why."""


def collect(places: Sequence[Path | Result]) -> Collected:
    """The results in folders and those below them, in files, and those that are given themselves.

    Of folders, hidden ones are not entered, and JSON of other programs is left out. FileError for a place that is not
    there or that, named itself, holds no result; OptionError where there is none at all.
    """
    found = Collected([], [])
    for place in places:
        if isinstance(place, Result):
            found.results.append((place.kind, place))
        elif place.is_dir():
            for path in _below(place):
                _read(path, path.relative_to(place).as_posix(), found)
        else:
            found.results.append((place.name, Result.load(place)))
    if not found.results:
        where = ", ".join(str(place) for place in places)
        unread = f"; {len(found.unread)} files cannot be read, first {found.unread[0][1]}" if found.unread else ""
        raise OptionError(f"{where or 'nothing'}: no result of lora-lab in it{unread}")
    return found


def _below(folder: Path) -> Iterator[Path]:
    """All JSON files, those of a folder before those of the folders in it, names with numbers by their values."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=_natural)
        paths = (Path(place, name) for name in sorted(names, key=_natural) if name.endswith(".json"))
        yield from (path for path in paths if path.is_file())


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [
        (0, int(part), "") if part.isdecimal() and len(part) < 19 else (1, 0, part)
        for part in re.split(r"(\d+)", name)
        if part
    ]


def _read(path: Path, name: str, found: Collected) -> None:
    try:
        content = files.read_json(path, largest=_LARGEST)
    except FileError as error:
        if str(error).startswith(f"{path}: a JSON "):
            return  # a list, or another value: somebody else's
        found.unread.append((name, str(error)))
        return
    if not str(content.get("format")).startswith(_OURS):
        return
    try:
        found.results.append((name, Result.of_json(content, path)))
    except FileError as error:
        found.unread.append((name, str(error)))
