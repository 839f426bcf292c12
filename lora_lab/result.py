"""What a command found out: numbers with their provenance, as one JSON file; and the journal of a run under way."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora_lab import files
from lora_lab.errors import FileError

FORMAT = "lora-lab result 1"
_PACKAGES = ("lora-lab", "torch", "transformers", "peft", "numpy", "scipy")


@dataclass(frozen=True)
class Result:
    """One table with what it was made from. JSON types only; a number that is not finite is written as null.

    `columns` are tidy: name → values, all of one length. `summary` holds what is said of the table as a whole
    (barriers, means); shares are fractions, losses nats.
    """

    kind: str
    columns: Mapping[str, Sequence[Any]]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, **where: Any) -> list[dict[str, Any]]:
        """The table's rows as dictionaries, those only whose columns equal the values given."""
        names = list(self.columns)
        rows = [dict(zip(names, row, strict=True)) for row in zip(*self.columns.values(), strict=True)]
        return [row for row in rows if all(row[name] == value for name, value in where.items())]

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        content: dict[str, Any] = finite({"format": FORMAT, **asdict(self)})
        return content

    def save(self, path: Path) -> Path:
        """Write the file, whole or not at all; an existing one is replaced."""
        files.write_json(path, self.to_json())
        return path

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read a result; FileError where the file is something else."""
        if not path.is_file():
            raise FileError(f"{path}: no such file")
        content = files.read_json(path)
        if content.get("format") != FORMAT:
            raise FileError(f"{path}: not a result of lora-lab (its format is not {FORMAT!r})")
        try:
            result = cls(**{name: content[name] for name in ("kind", "columns", "parameters", "summary", "provenance")})
            lengths = {len(values) for values in result.columns.values()}
        except (KeyError, TypeError, AttributeError) as error:
            raise FileError(f"{path}: a damaged result ({error} is missing or of the wrong type)") from error
        if len(lengths) > 1:
            raise FileError(f"{path}: a damaged result (its columns differ in length)")
        return result


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
        **more,
    }


def versions() -> dict[str, str | None]:
    """Python's version and those of the packages that numbers hang on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def fingerprint(content: object) -> str:
    """A short hash of anything JSON: equal content, equal fingerprint."""
    text = json.dumps(finite(content), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Journal:
    """Finished pieces of a run, one JSON line each, so that a killed run loses at most the piece in flight.

    A journal belongs to one `run` (a fingerprint of inputs and options): another run's journal is not taken over.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path, self._run = path, run
        self._done: dict[str, Any] = {}
        self._begun = path.exists() and self._read(run)

    def __len__(self) -> int:
        return len(self._done)

    def __contains__(self, key: str) -> bool:
        return key in self._done

    def __getitem__(self, key: str) -> Any:
        return self._done[key]

    def add(self, key: str, value: Any) -> None:
        """Append a finished piece; it is on disk when this returns."""
        self._done[key] = value
        if not self._begun:  # a run that is refused before its first piece leaves nothing behind
            files.write_bytes(self.path, (json.dumps({"run": self._run}) + "\n").encode())
            self._begun = True
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"run": self._run, "key": key, "value": value}, allow_nan=False) + "\n")
        except OSError as error:
            raise FileError(f"{self.path}: cannot be written ({error.strerror})") from error

    def close(self) -> None:
        """The run is complete and saved elsewhere: remove the journal."""
        self.path.unlink(missing_ok=True)

    def _read(self, run: str) -> bool:
        with self.path.open(errors="replace") as file:
            lines = file.read().split("\n")
        try:
            if json.loads(lines[0]).get("run") != run:
                return False
        except (json.JSONDecodeError, AttributeError):
            return False
        whole = [lines[0]]
        for line in lines[1:]:
            try:
                entry = json.loads(line)
                if entry["run"] != run:  # another run that shares the folder
                    continue
                self._done[entry["key"]] = entry["value"]
            except (json.JSONDecodeError, KeyError, TypeError):
                break  # cut off in mid-line when the run was killed
            whole.append(line)
        if len(whole) + 1 < len(lines) or lines[-1]:
            files.write_bytes(self.path, ("\n".join(whole) + "\n").encode())
        return True


def finite(value: Any) -> Any:
    """The value in JSON types; NaN and infinities become None, numpy scalars plain numbers."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, if it runs from one."""
    here = Path(__file__).parent
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
