"""Recipes: steps in a YAML file, each a verb with its options, and what each of them hangs on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_lab.cli.program import application, check
from lora_lab.cli.studies import mergekit
from lora_lab.errors import FileError, OptionError, unknown

VERBS = ("merge", "prune", "convert", "fuse", "extract", "evaluate")
"""The verbs that a step can be."""
_NOT_IN_STEPS = ("output", "o", "force", "overwrite", "help", "json", "yes")
"""Options that a step has otherwise, or not at all."""
_LARGEST = 2**20
"""Bytes of a recipe."""


@dataclass
class Step:
    """One step of a recipe."""

    number: int
    verb: str
    options: dict[str, Any]
    arguments: list[str] = field(default_factory=list)
    """The options as words of a command line, without the output."""
    positional: list[str] = field(default_factory=list)
    """The adapters and the base, in their order."""
    output: str = ""
    inputs: list[str] = field(default_factory=list)
    """Paths among its values."""

    def words(self, *more: str) -> list[str]:
        """The whole command line, with more options; no value can be taken for an option."""
        return [self.verb, *self.arguments, *more, f"--output={self.output}", "--", *self.positional]

    @property
    def name(self) -> str:
        """In messages."""
        return f"step {self.number} ({self.verb})"


def read(path: Path) -> list[Step]:
    """The steps of a recipe, every key and value checked; nothing is run.

    A recipe is a list of steps under `steps`, or a merge in mergekit's words. OptionError names the step, the key, and
    what would be right; FileError a file that is no recipe.
    """
    content = _yaml(path)
    if "merge_method" in content:
        content = {"steps": [{"merge": mergekit.options_of(content, str(path))}]}
    mergekit.only(content, ("steps",), str(path))
    listed = content.get("steps")
    if not isinstance(listed, list) or not listed:
        example = "- merge: {adapters: [a, b], output: c}"
        raise OptionError(f"{path}: 'steps' must list at least one step, such as {example}")
    steps = [_step(number, entry, str(path)) for number, entry in enumerate(listed, 1)]
    made: dict[str, Step] = {}
    for step in steps:
        place = os.path.normpath(step.output)
        if (path.parent / place).resolve() in (path.resolve(), state_of(path).resolve()):
            raise OptionError(
                f"{path}: {step.name} writes {step.output}, which is the recipe's own; another name is needed"
            )
        if place in made:
            raise OptionError(f"{path}: {step.name} writes {step.output}, as {made[place].name} does")
        reads = set(map(os.path.normpath, step.inputs))
        later = [other for other in steps[step.number - 1 :] if os.path.normpath(other.output) in reads]
        if later:
            raise OptionError(f"{path}: {step.name} reads {later[0].output}, which {later[0].name} only makes later")
        made[place] = step
    return steps


def state_of(path: Path) -> Path:
    """Where it is kept what is known of the steps of a recipe."""
    return path.with_name(f"{path.stem}.state.json")


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    from lora_lab.cli.studies import plain_yaml

    try:
        if path.stat().st_size > _LARGEST:
            raise FileError(f"{path}: {path.stat().st_size} bytes; a recipe has at most {_LARGEST}")
        content = plain_yaml.load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise (
            error if isinstance(error, FileError) else FileError(f"{path}: cannot be read ({error.strerror})")
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        said = getattr(error, "problem", None) or (str(error) if type(error) is ValueError else type(error).__name__)
        raise FileError(f"{path}{line}: not YAML ({said})") from error
    if not isinstance(content, dict):
        raise FileError(f"{path}: a recipe is a mapping with 'steps', and this is a {type(content).__name__}")
    return content


def _step(number: int, entry: Any, where: str) -> Step:
    if not isinstance(entry, dict) or len(entry) != 1:
        example = "- prune: {adapter: a, rank: 4, output: b}"
        raise OptionError(f"{where}: step {number} must be one verb with its options, such as {example}")
    ((verb, options),) = entry.items()
    if verb not in VERBS:
        raise unknown(f"verb in step {number} of {where}", str(verb), list(VERBS))
    if not isinstance(options, dict):
        raise OptionError(f"{where}: step {number} ({verb}) needs a mapping of options")
    if verb == "merge" and "merge_method" in options:
        options = mergekit.options_of(options, f"{where}, step {number}")
    step = Step(number, verb, dict(options))
    output = step.options.get("output")
    if not isinstance(output, str) or not output:
        raise OptionError(f"{where}: {step.name} needs 'output', the name of what it writes")
    step.output = output
    _take_apart(step, where)
    return step


def _refuse_code(task: Any, where: str) -> None:
    """OptionError for a task whose code would run because a recipe names it, which may be somebody else's."""
    from lora_lab.tasks.file import names_code
    from lora_lab.tasks.python.python_file import is_python

    for name in task if isinstance(task, list) else [task]:
        if isinstance(name, str) and names_code(Path(name)):
            raise OptionError(
                f"{where} names the task {name}, whose include is a folder of code; that runs only where you name the "
                "file, on the command line"
            )
        if isinstance(name, str) and is_python(name):
            raise OptionError(
                f"{where} names the task {name}; a task in Python runs only where you name it, on the command line"
            )


