import errno
import hashlib
import json
import os
import pickle
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from lora_lab import files
from lora_lab.errors import AdapterError, FileError
from lora_lab.files import workplace

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1049\n"
HTML = "<!DOCTYPE html>\n<html><body>404</body></html>"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def header(content: object, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def full_disk(monkeypatch):
    """Every sync fails as on a full disk, after the bytes were handed over."""

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)


# writing


def test_what_is_written_is_read_again_with_its_metadata(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.5, dtype=torch.bfloat16)}
    files.write_safetensors(tmp_path / "new" / "x.safetensors", tensors, {"who": "é"})
    read, metadata = files.read_safetensors(tmp_path / "new" / "x.safetensors")
    assert metadata == {"who": "é"}
    assert {key: (value.dtype, value.tolist()) for key, value in read.items()} == {
        "a": (torch.float32, [[0, 1, 2], [3, 4, 5]]),
        "b": (torch.bfloat16, 1.5),
    }
    assert names(tmp_path) == ["new", "x.safetensors"]


def test_tensors_that_share_memory_or_are_views_are_written_each_in_full(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4).requires_grad_()
    tensors = {"whole": whole, "again": whole, "turned": whole.T, "row": whole[1]}
    files.write_safetensors(tmp_path / "x.safetensors", tensors, {})
    read, _ = files.read_safetensors(tmp_path / "x.safetensors")
    assert all(torch.equal(read[key], value) for key, value in tensors.items())


def test_json_is_written_strictly_and_read_again(tmp_path):
    files.write_json(tmp_path / "x.json", {"λ": [0.5, None]})
    assert files.read_json(tmp_path / "x.json") == {"λ": [0.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert files.read_json(tmp_path / "x.json") == {"λ": [0.5, None]}


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "x.json").write_text("old")
    with pytest.raises(FileError, match=r"x\.json: cannot be written \(No space left on device\)"):
        files.write_bytes(tmp_path / "x.json", b"new")
    assert (tmp_path / "x.json").read_text() == "old"
    assert names(tmp_path) == ["x.json"]


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_no_first_file_either(tmp_path):
    with pytest.raises(FileError):
        files.write_bytes(tmp_path / "x.json", b"new")
    assert names(tmp_path) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, MemoryError, ValueError])
def test_a_write_that_breaks_off_in_the_middle_leaves_the_old_file(tmp_path, failure):
    path = tmp_path / "x.bin"
    path.write_text("old")

    def break_off() -> None:
        with files.replacing(path) as beside, beside.open("wb") as file:
            file.write(b"half")
            file.flush()
            raise failure

    with pytest.raises(failure):
        break_off()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_a_folder_that_is_half_written_leaves_the_old_folder(tmp_path, failure):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "old").write_text("old")

    def break_off() -> None:
        with files.replacing(path) as beside:
            beside.mkdir()
            (beside / "new").write_text("half")
            raise failure

    with pytest.raises((failure, FileError)):
        break_off()
    assert names(tmp_path) == ["adapter", "old"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(errno.EIO, "Input/output error")])
def test_an_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch, failure):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "old").write_text("old")

    def refuse(*_: object) -> None:
        raise failure

    def replace() -> None:
        with files.replacing(path) as beside:
            beside.mkdir()
            monkeypatch.setattr(Path, "replace", refuse)
            monkeypatch.setattr(workplace, "_exchange", lambda *_: False)  # as where the system cannot

    with pytest.raises((KeyboardInterrupt, FileError)):
        replace()
    assert names(tmp_path) == ["adapter", "old"]
    assert (path / "old").read_text() == "old"


def test_a_new_folder_takes_the_place_of_the_old_one_whole(tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "old").write_text("old")
    with files.replacing(path) as beside:
        beside.mkdir()
        (beside / "new").write_text("new")
    assert names(tmp_path) == ["adapter", "new"]


def test_errors_inside_a_folder_name_the_place_that_was_asked_for(tmp_path, full_disk):
    def write() -> None:
        with files.replacing(tmp_path / "adapter") as beside:
            beside.mkdir()
            files.write_bytes(beside / "x.json", b"new")

    with pytest.raises(FileError) as caught:
        write()
    assert str(caught.value) == (f"{tmp_path / 'adapter' / 'x.json'}: cannot be written (No space left on device)")
    assert names(tmp_path) == []


def test_errors_of_any_class_name_the_place_that_was_asked_for(tmp_path):
    with (
        pytest.raises(AdapterError, match=re.escape(f"{tmp_path / 'a'}: no")),
        files.replacing(tmp_path / "a") as beside,
    ):
        raise AdapterError(f"{beside}: no")


def test_a_parent_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        files.write_bytes(tmp_path / "file" / "x.json", b"")


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path):
    (tmp_path / "x.safetensors" / "inside").mkdir(parents=True)
    with pytest.raises(FileError, match="cannot be written"):
        files.write_bytes(tmp_path / "x.safetensors", b"new")
    assert names(tmp_path) == ["inside", "x.safetensors"]


def test_existing_outputs_are_refused_unless_forced(tmp_path):
    there, free = tmp_path / "there", tmp_path / "free"
    there.mkdir()
    files.refuse_existing(free, force=False)
    files.refuse_existing(free, there, force=True)
    (there / "README.md").touch()
    files.refuse_existing(there, force=True)
    (there / "thesis.tex").touch()
    with pytest.raises(FileError, match=r"there: holds more than an adapter \(thesis.tex\), not replaced"):
        files.refuse_existing(free, there, force=True)
    with pytest.raises(FileError, match=r"there: exists already \(holds more than an adapter"):
        files.refuse_existing(free, there, force=False)


