"""Long names, of which the middle is cut so that what tells them apart stays."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

MOST = 28
"""Characters of a name, by default."""

_WORD = 12  # characters: a common beginning ends before a word that is as short as this


def told_apart(names: Sequence[str], most: int = MOST) -> list[str]:
    """The names in so many characters, or as many as leave different ones different.

    Of those that are longer, what all of them have in front and behind is cut first, so that what tells them apart
    stays; then their middle.
    """
    different = len(set(names))
    while True:
        longer = {name for name in names if len(name) > most}
        front, end = _common(list(longer)) if len(longer) > 1 else (0, 0)
        cut = [_cut(name, most, front, end) for name in names]
        if not longer or len(set(cut)) == different:
            return cut
        most += 4


def last_parts(tasks: Iterable[str]) -> dict[str, str]:
    """Tasks by their last part, without the folder and the end of a file, where that tells them apart."""
    last = {task: PurePosixPath(task).name.removesuffix(".toml") for task in tasks}
    return last if len(set(last.values())) == len(last) else {task: task for task in last}


def _common(names: Sequence[str]) -> tuple[int, int]:
    """How many characters all names share in front and behind; numbers and words are not cut in two."""
    front = _shared(names)
    words = re.search(r"[^\W_]*$", front)
    begun = words[0] if words else ""
    front = front.removesuffix(begun) if begun[-1:].isdigit() or len(begun) <= _WORD else front
    end = _shared([name[len(front) :][::-1] for name in names])[::-1]
    words = re.match(r"[^\W_]*", end)
    ended = words[0] if words else ""
    end = end.removeprefix(ended) if ended[:1].isdigit() or len(ended) <= _WORD else end
    return len(front), len(end)


def _shared(names: Sequence[str]) -> str:
    """What all names begin with."""
    first, last = min(names), max(names)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _cut(name: str, most: int, front: int, end: int) -> str:
    """A name in so many characters, of which so many in front and behind are shared with others."""
    if len(name) <= most:
        return name
    core = name[front : len(name) - end]
    spare = most - len(core) - (front > 0) - (end > 0)
    if spare < 0 or not (front and end):  # one cut, and more is kept of the side that tells it apart
        begin = (most - 1) // 3
        if front or end:
            begin = max(0, min(begin, spare)) if front else most - 1 - max(0, min(begin, spare))
        return f"{name[:begin]}…{name[len(name) - (most - 1 - begin) :]}"
    head = min(front, max(spare // 2, spare - end))
    tail = min(end, spare - head)
    return name[:head] + "…" * (head < front) + core + "…" * (tail < end) + name[len(name) - tail :]
