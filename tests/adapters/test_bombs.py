"""Files that claim more than they hold are refused at once, and cost no more memory than their own size."""

import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from making_adapters import PREFIX, lora, write

from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import FileError, LoraLabError
from lora_lab.files.disk import read_bin, read_json, read_safetensors

Q = "layers.0.q_proj"


def refusal(read, path) -> str:
    start = time.process_time()
    with pytest.raises(LoraLabError) as caught:
        read(path)
    assert time.process_time() - start < 2  # far less on an idle machine
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 1000
    return text


def saved(path: Path, content: object, **options) -> Path:
    torch.save(content, path, **options)
    return path


# torch files


@pytest.mark.parametrize("legacy", [False, True])
def test_expanded_tensors_are_refused_by_name(tmp_path, legacy):
    content = {"a": torch.ones(2, 2), "b": torch.ones(1).expand(100_000, 100_000)}
    path = saved(tmp_path / "x.bin", content, _use_new_zipfile_serialization=not legacy)
    assert "b: [100000, 100000] numbers, of which the file holds fewer" in refusal(read_bin, path)


def test_many_views_of_one_storage_are_refused_and_tied_weights_are_not(tmp_path):
    whole = torch.randn(1000, 100)
    tied = read_bin(saved(tmp_path / "tied.bin", {"a": whole, "b": whole}))
    assert torch.equal(tied["b"], whole)
    path = saved(tmp_path / "x.bin", {str(i): whole for i in range(500)})
    assert "views of 200000000 bytes" in refusal(read_bin, path)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (
            lambda: torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (10**9, 10**9)),
            "sparse_coo",
        ),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse_csr"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), "quantised"),
        (lambda: torch.empty(10**9, 10**9, device="meta"), "meta"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "float32"),
        (lambda: torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "float4"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_hold_no_plain_numbers_are_refused(tmp_path, make, word):
    path = saved(tmp_path / "x.bin", {"a": torch.ones(1), "layers.b": make()})
    text = refusal(read_bin, path)
    assert word in text or "no torch file" in text or "more than tensors" in text


def test_a_packed_torch_file_is_refused(tmp_path):
    path = saved(tmp_path / "plain.bin", {"a": torch.zeros(5_000_000)})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    assert (tmp_path / "x.bin").stat().st_size < 50_000
    assert "its parts are packed" in refusal(read_bin, tmp_path / "x.bin")


class Space:
    def __reduce__(self):
        return bytearray, (10**11,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_call_for_space_is_refused_before_it_is_made(tmp_path, legacy):
    path = saved(tmp_path / "x.bin", {"a": Space()}, _use_new_zipfile_serialization=not legacy, pickle_protocol=2)
    assert "more than tensors" in refusal(read_bin, path)


@pytest.mark.parametrize("count", [2_000_000, 60_000_000])
def test_a_pickle_of_endless_steps_is_refused(tmp_path, count):
    (tmp_path / "x.bin").write_bytes(b"\x80\x02" + b"N0" * (count // 2) + b"N.")
    refusal_start = time.process_time()
    with pytest.raises(FileError):
        read_bin(tmp_path / "x.bin")
    assert time.process_time() - refusal_start < 20


def test_a_deep_pickle_is_one_line(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".")
    assert refusal(read_bin, tmp_path / "x.bin")


# safetensors


def st(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": entry([2**40, 2**40], [0, 4])}, b"1234"),
        ({"a": entry([2**32, 2**32], [0, 0])}, b""),
        ({"a": entry([10**4000], [0, 4])}, b"1234"),
        ({"a": entry([1], [0, 10**4000])}, b"1234"),
        ({"a": entry([1], [0, 1e300])}, b"1234"),
        ({"a": entry([1], [0, 2**62])}, b"1234"),
        ({"a": entry([-1], [0, 4])}, b"1234"),
        ({"a": entry([1.5], [0, 4])}, b"1234"),
        ({"a": entry([True], [0, 4])}, b"1234"),
        ({"a": entry([1] * 5000, [0, 4])}, b"1234"),
        ({"a": entry([1], [4, 0])}, b"1234"),
        ({"a": entry([1], [0, 4]), "b": entry([1], [0, 4])}, b"1234"),
        ({"a": entry([1], [0, 4]), "b": entry([1], [8, 12])}, b"1" * 12),
        ({"a": entry([1], [0, 4]), "b": entry([2], [2, 10])}, b"1" * 12),
        ({"a": entry([2], [0, 1], "F4")}, b"1"),
        (b'{"a": %b, "a": %b}' % ((json.dumps(entry([1], [0, 4])).encode(),) * 2), b"1234"),
        (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}', b"1234"),
        (b"[" * 100_000, b""),
        (b'{"a":' * 100_000, b""),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path, header, data):
    refusal(read_safetensors, st(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize("length", [2**30, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_gigabytes_is_refused(tmp_path, length):
    refusal(read_safetensors, st(tmp_path / "x.safetensors", b"{}", b"1" * 1000, length))


def test_a_header_that_fills_a_large_file_is_refused_unread(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**34) + b"{")
        file.truncate(2**34 + 8)  # sparse: no bytes on the disk
    assert "a header of 17179869184 bytes" in refusal(read_safetensors, path)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fn, torch.complex64, torch.uint16, torch.bool])
def test_less_common_types_of_whole_tensors_are_carried_along(tmp_path, dtype):
    whole = torch.ones(3).to(dtype)
    adapter = Adapter.load(write(tmp_path, {**lora(), f"{PREFIX}head.weight": whole}))
    assert torch.equal(adapter.tensors[f"{PREFIX}head.weight"].view(torch.uint8), whole.view(torch.uint8))


# configurations


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 200_000,
        '{"r": ' + "9" * 5000 + "}",
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}',
        '{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}',
        '{"peft_type": "LORA", "r": 2, "lora_alpha": -Infinity}',
        '{"peft_type": "LORA", "r": 2, "lora_alpha": ' + "9" * 4000 + "}",
        '{"peft_type": "LORA", "r": ' + "9" * 4000 + ', "lora_alpha": 2}',
        '{"peft_type": "' + "L" * 1_000_000 + '"}',
        '{"peft_type": "LORA", "r": 2, "lora_alpha": "' + "9" * 1_000_000 + '"}',
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": "' + "(" * 100_000 + '"}',
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "' + "b" * 1_000_000 + '"}',
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_rslora": "' + "b" * 1_000_000 + '"}',
    ],
)
def test_a_configuration_beyond_reason_is_one_short_line(tmp_path, text):
    folder = write(tmp_path, lora())
    (folder / "adapter_config.json").write_text(text)
    refusal(Adapter.load, folder)


def test_a_configuration_of_hundreds_of_megabytes_is_refused_unread(tmp_path):
    folder = write(tmp_path, lora())
    with (folder / "adapter_config.json").open("wb") as file:
        file.truncate(2**29)
    assert "536870912 bytes; at most 8388608 are read" in refusal(Adapter.load, folder)


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "x")
    for read in (read_json, read_bin, read_safetensors):
        assert "neither a file nor a folder" in refusal(read, tmp_path / "x")


MEASURE = """
import resource, sys, torch
from lora_lab.errors import LoraLabError
from lora_lab.files import read_bin, read_safetensors
import peft, safetensors  # what is loaded only once counts for no file
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        (read_bin if path.endswith(".bin") else read_safetensors)(__import__("pathlib").Path(path))
    except LoraLabError:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_bombs_cost_no_memory(tmp_path):
    paths = [
        saved(tmp_path / "expanded.bin", {"b": torch.ones(1).expand(200_000, 200_000)}),
        saved(tmp_path / "space.bin", {"a": Space()}, pickle_protocol=2),
        st(tmp_path / "claims.safetensors", {"a": entry([2**38], [0, 2**40])}, b"1234"),
    ]
    with zipfile.ZipFile(tmp_path / "packed.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, 2))
        archive.writestr("x/data/0", bytes(300_000_000))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths), str(tmp_path / "packed.bin")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 50_000  # kilobytes
