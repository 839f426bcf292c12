"""The data of a task as tables: read from files, folders or the hub, in three splits, the columns that it needs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lora_lab.errors import FileError, LoraLabError, TaskError, shorten, unknown
from lora_lab.extras import needs
from lora_lab.files.confined import check_files, check_folder, check_repository
from lora_lab.files.trust import TABLES
from lora_lab.hub import stay_offline_without_network
from lora_lab.tasks.settings import is_file
from lora_lab.tasks.task import SPLITS, Task

_TEST, _VALIDATION = 0.2, 0.1
_SPELLINGS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


class TableTask(Task):
    """A task whose examples are rows of a table, as its `settings` say."""

    settings: Any

    def table(self, split: str) -> dict[str, Sequence[Any]]:
        """The columns of a split that the task needs; where the data has no such split, it is drawn from training."""
        rows = self._limited(split)
        return {name: self._cells(rows, name) for name in self._columns(rows.column_names)}

    def _limited(self, split: str) -> Any:
        """The examples of a split that `limit` leaves, unread."""
        rows, limit = self._whole(split), self.settings.limit
        self._check_cells(rows)
        if isinstance(limit, dict):
            limit = limit.get(split)
        if limit is not None and limit < len(rows):
            drawn = np.random.default_rng(self.settings.split_seed).permutation(len(rows))[:limit]
            rows = rows.select(np.sort(drawn))  # not the first of them: tables are often sorted by label
        return rows

    def _cells(self, rows: Any, column: str) -> list[Any]:
        """A column of some examples."""
        try:
            return list(rows[column])
        except Exception as error:  # datasets cannot make Python values of every cell that it took in
            raise TaskError(f"{self._where}: its cells cannot be read ({self._why(error)})") from error

    def _check_cells(self, table: Any) -> None:
        """TaskError for cells that a confined task would have to open files for, wherever these lie."""
        for name in self._columns(table.column_names) if self.reach.folder is not None else ():
            if "decode=True" in repr(table.features[name]):
                raise TaskError(f"task {self.name}: its column {name!r} names files; texts and numbers can be read")

    def _whole(self, split: str) -> Any:
        """All examples of a split; TaskError where there is none."""
        rows = self._carved[split] if split in self._carved else self._tables[split]
        if not len(rows):
            raise TaskError(f"task {self.name}: its {split} split is empty; it needs more rows, or a file of its own")
        return rows

    def check_split(self, name: str) -> None:
        """As of any task, by the columns; kinds with labels look at these, too."""
        self._columns(self._whole(name).column_names)

    def _columns(self, there: Sequence[str]) -> list[str]:
        """Columns that are read; TaskError for one that is not there."""
        wanted = self._wanted()
        for name in wanted:
            if name not in there:
                hint = f"there are: {', '.join(there)}" if self.reach.quotes else f"it has {len(there)} others"
                raise TaskError(f"{self._where}: no column {name!r}; {hint}")
        return wanted

    def _wanted(self) -> list[str]:
        """Names of the columns that the keys ask for."""
        values = (getattr(self.settings, key) for key in self.settings.columns)
        return list(dict.fromkeys(name for value in values for name in _names(value)))

    @property
    def _where(self) -> str:
        data = self.settings.data
        return str(data) if isinstance(data, str) else f"task {self.name}"

    @cached_property
    def _tables(self) -> dict[str, Any]:
        """Split → dataset, for the splits that the data has."""
        data = self.settings.data
        if isinstance(data, dict):
            for name in data:
                if name not in SPLITS:
                    raise unknown(f"split in the data of task {self.name}:", name, SPLITS)
            return {name: self._file(Path(path)) for name, path in data.items()}
        if is_file(data):
            return {"train": self._file(Path(data))}
        dataset = self._dataset(data)
        named = self.settings.splits or {}
        free = [name for name in dataset if name not in named.values()]
        tables = {}
        for split, spellings in _SPELLINGS.items():
            name = named.get(split) or next((each for each in spellings if each in free), None)
            if split in named and name not in dataset:
                raise TaskError(f"{data}: has no split {name!r}; {self._splits_of(dataset)}")
            if name is not None:
                tables[split] = dataset[name]
        if "train" not in tables:
            raise TaskError(f"{data}: has no train split; {self._splits_of(dataset)}; name it in splits")
        return tables

    def _splits_of(self, dataset: Mapping[str, Any]) -> str:
        return f"there are: {', '.join(dataset)}" if self.reach.quotes else f"it has {len(dataset)} others"

    @cached_property
    def _carved(self) -> dict[str, Any]:
        """The splits that the data lacks, drawn from its training data with `split_seed`, and what is left of that."""
        if all(split in self._tables for split in SPLITS):
            return {}
        whole = self._tables.get("train")
        if whole is None:
            raise TaskError(f"task {self.name}: no train data; its data has {shorten(self._tables)}")
        order = np.random.default_rng(self.settings.split_seed).permutation(len(whole))
        parts, start = {}, 0
        for split, share in (("test", _TEST), ("validation", _VALIDATION)):
            if split not in self._tables:
                end = start + round(share * len(order))
                parts[split], start = whole.select(order[start:end]), end
        parts["train"] = whole.select(order[start:])
        return parts

    def _file(self, path: Path) -> Any:
        with needs("data", _DATA):
            from datasets import Dataset

        if not os.path.isfile(path):
            raise FileError(f"task {self.name}: its data {path} is missing")
        if path.suffix not in TABLES:
            raise FileError(f"{path}: {shorten(TABLES, 4)} can be read")
        self.reach.require(path, f"task {self.name}: its data")
        with _silent():
            try:
                options = {"keep_default_na": False} if path.suffix == ".csv" else {}  # "NA" and "" are texts
                return getattr(Dataset, f"from_{TABLES[path.suffix]}")(str(path), **options)
            except Exception as error:  # the readers of datasets raise their own many kinds
                empty = "corresponds to no data" in str(error)
                why = "it has no rows" if empty else self._why(error.__cause__ or error)
                raise FileError(f"{path}: cannot be read as a table ({why})") from error

    def _dataset(self, name: str) -> Any:
        """A folder (of images, of tables, or saved by datasets), or a dataset from the hub."""
        with needs("data", _DATA):
            from datasets import DatasetDict, load_from_disk

        folder = Path(name)
        if not os.path.exists(folder):
            stay_offline_without_network()
        elif self.reach.folder is not None:
            check_folder(folder, self.reach, f"task {self.name}: its data {name!r}")
        with _silent():
            try:
                if os.path.exists(folder / "dataset_dict.json") or os.path.exists(folder / "state.json"):
                    dataset = load_from_disk(name)
                else:
                    dataset = self._built(name)
            except LoraLabError:
                raise
            except Exception as error:  # as above, and the hub client's
                if os.path.exists(folder):
                    raise FileError(f"{name}: cannot be read as a dataset ({self._why(error)})") from error
                raise FileError(
                    f"task {self.name}: its data {name!r} is no file or folder here, and the Hugging Face hub gave no "
                    f"such dataset ({self._why(error)}); give a local folder or file where there is no network"
                ) from error
        return dataset if isinstance(dataset, DatasetDict) else {"train": dataset}

    def _built(self, name: str) -> Any:
        from datasets import load_dataset, load_dataset_builder

        if self.reach.folder is not None:
            if not os.path.exists(name):
                check_repository(name, f"task {self.name}: its data {name!r}")
            builder = load_dataset_builder(name, self.settings.data_config)
            check_files(builder.config.data_files, name, self.reach, f"task {self.name}: its data {name!r}")
        return load_dataset(name, self.settings.data_config)

    def _why(self, error: BaseException) -> str:
        """What a reader said, which may hold lines of what it read; else only what kind of error it was."""
        return _first_line(error) if self.reach.quotes else type(error).__name__


_DATA = "a task on data of one's own"


class _silent:  # noqa: N801  (a context)
    """datasets without its progress bars."""

    def __enter__(self) -> None:
        from datasets.utils import logging as datasets_logging

        datasets_logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        return None


def text_of(task: Task, value: object, column: str) -> str:
    """A cell as text, numbers as Python writes them; TaskError where there is none, or something else."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise TaskError(f"task {task.name}: an example without a text in {column!r}")
    if not isinstance(value, str | int | float | np.number):
        kind = type(value).__name__
        raise TaskError(f"task {task.name}: column {column!r} holds values of the type {kind}; a text is needed")
    return str(value)


def number_of(task: Task, value: object, column: str, place: int) -> float:
    """A cell as a finite number, also where a table gives it as text; TaskError naming the row where it is none."""
    row = f"(row {place} of a split, counted from 0)"
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise TaskError(f"task {task.name}: an example without a number in {column!r} {row}")
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise TaskError(f"task {task.name}: {task.reach.quote(value)} in {column!r} is no finite number {row}")
    return number


def _names(value: str | Sequence[str] | None) -> Sequence[str]:
    """The columns that a key names: one, several or none."""
    return [value] if isinstance(value, str) else value or []


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
