"""Examples with a list of labels each, in a column: their names, and what in a list stands for which of them."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import ClassVar

from lora_lab.errors import TaskError, shorten
from lora_lab.tasks.file import FileTask


class ListedTask(FileTask):
    """A task with lists of labels in a column; named by the keys, the dataset or the model, or numbers from 0."""

    listed: ClassVar[str]
    """The key that names the column."""
    instead: ClassVar[str] = ""
    """What else may be there, for an error."""

    @cached_property
    def names(self) -> list[str]:
        """Names of the labels in the order of the outputs; TaskError where there is only one."""
        if self.settings.labels:
            return list(self.settings.labels)
        names, column = self._declared or self._found(), getattr(self.settings, self.listed)
        if len(names) < 2:
            alone = shorten(map(self.reach.quote, names)) or "no label"
            raise TaskError(
                f"task {self.name}: {alone} alone in {column!r} of its train split; two labels or more are needed"
            )
        known = [self.config.id2label[i] for i in range(self.config.num_labels)] if self._finished else []
        return known if set(known) == set(names) else names

    def _found(self) -> list[str]:
        """The labels in the training data: sorted names, or all numbers up to the largest."""
        column = getattr(self.settings, self.listed)
        cells = self._whole("train")[column]
        there = {each for row, cell in enumerate(cells) for each in self._cell(cell, row)}
        numbers = [each for each in there if isinstance(each, int)]
        if numbers and len(numbers) < len(there):
            raise TaskError(f"task {self.name}: labels in {column!r} are names and numbers; one kind is needed")
        return list(map(str, range(max(numbers) + 1))) if numbers else sorted(map(str, there))

    @property
    @abstractmethod
    def _finished(self) -> bool:
        """Whether the checkpoint has a head."""

    @cached_property
    def _declared(self) -> list[str] | None:
        """Names that the dataset gives to the numbers in its lists of labels."""
        train = self._whole("train")
        self._columns(train.column_names)
        names = getattr(getattr(train.features[getattr(self.settings, self.listed)], "feature", None), "names", None)
        return list(names) if names else None

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    def _cell(self, cell: object, row: int) -> list[str | int]:
        """An example's labels, numbers that the dataset has names for by these."""
        where = f"in {getattr(self.settings, self.listed)!r} (row {row} of a split, counted from 0)"
        if not isinstance(cell, list):
            raise TaskError(
                f"task {self.name}: a {type(cell).__name__} {where}; a list of labels is needed{self.instead}"
            )
        for each in cell:
            if not isinstance(each, str | int) or isinstance(each, bool):
                raise TaskError(
                    f"task {self.name}: a label of the type {type(each).__name__} {where}; a name is needed"
                )
        names = self._declared or []
        return [names[each] if isinstance(each, int) and 0 <= each < len(names) else each for each in cell]

    def _place(self, label: str | int, row: int) -> int:
        """Which of the labels it is; TaskError where it is none."""
        place = label if isinstance(label, int) else self._places.get(label, -1)
        if not 0 <= place < len(self._places):
            choices = shorten(self._places, 8) if self.reach.quotes else f"the {len(self._places)} labels"
            told = f"label {self.reach.quote(label)} (row {row} of a split, counted from 0) is none of {choices}"
            raise TaskError(f"task {self.name}: {told}")
        return place