def test_a_hash_changes_with_content_and_names_and_not_with_place(tmp_path):
    for folder, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x").write_text(text)
    same, again, other = (files.file_hash(tmp_path / folder) for folder in "abc")
    assert same == again != other
    (tmp_path / "b" / "x").rename(tmp_path / "b" / "y")
    assert files.file_hash(tmp_path / "b") != same
    assert files.file_hash(tmp_path / "a" / "x") == hashlib.sha256(b"1").hexdigest()[:16]
    with pytest.raises(FileError, match="nowhere: cannot be read"):
        files.file_hash(tmp_path / "nowhere")


# JSON


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "empty; a JSON object"),
        (b" \n", "empty; a JSON object"),
        (b"[1, 2]", "a JSON list; an object"),
        (b"null", "a JSON NoneType; an object"),
        (LFS.encode(), "a Git LFS pointer, not the file itself; run `git lfs pull`"),
        (HTML.encode(), "a web page, not the file itself"),
        (b"  <html>", "a web page, not the file itself"),
        (b"\x80\x02}q\x00", "not JSON but binary data"),
        (b'{"r": 4', "not valid JSON"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_what_stands_in_place_of_a_json_object_is_named(tmp_path, content, text):
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=text) as caught:
        files.read_json(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_read_over(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"r": 4}')
    assert files.read_json(tmp_path / "x.json") == {"r": 4}


@pytest.mark.parametrize(
    "read", [files.read_json, files.read_safetensors, files.read_header, files.read_bin, files.LazyTensors]
)
def test_a_missing_file_and_a_folder_are_file_errors(tmp_path, read):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileError, match="cannot be read"):
            read(path)


# safetensors


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"1234", "truncated or incomplete: 4 bytes"),
        (struct.pack("<Q", 500), "truncated or incomplete: 8 bytes, its header alone needs 508"),
        (LFS.encode(), "a Git LFS pointer"),
        (HTML.encode(), "a web page"),
        (b"not a tensor in sight, only words", "not a safetensors file"),
        (b"PK\x03\x04" + b"\0" * 40, "not a safetensors file|truncated"),
        (header(b"{{{{"), "its header is not JSON"),
        (header(b"\xff\xfe\x00"), "its header is not JSON"),
        (header([1]), "its header is not a JSON object"),
        (header({"a": 1}), "lists no offsets"),
        (header({"a": {"dtype": "F32", "shape": [1]}}), "lists no offsets"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["x", "y"]}}), "lists no offsets"),
        (
            header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0"),
            "truncated or incomplete: .* bytes of",
        ),
        (
            header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}, b"\0" * 4),
            "not a sound safetensors file",
        ),
        (
            header({"a": {"dtype": "Q7", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
            "not a sound safetensors file",
        ),
        (
            header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 9),
            "not a sound safetensors file",
        ),
        (
            header({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"}, b"\0" * 8),
            "not a sound safetensors file",
        ),
    ],
)
@pytest.mark.parametrize("read", [files.read_safetensors, files.LazyTensors])
def test_a_broken_safetensors_file_is_one_line_that_names_it(tmp_path, content, text, read):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match=text) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [files.read_safetensors, files.LazyTensors])
def test_a_safetensors_file_cut_anywhere_is_refused(tmp_path, read):
    whole = save({"a": torch.ones(3, 5)}, {"format": "pt"})
    for length in range(len(whole)):
        (tmp_path / "x.safetensors").write_bytes(whole[:length])
        with pytest.raises(FileError, match=r"truncated|empty"):
            read(tmp_path / "x.safetensors")


# torch files


class Trap:
    """Pickles as a call that leaves a mark on disk when it is run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_torch_file_is_refused_and_not_run(tmp_path, write):
    mark = tmp_path / "ran"
    write({"a": torch.ones(2), "b": Trap(mark)}, tmp_path / "x.bin")
    with pytest.raises(FileError, match="refused: it holds more than tensors") as caught:
        files.read_bin(tmp_path / "x.bin")
    assert "\n" not in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_of_both_torch_formats_are_read_also_inside_a_state_dict(tmp_path, legacy):
    content = {"epoch": 3, "state_dict": {"a": torch.arange(4)}}
    torch.save(content, tmp_path / "x.bin", _use_new_zipfile_serialization=not legacy)
    assert files.read_bin(tmp_path / "x.bin")["a"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1.0}, torch.ones(2), {"a": {"b": torch.ones(1)}}])
def test_a_torch_file_without_a_dictionary_of_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(FileError, match=r"x\.bin: not a dictionary of tensors"):
        files.read_bin(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", r"empty \(0 bytes\)"),
        (LFS.encode(), "a Git LFS pointer"),
        (HTML.encode(), "a web page"),
        (b"words", "refused|truncated|no torch file"),
    ],
)
def test_what_stands_in_place_of_a_torch_file_is_named(tmp_path, content, text):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(FileError, match=text) as caught:
        files.read_bin(tmp_path / "x.bin")
    assert "\n" not in str(caught.value)


def test_a_torch_file_cut_anywhere_is_refused(tmp_path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "whole.bin")
    whole = (tmp_path / "whole.bin").read_bytes()
    for length in range(0, len(whole), 37):
        (tmp_path / "x.bin").write_bytes(whole[:length])
        with pytest.raises(FileError) as caught:
            files.read_bin(tmp_path / "x.bin")
        assert "\n" not in str(caught.value)
