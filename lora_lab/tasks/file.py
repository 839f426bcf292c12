"""What all kinds of tasks from a file share: their keys, their data as a table with three splits, their base model."""

from __future__ import annotations

import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from lora_lab.errors import FileError, LoraLabError, OptionError, TaskError, some, unknown
from lora_lab.files.confined import check_base, check_files, check_folder, check_repository
from lora_lab.files.trust import NEVER_RECORDED, TABLES
from lora_lab.hub import DTYPES, cached_folder, check_memory, pretrained, stay_offline_without_network
from lora_lab.tasks.task import SPLITS, Task

_TEST, _VALIDATION = 0.2, 0.1
_PADDED_LEFT = ("xlnet",)
"""Kinds of models that look for a text's meaning in its last place."""
_SPELLINGS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}

COMMON = """\
# revision = "main"           # of a base from the hub
# dtype = "bfloat16"          # float32 (the default), bfloat16 or float16
# device_map = "auto"         # spread the base over several GPUs
# trust_remote_code = false   # true runs code that comes with the base: only if you have read it
# data_config = "default"     # configuration of a dataset from the hub
# splits = {train = "train", test = "validation"}   # names in the data; by default train, validation, test
# limit = 2000                # examples used of each split, drawn by split_seed
# split_seed = 0              # draws 20 % test and 10 % validation from the training data where there is none
# target_modules = "all-linear"
# learning_rate = 1e-3
# steps = 300
# batch_size = 16             # examples a training step
# rank = 8
"""
"""The keys of every kind, for its example file."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of a task file; kinds add their own. Paths are those from which they can be opened."""

    kind: str
    base: str
    data: str | dict[str, str]
    revision: str | None = None
    dtype: str = "float32"
    device_map: str | None = None
    trust_remote_code: bool = False
    data_config: str | None = None
    splits: dict[str, str] | None = None
    limit: int | None = None
    split_seed: int = 0
    target_modules: str | list[str] = "all-linear"
    learning_rate: float = 1e-3
    steps: int = 300
    batch_size: int = 16
    rank: int = 8

    columns: ClassVar[tuple[str, ...]] = ()
    """Keys that name columns of the data, or are templates of such."""


LEAST = {
    **dict.fromkeys(("limit", "steps", "batch_size", "rank", "max_length", "image_size", "shots"), 1),
    "split_seed": 0,
}


