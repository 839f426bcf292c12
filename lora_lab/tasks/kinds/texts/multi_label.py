"""Any number of labels a text: a model with one yes or no for each of them, as a task file describes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Gt, Lt
from torch import Tensor, nn

from lora_lab.errors import OptionError, TaskError
from lora_lab.tasks.kinds.heads import CERTAIN, logistic
from lora_lab.tasks.kinds.texts.listed import ListedTask
from lora_lab.tasks.kinds.texts.pooled import POOLED, PooledKeys, PooledText
from lora_lab.tasks.scores.metrics import METRICS, Metric, averaged
from lora_lab.tasks.settings import COMMON, Column
from lora_lab.tasks.splits import by_length
from lora_lab.tasks.tables import number_of
from lora_lab.tasks.task import Scores, Split, Targets

EXAMPLE = (
    """\
# A task of your own: lora-lab train --task this-file.toml
kind = "multi-label"

base = "path/to/model"        # folder or hub id; AutoModelForSequenceClassification must be able to load it
data = "posts.jsonl"          # csv, json, jsonl, parquet, a folder, or a dataset on the hub; or a file a split:
# data = {train = "train.jsonl", validation = "dev.jsonl", test = "test.jsonl"}
text = "text"                 # column with the text
label = "topics"              # column with the list of a text's labels (names, or numbers from 0), or a list of columns
#                             # that hold 0 or 1: label = ["toxic", "insult", "threat"]
# text_pair = "reply"         # second text column
# labels = ["sport", "news"]  # names in the order of the model's outputs; by default sorted
# threshold = 0.5             # a label is said where its probability is above this
"""
    + POOLED.format(fit="logistic regression, one for each label")
    + COMMON
)


Chance = Annotated[float, Gt(0), Lt(1), "a number between 0 and 1"]


@dataclass(frozen=True, kw_only=True)
class Keys(PooledKeys):
    """The keys of a multi-label file."""

    kind: str = "multi-label"
    label: Column | list[str]
    labels: list[str] | None = None
    threshold: Chance = 0.5

    columns: ClassVar[tuple[str, ...]] = ("text", "text_pair", "label")

    def check(self, where: str) -> None:
        """OptionError for values that do not go together."""
        super().check(where)
        several = self.labels if isinstance(self.label, str) else self.label
        if several is not None and len(set(several)) < max(2, len(several)):
            key = "labels" if isinstance(self.label, str) else "label"
            raise OptionError(f"{where}: {key} is {several}; different names, two or more, are needed")
        if self.labels and not isinstance(self.label, str):
            raise OptionError(f"{where}: label names columns, so that labels says nothing; leave it out")


_ABOUT = {
    "loss": "binary cross-entropy, the mean over labels and examples",
    "brier": "Brier score, the mean of (p − y)² over labels and examples, 0 to 1",
}
"""What metrics are here, where that is not what they are elsewhere."""


class MultiLabel(PooledText, ListedTask):
    """A yes or no for every label; the loss of a text is its binary cross-entropy, the mean over the labels."""

    kind = "multi-label"
    Keys = Keys
    listed = "label"
    instead = ", or label = the names of columns that hold 0 or 1"
    problem = "multi_label_classification"
    classifies = False
    metrics = ("micro_f1", "macro_f1", "subset_accuracy", "loss", "brier")

    @property
    def labels(self) -> int:  # type: ignore[override]
        """Number of labels."""
        return len(self.names)

    @cached_property
    def names(self) -> list[str]:
        """Names of the labels in the order of the outputs: of the keys, the columns, the dataset or the model."""
        own = self.settings.label
        return super().names if isinstance(own, str) else list(own)

    def metric(self, name: str) -> Metric:
        """One of `metrics`."""
        if name in METRICS:
            return replace(METRICS[name], about=_ABOUT.get(name, METRICS[name].about))
        pairs = [[f"said {label}", f"target {label}"] for label in self.names]
        return averaged(METRICS["f1"], pairs, f"mean over the {self.labels} labels of each one's F1")

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy, the mean over the labels."""
        return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)

    @property
    def _limit(self) -> float:
        """The logit of the threshold."""
        return math.log(self.settings.threshold / (1 - self.settings.threshold))

    def _margins(self, logits: Tensor, labels: Tensor) -> Tensor:
        """How far a text is from a wrong label: the least of its logits' distances to the threshold, right ones > 0."""
        return ((2 * labels - 1) * (logits - self._limit)).amin(-1)

    def judge_logits(self, logits: Tensor, batch: Mapping[str, Tensor], *, keep_logits: bool = False) -> Scores:
        """Loss, whether all labels are right, counts of right and wrong ones, and each label as said and as it is."""
        logits, labels = logits.float(), batch["labels"]
        said, is_so = (logits > self._limit).cpu().numpy(), (labels > 0.5).cpu().numpy()
        columns: dict[str, npt.NDArray[Any]] = {
            "loss": self.losses(logits, labels).double().cpu().numpy(),
            "correct": (said == is_so).all(-1),
            "margin": self._margins(logits, labels).double().cpu().numpy(),
            "brier": (logits.double().sigmoid() - labels).square().mean(-1).float().double().cpu().numpy(),
            "hits": (said & is_so).sum(-1),
            "false": (said & ~is_so).sum(-1),
            "missed": (~said & is_so).sum(-1),
        }
        for i, label in enumerate(self.names):
            columns |= {f"said {label}": said[:, i], f"target {label}": is_so[:, i]}
        return Scores(columns, logits.cpu().numpy() if keep_logits else None)

    def targets_of(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Targets:
        """Loss and margin of every text."""
        logits, labels = logits.float(), batch["labels"]
        loss, margin = (values[:, None] for values in (self.losses(logits, labels), self._margins(logits, labels)))
        return Targets(loss, margin, torch.ones_like(loss, dtype=torch.bool))

    def choices(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """No and yes of every label, [texts · labels, 2]: the softmax over (0, z) is the sigmoid of z."""
        yes = logits.float().flatten()
        return torch.stack([torch.zeros_like(yes), yes], -1)

    def check_split(self, name: str) -> None:
        """Whether its columns are there, and its labels known."""
        super().check_split(name)
        self._labels(self._whole(name))

    def _check_labels(self, name: str, split: Split) -> None:
        """Nothing: labels are checked as they are read."""

    def _load(self, split: str) -> Split:
        table = self.table(split)
        return by_length(Split({**self._encoded(table), "labels": self._labels(table)}))

    def _labels(self, table: Mapping[str, Sequence[Any]]) -> Tensor:
        """0 or 1 for every label, [texts, labels]."""
        column = self.settings.label
        if isinstance(column, str):
            found = np.zeros((len(table[column]), self.labels), dtype=np.float32)
            for row, cell in enumerate(table[column]):
                for each in self._cell(cell, row):
                    found[row, self._place(each, row)] = 1
            return torch.from_numpy(found)
        return torch.tensor([[self._bit(v, name, i) for i, v in enumerate(table[name])] for name in column]).T

    def _bit(self, value: object, column: str, row: int) -> float:
        number = float(value) if isinstance(value, bool) else number_of(self, value, column, row)
        if number not in (0, 1):
            told = self.reach.quote(value)
            raise TaskError(f"task {self.name}: {told} in {column!r} (row {row} of a split) is neither 0 nor 1")
        return number

    def _fit(self, features: npt.NDArray[np.float64], answers: npt.NDArray[Any], labels: int) -> tuple[Tensor, Tensor]:
        """Logistic regression of every label by itself; one that always or never holds does so whatever the text is."""
        weight, bias = torch.zeros(labels, features.shape[1]), torch.zeros(labels)
        for i, answer in enumerate(answers.T):
            if 0 < answer.mean() < 1:
                w, b = logistic(features, answer.astype(np.int64), 2)
                weight[i], bias[i] = w[1] - w[0], b[1] - b[0]  # log p/(1 − p) is the difference of the two logits
            else:
                bias[i] = CERTAIN if answer[0] else -CERTAIN
        return weight, bias
