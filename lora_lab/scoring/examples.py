"""Examples and their scores on the way: to workers, to journals, and by what they are known to be the same."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_lab import tasks
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import tensor_digest
from lora_lab.errors import LoraLabError, LoraLabWarning, MismatchError, OptionError
from lora_lab.files.trust import ANYWHERE, Reach
from lora_lab.scoring.journal import Journal
from lora_lab.tasks import digests
from lora_lab.tasks.task import Scores, Split, Task

_SCORING = 4
"""Of how the tasks of this package score, and of what `pack` gives: another number, and all is scored again."""


def examples_of(task: Task, split: str) -> list[Any]:
    """All that scores hang on besides the adapter, for run ids: task, base model, examples, and the code that scores.

    That of this package counts by its version of scoring, that of a task class of the user's own by what it does.
    """
    examples = tensor_digest([*task.split(split).inputs.values(), *task.digest])
    return [task.spec, task.base_digest, split, examples, _SCORING, digests.of_code(task)]


@dataclass(frozen=True)
class TaskSpec:
    """A task on its way to workers, as all that it is built from; made of a task, which was judged before."""

    record: Mapping[str, Any]
    reach: Reach = ANYWHERE

    @classmethod
    def of(cls, task: Task) -> TaskSpec:
        """OptionError for a task that its record does not give again, such as one of a class of the user's own."""
        try:
            again = tasks.from_spec(task.spec)
        except LoraLabError:
            again = None
        if type(again) is not type(task):
            kind = type(task).__name__
            raise OptionError(f"task {task.name} ({kind}) cannot be built again from its record, as workers have to")
        return cls(task.spec, task.reach)

    def task(self) -> Task:
        """The task, built again."""
        return tasks.from_spec(self.record, reach=self.reach)


@dataclass(frozen=True)
class Examples:
    """So many examples of a split (all for None), and a hash by which another machine knows that it has the same."""

    split: str
    count: int | None = None
    digest: str | None = None
    """Of the whole split; None is not compared."""
    logits: bool = False
    """Whether scores of them are to keep what the model said."""

    @classmethod
    def of(cls, task: Task, split: str, count: int | None = None) -> Examples:
        """Those of this machine."""
        return cls(split, count, tensor_digest(task.split(split).inputs.values()))

    def of_task(self, task: Task) -> Split:
        """The examples themselves; MismatchError where this machine has others."""
        whole = task.split(self.split)
        if self.digest not in (None, tensor_digest(whole.inputs.values())):
            raise MismatchError(f"task {task.name}: a worker's machine has other data in the {self.split} split")
        return whole.subset(self.count)


def detached(adapter: Adapter) -> Adapter:
    """The adapter without what was computed of it, each tensor with a storage of its own: small to send."""
    return replace(adapter, tensors={key: tensor.detach().cpu().clone() for key, tensor in adapter.tensors.items()})


def pack(scores: Scores) -> dict[str, Any]:
    """Scores as text, with their number: True and False as bits, numbers as float32 where that loses nothing."""
    columns = {name: _as_text(values) for name, values in scores.columns.items()}
    logits = {} if scores.logits is None else {"logits": _as_text(scores.logits.reshape(-1))}
    told = {} if scores.told is None else {"told": dict(scores.told)}
    return {"examples": len(scores), "columns": columns, **logits, **told}


def unpack(text: Mapping[str, Any]) -> Scores:
    """The inverse of `pack`; ValueError, KeyError, TypeError or AttributeError where it is not what `pack` gives."""
    n = text["examples"]
    columns = {str(name): _from_text(given, n) for name, given in dict(text["columns"]).items()}
    if not columns:
        raise ValueError("no columns")
    for name, values in columns.items():
        if len(values) != n:
            raise ValueError(f"{len(values)} values of {name} of {n} examples")
    logits = None
    if "logits" in text:
        logits = _from_text(text["logits"], 0).astype(np.float32).reshape(n, -1)
    told = {str(name): float(value) for name, value in text["told"].items()} if "told" in text else None
    return Scores(columns, logits, told)


def remembered(journal: Journal | None, key: str, examples: int | None = None) -> Scores | None:
    """Scores that a journal holds; None where they are not there, or are not those of so many examples."""
    if journal is None or key not in journal:
        return None
    try:
        scores = unpack(journal[key])
        if examples is not None and len(scores) != examples:
            raise ValueError(f"{len(scores)} examples, not {examples}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        text = f"{journal.path}: scores that do not fit ({error}) are computed again"
        warnings.warn(text, LoraLabWarning, stacklevel=3)
        return None
    return scores


_TYPES: dict[str, Any] = {"float32": np.dtype("<f4"), "float64": np.dtype("<f8"), "int64": np.dtype("<i8")}
_BITS = "bits"


def _as_text(values: npt.NDArray[Any]) -> list[str]:
    """Type and bytes of a column."""
    if values.dtype == np.bool_:
        return [_BITS, base64.b64encode(np.packbits(values).tobytes()).decode()]
    kind = "int64" if np.issubdtype(values.dtype, np.integer) else "float64"
    if kind == "float64" and np.array_equal(values, values.astype(np.float32), equal_nan=True):
        kind = "float32"
    return [kind, base64.b64encode(values.astype(_TYPES[kind]).tobytes()).decode()]


def _from_text(given: Any, n: int) -> npt.NDArray[Any]:
    kind, text = given
    data = base64.b64decode(text)
    if kind == _BITS:
        if len(data) != -(-n // 8):
            raise ValueError(f"{len(data)} bytes of True and False for {n} examples")
        return np.unpackbits(np.frombuffer(data, np.uint8), count=n).astype(np.bool_)
    values: npt.NDArray[Any] = np.frombuffer(data, _TYPES[kind])
    return values.astype(np.int64 if kind == "int64" else np.float64)
