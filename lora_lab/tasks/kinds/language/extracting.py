"""Answers taken out of generated text: the last number, what a pattern finds, the last line, or all of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import regex

from lora_lab.errors import OptionError, TaskError

PATIENCE_S = 1.0
"""Seconds that a pattern may take over one text: some take time without end, and a record may bring its own."""
LONGEST = 1000
"""Characters of a pattern."""

_NUMBER = re.compile(r"[-+]?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)", re.ASCII)
_MARK = "####"
"""What GSM8K puts before the answer."""


def whole(text: str, pattern: str | None = None) -> str | None:
    """All of it, without blanks around it; None where nothing is left."""
    return text.strip() or None


def last_line(text: str, pattern: str | None = None) -> str | None:
    """The last line that is not blank."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), None)


def number(text: str, pattern: str | None = None) -> str | None:
    """The last number, after GSM8K's #### where there is one: without $, commas, and zeros that change nothing."""
    _, _, after = text.rpartition(_MARK)
    found = _NUMBER.findall(after) or _NUMBER.findall(text)
    return _plain(found[-1]) if found else None


def matched(text: str, pattern: str | None = None) -> str | None:
    """The group of the pattern's first match; TaskError where it takes longer than PATIENCE_S."""
    assert pattern is not None
    try:
        found = _compiled(pattern).search(text, timeout=PATIENCE_S)
    except TimeoutError as error:
        raise TaskError(
            f"pattern {pattern!r} takes over {PATIENCE_S:g} s on a text of {len(text)} characters; one without repeats "
            "of repeats is needed"
        ) from error
    return None if found is None else whole(found[1] or "")


EXTRACTORS: dict[str, Callable[[str, str | None], str | None]] = {
    "whole": whole,
    "last-line": last_line,
    "number": number,
    "regex": matched,
}
"""(Text, pattern) → the answer in it, or None."""


def check_pattern(extract: str, pattern: str | None, where: str) -> None:
    """OptionError for a pattern that is missing, not asked for, or none with one group."""
    if (pattern is not None) != (EXTRACTORS[extract] is matched):
        told = f"with extract = {extract!r} it has no use" if pattern is not None else 'extract = "regex" needs it'
        raise OptionError(f"{where}: pattern: {told}")
    if pattern is None:
        return
    if len(pattern) > LONGEST:
        raise OptionError(f"{where}: pattern has {len(pattern)} characters; {LONGEST} at most")
    try:
        groups = _compiled(pattern).groups
    except (regex.error, RecursionError, OverflowError) as error:
        raise OptionError(f"{where}: pattern {pattern!r} is no regular expression ({error})") from error
    if groups != 1:
        raise OptionError(f"{where}: pattern {pattern!r} has {groups} groups; one, around the answer, is needed")


@lru_cache
def _compiled(pattern: str) -> Any:
    return regex.compile(pattern)


def _plain(found: str) -> str:
    """A number as one text however it was written: 1,234.50 and +$1234.5 are 1234.5."""
    sign = "-" if found.startswith("-") else ""
    whole_part, _, decimals = found.lstrip("+-$").replace(",", "").partition(".")
    whole_part, decimals = whole_part.lstrip("0") or "0", decimals.rstrip("0")
    plain = f"{whole_part}.{decimals}" if decimals else whole_part
    return plain if plain == "0" else sign + plain
