"""One base under several names: told from configurations and norms, as far as an adapter may lead there."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from making_adapters import lora, write
from safetensors.torch import load_file, save_file

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.models.bases import check_shapes, difference, same_base
from lora_lab.adapters.renames import require_shared_modules
from lora_lab.errors import LoraLabNote, LoraLabWarning, MismatchError
from lora_lab.files.trust import Origin
from lora_lab.merging.sources import base_of
from lora_lab.tasks.choosing import task_of

LLAMA = Path(__file__).parents[1] / "cases/_bases/llama"
QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def changed(folder, **fields):
    """The base's configuration with other fields; None takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture
def bases(tmp_path, monkeypatch):
    """A base in the hub's cache, in a folder, and quantised in another: the names that adapters have of them."""
    cached = tmp_path / "cache/models--org--llama"
    shutil.copytree(LLAMA, cached / "snapshots/abc")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    local, twin = tmp_path / "local", tmp_path / "twin"
    shutil.copytree(LLAMA, local)
    changed(local, transformers_version="4.40.0", dtype="bfloat16", _name_or_path="elsewhere", use_cache=None)
    shutil.copytree(LLAMA, twin)
    changed(twin, quantization_config=QUANTISED, architectures=["LlamaModel"], unsloth_fixed=True, pad_token_id=3)
    tensors = load_file(twin / "model.safetensors")
    codes = {
        n: t.to(torch.bfloat16) if t.ndim == 1 else torch.zeros(5, 1, dtype=torch.uint8) for n, t in tensors.items()
    }
    save_file(codes, twin / "model.safetensors")
    return {"hub": "org/llama", "local": str(local), "twin": str(twin)}


def adapter(folder, base, *, own=True, **more):
    tensors = lora("model.layers.0.self_attn.q_proj", rows=16, columns=16)
    made = Adapter.load(write(folder, tensors, base_model_name_or_path=base, **more))
    return Adapter(
        made.tensors, made.config, made.sites, made.record, made.source, Origin(own=own, folder=made.origin.folder)
    )


@pytest.mark.parametrize("pair", [("hub", "local"), ("hub", "twin"), ("local", "twin"), ("twin", "hub")])
def test_a_hub_id_its_copy_and_a_quantised_twin_are_one_base_which_is_told_once(bases, tmp_path, pair):
    adapters = [adapter(tmp_path / name, bases[name]) for name in pair]
    assert difference(*adapters) is None
    with pytest.warns(LoraLabNote) as caught:
        same_base(adapters)
    (note,) = caught
    assert all(repr(bases[name]) in str(note.message) for name in pair)
    assert "one base under two names" in str(note.message)


def test_what_differs_is_named(bases, tmp_path):
    first, other = (adapter(tmp_path / name, bases[name]) for name in ("hub", "local"))
    changed(Path(bases["local"]), rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    assert "their rope_parameters is" in difference(first, other)
    changed(Path(bases["local"]), rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    assert difference(first, other) is None
    weights = Path(bases["local"]) / "model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] * 1.01}, weights)  # tuned further
    assert difference(first, other) == "their weights differ, in model.norm.weight"
    with pytest.warns(LoraLabWarning, match="different base models.* their weights differ"):
        same_base([first, other])
    same_base([first, other], given=True)  # a warning would be an error


def test_what_a_download_names_is_read_in_its_own_folder_and_the_cache_alone(bases, tmp_path):
    mine = adapter(tmp_path / "mine", bases["hub"])
    theirs = adapter(tmp_path / "theirs", bases["local"], own=False)
    assert "is not at hand" in difference(mine, theirs)
    assert difference(mine, adapter(tmp_path / "own", bases["local"])) is None
    shutil.copytree(LLAMA, tmp_path / "theirs/base")
    assert difference(mine, adapter(tmp_path / "theirs", "base", own=False)) is None
    (tmp_path / "theirs/base/model.safetensors").unlink()
    (tmp_path / "theirs/base/model.safetensors").symlink_to(LLAMA / "model.safetensors")
    assert "is not at hand" in difference(mine, adapter(tmp_path / "theirs", "base", own=False))
    assert "is not at hand" in difference(mine, adapter(tmp_path / "theirs", "../local", own=False))
    assert difference(mine, adapter(tmp_path / "theirs", "org/llama", own=False)) is None


def test_a_task_on_one_base_under_two_names_is_one_task(bases, tmp_path):
    def recorded(name, base, **keys):
        task = {"kind": "causal-lm", "base": base, "data": "texts.jsonl", "text": "text", **keys}
        made = adapter(tmp_path / name, base)
        return Adapter(made.tensors, made.config, made.sites, {"task": task}, made.source, made.origin)

    first, other = recorded("a", bases["local"]), recorded("b", bases["twin"])
    with pytest.warns(LoraLabNote, match=r"one base under two names.*all are scored on .*local") as caught:
        task = task_of(first, other)
    assert len(caught) == 1
    assert Path(task.base).resolve() == Path(bases["local"])
    with pytest.raises(MismatchError, match="trained on different tasks"):
        task_of(first, recorded("c", bases["twin"], text="other"))
    changed(Path(bases["twin"]), num_key_value_heads=1)
    with pytest.raises(MismatchError, match="trained on different tasks, whose base is"):
        task_of(first, other)


def test_of_one_base_other_names_of_modules_are_told_as_such(bases, tmp_path):
    first = adapter(tmp_path / "a", bases["hub"])
    tensors = lora("language_model.layers.0.self_attn.q_proj", rows=16, columns=16)
    made = Adapter.load(write(tmp_path / "b", tensors, base_model_name_or_path=bases["local"]))
    own = Adapter(made.tensors, made.config, made.sites, {}, made.source, Origin(True, made.origin.folder))
    with pytest.raises(MismatchError, match="`rename` language_model=model makes them the same"):
        require_shared_modules([first, own])
    with pytest.raises(MismatchError, match="have different base models"):
        require_shared_modules([first, made])


def test_a_base_that_is_given_is_held_to_the_shapes(bases, tmp_path):
    named = adapter(tmp_path / "a", "elsewhere/llama")
    for base in bases.values():
        check_shapes([named], base)
        assert base_of([named], base) is not None
    wrong = Adapter.load(write(tmp_path / "b", lora("model.layers.0.self_attn.q_proj", rows=16, columns=8)))
    with pytest.raises(MismatchError, match=r"b: ΔW of model.layers.0.self_attn.q_proj is \[16, 8\], its weight in"):
        base_of([wrong], bases["local"])
    none = Adapter.load(write(tmp_path / "c", lora("encoder.layer.0.query", rows=16, columns=16)))
    with pytest.raises(MismatchError, match=r"c: .*local has no weight of encoder.layer.0.query; another base"):
        base_of([none], bases["local"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_shapes([none], "not/here")  # nothing is known of it
