"""Lines, planes and curves by the metrics of a user's own task, against the libraries that define these."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from torch import nn

import lora_lab as ll
from lora_lab import plots
from lora_lab.analysis.lines.connectivity import BARRIERS
from lora_lab.analysis.lines.landscape import Curve, Layerwise, Plane
from lora_lab.analysis.questions import Interpolate
from lora_lab.errors import OptionError, TaskError
from lora_lab.merging.paths import Paths
from lora_lab.results.result import Result
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.execution import Execution
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

sklearn = pytest.importorskip("sklearn.metrics")

REFERENCES = {
    "spearman": lambda prediction, target: scipy_stats.spearmanr(prediction, target).statistic,
    "pearson": lambda prediction, target: scipy_stats.pearsonr(prediction, target).statistic,
    "rmse": lambda prediction, target: sklearn.root_mean_squared_error(target, prediction),
    "f1": lambda prediction, target: sklearn.f1_score(target, prediction, zero_division=0.0),
    "mcc": lambda prediction, target: sklearn.matthews_corrcoef(target, prediction),
}
HIGHER = {"spearman", "pearson", "f1", "mcc"}
GRID = np.linspace(0, 1, 5)


class Regressor(nn.Module):
    """y = w · tanh(V x), and its squared error."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x, y=None):
        found = self.out(self.hidden(x).tanh())[:, 0]
        return {"prediction": found, "loss": None if y is None else ((found - y) ** 2).mean()}


def fresh():
    torch.manual_seed(0)
    return Regressor()


def data(split):
    generator = np.random.default_rng(("train", "validation", "test").index(split))
    x = generator.normal(size=(40, 4)).astype(np.float32)
    return {"x": x, "y": x.sum(1) + 0.3 * x[:, 0] * x[:, 1]}


def number(model, batch):
    found = model(batch["x"])["prediction"]
    return {"prediction": found, "target": batch["y"], "loss": (found - batch["y"]) ** 2}


def label(model, batch):
    found = model(batch["x"])["prediction"]
    return {"prediction": (found > 0.5).long(), "target": (batch["y"] > 0.5).long(), "loss": (found - batch["y"]) ** 2}


def task(score=number, metrics=("spearman", "pearson", "rmse", "loss"), **changes):
    settings = {"batch_size": 16, "target_modules": ["hidden"], "steps": 12, "learning_rate": 0.1, **changes}
    return ll.Task(model=fresh, data=data, score=score, metrics=metrics, name="sums", **settings)


@pytest.fixture(scope="module")
def three():
    return [train(task(), Recipe("lora", seed=seed, rank=2))[0] for seed in range(3)]


TASKS = {
    "numbers": (number, ("spearman", "pearson", "rmse")),
    "labels": (label, ("f1", "mcc")),
}


@pytest.mark.parametrize("name", list(TASKS))
def test_barriers_of_statistics_are_those_of_the_predictions_at_each_point(three, name):
    judged, metrics = TASKS[name]
    own = task(judged, (*metrics, "loss"))
    result = Interpolate(points=len(GRID), spaces=("delta",), metric=metrics).run(three[:2], own)
    assert list(result.parameters["metrics"]) == list(metrics)
    assert "loss" not in result.columns
    paths = Paths(three[:2])
    found = [score(own, paths.mix([1 - t, t], "delta")) for t in GRID]
    for metric in metrics:
        values = np.array([REFERENCES[metric](each["prediction"], each["target"]) for each in found])
        assert result.columns[metric] == pytest.approx(values, abs=1e-6)
        bad = -values if metric in HIGHER else values
        chord = bad - (1 - GRID) * bad[0] - GRID * bad[-1]
        barriers = {row["barrier"]: row for row in result.summary["barriers"] if row["metric"] == metric}
        assert barriers["entezari"]["value"] == pytest.approx(chord.max(), abs=1e-6)
        assert barriers["max_end"]["value"] == pytest.approx((bad - max(bad[0], bad[-1])).max(), abs=1e-6)
        assert barriers["midpoint"]["value"] == pytest.approx(values[2], abs=1e-6)  # the metric itself
        for row in barriers.values():
            assert row["low"] <= row["value"] <= row["high"]
        low, high = (result.columns[f"{metric}_{end}"] for end in ("low", "high"))
        assert all(a < value < b for a, value, b in zip(low, values, high, strict=True))


