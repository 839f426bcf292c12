"""A task: a base model, data in three splits, and what counts as right.

Adapters record the task that they were trained on, so that later commands need no flag.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lora_lab.errors import FileError, OptionError, TaskError, unknown

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Scores:
    """How a model did on each example of a split, in the split's order."""

    loss: npt.NDArray[np.float64]
    correct: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def accuracy(self) -> float:
        """Share of correct examples."""
        return float(self.correct.mean())

    @property
    def mean_loss(self) -> float:
        """Mean cross-entropy in nats."""
        return float(self.loss.mean())


@dataclass(frozen=True)
class Split:
    """Examples as tensors with the example as first dimension, `labels` among them."""

    inputs: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.inputs["labels"])

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """Consecutive batches."""
        return [
            {name: tensor[start : start + size] for name, tensor in self.inputs.items()}
            for start in range(0, len(self), size)
        ]


class Task(ABC):
    """Classification with one label an example; kinds of tasks are subclasses, one a file."""

    name: str
    about: str
    base: str
    """Name of the base model, which adapters record."""
    labels: int
    batch_size = 250
    """Examples per batch when scoring."""
    threads: int | None = None
    """Threads that training uses best; None leaves torch's own choice."""

    # Defaults for training; every one can be set on the command line.
    target_modules: str | list[str] = "all-linear"
    learning_rate = 1e-3
    train_batch_size = 16
    steps = 300
    rank = 8

    @property
    @abstractmethod
    def record(self) -> dict[str, Any]:
        """All that `from_record` needs to build the task again, in JSON types."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """A fresh base model, frozen, in evaluation mode; its forward takes a batch and returns `.logits`."""

    @abstractmethod
    def _load(self, split: str) -> Split:
        """The examples of a split."""

    def split(self, name: str) -> Split:
        """A split by name, its labels checked."""
        if name not in SPLITS:
            raise unknown("split", name, SPLITS)
        if name not in self._splits:
            split = self._load(name)
            if not len(split):
                raise TaskError(f"task {self.name}: its {name} split is empty")
            wrong = [int(y) for y in split.inputs["labels"] if not 0 <= int(y) < self.labels]
            if wrong:
                raise TaskError(
                    f"task {self.name}: label {wrong[0]} in its {name} split ({len(wrong)} such) is out of range; "
                    f"labels go from 0 to {self.labels - 1}"
                )
            self._splits[name] = split
        return self._splits[name]

    @cached_property
    def _splits(self) -> dict[str, Split]:
        return {}

    def batches(self, split: str, device: torch.device) -> list[dict[str, Tensor]]:
        """The batches of a split, placed on the device once."""
        if (split, device) not in self._placed:
            self._placed[split, device] = [
                {name: tensor.to(device) for name, tensor in batch.items()}
                for batch in self.split(split).batches(self.batch_size)
            ]
        return self._placed[split, device]

    @cached_property
    def _placed(self) -> dict[tuple[str, torch.device], list[dict[str, Tensor]]]:
        return {}

    @torch.inference_mode()
    def score(self, model: nn.Module, split: str = "test") -> Scores:
        """Loss and correctness of every example of the split; the model is put into evaluation mode."""
        model.eval()
        device = next(model.parameters()).device
        losses, correct = [], []
        for batch in self.batches(split, device):
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            logits = model(**inputs).logits.float()
            losses.append(nn.functional.cross_entropy(logits, batch["labels"], reduction="none"))
            correct.append(logits.argmax(-1) == batch["labels"])
        loss = torch.cat(losses).double().cpu().numpy()
        if not np.isfinite(loss).all():
            raise TaskError(
                f"task {self.name}: the model's loss is not finite on {int((~np.isfinite(loss)).sum())} examples"
            )
        return Scores(loss, torch.cat(correct).cpu().numpy())


def from_name(name: str) -> Task:
    """A built-in task by its name, or the task that a TOML file describes."""
    if name.endswith(".toml"):
        return from_file(Path(name))
    if name not in TASKS:
        if Path(name).is_file():
            return from_file(Path(name))
        raise unknown("task", name, TASKS)
    return TASKS[name]()


def from_file(path: Path) -> Task:
    """The task described in a TOML file (`lora-lab tasks --example` prints one)."""
    import tomllib

    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise FileError(f"{path}: no such task file") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FileError(f"{path}: not a TOML file ({error})") from error
    return from_record(content, base=path.parent, where=str(path))


def from_record(record: Mapping[str, Any], *, base: Path | None = None, where: str = "the record") -> Task:
    """The task that an adapter's record or a task file describes; relative paths are taken from `base`."""
    if "name" in record and "kind" not in record:
        return from_name(str(record["name"]))
    kind = record.get("kind")
    if kind is None:
        raise OptionError(f"{where}: no kind of task; there are: {', '.join(KINDS)}")
    if kind not in KINDS:
        raise unknown(f"kind of task in {where}:", str(kind), KINDS)
    return KINDS[kind](record, base or Path(), where)


def resolve_device(name: str | None = None) -> torch.device:
    """The device by name; without one a GPU where there is one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device {name!r} is not to be had here: {str(error).partition(chr(10))[0]}") from error
    return device


def _digits(labelling: str) -> Callable[[], Task]:
    def build() -> Task:
        from lora_lab.digits import Digits

        return Digits(labelling)

    return build


def _text_classification(record: Mapping[str, Any], base: Path, where: str) -> Task:
    from lora_lab.text import TextClassification

    return TextClassification.from_record(record, base, where)


TASKS: dict[str, Callable[[], Task]] = {
    "digits/relabel": _digits("relabel"),
    "digits/rot90": _digits("rot90"),
    "digits/invert": _digits("invert"),
    "digits/rot4": _digits("rot4"),
    "digits/identity": _digits("identity"),
    "digits/mod3": _digits("mod3"),
    "digits/mod5": _digits("mod5"),
    "digits/div2": _digits("div2"),
}
"""Built-in tasks, each on the base model that is shipped in the package."""

KINDS: dict[str, Callable[[Mapping[str, Any], Path, str], Task]] = {
    "text-classification": _text_classification,
}
"""Kinds of tasks that a file can describe."""


def example(kind: str) -> str:
    """A commented task file of this kind."""
    if kind not in KINDS:
        raise unknown("kind of task", kind, KINDS)
    from lora_lab.text import EXAMPLE

    return EXAMPLE


def iterate(tasks: Mapping[str, Callable[[], Task]] = TASKS) -> Iterator[Task]:
    """Every built-in task."""
    for build in tasks.values():
        yield build()