class FileTask(Task):
    """A task that a TOML file describes; kinds are subclasses with their own `Settings`."""

    kind: ClassVar[str]
    Keys: ClassVar[type[Settings]]
    batch_size = 64

    def __init__(self, settings: Any, name: str) -> None:
        self.settings = settings
        self.name = name
        self.about = f"{settings.kind} on {settings.base}"
        self.base = settings.base
        self.target_modules = settings.target_modules
        self.learning_rate = settings.learning_rate
        self.steps = settings.steps
        self.train_batch_size = settings.batch_size
        self.rank = settings.rank

    @classmethod
    def from_record(cls, record: Mapping[str, Any], base: Path, where: str) -> FileTask:
        """From a task file's or a record's keys; paths are relative to `base`, `where` names the file in errors."""
        known = {f.name: f for f in fields(cls.Keys)}
        for key in record:
            if key not in known:
                raise unknown(f"key in {where}", key, sorted(known))
        missing = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
        missing = [name for name in missing if name not in record]
        if missing:
            raise OptionError(f"{where}: no {missing[0]}, which a {cls.kind} task needs")
        hints = typing.get_type_hints(cls.Keys)
        for key, value in record.items():
            _check(where, key, value, hints[key])
        data = record["data"]
        placed = {k: _data(v, base) for k, v in data.items()} if isinstance(data, dict) else _data(data, base)
        named = record["base"]
        found = _place(named, base) if os.path.exists(base / named) else named
        settings = cls.Keys(**{**record, "data": placed, "base": found})
        cls._check(settings, where)
        name = Path(where).stem if where.endswith(".toml") else f"{cls.kind}/{_called(settings.data)}"
        return cls(settings, name)

    @classmethod
    def _check(cls, settings: Any, where: str) -> None:
        """Refuse values that cannot be; kinds add to it."""
        if settings.dtype not in DTYPES:
            raise unknown(f"dtype in {where}:", settings.dtype, DTYPES)
        splits: Mapping[str, str] = settings.splits or {}
        for name in splits:
            if name not in SPLITS:
                raise unknown(f"split in {where}:", name, SPLITS)
        if len(set(splits.values())) < len(splits):
            raise OptionError(f"{where}: two of its splits are the same one in the data")
        one_file = not isinstance(settings.data, str) or _is_file(settings.data)
        for name in ("splits", "data_config"):
            if one_file and getattr(settings, name) is not None:
                raise OptionError(f'{where}: {name} is of datasets with several; for files, data = {{train = "…", …}}')

    @property
    def record(self) -> dict[str, Any]:
        """The task file's keys but those that no adapter may ask for, defaults left out.

        Paths are relative to the current folder where they lie below it.
        """
        return {name: value for name, value in self.spec.items() if name not in NEVER_RECORDED}

    @property
    def spec(self) -> dict[str, Any]:
        """The task file's keys, defaults left out."""
        every = {f.name: (getattr(self.settings, f.name), f.default) for f in fields(self.settings)}
        always = {"kind", *(name for name, (_, default) in every.items() if default is MISSING)}
        return {name: value for name, (value, default) in every.items() if name in always or value != default}

    @property
    def base_digest(self) -> str:
        """As of any task; of a base from the hub, its commit, too."""
        if os.path.isdir(self.base):
            return super().base_digest
        assert self.config is not None  # loaded, so that the cache has it
        folder = cached_folder(self.base, self.settings.revision)
        return f"{self.base}@{folder.name if folder else None}"

    def table(self, split: str) -> dict[str, Sequence[Any]]:
        """The columns of a split that the task needs; where the data has no such split, it is drawn from training."""
        found = self._whole(split)
        self._check_cells(found)
        limit = self.settings.limit
        if limit is not None and limit < len(found):
            drawn = np.random.default_rng(self.settings.split_seed).permutation(len(found))[:limit]
            found = found.select(np.sort(drawn))  # not the first of them: tables are often sorted by label
        columns = self._columns(found.column_names)
        try:
            return {name: list(found[name]) for name in columns}
        except Exception as error:  # datasets cannot make Python values of every cell that it took in
            raise TaskError(f"{self._where}: its cells cannot be read ({self._why(error)})") from error

    def _check_cells(self, table: Any) -> None:
        """TaskError for cells that a confined task would have to open files for, wherever these lie."""
        for name in self._columns(table.column_names) if self.reach.folder is not None else ():
            if "decode=True" in repr(table.features[name]):
                raise TaskError(f"task {self.name}: its column {name!r} names files; texts and numbers can be read")

    def _whole(self, split: str) -> Any:
        """All examples of a split; TaskError where there is none."""
        found = self._carved[split] if split in self._carved else self._tables[split]
        if not len(found):
            raise TaskError(f"task {self.name}: its {split} split is empty; it needs more rows, or a file of its own")
        return found

    def check_split(self, name: str) -> None:
        """As of any task, by the columns; kinds with labels look at these, too."""
        self._columns(self._whole(name).column_names)

    def pretrained(self, cls: Any, **options: Any) -> Any:
        """`cls` from the base, as the task's keys say."""
        keys = self.settings
        if self.reach.folder is not None:
            check_base(keys.base, keys.revision, f"task {self.name}: its base")
        more = {"revision": keys.revision} if keys.revision else {}
        return pretrained(
            cls,
            keys.base,
            where=f"task {self.name}: its base",
            trust_remote_code=keys.trust_remote_code,
            **more,
            **options,
        )

    def pretrained_model(self, cls: Any, **options: Any) -> Any:
        """The base model in its dtype, on the devices that `device_map` says; what it lacks is drawn from seed 0."""
        placed = {"device_map": self.settings.device_map} if self.settings.device_map else {}
        if not placed:
            keys, where = self.settings, f"task {self.name}: its base"
            check_memory(keys.base, DTYPES[keys.dtype], where=where, revision=keys.revision)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.pretrained(cls, dtype=DTYPES[self.settings.dtype], **placed, **options)

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer, with a padding token."""
        from transformers import AutoTokenizer

        tokenizer = self.pretrained(AutoTokenizer)
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise TaskError(f"task {self.name}: the tokenizer of {self.settings.base!r} has no padding token")
            tokenizer.pad_token = tokenizer.eos_token
        if self.config.model_type not in _PADDED_LEFT:
            tokenizer.padding_side = "right"  # where batches are trimmed, and positions count from the first token
        size = self._vocabulary
        if size is not None and len(tokenizer) > size and max(tokenizer.get_vocab().values()) >= size:
            raise TaskError(
                f"task {self.name}: the tokenizer of {self.settings.base!r} has {len(tokenizer)} tokens, the model "
                f"{size}: they do not belong together"
            )
        return tokenizer

    @cached_property
    def config(self) -> Any:
        """The base's configuration."""
        from transformers import AutoConfig

        return self.pretrained(AutoConfig)

    @property
    def _vocabulary(self) -> int | None:
        config = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
        size = getattr(config, "vocab_size", None)
        return int(size) if isinstance(size, int) else None

    def _columns(self, there: Sequence[str]) -> list[str]:
        """Columns that are read; TaskError for one that is not there."""
        wanted = self._wanted()
        for name in wanted:
            if name not in there:
                known = f"there are: {', '.join(there)}" if self.reach.quotes else f"it has {len(there)} others"
                raise TaskError(f"{self._where}: no column {name!r}; {known}")
        return wanted

    def _wanted(self) -> list[str]:
        """Names of the columns that the keys ask for."""
        return [value for key in self.settings.columns if (value := getattr(self.settings, key)) is not None]

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
        if _is_file(data):
            return {"train": self._file(Path(data))}
        found = self._dataset(data)
        chosen = self.settings.splits or {}
        free = [name for name in found if name not in chosen.values()]
        tables = {}
        for split, spellings in _SPELLINGS.items():
            name = chosen.get(split) or next((each for each in spellings if each in free), None)
            if split in chosen and name not in found:
                raise TaskError(f"{data}: has no split {name!r}; {self._splits_of(found)}")
            if name is not None:
                tables[split] = found[name]
        if "train" not in tables:
            raise TaskError(f"{data}: has no train split; {self._splits_of(found)}; name it in splits")
        return tables

    def _splits_of(self, found: Mapping[str, Any]) -> str:
        return f"there are: {', '.join(found)}" if self.reach.quotes else f"it has {len(found)} others"

    @cached_property
    def _carved(self) -> dict[str, Any]:
        """The splits that the data lacks, drawn from its training data with `split_seed`, and what is left of that."""
        if all(split in self._tables for split in SPLITS):
            return {}
        whole = self._tables.get("train")
        if whole is None:
            raise TaskError(f"task {self.name}: no train data; its data has {some(self._tables)}")
        order = np.random.default_rng(self.settings.split_seed).permutation(len(whole))
        parts, start = {}, 0
        for split, share in (("test", _TEST), ("validation", _VALIDATION)):
            if split not in self._tables:
                end = start + round(share * len(order))
                parts[split], start = whole.select(order[start:end]), end
        parts["train"] = whole.select(order[start:])
        return parts

    def _file(self, path: Path) -> Any:
        from datasets import Dataset

        if not os.path.isfile(path):
            raise FileError(f"task {self.name}: its data {path} is missing")
        if path.suffix not in TABLES:
            raise FileError(f"{path}: {some(TABLES, 4)} can be read")
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
        from datasets import DatasetDict, load_from_disk

        folder = Path(name)
        if not os.path.exists(folder):
            stay_offline_without_network()
        elif self.reach.folder is not None:
            check_folder(folder, self.reach, f"task {self.name}: its data {name!r}")
        with _silent():
            try:
                if os.path.exists(folder / "dataset_dict.json") or os.path.exists(folder / "state.json"):
                    found = load_from_disk(name)
                else:
                    found = self._built(name)
            except LoraLabError:
                raise
            except Exception as error:  # as above, and the hub client's
                if os.path.exists(folder):
                    raise FileError(f"{name}: cannot be read as a dataset ({self._why(error)})") from error
                raise FileError(
                    f"task {self.name}: its data {name!r} is no file or folder here, and the Hugging Face hub gave no "
                    f"such dataset ({self._why(error)}); give a local folder or file where there is no network"
                ) from error
        return found if isinstance(found, DatasetDict) else {"train": found}

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


