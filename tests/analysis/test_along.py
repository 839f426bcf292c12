"""Scores along training: at each step, the numbers of the other questions about the same checkpoints."""

import itertools
import shutil
from dataclasses import replace

import pytest

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.lowrank import combine
from lora_lab.analysis.lines.along import Kept, common_checkpoints, named_runs, runs_of
from lora_lab.analysis.lines.landscape import Checkpoints
from lora_lab.analysis.lines.points import MixPoint
from lora_lab.analysis.questions import Evaluate, Interpolate
from lora_lab.api import around
from lora_lab.errors import FileError, LoraLabError, LoraLabNote, MismatchError, OptionError
from lora_lab.pruning.modules import structured
from lora_lab.results import schema
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.execution import Execution
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("few_digits")

TASK = Digits("relabel")
SHORT = {
    "p0": 0.7,
    "steps": 6,
    "batch_size": 8,
    "learning_rate": 0.02,
    "save_every": 3,
    "target_modules": ["q_proj", "fc1"],
}
FEW = {"split": "validation", "examples": 40}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, few_digits):
    """The folders of three CoTo runs and one of plain LoRA, with checkpoints after 3 and 6 steps."""
    folder = tmp_path_factory.mktemp("runs")
    made = []
    for method, seed in (("coto", 0), ("coto", 1), ("coto", 2), ("lora", 0)):
        made.append(folder / f"{method}-s{seed}.checkpoints")
        train(TASK, Recipe(method=method, seed=seed, **SHORT), checkpoints=made[-1])
    return made


@pytest.fixture(scope="module")
def adapters(runs):
    return [Adapter.load(path) for path in common_checkpoints(runs)]


@pytest.fixture(scope="module")
def result(adapters):
    return Checkpoints(**FEW).run(adapters, TASK)


def at(adapters, step):
    return [adapter for adapter in adapters if adapter.record["step"] == step]


def same(row, other, names=("accuracy", "accuracy_low", "accuracy_high", "loss", "loss_low", "loss_high")):
    for name in names:
        assert row[name] == pytest.approx(other[name], rel=1e-5), name


def test_there_is_a_row_for_every_model_of_every_step(result):
    assert result.parameters["steps"] == [3, 6]
    assert [run["label"] for run in result.parameters["runs"]] == ["coto-s0", "coto-s1", "coto-s2", "lora-s0"]
    assert schema.why_not(result.kind, result.schema, result.columns, result.summary) is None
    for step in (3, 6):
        coto = [row["members"] for row in result.rows(step=step, model="midpoint", space="factors")]
        assert coto == [[f"coto-s{i}", f"coto-s{j}"] for i, j in itertools.combinations(range(3), 2)]
        (average,) = result.rows(step=step, model="average")
        assert (average["indices"], average["method"], average["space"]) == ([0, 1, 2], "coto", "delta")
        for model in ("alone", "pruned"):
            assert [row["indices"] for row in result.rows(step=step, model=model)] == [[0], [1], [2], [3]]


def test_checkpoints_alone_have_the_numbers_of_evaluate(adapters):
    result = Checkpoints(split="validation").run(adapters[:4], TASK)
    for step in (3, 6):
        wanted = Evaluate(split="validation", base=False).run(at(adapters[:4], step), TASK).rows()
        for row, other in zip(result.rows(step=step, model="alone"), wanted, strict=True):
            same(row, other)
            assert {value for name, value in row.items() if "_worse" in name} == {0}


