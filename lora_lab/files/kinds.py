"""What a file is by its first bytes, whatever its name says."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

from lora_lab.errors import FileError

SAFETENSORS, TORCH = "safetensors", "torch"

_STARTS = {
    b"\x1f\x8b": "packed by gzip; unpack it first",
    b"7z\xbc\xaf'\x1c": "a 7z archive; unpack it first",
    b"Rar!": "a RAR archive; unpack it first",
    b"\xfd7zXZ\0": "packed by xz; unpack it first",
    b"BZh": "packed by bzip2; unpack it first",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it first",
    b"\x93NUMPY": "a numpy array; no adapter format is one",
    b"\x89HDF": "an HDF5 file (Keras?); no adapter format is one",
    b"\x89PNG": "a picture (PNG)",
    b"\xff\xd8\xff": "a picture (JPEG)",
    b"%PDF": "a PDF document",
    b"\x7fELF": "a program",
}
"""First bytes → what the file is, and what to do."""


def identified(path: Path) -> str:
    """SAFETENSORS or TORCH for a file that may be one of those, by its content and not its name.

    Raises FileError, saying what it is and what to do, for what is recognised as another kind; a file of which
    nothing is known is what its ending says, so that its reader tells how it is broken.
    """
    start = _start(path)
    if len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < 2**32:
        # before all others: the length that it begins with may look like anything
        return SAFETENSORS
    for signature, what in _STARTS.items():
        if start.startswith(signature):
            raise FileError(f"{path}: {what}; a safetensors or a torch file is needed")
    if start.startswith(b"GGUF"):
        raise FileError(f"{path}: {_gguf(path)}")
    if start[257:262] == b"ustar":
        raise FileError(f"{path}: a tar archive; unpack it first; a safetensors or a torch file is needed")
    if start.startswith(b"PK"):
        return _zip(path)
    if start.lstrip()[:1] in (b"{", b"["):
        raise FileError(f"{path}: JSON text, no tensors (an error message of a server?); download it again")
    if start.startswith((b"\x80", b"(dp")):
        return TORCH
    if path.suffix == ".safetensors":
        return SAFETENSORS
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return TORCH
    raise FileError(f"{path}: not an adapter; a PEFT folder, a .safetensors or a .bin file is needed")


def _start(path: Path) -> bytes:
    from lora_lab.files.disk import size_of

    size_of(path)  # no pipe is opened, and what cannot be read is told
    with path.open("rb") as file:
        return file.read(512)


def _gguf(path: Path) -> str:
    """A GGUF file's general.type says whether it is an adapter; it stands among the first of its fields."""
    with path.open("rb") as file:
        start = file.read(2**16)
    adapter = b"general.type" in start and b"adapter" in start[start.index(b"general.type") :][:64]
    what = "a LoRA in GGUF, llama.cpp's format" if adapter else "a whole model in GGUF, llama.cpp's format"
    return f"{what}, which is not read; the PEFT folder that it was converted from is needed"


def _zip(path: Path) -> str:
    """A torch file is a zip archive with a pickle in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return TORCH  # which tells how it is broken
    if any(name.endswith("data.pkl") for name in names):
        return TORCH
    inside = [name for name in names if name.endswith((".safetensors", ".bin"))]
    if any(name.endswith(".npy") for name in names):
        raise FileError(f"{path}: numpy arrays (npz); convert them to safetensors first")
    held = f" with {inside[0]} in it" if inside else ""
    raise FileError(f"{path}: a zip archive{held}; unpack it first")
