"""Files as they lie on disk: whole or refused when read, whole or absent when written."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import operator
import os
import pickle
import pickletools
import stat
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lora_lab.errors import FileError
from lora_lab.files.ownership import foreign, status_of
from lora_lab.files.workplace import replacing as replacing

if TYPE_CHECKING:
    from torch import Tensor


_LONGEST_HEADER = 2**25
"""Bytes of a safetensors header: a quarter of a million tensors have half of that."""
_CHUNK = 2**20
_DEEPEST = 100
"""Levels of JSON: what is written here has a dozen, and what is read is walked through by calls within calls."""


def read_json(path: Path, *, largest: int | None = None) -> dict[str, Any]:
    """A JSON object; FileError names what stands there instead (LFS pointer, web page, nothing, a list …).

    `largest` bounds the file's size in bytes, since what is parsed takes up to thirty times its memory.
    """
    size = size_of(path)
    if largest is not None and size > largest:
        raise FileError(f"{path}: {size} bytes; at most {largest} are read of such a file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not JSON but binary data") from error
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from error
    _refuse_placeholder(path, text.encode()[:200])
    if not text.strip():
        raise FileError(f"{path}: empty; a JSON object belongs here")
    try:
        content = parse_json(text)
    except ValueError as error:
        raise FileError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise FileError(f"{path}: a JSON {type(content).__name__}; an object {{…}} belongs here")
    return content


def parse_json(text: str) -> Any:
    """The value that a JSON text holds; ValueError for one that is none, or nests deeper than anything walks into."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {_DEEPEST} levels") from error
    level = [value]
    for _ in range(_DEEPEST):
        inner = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list)]
        level = [part for parts in inner for part in parts]
        if not level:
            return value
    raise ValueError(f"nested deeper than {_DEEPEST} levels")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header metadata of a safetensors file; FileError says how it is broken."""
    _, _, metadata = _checked_size(path)
    require_memory(path, size_of(path))
    with _opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    _check_tensors(path, tensors)
    return tensors, metadata


def checked_header(path: Path) -> tuple[dict[str, Any], int, dict[str, str]]:
    """What a sound safetensors file says of its tensors, where their data begins in bytes, and its metadata.

    As sound as what `read_safetensors` takes: every tensor's bytes are there, without gap or overlap.
    """
    header, length, metadata = _checked_size(path)
    with _opened(path):  # which checks all offsets and shapes
        return header, 8 + length, metadata


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        if "allocate memory" in str(error):
            raise FileError(f"{path}: {size_of(path) / 1e9:.4g} GB, for which there is no memory") from error
        raise FileError(f"{path}: not a sound safetensors file ({_brief(error)})") from error


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and its length in bytes; the tensors stay unread."""
    size = size_of(path)
    with path.open("rb") as file:
        start = file.read(8)
        if size == 0:
            raise FileError(f"{path}: empty (0 bytes); the download or the save was incomplete")
        _refuse_placeholder(path, start + file.read(192))
        file.seek(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or (length > size - 8 and (size <= 8 or length < 2**32)):
            needed = "more" if length is None else f"{length + 8} or more"
            raise FileError(f"{path}: truncated or incomplete: {size} bytes, its header alone needs {needed}")
        if length > size - 8:
            raise FileError(f"{path}: not a safetensors file")
        if length > _LONGEST_HEADER:
            raise FileError(f"{path}: a header of {length} bytes; at most {_LONGEST_HEADER} are read")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise FileError(f"{path}: not a safetensors file (its header is not JSON)") from error
    if not isinstance(header, dict):
        raise FileError(f"{path}: not a safetensors file (its header is not a JSON object)")
    return header, int(length)


def read_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, read with weights_only, so that nothing in it is executed."""
    import torch

    size = size_of(path)
    if size == 0:
        raise FileError(f"{path}: empty (0 bytes); the download or the save was incomplete")
    require_memory(path, size)
    with path.open("rb") as file:
        _refuse_placeholder(path, file.read(200))
    _check_torch_file(path, size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch on pickle protocols, which nobody here can change
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FileError(
            f"{path}: refused: it holds more than tensors (or is no torch file), and reading it could run code; "
            "a .safetensors file of the same adapter is needed"
        ) from error
    except Exception as error:  # whatever bytes make of torch's unpickler, struct.error among it
        raise FileError(f"{path}: truncated or incomplete, or no torch file ({_brief(error)})") from error
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise FileError(f"{path}: not a dictionary of tensors")
    tensors = {str(key): value.detach() for key, value in content.items()}
    _check_tensors(path, tensors)
    total = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    if total > 2 * size:  # twice, since tied weights share their storage
        raise FileError(f"{path}: refused: its tensors are views of {total} bytes, in a file of {size}")
    return tensors


def write_json(path: Path, content: object) -> None:
    """Write strict JSON (no NaN) beside its place, then rename; what is no text in a name is escaped."""
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write beside `path`, sync, rename; on any failure or interrupt nothing is left behind."""
    with replacing(path) as beside, beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def refuse_existing(*paths: Path, force: bool, inputs: Iterable[Path] = ()) -> None:
    """FileError if one of the outputs is there already and `force` does not allow to replace it, or cannot be written.

    What this program did not write is refused in any case, and so are the `inputs` that the outputs are made from.
    """
    for path in paths:
        if any(_same(path, given) for given in inputs):
            raise FileError(f"{path}: one of the inputs; the output needs another name")
        if status_of(path) is None:
            _refuse_unwritable(path)
            continue
        reason = foreign(path)
        if not force:
            raise FileError(f"{path}: exists already" + (f" ({reason})" if reason else "; `force` replaces it"))
        if reason:
            raise FileError(f"{path}: {reason}, not replaced")
        _refuse_unwritable(path)


def _same(output: Path, given: Path) -> bool:
    """Whether they are one file or folder, or the output a folder that the other lies in."""
    if not os.path.lexists(output):
        return False
    target, lies = (Path(os.path.realpath(path)) for path in (output, given))
    return target == lies or target in lies.parents


def _refuse_unwritable(path: Path) -> None:
    """Told before the work, and not after it; where it cannot be known, writing will tell."""
    parent = Path(os.path.realpath(path)).parent
    while not os.path.lexists(parent) and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise FileError(f"{path}: cannot be written ({parent} is not a folder)")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise FileError(f"{path}: cannot be written (no permission to write in {parent})")


def file_hash(path: Path) -> str:
    """The first 16 hex digits of a file's SHA-256; of a folder, of the names and contents of its files, sorted."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    try:
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            if path.is_dir():
                digest.update(file.name.encode())
            with file.open("rb", buffering=0) as stream:
                while read := stream.readinto(buffer):
                    digest.update(memoryview(buffer)[:read])
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()[:16]


def require_memory(path: Path, size: int, what: str = "") -> None:
    """FileError for more bytes than this machine has memory, so that they cannot be read at all."""
    there = _memory()
    if size > there:
        raise FileError(
            f"{path}: {what}{size / 1e9:.4g} GB, and this machine has {there / 1e9:.4g} GB of memory: it cannot be read"
        )


@functools.cache
def _memory() -> int:
    """Bytes of memory of this machine, with what it may move to a disk."""
    import psutil

    return int(psutil.virtual_memory().total + psutil.swap_memory().total)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a name twice in one object")
    return members


def _check_torch_file(path: Path, size: int) -> None:
    """Refuse what would take more memory than the file before torch reads it: packed parts, and calls for space."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                parts = archive.infolist()
                packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
                if packed or sum(part.file_size for part in parts) > size:
                    raise FileError(f"{path}: refused: its parts are packed, which torch never does")
                for part in parts:
                    if part.filename.endswith("data.pkl"):
                        _check_pickles(path, io.BytesIO(archive.read(part)))
        else:
            with path.open("rb") as file:
                _check_pickles(path, file)
    except FileError:
        raise
    except Exception:  # no pickle, or a broken one: torch says what is wrong with it
        return


def _check_pickles(path: Path, stream: IO[bytes]) -> None:
    count = 0
    for _ in range(5):  # an old torch file has five of them in a row, before the storages
        for _, argument, _ in pickletools.genops(stream):
            count += 1
            if argument in ("builtins bytearray", "__builtin__ bytearray"):  # torch would make one of any length
                raise FileError(f"{path}: refused: it holds more than tensors")
            if count > _MOST_STEPS:
                raise FileError(f"{path}: refused: reading it takes more than {_MOST_STEPS} steps")


def _check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """FileError for tensors that hold no plain numbers on this machine: sparse, quantised, meta, of packed types."""
    import torch

    for key, tensor in tensors.items():
        plain = (
            tensor.layout == torch.strided
            and not (tensor.is_quantized or tensor.is_nested)
            and tensor.device.type == "cpu"
        )
        name = str(tensor.dtype).removeprefix("torch.")
        if not plain or type(tensor) is not torch.Tensor or not name.startswith(_NUMBERS):
            kind = "quantised" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
            raise FileError(
                f"{path}: {key[:200]}: {name}, {kind}, on {tensor.device.type}; plain numbers on the CPU are needed"
            )
        if tensor.ndim > _MOST_DIMENSIONS:
            raise FileError(f"{path}: {key[:200]}: {tensor.ndim} dimensions; at most {_MOST_DIMENSIONS} are read")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise FileError(f"{path}: {key[:200]}: {list(tensor.shape)} numbers, of which the file holds fewer")


_NUMBERS = ("float8_", "float16", "bfloat16", "float32", "float64", "int", "uint", "bool", "complex64", "complex128")
_MOST_DIMENSIONS = 64
_MOST_STEPS = 4_000_000
"""Of an unpickling: a tensor takes about forty."""


def _brief(error: BaseException) -> str:
    """The first line of an error, cut where it is long: some quote what they could not read."""
    text = str(error).partition("\n")[0] or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"


def _checked_size(path: Path) -> tuple[dict[str, Any], int, dict[str, str]]:
    """The header of a safetensors file without its metadata, its length, and the metadata; the file is long enough."""
    header, length = read_header(path)
    metadata = header.pop("__metadata__", {})
    try:
        expected = 8 + length + max((operator.index(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (TypeError, KeyError, IndexError) as error:
        raise FileError(f"{path}: not a safetensors file (its header lists no offsets)") from error
    if expected > 2**63:
        raise FileError(f"{path}: not a safetensors file (its header lists offsets beyond any file)")
    if size_of(path) < expected:
        raise FileError(f"{path}: truncated or incomplete: {size_of(path)} bytes of {expected}")
    texts = {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}
    return header, length, texts


def size_of(path: Path) -> int:
    """Bytes of a file; FileError for what cannot be read, or is a pipe or a device."""
    try:
        kind = path.stat().st_mode
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from error
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # a pipe would keep whoever opens it waiting
        raise FileError(f"{path}: neither a file nor a folder")
    try:
        with path.open("rb") as file:  # opened, so that a folder or a locked file is found out here
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from error


def _refuse_placeholder(path: Path, start: bytes) -> None:
    if start.startswith(b"version https://git-lfs"):
        raise FileError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in that repository")
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise FileError(f"{path}: a web page, not the file itself; download it again")