@pytest.mark.parametrize("step", [3, 6])
def test_midpoints_have_the_numbers_of_interpolate(adapters, step):
    result = Checkpoints(split="validation").run(adapters[:4], TASK)
    line = Interpolate(points=3, split="validation").run(at(adapters[:4], step), TASK)
    ends = [row["accuracy"] for row in result.rows(step=step, model="alone")]
    for space in ("delta", "factors", "matched"):
        (row,) = result.rows(step=step, model="midpoint", space=space)
        (other,) = line.rows(space=space, t=0.5)
        same(row, other)
        assert row["accuracy_worse"] == pytest.approx(sum(ends) / 2 - row["accuracy"], abs=1e-12)
        assert row["accuracy_worse_low"] <= row["accuracy_worse"] <= row["accuracy_worse_high"]
        losses = [each["loss"] for each in result.rows(step=step, model="alone")]
        assert row["loss_worse"] == pytest.approx(row["loss"] - sum(losses) / 2, abs=1e-6)
        assert row["loss_worse_low"] <= row["loss_worse"] <= row["loss_worse_high"]


@pytest.mark.parametrize("step", [3, 6])
def test_averages_and_pruned_ones_are_scored_as_the_adapters_that_they_are(adapters, step):
    three = at(adapters, step)[:3]
    result = Checkpoints(keep="type:fc1", split="validation").run(three, TASK)
    mean = {name: combine([a.updates[name] for a in three], [1 / 3] * 3) for name in three[0].updates}
    held = [name for name in three[0].sites if name.endswith("fc1")]
    made = [three[0].with_updates(mean, source="mean"), *(structured(adapter, held).adapter for adapter in three)]
    rows = [*result.rows(model="average"), *result.rows(model="pruned")]
    for row, adapter in zip(rows, made, strict=True):
        scores = score(TASK, adapter, "validation")
        assert row["loss"] == pytest.approx(scores.mean_loss, rel=1e-5)
        assert row["accuracy"] == pytest.approx(scores.accuracy)


def test_p_is_that_of_the_schedule_in_the_record(adapters, result):
    recipe = Recipe(method="coto", **SHORT)
    for step in (3, 6):
        p = {row["method"]: row["p"] for row in result.rows(step=step, model="alone")}
        assert p == {"coto": recipe.schedule.probability(step, 6), "lora": None}
    assert result.rows(step=3, model="alone")[0]["p"] == pytest.approx(0.7 + 0.3 * 3 / 5)
    told = {"coto": {"schedule": {"ramp": "sine", "p0": 0.2}, "steps": 6}}
    for record, wanted in ((told, 0.2 + 0.8 * 0.809017), ({"coto": 3}, None), ({"recipe": {}}, None), ({}, None)):
        # each run is its own set where none records a method, and a record may be anybody's
        one = [replace(adapters[0], record=record)]
        assert Checkpoints(**FEW).run(one, TASK).rows(model="alone")[0]["p"] == pytest.approx(wanted)


def test_runs_that_record_no_method_are_mixed_with_one_another(adapters):
    bare = [replace(adapter, record={}) for adapter in at(adapters, 3)]
    rows = Checkpoints(spaces=("delta",), **FEW).run(bare[1:3], TASK).rows()
    assert [row["method"] for row in rows] == ["coto-s1"] * 2 + ["coto-s2"] * 2 + ["coto-s1 – coto-s2"]


def test_a_killed_run_goes_on_where_it_was(adapters, result, tmp_path, monkeypatch):
    question, four = Checkpoints(**FEW), adapters[:4]

    def stop(done, total):
        assert total == 2 * (2 + 2 + 3)
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        question.run(four, TASK, Execution(cache=tmp_path, progress=stop))
    computed = []
    for kind in (MixPoint, Kept):
        own = kind.apply
        monkeypatch.setattr(kind, "apply", lambda self, *given, own=own: computed.append(self) or own(self, *given))
    again = question.run(four, TASK, Execution(cache=tmp_path))
    assert len(computed) == 14 - 9
    fresh = question.run(four, TASK)
    assert again.columns == fresh.columns


def test_the_face_takes_folders_and_leaves_out_steps_that_a_run_lacks(runs, adapters, tmp_path):
    for run in runs[:2]:
        shutil.copytree(run, tmp_path / run.name)
    shutil.rmtree(tmp_path / runs[1].name / "checkpoint-6")
    made = around.checkpoints([tmp_path / run.name for run in runs[:2]], progress=False, **FEW)
    assert made.parameters["steps"] == [3]
    wanted = Checkpoints(**FEW).run(at(adapters, 3)[:2], TASK)
    assert made.columns == wanted.columns
    alone = around.checkpoints(tmp_path / runs[0].name, "digits/relabel", progress=False, **FEW)
    assert (alone.parameters["steps"], len(alone.rows())) == ([3, 6], 4)


