"""Tasks that users write in Python: a model, data, and a function that scores a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lora_lab.adapters.describe import tensor_digest
from lora_lab.errors import DivergedError, LoraLabError, OptionError, TaskError, TunerError, shorten, unknown
from lora_lab.hub import base_model
from lora_lab.options import checked
from lora_lab.tasks import digests
from lora_lab.tasks import task as tasks
from lora_lab.tasks.python.python_file import line_of
from lora_lab.tasks.scores.metrics import METRICS, Metric, mean_of
from lora_lab.tasks.task import Scores, Split

INDEX = "index"
"""In every batch, the places of its examples in their split: for texts, and whatever else is no tensor."""

_SETTINGS = ("batch_size", "target_modules", "learning_rate", "train_batch_size", "steps", "rank")
_STEADY = 1e-6
"""Relative difference up to which two scorings of one batch are the same."""


class Task(tasks.Task):
    """A task of one's own: `score(model, batch)` says how good the model is on each example of a batch.

    `model` is a folder or hub id, or a function that gives a fresh module, or a module (of which copies are used).
    `data` gives each of the splits train, validation and test as name → tensor or array with the example as first
    dimension, or is a function of the split's name that does; splits that are never asked for may be missing. `score`
    gives name → one number (or True or False) an example; it sees the model in evaluation mode, without gradients, and
    the batch with `index`, the places of its examples. Training calls `model(**batch).loss`, without `index`.

    `metrics` are names of METRICS, or of columns (of which the mean is taken), or name → Metric, the main one first; by
    default all columns. `settings` are batch_size (of scoring), and the defaults of training: target_modules,
    learning_rate, train_batch_size, steps, rank. OptionError and TaskError say what does not fit.
    """

    classifies = False  # nothing is known of labels

    @checked
    def __init__(
        self,
        *,
        model: str | nn.Module | Callable[..., Any],
        data: Mapping[str, Any] | Callable[..., Any],
        score: Callable[..., Any],
        metrics: Sequence[str] | Mapping[str, Metric] = (),
        name: str = "own",
        **settings: Any,
    ) -> None:
        self.name, self.about = name, "a task of your own"
        self.model, self.data, self.score_batch = model, data, score  # public, so that their code counts
        self.base = model if isinstance(model, str) else name
        self.labels = 0
        self._metrics = dict(metrics) if isinstance(metrics, Mapping) else dict.fromkeys(metrics)
        self._steady = False
        for key, value in settings.items():
            if key not in _SETTINGS:
                raise unknown("setting of a task", key, _SETTINGS)
            setattr(self, key, value)

    @property
    def metrics(self) -> Sequence[str]:  # type: ignore[override]
        """Names of the metrics, the main one first; where none were named, the columns, known after a scoring."""
        return list(self._metrics)

    def metric(self, name: str) -> Metric:
        """One of them: given, of METRICS, or the mean of a column."""
        given = self._metrics.get(name)
        if given is not None:
            return given
        own = {"correct": METRICS["accuracy"]}.get(name)
        return own or (METRICS[name] if name in METRICS else mean_of(name))

    @property
    def record(self) -> dict[str, Any]:
        """What tells it from others; a task of this kind is never built from a record."""
        return {"kind": PYTHON, "name": self.name, **({"file": self.file} if self.file else {}), "hash": self._digest}

    @cached_property
    def _digest(self) -> str:
        data = self.data if isinstance(self.data, Mapping) else {}
        tensors = [tensor for split in data.values() for tensor in _tensors(split, "its data").values()]
        return f"{digests.of_code(self)[:16]}-{tensor_digest(tensors)[:16]}"

    @cached_property
    def base_digest(self) -> str:
        """Of a folder, a hash of its files; of a model from code, of all its parameters."""
        if isinstance(self.model, str):
            return digests.of_base(self.model)
        return tensor_digest(self.build_model().state_dict().values())

    def build_model(self) -> nn.Module:
        """The model, frozen, in evaluation mode."""
        if isinstance(self.model, str):
            return base_model(self.model)
        with self._telling("its model"):
            model = copy.deepcopy(self.model) if isinstance(self.model, nn.Module) else self.model()
        if not isinstance(model, nn.Module):
            raise TaskError(f"task {self.name}: its model is a {type(model).__name__}; a torch module is needed")
        return model.requires_grad_(False).eval()

    def training_split(self) -> Split:
        """The data as the model takes them."""
        return Split({name: tensor for name, tensor in self.split("train").inputs.items() if name != INDEX})

    def check_trainable(self, model: nn.Module) -> None:
        """TaskError where the model gives no loss of an example, which training goes by."""
        device = next(model.parameters()).device
        batch = {name: tensor[:1].to(device) for name, tensor in self.training_split().inputs.items()}
        with self._telling("training calls model(**batch).loss"), torch.no_grad():
            said = model(**batch)
        if isinstance(said, tuple):  # as Hugging Face's models give it without return_dict
            return
        if (said.get("loss") if isinstance(said, Mapping) else getattr(said, "loss", None)) is None:
            raise TaskError(
                f"task {self.name}: training goes by model(**batch).loss, and its model gives none of {shorten(batch)}"
                "; a model whose forward pass returns a loss is needed, or a training loop of your own"
            )

    def _load(self, split: str) -> Split:
        if isinstance(self.data, Mapping):
            given = self.data.get(split)
            if given is None:
                raise TaskError(f"task {self.name}: no {split} split; its data has {shorten(self.data)}")
        else:
            with self._telling(f"its {split} split"):
                given = self.data(split)
        inputs = _tensors(given, f"task {self.name}: its {split} split")
        sizes = {name: len(tensor) for name, tensor in inputs.items()}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise TaskError(f"task {self.name}: its {split} split has examples of different number: {told}")
        return Split({**inputs, INDEX: torch.arange(next(iter(sizes.values())))})

    def _check_labels(self, name: str, split: Split) -> None:
        """Nothing: what labels are, `score` knows."""

    def judge(self, model: nn.Module, batch: Mapping[str, Tensor], *, keep_logits: bool = False) -> Scores:
        """Scores of one batch; the first one is scored twice, since what changes between calls cannot be compared."""
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        scores = self._asked(model, batch)
        if not self._steady:
            again = self._asked(model, batch)
            if again.columns.keys() != scores.columns.keys():
                both = " and then ".join(shorten(each.columns) for each in (scores, again))
                raise TaskError(f"task {self.name}: its score gave {both} of one batch; the same columns are needed")
            for name, values in scores.columns.items():
                if not np.allclose(values, again[name], rtol=_STEADY, atol=0, equal_nan=True):
                    raise TaskError(
                        f"task {self.name}: two scorings of one batch differ in {name!r}; its score must draw nothing"
                    )
            self._steady = True
        return scores

    def columns(self, scores: Scores, split: Split) -> Mapping[str, npt.NDArray[Any]]:
        """Those that `score` gives; where no metric was named, all of them are."""
        self._metrics = self._metrics or dict.fromkeys(scores.columns)
        return scores.columns

    def _asked(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Scores:
        with self._telling("its score"):
            given = self.score_batch(model, batch)
        if not isinstance(given, Mapping) or not given:
            what = f"an empty {type(given).__name__}" if isinstance(given, Mapping) else f"a {type(given).__name__}"
            raise TaskError(f"task {self.name}: its score gave {what}; name → one number an example is needed")
        count = len(batch[INDEX])
        return Scores({str(name): self._column(str(name), values, count) for name, values in given.items()})

    def _column(self, name: str, values: Any, count: int) -> npt.NDArray[Any]:
        what = f"task {self.name}: its score gave {name!r}"
        array = values.detach().float().cpu().numpy() if _is_float(values) else np.asarray(values)
        if array.dtype != np.bool_:
            try:
                array = array.astype(np.float64)
            except (TypeError, ValueError) as error:
                raise TaskError(f"{what} as {array.dtype}; numbers are needed") from error
        if array.shape != (count,):
            shape = f"the shape {list(array.shape)}" if array.shape else "a single number"
            raise TaskError(f"{what} as {shape} for {count} examples; one number an example is needed")
        if not np.isfinite(array).all():
            raise DivergedError(f"{what} with {int((~np.isfinite(array)).sum())} values that are no finite numbers")
        return array

    def pass_through(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """The passes that a scoring makes."""
        self._asked(model, batch)

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """TunerError: what such a task gives has no gradient."""
        raise TunerError(f"task {self.name}: written in Python, so that nothing is known of its logits or gradients")

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """TaskError with the user's own line where their code raises."""
        try:
            yield
        except LoraLabError:
            raise
        except Exception as error:
            raise TaskError(f"task {self.name}: {what}: {line_of(error)}") from error


PYTHON = "python"
"""The kind that records of such adapters have."""


def _is_float(values: Any) -> bool:
    return isinstance(values, Tensor) and values.is_floating_point()


def _tensors(given: Any, where: str) -> dict[str, Tensor]:
    """Name → tensor of a split; TaskError naming what is none."""
    if not isinstance(given, Mapping) or not given:
        raise TaskError(f"{where} is a {type(given).__name__}; name → tensor is needed")
    inputs = {}
    for name, values in given.items():
        try:
            tensor = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
            # of numbers in lists, the type that torch gives them
            inputs[str(name)] = tensor.float() if isinstance(values, list) and tensor.is_floating_point() else tensor
        except (TypeError, ValueError) as error:
            raise TaskError(
                f"{where}: {name} is no tensor ({type(values).__name__}); texts are looked up by the batch's {INDEX!r}"
            ) from error
        if not inputs[str(name)].ndim:
            raise TaskError(f"{where}: {name} is a single number; the example is the first dimension")
    if INDEX in inputs:
        raise OptionError(f"{where}: {INDEX!r} is the name of the examples' places; another one is needed")
    return inputs
