"""Safetensors files larger than memory: tensors are read when they are asked for, and written one at a time.

Nothing of a file stays in memory but its header. A tensor is read into memory of its own and not mapped, so that a file
that another process cuts short is an error, and no crash.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lora_lab.errors import FileError, MismatchError, TrustError, shorten
from lora_lab.files.disk import checked_header, read_json, require_memory, size_of
from lora_lab.files.trust import is_inside
from lora_lab.files.unread import Unread
from lora_lab.files.workplace import replacing

Spec = Mapping[str, tuple[torch.dtype, Sequence[int]]]
"""Name → dtype and shape of the tensors of a file."""

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LARGEST_INDEX = 2**27
"""Bytes of an index: a million tensors of long names."""
_CHUNK = 2**22


@dataclass(frozen=True)
class _Place:
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Of its bytes in the file."""


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files by name; each is read when it is asked for, and kept nowhere.

    FileError for a file that is not sound, when it is opened, or that has changed when a tensor is read.
    """

    def __init__(self, *paths: Path) -> None:
        self.paths = paths
        self.metadata: dict[str, str] = {}
        self._places: dict[str, _Place] = {}
        self._states: dict[Path, tuple[int, ...]] = {}
        for path in paths:
            size_of(path)  # which tells what is no file
            with path.open("rb") as file:  # before the header is read, so that every later change is found out
                self._states[path] = _state(file)
            entries, start, metadata = checked_header(path)
            self.metadata |= metadata
            for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
                self._add(path, name, entry, start)

    @property
    def spec(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor, from the headers alone."""
        return {name: (place.dtype, place.shape) for name, place in self._places.items()}

    @property
    def bytes(self) -> int:
        """Of all tensors together."""
        return sum(byte_size(place.dtype, place.shape) for place in self._places.values())

    def unread(self, *, held: bool = True) -> dict[str, Tensor]:
        """Every tensor with its shape and dtype; its numbers are read whenever an operation needs them.

        Files that are `held` stay open for as long as a tensor of theirs is in use, whatever takes their places.
        """
        opened = {path: _Held(path) for path in self.paths} if held else {}

        def read(name: str) -> Tensor:
            of = opened.get(self._places[name].path)
            if of is None:
                return self[name]
            with of.lock:
                return self._read(name, of.file)

        return {
            name: Unread(place.dtype, place.shape, functools.partial(read, name))
            for name, place in self._places.items()
        }

    def path_of(self, name: str) -> Path:
        """The file that a tensor lies in."""
        return self._places[name].path

    def __getitem__(self, name: str) -> Tensor:
        path = self._places[name].path
        with _opened(path, name) as file:
            return self._read(name, file)

    def _read(self, name: str, file: BufferedReader) -> Tensor:
        place = self._places[name]
        require_memory(place.path, byte_size(place.dtype, place.shape), f"{name} takes ")
        tensor = torch.empty(place.shape, dtype=place.dtype)
        view = _bytes(tensor)  # of the same memory, which is filled
        try:
            file.seek(place.start)
            whole = _state(file) == self._states[place.path] and (not view or file.readinto(view) == len(view))
        except OSError as error:
            raise FileError(f"{place.path}: {name}: cannot be read ({error.strerror})") from error
        if not whole:
            raise FileError(f"{place.path}: changed while it was being read")
        return tensor

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _add(self, path: Path, name: str, entry: Mapping[str, Any], start: int) -> None:
        if name in self._places:
            raise FileError(f"{path}: {name} is in {self._places[name].path.name}, too; one of the two belongs here")
        if entry["dtype"] not in _DTYPES:
            raise FileError(f"{path}: {name}: {entry['dtype']}; plain numbers are needed")
        shape = tuple(entry["shape"])
        if len(shape) > 64:
            raise FileError(f"{path}: {name}: {len(shape)} dimensions; at most 64 are read")
        self._places[name] = _Place(path, _DTYPES[entry["dtype"]], shape, start + entry["data_offsets"][0])


