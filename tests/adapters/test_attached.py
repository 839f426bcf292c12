import dataclasses
import json
from pathlib import Path

import pytest
import torch
from making_adapters import lora, perturbed, write
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.models.attached import attach, load_peft, peft_config, weight_deltas
from lora_lab.errors import MismatchError, TunerError
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.training.coto import Switches
from lora_lab.training.recipe import tuners

CASES = Path(__file__).parents[1] / "cases"


def snapshot(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [(name, type(module), module.training) for name, module in model.named_modules()],
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        set(vars(model)),
        [id(module) for module in model.modules()],
    )


def assert_unchanged(model, before):
    weights, *rest = before
    now, *rest_now = snapshot(model)
    assert rest == rest_now
    assert list(now) == list(weights)
    assert all(torch.equal(now[name], weights[name]) for name in weights)


def peft_folder(tmp_path, config_class, options, name="adapter"):
    """An adapter of random weights, saved by PEFT, and the scores that PEFT's own model gets."""
    task = Digits("relabel")
    model = perturbed(task, config_class(**options), seed=1, scale=0.05)
    model.save_pretrained(tmp_path / name)
    return tmp_path / name, task.score(model, "validation")


_OPTIONS = {
    "ia3": {"feedforward_modules": []},
    "c3a": {"block_size": 16},
    "vblora": {"vector_length": 16},
    "oft": {"oft_block_size": 4},
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("name", sorted(tuners()))
def test_an_attached_adapter_scores_as_in_peft_and_leaves_no_trace(name, tmp_path):
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    tuner = tuners()[name]
    cls = next(c for kind, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.name == tuner.peft_type)
    options = {"target_modules": r"vit\.layers\.[01]\..*(q_proj|fc1)", **tuner.preset, **_OPTIONS.get(name, {})}
    folder, expected = peft_folder(tmp_path, cls, options)
    task = Digits("relabel")
    model = task.build_model()
    before, base = snapshot(model), task.score(model, "validation")
    with attach(model, Adapter.load(folder)) as attached:
        found = task.score(attached.model, "validation")
        assert len(attached.layers) == 4
    assert found.loss == pytest.approx(expected.loss, abs=1e-5)
    assert abs(found.loss - base.loss).max() > 1e-4
    assert_unchanged(model, before)


def test_a_model_is_restored_after_an_error(tmp_path):
    folder, _ = peft_folder(tmp_path, LoraConfig, {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]})
    model = Digits("relabel").build_model()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="inside"), attach(model, Adapter.load(folder)):
        raise RuntimeError("inside")
    assert_unchanged(model, before)


def test_heads_in_modules_to_save_are_used_and_taken_off_again(tmp_path):
    options = {"target_modules": ["q_proj"], "modules_to_save": ["classifier"], "init_lora_weights": False}
    folder, expected = peft_folder(tmp_path, LoraConfig, options)
    task = Digits("relabel")
    model = task.build_model()
    before = snapshot(model)
    adapter = Adapter.load(folder)
    assert len(adapter.others) == 2
    with attach(model, adapter) as attached:
        assert task.score(attached.model, "validation").loss == pytest.approx(expected.loss, abs=1e-6)
    assert_unchanged(model, before)


