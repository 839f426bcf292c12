"""`lora-lab.toml` in the current folder: the task and defaults of options, as if the user had typed them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import typer

from lora_lab.cli.terminal import messages
from lora_lab.cli.verbs import VERBS, checking, command_of, function_of
from lora_lab.errors import OptionError, TrustError, unknown
from lora_lab.files.toml import FOLDER_FILE, read_toml

TYPED_ONLY = ("force", "yes", "trust-record", "in-place", "ray")
"""Options that let something happen which a file found in a folder must not: these are typed."""
_WITHOUT = ("record", "run")
"""Verbs that take nothing from it: what is written into files as facts, and recipes, which say all of theirs."""
_SHARED = "defaults"
"""The table for every verb that has its options."""


def defaults(arguments: list[str]) -> dict[str, dict[str, Any]]:
    """Verb → option → value, for the verb that is called; empty without a file.

    OptionError, naming the file, the key and what is allowed, for what is no verb, no option of it or no value for it.
    """
    if not os.path.lexists(FOLDER_FILE) or not arguments or {"--help", "-h"} & {*arguments}:
        return {}
    verb = arguments[0]
    if verb not in VERBS or verb in _WITHOUT:
        return {}
    content = read_toml(Path(FOLDER_FILE), "a file of defaults")
    known = ("task", _SHARED, *(each for each in VERBS if each not in _WITHOUT))
    for key, table in content.items():
        if key not in known:
            raise unknown(f"key in {FOLDER_FILE}", key, known)
        if key != "task" and not isinstance(table, dict):
            raise OptionError(f"{FOLDER_FILE}: {key} is {table!r}; a table [{key}] with options is needed")
    options = _options(verb)
    found: dict[str, tuple[Any, str]] = {}
    if "task" in content and "task" in options:
        found["task"] = content["task"], "task"
    for section in (_SHARED, verb):
        for name, value in content.get(section, {}).items():
            flag = name.replace("_", "-")
            if flag in TYPED_ONLY:
                raise OptionError(f"{FOLDER_FILE}: [{section}] {name} is never taken from a file; type --{flag}")
            if section == verb or flag in options or not any(flag in _options(each) for each in known[2:]):
                _require_known(flag, options, section, FOLDER_FILE)
                found[flag] = value, f"[{section}] {name}"
    taken = {flag: (_value(value, options[flag], f"{FOLDER_FILE}: {key}"), key) for flag, (value, key) in found.items()}
    if "task" in taken:
        _refuse_code(taken["task"][0], FOLDER_FILE)
    _keys.set({str(options[flag].name): f"{FOLDER_FILE}: {key}" for flag, (_, key) in taken.items()})
    return {verb: {str(options[flag].name): value for flag, (value, _) in taken.items()}}


_keys: ContextVar[Mapping[str, str]] = ContextVar("keys")
"""Parameter → the file and the key that say it, for errors."""


def told(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which first tells what it has from the file; results that it makes record that.

    An error of such a value names the file and the key.
    """

    def call(context: typer.Context, **given: Any) -> None:
        taken = {name: value for name, value in given.items() if _source(context, name) == "DEFAULT_MAP"}
        if not taken:
            command(**given)
            return
        from lora_lab.results.result import ALSO

        flags = {parameter.name: parameter.opts[-1] for parameter in context.command.params}
        said = {flags[name]: _shown(value) for name, value in taken.items()}
        messages.print(f"from {FOLDER_FILE}: " + ", ".join(f"{flag} {value}" for flag, value in said.items()))
        _check(command, given, taken)
        token = ALSO.set({"folder_file": said})
        try:
            command(**given)
        finally:
            ALSO.reset(token)

    whole = inspect.signature(command)
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    call.__signature__ = whole.replace(parameters=[context, *whole.parameters.values()])  # type: ignore[attr-defined]
    call.__annotations__ = {"context": typer.Context, **command.__annotations__}
    call.__doc__, call.__module__, call.__wrapped__ = command.__doc__, command.__module__, command  # type: ignore[attr-defined]
    return call


def _source(context: typer.Context, name: str) -> str | None:
    source = context.get_parameter_source(name)
    return source.name if source else None


def _check(command: Callable[..., None], given: Mapping[str, Any], taken: Mapping[str, Any]) -> None:
    """OptionError for a value that cannot be, naming its key if it came from the file: without it there is no error."""
    plain = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    with checking():
        try:
            command(**given)
            return
        except OptionError as error:
            for name in taken:
                try:
                    command(**{**given, name: plain[name]})
                except OptionError as other:
                    if str(other) == str(error):
                        continue
                raise OptionError(f"{_keys.get()[name]}: {error}") from error
            raise


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _options(verb: str) -> dict[str, inspect.Parameter]:
    """Name of an option without dashes → the parameter of the verb's command."""
    return {
        name.removeprefix("--"): parameter
        for parameter in inspect.signature(command_of(function_of(verb))).parameters.values()
        for said in parameter.annotation.__metadata__
        for names in (
            () if said.is_eager else (said.default, *(said.param_decls or ()))
        )  # typer has the first name there
        for name in str(names).split("/")[:1]
        if name.startswith("--")
    }


def _require_known(flag: str, options: Mapping[str, Any], section: str, file: str) -> None:
    if flag not in options:
        raise unknown(f"option in [{section}] of {file}", flag, sorted(set(options) - {*TYPED_ONLY}))


def _value(value: Any, parameter: inspect.Parameter, where: str) -> Any:
    """A value of TOML as it would have been read from words; OptionError for one of another type."""
    hint = get_args(parameter.annotation)[0]
    kinds = [each for each in (get_args(hint) if isinstance(hint, UnionType) else (hint,)) if each is not NoneType]
    kind = get_origin(kinds[0]) or kinds[0]
    if kind is list:
        pairs = [f"{key}={item}" for key, item in value.items()] if isinstance(value, dict) else value
        texts = [_text(item, where, "a text, or a list of texts") for item in _listed(pairs)]
        return texts if any(isinstance(item, str) for item in _listed(pairs)) else [",".join(texts)]
    if kind in _TYPES:
        types, words = _TYPES[kind]
        if isinstance(value, bool) is not (kind is bool) or not isinstance(value, types):
            raise OptionError(f"{where} is {value!r}; {words} is needed")
        return value
    return ",".join(_text(item, where, "a text, a number or a list of these") for item in _listed(value))


_TYPES: dict[Any, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
}
"""Type of an option → what TOML has for it, in Python and in words."""


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any, where: str, needed: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise OptionError(f"{where} has {value!r}; {needed} is needed")
    return str(value)


def _refuse_code(named: str | list[str], where: str) -> None:
    """TrustError for a task whose code would run, which only the user who types its name can allow."""
    from lora_lab.tasks.python.python_file import is_python

    for name in [named] if isinstance(named, str) else named:
        way = f"it runs only where you type it: --task {name}"
        if is_python(name):
            raise TrustError(f"{where}: the task {name} is code; {way}")
        if os.path.isfile(name) and read_toml(Path(name), "a task file").get("trust_remote_code"):
            raise TrustError(f"{where}: the task {name} asks for code of its base (trust_remote_code); {way}")
