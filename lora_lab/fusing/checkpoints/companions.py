"""The files beside a checkpoint's weights: copied, with a configuration that says what the weights have become."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_lab import files
from lora_lab.errors import FileError
from lora_lab.files.trust import is_inside

_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".tflite",
    ".index.json",
)
_ABOUT_THE_BASE = ("readme.md", "adapter_config.json", "trainer_state.json", "training_args.bin", "fuse.json")
_LARGEST = 2**28
"""Bytes of a tokenizer: a file beyond is weights of some kind."""


def copied(base: Path, folder: Path, settings: Mapping[str, Any] | None) -> list[str]:
    """Copy the base's configuration, tokenizer and licence into the folder; their names.

    Weights of other formats and the base's card stay behind. `settings` replace the content of config.json.
    """
    names = []
    for path in sorted(base.iterdir()) if base.is_dir() else ():
        name = path.name.lower()
        if name.startswith(".") or name.endswith(_WEIGHTS) or name in _ABOUT_THE_BASE or not path.is_file():
            continue
        if path.stat().st_size > _LARGEST or not is_inside(path, str(base)):
            continue
        try:
            shutil.copyfile(path, folder / path.name)
        except OSError as error:
            raise FileError(f"{folder}: {path.name} cannot be copied ({error.strerror})") from error
        names.append(path.name)
    if settings is not None:
        files.write_bytes(folder / "config.json", (json.dumps(settings, indent=2) + "\n").encode())
    return names


def adapted(
    base: Path, *, untied: bool, vocabulary: int | None, architecture: str | None, labels: int | None
) -> dict[str, Any] | None:
    """The base's config.json with what is no longer so; None where it stays as it is, or where there is none.

    untied: input and output embeddings are two. vocabulary: rows of both. architecture and labels: the class that has
    the head, and the head's rows.
    """
    path = base / "config.json"
    if not base.is_dir() or not path.exists():
        return None
    settings = files.read_json(path)
    before = json.dumps(settings)
    parts = [settings, *(part for part in settings.values() if isinstance(part, dict))]
    if untied:
        for part in parts:
            if part is settings or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    if vocabulary is not None:
        for part in parts:
            if "vocab_size" in part:
                part["vocab_size"] = vocabulary
    if architecture is not None:
        settings["architectures"] = [architecture]
    if labels is not None:
        settings["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        settings["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    return settings if json.dumps(settings) != before else None


def require_space(folder: Path, size: int) -> None:
    """FileError where a file system has not so many bytes free."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    free = shutil.disk_usage(there).free
    if size > free:
        raise FileError(f"{folder}: {size / 1e9:.1f} GB are needed there, and {free / 1e9:.1f} GB are free")
