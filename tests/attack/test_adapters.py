"""Adapter files: header bytes, headers, tensor names, configurations and records of every kind."""

import dataclasses
import io
import json
import struct
import warnings
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from safetensors.torch import save
from strategies import attack, changed, dumps, safetensors_of, scalars, texts, values

from lora_lab import tasks
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files.writing import CONFIG_KEY, RECORD_KEY
from lora_lab.adapters.formats.peft.peft_config import LORA_FIELDS
from lora_lab.tasks.choosing import task_of

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "org/m",
}
RECORD = {"task": {"name": "digits/relabel"}, "method": "lora", "seed": 0}


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in MODULES:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, 6, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(5, 2, generator=generator)
    return tensors


def _torch_file() -> bytes:
    file = io.BytesIO()
    torch.save(_tensors(), file)
    return file.getvalue()


TENSORS, BIN = _tensors(), _torch_file()
FILE = save(TENSORS, {CONFIG_KEY: json.dumps(CONFIG), RECORD_KEY: json.dumps(RECORD)})
_LENGTH = struct.unpack("<Q", FILE[:8])[0]
KEYS = sorted(
    {f.name for kind in tasks.KINDS.values() for f in dataclasses.fields(kind.build.__self__.Keys)} | {"name"}
)
HEADER, BODY = json.loads(FILE[8 : 8 + _LENGTH]), FILE[8 + _LENGTH :]


def read(path: Path, size: int, survived) -> None:
    """Reads, refuses in one line, or gives an adapter that is the same after it was written and read again."""
    with survived(size):
        adapter = Adapter.load(path)
        again = path.parent / "again.safetensors"
        adapter.save(again, force=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            back = Adapter.load(again)
        assert set(back.tensors) == set(adapter.tensors)
        for key, tensor in adapter.tensors.items():
            assert back.tensors[key].dtype == tensor.dtype
            assert torch.equal(back.tensors[key], tensor)
        assert {n: (s.kind, s.rank, s.scale) for n, s in back.sites.items()} == {
            n: (s.kind, s.rank, s.scale) for n, s in adapter.sites.items()
        }
        if adapter.why_not_additive is None:
            norm = adapter.total_norm
            assert back.total_norm == pytest.approx(norm, nan_ok=True, rel=1e-12)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("attack")


@st.composite
def headers(draw):
    """A sound header in which entries, or parts of them, were replaced."""
    header = json.loads(json.dumps(HEADER))
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(header)))
        way = draw(st.sampled_from(["entry", "field", "name", "metadata"]))
        if way == "entry":
            header[key] = draw(values)
        elif way == "name":
            header[draw(texts)] = header[key]
        elif way == "metadata":
            header["__metadata__"] = draw(values)
        elif isinstance(header[key], dict):
            field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            header[key] = {**header[key], field: draw(values)}
    return header


ENDS = [
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_A.default.weight",
    ".lora_B.default.weight",
    ".lora_A",
    ".lora_B",
    ".alpha",
    ".dora_scale",
    ".diff",
    ".diff_b",
    ".lora_mid.weight",
    ".lora_A.weight_orig",
    ".lora_A.weight_mask",
    ".lora_A.weight_v",
    ".lora_A.weight_g",
    ".lora_A.qweight",
    ".lora_A.weight.absmax",
    ".lora_magnitude_vector",
    ".lora_embedding_A",
    ".lora_embedding_B",
    ".weight",
    ".modules_to_save.weight",
    ".base_layer.weight",
    ".lora_A.parametrizations.weight.original",
    ".lora_B.bias",
    ".token_adapter.trainable_tokens_delta",
    "",
]

keys = st.tuples(
    st.sampled_from(["", "base_model.model.", "module.", "_orig_mod.", "thinker.base_model.model.", "base_model."]),
    st.one_of(st.sampled_from([*MODULES, "lora_head", "a.lora_A", "enc.lora_proj"]), texts),
    st.sampled_from(ENDS),
).map("".join)

tensors = st.sampled_from(
    [
        torch.ones(2, 6), torch.ones(5, 2), torch.ones(()), torch.ones(0), torch.ones(2, 0), torch.ones(3),
        torch.full((2, 6), 1e30), torch.full((5, 2), float("nan")), torch.ones(2, 6, dtype=torch.int8),
        torch.ones(5, 2, dtype=torch.bfloat16), torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 6, 1, 1),
        torch.ones(5, 2, dtype=torch.float64), torch.zeros(2, 6), torch.ones(2, 6).to(torch.float8_e4m3fn),
    ]
)  # fmt: skip

fields = st.one_of(st.sampled_from(sorted(LORA_FIELDS)), st.sampled_from(["peft_type", "r", "lora_alpha"]), texts)
patterns = st.dictionaries(st.one_of(texts, st.sampled_from(["q_proj", "^model", ".*", *MODULES])), scalars, max_size=4)


@attack(data=changed(FILE))
def test_changed_bytes_are_read_or_refused(place, survived, data):
    _write_and_read(place, survived, data)


@attack(
    header=st.one_of(headers(), values, st.binary(max_size=40)), length=st.one_of(st.none(), st.integers(0, 2**64 - 1))
)
def test_any_header_is_read_or_refused(place, survived, header, length):
    _write_and_read(place, survived, safetensors_of(header, BODY, length))


