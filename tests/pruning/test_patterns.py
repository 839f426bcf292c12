from dataclasses import replace

import pytest
from making_adapters import lora, write

from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import OptionError
from lora_lab.pruning.patterns import KEEPS, choice_of, fixed, keep

NAMES = [f"model.layers.{i}.self_attn.{kind}_proj" for i in range(7) for kind in ("q", "k")]


@pytest.fixture
def choice(tmp_path):
    tensors = {}
    for i, name in enumerate([*NAMES, "score"]):
        tensors |= {key: tensor * (1 + i % 5) for key, tensor in lora(name, seed=i).items()}
    return choice_of(Adapter.load(write(tmp_path / "a", tensors)))


def layers(names):
    return sorted({int(name.split(".")[2]) for name in names if "." in name})


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("even", [0, 2, 4, 6]),
        ("every-other", [0, 2, 4, 6]),
        ("odd", [1, 3, 5]),
        ("low", [0, 1, 2]),
        ("middle", [3, 4]),
        ("high", [5, 6]),
    ],
)
def test_patterns_of_layers_name_what_is_kept(choice, spec, expected):
    kept = keep(choice, spec)
    assert layers(kept) == expected
    assert "score" in kept  # outside of layers


def test_thirds_and_parities_cover_every_layer_once(choice):
    thirds = [name for spec in ("low", "middle", "high") for name in keep(choice, spec) if name != "score"]
    assert sorted(thirds) == sorted(NAMES)
    both = [name for spec in ("even", "odd") for name in keep(choice, spec) if name != "score"]
    assert sorted(both) == sorted(NAMES)


def test_types_go_by_their_own_name_or_the_usual_letter(choice):
    assert keep(choice, "type:q") == keep(choice, "type:q_proj") == NAMES[::2]
    assert sorted(keep(choice, "type:q,k")) == sorted(NAMES)


def test_types_that_attention_shares_are_found_by_their_last_name(tmp_path):
    names = [f"encoder.block.0.layer.{i}.{kind}.q" for i, kind in enumerate(("SelfAttention", "EncDecAttention"))]
    tensors = {**lora(names[0]), **lora(names[1], seed=1), **lora("encoder.block.0.layer.0.SelfAttention.v", seed=2)}
    choice = choice_of(Adapter.load(write(tmp_path / "t5", tensors)))
    assert sorted(keep(choice, "type:q")) == sorted(names)


def test_the_largest_norms_are_kept(choice):
    updates = choice.adapter.updates
    norms = {p: sum(updates[n].norm() ** 2 for n, _ in units) for p, units in choice.players.units.items()}
    largest = sorted(norms, key=norms.get)[-2:]
    expected = {name for player in largest for name, _ in choice.players.units[player]}
    assert set(keep(choice, "top-norm:2")) == expected


def test_the_largest_shapley_values_are_kept(choice):
    values = {player: float(i) for i, player in enumerate(choice.players.names)}
    found = keep(replace(choice, values=lambda estimator: values), "top-shapley:3")
    assert found == sorted(name for player in choice.players.names[-3:] for name, _ in choice.players.units[player])


def test_each_pattern_by_values_asks_its_own_estimator(choice):
    asked = []

    def values(estimator):
        asked.append(estimator)
        return {player: float(i - 6) for i, player in enumerate(choice.players.names)}  # −6 … 1

    kept = {name: keep(replace(choice, values=values), f"{name}:1") for name in KEEPS if KEEPS[name].valued}
    assert dict(zip(kept, asked, strict=True)) == {
        "top-shapley": None,
        "top-gates": "gates",
        "top-taylor": "taylor",
        "top-drop": "drop",
    }
    first, last = (sorted(name for name, _ in choice.players.units[choice.players.names[i]]) for i in (0, -1))
    assert kept.pop("top-taylor") == first  # by size: a slope that is steep, whichever way
    assert all(names == last for names in kept.values())


def test_random_choices_hang_on_the_seed_alone(choice):
    picks = [tuple(keep(replace(choice, seed=seed), "random:3")) for seed in range(8)]
    assert picks == [tuple(keep(replace(choice, seed=seed), "random:3")) for seed in range(8)]
    assert len(set(picks)) > 4


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("evn", r"unknown pattern 'evn' \(did you mean 'even'\?\); there are: all, every-other, .*random:K"),
        ("top-norm", "pattern 'top-norm': top-norm:K is needed"),
        ("even:3", "even takes no argument"),
        ("top-norm:9", r"9 of 8 players \(layer\) cannot be kept; 1 to 8 can"),
        ("random:0", "1 to 8 can"),
        ("random:x", "x of 8 players"),
        ("type:v", "no module of type 'v' in a; there are: k_proj, q_proj, score"),
        ("top-shapley:2", "top-shapley needs a task"),
        ("top-drop:2", "top-drop needs a task"),
        ("top-gates", "top-gates:K is needed"),
    ],
)
def test_patterns_that_cannot_be_are_refused(choice, spec, text):
    with pytest.raises(OptionError, match=text):
        keep(choice, spec)


def test_fixed_patterns_are_those_that_apply(choice):
    assert list(fixed(choice))[:6] == ["all", "even", "odd", "low", "middle", "high"]
    assert set(fixed(choice)) <= {spec for spec in fixed(choice) if spec.partition(":")[0] in KEEPS}
    assert [spec for spec in fixed(choice) if ":" in spec] == ["type:q_proj", "type:k_proj", "type:score"]


def test_ranks_are_no_pattern(choice):
    with pytest.raises(OptionError, match="a rank or an energy"):
        choice_of(choice.adapter, by="rank")
