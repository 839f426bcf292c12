"""What the record in an adapter's file may do: the one place that says it.

An adapter is a file that may have come from anywhere, and its record names the task that it was trained on. Three kinds
of records are told apart:

1. **Your own.** What this program writes is signed with a key of this user (HMAC-SHA256 over record, tensors and
   configuration; the key lies in `$XDG_CONFIG_HOME/lora-lab/key`, by default `~/.config/lora-lab/key`). Its paths may
   lead anywhere, and its revision counts.
2. **Any other**, without the user's consent. It may name

   - a built-in task;
   - a base: a folder inside the adapter's own folder, or the very hub id that the adapter's configuration names as its
     base model, at the revision that the configuration names;
   - data: a file or folder inside the adapter's own folder, or a dataset on the hub.

   Nothing outside of that folder is read (absolute and upward paths, `~`, links that lead out, addresses, paths that
   a dataset or a base in the folder names in its turn), and errors show nothing of what the data holds.
3. **Any other, with consent** (`trust_record=True`): as its words say, code of the base and `device_map` among them.

`trust_remote_code`, `device_map` and `include` (a folder of tasks with code) are never written into a record, and never
followed from one without consent, from your own neither: a task file says them. What a record that is not your own
names is told before it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.errors import LoraLabNote, TrustError

if TYPE_CHECKING:
    from torch import Tensor

NEVER_RECORDED = ("trust_remote_code", "device_map", "include")
"""Keys of a task that say what is run, or on what machine: only a task file may."""
TABLES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""Ending of a table → the reader of `datasets` for it. A name with one of these is a file's."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_CONFIGURATION = re.compile(r"\w[\w .+-]*")
_FOREIGN_SIGNS = re.compile(r"[\x00-\x1f\x7f\\:*?\[\]{}|<>\"]|^[/~]|(^|/)\.\.(/|$)")
"""What no path inside a folder needs: other roots, drives and protocols, upward steps, patterns."""
_FORMAT, _FORMAT_1 = b"lora-lab signature 2\0", b"lora-lab signature 1\0"
_SEAL = b"lora-lab seal 1\0"
_KEY_BYTES = 32
WAYS = "`task` names a task of yours instead, `trust_record` takes the record at its word"
"""How a refused task can be had."""


@dataclass(frozen=True)
class Origin:
    """Where an adapter's record comes from, which decides what it may do."""

    own: bool = False
    """Whether this user's lora-lab wrote it: its signature is right, or it was made in this process."""
    folder: str | None = None
    """The folder that its file lies in, links resolved; None for one that is in memory only."""

    @classmethod
    def of_all(cls, origins: Iterable[Origin]) -> Origin:
        """Of what was made of several records: the user's own only if all of them are."""
        return cls(own=all(origin.own for origin in origins))


FOREIGN = Origin()
"""Of a record that nothing is known of."""


@dataclass(frozen=True)
class Reach:
    """How far a task may reach; as it stands, wherever its keys say."""

    folder: str | None = None
    """The only folder whose files it may read; None for all."""
    quotes: bool = True
    """Whether errors may show what its data holds."""

    def require(self, path: Path, what: str) -> None:
        """TrustError for a file or folder, or anything in it, that lies outside; `what` names it."""
        if self.folder is not None:
            outside = next((inner for inner in _with_content(path) if not is_inside(inner, self.folder)), None)
            if outside is not None:
                raise TrustError(f"{what} {str(path)!r} leads out of {self.folder} (by {outside.name!r}); {WAYS}")

    def quote(self, value: object) -> str:
        """A value from the data for an error: itself, or only its kind."""
        return repr(value) if self.quotes else self.tell(value)

    def tell(self, value: object) -> str:
        """As `quote`, without quotation marks."""
        return str(value) if self.quotes else f"(a {type(value).__name__}, not shown)"


ANYWHERE = Reach()
"""Of a task that the user names, or that a record of the user's own does."""


def recordable(record: Any) -> Any:
    """The record without the keys that are never written into one, at any depth."""
    if isinstance(record, Mapping):
        return {key: recordable(value) for key, value in record.items() if key not in NEVER_RECORDED}
    return [recordable(value) for value in record] if isinstance(record, list | tuple) else record


_TYPES: dict[str, Any] = {
    **dict.fromkeys(("task", "merge", "metrics", "recipe", "base_config", "coto"), Mapping),
    "method": str,
    "seed": int,
}