class LabelledTask(FileTask):
    """A task whose examples have a label each, in a column; named by the keys, by the dataset, or numbers from 0."""

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
        known = [self.config.id2label[i] for i in range(self.config.num_labels)] if names else None
        return known if known and names and set(known) == set(names) else names

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
                known = some(map(repr, names), 8) if self.reach.quotes else f"the {len(names)} names"
                raise TaskError(f"{label} none of {known} {row}")
            return names.index(value)
        if isinstance(value, bool | int | np.integer):
            return int(value)
        raise TaskError(f"{label} a {type(value).__name__}; names or whole numbers are needed {row}")


def _is_file(data: str) -> bool:
    return Path(data).suffix in TABLES or os.path.isfile(data)


class _silent:  # noqa: N801  (a context)
    """datasets without its progress bars."""

    def __enter__(self) -> None:
        from datasets.utils import logging as datasets_logging

        datasets_logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        return None


def float_heads(model: torch.nn.Module, heads: Sequence[str]) -> None:
    """Heads compute in float32 whatever the base does: small steps of training are lost in bfloat16."""
    if next(model.parameters()).dtype == torch.float32:
        return

    def as_float(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(each.float() if isinstance(each, torch.Tensor) else each for each in inputs)

    for name in heads:
        model.get_submodule(name).float().register_forward_pre_hook(as_float)


def text_of(task: FileTask, value: object, column: str) -> str:
    """A cell as text, numbers as Python writes them; TaskError where there is none, or something else."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise TaskError(f"task {task.name}: an example without a text in {column!r}")
    if not isinstance(value, str | int | float | np.number):
        kind = type(value).__name__
        raise TaskError(f"task {task.name}: column {column!r} holds values of the type {kind}; a text is needed")
    return str(value)


def _check(where: str, key: str, value: object, hint: Any) -> None:
    """Refuse a value of another type than the key's, or a number out of range."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = tuple(typing.get_origin(kind) or kind for kind in kinds)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = isinstance(value, plain) and (bool in plain or not isinstance(value, bool))
    if float in plain and is_number:
        fits = True
    if dict in plain and isinstance(value, dict):
        fits = all(isinstance(part, str) for part in value.values())
    if list in plain and isinstance(value, list):
        fits = all(isinstance(part, str) for part in value)
    if key in LEAST and fits and value is not None:
        assert isinstance(value, int)
        fits = value >= LEAST[key]
    if key == "learning_rate" and fits:
        assert isinstance(value, int | float)
        fits = 0 < value < math.inf
    if not fits:
        raise OptionError(f"{where}: {key} is {value!r}; {_needed(key, plain)} is needed")


def _needed(key: str, plain: Sequence[type]) -> str:
    if key in LEAST:
        return f"a whole number of at least {LEAST[key]}"
    if key == "learning_rate":
        return "a number above 0"
    if plain == (str,) and key not in ("base", "data", "dtype"):
        return "the name of a column" if key in ("text", "label", "image") else "a text"
    words = {str: "a text", bool: "true or false", list: "a list of names", dict: "a table of texts", float: "a number"}
    return " or ".join(words[kind] for kind in plain if kind in words)


def _data(text: str, base: Path) -> str:
    """A path beside the task file; the name of a dataset on the hub stays as it is."""
    looks_like_file = Path(text).suffix in TABLES
    return _place(text, base) if looks_like_file or os.path.exists(base / text) else text


def _called(data: str | dict[str, str]) -> str:
    """What data is called in short: a file or folder without its path; of a file a split, the folder they share."""
    if isinstance(data, str):
        return Path(data).stem if Path(data).suffix in TABLES else Path(data).name
    parents = {Path(path).resolve().parent.name for path in data.values()}
    return parents.pop() if len(parents) == 1 else _called(next(iter(data.values()), ""))


def _place(text: str, base: Path) -> str:
    """A path next to the task file, relative to the current folder where it lies below."""
    path = base / text
    try:
        return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path.resolve())
    except ValueError:
        return str(path.resolve())


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
