"""A task: a base model, data in three splits, and what counts as right.

Adapters record the task that they were trained on, so that later commands need no flag.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lora_lab.brief import Brief
from lora_lab.errors import DivergedError, OptionError, TaskError, unknown
from lora_lab.escape import visible
from lora_lab.files.trust import ANYWHERE
from lora_lab.tasks import digests
from lora_lab.tasks.scores import calibration
from lora_lab.tasks.scores.metrics import METRICS, Metric
from lora_lab.tasks.splits import SPLITS as SPLITS
from lora_lab.tasks.splits import Split as Split


@dataclass(frozen=True, repr=False)
class Scores:
    """How a model did on each example of a split, in the split's order: columns by name, one value an example.

    What this package's own tasks give is `loss` (cross-entropy in nats; of a text, the mean over its tokens), `correct`
    (whether it is; of a text, the share of its tokens that are predicted right) and `margin` (logit of the right answer
    minus the highest of the others); of a label an example also `confidence` and `brier` (calibration.py).
    """

    columns: Mapping[str, npt.NDArray[Any]]
    """Each [examples]: numbers, or True and False."""
    logits: npt.NDArray[np.float32] | None = None
    """[examples, labels], where they were asked for."""
    told: Mapping[str, float] | None = None
    """What there is to be known of the model besides, such as the error of a merge."""

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, *, keep_logits: bool = False) -> Scores:
        """Scores of a classifier's logits [examples, labels]."""
        columns = {
            "loss": nn.functional.cross_entropy(logits, labels, reduction="none").double().cpu().numpy(),
            "correct": (logits.argmax(-1) == labels).cpu().numpy(),
            "margin": margins(logits, labels).double().cpu().numpy(),
        }
        kept = logits.cpu().numpy() if keep_logits else None
        return cls({**columns, **calibration.chances(logits, labels)}, kept)

    @classmethod
    def judged(
        cls,
        loss: npt.NDArray[np.float64],
        correct: npt.NDArray[np.bool_] | npt.NDArray[np.float64],
        margin: npt.NDArray[np.float64],
        logits: npt.NDArray[np.float32] | None = None,
    ) -> Scores:
        """Scores of a task on which there is a right answer."""
        return cls({"loss": loss, "correct": correct, "margin": margin}, logits)

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """Scores of consecutive batches as one."""
        with_logits = all(part.logits is not None for part in parts)
        return cls(
            {name: np.concatenate([part[name] for part in parts]) for name in parts[0].columns},
            np.concatenate([part.logits for part in parts if part.logits is not None]) if with_logits else None,
        )

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """A column; TaskError where the task does not give it."""
        if name not in self.columns:
            raise TaskError(f"the task gives no {name!r} of its examples, only {', '.join(self.columns)}")
        return self.columns[name]

    def __repr__(self) -> str:
        means = ", ".join(f"{name} {values.mean():.4g}" for name, values in self.columns.items())
        return f"Scores({len(self)} examples: mean {means})"

    @property
    def loss(self) -> npt.NDArray[np.float64]:
        """See above."""
        return self["loss"]

    @property
    def correct(self) -> npt.NDArray[np.bool_] | npt.NDArray[np.float64]:
        """See above."""
        return self["correct"]

    @property
    def margin(self) -> npt.NDArray[np.float64]:
        """See above."""
        return self["margin"]

    @property
    def wrong(self) -> npt.NDArray[np.bool_] | npt.NDArray[np.float64]:
        """The opposite of `correct`: whether an example is wrong, or the share of its tokens that are."""
        if self.correct.dtype == np.bool_:
            return np.logical_not(self.correct)
        return 1.0 - self.correct.astype(np.float64)

    @property
    def accuracy(self) -> float:
        """Share of correct examples."""
        return float(self.correct.mean())

    @property
    def mean_loss(self) -> float:
        """Mean cross-entropy in nats."""
        return float(self.loss.mean())


def margins(logits: Tensor, answers: Tensor) -> Tensor:
    """Logit of the right answer minus the highest of the others, over the last axis."""
    right = logits.gather(-1, answers[..., None])[..., 0]
    return right - logits.scatter(-1, answers[..., None], -torch.inf).amax(-1)


@dataclass(frozen=True, repr=False)
class Targets(Brief):
    """What the scores of each example are means of, as tensors [examples, targets] that gradients go through."""

    loss: Tensor
    margin: Tensor | None
    """None of a task without one right answer, such as a number."""
    counted: Tensor
    """Which of them count; the others are padding."""

    def mean(self, values: Tensor) -> Tensor:
        """Mean over an example's targets, [examples]."""
        return mean_where(values, self.counted)


