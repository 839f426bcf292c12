import errno
import itertools
import json
import os
import tracemalloc

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora_lab import files
from lora_lab.errors import FileError, MismatchError, TrustError

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
]
SHAPES = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


def random(dtype, shape, seed):
    """Bytes at random, NaN and infinities among them."""
    high = 2 if dtype == torch.bool else 256
    content = torch.empty(torch.Size(shape).numel() * dtype.itemsize, dtype=torch.uint8)
    return content.random_(0, high, generator=torch.Generator().manual_seed(seed)).view(dtype).reshape(shape)


def same(one, other):
    """Whether two dictionaries hold the same tensors, bit for bit."""
    return sorted(one) == sorted(other) and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8))
        for name in one
    )


def spec_of(tensors):
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


@st.composite
def tensor_files(draw):
    names = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=6, unique=True))
    kinds = [(draw(st.sampled_from(DTYPES)), draw(SHAPES)) for _ in names]
    tensors = {name: random(*kind, seed) for seed, (name, kind) in enumerate(zip(names, kinds, strict=True))}
    return tensors | {"without stride": torch.from_numpy(np.zeros((0, 2), dtype=np.float32))}


@given(tensor_files(), st.randoms(), st.booleans())
def test_the_safetensors_library_and_we_read_what_either_writes(tmp_path_factory, tensors, shuffler, spooled):
    folder = tmp_path_factory.mktemp("files")
    order = sorted(tensors)
    shuffler.shuffle(order)
    ours, theirs = folder / "ours.safetensors", folder / "theirs.safetensors"
    meta = {"format": "pt", "λ": "é"}
    writer = files.spooled_writer(ours, meta) if spooled else files.streamed_writer(ours, spec_of(tensors), meta)
    with writer as write:
        for name in order:
            write(name, tensors[name])
    save_file(tensors, theirs, meta)
    assert same(load_file(ours), tensors)
    assert files.checked_header(ours)[2] == meta
    for path in (ours, theirs):
        lazy = files.LazyTensors(path)
        assert same(lazy, tensors)
        assert lazy.spec == spec_of(tensors)
        assert lazy.metadata == meta
    assert sorted(os.listdir(folder)) == ["ours.safetensors", "theirs.safetensors"]


@pytest.mark.parametrize("spooled", [False, True])
def test_the_bytes_do_not_hang_on_the_order_of_writing(tmp_path, spooled):
    tensors = {name: random(dtype, (3,), 1) for name, dtype in zip("abcd", DTYPES[-4:], strict=True)}
    for order in ("abcd", "dcba"):
        path = tmp_path / f"{order}.safetensors"
        with files.spooled_writer(path) if spooled else files.streamed_writer(path, spec_of(tensors)) as write:
            for name in order:
                write(name, tensors[name])
    assert (tmp_path / "abcd.safetensors").read_bytes() == (tmp_path / "dcba.safetensors").read_bytes()


def test_views_are_written_by_what_they_show(tmp_path):
    whole = torch.complex(torch.arange(6.0), torch.ones(6)).reshape(2, 3)
    tensors = {"turned": whole.T, "conj": whole.conj(), "imag": whole.conj().imag, "part": whole[:, 1:]}
    with files.streamed_writer(tmp_path / "x.safetensors", spec_of(tensors)) as write:
        for name, tensor in tensors.items():
            write(name, tensor.requires_grad_() if name == "part" else tensor)
    assert all(torch.equal(load_file(tmp_path / "x.safetensors")[name], tensors[name]) for name in tensors)


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    """The memory is numpy's, which tracemalloc counts."""
    part = np.zeros(250_000, dtype=np.float32)
    spec = {f"t{i}": (torch.float32, part.shape) for i in range(40)}
    path = tmp_path / "x.safetensors"
    tracemalloc.start()
    with files.streamed_writer(path, spec) as write:
        for name in spec:
            write(name, torch.from_numpy(part.copy()))
    written = tracemalloc.get_traced_memory()[1]
    with files.spooled_writer(tmp_path / "y.safetensors") as write:
        for name in spec:
            write(name, torch.from_numpy(part.copy()))
    spooled = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(written, spooled) < 10 * part.nbytes < path.stat().st_size / 3
    assert (tmp_path / "y.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("b", torch.ones(2)), ("a", torch.ones(3)), ("a", torch.ones(2).half()), ("a", torch.ones(2, 1))],
)
def test_what_was_not_announced_is_refused_and_nothing_is_left(tmp_path, name, tensor):
    with (
        pytest.raises(MismatchError, match=rf"x\.safetensors: {name} \(.* is not what was announced"),
        files.streamed_writer(tmp_path / "x.safetensors", {"a": (torch.float32, (2,))}) as write,
    ):
        write(name, tensor)
    assert os.listdir(tmp_path) == []


