"""Options told once: a dataclass field with its default, what it means, and which values it takes.

A question or a recipe is a frozen dataclass of such fields; the command line, the checks, the record in a result and
the run id all come from them. Knows nothing of the command line: a flag here is only the name that it would have.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from lora_lab.errors import OptionError, unknown
from lora_lab.registry import Later

_KEY = "option"
_LONGEST = 80
"""Characters of a value in an error."""

Given = ParamSpec("Given")
Output = TypeVar("Output")


@dataclass(frozen=True)
class Option:
    """What is said of a field besides its default and its type."""

    help: str
    """One or two sentences for whoever sets it."""
    flag: str | None = None
    """The option's name on a command line without its dashes, where it is not the field's; "" for none."""
    least: float | None = None
    most: float | None = None
    above: float | None = None
    """Numbers must be larger than this."""
    choices: Callable[[], Collection[str]] | None = None
    """The names that it takes, listed when they are needed."""
    names: Later | None = None
    """What NAMES in the help stands for, where it is not the choices."""
    several: bool = False
    """Whether the command line takes several values of which the best is chosen."""
    title: str | None = None
    """The field in the words of an error, where they are not its name with blanks."""


def option(default: Any, help: str, **more: Any) -> Any:  # noqa: A002
    """A dataclass field with an `Option` (see its fields for `more`), required where the default is `...`.

    A mapping is copied for every instance.
    """
    metadata = {_KEY: Option(help, **more)}
    if default is ...:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def help_of(said: Option) -> str:
    """What is said of an option, with the names that can be chosen."""
    listed = said.names or said.choices
    if "NAMES" not in said.help or listed is None:
        return said.help
    return said.help.replace("NAMES", ", ".join(listed.names() if isinstance(listed, Later) else listed()))


def options_of(cls: Any) -> Iterator[tuple[dataclasses.Field[Any], Option]]:
    """The fields of a dataclass that are options, in order."""
    for field in dataclasses.fields(cls):
        if _KEY in field.metadata:
            yield field, field.metadata[_KEY]


def check_options(instance: Any) -> None:
    """OptionError for a field of a dataclass that is not of its type, or an option out of its bounds or choices.

    Of a tuple or list, every value counts.
    """
    hints = get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value, said = getattr(instance, field.name), field.metadata.get(_KEY, Option(""))
        title = said.title or field.name.replace("_", " ")
        check_type(title, value, hints[field.name])
        for item in value if isinstance(value, tuple | list) else [value]:
            _check(title, item, said)


def checked(function: Callable[Given, Output]) -> Callable[Given, Output]:
    """The function, with OptionError for an argument that is not of the type that is written beside it.

    Of `Annotated`, the last part are the words of the error.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*arguments: Given.args, **options: Given.kwargs) -> Output:
        given, hints = signature.bind(*arguments, **options).arguments, _hints(function)
        for name, value in given.items():
            if name in hints:
                check_type(f"`{name}`", value, hints[name])
        return function(*arguments, **options)

    return call


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Parameter → its type; what comes out may be of a type that is not loaded."""
    annotations = {name: hint for name, hint in inspect.get_annotations(function).items() if name != "return"}
    holder = SimpleNamespace(__annotations__=annotations)
    return get_type_hints(holder, globalns=inspect.unwrap(function).__globals__, include_extras=True)


def check_type(title: str, value: Any, hint: Any) -> None:
    """OptionError for a value that is not of an annotated type; `title` names the option."""
    if not _fits(value, hint):
        shown = " ".join(repr(value).split())
        shown = shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"
        raise OptionError(f"{title} is {shown}; {_needed(hint)} is needed")


_TYPES: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "True or False"),
    int: (lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool), "a whole number"),
    float: (lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool), "a number"),
    str: (lambda value: isinstance(value, str), "a text"),
    tuple: (lambda value: isinstance(value, tuple | list), "a list"),
    Sequence: (lambda value: isinstance(value, tuple | list), "a list"),
    Mapping: (lambda value: isinstance(value, Mapping), "a mapping of names"),
    Callable: (callable, "a function"),
    os.PathLike: (lambda value: isinstance(value, os.PathLike), "a path"),
}
"""A field's type → whether a value is of it, and its name; numpy's numbers are numbers, and a list may be a tuple."""


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type, what lists and mappings hold, too; what is no class takes everything."""
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin is Annotated:
        return _fits(value, inner[0])
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in inner)
    if origin not in _TYPES:
        return origin is Any or not isinstance(origin, type) or isinstance(value, origin)
    if not _TYPES[origin][0](value):
        return False
    if origin is Mapping and inner:
        return all(_fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items())
    return origin not in (tuple, Sequence) or not inner or all(_fits(item, inner[0]) for item in value)


def _needed(hint: Any) -> str:
    """An annotated type in words."""
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin is Annotated:
        return str(inner[-1])
    if origin in (Union, UnionType):
        return " or ".join(_needed(part) for part in inner if part is not NoneType)
    if origin not in _TYPES:
        return f"{'an' if origin.__name__[0] in 'AEIOU' else 'a'} {origin.__name__}"
    words = _TYPES[origin][1]
    of = f" ({_needed(inner[0])} each)" if origin in (tuple, Sequence) and inner else ""
    return words + of


def _check(title: str, value: Any, said: Option) -> None:
    if value is None:
        return
    if said.choices is not None and isinstance(value, str) and value not in said.choices():
        raise unknown(title, value, said.choices())
    check_bounds(title, value, said)


def check_bounds(title: str, value: Any, said: Option) -> None:
    """OptionError for a number out of the option's bounds, or not finite; `title` names the option."""
    if not _fits(value, float):
        return
    if not math.isfinite(value):
        raise OptionError(f"{title} is {value}; a finite number is needed")
    if said.above is not None and not value > said.above:
        raise OptionError(f"{title} is {value}; it must be above {said.above}")
    low, high = said.least, said.most
    if (low is not None and value < low) or (high is not None and value > high):
        if low is not None and high is not None:
            raise OptionError(f"{title} is {value}; it must be from {low} to {high}")
        bound = f"at least {low}" if low is not None else f"at most {high}"
        raise OptionError(f"{title} is {value}; it must be {bound}")
