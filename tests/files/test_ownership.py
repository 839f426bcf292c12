"""Nothing is replaced that this program did not write, nor what it reads; what it wrote is replaced whole."""

import fcntl
import os
import socket
import tempfile
import zlib
from pathlib import Path

import pytest
import torch
from making_adapters import lora, write
from safetensors.torch import save_file

from lora_lab import files, plots
from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import FileError
from lora_lab.files import workplace
from lora_lab.files.ownership import foreign
from lora_lab.results.result import Result
from lora_lab.scoring.journal import Journal

TRAINED = Result(
    "train",
    {"step": [1, 2], "loss": [2.0, 1.0], "p": [1.0, 1.0], "mask": ["1", "1"], "learning_rate": [0.1, 0.1]},
    {"record": {"method": "lora", "seed": 0}, "groups": ["a"]},
)


def a_pipe(path):
    os.mkfifo(path)


def a_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def a_link_to_text(path):
    path.with_name("text").write_text("mine")
    path.symlink_to("text")


def a_link_to_nothing(path):
    path.symlink_to("nowhere")


def a_circle_of_links(path):
    path.symlink_to(path.name)


def a_foreign_tensor_file(path):
    save_file({"a": torch.ones(1)}, path, {"format": "pt"})


def a_foreign_adapter(path):
    write(path, lora())


def an_adapter_with_foreign_card(path):
    own_adapter(path)
    (path / "README.md").write_text("---\ntags: [peft]\n---\nmade with love, better than lora-lab")


def an_adapter_with_a_foreign_head(path):
    own_adapter(path)
    (path / "heads").mkdir()
    a_foreign_tensor_file(path / "heads" / "mine.safetensors")


def an_adapter_with_a_link(path):
    own_adapter(path)
    path.with_name("text").write_text("mine")
    (path / "README.md").symlink_to(path.with_name("text"))


def a_configuration_alone(path):
    path.mkdir()
    (path / "adapter_config.json").write_text('{"r": 8}')


def own_adapter(path):
    source = write(path.parent / "source", lora())
    Adapter.load(source).save(path)


FOREIGN = {
    a_pipe: "a named pipe",
    a_socket: "a socket",
    a_link_to_text: r"a link to .*text, not written by lora-lab",
    a_link_to_nothing: "a link to nothing",
    a_circle_of_links: "a link to nothing",
    a_foreign_tensor_file: "not written by lora-lab",
    a_foreign_adapter: r"holds what lora-lab did not write \(adapter_model.safetensors\)",
    an_adapter_with_foreign_card: r"holds what lora-lab did not write \(README.md\)",
    an_adapter_with_a_foreign_head: r"holds what lora-lab did not write \(heads\)",
    an_adapter_with_a_link: r"holds what lora-lab did not write \(README.md\)",
    a_configuration_alone: r"holds what lora-lab did not write \(adapter_config.json\)",
    lambda path: path.write_text("my thesis"): "not written by lora-lab",
    lambda path: path.write_text('{"format": "lora-lab"}'): "not written by lora-lab",
    lambda path: path.write_text("%PDF-1.4 of lora-lab %%EOF"): "not written by lora-lab",
    lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\0IEND"): "not written by lora-lab",
}