def test_layers_are_exchanged_by_the_main_metric(three):
    result = Layerwise(points=3).run(three[:2], task())
    for row in result.summary["barriers"]:
        values = np.array([point[row["metric"]] for point in result.rows(index=row["index"])])
        bad = -values if row["metric"] in HIGHER else values
        assert row["exchange"] == pytest.approx(bad[-1] - bad[0], abs=1e-9)
        assert row["value"] == pytest.approx(BARRIERS["entezari"](bad[:, None], np.linspace(0, 1, 3)).max(), abs=1e-9)
    assert {row["metric"] for row in result.summary["barriers"]} == {"spearman", "loss"}


def test_a_plane_is_drawn_by_the_metrics_of_the_task(three):
    own = task()
    result = Plane(points=3, margin=0.5).run(three, own)
    for adapter, corner in zip(three, result.summary["corners"], strict=True):
        scores = score(own, adapter)
        assert corner["spearman"] == pytest.approx(REFERENCES["spearman"](scores["prediction"], scores["target"]))
    gains = {gain["metric"]: gain for gain in result.summary["gains"]}
    assert list(gains) == ["spearman", "loss"]
    for metric, gain in gains.items():
        # chosen on every other example and compared on the rest, by what the library says of these halves
        places = [*((corner["x"], corner["y"]) for corner in result.summary["corners"])]
        places += [(row["x"], row["y"]) for row in result.rows()]
        assert (gain["x"], gain["y"]) in places[3:]
        assert gain["low"] <= gain["value"] <= gain["high"]
        assert metric in result.columns
    figure = plots.figure(result)
    assert {"spearman", "loss (nats)"} <= {ax.get_ylabel() for ax in figure.axes}
    filled = [ax.collections[0] for ax in figure.axes[:2]]
    assert [each.get_cmap().name for each in filled] == ["cividis", "cividis_r"]  # the better, the lighter
    assert [type(each.norm).__name__ for each in filled] == ["Normalize", "LogNorm"]


def test_a_gain_of_a_statistic_is_that_of_the_half_that_did_not_choose():
    from making_measured import measured, places

    from lora_lab.analysis.lines.plane import _gain

    generator = np.random.default_rng(0)
    target = np.tile(generator.normal(size=200), (7, 1))
    noise = np.array([1.0, 0.8, 1.2, 2.0, 0.3, 1.5, 0.9])[:, None]
    prediction = target + noise * generator.normal(size=(7, 200))
    found = measured({"prediction": prediction, "target": target}, "pearson")
    gain = _gain(found, "pearson", places(7), [(float(i), 0.0) for i in range(4)])
    assert gain["x"] == 1.0  # the point of the least noise is the best, not the worst
    of_half = [np.corrcoef(prediction[i, 1::2], target[i, 1::2])[0, 1] for i in (1, 4)]
    assert gain["value"] == pytest.approx(of_half[1] - of_half[0])
    assert 0 < gain["low"] < gain["value"] < gain["high"]


def test_a_curve_is_trained_by_the_loss_and_told_by_the_metrics(three, tmp_path):
    own = task()
    question = Curve(shapes=("bezier",), spaces=("delta",), points=3, steps=20, checks=2, metric=("rmse", "pearson"))
    result = question.run(three[:2], own, Execution(cache=tmp_path / "cache"), folder=tmp_path)
    trace = result.summary["controls"][0]["trace"]
    assert trace[-1]["validation_loss"] < trace[0]["validation_loss"]
    for metric in ("rmse", "pearson"):
        rows = result.rows(path="bezier")
        mean = next(
            row["value"]
            for row in result.summary["means"]
            if (row["path"], row["metric"], row["by"]) == ("bezier", metric, "t")
        )
        values = [row[metric] for row in rows]
        assert mean == pytest.approx((values[0] + 2 * values[1] + values[2]) / 4)  # the metric's own, not its negative
    assert plots.figure(result).axes[0].get_ylabel() == "rmse"
    assert plots.figure(result, metric="pearson").axes[0].get_ylabel() == "pearson"
    # another metric goes by the same control point, which lies there already
    other = Curve(shapes=("bezier",), spaces=("delta",), points=3, steps=20, checks=2)
    again = other.run(three[:2], own, Execution(cache=tmp_path / "cache"), folder=tmp_path)
    assert again.summary["controls"] == result.summary["controls"]
    assert list(again.parameters["metrics"]) == ["spearman", "loss"]


