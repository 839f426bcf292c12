"""Verbs made from dataclasses: a parameter that is a dataclass of options becomes these options on the command line."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import typer

from lora_lab.analysis.questions import in_words
from lora_lab.cli import parsing
from lora_lab.options import Option, check_bounds, help_of, options_of

VERBS = {
    "quickstart": "start",
    "train": "training",
    "interpolate": "lines",
    "plane": "lines",
    "curve": "lines",
    "checkpoints": "lines",
    "sharpness": "lines",
    "stability": "parts",
    "shapley": "parts",
    "compare": "merging",
    "merge": "merging",
    "compare-merges": "merging",
    "prune": "parts",
    "convert": "files",
    "fuse": "files",
    "verify": "files",
    "extract": "files",
    "sweep": "parts",
    "evaluate": "results",
    "inspect": "files",
    "record": "training",
    "tasks": "training",
    "figure": "results",
    "report": "results",
    "schema": "results",
    "doctor": "start",
    "run": "studies",
    "reproduce": "studies",
}
"""Verb → the folder that its file lies in, in the order in which --help lists them."""


def function_of(verb: str) -> Callable[..., None]:
    """The function that a verb is made from; its file is loaded."""
    function: Callable[..., None] = import_module(f"lora_lab.cli.{VERBS[verb]}.{verb.replace('-', '_')}").command
    return function


Asked = TypeVar("Asked")


@dataclass(frozen=True)
class Grid(Generic[Asked]):
    """A dataclass some of whose options were given several values, of which the best is to be found."""

    first: Asked
    """With the first value of each."""
    values: Mapping[str, Sequence[Any]]
    """Option → its values, for all options that may have several."""


@dataclass(frozen=True)
class Form:
    """How values of a type are written on a command line."""

    kind: Any
    """What typer reads them as."""
    read: Callable[[Any, str], Any]
    """(what was written, the option with its dashes) → the value."""
    show: Callable[[Any], Any]
    """A default as it would be written; what typer cannot have as a default is a text, shown alone."""


def _names(given: list[str] | None, _: str) -> tuple[str, ...] | None:
    return tuple(part.strip() for text in given for part in text.split(",")) if given else None


def _pairs(given: list[str] | None, flag: str) -> dict[str, str]:
    return parsing.pairs(given, flag)


def _groups(given: list[str] | None, _: str) -> str | dict[str, str] | None:
    return parsing.groups(given) if given else None


FORMS: dict[Any, Form] = {
    tuple[float, ...]: Form(str, parsing.numbers, lambda values: ",".join(f"{value:g}" for value in values)),
    tuple[int | str, ...]: Form(str, parsing.ranks, lambda ranks: ",".join(map(str, ranks))),
    int | str | None: Form(str, parsing.rank, str),
    tuple[str, ...]: Form(list[str], _names, ",".join),
    tuple[tuple[float, ...], ...]: Form(str, parsing.ratios, lambda ratios: ",".join(map(in_words, ratios))),
    Mapping[str, Any]: Form(list[str], _pairs, lambda _: None),
    Mapping[str, Mapping[str, Any]]: Form(list[str], parsing.method_options, lambda _: None),
    str | Mapping[str, str]: Form(list[str], _groups, str),
    str | Sequence[str] | None: Form(str, parsing.modules, str),
}
"""Types of fields that typer does not know."""


_called: ContextVar[tuple[str, dict[str, Any]]] = ContextVar("called")


def step() -> dict[str, Any]:
    """The verb that runs, with all that it was told but its output, as a step of a recipe.

    Of files and folders the names stand there alone: where they lie is nobody's business.
    """
    verb, given = _called.get()
    left_out = ("output", "force", "json", "yes", "jobs", "ray", "device", "batched", "compile")
    return {verb: {key: _told(value) for key, value in given.items() if key not in left_out}}


def _told(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _told(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_told(inner) for inner in value]
    if isinstance(value, Path) or (isinstance(value, str) and os.path.lexists(value)):
        return Path(value).name
    return value if isinstance(value, str | int | float | bool) else str(value)


_checking: ContextVar[bool] = ContextVar("checking", default=False)


@contextmanager
def checking() -> Iterator[None]:
    """Within it a command only builds what it would be called with, so that its options are checked."""
    token = _checking.set(True)
    try:
        yield
    finally:
        _checking.reset(token)


def command_of(function: Callable[..., None]) -> Callable[..., None]:
    """The function as typer takes it, every dataclass among its parameters replaced by its options.

    Called with their values, it builds the dataclasses and calls the function with them.
    """
    hints = get_type_hints(function, include_extras=True)
    name = function.__module__.rpartition(".")[2].replace("_", "-")
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if dataclasses.is_dataclass(get_origin(hint) or hint):
            groups[parameter.name] = hint
            parameters += [
                _parameter(field, said, group, name) for group in [_group(hint)] for field, said in shown(group)
            ]
        else:
            parameters.append(parameter.replace(annotation=hint))

    def command(**given: Any) -> None:
        told = {key: value for key, value in given.items() if value not in (None, defaults.get(key), [], ())}
        _called.set((name, {words[key]: value for key, value in told.items()}))
        for parameter, group in groups.items():
            given[parameter] = build(group, given)
        if not _checking.get():
            function(**given)

    defaults = {parameter.name: parameter.default for parameter in parameters}
    words = {parameter.name: parameter.name for parameter in parameters}
    for group in groups.values():
        words |= {field.name: flags(field, said)[-1].strip("-").split("/")[0] for field, said in shown(_group(group))}
    command.__doc__, command.__module__, command.__wrapped__ = function.__doc__, function.__module__, function  # type: ignore[attr-defined]
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
    """The option's names with their dashes: one for a letter before a name, both names of a switch with a slash."""
    names = (said.flag or field.name.replace("_", "-")).split()
    return [
        f"-{name}" if len(name) == 1 < len(names) else "/".join(f"--{part}" for part in name.split("/"))
        for name in names
    ]