def mean_where(values: Tensor, counted: Tensor) -> Tensor:
    """Means of the values that count over the second axis, [n] in float64; 0 where none does."""
    return (values.double() * counted).sum(1) / counted.sum(1).clamp(min=1)


CLASSIFIED = ("accuracy", "loss", "brier", "ece")
"""Metrics of tasks that are judged by `Scores.of`."""


class Task(ABC):
    """A base model, data and what counts as right; kinds of tasks are subclasses, one a file."""

    name: str
    about: str
    base: str
    """Name of the base model, which adapters record."""
    labels: int
    batch_size = 250
    """Examples per batch when scoring."""
    dtype: str | None = None
    """The model's, known once it has been scored."""
    classifies = True
    """Whether an example has one label; a language model predicts every token instead."""
    counts_targets = False
    """Whether examples have different numbers of targets, over which the loss of a training step is a mean."""
    step_loss: Callable[..., Tensor] | None = None
    """(model's outputs, labels, targets of the step) → a training step's loss; None: the model's own."""
    trains_head = False
    """Whether the head is trained along with the adapter."""
    rows_are_examples = True
    """Whether the rows that a layer sees are the examples of a batch; not where options or prompts are rows, too."""
    writes = False
    """Whether the model predicts tokens of a text, and so has a loss on any text."""
    why_no_texts: str | None = "its model takes no texts alone"
    """Why the model says nothing of texts beside the task, if it does not."""
    why_not_shared: str | None = None
    """Why passes that differ in some layers can share none, where the way of scoring is the reason."""
    metrics: Sequence[str] = ("accuracy", "loss")
    """Names of METRICS (scores) that say how good a model is on the task, the main one first."""
    needs_logits = False
    """Whether some of them are made of what the model said, which scores keep only where it is asked for."""
    file: str | None = None
    """Of a task in a Python file: PATH.py:NAME, as the user wrote it."""
    threads: int | None = None
    """Threads that training uses best; None leaves torch's own choice."""

    reach = ANYWHERE
    """How far its keys may lead; narrower for a task that a file from elsewhere names."""

    # Defaults for training; every one can be set on the command line.
    target_modules: str | Sequence[str] = "all-linear"
    learning_rate = 1e-3
    train_batch_size = 16
    steps = 300
    rank = 8

    def __repr__(self) -> str:
        return visible(f"{type(self).__name__}({self.name}: {self.about})")

    @property
    @abstractmethod
    def record(self) -> dict[str, Any]:
        """All that `from_record` needs to build the task again, in JSON types."""

    @property
    def spec(self) -> dict[str, Any]:
        """The record with what is never written into an adapter's: for workers, and to tell runs apart."""
        return self.record

    @property
    def base_digest(self) -> str:
        """Changes when the base model does: of a folder, a hash of its files' contents; else the name."""
        return digests.of_base(self.base)

    @property
    def digest(self) -> Sequence[Tensor]:
        """What scores depend on besides the base, the record and the examples that are scored, such as a probe."""
        return ()

    @abstractmethod
    def build_model(self) -> nn.Module:
        """A fresh base model, frozen, in evaluation mode; its forward takes a batch and returns `.logits`."""

    def model_on(self, device: torch.device) -> nn.Module:
        """A fresh base model on a device, or where its own device map has put it."""
        model = self.build_model()
        return model if getattr(model, "hf_device_map", None) else model.to(device)

    def heads(self, model: nn.Module) -> list[str]:
        """Modules outside of the base within the task's model, which "all-linear" adapters leave alone."""
        base = getattr(model, getattr(model, "base_model_prefix", ""), None)
        if base is None:
            return []
        children = model.named_children()
        return [name for name, child in children if child is not base and any(True for _ in child.parameters())]

    def targets(self, asked: str | Sequence[str] | None) -> str | Sequence[str]:
        """Where adapters go: the modules asked for, or the task's own."""
        return self.target_modules if asked is None else asked

    def training_split(self) -> Split:
        """What a training step sees, `labels` as the model's own loss needs them."""
        return self.split("train")

    @abstractmethod
    def _load(self, split: str) -> Split:
        """The examples of a split."""

    def split(self, name: str) -> Split:
        """A split by name, its labels checked."""
        if name not in SPLITS:
            raise unknown("split", name, SPLITS)
        if name not in self._splits:
            with torch.inference_mode(False):  # whoever asks first: the tensors are kept, and trained on later
                split = self._load(name)
            if not len(split):
                raise TaskError(f"task {self.name}: its {name} split is empty")
            self._splits[name] = split
            try:
                self._check_labels(name, split)
            except TaskError:
                del self._splits[name]
                raise
        return self._splits[name]

    def check_split(self, name: str) -> None:
        """Raise what scoring a split would raise for its columns and labels; kinds need not read the rest for it."""
        self.split(name)

    def _check_labels(self, name: str, split: Split) -> None:
        """TaskError for a label that the model has no output for."""
        wrong = [int(y) for y in split.inputs["labels"] if not 0 <= int(y) < self.labels]
        if wrong:
            raise TaskError(
                f"task {self.name}: label {self.reach.quote(wrong[0])} in its {name} split ({len(wrong)} such) is out "
                f"of range; labels go from 0 to {self.labels - 1}"
            )

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
    def score(self, model: nn.Module, split: str = "test", *, keep_logits: bool = False) -> Scores:
        """Scores of every example of the split; the model is put into evaluation mode."""
        model.eval()
        device = next(model.parameters()).device
        batches = self.batches(split, device)
        scores = Scores.join([self.judge(model, batch, keep_logits=keep_logits) for batch in batches])
        self.require_finite(scores)
        return scores

    def require_finite(self, scores: Scores, where: str = "") -> None:
        """DivergedError where a column that a usual metric needs is not finite; `where` says of what, with a blank."""
        needed = dict.fromkeys(column for metric in self.usual.values() for column in metric.needs)
        for column in (each for each in needed if each in scores.columns):
            odd = int((~np.isfinite(scores[column])).sum())
            if odd:
                raise DivergedError(f"task {self.name}: the model's {column} is not finite on {odd} examples{where}")

    def columns(self, scores: Scores, split: Split) -> Mapping[str, npt.NDArray[Any]]:
        """All columns that the metrics are made of, of the examples that were scored.

        With `needs_logits`, those made of what the model said are there only where scores have kept it.
        """
        return scores.columns

    def metric(self, name: str) -> Metric:
        """One of `metrics`."""
        return METRICS[name]

    @property
    def usual(self) -> dict[str, Metric]:
        """Those of `metrics` that are told without being asked for."""
        metrics = {name: self.metric(name) for name in self.metrics}
        return {name: metric for name, metric in metrics.items() if not metric.on_request}

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """What the model says of a batch: [examples, labels], or of texts [examples, tokens, vocabulary]."""
        logits: Tensor = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        return logits

    def pass_through(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """A forward pass of a batch, for whoever looks at what layers are given and say."""
        self.logits(model, batch)

    def judge(self, model: nn.Module, batch: Mapping[str, Tensor], *, keep_logits: bool = False) -> Scores:
        """Scores of one batch, finite or not; the model must be in evaluation mode."""
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        return self.judge_logits(self.logits(model, batch), batch, keep_logits=keep_logits)

    def check_trainable(self, model: nn.Module) -> None:  # noqa: B027
        """Raise what training on the task would, before the first step; models of this package have a loss."""

    def judge_logits(self, logits: Tensor, batch: Mapping[str, Tensor], *, keep_logits: bool = False) -> Scores:
        """Scores of what was said of a batch."""
        return Scores.of(logits.float(), batch["labels"], keep_logits=keep_logits)

    def encode_texts(self, texts: Sequence[str], targets: Sequence[str] | None = None) -> Split:
        """Texts beside the task as the model takes them, shortest first, `labels` being the tokens to predict if any.

        `targets` are what is to be written of each, for models that need one. TaskError of a task whose model takes no
        such texts, which `why_no_texts` tells before.
        """
        raise TaskError(f"task {self.name}: {self.why_no_texts}; behaviour on texts cannot be measured")

    def text_logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """What the model says of such texts, [texts, predictions, choices]; TaskError as of `choices`."""
        choices = self.choices(model(**batch).logits, batch)
        return choices.reshape(len(batch["attention_mask"]), -1, choices.shape[-1])

    def targets_of(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Targets:
        """What `judge_logits` takes means of, for gradients: here one target an example."""
        labels = batch["labels"]
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        right = torch.ones_like(labels, dtype=torch.bool)
        return Targets(loss[:, None], margins(logits.float(), labels)[:, None], right[:, None])

    def choices(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits [predictions, choices] in float32 of which the softmax is what the model thinks likely.

        Here one prediction an example. TaskError of a task whose model gives no such chances.
        """
        return logits.float()


def resolve_device(name: str | None = None) -> torch.device:
    """The device by name; without one a GPU where there is one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"device {name!r} is not to be had here: {str(error).partition(chr(10))[0]}") from error
    return device