def test_what_is_left_out_or_written_twice_is_refused_and_nothing_is_left(tmp_path):
    path, spec = tmp_path / "x.safetensors", {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    with pytest.raises(MismatchError, match="b announced and not written"), files.streamed_writer(path, spec) as write:
        write("a", torch.ones(2))
    for writer in (files.streamed_writer(path, spec), files.spooled_writer(path)):
        with pytest.raises(MismatchError, match=r"a .*(not what was announced|written twice)"), writer as write:
            [write("a", torch.ones(2)) for _ in range(2)]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("spooled", [False, True])
def test_a_full_disk_leaves_the_old_file_alone(tmp_path, monkeypatch, spooled):
    def refuse(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", refuse)
    writer = files.spooled_writer(path) if spooled else files.streamed_writer(path, {"a": (torch.float32, (2,))})
    with pytest.raises(FileError, match=r"x\.safetensors: cannot be written \(No space left"), writer as write:
        write("a", torch.ones(2))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_asking_for_a_name_reads_no_tensor(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, path)
    lazy = files.LazyTensors(path)
    path.unlink()
    assert "a" in lazy
    assert "c" not in lazy
    assert (set(lazy), len(lazy)) == ({"a", "b"}, 2)
    with pytest.raises(KeyError):
        lazy["c"]
    with pytest.raises(FileError, match=r"x\.safetensors: a: cannot be read \(No such file"):
        lazy["a"]


@pytest.mark.parametrize("cut", [True, False])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, cut):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(200)}, path)
    lazy = files.LazyTensors(path)
    if cut:
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
        save_file({"a": torch.zeros(200)}, path)
        os.utime(path, ns=(1, 1))
    with pytest.raises(FileError, match=r"x\.safetensors: changed while it was being read"):
        lazy["a"]


def test_packed_numbers_are_refused_by_name(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, path)
    with pytest.raises(FileError, match=r"x\.safetensors: a: F4; plain numbers are needed"):
        files.LazyTensors(path)


# checkpoints


def sharded(folder, tensors, size):
    """A checkpoint as transformers lays it out."""
    folder.mkdir()
    parts = files.shards(spec_of(tensors), size)
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    files.write_json(index, files.index_of(spec_of(tensors), parts))
    return index


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), min_size=1, max_size=12),
    st.integers(min_value=1, max_value=99),
)
def test_shards_hold_everything_once_in_order_and_no_more_than_they_may(kinds, size):
    spec = {f"t{i}": kind for i, kind in enumerate(kinds)}
    parts = files.shards(spec, size)
    assert [name for names in parts.values() for name in names] == list(spec)
    sizes = [[files.byte_size(*spec[name]) for name in names] for names in parts.values()]
    assert all(names for names in parts.values())
    assert all(len(part) == 1 or sum(part) <= size for part in sizes)
    assert all(sum(part) + after[0] > size for part, after in itertools.pairwise(sizes))  # none ends before it must
    count = len(parts)
    named = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert list(parts) == (named if count > 1 else ["model.safetensors"])


TENSORS = {f"layers.{i}.weight": random(torch.bfloat16, (4, 8), i) for i in range(5)}


def test_a_sharded_checkpoint_is_read_as_one_mapping(tmp_path):
    index = sharded(tmp_path / "base", TENSORS, 130)
    lazy = files.open_checkpoint(tmp_path / "base")
    assert same(lazy, TENSORS)
    assert lazy.path_of("layers.4.weight").name == "model-00003-of-00003.safetensors"
    content = json.loads(index.read_text())
    assert content["metadata"] == {"total_size": 5 * 64}
    assert set(content["weight_map"]) == set(TENSORS)


