"""PEFT's matching of module names against a configuration's patterns, for patterns that nobody has vouched for.

PEFT hands the patterns to `re`, where some run for ever. Here those that hold no operator, which are nearly all, are
looked up in a dictionary; the others share a time limit.
"""

from __future__ import annotations

import re
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_lab.errors import AdapterError

SECONDS = 1.0
"""For all patterns with operators of one look-up together."""
_LONGEST = 20_000
_AFTER = r"($|\..*)"
_OPERATOR, _DOT = re.compile(r"[\^$*+?{}\[\]\\|()\n]"), re.compile(r"\.")

Names = Mapping[str, list[str]]
"""Text that a pattern may match as a whole → the modules that it then matches."""


def by_ending(patterns: Collection[str], names: Collection[str]) -> dict[str, list[str]]:
    """Pattern → the names it matches as PEFT's rank_pattern and alpha_pattern do: whole, or their end after a dot.

    A pattern that is no regular expression matches nothing. Raises AdapterError for one that takes too long.
    """
    if not patterns:  # as of nearly every file, which may have a hundred thousand names
        return {}
    ends: dict[str, list[str]] = defaultdict(list)
    for name in names:
        for start in (0, *(i + 1 for i, letter in enumerate(name) if letter == ".")):
            ends[name[start:]].append(name)
    whole = {name: [name] for name in names}
    return _search(patterns, names, lambda head: whole if head else ends, r"(.*\.)?({})$")


def by_whole(patterns: Collection[str], names: Collection[str]) -> dict[str, list[str]]:
    """Pattern → the names that it matches from end to end, as a target_modules that is a text does; see `by_ending`."""
    whole = {name: [name] for name in names}
    return _search(patterns, names, lambda head: whole, "{}", full=True)


def by_path(patterns: Collection[str], names: Collection[str]) -> dict[str, list[str]]:
    """Pattern → the names with a run of components that it matches, as modules_to_save does; see `by_ending`."""
    if not patterns:  # as of nearly every file, which may have a hundred thousand names
        return {}
    runs: dict[str, list[str]] = defaultdict(list)
    first: dict[str, list[str]] = defaultdict(list)
    for name in names:
        cuts = [-1, *(i for i, letter in enumerate(name) if letter == "."), len(name)]
        for i, start in enumerate(cuts[:-1]):
            for run in {name[start + 1 : end] for end in cuts[i + 1 :]}:
                runs[run].append(name)
                if not i:
                    first[run].append(name)
    return _search(patterns, names, lambda head: first if head else runs, rf"(^|.*\.){{}}{_AFTER}")