def test_a_curve_says_what_a_task_without_a_loss_lacks(three, tmp_path):
    def without(model, batch):
        return {name: values for name, values in number(model, batch).items() if name != "loss"}

    own = task(without, ("rmse",))
    with pytest.raises(TaskError, match="gives no 'loss' of its examples, only prediction, target") as raised:
        Curve(points=3, steps=1).run(three[:2], own, folder=tmp_path)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_metrics_that_a_task_lacks_are_told_before_anything_is_scored(three):
    asked = []

    def counting(model, batch):
        asked.append(len(batch["index"]))
        return number(model, batch)

    for question in (Interpolate, Layerwise, Curve):
        with pytest.raises(OptionError, match=r"metric of task sums: 'accuracy'.*there are: spearman, pearson, rmse"):
            question(metric=("accuracy",)).run(three[:2], task(counting))
    assert not asked
    with pytest.raises(OptionError, match=r"metric of task sums: 'f1'.*there are: prediction, target, loss"):
        Interpolate(metric=("f1",)).run(three[:2], task(counting, ()))
    assert sum(asked) == 40 + 16  # of one point, its first batch twice
    with pytest.raises(TaskError, match="1 examples; Spearman's correlation of ranks needs 2 or more"):
        Interpolate(examples=1, metric=("spearman",)).run(three[:2], task())


def test_what_has_no_value_is_null_and_drawn(three, tmp_path):
    def constant(model, batch):
        found = model(batch["x"])["prediction"]
        return {"prediction": 0 * found, "target": batch["y"], "loss": (found - batch["y"]) ** 2}

    result = Interpolate(points=3, spaces=("delta",)).run(three[:2], task(constant, ("pearson", "loss")))
    result = Result.load(result.save(tmp_path / "line.json"))
    assert result.columns["pearson"] == [None] * 3
    for row in result.summary["barriers"]:
        if row["metric"] == "pearson":
            assert [row[key] for key in ("value", "low", "high")] == [None] * 3
    assert plots.figure(result).axes
    assert plots.figure(result, kind="interpolate:matrix").axes


def test_examples_of_a_line_are_drawn_once_for_all_columns(three):
    few = Interpolate(points=3, spaces=("delta",), examples=20).run(three[:2], task())
    assert few.provenance["examples"] == 20
    chosen = np.sort(np.random.default_rng(0).permutation(40)[:20])
    scores = score(task(), three[0])
    expected = REFERENCES["spearman"](scores["prediction"][chosen], scores["target"][chosen])
    assert few.columns["spearman"][0] == pytest.approx(expected)


def test_figures_are_by_the_metric_that_is_asked_for(three):
    result = Interpolate(points=3, spaces=("factors", "delta"), ratios=((1.0, 1.0),)).run(three, task())
    for kind, text in itertools.product(("interpolate", "interpolate:ratios"), ("spearman", "loss (nats)")):
        assert plots.figure(result, kind=kind, metric=text.split()[0]).axes[0].get_ylabel() == text
    bar = plots.figure(result, kind="interpolate:matrix", metric="loss").axes[-1].get_ylabel()
    assert " ".join(bar.split()).startswith("loss barrier (nats), ")
    with pytest.raises(OptionError, match=r"metric of interpolate results: 'accuracy'; there are: spearman, loss"):
        plots.figure(result, metric="accuracy")
    latex = result.to_latex()
    assert "spearman" in latex
    assert "accuracy" not in latex + plots.figure(result).get_supxlabel()
