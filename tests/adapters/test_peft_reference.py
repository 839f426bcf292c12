"""PEFT is the judge: what it writes is read, and what is written gives the same logits in it, in float64."""

import contextlib

import peft
import pytest
import torch
from making_adapters import PREFIX
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_models import LORA, Layers, assert_same, logits, quiet_embeddings, randomised
from safetensors.torch import load_file
from torch import nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.lowrank import combine
from lora_lab.errors import LoraLabWarning, TunerError


def in_peft(base: nn.Module, adapter: Adapter, path) -> nn.Module:
    """The adapter saved at `path` and loaded by PEFT: its own loader for a folder, its state-dict call for a file."""
    saved = adapter.save(path)
    if saved.is_dir():
        return peft.PeftModel.from_pretrained(base, saved).eval()
    read = Adapter.load(saved)
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(read.tuner)]
    model = peft.get_peft_model(base, config_class(**read.config))
    result = peft.set_peft_model_state_dict(model, dict(read.tensors))
    assert not result.unexpected_keys
    return model.eval()


def with_deltas(base: nn.Module, adapter: Adapter) -> nn.Module:
    """The base model with ΔW added to its weights, and the fully trained tensors in their place."""
    with torch.no_grad():
        for name, update in adapter.updates.items():
            base.get_submodule(name).weight += update.delta()
        for key in adapter.others:
            with contextlib.suppress(AttributeError):  # a base_layer of PEFT's own, equal to the base's
                base.get_parameter(key.removeprefix(PREFIX)).copy_(adapter.tensors[key])
    return base


@pytest.fixture
def trained(base_model, tmp_path):
    """Model name, PEFT config → adapter folder as PEFT writes it, and PEFT's own logits."""

    def make(name: str, config: peft.PeftConfig):
        torch.manual_seed(0)
        model = randomised(peft.get_peft_model(base_model(name), config))
        with quiet_embeddings():
            model.save_pretrained(tmp_path / "peft")
        return tmp_path / "peft", logits(model), model

    return make


# LoRA


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
@pytest.mark.parametrize("name", LORA)
def test_an_adapter_that_went_through_lora_lab_gives_pefts_logits(trained, base_model, tmp_path, name, target):
    folder, wanted, _ = trained(name, peft.LoraConfig(**LORA[name]))
    assert float((wanted - logits(base_model(name))).abs().max()) > 0.01
    assert_same(logits(in_peft(base_model(name), Adapter.load(folder), tmp_path / target)), wanted)


@pytest.mark.parametrize("name", LORA)
def test_what_peft_wrote_is_written_again_byte_for_byte(trained, tmp_path, name):
    folder, _, _ = trained(name, peft.LoraConfig(**LORA[name]))
    adapter = Adapter.load(folder)
    again = adapter.save(tmp_path / "out") / "adapter_model.safetensors"
    raw, written = load_file(folder / "adapter_model.safetensors"), load_file(again)
    assert set(raw) == set(written)
    assert all(raw[key].numpy().tobytes() == written[key].numpy().tobytes() for key in raw)


@pytest.mark.parametrize("name", LORA)
def test_updates_are_pefts_deltas(trained, name):
    folder, _, model = trained(name, peft.LoraConfig(**LORA[name]))
    updates = Adapter.load(folder).updates
    layers = {
        key.removeprefix(PREFIX): layer for key, layer in model.named_modules() if hasattr(layer, "get_delta_weight")
    }
    assert set(updates) == set(layers)
    for key, layer in layers.items():
        assert_same(updates[key].delta(), layer.get_delta_weight("default").detach())


@pytest.mark.parametrize("name", LORA)
def test_logits_are_those_of_the_base_with_the_deltas_added(trained, base_model, name):
    folder, wanted, _ = trained(name, peft.LoraConfig(**LORA[name]))
    assert_same(logits(with_deltas(base_model(name), Adapter.load(folder))), wanted)


CHANGES = {
    "truncated": lambda updates: {name: update.truncate(1)[0] for name, update in updates.items()},
    "uneven": lambda updates: {name: u.truncate(1 + i % 2)[0] for i, (name, u) in enumerate(updates.items())},
    "combined": lambda updates: {name: combine([u, u.truncate(1)[0]], [0.7, -0.4]) for name, u in updates.items()},
    "balanced": lambda updates: {name: update.balanced() * 1.5 for name, update in updates.items()},
    "fewer": lambda updates: dict(list(updates.items())[::2]),
    "one": lambda updates: dict(list(updates.items())[-1:]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LORA)
def test_changed_updates_mean_the_same_in_peft_as_in_the_dense_weights(trained, base_model, tmp_path, name, change):
    folder, before, _ = trained(name, peft.LoraConfig(**LORA[name]))
    adapter = Adapter.load(folder)
    changed = adapter.with_updates(CHANGES[change](adapter.updates), source="test")
    wanted = logits(with_deltas(base_model(name), changed))
    assert float((wanted - before).abs().max()) > 1e-6
    for target in ("changed", "changed.safetensors"):
        # PEFT warns of missing keys where it adapts a module that the file does not hold; warnings are errors here.
        assert_same(logits(in_peft(base_model(name), changed, tmp_path / target)), wanted)


@pytest.mark.parametrize("change", ["truncated", "combined", "fewer"])
def test_every_kind_of_layer_means_the_same_in_peft_and_in_the_dense_weights(tmp_path, change):
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Layers().double()

    targets = ["embedding", "conv1", "conv2", "point", "conv3", "linear"]
    model = randomised(peft.get_peft_model(make(), peft.LoraConfig(r=3, lora_alpha=4, target_modules=targets)))
    model.save_pretrained(tmp_path / "peft")
    adapter, ids = Adapter.load(tmp_path / "peft"), torch.arange(14).reshape(2, 7) % 7
    assert_same(with_deltas(make(), adapter)(ids).detach(), model(ids).detach())
    changed = adapter.with_updates(CHANGES[change](adapter.updates), source="test")
    wanted = with_deltas(make(), changed)(ids).detach()
    assert_same(in_peft(make(), changed, tmp_path / "out")(ids).detach(), wanted)


# Llama's layers have no bias of their own, and PEFT takes the adapter's for a shard
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'.*invalid shape")
@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"trainable_token_indices": [1, 5]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.0\..*(q|k)_proj"},
        {"layers_to_transform": [1]},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_parameters": ["o_proj.weight"]},
        {"init_lora_weights": "gaussian"},
        {"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"},
    ],
    ids=lambda config: next(iter(config)),
)
def test_every_option_of_lora_goes_through_unharmed(trained, base_model, tmp_path, config):
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], **config}
    folder, wanted, _ = trained("llama", peft.LoraConfig(**settings))
    told = "alora_invocation_tokens" if "alora_invocation_tokens" in config else None
    told = "a whole weight" if "lm_head" in settings["target_modules"] else told  # which PEFT saves along with it
    with pytest.warns(LoraLabWarning, match=told) if told else contextlib.nullcontext():
        adapter = Adapter.load(folder)
    assert_same(logits(in_peft(base_model("llama"), adapter, tmp_path / "out")), wanted)


