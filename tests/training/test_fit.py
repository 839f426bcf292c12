import dataclasses
import random

import numpy as np
import pytest
import torch

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.models.attached import attach, weight_deltas
from lora_lab.analysis.lines.connectivity import Interpolate
from lora_lab.analysis.questions import Evaluate
from lora_lab.errors import FileError, LoraLabError, LoraLabNote, OptionError, TaskError, TunerError
from lora_lab.scoring.evaluate import score
from lora_lab.tasks.choosing import task_of
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.training.fit import train
from lora_lab.training.recipe import METHODS, Recipe, tuners
from lora_lab.training.runs import Job, train_all
from lora_lab.training.schedule import Schedule

pytestmark = pytest.mark.usefixtures("few_digits")

SHORT = {"steps": 12, "batch_size": 8, "target_modules": ["q_proj", "fc1"]}
EVERY = {**SHORT, "target_modules": None}
"""Every module that may be trained, three times as many."""
task = Digits("relabel")


@pytest.fixture(scope="module")
def coto():
    return train(task, Recipe(method="coto", **SHORT))


def same(a, b):
    return a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_its_log_says_what_was_on(method):
    adapter, log = train(task, Recipe(method=method, **EVERY))
    assert adapter.record["method"] == method
    assert len(log.columns["step"]) == 12
    assert all(np.isfinite(log.columns["loss"]))
    assert adapter.total_norm > 0
    masks = [mask for mask in log.columns["mask"] if mask is not None]
    assert len(masks) == (12 if METHODS[method].law else 0)
    assert all(len(mask) == 6 and "1" in mask for mask in masks)


def test_the_log_is_the_schedule_and_the_last_phase_trains_everything(coto):
    log = coto[1]
    schedule = Schedule()
    assert log.columns["p"] == [schedule.probability(t, 12) for t in range(12)]
    drawn = [schedule.mask(t, 12, 6, seed=0) for t in range(12)]
    assert log.columns["mask"] == ["".join("01"[int(on)] for on in mask) for mask in drawn]
    assert log.columns["mask"][9:] == ["111111"] * 3
    assert list(log.parameters["groups"]) == [f"vit.layers.{i}" for i in range(6)]


def test_the_learning_rate_stays_up_until_the_masks_end():
    _, log = train(task, Recipe(method="coto", learning_rate=1e-3, **{**SHORT, "steps": 40, "batch_size": 4}))
    rates = log.columns["learning_rate"]
    assert rates[2:29] == pytest.approx([1e-3] * 27)
    assert rates[32] < 1e-3
    assert all(rate > 0 for rate in rates[30:-1])


def test_the_same_recipe_gives_the_same_adapter_and_leaves_global_randomness_alone(coto):
    torch.manual_seed(7)
    random.seed(7)
    before = torch.random.get_rng_state(), random.getstate()
    again, log = train(task, Recipe(method="coto", **SHORT))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert same(coto[0], again)
    assert log.columns == coto[1].columns
    assert not same(coto[0], train(task, Recipe(method="coto", seed=1, **SHORT))[0])


def test_an_init_seed_shares_the_initial_factors_between_seeds():
    tiny = {**SHORT, "steps": 1, "learning_rate": 1e-9}
    made = [train(task, Recipe(method="lora", seed=s, init_seed=5, **tiny))[0] for s in (0, 1)]
    for one, two in zip(*(list(adapter.updates.values()) for adapter in made), strict=True):
        assert torch.allclose(one.A, two.A, atol=1e-6)
    other = train(task, Recipe(method="lora", seed=0, **tiny))[0]
    assert not torch.allclose(next(iter(other.updates.values())).A, next(iter(made[0].updates.values())).A, atol=1e-3)


def test_the_record_finds_the_task_again_and_survives_saving(coto, tmp_path):
    adapter = coto[0]
    again = Adapter.load(adapter.save(tmp_path / "a.safetensors"))
    assert same(adapter, again)
    assert again.record == adapter.record
    assert again.base_model == "lora-lab/digits-vit"
    assert task_of(again).name == "digits/relabel"
    assert again.record["metrics"]["validation"]["accuracy"] == score(task, again, "validation").accuracy
    assert "test" not in again.record["metrics"]


@pytest.mark.parametrize(
    "peft", ["lora", "rslora", "dora", "pissa", "olora", "hira", "loha", "lokr", "oft", "vera", "ln_tuning"]
)
def test_every_tuner_trains_saves_and_scores_the_same_when_read_back(peft, tmp_path):
    recipe = Recipe(method="coto", peft=peft, **(EVERY if peft == "ln_tuning" else SHORT))
    adapter, _ = train(task, recipe)
    again = Adapter.load(adapter.save(tmp_path / "a"))
    expected = adapter.record["metrics"]["validation"]["loss"]
    assert score(task, again, "validation").mean_loss == expected
    found = Interpolate(points=3, spaces=("factors",), split="validation").run([again, again], task)
    assert [row["loss"] for row in found.rows(space="factors")] == pytest.approx([expected] * 3, abs=1e-6)


