"""What cannot be in memory, or on a line, is named and told in short."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab import files
from lora_lab.errors import FileError
from lora_lab.escape import shortened


def sparse(path, count):
    """A sound safetensors file of so many bytes of data, of which none takes a place on the disk."""
    key = "base_model.model.a.lora_A.weight"
    header = json.dumps({key: {"dtype": "U8", "shape": [2, count // 2], "data_offsets": [0, count]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + count)
    return key


@pytest.fixture
def small_machine(monkeypatch):
    """One with three megabytes of memory."""
    monkeypatch.setattr("lora_lab.files.disk._memory", lambda: 3_000_000)


@pytest.mark.parametrize("name", ["huge.safetensors", "huge.bin"])
@pytest.mark.usefixtures("small_machine")
def test_a_file_larger_than_memory_is_named_with_its_size(lora_lab, tmp_path, name):
    sparse(tmp_path / name, 4_000_000)
    code, out, err = lora_lab("inspect", name)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {name}: ")
    assert "0.004 GB, and this machine has 0.003 GB of memory" in err


@pytest.mark.usefixtures("small_machine")
def test_of_a_lazy_file_only_a_tensor_that_is_read_must_have_its_place(tmp_path):
    key = sparse(tmp_path / "huge.safetensors", 4_000_000)
    lazy = files.LazyTensors(tmp_path / "huge.safetensors")
    assert lazy.bytes == 4_000_000
    with pytest.raises(FileError, match=rf"huge.safetensors: {key} takes 0.004 GB, and this machine has 0.003 GB"):
        lazy[key]


@pytest.mark.parametrize("name", ["a" * 5000, "/".join(["b" * 200] * 25)])
@pytest.mark.parametrize(
    "verb",
    [
        ("inspect", "NAME"),
        ("prune", "NAME", "--rank", "1", "-o", "o"),
        ("fuse", "NAME", "NAME", "-o", "o"),
        ("run", "NAME"),
        ("figure", "NAME", "-o", "x.pdf"),
        ("train", "-o", "NAME", "--steps", "1"),
        ("train", "--task", "NAME"),
    ],
)
def test_a_name_of_thousands_of_letters_is_cut_in_the_middle(lora_lab, tmp_path, verb, name):
    code, _, err = lora_lab(*(word.replace("NAME", name) for word in verb))
    (line,) = err.splitlines()
    assert code == 1
    assert len(line) < 600
    assert name[:90] in line
    assert f"…{name[-90:]}" in line
    assert list(tmp_path.iterdir()) == []


@given(st.text(), st.integers(4, 50))
def test_only_long_words_are_shortened(text, most):
    for before, after in zip(text.split(), shortened(text, most).split(), strict=True):
        assert after == before if len(before) <= most else len(after) <= most
        assert before[: most // 2] == after[: most // 2]
