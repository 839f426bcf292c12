"""Numbers for texts: a model with one output a number, as a task file describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_lab.errors import OptionError, TaskError
from lora_lab.extras import needs
from lora_lab.tasks.kinds.texts.pooled import POOLED, PooledKeys, PooledText
from lora_lab.tasks.scores.metrics import METRICS, Metric, averaged
from lora_lab.tasks.settings import COMMON, Column
from lora_lab.tasks.splits import by_length
from lora_lab.tasks.tables import number_of
from lora_lab.tasks.task import Scores, Split, Targets

EXAMPLE = (
    """\
# A task of your own: lora-lab train --task this-file.toml
kind = "regression"

base = "path/to/model"        # folder or hub id; AutoModelForSequenceClassification must be able to load it
data = "grades.csv"           # csv, json, jsonl, parquet, a folder, or a dataset on the hub; or a file a split:
# data = {train = "train.csv", validation = "dev.csv", test = "test.csv"}
text = "text"                 # column with the text
target = "grade"              # column with the number, or a list of several columns, one output each
# text_pair = "answer"        # second text column
# metric = "spearman"         # the main one: spearman, pearson, rmse, r2 or loss
# standardise = true          # train on (target − mean) / standard deviation of the training data; predictions and
#                             # metrics stay in the data's own unit, only the loss is of standardised numbers
"""
    + POOLED.format(fit="ridge regression")
    + COMMON
)

_METRICS = ("spearman", "pearson", "rmse", "r2")


@dataclass(frozen=True, kw_only=True)
class Keys(PooledKeys):
    """The keys of a regression file."""

    kind: str = "regression"
    target: Column | list[str]
    metric: Literal["spearman", "pearson", "rmse", "r2", "loss"] = "spearman"
    standardise: bool = False

    columns: ClassVar[tuple[str, ...]] = ("text", "text_pair", "target")

    @property
    def targets(self) -> list[str]:
        """The columns with numbers."""
        return [self.target] if isinstance(self.target, str) else self.target

    def check(self, where: str) -> None:
        """OptionError for values that do not go together."""
        super().check(where)
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise OptionError(f"{where}: target is {self.target}; different columns, at least one, are needed")


class Regression(PooledText):
    """One number a text or several; the loss of a text is its squared error, the mean over its numbers."""

    kind = "regression"
    Keys = Keys
    problem = "regression"
    classifies = False

    @property
    def labels(self) -> int:  # type: ignore[override]
        """How many numbers a text has."""
        return len(self.settings.targets)

    @property
    def metrics(self) -> Sequence[str]:  # type: ignore[override]
        """The one that the file names first."""
        return list(dict.fromkeys([self.settings.metric, *_METRICS, "loss"]))

    def metric(self, name: str) -> Metric:
        """One of `metrics`: of several numbers the mean over them, as scikit-learn's uniform average."""
        metric = METRICS[name]
        if name not in _METRICS:
            unit = "" if not self.settings.standardise else "variances of the training targets"
            return replace(metric, about="mean squared error, as it is trained", unit=unit)
        if self.labels == 1:
            return metric
        pairs = [[f"prediction {column}", f"target {column}"] for column in self.settings.targets]
        return averaged(metric, pairs, f"{metric.about}, the mean over {', '.join(self.settings.targets)}")

    @cached_property
    def scale(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the training targets, each [labels]; 0 and 1 where they stay as they are."""
        if not self.settings.standardise:
            return torch.zeros(self.labels), torch.ones(self.labels)
        numbers = self._numbers(self.table("train"))
        mean, spread = numbers.mean(0), numbers.std(0, correction=0)
        for column, size in zip(self.settings.targets, spread.tolist(), strict=True):
            if not size > 0:
                raise TaskError(
                    f"task {self.name}: all {len(numbers)} training targets in {column!r} are one number, which cannot "
                    "be standardised"
                )
        return mean, spread

    @property
    def digest(self) -> Sequence[Tensor]:
        """With the scale, which is of other data than is scored."""
        return [*super().digest, *(self.scale if self.settings.standardise else ())]

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Squared error, the mean over a text's numbers."""
        return (logits - labels).square().mean(-1)

    def judge_logits(self, logits: Tensor, batch: Mapping[str, Tensor], *, keep_logits: bool = False) -> Scores:
        """Loss, and each number as it was predicted and as it is, in the data's own unit."""
        logits, labels = logits.float(), batch["labels"]
        mean, spread = (each.double().to(logits.device) for each in self.scale)
        own = [(values.double() * spread + mean).cpu().numpy() for values in (logits, labels)]
        columns: dict[str, npt.NDArray[Any]] = {"loss": self.losses(logits, labels).double().cpu().numpy()}
        for i, column in enumerate(self.settings.targets):
            end = f" {column}" if self.labels > 1 else ""
            columns |= {f"prediction{end}": own[0][:, i], f"target{end}": own[1][:, i]}
        return Scores(columns, logits.cpu().numpy() if keep_logits else None)

    def targets_of(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Targets:
        """The loss of every text; no answer is right or wrong."""
        loss = self.losses(logits.float(), batch["labels"])[:, None]
        return Targets(loss, None, torch.ones_like(loss, dtype=torch.bool))

    def choices(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """TaskError."""
        raise TaskError(f"task {self.name}: a regression gives numbers, not chances of labels, which this looks at")

    def check_split(self, name: str) -> None:
        """Whether its columns are there, with numbers in them."""
        super().check_split(name)
        self._numbers(self._whole(name))

    def _check_labels(self, name: str, split: Split) -> None:
        """Nothing: numbers are checked as they are read."""

    def _numbers(self, table: Mapping[str, Sequence[Any]]) -> Tensor:
        """The targets as the data has them, [examples, labels]."""
        columns = [[number_of(self, v, name, i) for i, v in enumerate(table[name])] for name in self.settings.targets]
        return torch.tensor(columns, dtype=torch.float64).T.contiguous()

    def _load(self, split: str) -> Split:
        table = self.table(split)
        mean, spread = self.scale
        labels = ((self._numbers(table) - mean) / spread).float()
        return by_length(Split({**self._encoded(table), "labels": labels}))

    def _fit(self, features: npt.NDArray[np.float64], answers: npt.NDArray[Any], labels: int) -> tuple[Tensor, Tensor]:
        """Ridge regression, one for each number."""
        with needs("data", "a head that is fitted to the data"):
            from sklearn.linear_model import Ridge

        fitted = Ridge().fit(features, answers.astype(np.float64))
        weight, bias = np.reshape(fitted.coef_, (labels, -1)), np.reshape(fitted.intercept_, labels)
        return torch.tensor(weight, dtype=torch.float32), torch.tensor(bias, dtype=torch.float32)
