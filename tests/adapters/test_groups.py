import json
from pathlib import Path

import pytest
import torch
import transformers
from making_adapters import lora, write
from torch import nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.groups import Place, blocks, group, locate, players
from lora_lab.errors import OptionError, TunerError

TWO_ENCODERS = [
    f"{encoder}_model.encoder.layers.{layer}.self_attn.{kind}_proj"
    for encoder in ("text", "vision")
    for layer in (0, 1, 10)
    for kind in ("q", "v")
]


@pytest.fixture
def make(tmp_path):
    """Module names → an adapter of those modules."""

    def adapter(names, **config):
        tensors = {}
        for i, name in enumerate(names):
            tensors |= lora(name, seed=i)
        return Adapter.load(write(tmp_path / "a", tensors, **config))

    return adapter


@pytest.mark.parametrize(
    ("by", "count", "first", "last"),
    [
        ("layer", 6, "text_model.encoder.layers.0", "vision_model.encoder.layers.10"),
        ("module", 12, TWO_ENCODERS[0], TWO_ENCODERS[-1]),
        ("type", 2, "q_proj", "v_proj"),
        ("type-layer", 6, "q_proj.0", "v_proj.10"),
        ("encoder-type-layer", 12, "text_model.q_proj.0", "vision_model.v_proj.10"),
        ("rank", 24, TWO_ENCODERS[0] + "#0", TWO_ENCODERS[-1] + "#1"),
        ({"attention": "q_proj", "values": "v_proj"}, 2, "attention", "values"),
    ],
)
def test_every_module_has_its_player(make, by, count, first, last):
    found = players(make(TWO_ENCODERS), by)
    assert (len(found), found.names[0], found.names[-1]) == (count, first, last)
    switched = [unit for units in found.units.values() for unit in units]
    assert len(switched) == len(set(switched))
    assert {name for name, _ in switched} == set(TWO_ENCODERS)
    assert not found.left_out


def test_layers_come_in_the_order_of_their_numbers(make):
    layers = [place.layer for place in players(make(TWO_ENCODERS), "layer").places.values()]
    assert layers == [0, 1, 10, 0, 1, 10]


def test_places_tell_encoder_type_and_layer():
    found = locate(TWO_ENCODERS)
    assert found[TWO_ENCODERS[0]] == Place("text_model", "q_proj", 0)
    assert found[TWO_ENCODERS[-1]] == Place("vision_model", "v_proj", 10)


def test_modules_of_one_last_name_are_told_apart_by_their_path():
    base = "bert.encoder.layer.0."
    names = [base + path for path in ("attention.output.dense", "intermediate.dense", "output.dense")]
    types = [place.type for place in locate([*names, "bert.pooler.dense", "classifier"]).values()]
    assert types == ["attention.output.dense", "intermediate.dense", "output.dense", "bert.pooler.dense", "classifier"]


TINY = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
MODELS = {
    # class, configuration, how many blocks of two modules or more each of its lists has
    "BertModel": ({**TINY, "num_hidden_layers": 3}, {"encoder.layer": 3}),
    "MixtralModel": ({**TINY, "num_key_value_heads": 2, "num_hidden_layers": 2}, {"layers": 2}),
    "T5Model": (
        {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 3, "num_heads": 2},
        {"encoder.block": 3, "decoder.block": 3},
    ),
    "SwinModel": (
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 3], "num_heads": [1, 2], "window_size": 2},
        {"encoder.layers.0.blocks": 2, "encoder.layers.1.blocks": 3},
    ),
    "ConvNextModel": (
        {"hidden_sizes": [8, 16], "depths": [1, 3], "num_stages": 2},
        {"encoder.stages.0.layers": 1, "encoder.stages.1.layers": 3},
    ),
    "PvtModel": (
        {"image_size": 32, "depths": [2, 1, 1, 1], "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4},
        {f"encoder.block.{stage}": 2 if stage == 0 else 1 for stage in range(4)},
    ),
    "FunnelModel": (
        {"vocab_size": 32, "block_sizes": [2, 2], "num_decoder_layers": 1, "d_model": 16, "n_head": 2, "d_head": 8},
        {"encoder.blocks.0": 2, "encoder.blocks.1": 2, "decoder.layers": 1},
    ),
    "WhisperModel": (
        {"vocab_size": 32, "d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "pad_token_id": 0}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2},
        {"encoder.layers": 2, "decoder.layers": 3},
    ),
}


@pytest.mark.parametrize("behind", ["", "0.", "0.auto_model.", "models.1."])
@pytest.mark.parametrize("name", MODELS)
def test_real_models_have_as_many_blocks_as_their_configuration_says_wherever_they_lie(name, behind):
    options, wanted = MODELS[name]
    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls(cls.config_class(**options))
    inner = [each for each, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    names = [f"{behind}{each}" for each in inner]
    alone = {f"{behind}{key}": f"{behind}{label}" for key, label in blocks(inner).items()}
    if behind != "models.1.":  # of which the model's parts outside of its blocks are one
        assert blocks(names) == alone
    counted = {}
    for label, held in group(names).items():
        if len(held) > 1:
            in_list = label.rpartition(".")[0].removeprefix(behind)
            counted[in_list] = counted.get(in_list, 0) + 1
    counted.pop("models", None)
    assert counted == wanted


def test_an_index_in_front_is_a_block_only_where_none_lies_deeper():
    inside = ["0.auto_model.encoder.layer.0.output.dense", "0.auto_model.encoder.layer.1.output.dense"]
    outside = ["0.auto_model.pooler.dense", "2.linear"]
    assert blocks([*inside, *outside]) == {
        **{name: name.removesuffix(".output.dense") for name in inside},
        **dict(zip(outside, outside, strict=True)),
    }
    assert locate([*inside, *outside])["2.linear"] == Place("", "2.linear", None)
    assert blocks(["0.q", "0.v", "1.q"]) == {"0.q": "0", "0.v": "0", "1.q": "1"}


def test_n18_blocks_behind_an_index_are_layers():
    case = Path(__file__).parents[1] / "cases/N18_blocks_behind_an_index"
    adapter, wanted = Adapter.load(case / "adapter"), json.loads((case / "expected.json").read_text())["groups"]
    for found in (players(adapter).units.values(), group(list(adapter.sites)).values()):
        assert [len(each) for each in found] == [2] * wanted


def test_modules_that_no_expression_matches_stay_on(make):
    found = players(make(TWO_ENCODERS), {"text": "text_model"})
    assert found.left_out == tuple(name for name in TWO_ENCODERS if "vision" in name)


@pytest.mark.parametrize(
    ("by", "text"),
    [
        ("layers", r"unknown set of players 'layers' \(did you mean 'layer'\?\)"),
        ({"q": "q_proj", "k": "k_proj"}, r"player 'k' \('k_proj'\) matches no module; there are: text_model"),
        ({"q": "q_proj", "text": "text"}, r"players overlap: text_model\S+q_proj matches q, text"),
        ({"q": "("}, "not a regular expression"),
    ],
)
def test_players_that_cannot_be_are_refused(make, by, text):
    with pytest.raises(OptionError, match=text):
        players(make(TWO_ENCODERS), by)


def test_ranks_of_other_tuners_are_refused():
    adapter = Adapter({}, {"peft_type": "LOHA"}, {"layers.0.q": None}, source="here")
    with pytest.raises(TunerError, match="LOHA has no rank-1 components"):
        players(adapter, "rank")


def test_an_adapter_without_modules_has_no_players():
    with pytest.raises(OptionError, match="adapts no module"):
        players(Adapter({}, {"peft_type": "LORA"}, {}, source=str(Path("x"))))