@pytest.mark.parametrize("make", FOREIGN)
def test_what_is_not_ours_is_refused_by_name_and_stays(tmp_path, make):
    path = tmp_path / "out"
    make(path)
    before = sorted((p.name, p.lstat().st_ino, p.lstat().st_mtime_ns) for p in tmp_path.rglob("*"))
    for force, text in ((True, rf"out: {FOREIGN[make]}, not replaced"), (False, r"out: exists already \(")):
        with pytest.raises(FileError, match=text):
            files.refuse_existing(path, force=force)
    assert sorted((p.name, p.lstat().st_ino, p.lstat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


def test_a_device_is_refused():
    with pytest.raises(FileError, match="/dev/full: a device, not replaced"):
        files.refuse_existing(Path("/dev/full"), force=True)


def own_result(path):
    Result("demo", {"a": [1]}).save(path)


def own_journal(path):
    Journal(path, "run").add("a", 1)


def own_figure(path):
    plots.save(plots.figure([TRAINED]), path)


OURS = {
    "r.json": own_result,
    ".journal": own_journal,
    "f.pdf": own_figure,
    "f.png": own_figure,
    "f.svg": own_figure,
    "adapter": own_adapter,
    "adapter.safetensors": own_adapter,
    "empty": lambda path: path.touch(),
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", OURS)
def test_what_this_program_wrote_is_ours_also_behind_a_link_which_stays_one(tmp_path, name):
    path = tmp_path / name
    OURS[name](path)
    files.refuse_existing(path, force=True)
    with pytest.raises(FileError, match="exists already; `force` replaces it"):
        files.refuse_existing(path, force=False)
    link = tmp_path / "link" / name
    link.parent.mkdir()
    link.symlink_to(path)
    files.refuse_existing(link, force=True)
    with files.replacing(link) as beside:
        assert beside.parent.parent == tmp_path  # on the file system of the target, not on the link's
        OURS["adapter"](beside) if path.is_dir() else beside.write_text("new")
    assert link.is_symlink()
    assert path.is_dir() or path.read_text() == "new"
    assert [p.name for p in link.parent.iterdir()] == [name]


def test_inputs_are_no_outputs_under_any_name(tmp_path):
    own_adapter(tmp_path / "a")
    (tmp_path / "link").symlink_to("a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    for output, given in (("a", "a"), ("link", "a"), ("a", "link"), ("a", weights), (weights, weights)):
        with pytest.raises(FileError, match="one of the inputs; the output needs another name"):
            files.refuse_existing(tmp_path / output, force=True, inputs=[tmp_path / "no", tmp_path / given])
    files.refuse_existing(tmp_path / "a" / "new", force=False, inputs=[tmp_path / "a"])
    files.refuse_existing(tmp_path / "new", force=False, inputs=[tmp_path / "new"])


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"file/x: cannot be written"):
        files.refuse_existing(tmp_path / "file" / "x", force=False)
    with pytest.raises(FileError, match=r"cannot be written \(File name too long\)"):
        files.refuse_existing(tmp_path / ("x" * 256), force=False)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # what is root's to write is nobody's
    with pytest.raises(FileError, match=rf"new/x: cannot be written \(no permission to write in {tmp_path}\)"):
        files.refuse_existing(tmp_path / "new" / "x", force=False)


def test_a_name_as_long_as_names_can_be_is_written(tmp_path):
    for name in ("x" * 255, "é" * 127):
        files.write_bytes(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"


# what killed runs leave


def leftover(folder, name="x.json"):
    made = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".part", dir=folder))
    (made / name).write_text("half")
    return made


def test_what_a_killed_run_was_writing_is_cleared_away_by_the_next(tmp_path):
    left = [leftover(tmp_path), leftover(tmp_path, "other")]
    (leftover(tmp_path, "m") / ".m.abcd_123.part").mkdir()
    files.write_bytes(tmp_path / "x.json", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"], left


def test_what_was_made_for_a_long_name_is_known_by_that_name(tmp_path):
    name = "x" * 250
    for content, kept in ((name, False), ("diary.txt", True)):
        left = Path(tempfile.mkdtemp(prefix=".long.", suffix=".part", dir=tmp_path))
        (left / content).write_text("mine")
        files.write_bytes(tmp_path / "x.json", b"new")
        assert left.exists() is kept
    left = Path(tempfile.mkdtemp(prefix=".long.", suffix=".part", dir=tmp_path))
    (left / name).mkdir()
    (left / "replaced").mkdir()
    (left / "replaced" / "old").write_text("old")
    files.write_bytes(tmp_path / "x.json", b"new")
    assert (tmp_path / name / "old").read_text() == "old"


def test_what_is_being_written_or_somebody_elses_is_left_alone(tmp_path):
    in_use, other, named_alike = leftover(tmp_path), leftover(tmp_path), tmp_path / ".notes.part"
    (other / "thesis.tex").write_text("mine")
    named_alike.mkdir()
    held = os.open(in_use, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    files.write_bytes(tmp_path / "x.json", b"new")
    assert {p.name for p in tmp_path.iterdir()} == {in_use.name, other.name, ".notes.part", "x.json"}
    os.close(held)
    files.write_bytes(tmp_path / "x.json", b"new")
    assert not in_use.exists()


def test_two_writers_do_not_clear_each_other_away(tmp_path):
    with files.replacing(tmp_path / "a") as one, files.replacing(tmp_path / "b") as two:
        one.write_text("a")
        two.write_text("b")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "a", "b": "b"}


def test_a_folder_that_was_moved_away_when_its_run_was_killed_comes_back(tmp_path):
    left = leftover(tmp_path, "adapter")
    (left / "replaced").mkdir()
    (left / "replaced" / "old").write_text("old")
    files.write_bytes(tmp_path / "other", b"")
    assert (tmp_path / "adapter" / "old").read_text() == "old"


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="one step on Linux only")
def test_a_folder_takes_the_place_of_another_in_one_step(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert workplace._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").exists()
    assert (tmp_path / "b" / "a").exists()
    assert not workplace._exchange(tmp_path / "a", tmp_path / "nowhere")


# figures say what they show


@pytest.mark.parametrize("ending", ["pdf", "png", "svg"])
def test_a_figure_knows_what_it_was_drawn_from(tmp_path, ending):
    path = tmp_path / f"f.{ending}"
    assert not plots.shows(path, [TRAINED])
    own_figure(path)
    assert foreign(path) is None
    again = Result.load(TRAINED.save(tmp_path / "r.json"))
    assert plots.shows(path, [again])
    other = Result("train", {**TRAINED.columns, "loss": [2.0, 1.5]}, TRAINED.parameters)
    assert not plots.shows(path, [other])
    assert not plots.shows(path, [TRAINED], width="single")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 20])
    assert not plots.shows(path, [TRAINED])
    own_figure(tmp_path / f"again.{ending}")
    assert zlib.crc32((tmp_path / f"again.{ending}").read_bytes()) == zlib.crc32(whole)
