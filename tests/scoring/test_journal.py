"""A journal keeps what was acknowledged and gives away nothing else, whatever is done to its file."""

import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lora_lab.errors import FileError, LoraLabWarning
from lora_lab.files.ownership import JOURNAL, foreign
from lora_lab.scoring import journal as module
from lora_lab.scoring.journal import Journal, discard

DAMAGED = r"j: entries that are damaged, or another user's, are computed again"
NO_JOURNAL = r"j: damaged, or no journal of this version; what it held is computed again"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "j"


def written(path, *keys, value=0):
    """The bytes of a whole journal."""
    journal = Journal(path, "run")
    for key in keys:
        journal.add(key, value)
    journal._leave()
    assert [place.name for place in path.parent.iterdir()] == ["j"]  # the log is written back
    return path.read_bytes()


def changed(path, statement, *values):
    with sqlite3.connect(path) as database:
        database.execute(statement, values)
    database.close()


def test_what_is_added_is_there_for_the_next_run(path):
    journal = Journal(path, "run")
    journal.add("a", {"x": [1.5, "é", None]})
    journal.add("b", [2])
    journal.add("b", [3])
    for each in (journal, Journal(path, "run")):
        assert (len(each), each["a"], each["b"]) == (2, {"x": [1.5, "é", None]}, [3])
        assert "c" not in each
        with pytest.raises(KeyError, match="c"):
            each["c"]


def test_what_was_acknowledged_survives_an_outright_kill(path):
    script = (
        "import sys, pathlib; from lora_lab.scoring.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1]), 'run')\n"
        "for i in range(10**6):\n    journal.add(str(i), [i] * 50)\n    print(i, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True) as process:
        told = [int(process.stdout.readline()) for _ in range(100)]
        process.send_signal(signal.SIGKILL)
        told += [int(line) for line in process.stdout if line.endswith("\n")]
    journal = Journal(path, "run")
    assert all(journal[str(i)] == [i] * 50 for i in told)
    assert len(journal) in (len(told), len(told) + 1)
    journal.close()
    assert list(path.parent.iterdir()) == []


def test_two_runs_that_share_a_journal_do_not_mix(path):
    one, two = Journal(path, "one"), Journal(path, "two")
    one.add("a", "from one")
    assert len(Journal(path, "two")) == 0
    two.add("b", "from two")
    again = Journal(path, "two")
    assert "a" not in again
    assert again["b"] == "from two"
    assert Journal(path, "one")["a"] == "from one"


def test_two_processes_with_one_journal_lose_nothing(path):
    script = (
        "import sys, pathlib; from lora_lab.scoring.journal import Journal\n"
        "for i in range(100):\n    Journal(pathlib.Path(sys.argv[1]), 'run').add(sys.argv[2] + str(i), i)\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", script, path, name]) for name in "ab"]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    journal = Journal(path, "run")
    assert [journal[name + str(i)] for name in "ab" for i in range(100)] == 2 * list(range(100))


def test_one_that_another_process_has_removed_is_begun_anew(path):
    one, two = Journal(path, "run"), Journal(path, "run")
    one.add("a", 1)
    two.add("b", 2)
    one.close()
    two.add("c", 3)
    again = Journal(path, "run")
    assert (again["c"], len(again)) == (3, 1)


def test_nothing_is_left_of_a_run_without_a_piece_or_of_a_closed_one(path):
    journal = Journal(path.parent / "run" / "j", "run")
    assert list(path.parent.iterdir()) == []
    journal.close()
    journal.add("a", 1)
    assert foreign(journal.path) is None  # known by its content, before the log is written back
    journal.close()
    assert list(journal.path.parent.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"\xff\xfe rubbish", b'{"format": "lora-lab journal 2", "run": "run"}\n', b"SQLite format 3\0"]
)
def test_what_is_no_journal_of_this_version_is_told_once_and_started_anew(path, content):
    path.write_bytes(content)
    with pytest.warns(LoraLabWarning, match=NO_JOURNAL):
        journal = Journal(path, "run")
    assert (len(journal), path.read_bytes()) == (0, content)
    journal.add("a", 1)
    assert Journal(path, "run")["a"] == 1


def test_an_empty_file_is_nothing(path):
    path.touch()
    journal = Journal(path, "run")
    assert len(journal) == 0
    journal.add("a", 1)
    assert Journal(path, "run")["a"] == 1


