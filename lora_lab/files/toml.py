"""TOML files: whole or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_lab.errors import FileError

FOLDER_FILE = "lora-lab.toml"
"""In a folder of adapters, or the current one: `task = "my-task.toml"`, and defaults of options."""

_LARGEST = 2**20
"""Bytes of a file."""


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The content of a TOML file; FileError names what is wrong with it, `what` says what it should be."""
    import tomllib

    from lora_lab.files.disk import size_of  # which loads torch

    try:
        if path.exists() and size_of(path) > _LARGEST:
            raise FileError(f"{path}: {size_of(path)} bytes; {what} has at most {_LARGEST}")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileError(f"{path}: no such {what.partition(' ')[2]}") from error
    except FileError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no TOML, a number of 5,000 digits
        raise FileError(f"{path}: not a TOML file ({error})") from error