def test_updates_on_replicated_layers_reach_each_copy(trained, base_model, tmp_path):
    settings = {"r": 2, "target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}
    folder, wanted, _ = trained("llama", peft.LoraConfig(**settings))
    adapter = Adapter.load(folder)
    assert len(adapter.sites) == 3
    same = adapter.with_updates(adapter.updates, source="test")
    assert_same(logits(in_peft(base_model("llama"), same, tmp_path / "out")), wanted)


# the state_dict of the whole model, as training scripts save it


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_of_a_saved_state_dict_the_adapter_is_kept(trained, base_model, tmp_path, name):
    folder, wanted, model = trained(name, peft.LoraConfig(**LORA[name]))
    (folder / "adapter_model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "adapter_model.bin")
    with pytest.warns(LoraLabWarning, match="copies of the base model's weights left out"):
        adapter = Adapter.load(folder)
    assert len(adapter.tensors) < len(model.state_dict()) / 2
    assert_same(logits(in_peft(base_model(name), adapter, tmp_path / "out")), wanted)


def test_of_two_adapters_in_a_saved_state_dict_either_is_kept(base_model, tmp_path):
    settings = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    model = peft.get_peft_model(base_model("bert"), peft.LoraConfig(**settings), adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(**settings))
    wanted = {}
    for seed, name in enumerate(("one", "two")):
        model.set_adapter(name)
        wanted[name] = logits(randomised(model, seed))
    model.save_pretrained(tmp_path / "peft")
    folder = tmp_path / "peft" / "one"
    (folder / "adapter_model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "adapter_model.bin")
    for name, expected in wanted.items():
        with pytest.warns(LoraLabWarning, match="copies of the base model's weights left out"):
            adapter = Adapter.load(folder, adapter_name=name)
        assert_same(logits(in_peft(base_model("bert"), adapter, tmp_path / name)), expected)


# other tuners

TUNERS = {
    "ADALORA": peft.AdaLoraConfig(total_step=10, init_r=3, target_modules=["q_proj", "v_proj"]),
    "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj", "o_proj"]),
    "FOURIERFT": peft.FourierFTConfig(n_frequency=9, target_modules=["q_proj", "v_proj"]),
    "HIRA": peft.HiraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LN_TUNING": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "LOHA": peft.LoHaConfig(r=2, alpha=3, target_modules=["q_proj", "v_proj"]),
    "LOKR": peft.LoKrConfig(r=2, alpha=3, target_modules=["q_proj", "v_proj"]),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "o_proj"]),
    "TRAINABLE_TOKENS": peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]),
    "VBLORA": peft.VBLoRAConfig(vector_length=4, num_vectors=8, target_modules=["q_proj", "v_proj"]),
    "VERA": peft.VeraConfig(r=2, target_modules=["q_proj", "o_proj"]),
}


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Unsupported layer type")
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor")
@pytest.mark.parametrize("tuner", TUNERS)
def test_every_tuner_goes_through_unharmed_with_its_delta_or_a_reason_for_none(trained, base_model, tmp_path, tuner):
    folder, wanted, model = trained("llama", TUNERS[tuner])
    adapter = Adapter.load(folder)
    raw = load_file(folder / "adapter_model.safetensors")
    assert set(adapter.tensors) == set(raw)
    assert adapter.tuner == tuner
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {key.removeprefix(PREFIX) for key, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    assert set(adapter.sites) == layers
    if tuner in ("LOHA", "LOKR"):
        for name, update in adapter.updates.items():
            layer = model.get_submodule(f"{PREFIX}{name}")
            torch.testing.assert_close(update.delta(), layer.get_delta_weight(layer.active_adapters[0]))
    else:
        with pytest.raises(TunerError, match=tuner):
            _ = adapter.updates
    if tuner == "ADALORA":  # PEFT does not save its rank count, so its own reloading is the reference
        wanted = logits(peft.PeftModel.from_pretrained(base_model("llama"), folder).eval())
    assert float((wanted - logits(base_model("llama"))).abs().max()) > 1e-6
    assert_same(logits(in_peft(base_model("llama"), adapter, tmp_path / "out")), wanted)
    if tuner != "VBLORA":  # whose vectors live outside of PEFT's state-dict call
        assert_same(logits(in_peft(base_model("llama"), adapter, tmp_path / "out.safetensors")), wanted)
