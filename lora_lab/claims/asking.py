"""The questions that claims are answered by, and what each of them is asked about."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab import files
from lora_lab.brief import Brief
from lora_lab.errors import FileError, unknown
from lora_lab.results.result import Result
from lora_lab.scoring.execution import Execution

if TYPE_CHECKING:
    from lora_lab.adapters.adapter import Adapter
    from lora_lab.results.stats import Floats
    from lora_lab.tasks.task import Task


@dataclass(frozen=True)
class Asked:
    """A question by the module and name of its class."""

    module: str
    name: str
    about: Callable[[Sequence[Task]], tuple[Any, ...]] = lambda tasks: (tasks[0],)
    """The tasks of the adapters, one each → what the question takes beside these."""
    tells: bool = True
    """Whether it may tell what lies behind its rows."""

    def made(self, options: Mapping[str, Any]) -> Any:
        """The question with these options; OptionError for one that it does not have."""
        cls = getattr(import_module(f"lora_lab.analysis.{self.module}"), self.name)
        names = {f.name: f.default for f in dataclasses.fields(cls)}
        for name in options:
            if name not in names:
                raise unknown(f"option of {self.name}", name, names)
        return cls(**{name: _tupled(value) for name, value in options.items()})


QUESTIONS = {
    "evaluate": Asked("questions", "Evaluate"),
    "interpolate": Asked("questions", "Interpolate"),
    "stability": Asked("questions", "Stability"),
    "shapley": Asked("questions", "Shapley"),
    "sweep": Asked("questions", "Sweep"),
    "sharpness": Asked("lines.landscape", "Sharpness", tells=False),
    "compare-merges": Asked("merge_tables.question", "CompareMerges", lambda tasks: (list(tasks),)),
    "compare": Asked("comparing", "Compare", lambda tasks: (), tells=False),
}
"""Verb → what is asked."""

_ASKED, _TABLES = "asked", "by_example"
"""In the provenance of an answer's result: what it hangs on, hashed, and the tables with numbers of the examples."""


@dataclass(frozen=True, repr=False)
class Answer(Brief):
    """The result of a question, and what lies behind its numbers."""

    result: Result
    by_example: Mapping[str, Floats] = dataclasses.field(default_factory=dict)
    """Table → numbers of the examples of each of its rows, [rows, examples] (see `Execution.by_example`)."""

    def behind(self, tables: Sequence[str], row: int) -> tuple[Floats, ...]:
        """The numbers of a row in each of the tables; () where one of them has none."""
        there = all(name in self.by_example for name in tables)
        return tuple(self.by_example[name][row] for name in tables) if there else ()


def answer(
    path: Path, verb: str, options: Mapping[str, Any], adapters: Sequence[Adapter], tasks: Sequence[Task], on: Execution
) -> Answer:
    """The answer that lies at the path, if it is to this very question; else computed, and written there.

    Numbers of the examples lie beside it, in a file of tensors.
    """
    asked = QUESTIONS[verb]
    question, about = asked.made(options), asked.about(tasks)
    question.check(adapters)
    run, beside = question.run_id(adapters, *about), path.with_suffix(".examples.safetensors")
    with contextlib.suppress(FileError):
        earlier = Result.load(path)
        tables = earlier.provenance.get(_TABLES)
        if earlier.provenance.get(_ASKED) == run and (tables is not None or not asked.tells):
            return Answer(earlier, _read(beside, run, tables) if tables else {})
    found: dict[str, Floats] = {}
    result: Result = question.run(adapters, *about, replace(on, by_example=lambda name, rows: _keep(found, name, rows)))
    result = replace(result, provenance={**result.provenance, _ASKED: run, _TABLES: sorted(found)})
    if found:
        _write(beside, run, found)
    result.save(path)
    return Answer(result, found)


def _keep(found: dict[str, Floats], table: str, rows: Sequence[Floats]) -> None:
    """Rows that are of as many examples each."""
    import numpy as np

    if len(set(map(len, rows))) == 1:
        found[table] = np.stack(rows).astype(np.float32)


def _write(path: Path, run: str, tables: Mapping[str, Floats]) -> None:
    import torch

    files.write_safetensors(path, {name: torch.from_numpy(rows) for name, rows in tables.items()}, {_ASKED: run})


def _read(path: Path, run: str, tables: Sequence[str]) -> dict[str, Floats]:
    """FileError where the tables are not those of this run."""
    tensors, metadata = files.read_safetensors(path)
    if metadata.get(_ASKED) != run or sorted(tensors) != list(tables):
        raise FileError(f"{path}: numbers of other examples than those of the result beside it")
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _tupled(value: Any) -> Any:
    """Lists of a file as the tuples that questions have."""
    return tuple(map(_tupled, value)) if isinstance(value, list) else value
