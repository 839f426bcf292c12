"""Questions whose coalitions go through passes together: the same answers, in journals of their own, here and there."""

from dataclasses import replace

import numpy as np
import pytest
from making_adapters import random_adapter
from peft import LoraConfig

from lora_lab.adapters.groups import players
from lora_lab.analysis.coalitions.game import Game
from lora_lab.games.coalitions import all_coalitions
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Execution
from lora_lab.tasks.kinds.digits import Digits

TARGETS = r"vit\.layers\.[0-3]\..*(q_proj|fc1)"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder, task = tmp_path_factory.mktemp("together"), Digits("relabel")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS)
    made = random_adapter(task, folder / "a", config, seed=0, scale=0.06)
    return replace(made, record={"task": task.record, "method": "lora", "seed": 0})


def game_of(adapter, **execution):
    evaluator = Evaluator([adapter], Digits("relabel"), Execution("cpu", **execution), split="validation", examples=60)
    return Game(evaluator, players(adapter))


def test_worths_are_those_of_one_after_another(adapter):
    together, alone = game_of(adapter, coalitions_at_once=6), game_of(adapter)
    coalitions = all_coalitions(4)
    np.testing.assert_allclose(together(coalitions), alone(coalitions), rtol=1e-6, atol=0)
    assert together.evaluator.effort.apart is None
    assert together.evaluator.effort.computed != alone.evaluator.effort.computed


def test_journals_are_not_shared_with_one_after_another_and_go_on(adapter, tmp_path):
    coalitions = all_coalitions(4)
    first = game_of(adapter, coalitions_at_once=6, cache=tmp_path)
    expected = first(coalitions[:10])
    other = game_of(adapter, cache=tmp_path)
    other(coalitions)
    assert other.evaluator.evaluated == 16
    again = game_of(adapter, coalitions_at_once=4, cache=tmp_path)  # however many, the scores are of one kind
    assert (again(coalitions)[:10] == expected).all()
    assert again.evaluator.evaluated == 6
    assert len(list(tmp_path.glob("*.sqlite"))) == 2
    assert game_of(adapter, coalitions_at_once=0).evaluator.run_of("test") == game_of(adapter).evaluator.run_of("test")


def test_costs_are_those_of_passes_over_several(adapter, monkeypatch):
    evaluator = game_of(adapter, coalitions_at_once=6).evaluator
    masks = [evaluator.keeping([name for name, on in zip(evaluator.names, row, strict=True) if on]) for row in ROWS]
    asked = []

    def pace(models, examples, batching):
        asked.append(batching.foreseen)
        return 0.25 if batching.wanted else 2.0

    monkeypatch.setattr(type(evaluator.models), "pace", pace)
    cost = evaluator.cost(masks)
    assert set(asked) == {None, 6}
    states = [mask.states for mask in masks]
    assert cost.block_evaluations == evaluator.layout.cost(states, 6) > evaluator.layout.cost(states)
    assert cost.seconds == pytest.approx(0.25 * cost.block_evaluations / evaluator.layout.blocks)


ROWS = np.unique(np.random.default_rng(0).random((20, 8)) < 0.5, axis=0)
"""Modules that are on."""


def test_paces_are_timed_in_passes_over_as_many(adapter):
    evaluator = game_of(adapter, coalitions_at_once=6).evaluator
    seen = []
    judge = type(evaluator.task).judge

    def watched(task, model, batch, **options):
        seen.append(len(batch["labels"]))
        return judge(task, model, batch, **options)

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(type(evaluator.task), "judge", watched)
        assert evaluator.pace_of_masks > 0
    assert seen[-1] == 6 * 60
