"""Texts of the command line → values: every `read` of an option, with the option's name in the error."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.errors import OptionError, unknown

if TYPE_CHECKING:
    from lora_lab.merging.sources import Weights
    from lora_lab.merging.validation.search import Grid, Interval


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


def rank(text: str, flag: str) -> int | str:
    """'8' → 8; a word for a rank, as it is."""
    if re.fullmatch(r"[a-z]+", text):
        return text
    try:
        return int(text)
    except ValueError as error:
        raise OptionError(f"{flag} {text!r}: a whole number is needed, or a word such as largest") from error


def ranks(text: str, flag: str) -> tuple[int | str, ...]:
    """'largest,8' → ('largest', 8)."""
    return tuple(rank(part.strip(), flag) for part in text.split(","))


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


def methods(given: Sequence[str]) -> list[tuple[str, str]]:
    """['lora=runs/plain*'] → [('lora', 'runs/plain*')]."""
    for text in given:
        if not all(text.partition("=")):
            raise OptionError(f"--group {text!r}: a method and a pattern are needed, such as lora='runs/plain*'")
    return [(text.partition("=")[0], text.partition("=")[2]) for text in given]


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
        kind: Callable[[str], Any] = (
            (int if text.lstrip("+-").isdigit() else float) if default is None else type(default)
        )
        try:
            values[name] = kind(text)
        except ValueError as error:
            needed = "a whole number" if kind is int else "a number"
            raise OptionError(f"--set {name}={text}: {needed} is needed") from error
    return values


def method_options(given: Sequence[str], flag: str) -> dict[str, dict[str, Any]]:
    """['ties.density=0.3'] → {'ties': {'density': 0.3}}."""
    from lora_lab.merging.methods import MERGES

    options: dict[str, dict[str, Any]] = {}
    for place, value in pairs(given, flag).items():
        name, dot, option = place.rpartition(".")
        if not dot:
            raise OptionError(f"{flag} {place}: METHOD.OPTION=VALUE is needed here, such as ties.{place}={value}")
        method, _, inner = name.partition(":")
        defaults = MERGES[method].defaults({"inner": inner} if inner else {})
        options.setdefault(name, {}).update(typed({option: value}, defaults, name))
    return options


def weights(given: Sequence[str], count: int) -> Weights:
    """The weights of so many adapters.

    ['1,1,0.5']: one an adapter. ['0:1,11:0', '0:0,11:1']: for each adapter, its weight at some layers. ['w.json']: an
    object of {regular expression of modules: weights, …, "default": weights}.
    """
    from lora_lab.merging.sources import Weights

    plain = (1.0,) * count
    if not given:
        return Weights(plain)
    if len(given) == 1 and Path(given[0]).suffix == ".json":
        return _weights_of_file(Path(given[0]), count)
    if any(":" in text for text in given):
        read = Weights(plain, layers=tuple(map(_line, given)))
    elif len(given) > 1:
        raise OptionError("weights are given twice; one list with commas (1,1,0.5), or a line of layer:weight each")
    else:
        try:
            read = Weights(tuple(float(part) for part in given[0].split(",")))
        except ValueError as error:
            raise OptionError(
                f"weights {given[0]!r}: numbers with commas (1,1,0.5), layer:weight pairs, or a .json file are needed"
            ) from error
    read.check(count)
    return read


def _line(text: str) -> dict[int, float]:
    points: dict[int, float] = {}
    for part in text.split(","):
        layer, _, weight = part.partition(":")
        if layer.isdigit() and int(layer) in points:
            raise OptionError(f"weights {text!r}: layer {layer} is given twice")
        try:
            points[int(layer)] = float(weight)
        except ValueError as error:
            raise OptionError(f"weights {text!r}: layer:weight pairs are needed, such as 0:1,11:0.5") from error
        if int(layer) < 0:
            raise OptionError(f"weights {text!r}: layers count from 0")
    return points


def _weights_of_file(path: Path, count: int) -> Weights:
    from lora_lab.files.disk import read_json
    from lora_lab.merging.sources import Weights

    patterns: dict[str, tuple[float, ...]] = {}
    for pattern, listed in read_json(path).items():
        if not isinstance(listed, list) or not all(type(weight) in (int, float) for weight in listed):
            raise OptionError(f"{path}: {pattern!r} has {listed!r}; a list of {count} numbers is needed")
        try:
            re.compile(pattern)
            patterns[pattern] = tuple(map(float, listed))
            Weights(patterns[pattern]).check(count)
        except OptionError as error:
            raise OptionError(f"{path}: {pattern!r}: {error}") from error
        except OverflowError as error:
            raise OptionError(f"{path}: {pattern!r} has a number that is too large") from error
        except re.error as error:
            raise OptionError(f"{path}: not a regular expression: {pattern!r} ({error})") from error
    return Weights(patterns.pop("default", (1.0,) * count), patterns)


def searches(given: Sequence[str], method: str, fixed: Mapping[str, Any]) -> dict[str, Grid | Interval]:
    """['density=0.1,0.2', 'coefficient=0.1..2'] → what is to be tried of each; `fixed` options are set."""
    from lora_lab.merging.methods import MERGES
    from lora_lab.merging.validation.search import COEFFICIENT, Grid, Interval

    defaults: dict[str, Any] = {COEFFICIENT: 1.0, **MERGES[method].defaults(fixed)}
    spaces: dict[str, Grid | Interval] = {}
    for text in given:
        name, equals, tried = text.partition("=")
        if name not in defaults:
            raise unknown(f"option of {method}", name, list(defaults))
        if name in fixed:
            raise OptionError(f"{name} is both set and searched")
        if name in spaces:
            raise OptionError(f"{name} is searched twice; all its values go into one list")
        if ".." in tried and name != COEFFICIENT:
            raise OptionError(f"search {text!r}: an interval can be searched for coefficient only")
        try:
            if not equals:
                raise ValueError(text)
            if ".." in tried:
                low, high = map(float, tried.split(".."))
                spaces[name] = Interval(low, high)
            else:
                spaces[name] = Grid(_listed(tried, defaults[name]))
        except OptionError as error:
            raise OptionError(f"search {text!r}: {error}") from error
        except (ValueError, KeyError) as error:
            raise OptionError(f"search {text!r}: NAME=VALUE,VALUE or coefficient=LOW..HIGH is needed") from error
    return spaces


def _listed(text: str, default: object) -> tuple[Any, ...]:
    """Values of the type of the default; of one that has none, whole numbers where all are written so."""
    parts = text.split(",")
    if isinstance(default, bool):
        return tuple({"true": True, "false": False}[part] for part in parts)
    whole = all(part.strip().lstrip("+-").isdigit() for part in parts)
    kind: Callable[[str], Any] = (int if whole else float) if default is None else type(default)
    return tuple(kind(part) for part in parts)


def keywords(function: Callable[..., object]) -> dict[str, object]:
    """The keyword-only options of a function, with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
