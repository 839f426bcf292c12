"""The questions that claims are answered by, and what each of them is asked about."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.errors import FileError, unknown
from lora_lab.results.result import Result
from lora_lab.scoring.execution import Execution

if TYPE_CHECKING:
    from lora_lab.adapters.adapter import Adapter
    from lora_lab.tasks.task import Task


@dataclass(frozen=True)
class Asked:
    """A question by the module and name of its class."""

    module: str
    name: str
    about: Callable[[Sequence[Task]], tuple[Any, ...]] = lambda tasks: (tasks[0],)
    """The tasks of the adapters, one each → what the question takes beside these."""

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
    "sharpness": Asked("landscape", "Sharpness"),
    "compare-merges": Asked("merges", "CompareMerges", lambda tasks: (list(tasks),)),
    "compare": Asked("comparing", "Compare", lambda tasks: ()),
}
"""Verb → what is asked."""

_ASKED = "asked"
"""What an answer hangs on, hashed, in the provenance of its result."""


def answer(
    path: Path, verb: str, options: Mapping[str, Any], adapters: Sequence[Adapter], tasks: Sequence[Task], on: Execution
) -> Result:
    """The answer that lies at the path, if it is to this very question; else computed, and written there."""
    asked = QUESTIONS[verb]
    question, about = asked.made(options), asked.about(tasks)
    question.check(adapters)
    run = question.run_id(adapters, *about)
    with contextlib.suppress(FileError):
        earlier = Result.load(path)
        if earlier.provenance.get(_ASKED) == run:
            return earlier
    result: Result = question.run(adapters, *about, on)
    result = dataclasses.replace(result, provenance={**result.provenance, _ASKED: run})
    result.save(path)
    return result


def _tupled(value: Any) -> Any:
    """Lists of a file as the tuples that questions have."""
    return tuple(map(_tupled, value)) if isinstance(value, list) else value
