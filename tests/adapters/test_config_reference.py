"""Odd configurations: what PEFT makes of a file by them is what our numbers say, or the file is refused."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from making_adapters import PREFIX, lora, write
from torch import nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.files.reading import inspect
from lora_lab.errors import AdapterError

MODULES = [
    *(f"model.layers.{i}.{kind}.{name}" for i in (0, 1) for kind, name in (("attn", "q"), ("attn", "v"))),
    "head",
]


def base() -> nn.Module:
    model = nn.Module()
    for name in MODULES:
        parent = model
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(name.rpartition(".")[2], nn.Linear(4, 6))
    return model


def in_peft(folder: Path) -> dict[str, torch.Tensor] | None:
    """Module → ΔW as PEFT loads the folder; None where it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = peft.PeftModel.from_pretrained(base(), folder)
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, NotImplementedError):
            return None
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            delta = layer.get_delta_weight("default").detach()
            if delta.any():
                found[name] = delta
    return found


names = st.sampled_from(["q", "v", "attn.q", "model.layers.1.attn.v", "head", "x", "0", "layers"])
listed = st.lists(names, max_size=3)
text = st.sampled_from(
    [".*", r".*\.q", r"model\..*", r".*\.(q|v)", "head|.*q", r"^model.*\d.*$", "all-linear", "(", ""]
)
value = st.sampled_from([1, 2, 2.0, 4, True, "2", None, -1, 0, 8])
patterns = st.dictionaries(
    st.sampled_from(["q", ".*v", r"^model\.layers\.1\..*", "layers.0.attn.q", "nothing"]), value, max_size=2
)
FIELDS = {
    "target_modules": listed | text | st.none(),
    "exclude_modules": listed | text | st.none(),
    "layers_to_transform": st.sampled_from([None, 0, 1, [1], [0, 1], [], [5]]),
    "layers_pattern": st.sampled_from([None, "layers", ["layers"], "model", []]),
    "modules_to_save": listed | st.none(),
    "rank_pattern": patterns,
    "alpha_pattern": patterns,
    "r": st.sampled_from([2, 2, 2, 2.0, "2", None, 3]),
    "lora_alpha": st.sampled_from([4, 4, 3.5, "4", True, None, 0, -2]),
    "use_rslora": st.sampled_from([True, False, "false", "true", None, 0, 1]),
    "use_dora": st.sampled_from([False, None, "false", True]),
    "fan_in_fan_out": st.sampled_from([False, None]),
    "bias": st.sampled_from(["none", "all", "lora_only", None, "some"]),
    # with False, PEFT leaves modules that the file lacks and the base has at random weights: no reader can know them
    "init_lora_weights": st.sampled_from([True, "gaussian", "odd", None, 1]),
    "lora_bias": st.sampled_from([False, True, "false"]),
}
# Three odd fields at most: with all of them odd, hardly a file is read.
odd = st.lists(st.sampled_from(sorted(FIELDS)), max_size=3, unique=True).flatmap(
    lambda chosen: st.fixed_dictionaries({name: FIELDS[name] for name in chosen})
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(odd, st.lists(st.sampled_from(MODULES[:4]), min_size=1, max_size=4, unique=True))
def test_peft_runs_what_we_describe_or_the_file_is_refused(tmp_path, fields, modules):
    tensors = {key: t for i, name in enumerate(modules) for key, t in lora(name, seed=i).items()}
    folder = write(tmp_path / "x", tensors, **{"target_modules": ["q", "v"], **fields})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ours = {name: update.delta() for name, update in Adapter.load(folder).updates.items()}
        except AdapterError:
            return
    theirs = in_peft(folder)
    if theirs is None:  # PEFT refuses more than it must; nothing is run that differs
        return
    for name in {*ours, *theirs}:
        zero = torch.zeros(6, 4)
        torch.testing.assert_close(theirs.get(name, zero), ours.get(name, zero), msg=f"{name}: {json.dumps(fields)}")


@pytest.mark.parametrize("kind", [nn.Embedding, nn.Conv1d])
def test_all_linear_leaves_out_embeddings_and_convolutions(tmp_path, kind):
    model = nn.Module()
    model.odd = nn.Embedding(8, 6) if kind is nn.Embedding else nn.Conv1d(8, 6, 3)
    model.q = nn.Linear(4, 6)
    if kind is nn.Embedding:
        odd = {"lora_embedding_A": torch.ones(2, 8), "lora_embedding_B": torch.ones(6, 2)}
    else:
        odd = {"lora_A.weight": torch.ones(2, 8, 3), "lora_B.weight": torch.ones(6, 2, 1)}
    tensors = {**lora("q"), **{f"{PREFIX}odd.{part}": tensor for part, tensor in odd.items()}}
    folder = write(tmp_path / "x", tensors, target_modules="all-linear")
    with pytest.raises(AdapterError, match=r"target_modules of the config leaves out modules .*PEFT would drop: odd"):
        Adapter.load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(model, folder)
    assert type(loaded.base_model.model.odd) is kind  # PEFT has put nothing on it
    assert list(Adapter.load(write(tmp_path / "y", lora("q"), target_modules="all-linear")).sites) == ["q"]


def test_what_may_be_tied_to_an_embedding_is_not_left_out(tmp_path):
    tensors = {**lora("model.layers.0.attn.q"), **lora("head", seed=1)}
    folder = write(tmp_path, tensors, target_modules=["q"], ensure_weight_tying=True)
    assert sorted(Adapter.load(folder).sites) == ["head", "model.layers.0.attn.q"]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"target_modules": ["v"]}, "target_modules"),
        ({"target_modules": r".*\.v"}, "target_modules"),
        ({"target_modules": ["q"], "exclude_modules": ["model.layers.0.attn.q"]}, "exclude_modules"),
        ({"target_modules": ["q"], "exclude_modules": r".*\.0\..*"}, "exclude_modules"),
        ({"target_modules": ["q"], "layers_to_transform": [1]}, "layers_to_transform"),
        ({"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "layers"}, "layers_to_transform"),
        ({"target_modules": ["q"], "modules_to_save": ["layers.0"]}, "modules_to_save"),
        ({"target_modules": []}, "leaves out"),
        ({"target_modules": ["v"], "ensure_weight_tying": True}, "target_modules"),
    ],
)
def test_a_config_by_which_peft_drops_a_module_is_refused_with_the_field_and_the_module(tmp_path, fields, word):
    tensors = {key: t for name in MODULES[:4:2] for key, t in lora(name).items()}
    folder = write(tmp_path, tensors, **fields)
    with pytest.raises(AdapterError, match="which PEFT would drop") as caught:
        Adapter.load(folder)
    assert word in str(caught.value)
    assert "model.layers.0.attn.q" in str(caught.value)
    theirs = in_peft(folder)
    assert theirs is None or "model.layers.0.attn.q" not in theirs


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"use_rslora": "false"}, "use_rslora is 'false'; true or false belongs there"),
        ({"use_dora": "no"}, "use_dora"),
        ({"fan_in_fan_out": "false"}, "fan_in_fan_out"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"rank_pattern": {"q_proj": 2.0}}, "rank_pattern has 'q_proj': 2.0"),
        ({"rank_pattern": {"q_proj": True}}, "rank_pattern has 'q_proj': True"),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": -2}}, "rank_pattern"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"target_modules": {"q_proj": 1}}, "target_modules is {'q_proj': 1}"),
        ({"target_modules": [1]}, "target_modules"),
        ({"init_lora_weights": [1]}, "init_lora_weights"),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(tmp_path, fields, word):
    with pytest.raises(AdapterError) as caught:
        Adapter.load(write(tmp_path, lora(), **fields))
    assert word in str(caught.value)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    ("extra", "config", "word"),
    [
        ({"lora_magnitude_vector": (6,)}, {}, "use_dora is off"),
        ({}, {"use_dora": True}, "there is no lora_magnitude_vector"),
        ({"lora_B.bias": (6,)}, {}, "lora_bias is off"),
        ({"lora_diag": (2,)}, {}, "lora_diag"),
        ({"lora_E": (2, 1)}, {}, "lora_E"),
    ],
)
def test_a_switch_and_a_tensor_that_do_not_go_together_are_refused(tmp_path, extra, config, word):
    tensors = {**lora(), **{f"{PREFIX}layers.0.q_proj.{key}": torch.ones(shape) for key, shape in extra.items()}}
    with pytest.raises(AdapterError, match=word):
        Adapter.load(write(tmp_path, tensors, **config))


def test_heads_that_are_named_and_missing_are_told(tmp_path):
    def notes(tensors, **config):
        return " ".join(inspect(write(tmp_path / "x", {**lora(), **tensors}, **config)).warnings)

    head = {f"{PREFIX}score.weight": torch.ones(2, 4)}
    assert "modules_to_save names lm_head" in notes({}, modules_to_save=["lm_head"])
    assert "names classifier, score" in notes({}, modules_to_save=["classifier", "score"])
    assert not notes(head, modules_to_save=["classifier", "score"])
    assert "names lm_head" in notes(head, modules_to_save=["score", "lm_head"])


def test_a_configs_pattern_that_runs_for_ever_is_a_line(tmp_path):
    for field in ("rank_pattern", "target_modules"):
        pattern = "((.|..)+)+q"  # twice the steps with every letter of a name
        said = {pattern: 2} if field == "rank_pattern" else pattern
        with pytest.raises(AdapterError, match="takes longer than 1 s"):
            Adapter.load(write(tmp_path / field, lora("layers.0.self_attn.q_projection"), **{field: said}))
