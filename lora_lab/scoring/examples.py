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

_SCORING = 1
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
            again = tasks.from_record(task.spec)
        except LoraLabError:
            again = None
        if type(again) is not type(task):
            kind = type(task).__name__
            raise OptionError(f"task {task.name} ({kind}) cannot be built again from its record, as workers have to")
        return cls(task.spec, task.reach)

    def task(self) -> Task:
        """The task, built again."""
        return tasks.from_record(self.record, reach=self.reach)


@dataclass(frozen=True)
class Examples:
    """So many examples of a split (all for None), and a hash by which another machine knows that it has the same."""

    split: str
    count: int | None = None
    digest: str | None = None
    """Of the whole split; None is not compared."""

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
    """Scores as text, with their number; losses and margins were computed in float32, so nothing is lost."""
    text: dict[str, Any] = {"examples": len(scores), "loss": _floats(scores.loss), "margin": _floats(scores.margin)}
    if scores.correct.dtype == np.bool_:
        text["correct"] = base64.b64encode(np.packbits(scores.correct.astype(np.bool_)).tobytes()).decode()
    else:  # shares of tokens
        text["shares"] = base64.b64encode(scores.correct.astype("<f8").tobytes()).decode()
    if scores.logits is not None:
        text["logits"] = _floats(scores.logits)
    if scores.told is not None:
        text["told"] = dict(scores.told)
    return text


def unpack(text: Mapping[str, Any]) -> Scores:
    """The inverse of `pack`; ValueError, KeyError, TypeError or AttributeError where it is not what `pack` gives."""
    loss, margin = _from_text(text["loss"]), _from_text(text["margin"])
    n = len(loss)
    logits = None
    if "shares" in text:
        correct: npt.NDArray[Any] = np.frombuffer(base64.b64decode(text["shares"]), "<f8").astype(np.float64)
    else:
        bits = np.frombuffer(base64.b64decode(text["correct"]), np.uint8)
        if len(bits) != -(-n // 8):
            raise ValueError(f"{len(bits)} bytes of right and wrong for {n} losses")
        correct = np.unpackbits(bits, count=n).astype(np.bool_)
    if "logits" in text:
        logits = _from_text(text["logits"]).astype(np.float32).reshape(n, -1)
    if not text["examples"] == n == len(margin) == len(correct):
        raise ValueError(f"{n} losses, {len(margin)} margins, {len(correct)} answers of {text['examples']} examples")
    told = {str(name): float(value) for name, value in text["told"].items()} if "told" in text else None
    return Scores(loss, correct, margin, logits, told)


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


def _floats(values: npt.NDArray[Any]) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _from_text(text: str) -> npt.NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)
