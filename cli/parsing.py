"""Texts of the command line → values: every `read` of an option, with the option's name in the error."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import OptionError, unknown


def numbers(text: str, flag: str) -> tuple[float, ...]:
    """'0.1,1' → (0.1, 1.0)."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(
            f"{flag} {text!r}: numbers with commas between them are needed, such as 0.25,0.5,0.75"
        ) from error
    if not all(math.isfinite(value) for value in values):
        raise OptionError(f"{flag} {text!r}: finite numbers are needed")
    return values


def ratios(text: str, _: str) -> tuple[tuple[float, ...], ...]:
    """'0:1,1:1:1' → ((0, 1), (1, 1, 1))."""
    parsed = []
    for part in text.split(","):
        try:
            ratio = tuple(float(weight) for weight in part.split(":"))
        except ValueError as error:
            raise OptionError(f"ratio {part!r}: numbers with colons between them are needed, such as 1:2") from error
        if min(ratio) < 0 or not 0 < sum(ratio) < math.inf:
            raise OptionError(f"ratio {part!r}: weights of 0 or more are needed, not all of them 0")
        parsed.append(ratio)
    return tuple(parsed)


def values(text: str, flag: str, kind: Callable[[str], Any]) -> list[Any]:
    """'1e-3,2e-3' → [0.001, 0.002], numbers of a kind."""
    try:
        several = [kind(part) for part in text.split(",")]
    except ValueError as error:
        what = "whole number" if kind is int else "number"
        raise OptionError(f"{flag} {text!r}: a {what} is needed, or several with commas between them") from error
    if len(set(several)) < len(several):
        raise OptionError(f"{flag} {text!r}: a value is given twice")
    return several


def modules(text: str, _: str) -> str | list[str]:
    """'q_proj,v_proj' → names; a regular expression, and all-linear, as they are."""
    if text == "all-linear" or any(sign in text for sign in "*()[]\\^$|"):
        return text
    return text.split(",")


def seeds(text: str) -> list[int]:
    """'0-4' or '0,3,7' → seeds."""
    values: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            values += range(int(first), int(last) + 1) if dash else [int(first)]
        except ValueError as error:
            raise OptionError(f"seeds {text!r}: numbers and ranges are needed, such as 0-4 or 0,3,7") from error
    if not values or len(set(values)) < len(values):
        raise OptionError(f"seeds {text!r}: one or more different seeds are needed, such as 0-4")
    return values


def renames(given: Sequence[str]) -> list[tuple[str, str]]:
    """['model=model.language_model'] → [('model', 'model.language_model')]."""
    changes = []
    for text in given:
        old, equals, new = text.partition("=")
        if not equals or old == new:
            raise OptionError(f"--rename {text!r}: OLD=NEW is needed, two different beginnings of modules' names")
        changes.append((old.strip("."), new.strip(".")))
    return changes


def groups(given: Sequence[str]) -> str | dict[str, str]:
    """['block'] → 'block'; ['low=layers\\.[0-2]\\.', …] → {name: regular expression}."""
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    parts = [text.partition("=") for text in given]
    for name, equals, pattern in parts:
        if not (name and equals and pattern):
            raise OptionError(f"group {name!r}: NAME=REGEX is needed, or one of block, module alone")
    return {name: pattern for name, _, pattern in parts}


def pairs(given: Sequence[str] | None, flag: str = "--set") -> dict[str, str]:
    """['nodes=5'] → {'nodes': '5'}."""
    values = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise OptionError(f"{flag} {text!r}: NAME=VALUE is needed")
        if name in values:
            raise OptionError(f"{flag} {name} is given twice")
        values[name] = value
    return values


def typed(given: Mapping[str, str], defaults: Mapping[str, object], what: str) -> dict[str, int | float | str]:
    """{'nodes': '5'} → {'nodes': 5}, each of the type of its default; OptionError for a name that is not in those."""
    values: dict[str, int | float | str] = {}
    for name, text in given.items():
        if name not in defaults:
            if not defaults:
                raise OptionError(f"{what} has no options to set")
            raise unknown(f"option of {what}", name, list(defaults))
        default = defaults[name]
        if isinstance(default, bool):
            if text.lower() not in ("true", "false"):
                raise OptionError(f"--set {name}={text}: true or false is needed")
            values[name] = text.lower() == "true"
            continue
        # one that has no default is a whole number where it is written as one
        kind = (int if text.lstrip("+-").isdigit() else float) if default is None else type(default)
        try:
            values[name] = kind(text)  # type: ignore[call-arg]
        except ValueError as error:
            raise OptionError(f"--set {name}={text}: {name} is a {kind.__name__}") from error
    return values


def keywords(function: Callable[..., object]) -> dict[str, object]:
    """The keyword-only options of a function, with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
