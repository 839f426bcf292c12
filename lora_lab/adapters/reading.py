"""Adapters read from files, as far as they can be read, with everything that is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lab import files
from lora_lab.adapters.adapter import CONFIG_KEY, RECORD_KEY, SIGNATURE_KEY, Adapter
from lora_lab.adapters.formats import peft_config, peft_format
from lora_lab.adapters.formats.lookup import Location, locate
from lora_lab.adapters.formats.sites import Parsed
from lora_lab.errors import AdapterError, FileError
from lora_lab.files import trust

_LARGEST_CONFIG = 2**23


@dataclass(frozen=True)
class Listing:
    """What `inspect` found: the adapter as far as it could be read, and everything wrong with it."""

    adapter: Adapter
    format: str
    warnings: list[str]
    problems: list[str]


def inspect(
    path: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    alpha: float | None = None,
    adapter_name: str | None = None,
) -> Listing:
    """Read an adapter as far as it can be read; only missing and broken files raise (FileError)."""
    location = locate(path)
    raw_metadata: dict[str, str] = {}
    if location.weights.suffix == ".safetensors":
        tensors, raw_metadata = files.read_safetensors(location.weights)
        if "lora_adapter_metadata" in raw_metadata:
            raise FileError(f"{location.weights}: a diffusers file (its header says so); PEFT's format is needed")
    else:
        tensors = files.read_bin(location.weights)
    settings = _find_config(location, config, raw_metadata)
    record = _record(raw_metadata)
    own = bool(record) and trust.is_own(raw_metadata.get(SIGNATURE_KEY), record, tensors, settings)
    notes: list[str] = []
    if settings is None:
        settings, notes = peft_config.assumed_config(tensors, alpha, adapter_name)
    elif alpha is not None and settings.get("lora_alpha") is None:
        settings["lora_alpha"] = alpha
    elif alpha is not None and settings["lora_alpha"] != alpha:
        notes = [f"alpha {alpha:g} is not used, the config says {settings['lora_alpha']!r}"]
    try:
        settings, more = peft_config.complete_config(settings, tensors, adapter_name)
    except AdapterError as error:
        empty = Adapter({}, settings, {}, trust.well_formed(record), str(path))
        return Listing(empty, location.format, location.notes, [f"{location.weights}: {error}"])
    parsed: Parsed = peft_format.parse(tensors, settings, str(location.weights), adapter_name)
    origin = trust.Origin(own, str(location.weights.parent.resolve()))
    adapter = Adapter(parsed.tensors, settings, parsed.sites, trust.well_formed(record), str(path), origin)
    notes = [*location.notes, *notes, *more, *parsed.warnings]
    return Listing(adapter, location.format, notes, parsed.problems)


def _find_config(
    location: Location, given: str | os.PathLike[str] | None, metadata: Mapping[str, str]
) -> dict[str, Any] | None:
    if given is not None:
        path = Path(given).expanduser()
        return files.read_json(path / "adapter_config.json" if path.is_dir() else path, largest=_LARGEST_CONFIG)
    neighbour = location.weights.parent / "adapter_config.json"
    in_header = CONFIG_KEY in metadata
    if neighbour.exists() and not (in_header and location.folder is None):
        return files.read_json(neighbour, largest=_LARGEST_CONFIG)
    return _header_json(location.weights, CONFIG_KEY, metadata) if in_header else None


def _header_json(path: Path, key: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        content = files.parse_json(metadata[key])
    except ValueError as error:
        raise FileError(f"{path}: {key} in its header is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise FileError(f"{path}: {key} in its header is not a JSON object")
    return content


def _record(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        content = files.parse_json(metadata.get(RECORD_KEY, "{}"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
