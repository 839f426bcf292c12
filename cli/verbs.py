"""Verbs made from dataclasses: a parameter that is a dataclass of options becomes these options on the command line."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import typer

from ..options import Option, options_of
from . import parsing


@dataclass(frozen=True)
class Form:
    """How values of a type are written on a command line."""

    kind: Any
    """What typer reads them as."""
    read: Callable[[Any, str], Any]
    """(what was written, the option with its dashes) → the value."""
    show: Callable[[Any], Any]
    """A default as it would be written; what typer cannot have as a default is a text, shown alone."""


def _names(text: str, _: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _pairs(given: list[str] | None, flag: str) -> dict[str, str]:
    return parsing.pairs(given, flag)


def _groups(given: list[str] | None, _: str) -> str | dict[str, str] | None:
    return parsing.groups(given) if given else None


FORMS: dict[Any, Form] = {
    tuple[float, ...]: Form(str, parsing.numbers, lambda values: ",".join(f"{value:g}" for value in values)),
    tuple[str, ...]: Form(str, _names, ",".join),
    Mapping[str, Any]: Form(list[str], _pairs, lambda _: None),
    Mapping[str, Mapping[str, Any]]: Form(list[str], _pairs, lambda _: None),
    str | Mapping[str, str]: Form(list[str], _groups, str),
}
"""Types of fields that typer does not know."""


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """The function as typer takes it, every dataclass among its parameters replaced by its options.

    Called with their values, it builds the dataclasses and calls the function with them.
    """
    hints = get_type_hints(function, include_extras=True)
    name = function.__module__.rpartition(".")[2].replace("_", "-")
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if dataclasses.is_dataclass(hint):
            groups[parameter.name] = hint
            parameters += [_parameter(field, said, hint, name) for field, said in shown(hint)]
        else:
            parameters.append(parameter.replace(annotation=hint))

    def command(**given: Any) -> None:
        for parameter, group in groups.items():
            given[parameter] = build(group, given)
        function(**given)

    command.__doc__, command.__module__ = function.__doc__, function.__module__
    ordered = sorted(parameters, key=lambda parameter: parameter.default is not inspect.Parameter.empty)
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in ordered]
    )
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def shown(group: Any) -> list[tuple[dataclasses.Field[Any], Option]]:
    """The options of a dataclass that a command line has."""
    return [(field, said) for field, said in options_of(group) if said.flag != ""]


def flags(field: dataclasses.Field[Any], said: Option) -> list[str]:
    """The option's names with their dashes: one for the letter before a name, both names of a switch with a slash."""
    *short, name = (said.flag or field.name.replace("_", "-")).split()
    return [*(f"-{letter}" for letter in short), "/".join(f"--{part}" for part in name.split("/"))]


def build(group: Any, given: dict[str, Any]) -> Any:
    """The dataclass from what was written for its options, which are taken out of `given`."""
    hints = get_type_hints(group)
    values = {}
    for field, said in shown(group):
        written, form = given.pop(field.name), FORMS.get(hints[field.name])
        value = form.read(written, flags(field, said)[-1]) if form and written is not None else written
        if form is None or value is not None:
            values[field.name] = value
    return group(**values)


def _parameter(field: dataclasses.Field[Any], said: Option, group: Any, verb_name: str) -> inspect.Parameter:
    hint, form = get_type_hints(group)[field.name], None
    default = field.default if field.default_factory is dataclasses.MISSING else None
    more: dict[str, Any] = {}
    names = flags(field, said)
    if hint in FORMS:
        form = FORMS[hint]
        default = form.show(default) if default is not None else None
        hint = form.kind
        if hint == list[str]:
            hint, default, more = list[str] | None, None, {"show_default": default} if default else {}
    elif hint in (bool, bool | None) and default is not False and "/" not in names[0]:
        names = [f"{names[0]}/--no-{names[0][2:]}"]
    option = typer.Option(*names, help=said.help.replace("VERB", verb_name), **more)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option]
    )
