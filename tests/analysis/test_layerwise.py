"""One layer mixed at a time: every point is the adapter that it stands for, from both sides."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from making_adapters import random_adapter
from peft import LoraConfig

from lora_lab.adapters.lowrank import combine
from lora_lab.analysis.lines.connectivity import BARRIERS
from lora_lab.analysis.lines.landscape import Layerwise
from lora_lab.analysis.lines.layerwise import RankFactors
from lora_lab.errors import MismatchError, OptionError
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.execution import Execution
from lora_lab.scoring.models import TaskModels
from lora_lab.tasks.kinds.digits import Digits

pytestmark = pytest.mark.usefixtures("few_digits")

TASK = Digits("relabel")
TARGETS = r"vit\.layers\.[0-2]\..*(q_proj|fc1)"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    made = []
    for seed, rank in enumerate((2, 3)):
        config = LoraConfig(r=rank, lora_alpha=6, target_modules=TARGETS)
        made.append(random_adapter(TASK, folder / f"r{seed}", config, seed=seed, scale=0.15))
    return made


@pytest.fixture(scope="module")
def result(pair):
    return Layerwise(points=3, split="validation").run(pair, TASK)


def mixed(stays, comes, t, held):
    """All of one adapter but for the modules that `held` takes, where ΔW is mixed."""
    updates = {
        name: combine([update, comes.updates[name]], [1 - t, t]) if held(name) else update
        for name, update in stays.updates.items()
    }
    return stays.with_updates(updates, source="mixed")


@pytest.mark.parametrize("index", [0, 1])
def test_a_point_is_one_layer_mixed_and_all_others_of_one_adapter(pair, result, index):
    for layer in (0, 2):
        rows = result.rows(group=f"vit.layers.{layer}", index=index)
        assert [row["t"] for row in rows] == [0, 0.5, 1]
        assert {row["others"] for row in rows} == {pair[index].label}
        for row in rows:
            there = mixed(pair[index], pair[1 - index], row["t"], lambda name, k=layer: f"layers.{k}." in name)
            scores = score(TASK, there, "validation")
            assert row["loss"] == pytest.approx(scores.mean_loss, rel=1e-5)
            assert row["accuracy"] == scores.accuracy


def test_barriers_and_exchanges_are_those_of_the_rows(result):
    assert len(result.summary["barriers"]) == 2 * 3 * 2  # two sides, three layers, two metrics
    for barrier in result.summary["barriers"]:
        rows = result.rows(group=barrier["group"], index=barrier["index"])
        values = np.array([row["loss"] if barrier["metric"] == "loss" else 1 - row["accuracy"] for row in rows])
        rise = BARRIERS["entezari"](values[:, None], np.array([0, 0.5, 1])).max()
        assert barrier["value"] == pytest.approx(float(rise), abs=1e-9)
        assert barrier["exchange"] == pytest.approx(values[-1] - values[0], abs=1e-9)
        assert 0 <= barrier["low"] <= barrier["value"] <= barrier["high"]
        assert barrier["exchange_low"] <= barrier["exchange"] <= barrier["exchange_high"]


def test_one_group_of_all_modules_goes_from_one_adapter_to_the_other(pair):
    found = Layerwise(points=2, players={"all": "."}, split="validation").run(pair, TASK)
    own = [score(TASK, adapter, "validation").mean_loss for adapter in pair]
    for index in (0, 1):
        losses = [row["loss"] for row in found.rows(index=index)]
        assert losses == pytest.approx([own[index], own[1 - index]], rel=1e-5)


def test_what_comes_before_the_mixed_layer_is_computed_once(pair):
    costs = []
    Layerwise(points=6, split="validation").run(pair, TASK, Execution(confirm=costs.append))
    (cost,) = costs
    assert cost.variants == 2 * (1 + 3 * 5)
    # of the six blocks those from the mixed one on, at five t each: layers 0, 1 and 2
    assert cost.block_evaluations == 2 * (6 + 5 * (6 + 5 + 4))


def test_a_head_stays_with_the_other_layers(pair):
    key = "base_model.model.classifier.weight"
    heads = [torch.randn(10, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    config = {**pair[0].config, "modules_to_save": ["classifier"]}
    headed = [
        replace(one, tensors={**one.tensors, key: head, key.replace("weight", "bias"): torch.zeros(10)}, config=config)
        for one, head in zip(pair, heads, strict=True)
    ]
    found = Layerwise(points=2, players={"all": "."}, split="validation").run(headed, TASK)
    exchanged = mixed(headed[0], headed[1], 1.0, lambda _: True)
    assert torch.equal(exchanged.tensors[key], heads[0])
    assert found.rows(index=0)[1]["loss"] == pytest.approx(score(TASK, exchanged, "validation").mean_loss, rel=1e-5)


def test_a_second_run_computes_nothing(pair, tmp_path, monkeypatch):
    question = Layerwise(points=2, split="validation", examples=20)
    first = question.run(pair, TASK, Execution(cache=tmp_path))
    monkeypatch.setattr(TaskModels, "score_variants", lambda *given, **more: pytest.fail("computed afresh"))
    assert question.run(pair, TASK, Execution(cache=tmp_path)).columns == first.columns


def test_keys_are_short_and_tell_factors_apart():
    keys = {RankFactors(((1.0, 0.0, t),) * 500).key for t in (0.0, 0.1, 0.1 + 1e-12, 1.0)}
    assert len(keys) == 4
    assert max(map(len, keys)) < 80
    assert RankFactors(((1.0, 0.5),)).key == RankFactors(((1.0, 0.5),)).key


def test_what_cannot_be_mixed_layer_by_layer_is_refused(pair, tmp_path):
    with pytest.raises(OptionError, match=r"layers are mixed one at a time between two adapters; 1 were given"):
        Layerwise().check(pair[:1])
    with pytest.raises(OptionError, match=r"players rank: whole modules are mixed; layer, module"):
        Layerwise(players="rank").check(pair)
    config = LoraConfig(r=2, target_modules=r"vit\.layers\.0\..*q_proj")
    fewer = random_adapter(TASK, tmp_path / "fewer", config, scale=0.1)
    with pytest.raises(MismatchError, match="update different modules"):
        Layerwise().check([pair[0], fewer])
