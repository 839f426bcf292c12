"""What a command found out: numbers with their provenance, as one JSON file."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lora_lab import files
from lora_lab.errors import FileError, OptionError, shorten
from lora_lab.results import schema, tables
from lora_lab.results.schema import FORMAT, ROWS

if TYPE_CHECKING:
    from pandas import DataFrame

_PACKAGES = ("lora-lab", "torch", "transformers", "peft", "numpy", "scipy")


@dataclass(frozen=True, repr=False)
class Result:
    """One table with what it was made from. JSON types only; a number that is not finite is null.

    `columns` are tidy: name → values, all of one length. `summary` holds what is said of the table as a whole
    (barriers, means); shares are fractions, losses nats. What each kind of result holds is told by its schema (see
    kinds.py), whose version it carries.
    """

    kind: str
    columns: Mapping[str, Sequence[Any]]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    schema: int = 0
    """Version of the kind's schema that it is written in; 0 becomes the present one."""

    def __post_init__(self) -> None:
        for name in _OBJECTS:
            object.__setattr__(self, name, finite(getattr(self, name)))
        object.__setattr__(self, "schema", self.schema or schema.version_of(self.kind))

    def __repr__(self) -> str:
        return tables.describe(self)

    def _repr_html_(self) -> str:
        return tables.to_html(self)

    def rows(self, **where: Any) -> list[dict[str, Any]]:
        """The table's rows as dictionaries, those only whose columns equal the values given."""
        names = list(self.columns)
        rows = [dict(zip(names, row, strict=True)) for row in zip(*self.columns.values(), strict=True)]
        return [row for row in rows if all(row[name] == value for name, value in where.items())]

    @property
    def tables(self) -> list[str]:
        """The names of its tables, for `table`, `frame` and `to_csv`; the first is that of the rows."""
        return tables.names_of(self)

    def table(self, name: str = ROWS) -> list[dict[str, Any]]:
        """The rows of one of its tables; OptionError for another name."""
        return tables.table(self, name)

    def frame(self, table: str = ROWS) -> DataFrame:
        """One of its tables as a pandas DataFrame; OptionError where pandas is not installed."""
        return tables.frame(self, table)

    def to_csv(self, table: str = ROWS) -> str:
        """One of its tables as CSV, numbers in full (see tables.py)."""
        return tables.to_csv(self, table)

    def to_latex(self, table: str | None = None, columns: Sequence[str] | None = None) -> str:
        """The table that papers print, or another one, for LaTeX with booktabs, intervals beside their numbers."""
        return tables.to_latex(self, table, columns)

    def to_json(self) -> dict[str, Any]:
        """The content of the file, with a checksum of all the rest at its end."""
        content: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        return {**content, _CHECKSUM: _checksum(content)}

    def save(self, path: Path) -> Path:
        """Write the file whole, in place of an existing one; OptionError where it does not fit its schema."""
        why = schema.why_not(self.kind, self.schema, self.columns, self.summary)
        if why:
            raise OptionError(f"{path}: not written ({why})")
        files.write_json(path, self.to_json())
        return path

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read a result; FileError where the file is something else, or not what was written."""
        if not path.is_file():
            raise FileError(f"{path}: no such file")
        return cls.of_json(files.read_json(path), path)

    @classmethod
    def of_json(cls, content: Mapping[str, Any], path: Path) -> Result:
        """The result whose file holds this; FileError, which names the file, as for `load`."""
        content = dict(content)
        if content.get("format") != FORMAT:
            raise FileError(f"{path}: not a result of lora-lab (its format is not {FORMAT!r})")
        checksum = content.pop(_CHECKSUM, None)
        if checksum is not None and checksum != _checksum(content):
            raise FileError(f"{path}: a damaged result (it does not agree with its own checksum)")
        content.setdefault("schema", 1)  # of results of version 0.1, which do not say
        why = _why_no_result(content) or schema.why_not(*(content[name] for name in _CHECKED))
        if why:
            raise FileError(f"{path}: a damaged result ({why})")
        return cls(**{each.name: content[each.name] for each in fields(cls)})


_CHECKSUM = "sha256"
_OBJECTS = ("columns", "parameters", "summary", "provenance")
_CHECKED = ("kind", "schema", "columns", "summary")


def _checksum(content: Mapping[str, Any]) -> str:
    """Of a result's content without itself; results of earlier versions have none."""
    try:
        text = json.dumps(content, sort_keys=True)
    except (ValueError, RecursionError):  # a number of too many digits, or nesting too deep to be ours
        return ""
    return hashlib.sha256(text.encode()).hexdigest()


