"""Records put into the files of adapters that were trained elsewhere."""

import hashlib
import json
import shutil

import pytest
import torch
from making_adapters import lora, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files.recording import put_record
from lora_lab.adapters.files.writing import RECORD_KEY
from lora_lab.errors import AdapterError, FileError, OptionError
from lora_lab.files.ownership import foreign

FACTS = {"task": {"name": "digits/relabel"}, "method": "lora", "seed": 3}


def header_of(path):
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


@pytest.fixture
def folder(tmp_path):
    """An adapter as PEFT writes it, with metadata of somebody's own."""
    made = write(tmp_path / "a", lora("layers.0.q_proj") | lora("layers.1.q_proj"))
    tensors = {
        name: tensor.to(torch.bfloat16) for name, tensor in load_file(made / "adapter_model.safetensors").items()
    }
    save_file(tensors, made / "adapter_model.safetensors", {"format": "pt", "note": "mine"})
    return made


def test_nothing_but_the_record_is_changed_and_it_is_the_users_own(folder):
    weights, config = folder / "adapter_model.safetensors", (folder / "adapter_config.json").read_bytes()
    before, digest = load_file(weights), Adapter.load(folder).digest
    (recorded,) = put_record([folder], FACTS)
    adapter = Adapter.load(folder)
    assert recorded.record == adapter.record == FACTS
    assert adapter.origin.own
    assert adapter.digest == digest
    after = load_file(weights)
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == torch.bfloat16 for name in before)
    assert (folder / "adapter_config.json").read_bytes() == config
    assert header_of(weights)["note"] == "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_entries_are_added_to_a_record_of_ones_own_and_replace_its_others(folder):
    put_record([folder], FACTS)
    (recorded,) = put_record([folder], {"seed": 4})
    assert recorded.record == Adapter.load(folder).record == {**FACTS, "seed": 4}
    assert recorded.dropped == []


def test_a_file_that_was_trained_elsewhere_is_not_replaced_for_its_record(folder, tmp_path):
    put_record([folder], FACTS)
    assert foreign(folder) is not None
    made = Adapter.load(folder).save(tmp_path / "made")
    put_record([made], {"seed": 9})
    assert foreign(made) is None  # it was written here in the first place


def test_what_a_stranger_has_recorded_is_not_signed(folder):
    weights = folder / "adapter_model.safetensors"
    evil = {"task": {"kind": "text", "base": "/etc", "data": "x.csv"}, "seed": 1}
    save_file(load_file(weights), weights, {RECORD_KEY: json.dumps(evil)})
    (recorded,) = put_record([folder], {"method": "lora"})
    assert recorded.record == Adapter.load(folder).record == {"method": "lora"}
    assert recorded.dropped == ["seed", "task"]


def test_a_changed_tensor_ends_the_signature(folder):
    put_record([folder], FACTS)
    weights = folder / "adapter_model.safetensors"
    header, tensors = header_of(weights), load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights, header)
    assert not Adapter.load(folder).origin.own


def test_files_of_other_formats_keep_their_header(tmp_path):
    made = Adapter.load(write(tmp_path / "a", lora("layers.0.q_proj"))).save(tmp_path / "m", format="mlx")
    put_record([made], FACTS)
    adapter = Adapter.load(made)
    assert adapter.layout.format == "mlx"
    assert adapter.record == FACTS
    assert adapter.origin.own


def test_nothing_is_written_unless_every_adapter_can_be(folder, tmp_path):
    weights = folder / "adapter_model.safetensors"
    before = hashlib.sha256(weights.read_bytes()).hexdigest()
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"no")
    pickled = tmp_path / "p"
    shutil.copytree(folder, pickled)
    (pickled / "adapter_model.safetensors").unlink()
    torch.save(load_file(weights), pickled / "adapter_model.bin")
    odd = write(tmp_path / "odd", {"base_model.model.layers.0.q_proj.lora_A.weight": torch.ones(2, 4)})
    for other, error, message in (
        (broken, FileError, "adapter_model.safetensors"),
        (pickled, FileError, "adapter_model.bin: pickled weights hold no record"),
        (odd, AdapterError, "lora_B"),
        ("org/name", FileError, "org/name: no such file or folder; a record is put into files of this machine"),
    ):
        with pytest.raises(error, match=message):
            put_record([folder, other], FACTS)
    with pytest.raises(OptionError, match="method 'a\\\\x07': a name that can be printed"):
        put_record([folder], {"method": "a\x07"})
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == before
