"""What a merge has made so far: in memory while it is little, then beside the output, where a later run finds it."""

from __future__ import annotations

import contextlib
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab import files
from lora_lab.errors import LoraLabNote
from lora_lab.files.resuming import Shards, unfinished
from lora_lab.merging.methods import MERGES
from lora_lab.results.result import fingerprint, versions
from lora_lab.tasks.digests import of_entries, of_transforms

if TYPE_CHECKING:
    from torch import Tensor

    from lora_lab.merging.sources import Sources

MOST = 2**29
"""Bytes in memory, of merged modules, that are put on the disk."""
_SECONDS = 5.0
"""After which what is in memory is put there, so that no more is lost by a kill."""


class Spool:
    """Merged modules by name: what was told of each, and its tensors.

    Without shards to put them in, all stay in memory.
    """

    def __init__(self, shards: Shards | None = None) -> None:
        self._shards = shards
        self.told: dict[str, Any] = {}
        """Module → what `add` was told."""
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._waiting: dict[str, int] = {}
        """Module → bytes of its tensors, of those in memory that are to be put on the disk."""
        self._since = time.monotonic()
        for name, entry in (shards.done if shards else {}).items():
            self._read(name, entry)

    def __contains__(self, name: object) -> bool:
        return name in self.told

    def __len__(self) -> int:
        return len(self.told)

    def tensors(self, name: str) -> Mapping[str, Tensor]:
        """A module's tensors by their keys, in memory or to be read."""
        return self._tensors[name]

    def add(self, name: str, told: Any, tensors: Mapping[str, Tensor]) -> None:
        """Take a module; `told` (JSON types) comes back from a later run's."""
        self.told[name], self._tensors[name] = told, dict(tensors)
        if self._shards is None:
            return
        self._waiting[name] = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        if sum(self._waiting.values()) > MOST or time.monotonic() - self._since > _SECONDS:
            self._put(self._shards)

    def _put(self, shards: Shards) -> None:
        shards.begin()
        number = 1 + max((int(Path(name).stem) for name in shards.done), default=0)  # some may have been damaged
        file = f"{number:06}.safetensors"
        tensors = {key: tensor for name in self._waiting for key, tensor in self._tensors[name].items()}
        files.write_safetensors(shards.folder / file, tensors, {})
        keys = {name: [self.told[name], list(self._tensors[name])] for name in self._waiting}
        shards.finish(file, keys)
        self._read(file, keys)
        self._waiting, self._since = {}, time.monotonic()

    def _read(self, file: str, modules: Mapping[str, Any]) -> None:
        assert self._shards is not None
        stored = files.LazyTensors(self._shards.folder / file).unread(held=False)
        for name, (told, keys) in modules.items():
            self.told[name], self._tensors[name] = told, {key: stored[key] for key in keys}


@contextlib.contextmanager
def spooled(
    path: Path, sources: Sources, method: str, options: Mapping[str, Any], settings: Mapping[str, Any]
) -> Iterator[Spool]:
    """What a merge that is to be written to `path` has made so far; all gone when the block ends.

    After an error or a kill it stays beside `path`, for the next run of the same method, options, settings (fields of
    MergeOptions), weights, adapters and code. Where data or a base model decide, too, nothing is found again.
    """
    with unfinished(path, partial(_key, sources, method, options, settings)) as shards:
        spool = Spool(shards)
        if spool.told:
            shown = f"{len(spool)} of {len(sources.modules)} modules are merged already, by a run that was ended before"
            warnings.warn(f"{path}: {shown}; it goes on from there", LoraLabNote, stacklevel=3)
        yield spool


def _key(sources: Sources, method: str, options: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """What the modules of a run that was killed must have been made for."""
    if MERGES[method].reads_data or sources.needs_base:
        return secrets.token_hex()
    adapters = [
        [list(adapter.digest), adapter.config, {name: repr(site) for name, site in adapter.sites.items()}]
        for adapter in sources.adapters
    ]
    code = of_transforms(), of_entries(), versions()
    weights = sources.weights.record
    return fingerprint([adapters, method, options, settings, weights, str(sources.device), code])
