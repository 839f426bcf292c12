"""Whether this program wrote what stands at a place: nothing else is ever replaced."""

from __future__ import annotations

import json
import os
import re
import stat
import struct
from pathlib import Path

from lora_lab.errors import FileError, shorten

MARK = "lora-lab"
"""What figures, results, journals, tables and model cards carry to be known by."""

JOURNAL = "lora_lab_journal_3"
"""The table of a journal, which no other database has; the number counts its versions."""

FUSED = "lora-lab fused"
"""How the format of a record begins that lists the files of a fused checkpoint; the number counts its versions."""

METADATA = "lora_lab."
"""How the keys begin that its safetensors files have among their metadata."""

RECORDED = f"{METADATA}recorded"
"""Among the metadata of a file that was trained elsewhere, and only given a record: it is not this program's."""

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
_WEIGHTS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapters.safetensors")
"""What adapters are called in their folders, by the formats that are written."""
_ADAPTER_FILES = {"adapter_config.json", *_WEIGHTS, "README.md", "heads"}
_JSON = re.compile(rb'\s*\{\s*"format":\s*"lora-lab (result|journal|fused|run) \d+"')
_CSV = re.compile(rb"\A[^\n]*," + MARK.encode() + rb"\n")
_CARD = re.compile(rb"\A---\n(?:(?!---).*\n)*?tags:[^\n]*(?:\n- [^\n]*)*\blora-lab\b")
_PAGE = re.compile(
    rb'\A<!doctype html>\n<html[^>\n]*>\n<head>\n<meta charset="utf-8">\n<meta name="generator" content="lora-lab">'
)
_OF_FIGURE = re.compile(
    rb'\A(# lora-lab figure script\n|% lora-lab (?:caption|figure)\n|\{\s*"metadata":\s*\{\s*"lora-lab": "figure)'
)
_PLENTY = 100_000_000  # bytes of a safetensors header, as in safetensors itself
_PART = 65_536  # bytes from either end of a file, where marks are


def foreign(path: Path) -> str | None:
    """What stands at a place, in words, if it must not be replaced; None for nothing, an empty file or folder, our own.

    A link is judged by where it leads.
    """
    status = status_of(path)
    if status is None:
        return None
    if stat.S_ISLNK(status.st_mode):
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):  # RuntimeError: a circle, before Python 3.13
            return "a link to nothing"
        reason = foreign(target)
        return reason and f"a link to {target}, {reason}"
    for is_kind, name in _KINDS:
        if is_kind(status.st_mode):
            return name
    try:
        if stat.S_ISDIR(status.st_mode):
            return _foreign_folder(path)
        return None if status.st_size == 0 or _written_here(path) else "not written by lora-lab"
    except OSError as error:
        return f"which cannot be read ({error.strerror})"


def status_of(path: Path) -> os.stat_result | None:
    """What the file system says of a place, links not followed; None for nothing, FileError for no possible place."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise FileError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error


def _foreign_folder(folder: Path) -> str | None:
    entries = sorted(folder.iterdir())
    listed = _files_of_checkpoint(folder)
    if listed is not None:
        odd = [entry.name for entry in entries if entry.name not in listed or not stat.S_ISREG(entry.lstat().st_mode)]
        return f"holds more than the checkpoint that was written there ({shorten(odd)})" if odd else None
    inner = [entry for entry in entries if _of_component(entry)]
    odd = [entry.name for entry in entries if entry.name not in _ADAPTER_FILES and entry not in inner]
    if odd:
        return f"holds more than an adapter ({shorten(odd)})"
    other = [entry.name for entry in entries if entry not in inner and not _part_of_adapter(entry)]
    return f"holds what lora-lab did not write ({shorten(other)})" if other else None


def _files_of_checkpoint(folder: Path) -> list[str] | None:
    """The files that the record of a fused checkpoint lists; None where there is no such record."""
    record = folder / "fuse.json"
    try:
        if not stat.S_ISREG(record.lstat().st_mode) or not _written_here(record):
            return None
        said = json.loads(record.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    listed = said.get("files") if isinstance(said, dict) else None
    return listed if isinstance(listed, list) else None


def _of_component(entry: Path) -> bool:
    """Whether it is a folder with an adapter of ours, as one for each model of a pipeline."""
    weights = [entry / name for name in _WEIGHTS]
    return (
        stat.S_ISDIR(entry.lstat().st_mode)
        and any(path.is_file() for path in weights)
        and all(inner.name in _ADAPTER_FILES and _part_of_adapter(inner) for inner in entry.iterdir())
    )


def _part_of_adapter(entry: Path) -> bool:
    mode = entry.lstat().st_mode
    if entry.name == "heads":
        return stat.S_ISDIR(mode) and all(head.suffix == ".safetensors" and _regular(head) for head in entry.iterdir())
    if entry.name == "adapter_config.json" and any(entry.with_name(name).exists() for name in _WEIGHTS):
        return stat.S_ISREG(mode)  # it has no mark of its own: PEFT reads it
    return _regular(entry)


def _regular(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and (status.st_size == 0 or _written_here(path))


def _written_here(path: Path) -> bool:
    """Whether a regular file carries one of the marks, by its content alone."""
    with path.open("rb") as file:
        start = file.read(_PART)
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - _PART))
        end = file.read()
    mark = MARK.encode()
    if start.startswith(b"%PDF"):
        return b"/Creator (" + mark + b")" in start + end
    if start.startswith(b"\x89PNG"):
        return b"Software\0" + mark in start
    if start.startswith((b"<?xml", b"<svg")):
        return b"<dc:title>" + mark + b"</dc:title>" in start
    if start.startswith(b"\\begin{tabular}"):
        return end.rstrip().rpartition(b"\n")[2].startswith(b"% " + mark)
    if start.startswith(b"SQLite format 3\0"):
        return JOURNAL.encode() in start
    return any(pattern.match(start) for pattern in (_JSON, _CARD, _CSV, _PAGE, _OF_FIGURE)) or _of_safetensors(
        path, start
    )


def _of_safetensors(path: Path, start: bytes) -> bool:
    length = struct.unpack("<Q", start[:8])[0] if len(start) > 8 else 0
    if start[8:9] != b"{" or length > _PLENTY:
        return False
    with path.open("rb") as file:
        file.seek(8)
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            return False
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or RECORDED in metadata:
        return False
    return any(str(key).startswith(METADATA) for key in metadata)