def _why_no_result(content: Mapping[str, Any]) -> str | None:
    missing = [each.name for each in fields(Result) if each.name not in content]
    if missing:
        return f"without {shorten(missing)}"
    if not isinstance(content["kind"], str):
        return "its kind is no text"
    if type(content["schema"]) is not int or content["schema"] < 1:
        return "its schema is no version number"
    for name in _OBJECTS:
        if not isinstance(content[name], dict):
            return f"its {name} are no JSON object"
    wrong = [name for name, values in content["columns"].items() if not isinstance(values, list)]
    if wrong:
        return f"no list of values in column {shorten(wrong)}"
    lengths = {name: len(values) for name, values in content["columns"].items()}
    if len(set(lengths.values())) > 1:
        shortest, longest = min(lengths, key=lengths.__getitem__), max(lengths, key=lengths.__getitem__)
        return (
            f"its columns differ in length: {shortest} has {lengths[shortest]} values, {longest} has {lengths[longest]}"
        )
    return None


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as columns; the first row names them."""
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def grouped(rows: Iterable[Mapping[str, Any]], *names: str) -> list[tuple[dict[str, Any], list[Mapping[str, Any]]]]:
    """Rows that agree in the named columns: (these columns, the rows), in the order of their first."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return [(dict(zip(names, key, strict=True)), members) for key, members in groups.items()]


def by_adapter(results: Iterable[Result], **where: Any) -> list[list[dict[str, Any]]]:
    """The rows of every adapter of all results, those only whose columns equal the values given."""
    return [
        [dict(row) for row in members] for result in results for _, members in grouped(result.rows(**where), "adapter")
    ]


ALSO: ContextVar[Mapping[str, Any]] = ContextVar("ALSO", default=MappingProxyType({}))
"""What else is to be known of how the results came about that are made in this context, for their provenance."""


def provenance(
    *, inputs: Sequence[Path] = (), elapsed_s: float | None = None, examples: int | None = None, **more: Any
) -> dict[str, Any]:
    """Versions, commit, command, time, and hashes of the inputs: what a reader needs to run it again."""
    return {
        "versions": versions(),
        "commit": _commit(),
        "command": " ".join(["lora-lab", *sys.argv[1:]]) if Path(sys.argv[0]).name == "lora-lab" else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs": [{"path": path.name, "sha256": files.file_hash(path)} for path in inputs if path.exists()],
        "examples": examples,
        "elapsed_s": None if elapsed_s is None else round(elapsed_s, 3),
        **ALSO.get(),
        **more,
    }


def versions() -> dict[str, str | None]:
    """Python's version and those of the packages that numbers hang on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def fingerprint(content: object) -> str:
    """A short hash of anything JSON: equal content, equal fingerprint."""
    text = json.dumps(finite(content), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finite(value: Any) -> Any:
    """The value in JSON types, in a fixed order: NaN and infinities become None, sets sorted lists.

    Numpy's scalars and arrays become numbers and lists; enums, dtypes and all else their text.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(finite(item) for item in value)
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int) or type(value) is str:
        return value
    return str(getattr(value, "value", value))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, if it runs from one."""
    here = Path(__file__).parents[1]
    if not (here.parent / ".git").exists():
        return None
    try:
        found = subprocess.run(  # noqa: S603
            ["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
