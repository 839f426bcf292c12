"""Files that are read tensor by tensor: the same adapters as of files that are read whole, in every format."""

import os

import pytest
import torch
from making_adapters import lora, write

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files import reading
from lora_lab.adapters.files.converting import converted, save
from lora_lab.adapters.formats.registry import WRITTEN
from lora_lab.errors import AdapterError, FileError
from lora_lab.files import LazyTensors, Unread

MODULES = ["transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.1.attn.to_q"]


@pytest.fixture
def made(tmp_path):
    tensors = {}
    for seed, name in enumerate(MODULES):
        tensors |= lora(name, rank=3, rows=16, columns=12, seed=seed, dtype=torch.bfloat16)
    return Adapter.load(write(tmp_path / "in", tensors, r=3, lora_alpha=6))


def both(path, monkeypatch):
    whole = Adapter.load(path)
    monkeypatch.setattr(reading, "_AT_ONCE", 0)
    return whole, Adapter.load(path)


@pytest.mark.parametrize("form", WRITTEN)
def test_an_adapter_is_the_same_whether_its_file_is_read_whole_or_by_tensors(tmp_path, monkeypatch, made, form):
    path = converted(made, form).adapter.save(tmp_path / "x.safetensors" if form != "mlx" else tmp_path / "x")
    whole, lazy = both(path, monkeypatch)
    assert all(isinstance(tensor, Unread) for tensor in lazy.tensors.values())
    assert (lazy.config, lazy.sites, lazy.digest) == (whole.config, whole.sites, whole.digest)
    for name, update in whole.updates.items():
        assert torch.equal(lazy.updates[name].delta(), update.delta())
    assert lazy.total_norm == whole.total_norm
    for adapter, folder in ((whole, tmp_path / "a"), (lazy, tmp_path / "b")):
        save(converted(adapter, "peft").adapter, folder)
    inner = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.safetensors"))
    assert inner
    assert all((tmp_path / "a" / p).read_bytes() == (tmp_path / "b" / p).read_bytes() for p in inner)


def test_what_is_said_of_a_large_adapter_holds_after_its_file_is_replaced(tmp_path, monkeypatch, made):
    path = made.save(tmp_path / "x.safetensors")
    _, lazy = both(path, monkeypatch)
    doubled = {name: update * 2 for name, update in lazy.updates.items()}
    lazy.with_updates(doubled, source="test").save(path, force=True)
    for name, update in made.updates.items():
        assert torch.equal(lazy.updates[name].delta(), update.delta())


@pytest.mark.parametrize("wrong", ["half", "rank", "integers"])
def test_what_shapes_and_types_tell_is_refused_with_the_same_words(tmp_path, monkeypatch, wrong):
    tensors = lora(rank=4)
    key = next(key for key in tensors if "lora_B" in key)
    if wrong == "half":
        del tensors[key]
    elif wrong == "integers":
        tensors[key] = tensors[key].int()
    path = write(tmp_path / "a", tensors, r=2 if wrong == "rank" else 4)
    said = []
    for limit in (reading._AT_ONCE, 0):
        monkeypatch.setattr(reading, "_AT_ONCE", limit)
        with pytest.raises(AdapterError) as caught:
            Adapter.load(path)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "\n" not in said[0]


def test_no_tensor_is_read_before_the_header_is_sound(tmp_path, monkeypatch):
    path = write(tmp_path / "a", lora(), r=2) / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size - 4)
    monkeypatch.setattr(reading, "_AT_ONCE", 0)
    monkeypatch.setattr(LazyTensors, "_read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(FileError, match=r"truncated or incomplete"):
        Adapter.load(path)