def test_pissa_is_saved_as_plain_lora_on_the_untouched_base():
    adapter, _ = train(task, Recipe(method="lora", peft="pissa", rank=3, **SHORT))
    assert {update.rank for update in adapter.updates.values()} == {6}
    deltas = weight_deltas(task.build_model(), adapter)
    for name, update in adapter.updates.items():
        assert torch.allclose(deltas[name], update.delta(), atol=1e-5)
    untrained, _ = train(task, Recipe(method="lora", peft="pissa", steps=1, learning_rate=1e-12))
    assert untrained.total_norm < 1e-4


def test_rank_alpha_and_modules_are_set():
    adapter, _ = train(task, Recipe(rank=2, alpha=7, method="lora", **{**SHORT, "target_modules": ["q_proj"]}))
    assert {(site.rank, site.scale) for site in adapter.sites.values()} == {(2, 3.5)}
    assert len(adapter.sites) == 6
    configured, _ = train(
        task, Recipe(peft_config={"r": 3, "lora_alpha": 3, "use_rslora": True}, method="lora", **SHORT)
    )
    assert {site.rank for site in configured.sites.values()} == {3}


def test_a_saved_configuration_trains_another_adapter_of_its_kind(tmp_path):
    first, _ = train(task, Recipe(peft="loha", rank=3, method="lora", **SHORT))
    config = dict(first.config)
    again, _ = train(task, Recipe(peft="loha", peft_config=config, method="lora", **SHORT))
    assert same(first, again)
    with pytest.raises(OptionError, match="the configuration is for LOHA, the tuner asked for is lora"):
        train(task, Recipe(peft="lora", peft_config=config, method="lora", **SHORT))


def test_dropout_falls_to_nothing_along_the_ramp():
    from lora_lab.training.coto import DropoutRamp

    rates = []

    class Spy(DropoutRamp):
        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control, **kwargs)
            rates.append(self._dropouts[0].p)

    import lora_lab.training.fit as module

    original = module.DropoutRamp
    module.DropoutRamp = Spy
    try:
        train(task, Recipe(method="progressive-dropout", **SHORT))
    finally:
        module.DropoutRamp = original
    assert rates == pytest.approx([0.25 * (1 - t / 9) for t in range(9)] + [0.0] * 3)


def test_accumulation_and_checkpointing_give_the_plain_result():
    base = Recipe(method="coto", max_grad_norm=1e9, **{**SHORT, "steps": 4})
    plain, log = train(task, base)
    gathered, log2 = train(task, dataclasses.replace(base, batch_size=4, accumulate=2))
    checked, _ = train(task, dataclasses.replace(base, checkpointing=True))
    assert log.columns["mask"] == log2.columns["mask"]
    for key, tensor in plain.tensors.items():
        assert torch.allclose(tensor, gathered.tensors[key], atol=1e-4), key
        assert torch.allclose(tensor, checked.tensors[key], atol=1e-6), key


def test_a_killed_run_resumes_to_the_result_of_an_uninterrupted_one(tmp_path):
    recipe = Recipe(method="coto", save_every=5, **SHORT)
    whole, log = train(task, recipe, checkpoints=tmp_path / "whole")

    def kill(step, steps):
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(task, recipe, checkpoints=tmp_path / "cut", progress=kill)
    steps = []
    resumed, log2 = train(task, recipe, checkpoints=tmp_path / "cut", progress=lambda step, _: steps.append(step))
    assert steps == list(range(6, 13))
    assert same(whole, resumed)
    assert log2.columns == log.columns
    with pytest.raises(FileError, match="checkpoints of another run"):
        train(task, dataclasses.replace(recipe, seed=1), checkpoints=tmp_path / "cut")


def test_a_finished_run_is_not_trained_beyond_its_steps(tmp_path):
    recipe = Recipe(method="lora", save_every=4, **SHORT)
    first, _ = train(task, recipe, checkpoints=tmp_path)
    again, _ = train(task, recipe, checkpoints=tmp_path)
    assert same(first, again)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-12",
        "checkpoint-4",
        "checkpoint-8",
    ]


def test_biases_may_be_trained():
    adapter, _ = train(task, Recipe(method="coto", peft_config={"bias": "lora_only"}, **SHORT))
    assert any(key.endswith("bias") for key in adapter.others)


def test_checkpoints_are_adapters_that_know_their_task(tmp_path):
    train(task, Recipe(method="coto", save_every=6, **SHORT), checkpoints=tmp_path)
    adapter = Adapter.load(tmp_path / "checkpoint-6")
    assert adapter.record["step"] == 6
    assert adapter.base_model == "lora-lab/digits-vit"
    assert score(task_of(adapter), adapter, "validation").accuracy > 0


