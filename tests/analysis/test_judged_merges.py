"""Merges on tasks with metrics of their own: the coefficient is chosen, and what is kept is told, by these."""

import numpy as np
import pytest
import torch
from making_adapters import lora, write
from torch import nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.analysis.merge_tables.table import ALONE, ENSEMBLE, CompareMerges
from lora_lab.errors import OptionError
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources
from lora_lab.merging.validation.search import Grid, Interval, search
from lora_lab.plots.registry import figure
from lora_lab.results.schema import why_not
from lora_lab.scoring.evaluate import score
from lora_lab.tasks.python.own import Task

sklearn = pytest.importorskip("sklearn.metrics")

GRID = (0.25, 0.5, 1.0, 2.0)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 1, bias=False)

    def forward(self, x):
        return self.lin(x)[:, 0]


def fresh():
    model = Line()
    nn.init.zeros_(model.lin.weight)
    return model


def told(model, batch):
    found = model(batch["x"])
    return {
        "prediction": found,
        "target": batch["y"],
        "guess": found > 0,
        "correct": (found > 0) == (batch["y"] > 0),
        "loss": 100 * (found - 0.25 * batch["y"]).abs(),  # least where the prediction is a quarter of the target
    }


def labels(model, batch):
    return {name: 1.0 * (told(model, batch)[name] > 0) for name in ("prediction", "target")}


def task(name, direction, metrics=("rmse",), score=told):
    """y = w · x with noise, w along one of the inputs."""

    def data(split):
        generator = np.random.default_rng([("train", "validation", "test").index(split), direction])
        x = generator.normal(size=(40, 4)).astype(np.float32)
        return {"x": x, "y": x[:, direction] + 0.1 * generator.normal(size=40).astype(np.float32)}

    return Task(model=fresh, data=data, score=score, metrics=metrics, name=name, target_modules=["lin"])


@pytest.fixture
def adapters(tmp_path):
    """ΔW along one input each, of the right size; scale 2."""
    made = []
    for direction in range(2):
        tensors = lora("lin", rows=1, columns=4, rank=1)
        a, b = tensors
        tensors[a], tensors[b] = torch.zeros(1, 4), torch.ones(1, 1)
        tensors[a][0, direction] = 0.25
        path = write(tmp_path / f"w{direction}", tensors, r=1, lora_alpha=4, target_modules=["lin"])
        made.append(Adapter.load(path))
    return made


def compared(adapters, tasks, **options):
    return CompareMerges(**{"methods": ("average", "ties"), "coefficients": GRID, "ranks": ("exact",), **options}).run(
        adapters, tasks
    )


def by_rmse(scores):
    return sklearn.root_mean_squared_error(scores["target"], scores["prediction"])


def test_a_regressions_coefficient_is_chosen_by_its_metric(adapters):
    tasks = [task("first", 0), task("second", 1)]
    result = compared(adapters, tasks)
    assert why_not("compare-merges", 3, result.columns, result.summary) is None
    assert list(result.parameters["metrics"]) == ["rmse"]
    (skipped,) = result.summary["skipped"]
    assert skipped["merge"] == ENSEMBLE
    assert "task first: judged in a way of its own, not by logits" in skipped["why"]
    (curve,) = [each for each in result.summary["curves"] if each["merge"] == "average"]
    made = [merge(Sources(adapters, tasks=tasks), "average", coefficient=c).adapter for c in curve["coefficient"]]
    expected = [np.mean([by_rmse(score(t, each, "validation")) for t in tasks]) for each in made]
    assert curve["rmse"] == pytest.approx(expected, rel=1e-5)
    losses = [np.mean([score(t, each, "validation").mean_loss for t in tasks]) for each in made]
    best = curve["coefficient"][int(np.argmin(expected))]
    assert best != curve["coefficient"][int(np.argmin(losses))]  # the two differ, or this would tell nothing
    for t in tasks:
        (row,) = result.rows(merge="average", chosen=True, task=t.name)
        (own,) = result.rows(merge=ALONE, task=t.name)
        assert row["coefficient"] == best
        assert row["rmse_low"] < row["rmse"] < row["rmse_high"]
        assert row["lost"] == pytest.approx(row["rmse"] - own["rmse"])
        assert row["lost_low"] <= row["lost"] <= row["lost_high"]
        assert row["normalised"] is None
        assert own["lost"] == 0.0
    (ties,) = [row for row in result.summary["by_method"] if row["merge"] == "ties"]
    (average,) = [row for row in result.summary["by_method"] if row["merge"] == "average"]
    assert ties["difference"] == pytest.approx(average["rmse"] - ties["rmse"], abs=1e-9)  # less is better
    assert ties["lost"] == pytest.approx(np.mean([r["lost"] for r in result.rows(merge="ties", chosen=True)]))