def build(hint: Any, given: dict[str, Any]) -> Any:
    """The dataclass (or the Grid of it) from what was written for its options, which are taken out of `given`."""
    group, values, several = _group(hint), {}, {}
    for field, said in shown(group):
        written, form = given.pop(field.name), _form(field, said, group)
        value = form.read(written, flags(field, said)[-1]) if form and written is not None else written
        if said.several:
            several[field.name] = [None] if value is None else value
            value = several[field.name][0]
        for each in value if isinstance(value, tuple) else several.get(field.name) or [value]:
            check_bounds(flags(field, said)[-1], each, said)
        if form is None or value is not None:
            values[field.name] = value
    return Grid(group(**values), several) if get_origin(hint) is Grid else group(**values)


def _group(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Grid else hint


def _form(field: dataclasses.Field[Any], said: Option, group: Any) -> Form | None:
    hint = get_type_hints(group)[field.name]
    if said.several:
        kind = int if hint in (int, int | None) else float
        return Form(str, lambda text, flag: parsing.values(text, flag, kind), str)
    return FORMS.get(hint)


def _parameter(field: dataclasses.Field[Any], said: Option, group: Any, verb_name: str) -> inspect.Parameter:
    hint, form, names = get_type_hints(group)[field.name], _form(field, said, group), flags(field, said)
    default = field.default if field.default_factory is dataclasses.MISSING else None
    if default is dataclasses.MISSING:
        default = inspect.Parameter.empty
    more: dict[str, Any] = {}
    if form:
        default = form.show(default) if default not in (None, ()) else None
        hint = form.kind | None
        if form.kind == list[str] and default is not None:
            default = [default]  # one word, as it would be typed
    elif hint in (bool, bool | None) and default is not False and "/" not in names[0]:
        names = [f"{names[0]}/--no-{names[0][2:]}"]
    more["rich_help_panel"] = getattr(group, "help_panel", None)
    text = help_of(said).replace("VERB", verb_name) + (" ☰" if said.several else "")
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[hint, typer.Option(*names, help=text, **more)],
    )