def test_transformers_loads_a_model_sharded_by_us(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    spec = spec_of(tensors)
    parts = files.shards(spec, 4000)
    assert len(parts) > 3
    for file, names in parts.items():
        with files.streamed_writer(tmp_path / file, {name: spec[name] for name in names}, {"format": "pt"}) as write:
            for name in names:
                write(name, tensors[name])
    files.write_json(tmp_path / "model.safetensors.index.json", files.index_of(spec, parts))
    config.save_pretrained(tmp_path)
    assert same(LlamaForCausalLM.from_pretrained(tmp_path).state_dict(), tensors)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "a\\b"])
def test_an_index_leads_nowhere_else(tmp_path, name):
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    (tmp_path / "base").mkdir()
    files.write_json(tmp_path / "base" / "model.safetensors.index.json", {"weight_map": {"a": name}})
    with pytest.raises(TrustError, match=r"model\.safetensors\.index\.json: names the shard .* out of its folder"):
        files.open_checkpoint(tmp_path / "base")


def test_a_shard_that_is_a_link_leads_nowhere_else_but_in_the_cache_of_the_hub(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0a1b"
    for folder in (blobs, snapshot, tmp_path / "base"):
        folder.mkdir(parents=True)
    save_file({"a": torch.ones(1)}, blobs / "f00d")
    for folder in (snapshot, tmp_path / "base"):
        (folder / "model-1.safetensors").symlink_to(blobs / "f00d")
        files.write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "model-1.safetensors"}})
    assert files.open_checkpoint(snapshot)["a"].item() == 1
    with pytest.raises(TrustError, match="leads out of its folder"):
        files.open_checkpoint(tmp_path / "base")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"weight_map": ["a"]}, "no index of shards: weight_map, tensor → file, is needed"),
        ({"weight_map": {"a": 1}}, "no index of shards"),
        ({}, "no index of shards"),
        ({"weight_map": {}}, "names no shard"),
        ({"weight_map": {"a": "m\0"}}, r"names the shard 'm\\x00'; no file is called so"),
        ({"weight_map": {"a": "m2.safetensors"}}, r"names the shard m2\.safetensors, which is missing"),
        ({"weight_map": {"b": "m1.safetensors"}}, r"b should be in m1\.safetensors, and is not"),
    ],
)
def test_a_wrong_index_is_one_line(tmp_path, content, text):
    save_file({"a": torch.ones(1)}, tmp_path / "m1.safetensors")
    files.write_json(tmp_path / "model.safetensors.index.json", content)
    with pytest.raises(FileError, match=rf"model\.safetensors\.index\.json: {text}"):
        files.open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for name in ("m1", "m2"):
        save_file({"a": torch.ones(1), name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    weight_map = {"a": "m1.safetensors", "m2": "m2.safetensors"}
    files.write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(FileError, match=r"m2\.safetensors: a is in m1\.safetensors, too"):
        files.open_checkpoint(tmp_path)


def test_the_file_that_transformers_would_load_is_the_model(tmp_path):
    for name in ("model", "model.fp16", "consolidated"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    assert set(files.open_checkpoint(tmp_path)) == {"model"}
    assert set(files.open_checkpoint(tmp_path / "consolidated.safetensors")) == {"consolidated"}
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileError, match=r"consolidated\.safetensors, model\.fp16\.safetensors: which of them"):
        files.open_checkpoint(tmp_path)
    (tmp_path / "consolidated.safetensors").unlink()
    assert set(files.open_checkpoint(tmp_path)) == {"model.fp16"}


def test_a_folder_without_a_checkpoint_says_what_it_has(tmp_path):
    with pytest.raises(FileError, match=r"no checkpoint: model\.safetensors, or shards and their index, are needed$"):
        files.open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileError, match=r"it has pytorch_model\.bin, which save_pretrained writes as safetensors"):
        files.open_checkpoint(tmp_path)
