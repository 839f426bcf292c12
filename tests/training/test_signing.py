"""Records in what a PEFT model saves while somebody else's Trainer trains it."""

import copy
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig
from test_coto import llama, trainer

from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import LoraLabWarning
from lora_lab.files.ownership import foreign
from lora_lab.training.coto import CoToCallback
from lora_lab.training.schedule import Schedule


def test_checkpoints_and_what_is_saved_at_the_end_say_how_they_were_trained(tmp_path):
    model, callback = llama(), CoToCallback(Schedule("sine", p0=0.2), seed=5)
    run = trainer(model, tmp_path, callback, save_strategy="steps", save_steps=4, seed=7)
    run.train()
    run.save_model(tmp_path / "end")
    model.save_pretrained(tmp_path / "own")
    last = len(callback.log)
    for folder, steps in (("checkpoint-4", 4), ("checkpoint-8", 8), ("end", last), ("own", last)):
        adapter = Adapter.load(tmp_path / folder)
        assert adapter.origin.own
        assert (adapter.record["method"], adapter.record["seed"]) == ("coto", 7)
        said = adapter.record["coto"]
        assert Schedule(**said["schedule"]) == callback.schedule
        assert said["groups"] == ["model.layers.0", "model.layers.1"]
        assert (said["seed"], said["steps"]) == (5, last)
        assert said["masks"] == ["".join("01"[int(on)] for on in mask) for _, _, mask in callback.log[:steps]]
        assert foreign(tmp_path / folder) is not None  # a training of the user's is not for replacing


@pytest.mark.parametrize(("law", "method"), [("high", "coto-h"), ("low", "coto-l"), ("depth", "stochastic-depth")])
def test_the_method_is_that_of_the_masks_law(law, method):
    assert CoToCallback(Schedule(law=law)).record["method"] == method


def test_other_adapters_of_the_model_get_it_too_and_other_processes_write_nothing(tmp_path):
    model, callback = llama(), CoToCallback()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    trainer(model, tmp_path / "run", callback, max_steps=2).train()
    model.save_pretrained(str(tmp_path / "all"))
    assert Adapter.load(tmp_path / "all" / "second").record["method"] == "coto"
    model.save_pretrained(str(tmp_path / "one"), selected_adapters=["second"])
    assert not (tmp_path / "one" / "adapter_model.safetensors").exists()
    model.save_pretrained(str(tmp_path / "none"), is_main_process=False)
    assert not list((tmp_path / "none").glob("*.safetensors"))


def test_a_copy_of_the_model_saves_itself_and_a_pickled_one_too(tmp_path):
    model = llama()
    trainer(model, tmp_path / "run", CoToCallback(), max_steps=2).train()
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for i, twin in enumerate(twins):
        twin.save_pretrained(tmp_path / str(i))
        assert Adapter.load(tmp_path / str(i)).total_norm > 0
        assert Adapter.load(tmp_path / str(i)).record["method"] == "coto"


def test_an_adapter_without_a_place_for_a_record_is_saved_all_the_same(tmp_path, monkeypatch):
    model = llama()
    trainer(model, tmp_path / "run", CoToCallback(), max_steps=1).train()
    monkeypatch.setattr("lora_lab.adapters.files.recording.write_safetensors", _full)
    with pytest.warns(LoraLabWarning, match="saved without a record of its training: no space"):
        model.save_pretrained(tmp_path / "w")
    assert Adapter.load(tmp_path / "w").record == {}


def _full(*_):
    raise OSError("no space left")


def test_groups_that_do_not_move_are_told_after_the_first_steps(tmp_path):
    model = llama()
    for name, parameter in model.named_parameters():
        if ".layers.1." in name:
            parameter.requires_grad_(False)
    with pytest.warns(LoraLabWarning, match=r"after 10 steps the adapters of model\.layers\.1 are as they were"):
        trainer(model, tmp_path, CoToCallback(Schedule(p0=1)), max_steps=12).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoraLabWarning)
        trainer(llama(), tmp_path, CoToCallback(), max_steps=12).train()
        trainer(model, tmp_path, CoToCallback(Schedule(p0=1)), max_steps=8).train()
