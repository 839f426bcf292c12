"""Text classification on any Hugging Face model and any table of texts, as a task file describes it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_lab.errors import FileError, OptionError, TaskError, some, unknown
from lora_lab.task import Split, Task

EXAMPLE = """\
# A task of your own: lora-lab train --task this-file.toml
kind = "text-classification"

base = "path/to/model"        # folder or hub id; AutoModelForSequenceClassification must be able to load it
data = "reviews.csv"          # csv, json, jsonl or parquet; split at random with split_seed, or give the splits:
# data = {train = "train.csv", validation = "dev.csv", test = "test.csv"}
text = "text"                 # column with the text
label = "label"               # column with the label: a name, or a number from 0
# text_pair = "hypothesis"    # second text column
# labels = ["negative", "positive"]   # names in the order of the model's outputs; by default sorted
# max_length = 128            # tokens; longer texts are cut
# limit = 2000                # examples used of each split
# split_seed = 0              # for data in one file: 20 % test, 10 % validation
# target_modules = "all-linear"
# learning_rate = 1e-3
# steps = 300
"""

_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_TEST, _VALIDATION = 0.2, 0.1


@dataclass(frozen=True)
class Settings:
    """The keys of a task file."""

    base: str
    data: str | dict[str, str]
    text: str
    label: str
    text_pair: str | None = None
    labels: list[str] | None = None
    max_length: int = 128
    limit: int | None = None
    split_seed: int = 0
    target_modules: str | list[str] = "all-linear"
    learning_rate: float = 1e-3
    steps: int = 300
    kind: str = field(default="text-classification")


class TextClassification(Task):
    """A frozen sequence classifier; adapters go where `target_modules` says, by default into all linear layers."""

    batch_size = 64

    def __init__(self, settings: Settings, name: str) -> None:
        self.settings = settings
        self.name = name
        self.about = f"{settings.label} of {settings.text}"
        self.base = settings.base
        self.target_modules = settings.target_modules
        self.learning_rate = settings.learning_rate
        self.steps = settings.steps

    @classmethod
    def from_record(cls, record: Mapping[str, Any], base: Path, where: str) -> TextClassification:
        """From a task file's or a record's keys; paths are relative to `base`."""
        known = {f.name for f in fields(Settings)}
        for key in record:
            if key not in known:
                raise unknown(f"key in {where}", key, sorted(known))
        missing = [name for name in ("base", "data", "text", "label") if name not in record]
        if missing:
            raise OptionError(f"{where}: no {missing[0]}; a text-classification task needs base, data, text and label")
        data = record["data"]
        placed = {k: _place(v, base) for k, v in data.items()} if isinstance(data, dict) else _place(str(data), base)
        beside = base / str(record["base"])
        found = _place(str(record["base"]), base) if beside.exists() else str(record["base"])
        settings = Settings(**{**record, "data": placed, "base": found})
        _check_values(settings, where)
        return cls(settings, name=Path(where).stem if where.endswith(".toml") else f"text/{settings.label}")

    @property
    def record(self) -> dict[str, Any]:
        """The task file's keys, defaults left out."""
        every = {f.name: getattr(self.settings, f.name) for f in fields(Settings)}
        defaults = {f.name: f.default for f in fields(Settings) if f.name != "kind"}
        return {name: value for name, value in every.items() if value != defaults.get(name, Settings)}

    @cached_property
    def labels(self) -> int:  # type: ignore[override]
        """Number of labels: of the names, or of the model's outputs."""
        return len(self._names) if self._names else int(self._config.num_labels)

    def build_model(self) -> nn.Module:
        """The base, frozen; a head that the checkpoint lacks is drawn from seed 0."""
        from transformers import AutoModelForSequenceClassification

        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: Any = self._pretrained(AutoModelForSequenceClassification, num_labels=self.labels)
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = self._tokenizer.pad_token_id  # by which decoders find a text's last token
        frozen: nn.Module = model.requires_grad_(False).eval()
        return frozen

    def _load(self, split: str) -> Split:
        table = self._table(split)
        texts = [table[self.settings.text]]
        if self.settings.text_pair:
            texts.append(table[self.settings.text_pair])
        tokenizer = self._tokenizer
        encoded = tokenizer(
            *([str(text) for text in column] for column in texts),
            truncation=True,
            max_length=self.settings.max_length,
            padding=True,
            return_tensors="pt",
        )
        labels = torch.tensor([self._label(value) for value in table[self.settings.label]], dtype=torch.long)
        return Split({**dict(encoded.items()), "labels": labels})

    def _label(self, value: object) -> int:
        if isinstance(value, str) or self.settings.labels is not None:
            names = self._names or []
            if str(value) not in names:
                raise TaskError(f"task {self.name}: label {value!r} is none of {some(map(repr, names), 8)}")
            return names.index(str(value))
        if isinstance(value, bool | int | np.integer):
            return int(value)
        raise TaskError(
            f"task {self.name}: label {value!r} is a {type(value).__name__}; names or whole numbers are needed"
        )

    @cached_property
    def _names(self) -> list[str] | None:
        if self.settings.labels is not None:
            return list(self.settings.labels)
        values = self._table("train")[self.settings.label]
        if not all(isinstance(value, str) for value in values):
            return None
        trained = [self._config.id2label[i] for i in range(self._config.num_labels)]
        # a finished classifier knows the order of its outputs
        return trained if set(trained) == set(values) else sorted(set(values))

    def _table(self, split: str) -> dict[str, list[Any]]:
        data = self.settings.data
        if isinstance(data, dict):
            if split not in data:
                raise TaskError(f"task {self.name}: no {split} data; its data has {some(data)}")
            return self._limited(self._read(Path(data[split])))
        table = self._read(Path(data))
        n = len(table[self.settings.label])
        order = np.random.default_rng(self.settings.split_seed).permutation(n)
        ends = (round(_TEST * n), round((_TEST + _VALIDATION) * n), n)
        bounds = {"test": (0, ends[0]), "validation": (ends[0], ends[1]), "train": (ends[1], ends[2])}
        chosen = order[slice(*bounds[split])]
        return self._limited({name: [column[i] for i in chosen] for name, column in table.items()})

    def _read(self, path: Path) -> dict[str, list[Any]]:
        from datasets import Dataset
        from datasets.utils import logging as datasets_logging

        if not path.is_file():
            raise FileError(f"task {self.name}: its data {path} is missing")
        if path.suffix not in _FORMATS:
            raise FileError(f"{path}: {some(_FORMATS, 4)} can be read")
        datasets_logging.disable_progress_bar()
        try:
            table = getattr(Dataset, f"from_{_FORMATS[path.suffix]}")(str(path))
        except Exception as error:  # the readers of datasets raise their own many kinds
            raise FileError(f"{path}: cannot be read as a table ({str(error).partition(chr(10))[0]})") from error
        needed = [
            self.settings.text,
            self.settings.label,
            *([self.settings.text_pair] if self.settings.text_pair else []),
        ]
        for name in needed:
            if name not in table.column_names:
                raise TaskError(f"{path}: no column {name!r}; there are: {', '.join(table.column_names)}")
        return {name: list(table[name]) for name in needed}

    def _limited(self, table: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {name: column[: self.settings.limit] for name, column in table.items()}

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = self._pretrained(AutoTokenizer)
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise TaskError(f"task {self.name}: the tokenizer of {self.settings.base!r} has no padding token")
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        return self._pretrained(AutoConfig)

    def _pretrained(self, cls: Any, **options: Any) -> Any:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        try:
            return cls.from_pretrained(self.settings.base, **options)
        except (OSError, ValueError, KeyError) as error:
            raise TaskError(
                f"task {self.name}: its base {self.settings.base!r} cannot be loaded "
                f"({str(error).strip().partition(chr(10))[0]}); give a folder, or a hub id where there is a network"
            ) from error


def _check_values(settings: Settings, where: str) -> None:
    """Refuse values of the wrong type or range, naming the key."""
    whole = {"max_length": 1, "limit": 1, "split_seed": 0, "steps": 1}
    for name, least in whole.items():
        value = getattr(settings, name)
        if value is None and name == "limit":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise OptionError(f"{where}: {name} is {value!r}; a whole number of at least {least} is needed")
    rate = settings.learning_rate
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 < rate < math.inf:
        raise OptionError(f"{where}: learning_rate is {rate!r}; a number above 0 is needed")
    for name in ("text", "label"):
        if not isinstance(getattr(settings, name), str):
            raise OptionError(f"{where}: {name} is {getattr(settings, name)!r}; the name of a column is needed")
    if settings.labels is not None and not all(isinstance(label, str) for label in settings.labels):
        raise OptionError(f"{where}: labels is {settings.labels!r}; a list of names is needed")


def _place(text: str, base: Path) -> str:
    """A path next to the task file, relative to the current folder where it lies below."""
    path = base / text
    try:
        return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path.resolve())
    except ValueError:
        return str(path.resolve())