class _Held:
    """A file that is open for as long as somebody holds this, read by one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.file, self.lock = _opened(path), threading.Lock()

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()


def _opened(path: Path, name: str = "") -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise FileError(f"{path}: {name + ': ' if name else ''}cannot be read ({error.strerror})") from error


def open_checkpoint(path: Path) -> LazyTensors:
    """The tensors of a model: of a safetensors file, or of a folder with one, or with shards and their index.

    What an index names lies in its folder (TrustError), holds what the index says of it and nothing twice. Of several
    files in a folder, the one counts that transformers or diffusers would load.
    """
    if not path.is_dir():
        return LazyTensors(path)
    for stem in ("model", "diffusion_pytorch_model"):
        if (path / f"{stem}.safetensors").exists():
            return LazyTensors(path / f"{stem}.safetensors")
        if (path / f"{stem}.safetensors.index.json").exists():
            return _sharded(path / f"{stem}.safetensors.index.json")
    single = sorted(path.glob("*.safetensors"))
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return _sharded(indices[0])
    if len(single) == 1:
        return LazyTensors(single[0])
    if several := [file.name for file in (*indices, *single)]:
        raise FileError(f"{path}: {shorten(several)}: which of them is the model? name the file")
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern))
    hint = f"; it has {shorten(pickled)}, which save_pretrained writes as safetensors" if pickled else ""
    raise FileError(f"{path}: no checkpoint: model.safetensors, or shards and their index, are needed{hint}")


def _sharded(index: Path) -> LazyTensors:
    weight_map = read_json(index, largest=_LARGEST_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise FileError(f"{index}: no index of shards: weight_map, tensor → file, is needed")
    shards = sorted(set(weight_map.values()))
    if not shards:
        raise FileError(f"{index}: names no shard")
    for name in shards:
        shard = index.parent / name
        if not name.isprintable():
            raise FileError(f"{index}: names the shard {name!r}; no file is called so")
        if name != shard.name or "\\" in name or not is_inside(shard, str(index.parent)):
            raise TrustError(f"{index}: names the shard {name!r}, which leads out of its folder")
        if not shard.exists():
            raise FileError(f"{index}: names the shard {name}, which is missing; the download or copy was incomplete")
    tensors = LazyTensors(*(index.parent / name for name in shards))
    for name, file in weight_map.items():
        if name not in tensors or tensors.path_of(name).name != file:
            raise FileError(f"{index}: {name} should be in {file}, and is not")
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file beside its place, then rename: `path` is whole or as it was.

    Tensors that are read when they are asked for are held one at a time.
    """
    spec: Spec = (
        tensors.spec
        if isinstance(tensors, LazyTensors)
        else {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    )
    with streamed_writer(path, spec, metadata) as write:
        for name in tensors:
            write(name, tensors[name])


@contextlib.contextmanager
def streamed_writer(
    path: Path, spec: Spec, metadata: Mapping[str, str] | None = None
) -> Iterator[Callable[[str, Tensor], None]]:
    """`write(name, tensor)` into a new safetensors file, in any order; what is written is not kept in memory.

    At the end the file takes its place whole. MismatchError for a tensor that `spec` does not announce, or announces
    otherwise, or that was never written: then nothing is left.
    """
    header, starts = _layout(spec, metadata or {})
    missing = dict(spec)
    with replacing(path) as beside, beside.open("wb") as file:
        file.write(header)

        def write(name: str, tensor: Tensor) -> None:
            announced = missing.pop(name, None)  # None for a second time, too
            if announced is None or announced[0] != tensor.dtype or tuple(announced[1]) != tuple(tensor.shape):
                raise MismatchError(f"{path}: {name} ({tensor.dtype}, {list(tensor.shape)}) is not what was announced")
            file.seek(starts[name])
            file.write(_bytes(tensor))

        yield write
        if missing:
            raise MismatchError(f"{path}: {shorten(missing)} announced and not written")
        _sync(file)


@contextlib.contextmanager
def spooled_writer(path: Path, metadata: Mapping[str, str] | None = None) -> Iterator[Callable[[str, Tensor], None]]:
    """As `streamed_writer`, for tensors whose shapes are known only as they come; the disk holds them twice.

    `metadata` is looked at when the block ends.
    """
    spec: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
    spooled: dict[str, int] = {}
    with replacing(path) as beside, tempfile.TemporaryFile(dir=beside.parent) as spool, beside.open("wb") as file:

        def write(name: str, tensor: Tensor) -> None:
            if name in spec:
                raise MismatchError(f"{path}: {name} is written twice")
            spec[name], spooled[name] = (tensor.dtype, tuple(tensor.shape)), spool.tell()
            spool.write(_bytes(tensor))

        yield write
        header, starts = _layout(spec, metadata or {})
        file.write(header)
        for name in sorted(starts, key=lambda name: (starts[name], name)):
            file.seek(starts[name])
            spool.seek(spooled[name])
            _copy(spool, file, byte_size(*spec[name]))
        _sync(file)


def shards(spec: Spec, max_shard_size: int, stem: str = "model") -> dict[str, list[str]]:
    """File name → tensors of it, in the order given, at most so many bytes each (or one tensor that is larger)."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, entry in spec.items():
        size = byte_size(*entry)
        if groups[-1] and filled + size > max_shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, 1)}


def index_of(spec: Spec, files: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The content of the index that transformers reads beside shards."""
    total = sum(byte_size(*entry) for entry in spec.values())
    weight_map = {name: file for file, names in files.items() for name in names}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def byte_size(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def _layout(spec: Spec, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header, and where in the file each tensor begins: the widest first, so that all are aligned."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in sorted(spec, key=lambda name: (-spec[name][0].itemsize, name)):
        dtype, shape = spec[name]
        begin, end = end, end + byte_size(dtype, shape)
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: start + header[name]["data_offsets"][0] for name in spec}


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor: its own where it is contiguous and on the CPU."""
    if not tensor.numel():  # whose strides can be such that it has no view
        return memoryview(b"")
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return plain.numpy().data


def _copy(source: IO[bytes], target: IO[bytes], length: int) -> None:
    while length > 0:
        part = source.read(min(length, _CHUNK))
        target.write(part)
        length -= len(part)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _state(file: IO[bytes]) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ino