def test_runs_of_one_name_are_told_apart_by_their_folders(adapters):
    named = [replace(adapters[i], source=f"{place}/out/checkpoint-3") for i, place in ((0, "x"), (2, "y"))]
    assert [run.label for run in runs_of(named)] == ["x/out", "y/out"]


def refused(kind, text, call, *given):
    with pytest.raises(kind, match=text) as raised:
        call(*given)
    assert isinstance(raised.value, LoraLabError)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_compared_along_training_is_named(runs, adapters, tmp_path):
    refused(FileError, "nowhere: no such folder; the folder that a Trainer", common_checkpoints, [tmp_path / "nowhere"])
    (tmp_path / "checkpoint-5").mkdir()
    refused(FileError, "holds no checkpoint-STEP folder with an adapter", common_checkpoints, [tmp_path])
    refused(OptionError, "coto-s0.checkpoints: is given twice", common_checkpoints, [runs[0], runs[0]])
    shutil.copytree(runs[1] / "checkpoint-6", tmp_path / "late" / "checkpoint-6")
    shutil.copytree(runs[0] / "checkpoint-3", tmp_path / "early" / "checkpoint-3")
    places = [tmp_path / "early", tmp_path / "late"]
    text = r"no step is common to the checkpoints of these 2 runs: .*late has 6; .*early has 3"
    refused(OptionError, text, common_checkpoints, places)
    refused(OptionError, r"late has 6; the 2 runs before it share 3", common_checkpoints, [runs[0], *places])
    question = Checkpoints(**FEW)
    refused(OptionError, "no step is common .*coto-s1 has 6; coto-s0 has 3", question.check, [adapters[0], adapters[3]])
    refused(
        OptionError, "elsewhere: is no checkpoint of a run", question.check, [replace(adapters[0], source="elsewhere")]
    )
    refused(OptionError, "no adapter was given", question.check, [])
    refused(OptionError, "'top-gates:2': chooses by values", Checkpoints(keep="top-gates:2").check, adapters[:1])
    refused(
        OptionError,
        "no module of type .fc1. in checkpoint-3",
        Checkpoints(keep="type:fc1").check,
        [without(adapters[0], "fc1")],
    )
    refused(MismatchError, "update different modules", question.check, [adapters[0], without(adapters[2], "fc1")])


def without(adapter, kind):
    held = [name for name in adapter.sites if not name.endswith(kind)]
    return replace(structured(adapter, held).adapter, source=adapter.source)


def test_runs_have_the_names_and_methods_that_the_user_gives(adapters, runs):
    labels = [f"run {i}" for i in range(len(runs))]
    with pytest.warns(LoraLabNote, match="lora-s0: taken for other, its record says lora"):
        called = named_runs(adapters, labels, [("other", "*lora-s0")])
    named = {run.label: run for run in runs_of(called)}
    assert list(named) == labels
    assert [run.method for run in named.values()] == ["coto", "coto", "coto", "other"]
    assert [a.record["method"] for a in called] == ["coto"] * 6 + ["other"] * 2
    with pytest.warns(LoraLabNote):
        plain = runs_of(named_runs(adapters, groups=[("other", "*coto-s0"), ("other", "*coto-s1")]))
    assert [run.label for run in plain] == [run.label for run in runs_of(adapters)]
    assert [run.method for run in plain] == ["other", "other", "coto", "lora"]
    with pytest.raises(OptionError, match="4 adapters and 1 labels"):
        named_runs(adapters, ["one"])
    with pytest.raises(OptionError, match="no adapter is called so"):
        named_runs(adapters, groups=[("x", "*none")])
