"""Tensors that are computed once of a base model and some examples, and kept in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_lab import files
from lora_lab.adapters.describe import tensor_digest
from lora_lab.errors import FileError, LoraLabWarning
from lora_lab.tasks.digests import cache

_CHECKSUM = "lora_lab.sha256"


def kept(key: Sequence[Any], inputs: Sequence[Tensor], make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives, computed once for this key and these tensors; later it comes from $XDG_CACHE_HOME/lora-lab.

    What is damaged there is made again, with a warning; a cache that cannot be written is none.
    """
    path = _place(key, inputs)
    found = _read(path) if path.exists() else None
    if found is None:
        found = make().contiguous()
        with contextlib.suppress(FileError, OSError):
            metadata = {"format": "pt", _CHECKSUM: tensor_digest([found])}
            files.write_safetensors(path, {"kept": found}, metadata)
    return found


def _place(key: Sequence[Any], inputs: Sequence[Tensor]) -> Path:
    told = repr([*key, tensor_digest(inputs)]).encode()
    return cache() / f"{hashlib.sha256(told).hexdigest()[:24]}.safetensors"


def _read(path: Path) -> Tensor | None:
    with contextlib.suppress(FileError, KeyError):
        tensors, metadata = files.read_safetensors(path)
        if metadata.get(_CHECKSUM) == tensor_digest([tensors["kept"]]):
            return tensors["kept"]
    warnings.warn(f"{path}: damaged; it is computed again", LoraLabWarning, stacklevel=4)
    return None