@pytest.mark.parametrize(
    "more",
    [
        f"CREATE VIEW more AS SELECT * FROM {JOURNAL}",
        f"CREATE TRIGGER more AFTER INSERT ON {JOURNAL} BEGIN DELETE FROM {JOURNAL}; END",
        "CREATE TABLE more (x)",
        f"CREATE INDEX more ON {JOURNAL} (abs(run))",
    ],
)
def test_a_database_with_more_than_the_table_is_not_used(path, more):
    written(path, "a")
    changed(path, more)
    with pytest.warns(LoraLabWarning, match=NO_JOURNAL):
        journal = Journal(path, "run")
    assert "a" not in journal
    journal.add("b", 1)
    assert len(Journal(path, "run")) == 1


@pytest.mark.parametrize(
    ("statement", "value"),
    [
        ("value = ?", b"x\x9c"),
        ("value = ?", "text"),
        ("value = ?", None),
        ("seal = ?", "0" * 32),
        ("seal = ?", 0),
        ("key = ?", '"c"'),
        ("seal = (SELECT seal FROM other WHERE key = ?)", '"a"'),
        ("value = (SELECT value FROM other WHERE key = ?)", '"a"'),
    ],
)
def test_an_entry_that_was_changed_is_left_out_and_told_once(path, statement, value):
    journal = Journal(path, "run")
    for key in "ab":
        journal.add(key, f"value of {key}")
    journal._leave()
    table = f"(SELECT * FROM {JOURNAL})"
    if value is None:
        statement, value = "value = zeroblob(?)", 7
    changed(path, f"UPDATE {JOURNAL} SET {statement.replace('other', table)} WHERE key = ?", value, '"b"')
    again = Journal(path, "run")
    assert again["a"] == "value of a"
    with pytest.warns(LoraLabWarning, match=DAMAGED):
        assert len(again) == 1
    assert "b" not in again
    assert "c" not in again
    again.add("b", 2)
    assert Journal(path, "run")["b"] == 2


@pytest.mark.parametrize("by", ["another user", "no key"])
def test_what_somebody_else_has_written_into_a_journal_is_computed_again(path, tmp_path, monkeypatch, by):
    with monkeypatch.context() as other:
        (tmp_path / "file").write_text("")
        other.setenv("XDG_CONFIG_HOME", str(tmp_path / ("file" if by == "no key" else "other")))
        Journal(path, "run").add("a", 1)
        assert Journal(path, "run")["a"] == 1  # theirs, for them
    with pytest.warns(LoraLabWarning, match=DAMAGED):
        assert "a" not in Journal(path, "run")
    Journal(path, "run").add("a", 2)
    assert Journal(path, "run")["a"] == 2


def test_bits_that_flip_anywhere_cost_entries_and_never_change_one(path):
    whole = written(path, "a", "b", value={"x": 0.5})
    draw = random.Random(0)
    used = [i for i, byte in enumerate(whole) if byte] + list(range(100))
    for _ in range(60):
        flipped = bytearray(whole)
        flipped[draw.choice(used)] ^= 1 << draw.randrange(8)
        discard(path)
        path.write_bytes(flipped)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = Journal(path, "run")
            assert all(again[key] == {"x": 0.5} for key in "ab" if key in again)
            again.add("c", 1)
            assert Journal(path, "run")["c"] == 1


def test_what_a_damaged_database_still_gives_is_kept_with_the_next_piece(path):
    journal = Journal(path, "run")
    for i in range(60):
        journal.add(str(i), os.urandom(100).hex())
    known = {str(i): journal[str(i)] for i in range(60)}
    journal._leave()
    content = bytearray(path.read_bytes())
    content[-4096:] = bytes(4096)  # one of its pages
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = Journal(path, "run")
        again.add("new", 1)
        kept = [key for key in known if key in again]
    assert again["new"] == 1
    assert 0 < len(kept) < 60
    assert all(again[key] == known[key] for key in kept)


def place_folder(path):
    path.mkdir()


def place_pipe(path):
    os.mkfifo(path)


def place_link_beside(path):
    (path.parent / "mine").write_text("mine")
    (path.parent / "j-wal").symlink_to("mine")


def place_folder_beside(path):
    (path.parent / "j-journal").mkdir()


@pytest.mark.parametrize("put", [place_folder, place_pipe, place_link_beside, place_folder_beside])
def test_what_is_no_file_is_refused_and_left_alone(path, put):
    put(path)
    before = sorted((place.name, place.lstat().st_ino) for place in path.parent.iterdir())
    with pytest.raises(FileError, match=r"/j.*no file|/j: cannot be read \(neither"):
        Journal(path, "run").add("a", 1)
    assert sorted((place.name, place.lstat().st_ino) for place in path.parent.iterdir()) == before


