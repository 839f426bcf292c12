"""Examples with a label each: names of labels, and what in a column stands for which of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from lora_lab.errors import TaskError, shorten
from lora_lab.tasks.file import FileTask
from lora_lab.tasks.task import CLASSIFIED


class LabelledTask(FileTask):
    """A task whose examples have a label each, in a column; named by the keys, by the dataset, or numbers from 0."""

    metrics = CLASSIFIED

    @cached_property
    def _names(self) -> list[str] | None:
        """Names of the labels, in the order of their numbers; None where they are numbers."""
        return self._names_in_data() if self.settings.labels is None else list(self.settings.labels)

    def _names_in_data(self) -> list[str] | None:
        """As the dataset declares them, or sorted where they are text."""
        train = self._whole("train")
        self._columns(train.column_names)
        if self._declared:
            return self._declared
        values = [value for value in train[self.settings.label] if value != ""]
        if not all(isinstance(value, str) for value in values):
            return None
        return sorted(set(values))

    def _in_the_models_order(self, names: list[str] | None) -> list[str] | None:
        """A finished classifier of just these names knows the order of its outputs."""
        ordered = [self.config.id2label[i] for i in range(self.config.num_labels)] if names else None
        return ordered if ordered and names and set(ordered) == set(names) else names

    @property
    def _declared(self) -> list[str] | None:
        """Names that the dataset gives to the numbers in its column of labels."""
        names = getattr(self._whole("train").features.get(self.settings.label), "names", None)
        return list(names) if names else None

    def check_split(self, name: str) -> None:
        """Whether its columns are there, and its labels known."""
        super().check_split(name)
        self._labels(self._whole(name))

    def _labels(self, table: Mapping[str, Sequence[Any]]) -> torch.Tensor:
        """Labels as numbers: places among the names, or whole numbers as they are; TaskError naming the first other.

        Numbers for which the dataset declares names go by these.
        """
        values, names, declared = table[self.settings.label], self._names, self._declared
        if declared and names and set(declared) <= set(names):
            values = [declared[v] if isinstance(v, int) and 0 <= v < len(declared) else v for v in values]
        if len(values) and all(value is None or (isinstance(value, int) and value == -1) for value in values):
            raise TaskError(
                f"task {self.name}: a split without labels (all of them are {values[0]}); name another one in splits"
            )
        return torch.tensor([self._label(value, i) for i, value in enumerate(values)], dtype=torch.long)

    def _label(self, value: object, place: int) -> int:
        names, row = self._names, f"(row {place} of a split, counted from 0)"
        if value is None or value == "":
            raise TaskError(f"task {self.name}: an example without a label {row}")
        label = f"task {self.name}: label {self.reach.quote(value)} is"
        if isinstance(value, str) and names is None:
            raise TaskError(f"{label} a name where numbers are expected {row}")
        if isinstance(value, str):
            assert names is not None
            if value not in names:
                choices = shorten(map(repr, names), 8) if self.reach.quotes else f"the {len(names)} names"
                raise TaskError(f"{label} none of {choices} {row}")
            return names.index(value)
        if isinstance(value, bool | int | np.integer):
            return int(value)
        raise TaskError(f"{label} a {type(value).__name__}; names or whole numbers are needed {row}")
