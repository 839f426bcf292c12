"""What the functions of this room are given, and how it becomes adapters, tasks and dataclasses of options."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from lora_lab import tasks
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.naming import named
from lora_lab.errors import OptionError, unknown
from lora_lab.progress import bar
from lora_lab.results.result import Result
from lora_lab.scoring.execution import Execution
from lora_lab.tasks.choosing import task_of, tasks_of
from lora_lab.tasks.task import Task

if TYPE_CHECKING:
    from lora_lab.analysis.question import Question

Path_ = str | os.PathLike[str]
Adapters = Annotated[Adapter | Path_ | Sequence[Adapter | Path_], "an adapter, what `load` reads, or a list of them"]
OneAdapter = Annotated[Adapter | Path_, "an adapter or what `load` reads"]
OneTask = Annotated[Task | Path_, "a task, the name of one or a task file"]
TaskLike = Annotated[Task | Path_ | None, "a task, the name of one or a task file"]
TaskEach = Annotated[
    Task | Path_ | Sequence[Task | Path_] | None, "a task, the name of one, a task file, or a list of one an adapter"
]
Results = Annotated[Result | Path_ | Sequence[Result | Path_], "a result, its file, or a list of them"]
Made = TypeVar("Made")


def adapters_of(given: Adapters) -> list[Adapter]:
    """The adapters, those read that are files."""
    several = [given] if isinstance(given, Adapter | str | os.PathLike) else given
    return [adapter if isinstance(adapter, Adapter) else Adapter.load(adapter) for adapter in several]


def paths_of(given: Adapters) -> list[Path]:
    """The adapters that are files, which no output may replace."""
    several = [given] if isinstance(given, Adapter | str | os.PathLike) else given
    return [Path(each) for each in several if not isinstance(each, Adapter)]


def results_of(given: Results) -> list[Result]:
    """The results, those read that are files."""
    several = [given] if isinstance(given, Result | str | os.PathLike) else given
    return [result if isinstance(result, Result) else Result.load(Path(result)) for result in several]


def task_of_given(given: OneTask) -> Task:
    """The task itself, or the one of this name or file."""
    return given if isinstance(given, Task) else tasks.from_name(os.fspath(given))


def one_task_of(adapters: Sequence[Adapter], given: TaskLike, trust_record: bool) -> Task:
    """The task that is given, or the one that the adapters record."""
    return task_of(*adapters, trust_record=trust_record) if given is None else task_of_given(given)


def each_task_of(adapters: Sequence[Adapter], given: TaskEach, trust_record: bool) -> list[Task]:
    """A task for each adapter: its own, or the one for all, or one given for each of them."""
    if given is None:
        return tasks_of(adapters, trust_record=trust_record)
    several = (
        [task_of_given(given)]
        if isinstance(given, Task | str | os.PathLike)
        else [task_of_given(each) for each in given]
    )
    if len(several) not in (1, len(adapters)):
        raise OptionError(f"{len(adapters)} adapters and {len(several)} tasks; one for all, or one an adapter")
    return several * len(adapters) if len(several) == 1 else several


def answered(
    question: Question,
    adapters: Adapters,
    task: Any,
    trust_record: bool,
    telling: contextlib.AbstractContextManager[Execution],
    of: Callable[[Sequence[Adapter], Any, bool], Any] | None = None,
    **more: Any,
) -> Result:
    """The answer to a question about these adapters, on the task that they share, or on what `of` makes of theirs."""
    loaded = adapters_of(adapters)
    if question.of_each and len({adapter.label for adapter in loaded}) < len(loaded):
        loaded = named(loaded)  # what tells files of one name apart
    question.check(loaded)
    with telling as where:
        return question.run(loaded, (of or one_task_of)(loaded, task, trust_record), where, **more)


@contextlib.contextmanager
def shown(on: Execution | None, what: str, progress: bool) -> Iterator[Execution]:
    """The execution, with a bar unless it tells somebody already or none is wanted."""
    on = on or Execution()
    if not progress or on.progress:
        yield on
        return
    with bar(what) as report:
        yield dataclasses.replace(on, progress=report)


def kept_by(
    adapter: Adapter,
    pattern: str,
    task: Callable[[], Task],
    shown: contextlib.AbstractContextManager[Execution],
    options: Mapping[str, Any],
) -> list[str]:
    """The modules that a pattern keeps; values of a task are computed for those alone that are by them."""
    from lora_lab.analysis.questions import Shapley
    from lora_lab.pruning.patterns import choice_of, keep

    question = from_options(Shapley, {"split": "validation", **options})
    choice = choice_of(adapter, by=question.players, seed=question.seed)

    def values(estimator: str | None) -> dict[str, float]:
        with shown as where:
            by = dataclasses.replace(question, estimator=estimator or question.estimator)
            return by.values(adapter, task(), where)

    return keep(dataclasses.replace(choice, values=values), pattern)


def from_options(cls: type[Made], options: Mapping[str, Any]) -> Made:
    """A dataclass from keywords, where a list, or one text alone, stands for a tuple; OptionError for another name."""
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    check_names(cls.__name__, options, list(defaults))
    return cls(
        **{name: _tupled(value) if isinstance(defaults[name], tuple) else value for name, value in options.items()}
    )


def _tupled(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def check_names(what: str, options: Mapping[str, Any], names: Sequence[str]) -> None:
    """OptionError for an option that is not among these names."""
    for name in options:
        if name not in names:
            raise unknown(f"option of {what}", name, names)


def keywords_of(function: Callable[..., Any]) -> list[str]:
    """The names of the keyword-only parameters."""
    parameters = signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