def test_another_metric_of_the_tasks_can_be_asked_for(adapters):
    tasks = [task(name, i, ("rmse", "pearson", "loss")) for i, name in enumerate(("first", "second"))]
    found = compared(adapters, tasks, metric=("loss",))
    (curve,) = [each for each in found.summary["curves"] if each["merge"] == "average"]
    (row,) = [row for row in found.summary["by_method"] if row["merge"] == "average"]
    assert row["coefficient"] == curve["coefficient"][int(np.argmin(curve["loss"]))]
    best = compared(adapters, tasks, metric=("pearson",))
    (row,) = [row for row in best.summary["by_method"] if row["merge"] == "average"]
    assert row["lost"] > 0  # what is lost of what is the better the more
    assert row["pearson"] < 1
    with pytest.raises(OptionError, match=r"unknown metric of task first: 'rmsd' .did you mean 'rmse'.*pearson, loss"):
        compared(adapters, tasks, metric=("rmsd",))


def test_tasks_of_several_metrics_stand_side_by_side(adapters):
    tasks = [task("first", 0), task("second", 1, ("f1",), labels)]
    result = compared(adapters, tasks)
    assert list(result.parameters["metrics"]) == ["rmse", "f1"]
    rows = result.rows(merge="average", chosen=True)
    assert [row["rmse"] is None for row in rows] == [False, True]
    assert [row["f1"] is None for row in rows] == [True, False]
    assert [row["normalised"] is None for row in rows] == [True, False]
    by_task = [row for row in result.summary["by_task"] if row["merge"] == "average"]
    assert [(row["task"], row["rmse"] is None, row["f1"] is None) for row in by_task] == [
        ("first", False, True),
        ("second", True, False),
    ]
    assert all(row["f1"] is None and row["normalised"] is None for row in result.summary["by_method"])
    with pytest.raises(OptionError, match="tasks judged by rmse, f1 have no mean over them"):
        figure(result, kind="compare-merges:bars")
    assert len(figure(result, kind="compare-merges:tasks").axes) == 2
    assert "rmse" not in result.to_latex()  # of no mean there is no column


def test_the_share_that_is_kept_of_f1_is_that_of_the_library(adapters):
    tasks = [task(name, i, ("f1",), labels) for i, name in enumerate(("first", "second"))]
    result = compared(adapters, tasks, metric=("f1",))
    for t in tasks:
        (row,), (own,) = result.rows(merge="average", chosen=True, task=t.name), result.rows(merge=ALONE, task=t.name)
        merged = merge(Sources(adapters, tasks=tasks), "average", coefficient=row["coefficient"]).adapter
        found = score(t, merged)
        assert row["f1"] == pytest.approx(sklearn.f1_score(found["target"], found["prediction"]))
        assert row["normalised"] == pytest.approx(row["f1"] / own["f1"])
        assert row["lost"] is None
    assert "accuracy" not in result.to_latex()
    assert figure(result, kind="compare-merges:bars").axes[0].get_ylabel() == "f1 / f1 alone"
    assert figure(result, kind="compare-merges:coefficients").axes[0].get_ylabel() == "validation f1"


def test_a_search_goes_by_the_metric_too(adapters):
    tasks = [task("first", 0, ("rmse", "loss")), task("second", 1, ("rmse", "loss"))]
    sources = Sources(adapters, tasks=tasks)
    found = search(sources, "average", {"coefficient": Grid(GRID)})
    assert found.coefficient == min(found.trials, key=lambda trial: trial["rmse"])["coefficient"]
    by_loss = search(sources, "average", {"coefficient": Grid(GRID)}, metric=("loss",))
    assert by_loss.coefficient == min(by_loss.trials, key=lambda trial: trial["loss"])["coefficient"]
    assert by_loss.coefficient != found.coefficient
    assert [trial["place"] for trial in found.trials if trial["coefficient"] == found.coefficient] == [1]
    mixed = Sources(adapters, tasks=[task("first", 0), task("second", 1, ("f1",), labels)])
    ranked = search(mixed, "average", {"coefficient": Grid(GRID)})
    assert {"rmse", "f1", "place"} <= ranked.trials[0].keys()
    assert "loss" not in ranked.trials[0]


def test_an_interval_is_searched_by_the_metric_where_there_is_no_loss(adapters):
    """c (x₁ + x₂) / 2 of the target x₁: its error, (1 − c/2)² + (c/2)², is least at c = 1."""

    def without(model, batch):
        return {name: values for name, values in told(model, batch).items() if name != "loss"}

    sources = Sources(adapters, tasks=[task("first", 0, score=without), task("second", 1, score=without)])
    found = search(sources, "average", {"coefficient": Interval(0.2, 4.0)})
    assert "loss" not in found.trials[0]
    assert found.coefficient == pytest.approx(1.0, abs=0.2)
