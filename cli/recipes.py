"""Recipes: steps in a YAML file, each a verb with its options, and what each of them hangs on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FileError, OptionError, unknown

VERBS = ("merge", "prune", "convert", "fuse", "extract", "evaluate")
"""The verbs that a step can be."""
_NOT_IN_STEPS = ("output", "o", "force", "overwrite", "help", "json", "yes")
"""Options that a step has otherwise, or not at all."""
_LARGEST = 2**20
"""Bytes of a recipe."""

_MERGEKIT_METHODS = {
    "task_arithmetic": "task-arithmetic",
    "linear": "average",
    "ties": "ties",
    "dare_linear": "dare",
    "dare_ties": "dare-ties",
    "della_linear": "della",
    "breadcrumbs": "breadcrumbs",
    "slerp": "slerp",
}
"""mergekit's names of methods → ours."""
_MERGEKIT_KEYS = ("merge_method", "models", "parameters", "base_model", "dtype", "out_dtype", "output")


@dataclass
class Step:
    """One step of a recipe."""

    number: int
    verb: str
    options: dict[str, Any]
    arguments: list[str] = field(default_factory=list)
    """The same as words of a command line, without the verb and the output."""
    output: str = ""
    inputs: list[str] = field(default_factory=list)
    """Paths among its values."""

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
        content = {"steps": [{"merge": _of_mergekit(content, str(path))}]}
    _only(content, ("steps",), str(path))
    listed = content.get("steps")
    if not isinstance(listed, list) or not listed:
        example = "- merge: {adapters: [a, b], output: c}"
        raise OptionError(f"{path}: `steps` must list at least one step, such as {example}")
    steps = [_step(number, entry, str(path)) for number, entry in enumerate(listed, 1)]
    made: dict[str, Step] = {}
    for step in steps:
        place = os.path.normpath(step.output)
        if place in made:
            raise OptionError(f"{path}: {step.name} writes {step.output}, as {made[place].name} does")
        reads = set(map(os.path.normpath, step.inputs))
        later = [other for other in steps[step.number - 1 :] if os.path.normpath(other.output) in reads]
        if later:
            raise OptionError(f"{path}: {step.name} reads {later[0].output}, which {later[0].name} only makes later")
        made[place] = step
    return steps


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        if path.stat().st_size > _LARGEST:
            raise FileError(f"{path}: {path.stat().st_size} bytes; a recipe has at most {_LARGEST}")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise FileError(
            f"{path}{line}: not YAML ({getattr(error, 'problem', None) or type(error).__name__})"
        ) from error
    if not isinstance(content, dict):
        raise FileError(f"{path}: a recipe is a mapping with `steps`, and this is a {type(content).__name__}")
    return content


def _only(given: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    odd = next((key for key in given if key not in known), None)
    if odd is not None:
        raise unknown(f"key in {where}", str(odd), list(known))


def _of_mergekit(content: dict[str, Any], where: str) -> dict[str, Any]:
    """A merge in mergekit's words as the options of `merge`; what has no counterpart is refused by name."""
    _only(content, _MERGEKIT_KEYS, where)
    method = str(content["merge_method"])
    models = content.get("models")
    if not isinstance(models, list) or not all(isinstance(m, dict) and isinstance(m.get("model"), str) for m in models):
        raise OptionError(f"{where}: `models` must list the adapters, each as model: PATH")
    options: dict[str, Any] = dict(content.get("parameters") or {})
    adapters, weights, own = [], [], {}
    for entry in models:
        _only(entry, ("model", "parameters"), where)
        _, plus, adapter = entry["model"].rpartition("+")  # mergekit writes BASE+ADAPTER
        adapters.append(adapter if plus else entry["model"])
        parameters = dict(entry.get("parameters") or {})
        weights.append(parameters.pop("weight", 1.0))
        own.update({name: [*own.get(name, []), value] for name, value in parameters.items()})
    for name, values in own.items():
        if len(set(map(str, values))) > 1 or len(values) < len(models):
            raise OptionError(f"{where}: {name} is not the same for all models; one value for all is needed here")
        options[name] = values[0]
    step: dict[str, Any] = {"adapters": adapters, "method": _MERGEKIT_METHODS.get(method, method)}
    if any(isinstance(weight, list | dict) for weight in weights):
        raise OptionError(f"{where}: a weight is a number here; a file of weights by module can be given to merge")
    step["weights"] = ",".join(f"{weight:g}" if isinstance(weight, float | int) else str(weight) for weight in weights)
    if options.pop("normalize", False) and step["method"] != "average":
        raise OptionError(f"{where}: normalize is not had by {method} here; give weights that sum to 1")
    if "lambda" in options:
        step["coefficient"] = options.pop("lambda")
    if options:
        step["set"] = options
    for name in ("out_dtype", "dtype"):
        if content.get(name) is not None:
            step.setdefault("dtype", content[name])
    return {**step, "output": content.get("output", "merged")}


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
        options = _of_mergekit(options, f"{where}, step {number}")
    step = Step(number, verb, dict(options))
    output = step.options.get("output")
    if not isinstance(output, str) or not output:
        raise OptionError(f"{where}: {step.name} needs `output`, the name of what it writes")
    step.output = output
    step.arguments = _arguments(step, where)
    return step


def _arguments(step: Step, where: str) -> list[str]:
    """The options as a command line, which typer has taken apart and found to be right."""
    command = command_named(step.verb)
    positional = [p for p in command.params if p.param_type_name == "argument"]
    options = {name.lstrip("-"): p for p in command.params for name in p.opts if p.param_type_name == "option"}
    given = {str(name).replace("_", "-"): value for name, value in step.options.items() if name != "output"}
    known = [p.name for p in positional] + sorted(options)
    words: list[str] = []
    for name, value in given.items():
        if name in (p.name for p in positional):
            continue
        if name not in options or name in _NOT_IN_STEPS:
            raise unknown(
                f"option in {where}, {step.name}", name, [name for name in known if name not in _NOT_IN_STEPS]
            )
        words += _option(name, value, options[name], f"{where}, {step.name}")
    for parameter in positional:
        value = given.get(str(parameter.name), [])
        words += [str(item) for item in (value if isinstance(value, list) else [value])]
    from . import check

    try:
        check([step.verb, *words, "-o", step.output])
    except OptionError as error:
        raise OptionError(f"{where}: {step.name}: {error}") from error
    step.inputs = [str(value) for value in _texts(step.options) if value != step.output]
    return words


def _option(name: str, value: Any, parameter: Any, where: str) -> list[str]:
    """One option as words; a list is repeated or joined by commas, a mapping repeated as NAME=VALUE."""
    flag = f"--{name}" if len(name) > 1 else f"-{name}"
    if isinstance(value, bool):
        off = next(iter(parameter.secondary_opts), None)
        if not parameter.is_flag:
            raise OptionError(f"{where}: {name} is {value}; a value is needed")
        return [flag] if value else [off] if off else []
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [word for key, item in value.items() for word in (flag, f"{key}={_text(item)}")]
    if isinstance(value, list) and parameter.multiple and any(isinstance(item, str) for item in value):
        return [word for item in value for word in (flag, _text(item))]
    if isinstance(value, list):
        return [flag, ",".join(map(_text, value))]
    return [flag, _text(value)]


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

    from . import application

    return typer.main.get_command(application([verb])).commands[verb]  # type: ignore[attr-defined]