def well_formed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record without what is of another type than this program writes."""
    return {key: value for key, value in record.items() if isinstance(value, _TYPES.get(key, object))}


def judged(
    record: Mapping[str, Any], origin: Origin, config: Mapping[str, Any], source: str, *, trust_record: bool = False
) -> Reach:
    """How far the task of a record may reach; TrustError, naming the key, for one that asks for more than it may.

    `config` is the adapter's configuration, `source` names its file. A LoraLabNote tells what a record that is not the
    user's own names.
    """
    if not trust_record:
        for key in NEVER_RECORDED:
            if record.get(key):
                raise TrustError(f"{source}: its record asks for {key}, which only you can allow; {WAYS}")
    if "kind" not in record or origin.own:
        return ANYWHERE
    if not trust_record:
        _judge(record, origin, config, source)
    places = ((key, value, _place(value, origin)) for key, value in _names(record))
    told = ", ".join(f"{key} {value!r} ({place})" for key, value, place in places)
    if told:
        warnings.warn(f"{source} names its task: {told}", LoraLabNote, stacklevel=3)
    return Reach(quotes=False) if trust_record else Reach(folder=origin.folder or os.devnull, quotes=False)


def _judge(record: Mapping[str, Any], origin: Origin, config: Mapping[str, Any], source: str) -> None:
    """TrustError for the first key of a foreign record that reaches further than it may."""

    def refuse(key: str, value: object, why: str) -> TrustError:
        return TrustError(f"{source}: its record has {key} = {value!r}, {why}; {WAYS}")

    revision, base = record.get("revision"), config.get("base_model_name_or_path")
    if revision is not None and revision != config.get("revision"):
        raise refuse("revision", revision, "which its configuration does not name")
    data_config = record.get("data_config")
    if isinstance(data_config, str) and (not _CONFIGURATION.fullmatch(data_config) or ".." in data_config):
        raise refuse("data_config", data_config, "which is no name of a configuration")
    for key, value in _names(record):
        if _FOREIGN_SIGNS.search(value) or not value:
            raise refuse(key, value, "which is neither a path inside its own folder nor a hub id")
        path = Path(origin.folder, value) if origin.folder else None
        if path is not None and os.path.lexists(path):
            Reach(origin.folder).require(path, f"{source}: {key} of its record,")
        elif key.startswith("data.") or Path(value).suffix in TABLES:
            continue  # a file that is missing, as opening it will say
        elif not _HUB_ID.fullmatch(value) or os.path.lexists(value):
            raise refuse(key, value, "which is not in its own folder, and no hub id")
        elif key == "base" and value != base:
            raise refuse(key, value, f"and its configuration names another base model ({base!r})")


def _names(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(Key, text) of all that names a base or data; what is of another type is refused where tasks are built."""
    data = record.get("data")
    named = {"base": record.get("base"), "data": data}
    if isinstance(data, Mapping):
        named = {"base": record.get("base"), **{f"data.{split}": value for split, value in data.items()}}
    return [(key, value) for key, value in named.items() if isinstance(value, str)]


def _place(value: str, origin: Origin) -> str:
    """Where what is named is looked for, in words."""
    if not _FOREIGN_SIGNS.search(value):
        if Path(value).suffix in TABLES or (origin.folder and os.path.exists(os.path.join(origin.folder, value))):
            return "beside it"
        if _HUB_ID.fullmatch(value) and not os.path.exists(value):
            return "from the hub"
    return "on this machine"


def _with_content(path: Path) -> Iterable[Path]:
    """A path and all that lies in it; links are named, and not followed."""
    yield path
    if path.is_dir():
        for folder, folders, files in os.walk(path):
            yield from (Path(folder, name) for name in (*folders, *files))


def is_inside(path: Path, folder: str) -> bool:
    """Whether a path lies in the folder once links are resolved; the hub's cache keeps the files of a folder apart."""
    root, resolved = Path(folder).resolve(), path.resolve()
    stored = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    return resolved.is_relative_to(root) or resolved.is_relative_to(stored)


def refuse_indirections(config: Mapping[str, Any], where: str) -> None:
    """TrustError for a base's configuration that has transformers fetch more than the base, code among it."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            refuse_indirections(value, where)
        # a kernel for attention or experts is compiled code from a hub repository
        fetches = "implementation" in key and "/" in str(value)
        if fetches or (key in ("backbone", "use_pretrained_backbone", "use_kernels") and value):
            raise TrustError(f"{where}: its configuration asks for more than the base ({key} = {value!r}); {WAYS}")


def sign(record: Mapping[str, Any], tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> str | None:
    """The signature of a record, its tensors and their configuration (JSON types), by this user's key.

    `config` is None for a format without one. None where no key can be kept.
    """
    key = _key(make=True)
    return None if key is None else _signature(key, record, tensors, config)


def is_own(
    signature: str | None, record: Mapping[str, Any], tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> bool:
    """Whether a signature is that of this user's key."""
    key = None if signature is None else _key(make=False)
    if key is None:
        return False
    # an earlier version signed without the configuration
    wanted = (_signature(key, record, tensors, each) for each in (config, None))
    return any(hmac.compare_digest(str(signature).encode(), each.encode()) for each in wanted)


def seal(data: bytes) -> str:
    """64 hex digits over what a later run goes on from, which nobody without this user's key can make.

    Where no key can be kept, digits that anybody can make: they tell damage alone.
    """
    return hmac.new(_key(make=True) or b"", _SEAL + data, hashlib.sha256).hexdigest()


def _signature(
    key: bytes, record: Mapping[str, Any], tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> str:
    import torch

    signer = hmac.new(key, _FORMAT_1 if config is None else _FORMAT, hashlib.sha256)
    parts: list[Any] = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in sorted(tensors)]
    said = [] if config is None else [json.dumps(config)]  # unsorted: of its patterns, the first match counts
    text = json.dumps([record, parts, *said], sort_keys=True, separators=(",", ":"))
    signer.update(len(text).to_bytes(8, "little") + text.encode())
    for name in sorted(tensors):
        plain = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8)
        signer.update(plain.numpy().data)
    return signer.hexdigest()


def _key(*, make: bool) -> bytes | None:
    """This user's key; with `make`, a new one where there is none. None where there is none and none can be made."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    path = Path(home, "lora-lab", "key")
    try:
        if make and not path.exists():
            _make_key(path)
        key = bytes.fromhex(path.read_text().strip())
    except (OSError, ValueError):
        return None
    return key if len(key) >= _KEY_BYTES else None


def _make_key(path: Path) -> None:
    """Write a new key, whole, readable by its user alone; of several processes, one is first."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent)  # of mode 0600
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(_KEY_BYTES) + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(beside, path)
    finally:
        os.unlink(beside)