def _take_apart(step: Step, where: str) -> None:
    """The options as a command line, which typer has taken apart and found to be right."""
    command = command_named(step.verb)
    positional = [p for p in command.params if p.param_type_name == "argument"]
    options = {name.lstrip("-"): p for p in command.params for name in p.opts if p.param_type_name == "option"}
    given = {str(name).replace("_", "-"): value for name, value in step.options.items() if name != "output"}
    _refuse_code(given.get("task"), f"{where}: {step.name}")
    known = [p.name for p in positional] + sorted(options)
    for name, value in given.items():
        if name in (p.name for p in positional):
            continue
        if name not in options or name in _NOT_IN_STEPS:
            raise unknown(
                f"option in {where}, {step.name}", name, [name for name in known if name not in _NOT_IN_STEPS]
            )
        step.arguments += _option(name, value, options[name], f"{where}, {step.name}")
    for parameter in positional:
        value = given.get(str(parameter.name))
        listed = value if isinstance(value, list) else [] if value is None else [value]
        odd = [item for item in listed if item is None or isinstance(item, bool | list | dict)]
        if odd:
            raise OptionError(f"{where}, {step.name}: {parameter.name} has {odd[0]}; a path or a hub id is needed")
        step.positional += map(_text, listed)
    try:
        check(step.words())
    except OptionError as error:
        raise OptionError(f"{where}: {step.name}: {error}") from error
    step.inputs = [str(value) for value in _texts(step.options) if value != step.output]


def _option(name: str, value: Any, parameter: Any, where: str) -> list[str]:
    """One option as words; a list is repeated or joined by commas, a mapping repeated as NAME=VALUE."""
    flag = f"--{name}"
    if isinstance(value, bool):
        off = next(iter(parameter.secondary_opts), None)
        if not parameter.is_flag:
            raise OptionError(f"{where}: {name} is {value}; a value is needed")
        return [flag] if value else [off] if off else []
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [f"{flag}={key}={_text(item)}" for key, item in value.items()]
    if isinstance(value, list) and parameter.multiple and any(isinstance(item, str) for item in value):
        return [f"{flag}={_text(item)}" for item in value]
    if isinstance(value, list):
        return [f"{flag}={','.join(map(_text, value))}"]
    return [f"{flag}={_text(value)}"]


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | list | dict) else f"{value}"


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [text for part in parts for text in _texts(part)]


def command_named(verb: str) -> Any:
    """The verb as click has it."""
    import typer.main

    return typer.main.get_command(application([verb])).commands[verb]  # type: ignore[attr-defined]
