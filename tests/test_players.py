from pathlib import Path

import pytest
from adapters import lora, write

from lora_lab.adapter import Adapter
from lora_lab.errors import OptionError, TunerError
from lora_lab.players import Place, locate, players

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