def test_weights_change_in_place_and_modules_stay(tmp_path):
    options = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    adapters, scores = [], []
    for i, rank in enumerate((2, 5)):
        folder, expected = peft_folder(tmp_path, LoraConfig, {**options, "r": rank, "lora_alpha": 3 + i}, name=str(i))
        adapters.append(Adapter.load(folder))
        scores.append(expected.loss)
    task = Digits("relabel")
    with attach(task.build_model(), *adapters) as attached:
        modules = [id(module) for module in attached.model.modules()]
        for index in (0, 1, 0):
            attached.set(adapters[index])
            assert (task.score(attached.model, "validation").loss == scores[index]).all()
        assert modules == [id(module) for module in attached.model.modules()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_computed_in_float32_as_in_peft(dtype, tmp_path):
    options = {"target_modules": ["q_proj"], "modules_to_save": ["classifier"], "init_lora_weights": False}
    folder, _ = peft_folder(tmp_path, LoraConfig, options)
    adapter = Adapter.load(folder)
    half = dataclasses.replace(adapter, tensors={key: t.to(dtype) for key, t in adapter.tensors.items()})
    half.save(tmp_path / "half")
    task = Digits("relabel")
    expected = task.score(PeftModel.from_pretrained(task.build_model(), tmp_path / "half"), "validation")
    with attach(task.build_model(), Adapter.load(tmp_path / "half")) as attached:
        assert (task.score(attached.model, "validation").loss == expected.loss).all()


def test_a_float32_adapter_on_a_bfloat16_model_scores_as_in_peft(tmp_path):
    folder, _ = peft_folder(tmp_path, LoraConfig, {"target_modules": ["q_proj"], "init_lora_weights": False})
    task = Digits("relabel")
    pixels = task.split("validation").inputs["pixel_values"].bfloat16()
    wrapped = PeftModel.from_pretrained(task.build_model().bfloat16(), folder)
    expected = wrapped(pixel_values=pixels).logits
    with attach(task.build_model().bfloat16(), Adapter.load(folder)) as attached:
        assert torch.equal(attached.model(pixel_values=pixels).logits, expected)


def test_modules_that_an_adapter_lacks_are_bypassed(tmp_path):
    options = {"init_lora_weights": False}
    both, _ = peft_folder(tmp_path, LoraConfig, {**options, "target_modules": ["q_proj", "v_proj"]}, "both")
    one, expected = peft_folder(tmp_path, LoraConfig, {**options, "target_modules": ["q_proj"]}, "one")
    task = Digits("relabel")
    with attach(task.build_model(), Adapter.load(both)) as attached:
        attached.set(Adapter.load(one))
        assert (task.score(attached.model, "validation").loss == expected.loss).all()


@pytest.mark.parametrize(
    ("case", "folder"),
    [
        ("R28_dora", "adapter"),
        ("R28_dora", "adapter_weight_suffix"),
        ("K10_pissa_olora_init", "adapter"),
        ("R25_gpt2_conv1d_fan_in_fan_out", "adapter"),
        ("R01_rslora_scaling", "adapter"),
    ],
)
def test_the_delta_against_the_base_is_exact_for_every_tuner(case, folder):
    from transformers import AutoModelForCausalLM

    about = json.loads((CASES / case / "expected.json").read_text())
    base = "gpt2_tiny" if "gpt2" in case else "llama_tiny"
    model = AutoModelForCausalLM.from_pretrained(CASES / "_bases" / base)
    before = snapshot(model)
    deltas = weight_deltas(model, Adapter.load(CASES / case / folder))
    expected = load_file(CASES / case / "expected_delta.safetensors")
    assert set(deltas) == set(expected)
    for name, delta in expected.items():
        assert torch.allclose(deltas[name], delta, rtol=10 * about["rtol"], atol=1e-6), name
    assert_unchanged(model, before)


def test_a_lone_file_loads_in_peft(tmp_path):
    folder, expected = peft_folder(tmp_path, LoraConfig, {"target_modules": ["q_proj"], "init_lora_weights": False})
    path = Adapter.load(folder).save(tmp_path / "lone.safetensors")
    task = Digits("relabel")
    assert (task.score(load_peft(task.build_model(), path), "validation").loss == expected.loss).all()


def test_an_adapter_of_another_model_is_refused_by_module():
    adapter = Adapter.load(CASES / "R01_rslora_scaling/adapter")
    with (
        pytest.raises(MismatchError, match=r"another base model\? this one has no module model.layers.0.self_attn"),
        attach(Digits("relabel").build_model(), adapter),
    ):
        pass


def test_a_shape_that_does_not_fit_is_named(tmp_path):
    folder, _ = peft_folder(tmp_path, LoraConfig, {"target_modules": ["fc1"], "init_lora_weights": False})
    adapter = Adapter.load(folder)
    model = Digits("relabel").build_model()
    model.vit.layers[2].mlp.fc1 = torch.nn.Linear(64, 96)
    before = snapshot(model)
    with (
        pytest.raises(MismatchError, match=r"vit.layers.2.mlp.fc1 is \(96, 64\) in this model, its ΔW is \(128, 64\)"),
        attach(model, adapter),
    ):
        pass
    assert_unchanged(model, before)


def test_a_conv1d_adapter_whose_config_lacks_fan_in_fan_out_scores_as_in_peft():
    from transformers import AutoModelForCausalLM

    adapter = Adapter.load(CASES / "R25_gpt2_conv1d_fan_in_fan_out/adapter")
    ids, logits = torch.arange(6)[None], []
    for config in (adapter.config, {**adapter.config, "fan_in_fan_out": False}):
        model = AutoModelForCausalLM.from_pretrained(CASES / "_bases/gpt2_tiny")
        with attach(model, dataclasses.replace(adapter, config=config)) as attached:
            logits.append(attached.model(input_ids=ids).logits)
    assert torch.equal(*logits)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:.*come with a whole weight")  # that of an adapted head, which PEFT saves along
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2, 3]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["trained tokens", "embedding", "head", "whole head"],
)
def test_what_lies_beside_the_layers_acts_as_in_peft_and_goes_again(options, base_model, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(base_model("llama"), LoraConfig(r=2, init_lora_weights=False, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.eval().save_pretrained(tmp_path / "a")
    ids = torch.arange(8)[None]
    base, expected = base_model("llama"), model(input_ids=ids).logits
    before, plain = snapshot(base), base(input_ids=ids).logits
    with attach(base, Adapter.load(tmp_path / "a")) as attached:
        assert torch.equal(attached.model(input_ids=ids).logits, expected)
    assert_unchanged(base, before)
    assert torch.equal(base(input_ids=ids).logits, plain)
    if "trainable_token_indices" in options:
        assert not any(name.endswith("token_adapter") for names in Switches(model).groups.values() for name in names)


def test_biases_are_used_and_taken_off_again(tmp_path):
    options = {"target_modules": ["q_proj"], "bias": "all", "init_lora_weights": False}
    folder, expected = peft_folder(tmp_path, LoraConfig, options)
    task = Digits("relabel")
    model = task.build_model()
    before = snapshot(model)
    with attach(model, Adapter.load(folder)) as attached:
        assert (task.score(attached.model, "validation").loss == expected.loss).all()
    assert_unchanged(model, before)


def test_an_adapter_without_a_head_does_not_keep_the_last_ones(tmp_path):
    options = {"target_modules": ["q_proj"], "init_lora_weights": False}
    headed, _ = peft_folder(tmp_path, LoraConfig, {**options, "modules_to_save": ["classifier"]}, "headed")
    plain, expected = peft_folder(tmp_path, LoraConfig, options, "plain")
    task = Digits("relabel")
    with attach(task.build_model(), Adapter.load(headed)) as attached:
        attached.set(Adapter.load(headed))  # of two heads in turn, neither is the base's own
        attached.set(Adapter.load(plain))
        assert (task.score(attached.model, "validation").loss == expected.loss).all()


def test_replicated_layers_are_refused_by_name():
    adapter = Adapter.load(CASES / "R01_rslora_scaling/adapter")
    replicated = dataclasses.replace(adapter, config={**adapter.config, "layer_replication": [[0, 2], [1, 2]]})
    with pytest.raises(TunerError, match="layer_replication"), attach(torch.nn.Linear(2, 2), replicated):
        pass


@pytest.mark.parametrize("pattern", ["((", "(.*)*(.*)*" * 300 + "q"])
def test_no_pattern_of_a_file_reaches_peft(pattern):
    from transformers import AutoModelForCausalLM

    adapter = Adapter.load(CASES / "R01_rslora_scaling/adapter")
    fields = {"modules_to_save": [pattern], "exclude_modules": pattern, "layers_to_transform": [0]}
    fields |= {"layers_pattern": [pattern], "target_modules": [pattern]}
    odd = dataclasses.replace(adapter, config={**adapter.config, **fields})
    model = AutoModelForCausalLM.from_pretrained(CASES / "_bases/llama_tiny")
    given = peft_config(odd)
    assert pattern not in json.dumps(given.to_dict(), default=str)
    with attach(model, odd) as attached:
        assert set(attached.layers) == set(adapter.sites)


def test_settings_of_modules_reach_peft_by_their_exact_names(tmp_path):
    ranks = {"layers.0.q_proj": 2, "layers.1.q_proj": 3, "layers.2.q_proj": 3}
    tensors = {key: t for name, rank in ranks.items() for key, t in lora(name, rank=rank).items()}
    config = {"rank_pattern": {r".*\.[12]\..*": 3}, "alpha_pattern": {"2.q_proj": 5, "q_proj": 7}}
    given = peft_config(Adapter.load(write(tmp_path, tensors, **config)))
    assert given.rank_pattern == {r"^(layers\.1\.q_proj|layers\.2\.q_proj)$": 3}
    assert given.alpha_pattern == {r"^(layers\.2\.q_proj)$": 5, r"^(layers\.0\.q_proj|layers\.1\.q_proj)$": 7}


@pytest.mark.parametrize("wrong", ["head", "lora_A", "lora_B", "dims"])
def test_a_shape_is_compared_before_anything_is_changed(tmp_path, wrong):
    from types import SimpleNamespace

    model = torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 6), "head": torch.nn.Linear(6, 3)})
    model.config = SimpleNamespace(to_dict=dict)
    tensors = {**lora("fc"), "base_model.model.head.weight": torch.ones(3, 6)}
    good = Adapter.load(write(tmp_path, tensors, modules_to_save=["head"]))
    key = {"head": "head.weight", "dims": "head.weight"}.get(wrong, f"fc.{wrong}.weight")
    old = good.tensors[f"base_model.model.{key}"]
    odd = {
        "head": torch.ones(2, 6),
        "dims": torch.ones(3, 6, 1),
        "lora_A": torch.ones(2, 5),
        "lora_B": torch.ones(5, 2),
    }
    bad = dataclasses.replace(good, tensors={**good.tensors, f"base_model.model.{key}": odd[wrong]})
    with attach(model, good) as attached:
        before = {name: tensor.clone() for name, tensor in attached._tensors.items()}
        with pytest.raises(MismatchError) as caught:
            attached.set(bad)
        assert f"{key} is {list(odd[wrong].shape)}, its place in the model {list(old.shape)}" in str(caught.value)
        assert all(torch.equal(tensor, before[name]) for name, tensor in attached._tensors.items())


def test_a_tuner_without_layers_is_refused(tmp_path):
    adapter = Adapter.load(CASES / "R01_rslora_scaling/adapter")
    prompt = Adapter({}, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}, {})
    with pytest.raises(TunerError, match="PROMPT_TUNING has no layers"), attach(torch.nn.Linear(2, 2), prompt):
        pass
    assert adapter.sites
