"""Adapters written to files, in any format that can be written, with their record and its signature in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_lab import files
from lora_lab.adapters.formats.layout import Format, Part, Writable
from lora_lab.adapters.formats.registry import FORMATS
from lora_lab.errors import OptionError, TunerError, shorten
from lora_lab.files import trust
from lora_lab.results.result import finite

CONFIG_KEY = "lora_lab.config"
RECORD_KEY = "lora_lab.record"
SIGNATURE_KEY = "lora_lab.signature"


def write_adapter(
    path: Path, format_name: str, adapter: Writable, record: Mapping[str, Any], *, own: bool
) -> list[str]:
    """Write an adapter as one file, where `path` ends in .safetensors, or as a folder; what had to be changed for it.

    `own` signs the record (JSON types) with the user's key.
    """
    form = check_place(path, format_name)
    lone = path.suffix == ".safetensors"
    assert form.write is not None
    parts = form.write(adapter)
    if lone and set(parts) != {""}:
        raise OptionError(
            f"{path}: {format_name} needs a file for each model of {shorten(sorted(parts))}; a name without an ending "
            "is needed, for a folder"
        )
    notes = list(dict.fromkeys(note for part in parts.values() for note in part.notes))
    if lone:
        _write_part(path, parts[""], form, record, own=own, lone=True)
        return notes
    with files.replacing(path) as folder:
        for inner, part in parts.items():
            (folder / inner).mkdir(parents=True)
            _write_part(folder / inner / str(form.file), part, form, record, own=own, lone=False)
    return notes


def check_place(path: Path, format_name: str) -> Format:
    """The format, if it can be written to such a path; else TunerError or OptionError."""
    form = FORMATS[format_name]
    if form.write is None:
        writable = [name for name, entry in FORMATS.items() if entry.write]
        raise TunerError(f"{format_name} is only read; what can be written is {shorten(writable, 12)}")
    if form.file is None and path.suffix != ".safetensors":
        raise OptionError(f"{path}: {format_name} is a format of lone files; NAME.safetensors is needed")
    return form


def signed(settings: Mapping[str, Any] | None, header: Mapping[str, str]) -> Mapping[str, Any] | None:
    """What a signature covers besides record and tensors: the configuration, or the header of a format without one."""
    if settings is not None:
        return settings
    own = (CONFIG_KEY, RECORD_KEY, SIGNATURE_KEY, "format")
    return {key: header[key] for key in sorted(header) if key not in own} or None  # a file keeps no order of them


def _write_part(path: Path, part: Part, form: Format, record: Mapping[str, Any], *, own: bool, lone: bool) -> None:
    settings = None if part.settings is None else finite(part.settings)
    header = {"format": "pt", **part.header}
    signature = trust.sign(record, part.tensors, signed(settings, header)) if own else None
    header[RECORD_KEY] = json.dumps(record)
    if signature is not None:
        header[SIGNATURE_KEY] = signature
    text = json.dumps(settings, indent=2)  # unsorted: of PEFT's patterns, the first match counts
    if settings is not None and lone:
        header[CONFIG_KEY] = text
    files.write_safetensors(path, part.tensors, header)
    if settings is not None and not lone:
        files.write_bytes(path.with_name(str(form.settings)), text.encode() + b"\n")
