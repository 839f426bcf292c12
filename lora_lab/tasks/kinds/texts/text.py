"""Text classification on any Hugging Face model and any table of texts, as a task file describes it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor, nn

from lora_lab.tasks.kinds.labelled import LabelledTask
from lora_lab.tasks.kinds.texts.pooled import POOLED, PooledKeys, PooledText
from lora_lab.tasks.settings import COMMON, Column
from lora_lab.tasks.splits import by_length
from lora_lab.tasks.task import Split

EXAMPLE = (
    """\
# A task of your own: lora-lab train --task this-file.toml
kind = "text-classification"

base = "path/to/model"        # folder or hub id
data = "reviews.csv"          # csv, json, jsonl, parquet, a folder, or a dataset on the hub; or a file a split:
# data = {train = "train.csv", validation = "dev.csv", test = "test.csv"}
text = "text"                 # column with the text
label = "label"               # column with the label: a name, or a number from 0
# text_pair = "hypothesis"    # second text column
# labels = ["negative", "positive"]   # names in the order of the model's outputs; by default sorted
"""
    + POOLED.format(fit="logistic regression")
    + COMMON
)


@dataclass(frozen=True, kw_only=True)
class Keys(PooledKeys):
    """The keys of a task file."""

    kind: str = "text-classification"
    label: Column
    labels: list[str] | None = None

    columns: ClassVar[tuple[str, ...]] = ("text", "text_pair", "label")


class TextClassification(PooledText, LabelledTask):
    """A sequence classifier, with a label a text."""

    kind = "text-classification"
    Keys = Keys

    @cached_property
    def labels(self) -> int:  # type: ignore[override]
        """Number of labels: of the names, or of the model's outputs, or of the numbers in the training data."""
        if self._names:
            return len(self._names)
        if self._finished and self.settings.pool == "own":
            return int(self.config.num_labels)
        return int(self._labels(self.table("train")).max()) + 1

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    def _load(self, split: str) -> Split:
        table = self.table(split)
        return by_length(Split({**self._encoded(table), "labels": self._labels(table)}))

    def _names_in_data(self) -> list[str] | None:
        return self._in_the_models_order(super()._names_in_data())
