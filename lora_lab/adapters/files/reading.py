"""Adapters read from files, as far as they can be read, with everything that is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_lab import files
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files.writing import CONFIG_KEY, RECORD_KEY, SIGNATURE_KEY, signed
from lora_lab.adapters.formats.diffusion.components import TOGETHER, joined
from lora_lab.adapters.formats.keys import PREFIX
from lora_lab.adapters.formats.layout import Layout, Raw
from lora_lab.adapters.formats.lookup import Location, locate
from lora_lab.adapters.formats.peft.peft_format import parse
from lora_lab.adapters.formats.registry import FORMATS, PEFT, recognised
from lora_lab.adapters.formats.sites import Parsed
from lora_lab.errors import FileError
from lora_lab.files import trust
from lora_lab.options import checked

_LARGEST_CONFIG = 2**23
_AT_ONCE = 2**25
"""Bytes of a file that is read whole, since games and plots ask for its tensors over and over; of a larger one, a
tensor is read whenever an operation needs it."""


@dataclass(frozen=True)
class Listing:
    """What `inspect` found: the adapter as far as it could be read, and everything wrong with it."""

    adapter: Adapter
    format: str
    warnings: list[str]
    problems: list[str]


@checked
def inspect(
    path: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    alpha: float | None = None,
    adapter_name: str | None = None,
) -> Listing:
    """Read an adapter as far as it can be read; only missing and broken files raise (FileError)."""
    location = locate(path)
    if location.components:
        parts = {
            name: _read(part, str(path), config, alpha, adapter_name) for name, part in location.components.items()
        }
        return _together(parts, str(path))
    return _read(location, str(path), config, alpha, adapter_name)


def _read(
    location: Location,
    source: str,
    config: str | os.PathLike[str] | None,
    alpha: float | None,
    adapter_name: str | None,
) -> Listing:
    header: dict[str, str] = {}
    if location.safetensors:
        stored = files.LazyTensors(location.weights)
        tensors, header = dict(stored) if stored.bytes <= _AT_ONCE else stored.unread(), stored.metadata
    else:
        tensors = files.read_bin(location.weights)
    settings = find_config(location, config, header)
    raw = Raw(tensors, header, settings, alpha, adapter_name)
    name = recognised(raw)
    content = FORMATS[name].read(raw)
    record = record_in(header)
    own = bool(record) and trust.is_own(header.get(SIGNATURE_KEY), record, tensors, signed(settings, header))
    where = str(location.weights)
    form = location.format if name == PEFT else name
    problems = [f"{where}: {problem}" for problem in content.problems]
    notes = [*location.notes, *content.notes]
    parsed = Parsed() if problems else parse(content.tensors, content.config, where, adapter_name)
    adapter = Adapter(
        parsed.tensors,
        content.config,
        parsed.sites,
        trust.well_formed(record),
        source,
        trust.Origin(own, str(location.weights.parent.resolve())),
        content.layout,
    )
    return Listing(adapter, form, [*notes, *parsed.warnings], problems + parsed.problems)


def _together(parts: Mapping[str, Listing], source: str) -> Listing:
    """One adapter out of those of a pipeline's components, whose modules' names begin with the component's."""
    adapters = {part: listing.adapter for part, listing in parts.items()}
    tensors = {
        f"{PREFIX}{part}.{key.removeprefix(PREFIX)}": tensor
        for part, adapter in adapters.items()
        for key, tensor in adapter.tensors.items()
    }
    sites = {}
    for part, adapter in adapters.items():
        for site in adapter.sites.values():
            keys = {role: f"{PREFIX}{part}.{key.removeprefix(PREFIX)}" for role, key in site.keys.items()}
            sites[f"{part}.{site.name}"] = replace(site, name=f"{part}.{site.name}", keys=keys)
    problems = [problem for listing in parts.values() for problem in listing.problems]
    configs = {part: adapter.config for part, adapter in adapters.items()}
    config, more = ({}, []) if problems else joined(configs, {part: a.sites for part, a in adapters.items()})
    first, *others = adapters.values()
    record = first.record if all(other.record == first.record for other in others) else {}
    return Listing(
        Adapter(
            tensors,
            config,
            sites,
            record,
            source,
            trust.Origin(
                all(adapter.origin.own for adapter in adapters.values()),
                str(Path(first.origin.folder or source).parent),
            ),
            Layout(names=TOGETHER),
        ),
        next(iter(parts.values())).format,
        [f"{part}: {note}" for part, listing in parts.items() for note in listing.warnings],
        problems + [f"{source}: {problem}" for problem in more],
    )


def find_config(
    location: Location, given: str | os.PathLike[str] | None, metadata: Mapping[str, str]
) -> dict[str, Any] | None:
    """The configuration: given, beside the weights, or in their header; None where there is none."""
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


def record_in(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The record in a header; nothing for one that is no JSON object."""
    try:
        content = files.parse_json(metadata.get(RECORD_KEY, "{}"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