def test_a_link_stays_one_and_its_target_is_the_journal(path):
    (path.parent / "there").mkdir()
    path.symlink_to("there/target")
    Journal(path, "run").add("a", 1)
    assert path.is_symlink()
    assert Journal(path.parent / "there" / "target", "run")["a"] == 1


def test_a_rollback_journal_that_names_another_file_is_not_followed(path):
    """SQLite deletes the file that the end of one names, if no other journal says that it is in use."""
    written(path, "a")
    victim = path.parent / "victim"
    victim.write_text("mine")
    changed(path, "PRAGMA journal_mode=DELETE")
    with sqlite3.connect(path) as database:  # a hot one, as a kill leaves it
        database.execute("PRAGMA cache_size=1")
        database.execute(f"UPDATE {JOURNAL} SET value = randomblob(300000)")
        copies = {name: (path.parent / name).read_bytes() for name in ("j", "j-journal")}
        database.rollback()
    database.close()
    name = os.fsencode(victim)
    copies["j-journal"] += b"\x00\x04\x00\x01" + name + struct.pack(">II", len(name), sum(name)) + module._SUPER
    for place, content in copies.items():
        (path.parent / place).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Journal(path, "run").add("b", 1)
    assert victim.exists()


def test_a_disk_that_is_full_is_one_line_and_loses_nothing(path):
    journal = Journal(path, "run")
    journal.add("a", 1)
    journal._database.execute("PRAGMA max_page_count=4")
    with pytest.raises(FileError, match=r"j: cannot be written \(database or disk is full\)"):
        journal.add("b", os.urandom(50_000).hex())
    assert "b" not in journal
    assert Journal(path, "run")["a"] == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written_is_read_and_the_first_piece_is_one_line(path):
    written(path, "a", value=1)
    path.parent.chmod(0o500)
    try:
        journal = Journal(path, "run")
        assert journal["a"] == 1
        with pytest.raises(FileError, match=r"j: cannot be written \(.*readonly"):
            journal.add("b", 1)
        with pytest.raises(FileError, match="k: cannot be written"):
            Journal(path.with_name("k"), "run").add("b", 1)
    finally:
        path.parent.chmod(0o700)


def test_a_database_that_another_process_keeps_locked_is_one_line(path, monkeypatch):
    monkeypatch.setattr(module, "_WAIT", 0.05)
    journal = Journal(path, "run")
    journal.add("a", 1)
    with sqlite3.connect(path) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(FileError, match=r"j: cannot be written \(database is locked\)"):
            journal.add("b", 1)
    other.close()
    journal.add("b", 1)
    assert len(journal) == 2


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("ext4", "wal"),
        ("overlay", "wal"),
        ("nfs4", "delete"),
        ("fuse.sshfs", "delete"),
        ("lustre", "delete"),
        ("", "delete"),
    ],
)
def test_the_write_ahead_log_is_for_local_disks_alone(path, monkeypatch, kind, mode):
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4")]
    mounts += [SimpleNamespace(mountpoint=os.path.realpath(path.parent), fstype=kind)]
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: mounts)
    journal = Journal(path.parent / "below" / "j", "run")
    journal.add("a", 1)
    assert journal._database.execute("PRAGMA journal_mode").fetchone() == (mode,)
    assert journal.path.with_name("j-wal").exists() == (mode == "wal")


def test_a_journal_copied_to_a_network_disk_loses_its_log(path, tmp_path, monkeypatch):
    journal = Journal(path, "run")
    journal.add("a", 1)
    folder = tmp_path / "network"
    folder.mkdir()
    for place in path.parent.glob("j*"):
        shutil.copy(place, folder)
    monkeypatch.setattr(module, "_is_local", lambda folder: False)
    again = Journal(folder / "j", "run")
    again.add("b", 2)
    assert (again["a"], again["b"]) == (1, 2)
    assert again._database.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_values_that_are_no_json_and_entries_beyond_all_measure_are_refused(path, monkeypatch):
    journal = Journal(path, "run")
    with pytest.raises(ValueError, match="Out of range float"):
        journal.add("a", float("nan"))
    monkeypatch.setattr(module, "_LARGEST", 1000)
    with pytest.raises(FileError, match=r"j: an entry of \d+ bytes; at most 1000 are kept"):
        journal.add("a", os.urandom(2000).hex())
    assert not Path(path).exists()
