"""Finished pieces of a run on disk, so that a killed run loses at most the piece in flight."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import stat
import urllib.parse
import warnings
import weakref
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lora_lab.errors import FileError, LoraLabWarning
from lora_lab.files.ownership import JOURNAL
from lora_lab.files.trust import seal

_SCHEMA = (
    f"CREATE TABLE {JOURNAL} (run TEXT NOT NULL, key TEXT NOT NULL, seal TEXT NOT NULL, value BLOB NOT NULL, "
    "PRIMARY KEY (run, key))"
)
_BESIDE = ("-wal", "-shm", "-journal")
"""What SQLite writes beside a database."""
_LOCAL = {"apfs", "bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hfs", "jfs", "ntfs", "overlay"}
_LOCAL |= {"reiserfs", "tmpfs", "ufs", "vfat", "xfs", "zfs"}
"""File systems of this machine's own disks: SQLite's write-ahead log needs memory that all its processes share."""
_SUPER = bytes.fromhex("d9d505f920a163d7")
"""The end of a rollback journal that names a further file, which SQLite would delete; none of ours does."""
_LARGEST = 2**28  # bytes of an entry
_WAIT = 30.0  # seconds for another process to finish writing
_SYSTEM = ("BUSY", "CANTOPEN", "FULL", "INTERRUPT", "IOERR", "LOCKED", "NOLFS", "NOMEM", "PERM", "READONLY")
"""How the names of SQLite's errors go on that do not tell of a damaged file, but of the place that it lies in."""

_ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""What SQLite raises; its texts quote what a file holds, which may be no text."""

Row = tuple[str, str, str, bytes]
"""Run, key (as JSON), seal, value (JSON, packed)."""


class Journal:
    """Values of JSON types by key, of one `run` (a fingerprint of inputs and options), in an SQLite database.

    They are read when they are asked for. What another run has written is not seen. Every entry is sealed by this
    user's key (see trust.py); damaged ones, and those that somebody else has put there, are left out, so that what they
    held is computed again, and a warning tells once. Several processes may use one journal at the same time.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path, self._run = path, run
        self._database: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._checked = self._told = False
        if _is_there(path):
            self._open()

    def __len__(self) -> int:
        return sum(1 for _ in self._sound())

    def __contains__(self, key: str) -> bool:
        return bool(list(self._sound(key)))

    def __getitem__(self, key: str) -> Any:
        try:
            *_, packed = next(iter(list(self._sound(key))))
            return json.loads(zlib.decompress(packed))
        except (StopIteration, zlib.error, ValueError, RecursionError) as error:
            raise KeyError(key) from error

    def add(self, key: str, value: Any) -> None:
        """Keep a finished piece; it survives this process when this returns."""
        packed = zlib.compress(json.dumps(value, allow_nan=False).encode(), 1)
        if len(packed) > _LARGEST:
            raise FileError(f"{self.path}: an entry of {len(packed)} bytes; at most {_LARGEST} are kept")
        name = json.dumps(key)
        row = (self._run, name, self._seal(name, packed), packed)
        with self._errors("written"):
            if _identity(self.path) != self._identity:
                self._leave()  # another process has removed it, its run being complete
            if self._database is None:
                self._begin()
            try:
                self._check()
                self._insert([row])
            except _ERRORS as error:
                if not self._is_damage(error):
                    raise
                sound = list(self._sound())
                self._tell()
                self._leave()
                discard(self.path)
                self._create()
                self._insert([*sound, row])

    def close(self) -> None:
        """The run is complete and saved elsewhere: remove the journal."""
        self._leave()
        discard(self.path)

    def _check(self) -> None:
        """Once, before anything is added: sqlite3.DatabaseError for a damage that would hide what is added."""
        if not self._checked:
            assert self._database is not None
            if self._database.execute("PRAGMA integrity_check(1)").fetchall() != [("ok",)]:
                raise sqlite3.DatabaseError("damaged")
            self._checked = True

    def _insert(self, rows: list[Row]) -> None:
        assert self._database is not None
        with self._database:  # a transaction
            self._database.executemany(f"INSERT OR REPLACE INTO {JOURNAL} VALUES (?, ?, ?, ?)", rows)  # noqa: S608

    def _sound(self, key: str | None = None) -> Iterator[Row]:
        """The rows of this run whose seals are whole, those of a key alone if one is given, up to a damaged place."""
        if self._database is None:
            return
        select, values = f"SELECT key, seal, value FROM {JOURNAL} WHERE run = ?", [self._run]  # noqa: S608 (a constant)
        if key is not None:
            select, values = f"{select} AND key = ?", [self._run, json.dumps(key)]
        try:
            with self._errors("read"):
                for name, sealed, packed in self._database.execute(select, values):
                    if isinstance(name, str) and isinstance(packed, bytes) and sealed == self._seal(name, packed):
                        yield self._run, name, sealed, packed
                    else:
                        self._tell()
        except _ERRORS:
            self._tell()

    def _seal(self, name: str, packed: bytes) -> str:
        return seal(json.dumps([self._run, name]).encode() + packed)[:32]

    def _open(self) -> None:
        """Take over what is there; what is no journal of ours is left alone until there is a first piece to keep."""
        try:
            with self._errors("read"):
                self._connect()
                if self._has_table():
                    self._set_mode()
                    return
        except _ERRORS:
            self._tell(f"{self.path}: damaged, or no journal of this version; what it held is computed again")
        self._leave()

    def _begin(self) -> None:
        """A run that is refused before its first piece leaves nothing behind: this comes with it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _is_there(self.path)
        try:
            self._create()
        except _ERRORS as error:
            self._leave()
            if not self._is_damage(error):
                raise
            discard(self.path)
            self._create()

    def _create(self) -> None:
        """The database with its table, which another process may have made meanwhile."""
        self._connect()
        assert self._database is not None
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            if not self._has_table():
                self._database.execute(_SCHEMA)
        self._set_mode()  # only now, so that the file itself says what it is
        self._identity = _identity(self.path)

    def _set_mode(self) -> None:
        """Where the file cannot be written, or another process uses it, which has set the very same mode: as it is."""
        assert self._database is not None
        with contextlib.suppress(sqlite3.OperationalError):
            self._database.execute(f"PRAGMA journal_mode={'WAL' if _is_local(self.path.parent) else 'DELETE'}")

    def _connect(self) -> None:
        """Open the file as data: nothing in it is run, no library loaded, no other file attached."""
        address = "file:" + urllib.parse.quote(os.fsencode(os.path.realpath(self.path)))
        if self.path.exists() and not os.access(self.path.parent, os.W_OK):
            address += "?mode=ro&immutable=1"
        database = sqlite3.connect(address, uri=True, timeout=_WAIT, check_same_thread=False)
        self._database, self._disconnect = database, weakref.finalize(self, database.close)
        database.text_factory = partial(str, encoding="utf-8", errors="replace")
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LARGEST)
        database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "synchronous=NORMAL"):
            database.execute(f"PRAGMA {pragma}")
        self._identity = _identity(self.path)

    def _has_table(self) -> bool:
        """Whether the database has our table; sqlite3.DatabaseError if it has anything else."""
        assert self._database is not None
        objects = self._database.execute("SELECT type, sql FROM sqlite_master").fetchmany(3)
        if objects not in ([], [("table", _SCHEMA), ("index", None)]):
            raise sqlite3.DatabaseError("no journal")
        return bool(objects)

    def _leave(self) -> None:
        if self._database is not None:
            self._disconnect()
            self._database = self._identity = None
            self._checked = False

    @contextlib.contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        """A FileError for what the system refuses; what damage raises passes."""
        try:
            yield
        except FileError:
            raise
        except _ERRORS as error:
            if self._is_damage(error):
                raise
            raise FileError(f"{self.path}: cannot be {done} ({error})") from error
        except (OSError, ValueError) as error:
            raise FileError(f"{self.path}: cannot be {done} ({getattr(error, 'strerror', None) or error})") from error

    def _is_damage(self, error: Exception) -> bool:
        """Whether the file is no sound database, and it is neither the system nor another process that refuses."""
        name = getattr(error, "sqlite_errorname", "").removeprefix("SQLITE_")
        if name == "READONLY":  # as it is, too, where its header says so
            return os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK)
        return not name.startswith(_SYSTEM)

    def _tell(self, text: str | None = None) -> None:
        if not self._told:
            self._told = True
            text = text or f"{self.path}: entries that are damaged, or another user's, are computed again"
            warnings.warn(text, LoraLabWarning, stacklevel=4)


def discard(path: Path) -> None:
    """Remove a journal, if there is one, with what lies beside it while it is written."""
    for file in (path, *_beside(path)):
        file.unlink(missing_ok=True)


def _beside(path: Path) -> list[Path]:
    real = Path(os.path.realpath(path))
    return [real.with_name(real.name + ending) for ending in _BESIDE]


def _is_there(path: Path) -> bool:
    """Whether a file is; FileError where something else is, or where a link or the like lies beside it."""
    try:
        if path.exists() and not path.is_file():
            raise FileError(f"{path}: cannot be read (neither a file nor a link to one)")
        for file in _beside(path):
            with contextlib.suppress(FileNotFoundError):  # looked at once: another process may be removing it
                if not stat.S_ISREG(os.lstat(file).st_mode):
                    raise FileError(f"{file}: in the way of what is written beside the journal {path.name}; no file")
        rollback = _beside(path)[-1]
        if rollback.exists() and rollback.read_bytes()[-len(_SUPER) :] == _SUPER:
            rollback.unlink()
        return path.exists()
    except FileError:
        raise
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from another one that takes its place; None for none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _is_local(folder: Path) -> bool:
    """Whether a folder lies on a disk of this machine, as far as is known."""
    import psutil

    mounted = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    real = Path(os.path.realpath(folder))
    holding = next((folder for folder in (real, *real.parents) if str(folder) in mounted), None)
    return mounted.get(str(holding), "").lower() in _LOCAL
