"""Options told once: a dataclass field with its default, what it means, and which values it takes.

A question or a recipe is a frozen dataclass of such fields; the command line, the checks, the record in a result and
the run id all come from them. Knows nothing of the command line: a flag here is only the name that it would have.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from lora_lab.errors import OptionError, unknown
from lora_lab.registry import Later

_KEY = "option"


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
    """OptionError for a value out of its bounds or not among its choices; None stands for a default and is passed over.

    Of a tuple or list, every value counts.
    """
    for field, said in options_of(instance):
        value = getattr(instance, field.name)
        for each in value if isinstance(value, tuple | list) else [value]:
            _check(said.title or field.name.replace("_", " "), each, said)


def _check(title: str, value: Any, said: Option) -> None:
    if value is None:
        return
    if said.choices is not None and isinstance(value, str) and value not in said.choices():
        raise unknown(title, value, said.choices())
    if isinstance(value, bool) or not isinstance(value, int | float):
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
