"""Cases whose numbers are those of a base model that wears the adapter, here and in PEFT."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.models.attached import attach
from lora_lab.errors import LoraLabWarning, MismatchError, TunerError
from lora_lab.hub import base_model
from lora_lab.merging.merged import merge
from lora_lab.merging.paths import Paths
from lora_lab.merging.sources import Sources
from lora_lab.merging.writing.export import save
from lora_lab.pruning.modules import keep_modules
from lora_lab.pruning.ranks import keep_ranks
from lora_lab.training.coto import Switches

CASES = Path(__file__).parents[1] / "cases"


def expected_of(case: str) -> dict:
    return json.loads((CASES / case / "expected.json").read_text())


def base(case: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, on the tiny models' settings
        return base_model(str(CASES / expected_of(case)["base"]))


def logits(model, case: str, io: str = "io") -> tuple[torch.Tensor, torch.Tensor]:
    """What the model gives for the case's input, and what it should give with the adapter."""
    tensors = load_file(CASES / case / f"{io}.safetensors")
    with torch.no_grad():
        return model(input_ids=tensors["input_ids"]).logits, tensors["logits"]


def assert_in_peft(folder: Path, case: str, io: str = "io") -> None:
    """PEFT loads the folder without a word, and the scores are the case's."""
    with warnings.catch_warnings():  # any other warning is an error
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        model = PeftModel.from_pretrained(base(case), folder)
    torch.testing.assert_close(*logits(model.eval(), case, io), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "adapter", "io"),
    [
        ("N10_router_parameter_export", "adapter", "io"),
        ("N23_tied_heads_trained_apart", "adapter", "io"),
        ("N27_excluded_and_chosen_layers", "exclude", "exclude_io"),
        ("N27_excluded_and_chosen_layers", "layers", "layers_io"),
    ],
)
def test_a_case_scores_as_it_should_and_leaves_its_base_as_it_was(case, adapter, io, tmp_path):
    model, loaded = base(case), Adapter.load(CASES / case / adapter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with attach(model, loaded):
        torch.testing.assert_close(*logits(model, case, io), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    assert tied == ("tied" in case)
    assert_in_peft(loaded.save(tmp_path / "again"), case, io)


@pytest.mark.parametrize("name", ["exclude", "layers"])
def test_n27_what_is_made_of_an_adapter_lists_its_modules_and_loads_in_peft(name, tmp_path):
    case = "N27_excluded_and_chosen_layers"
    adapter = Adapter.load(CASES / case / name)
    merged = merge(Sources([adapter, adapter], [0.5, 0.5]))
    save(merged, tmp_path / "merged")
    halves = keep_ranks(adapter, {site: range(3, -1, -1) for site in adapter.sites}).save(tmp_path / "ranks")
    for folder in (tmp_path / "merged", halves, Paths([adapter]).mix([1.0], "delta").save(tmp_path / "mixed")):
        assert_in_peft(folder, case, f"{name}_io")
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(adapter.sites)
    assert not any(config.get(field) for field in ("exclude_modules", "layers_to_transform", "layers_pattern"))


def test_n10_a_parameter_of_a_router_is_never_written_as_a_module():
    adapter = Adapter.load(CASES / "N10_router_parameter_export/adapter")
    q = next(name for name in adapter.sites if "q_proj" in name)
    for operation in (
        lambda: merge(Sources([adapter, adapter], [0.5, 0.5])),
        lambda: keep_modules(adapter, [q]),
        lambda: keep_ranks(adapter, {q: [0]}),
    ):
        with pytest.raises(TunerError, match="target_parameters"):
            operation()


def test_n08_experts_of_their_own_meet_fused_ones_and_the_error_says_so():
    case = "N08_moe_v4_experts_on_v5"
    adapter, model = Adapter.load(CASES / case / "adapter"), base(case)
    with (
        pytest.raises(MismatchError, match=r"experts that were modules of their own .* fused") as caught,
        attach(model, adapter),
    ):
        pass
    assert "another base model" not in str(caught.value)


@pytest.mark.parametrize(
    "use", [lambda pair: merge(Sources(pair)).adapter, lambda pair: Paths(pair).mix([0.5, 0.5], "delta")]
)
def test_n06_updates_after_other_tokens_are_not_put_together(use):
    case = "N06_alora_mixed"
    with pytest.warns(LoraLabWarning, match="acts only after those tokens"):
        adapters = {name: Adapter.load(CASES / case / name) for name in ("alora", "plain", "alora_other")}
    for a in adapters:
        for b in adapters:
            if a != b:
                with pytest.raises(MismatchError, match="alora_invocation_tokens"):
                    use([adapters[a], adapters[b]])
    assert use([adapters["alora"]] * 2).config["alora_invocation_tokens"] == [5, 6]
    assert not use([adapters["plain"]] * 2).config.get("alora_invocation_tokens")


@pytest.mark.parametrize(
    "use", [lambda pair: merge(Sources(pair)).adapter, lambda pair: Paths(pair).mix([0.5, 0.5], "delta")]
)
def test_n12_one_base_may_have_many_names(use):
    case = "N12_one_base_three_names"
    adapters = {name: Adapter.load(CASES / case / name) for name in ("hub", "slash", "local", "unsloth")}
    use([adapters["hub"], adapters["slash"]])  # a warning is an error here
    for other in ("local", "unsloth"):
        with pytest.warns(LoraLabWarning, match="different base models") as caught:
            use([adapters["hub"], adapters[other]])
        text = str(caught[0].message)
        assert all(repr(adapters[name].base_model) in text for name in ("hub", other))


def test_n25_switches_reach_fused_experts():
    model = base("N08_moe_v4_experts_on_v5")
    tokens = load_file(CASES / "N08_moe_v4_experts_on_v5/io.safetensors")["input_ids"]
    with torch.no_grad():
        bare = model(input_ids=tokens).logits
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False,
    )
    model = get_peft_model(model, config)
    with torch.no_grad():
        worn = model.eval()(input_ids=tokens).logits
    assert not torch.allclose(worn, bare, atol=1e-4)
    with Switches(model) as switches:
        model.train()
        switches.set([False] * len(switches.groups))
        off = model(input_ids=tokens).logits
        assert not off.requires_grad or off.grad_fn is not None
        torch.testing.assert_close(off.detach(), bare, rtol=1e-5, atol=1e-6)
        switches.set([True] * len(switches.groups))
        torch.testing.assert_close(model(input_ids=tokens).logits.detach(), worn, rtol=1e-5, atol=1e-6)
        one = [i == 0 for i in range(len(switches.groups))]
        switches.set(one)
        model(input_ids=tokens).logits.square().sum().backward()
        names = list(switches.groups.values())
        for on, modules in zip(one, names, strict=True):
            for name in modules:
                layer = model.base_model.model.get_submodule(name)
                own = [p for n, p in layer.named_parameters() if "lora_" in n and "base_layer.base_layer" not in n]
                assert own
                assert all((p.grad is not None) == on for p in own if p.requires_grad), name