def first_match(patterns: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Name → the value of the first pattern that matches its end; names that none matches are left out."""
    values: dict[str, Any] = {}
    matched = by_ending(patterns.keys(), names)
    for key, value in patterns.items():
        for name in matched.get(key, ()):
            values.setdefault(name, value)
    return values


def numbered(patterns: Collection[str], names: Iterable[str]) -> dict[str, int]:
    """Name → its layer's number as PEFT finds it: after layers_pattern's first match, or else first in the name."""
    engine = _Engine()
    indices: dict[str, int] = {}
    # Without a pattern, the number stands behind two components: that of the list of layers and one before it.
    for whole, pattern in [(r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", p) for p in patterns] or [
        (r".*?\.{}\.(?P<idx>\d+)\.", "[^.]*")
    ]:
        for name in names:
            if name not in indices and (match := engine.match(whole, pattern, name)):
                indices[name] = int(match["idx"])
    return indices


def _search(
    patterns: Collection[str],
    names: Collection[str],
    texts: Callable[[bool], Names],
    whole: str,
    *,
    full: bool = False,
) -> dict[str, list[str]]:
    """Pattern → names: by operators with `whole` around the pattern, without any by `texts` (told of a leading ^)."""
    engine = _Engine()
    matches: dict[str, list[str]] = {}
    literal: dict[tuple[bool, int, tuple[int, ...]], list[tuple[str, str]]] = defaultdict(list)
    for pattern in patterns:
        plain = None if whole.endswith(_AFTER) and "$" in pattern else _alternatives(pattern)
        if plain is None:
            matches[pattern] = [name for name in names if engine.match(whole, pattern, name, full=full)]
            continue
        matches[pattern] = []
        for each in plain:
            literal[each.head, len(each.text), each.gaps].append((each.text, pattern))
    by_length: dict[tuple[bool, int], list[tuple[str, list[str]]]] = defaultdict(list)
    for head in (False, True):
        for text, matched in texts(head).items():
            by_length[head, len(text)].append((text, matched))
    engine = _Engine(3 * SECONDS)
    for (head, length, gaps), keys in literal.items():
        engine.check(keys[0][1])
        blanked: dict[str, list[str]] = defaultdict(list)
        for text, matched in by_length[head, length]:
            blanked[_blank(text, gaps)] += matched
        for text, pattern in keys:
            matches[pattern] += blanked.get(text, [])
    return {pattern: list(dict.fromkeys(matched)) for pattern, matched in matches.items()}


def _blank(text: str, gaps: tuple[int, ...]) -> str:
    """The text with a dot at every place where the pattern takes any letter."""
    if not gaps:
        return text
    parts, last = [], 0
    for gap in gaps:
        parts += [text[last:gap], "."]
        last = gap + 1
    return "".join([*parts, text[last:]])


@dataclass(frozen=True)
class _Plain:
    """A pattern without operators: its text, whether ^ stands before it, and where in it any letter will do."""

    head: bool
    text: str
    gaps: tuple[int, ...]


def _alternatives(pattern: str) -> list[_Plain] | None:
    """A pattern without operators, or ^(one|another|…)$ of such ones, taken apart; None for any other."""
    plain = _plain(pattern)
    if plain:
        return [plain]
    outer = re.fullmatch(r"(\^?)\((?:\?:)?([^()]*)\)\$?", pattern, re.DOTALL)
    if not outer:
        return None
    parts = outer[2].split("|")
    if any(part.endswith("\\") or "^" in part or "$" in part for part in parts):
        return None
    read = [_plain(outer[1] + part) for part in parts]
    return [part for part in read if part] if all(read) else None


def _plain(pattern: str) -> _Plain | None:
    head = pattern.startswith("^")
    body = pattern.removeprefix("^")
    if "\\" not in pattern:
        body = body.removesuffix("$")
        gaps = tuple([match.start() for match in _DOT.finditer(body)])
        return None if _OPERATOR.search(body) else _Plain(head, body, gaps)
    if not body.endswith("\\$"):
        body = body.removesuffix("$")
    letters: list[str] = []
    free: list[int] = []
    at = 0
    while at < len(body):
        letter = body[at]
        if letter == "\\" and at + 1 < len(body) and not body[at + 1].isalnum() and body[at + 1] != "\n":
            letter, at = body[at + 1], at + 1
        elif _OPERATOR.match(letter):
            return None
        elif letter == ".":
            free.append(len(letters))
        letters.append(letter)
        at += 1
    return _Plain(head, "".join(letters), tuple(free))


class _Engine:
    """Matches patterns with operators, all within one time limit."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._end = time.monotonic() + seconds
        self._compiled: dict[str, Any] = {}

    def check(self, pattern: str) -> None:
        """AdapterError when the time is over."""
        if time.monotonic() > self._end:
            raise AdapterError(
                f"the pattern {shown(pattern)} (or those before it) takes longer than {SECONDS:g} s to match; "
                "a list of module names is needed"
            )

    def match(self, whole: str, pattern: str, name: str, *, full: bool = False) -> Any:
        """The match of `whole`, the pattern put in for {}, at the beginning of the name (or of all of it)."""
        import regex

        compiled = self._compiled.get(pattern)
        if compiled is None:
            compiled = self._compiled[pattern] = self._compile(whole, pattern)
        if compiled is False:
            return None
        left = self._end - time.monotonic()
        try:
            return (compiled.fullmatch if full else compiled.match)(name, timeout=max(left, 1e-3))
        except (TimeoutError, MemoryError, regex.error):
            self._end = 0.0
            self.check(pattern)
        return None

    def _compile(self, whole: str, pattern: str) -> Any:
        import regex

        if len(pattern) > _LONGEST:
            raise AdapterError(
                f"the pattern {shown(pattern)} has {len(pattern)} characters; at most {_LONGEST} are read"
            )
        self.check(pattern)
        text = whole.replace("{}", pattern)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                re.compile(text)  # PEFT's engine says whether it is one; what follows is read alike by both
            return regex.compile(_both(text), flags=regex.VERSION0)
        except (re.error, regex.error, OverflowError, ValueError):
            return False
        except RecursionError as error:
            raise AdapterError(f"the pattern {shown(pattern)} is nested too deeply") from error


def _both(text: str) -> str:
    """The pattern with what only `regex` would take for an operator (fuzzy counts, named classes) made literal."""
    return re.sub(r"(?<!\\)((?:\\\\)*)\{(?!\d*(?:,\d*)?\})", r"\1\\{", text).replace("[:", "[\\:")


def shown(pattern: str) -> str:
    """The pattern as it goes into a message: quoted, and cut where it is long."""
    return repr(pattern if len(pattern) <= 60 else f"{pattern[:60]}…")
