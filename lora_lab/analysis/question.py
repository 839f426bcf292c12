"""A question about adapters on a task: a frozen dataclass whose fields are all that its answer hangs on.

The same object gives the checks, the record in the result, the run id, and (in the command line) the verb's options.
Loads neither torch nor numpy before something is asked.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lora_lab.errors import OptionError
from lora_lab.options import check_options
from lora_lab.scoring.execution import Execution

if TYPE_CHECKING:
    from lora_lab.adapters.adapter import Adapter
    from lora_lab.results.result import Result
    from lora_lab.tasks.task import Task


@dataclass(frozen=True)
class Question(ABC):
    """What is asked; `run` answers. Every subclass has a field `split`."""

    kind: ClassVar[str]
    """The kind of its results."""
    of_transforms: ClassVar[bool] = False
    """Whether it is about adapters that this package makes of the given ones: merges, prunings, points between them."""

    of_each: ClassVar[bool] = True
    """Whether its answer names every adapter; else it names the runs that they are checkpoints of."""

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def record(self) -> dict[str, Any]:
        """The fields in JSON types, by the names that they have in results, some of them in words."""
        return self.fields

    @property
    def fields(self) -> dict[str, Any]:
        """The fields in JSON types, exact: what is asked, for run ids."""
        from lora_lab.results.result import finite

        fields: dict[str, Any] = finite({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        return fields

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the answer hangs on."""
        return (getattr(self, "split"),)  # noqa: B009  (of every subclass)

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise what `run` would raise for these adapters, before anything is computed."""
        if not adapters:
            raise OptionError("no adapter was given")

    def run_id(self, adapters: Sequence[Adapter], task: Task) -> str:
        """What the answer hangs on, hashed: the adapters, the examples, the question, and code that may change."""
        from lora_lab.results.result import fingerprint
        from lora_lab.results.stats import INTERVALS
        from lora_lab.scoring.examples import examples_of
        from lora_lab.tasks import digests

        identities = [adapter.identity for adapter in adapters]
        examples = [examples_of(task, split) for split in self.splits]
        code = [digests.of_entries(), digests.of_transforms() if self.of_transforms else None]
        return fingerprint([self.kind, INTERVALS, identities, examples, self.fields, code])

    @abstractmethod
    def run(self, adapters: Sequence[Adapter], task: Task, on: Execution = Execution()) -> Result:
        """The answer, with the record of the question."""
