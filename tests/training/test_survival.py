"""Stochastic depth as its paper scores it: every group's update times how often it was on."""

import dataclasses

import numpy as np
import pytest
import torch

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.groups import block
from lora_lab.adapters.models.attached import attach, layers
from lora_lab.errors import OptionError, TunerError
from lora_lab.scoring.evaluate import score
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe
from lora_lab.training.schedule import Schedule
from lora_lab.training.survival import rates, scaled

SHORT = {"steps": 6, "batch_size": 8}
task = Digits("relabel")


@pytest.fixture(scope="module")
def plain():
    return train(task, Recipe(method="stochastic-depth", **SHORT))[0]


@pytest.mark.parametrize(("p0", "groups"), [(0.5, 6), (0.1, 2), (0.0, 1), (0.0, 3), (1.0, 4)])
def test_survival_rates_are_how_often_masks_are_on(p0, groups):
    schedule = Schedule(p0=p0, law="depth")
    drawn = np.mean([schedule.mask(step, 4000, groups, seed=0) for step in range(4000)], axis=0)
    assert schedule.survival(groups) == pytest.approx(drawn, abs=0.03)


def test_survival_rates_by_hand():
    found = rates(Schedule(p0=0.5, law="depth"), ["a", "b"])  # 3/4 and 1/2, given that one of them is on: 1 − 1/8
    assert found == pytest.approx({"a": 6 / 7, "b": 4 / 7})
    with pytest.raises(OptionError, match="the chances of the law 'uniform' change from step to step"):
        Schedule().survival(2)


def test_one_training_gives_both_adapters_and_scaling_is_exact(plain, tmp_path):
    assert plain.record["survival"] == rates(Schedule(p0=0.5, law="depth"), [f"vit.layers.{i}" for i in range(6)])
    found = scaled(plain)
    assert found.tensors.keys() == plain.tensors.keys()
    assert all(torch.equal(found.tensors[key], plain.tensors[key]) for key in plain.tensors)
    for name, update in plain.updates.items():
        chance = plain.record["survival"][block(name)]
        assert torch.allclose(found.updates[name].delta(), chance * update.delta(), rtol=1e-5, atol=1e-8), name
    again, _ = train(task, Recipe(method="stochastic-depth-scaled", **SHORT))
    assert again.config == found.config
    assert {**again.record, "metrics": None} == {**found.record, "metrics": None}
    assert all(torch.equal(again.tensors[key], found.tensors[key]) for key in found.tensors)
    assert again.record["method"] == "stochastic-depth-scaled"
    assert again.record["metrics"]["validation"]["loss"] == score(task, found, "validation").mean_loss
    assert again.record["metrics"] != plain.record["metrics"]
    loaded = Adapter.load(found.save(tmp_path / "folder"))
    assert {name: site.scale for name, site in loaded.sites.items()} == pytest.approx(
        {name: site.scale for name, site in found.sites.items()}, rel=1e-12
    )


def test_peft_gives_every_layer_the_scaled_factor(plain):
    from peft import LoraConfig, get_peft_model

    found = scaled(plain)
    config = {key: value for key, value in found.config.items() if key in LoraConfig.__dataclass_fields__}
    model = get_peft_model(task.build_model(), LoraConfig(**{**config, "base_model_name_or_path": None}))
    for name, layer in layers(model).items():
        chance = plain.record["survival"][block(name)]
        assert layer.scaling["default"] == pytest.approx(plain.sites[name].scale * chance), name


def test_groups_that_were_switched_together_are_scaled_together():
    groups = {"low": r"layers\.[0-2]\.", "high": r"layers\.[3-5]\."}
    plain, _ = train(task, Recipe(method="stochastic-depth", groups=groups, peft="rslora", **SHORT))
    found, chances = scaled(plain), plain.record["survival"]
    assert chances == pytest.approx({"low": 6 / 7, "high": 4 / 7})
    for name, site in found.sites.items():
        low = any(f"layers.{i}." in name for i in range(3))
        assert site.scale == pytest.approx(plain.sites[name].scale * chances["low" if low else "high"])
    with attach(task.build_model(), found) as attached:
        for name, layer in attached.layers.items():
            assert layer.scaling["default"] == pytest.approx(found.sites[name].scale)


def test_what_cannot_be_scaled_is_refused(plain):
    with pytest.raises(OptionError, match="multiplied by their survival rates already"):
        scaled(scaled(plain))
    with pytest.raises(OptionError, match="no survival rates; an adapter of stochastic depth is needed"):
        scaled(dataclasses.replace(plain, record={**plain.record, "survival": None}))
    with pytest.raises(OptionError, match=r"no survival rate between 0 and 1 for vit.layers.0"):
        scaled(dataclasses.replace(plain, record={**plain.record, "survival": {"vit.layers.0": 2.0}}))
    for peft in ("dora", "pissa", "loha"):
        with pytest.raises(TunerError, match=f"stochastic-depth-scaled: {peft} has no"):
            train(task, Recipe(method="stochastic-depth-scaled", peft=peft, **SHORT))
