"""The questions that claims are answered by, and what each of them is asked about."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab import files
from lora_lab.brief import Brief
from lora_lab.errors import FileError, LoraLabError, unknown
from lora_lab.results.result import Result, fingerprint
from lora_lab.scoring.execution import Execution
from lora_lab.scoring.sharing.worker import report, telling

if TYPE_CHECKING:
    from lora_lab.results.stats import Floats
    from lora_lab.scoring.sharing.workers import Workers
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


@dataclass(frozen=True)
class Asking:
    """A question about adapters that lie on disk, and where its answer goes; it can be sent to a worker."""

    path: Path
    verb: str
    options: Mapping[str, Any]
    adapters: Sequence[Path]
    tasks: Sequence[Mapping[str, Any]]
    """The records of their tasks, one each."""
    about: str = ""
    """How progress calls it."""

    @property
    def lost(self) -> int:
        """How many of the adapters are not there, since their trainings diverged."""
        return sum(not path.exists() for path in self.adapters)


def answer(asking: Asking, tasks: Sequence[Task], on: Execution) -> Answer:
    """The answer that lies at the path, if it is to this very question; else computed, and written there.

    `tasks` are the adapters' own, one each. Numbers of the examples lie beside the answer, in a file of tensors.
    """
    from lora_lab.adapters.adapter import Adapter

    path, asked, adapters = asking.path, QUESTIONS[asking.verb], [Adapter.load(each) for each in asking.adapters]
    question, about = asked.made(asking.options), asked.about(tasks)
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


def ask_all(questions: Sequence[Asking], workers: Workers, on: Execution) -> dict[Path, str]:
    """Have the workers write every answer; path → why, of those questions that have none.

    `on.progress` gets hundredths of the questions.
    """
    done: dict[Path, float] = {}
    why: dict[Path, str] = {}

    def hear(asking: Asking, pieces: int, total: int) -> None:
        done[asking.path] = pieces / max(1, total)
        on.report(int(100 * sum(done.values())), 100 * len(questions))

    def keep(asking: Asking, answered: tuple[str | None, Sequence[Warning]]) -> None:
        failed, told = answered
        for warning in told:
            warnings.warn(warning, stacklevel=2)
        if failed is not None:
            why[asking.path] = failed
        hear(asking, 1, 1)

    workers.map(_Asker(workers.device, on.cache), questions, keep, hear)
    return why


@dataclass(frozen=True)
class _Asker:
    """Answers questions in a worker."""

    device: str
    cache: Path | None
    fingerprint: str = "ask"

    def __call__(self) -> Callable[[Asking], tuple[str | None, Sequence[Warning]]]:
        return partial(self._ask, {})

    def _ask(self, built: dict[str, Task], asking: Asking) -> tuple[str | None, Sequence[Warning]]:
        """Why there is no answer, and what there was to be told meanwhile."""
        from lora_lab import tasks

        keys = [fingerprint(spec) for spec in asking.tasks]
        for key, spec in zip(keys, asking.tasks, strict=True):
            if key not in built:
                built[key] = tasks.from_spec(spec)
        each = [built[key] for key in keys]
        on = Execution(device=self.device, cache=self.cache, progress=report)
        try:
            return None, telling(partial(answer, asking, each, on))[1]
        except LoraLabError as error:
            return str(error), ()


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