def test_jobs_side_by_side_give_what_they_give_alone(tmp_path, coto, few_digits, monkeypatch, forked_workers):
    monkeypatch.setattr("lora_lab.tasks.kinds.digits.images", few_digits)  # all of them, as in the other processes
    jobs = [
        Job(task.record, Recipe(method="coto", seed=seed, **SHORT), tmp_path / f"{seed}.safetensors") for seed in (0, 1)
    ]
    seen = []
    logs = train_all(jobs, processes=2, progress=lambda *n: seen.append(n))
    assert same(Adapter.load(jobs[0].path), coto[0])
    assert [log.provenance["seeds"] for log in logs] == [[0], [1]]
    for job in jobs:
        assert all(path.exists() for path in job.beside)
    other = Job(task.record, Recipe(method="lora", **SHORT), jobs[0].path)
    with (
        pytest.warns(LoraLabNote, match=r"1.safetensors: this very training is there already, and kept"),
        pytest.raises(FileError, match=r"0.safetensors: exists already; `force`"),
    ):
        train_all([other, jobs[1]])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "cotoo"}, "unknown method 'cotoo' .did you mean 'coto'"),
        ({"peft": "lroa"}, "unknown tuner 'lroa'"),
        ({"steps": 0}, "steps is 0; it must be above 0"),
        ({"learning_rate": -1.0}, "learning rate is -1.0"),
        ({"warmup": 2}, "warmup is 2; it must be from 0 to 1"),
        ({"ramp": "lin"}, "unknown ramp 'lin'"),
        ({"seed": -1}, "seed is -1; it must be from 0"),
        ({"init_seed": 2**32}, "init seed is"),
        ({"p0": 3.0}, "p0 is 3.0"),
    ],
)
def test_recipes_that_cannot_be_are_refused(options, text):
    with pytest.raises(OptionError, match=text):
        Recipe(**options)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"target_modules": ["nothing"]}, OptionError, "target_modules names 'nothing', and the base has no such"),
        ({"peft_config": {"rnak": 3}}, OptionError, "unknown field of LoraConfig 'rnak'"),
        ({"peft": "ln_tuning", "target_modules": None, "rank": 3}, OptionError, "ln_tuning has no rank"),
        ({"peft": "ia3", "target_modules": None, "method": "dropout"}, TunerError, "ia3 has no dropout"),
        ({"groups": {"a": "layers.0"}}, OptionError, "matches no group"),
        ({"target_modules": "(("}, TunerError, "cannot put a lora adapter"),
        ({"learning_rate": 1e30}, TaskError, "diverged|not finite"),
    ],
)
def test_training_that_cannot_be_is_refused_in_one_line(options, error, text):
    recipe = Recipe(**{"method": "coto", **SHORT, **options})
    with pytest.raises((error, LoraLabError), match=text) as found:
        train(task, recipe)
    assert "\n" not in str(found.value)


def test_evaluation_has_intervals_and_the_base(coto, tmp_path):
    path = coto[0].save(tmp_path / "a.safetensors")
    found = Evaluate(split="validation").run([Adapter.load(path)])
    base, own = found.rows()
    assert base["adapter"] == "(base model alone)"
    assert own["accuracy"] == coto[0].record["metrics"]["validation"]["accuracy"]
    assert base["accuracy"] == score(task, None, "validation").accuracy
    assert own["accuracy_low"] <= own["accuracy"] <= own["accuracy_high"]
    assert own["loss_low"] < own["loss"] < own["loss_high"]


def test_an_adapter_without_a_record_asks_for_a_task_and_shows_a_file(coto):
    bare = dataclasses.replace(coto[0], record={})
    with pytest.raises(LoraLabError, match=r"carries no record.*`task`.*kind = \"text-classification\""):
        task_of(bare)
    assert task_of(bare, given="digits/mod3").name == "digits/mod3"


def test_adapters_of_different_tasks_are_told_apart(coto):
    other = dataclasses.replace(coto[0], record={"task": {"name": "digits/mod3"}})
    with pytest.raises(LoraLabError, match="different tasks, digits/relabel and digits/mod3"):
        task_of(coto[0], other)


def test_all_tuners_have_a_name_that_peft_knows():
    assert {"lora", "rslora", "dora", "pissa", "hira", "loha", "lokr", "oft", "boft", "vera", "ia3"} <= set(tuners())


def test_attaching_a_trained_adapter_does_not_change_its_own_tensors(coto):
    before = {key: tensor.clone() for key, tensor in coto[0].tensors.items()}
    with attach(task.build_model(), coto[0]) as attached:
        task.score(attached.model, "validation")
    assert all(torch.equal(coto[0].tensors[key], tensor) for key, tensor in before.items())
