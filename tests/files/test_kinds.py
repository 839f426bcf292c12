"""What a file is goes by its content, and is said of what no adapter can be in."""

import struct
import zipfile

import pytest
import torch
from safetensors.torch import save

from lora_lab.errors import FileError
from lora_lab.files.kinds import SAFETENSORS, TORCH, identified

GGUF = b"GGUF" + struct.pack("<IQQ", 3, 2, 5) + struct.pack("<Q", 12) + b"general.type" + struct.pack("<IQ", 8, 7)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\x1f\x8b\x08rest", "packed by gzip; unpack it first"),
        (b"\x93NUMPY\x01\x00v", "a numpy array"),
        (GGUF + b"adapter" + b"\0" * 40, "a LoRA in GGUF, llama.cpp's format, which is not read; the PEFT folder"),
        (GGUF + b"model" + b"\0" * 40, "a whole model in GGUF"),
        (b'{"error": "Repository not found"}', "JSON text, no tensors"),
        (b"\0" * 257 + b"ustar\0" + b"\0" * 249, "a tar archive; unpack it first"),
        (b"hello", "not an adapter; a PEFT folder, a .safetensors or a .bin file is needed"),
    ],
)
def test_what_a_file_is_instead_is_said(tmp_path, content, told):
    (tmp_path / "x.lora").write_bytes(content)
    with pytest.raises(FileError, match=told):
        identified(tmp_path / "x.lora")


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt", "x", "x.download"])
def test_content_counts_and_not_the_name(tmp_path, name):
    (tmp_path / name).write_bytes(save({"a": torch.ones(2)}))
    assert identified(tmp_path / name) == SAFETENSORS
    for legacy in (False, True):
        torch.save({"a": torch.ones(2)}, tmp_path / name, _use_new_zipfile_serialization=not legacy)
        assert identified(tmp_path / name) == TORCH


@pytest.mark.parametrize("length", [ord("{"), ord("["), 0x4647, 0x8B1F])
def test_a_header_whose_length_looks_like_something_else_is_a_header(tmp_path, length):
    header = b"{}".ljust(length)
    (tmp_path / "x").write_bytes(struct.pack("<Q", length) + header)
    assert identified(tmp_path / "x") == SAFETENSORS


@pytest.mark.parametrize(
    ("member", "told"),
    [("lora.safetensors", "a zip archive with lora.safetensors in it; unpack it first"), ("a.npy", "numpy arrays")],
)
def test_archives_say_what_they_hold(tmp_path, member, told):
    with zipfile.ZipFile(tmp_path / "x.safetensors", "w") as archive:
        archive.writestr(member, b"content")
    with pytest.raises(FileError, match=told):
        identified(tmp_path / "x.safetensors")
