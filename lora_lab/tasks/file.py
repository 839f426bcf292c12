"""What all kinds of tasks from a file share: their keys, and their base model with its tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from lora_lab.errors import TaskError
from lora_lab.files.confined import check_base
from lora_lab.files.trust import NEVER_RECORDED
from lora_lab.hub import DTYPES, cached_folder, check_memory, pretrained
from lora_lab.tasks.settings import Settings, read
from lora_lab.tasks.tables import TableTask


def names_code(path: Path) -> bool:
    """Whether this is a task file whose keys name a folder of code; what is no such file is told where it is read."""
    import tomllib

    try:
        return path.suffix == ".toml" and bool(tomllib.loads(path.read_text()).get("include"))
    except (OSError, ValueError, RecursionError):
        return False


_PADDED_LEFT = ("xlnet",)
"""Kinds of models that look for a text's meaning in its last place."""


class FileTask(TableTask):
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
        settings = read(cls.Keys, record, base, where)
        return cls(settings, Path(where).stem if where.endswith(".toml") else settings.name)

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

    @property
    def tokenizer_options(self) -> Mapping[str, Any]:
        """What the tokenizer is told besides its own settings."""
        return {}

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer, with a padding token."""
        from transformers import AutoTokenizer

        tokenizer = self.pretrained(AutoTokenizer, **self.tokenizer_options)
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