@attack(named=st.dictionaries(keys, tensors, max_size=6), sound=st.booleans())
def test_any_names_and_tensors_are_read_or_refused(place, survived, named, sound):
    metadata, whole = {CONFIG_KEY: json.dumps(CONFIG)}, {**(TENSORS if sound else {}), **named}
    _write_and_read(place, survived, save({key: tensor.clone() for key, tensor in whole.items()}, metadata))


@attack(changes=st.dictionaries(fields, st.one_of(values, patterns), min_size=1, max_size=4))
def test_any_configuration_is_read_or_refused(place, survived, changes):
    _write_and_read(place, survived, save(TENSORS, {CONFIG_KEY: dumps({**CONFIG, **changes})}))


@attack(
    text=st.one_of(texts, values.map(dumps), changed(json.dumps(CONFIG).encode()).map(lambda b: b.decode("latin-1")))
)
def test_any_text_for_a_configuration_is_read_or_refused(place, survived, text):
    _write_and_read(place, survived, save(TENSORS, {CONFIG_KEY: text}))


@attack(record=values, task=st.one_of(values, st.dictionaries(st.sampled_from(KEYS), values, max_size=6)))
def test_any_record_is_read_and_its_task_built_or_refused(place, survived, record, task):
    whole = {**(record if isinstance(record, dict) else {"x": record}), "task": task}
    metadata = {CONFIG_KEY: json.dumps(CONFIG), RECORD_KEY: dumps(whole)}
    path = place / "record.safetensors"
    path.write_bytes(save(TENSORS, metadata))
    read(path, path.stat().st_size, survived)
    with survived():
        task_of(Adapter.load(path))


@attack(data=st.one_of(st.binary(max_size=200), changed(BIN)))
def test_a_torch_file_of_any_bytes_is_read_or_refused(place, survived, data):
    path = place / "x.bin"
    path.write_bytes(data)
    (place / "adapter_config.json").write_text(json.dumps(CONFIG))
    try:
        read(path, len(data), survived)
    finally:
        (place / "adapter_config.json").unlink()


@attack(examples=60, data=changed(FILE), config=st.dictionaries(fields, values, max_size=2))
def test_inspect_shows_no_traceback_and_no_control_codes(place, survived, data, config, capsys_of):
    path = place / "shown.safetensors"
    whole = save(
        {f"base_model.model.{'x'}\x1b[31m.lora_A.weight": torch.ones(2, 6), **TENSORS},
        {CONFIG_KEY: dumps({**CONFIG, **config})},
    )
    path.write_bytes(data if len(config) == 0 else whole)
    out = capsys_of(["inspect", str(path)])
    assert "Traceback" not in out
    assert not [c for c in out if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or c in "\u202e\u2066"]


def _write_and_read(place: Path, survived, data: bytes) -> None:
    path = place / "a.safetensors"
    path.write_bytes(data)
    read(path, len(data), survived)


_PARTS = ("unet", "text_encoder", "transformer", "")
_UNET, _CLIP = "unet.down_blocks.0.attn1.to_q", "text_encoder.text_model.encoder.layers.0.mlp.fc1"


@attack(
    examples=120,
    said=st.dictionaries(
        st.tuples(st.sampled_from(_PARTS), st.one_of(fields, texts)).map(".".join), values, max_size=6
    ),
    names=st.dictionaries(st.sampled_from([_UNET, _CLIP, "x"]), st.sampled_from(["lora", "lora_A", "to_q_lora"])),
)
def test_headers_of_diffusers_say_what_they_say(place, survived, said, names):
    pieces = {
        _UNET: ".lora_A.weight .lora_B.weight",
        _CLIP: ".lora_linear_layer.down.weight .lora_linear_layer.up.weight",
    }
    pieces |= {f"{name}.{odd}": ".down.weight .up.weight" for name, odd in names.items()}
    tensors = {}
    for name, ends in pieces.items():
        tensors |= {name + end: torch.ones(shape) for end, shape in zip(ends.split(), ((2, 6), (5, 2)), strict=True)}
    path = place / "diffusers.safetensors"
    path.write_bytes(save(tensors, {"lora_adapter_metadata": dumps(said)}))
    read(path, path.stat().st_size, survived)


@attack(
    examples=120,
    said=st.dictionaries(st.sampled_from(["fine_tune_type", "num_layers", "model", "fan_in_fan_out"]), values),
    parameters=st.one_of(
        values, st.dictionaries(st.sampled_from(["rank", "scale", "dropout", "alpha", "keys"]), values)
    ),
    sound=st.booleans(),
)
def test_configurations_of_mlx_say_what_they_say(place, survived, said, parameters, sound):
    if sound and isinstance(parameters, dict):
        parameters = {"rank": 2, "scale": 20.0, **{k: v for k, v in parameters.items() if k not in ("rank", "scale")}}
    tensors = {f"{MODULES[0]}.lora_a": torch.ones(6, 2), f"{MODULES[0]}.lora_b": torch.ones(2, 5)}
    folder = place / "mlx"
    folder.mkdir(exist_ok=True)
    (folder / "adapters.safetensors").write_bytes(save(tensors))
    (folder / "adapter_config.json").write_text(
        dumps({"fine_tune_type": "lora", **said, "lora_parameters": parameters})
    )
    read(folder, 10_000, survived)
    (folder / "adapter_config.json").unlink()
