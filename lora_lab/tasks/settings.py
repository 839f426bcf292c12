"""The keys of task files: their types, their bounds, and the error for what is wrong with one."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from annotated_types import Ge, Gt, Lt

from lora_lab.errors import OptionError, unknown
from lora_lab.files.trust import TABLES
from lora_lab.tasks.task import SPLITS

Count = Annotated[int, Ge(1), "a whole number of at least 1"]
Seed = Annotated[int, Ge(0), "a whole number of at least 0"]
Rate = Annotated[float, Gt(0), Lt(float("inf")), "a number above 0"]
Limits = Annotated[
    dict[Literal["train", "validation", "test"], Annotated[int, Ge(1)]], "a table of such numbers by split"
]
Column = Annotated[str, "the name of a column"]
Head = Literal["frozen", "trained", "probe"]
"""A classifier: as it is, trained along with the adapter, or fitted to the base's features and then frozen."""

COMMON = """\
# revision = "main"           # of a base from the hub
# dtype = "bfloat16"          # float32 (the default), bfloat16 or float16
# device_map = "auto"         # spread the base over several GPUs
# trust_remote_code = false   # true runs code that comes with the base: only if you have read it
# data_config = "default"     # configuration of a dataset from the hub
# splits = {train = "train", test = "validation"}   # names in the data; by default train, validation, test
# limit = 2000                # examples used of each split, drawn by split_seed; or {validation = 500} of some alone
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
    """The keys of a task file; kinds add their own. Paths are those from which they can be opened.

    Types are strict: a text is no number, and true is no 1. What an `Annotated` type says in words is shown in errors.
    """

    kind: str
    base: str
    data: str | dict[str, str]
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device_map: str | None = None
    trust_remote_code: bool = False
    data_config: str | None = None
    splits: dict[Literal["train", "validation", "test"], str] | None = None
    limit: Count | Limits | None = None
    split_seed: Seed = 0
    target_modules: str | list[str] = "all-linear"
    learning_rate: Rate = 1e-3
    steps: Count = 300
    batch_size: Count = 16
    rank: Count = 8

    columns: ClassVar[tuple[str, ...]] = ()
    """Keys that name columns of the data, or are templates of such."""
    places: ClassVar[tuple[str, ...]] = ()
    """Further keys that are paths."""

    @property
    def name(self) -> str:
        """The kind, and what the data is called in short; with it the column of labels, where it is not `label`.

        Tasks that ask something else of the same examples would have one name.
        """
        label = getattr(self, "label", "label")
        return f"{self.kind}/{_called(self.data)}" + (
            f"/{label}" if isinstance(label, str) and label != "label" else ""
        )

    def check(self, where: str) -> None:
        """OptionError for values that do not go together; kinds add to it."""
        splits = self.splits or {}
        if len(set(splits.values())) < len(splits):
            raise OptionError(f"{where}: two of its splits are the same one in the data")
        if isinstance(self.data, str) and not is_file(self.data):
            return
        for name in ("splits", "data_config"):
            if getattr(self, name) is not None:
                raise OptionError(f'{where}: {name} is of datasets with several; for files, data = {{train = "…", …}}')


Keys = TypeVar("Keys", bound=Settings)


def read(cls: type[Keys], record: Mapping[str, Any], folder: Path, where: str) -> Keys:
    """The keys of a task file or a record; paths are relative to `folder`.

    OptionError for the first that is unknown, missing or of another type, naming the file (`where`) and the key.
    """
    _validate(cls, record, where)
    data, base = record.get("data", ""), record["base"]
    placed = {k: _data(v, folder) for k, v in data.items()} if isinstance(data, dict) else data and _data(data, folder)
    base = _place(base, folder) if os.path.exists(folder / base) else base
    beside = {key: _place(record[key], folder) for key in cls.places if record.get(key)}
    settings = cls(**{**record, "data": placed, "base": base, **beside})
    settings.check(where)
    return settings


def _validate(cls: type[Settings], record: Mapping[str, Any], where: str) -> None:
    from pydantic import ValidationError

    try:
        _model(cls).model_validate(dict(record))  # type: ignore[arg-type]
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
    else:
        return
    # first what is easiest to mend: a misspelt key may be the one that is missing
    order = {"extra_forbidden": 0, "invalid_key": 0, "missing": 1}
    fault = min(faults, key=lambda fault: order.get(fault["type"], 2 if fault["loc"][-1] == "[key]" else 3))
    hints = typing.get_type_hints(cls, include_extras=True)
    kind = next(field.default for field in fields(cls) if field.name == "kind")
    key, *within = map(str, fault["loc"])
    if order.get(fault["type"]) == 0:
        raise unknown(f"key in {where}", key, sorted(field.name for field in fields(cls)))
    if fault["type"] == "missing":
        raise OptionError(f"{where}: no {key}, which a {kind} task needs")
    if within[-1:] == ["[key]"]:
        raise unknown(f"split in {where}:", within[-2], SPLITS)
    value, choices = record[key], typing.get_args(hints[key])
    if typing.get_origin(hints[key]) is Literal and isinstance(value, str):
        raise unknown(f"{key} in {where}:", value, choices)
    raise OptionError(f"{where}: {key} is {value!r}; {_words(hints[key])} is needed")


@cache
def _model(cls: type[Settings]) -> Any:
    """The dataclass as pydantic checks it."""
    from pydantic import create_model

    hints = typing.get_type_hints(cls, include_extras=True)
    types_: dict[str, Any] = {
        field.name: (hints[field.name], ... if field.default is MISSING else field.default) for field in fields(cls)
    }
    return create_model(cls.__name__, __config__={"strict": True, "extra": "forbid"}, **types_)


_WORDS = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    list: "a list of names",
    dict: "a table of texts",
}


def _words(hint: Any) -> str:
    """What a type takes, in words."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return str(parts[-1])
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_words(part) for part in parts if part is not types.NoneType)
    if origin is Literal:
        return f"one of {', '.join(parts)}"
    return _WORDS[origin or hint]


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


def is_file(data: str) -> bool:
    """Whether this is a file, or called like a table."""
    return Path(data).suffix in TABLES or os.path.isfile(data)
