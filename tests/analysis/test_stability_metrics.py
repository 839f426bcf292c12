"""Dropout stability by the metrics of a user's own task: every keep-set's own value, by the libraries' definitions."""

import numpy as np
import pytest
import torch
from making_adapters import PREFIX, write
from scipy import stats as scipy_stats
from torch import nn

from lora_lab import plots
from lora_lab.adapters.adapter import Adapter
from lora_lab.analysis.questions import Stability
from lora_lab.errors import LoraLabWarning, OptionError, TaskError
from lora_lab.games.coalitions import all_coalitions
from lora_lab.results.schema import why_not
from lora_lab.tasks.python.own import Task

sklearn = pytest.importorskip("sklearn.metrics")

REFERENCES = {
    "spearman": lambda said, true: scipy_stats.spearmanr(said, true).statistic,
    "pearson": lambda said, true: scipy_stats.pearsonr(said, true).statistic,
    "rmse": lambda said, true: sklearn.root_mean_squared_error(true, said),
    "loss": lambda said, true: np.mean((said - true) ** 2),
}
HIGHER = {"spearman", "pearson"}
SETS = all_coalitions(3)
SIZES = SETS.sum(1)


class Stack(nn.Module):
    """Three residual layers and a sum."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x.sum(1)


def fresh():
    torch.manual_seed(0)
    return Stack()


def data(split):
    generator = np.random.default_rng(("train", "validation", "test").index(split))
    x = generator.normal(size=(60, 4)).astype(np.float32)
    return {"x": x, "y": 2 * x.sum(1) + generator.normal(size=60).astype(np.float32)}


def score(model, batch):
    said = model(batch["x"])
    return {"prediction": said, "target": batch["y"], "loss": (said - batch["y"]) ** 2}


def task(*metrics, score=score):
    return Task(model=fresh, data=data, score=score, metrics=metrics, name="sums", target_modules=["0", "1", "2"])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"{PREFIX}layers.{i}.lora_{part}.weight": torch.randn(shape, generator=generator)
        for i in range(3)
        for part, shape in (("A", (2, 4)), ("B", (4, 2)))
    }
    return Adapter.load(write(tmp_path_factory.mktemp("kept") / "a", tensors, target_modules=["0", "1", "2"]))


@pytest.fixture(scope="module")
def values(adapter):
    """Metric → its value of every keep-set, with ΔW added to the layers by hand."""
    said, given = [], data("test")
    for kept in SETS:
        model = fresh()
        with torch.no_grad():
            for i in np.flatnonzero(kept):
                model.layers[i].weight += adapter.updates[f"layers.{i}"].delta()
            said.append(model(torch.from_numpy(given["x"])).double().numpy())
    true = given["y"].astype(np.float64)
    return {name: np.array([of(each, true) for each in said]) for name, of in REFERENCES.items()}


@pytest.fixture(scope="module")
def result(adapter):
    return Stability(metric=tuple(REFERENCES), grid=(0.3, 1.0), rescale=False).run([adapter], task(*REFERENCES))


@pytest.mark.parametrize("name", list(REFERENCES))
def test_means_over_keep_sets_are_those_of_each_one_s_own_metric(result, values, name):
    worst = min if name in HIGHER else max
    for k in range(4):
        (row,) = result.rows(family="k-of-G", label=str(k))
        own = values[name][k == SIZES]
        assert row[name] == pytest.approx(own.mean(), rel=1e-4)
        assert row[f"{name}_worst"] == pytest.approx(worst(own), rel=1e-4)
        assert row[f"{name}_spread"] == pytest.approx(own.std(ddof=1) if len(own) > 1 else 0, rel=1e-3)
        assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
    (row,) = result.rows(family="p", label="0.3")
    assert row[name] == pytest.approx(0.3**SIZES * 0.7 ** (3 - SIZES) @ values[name], rel=1e-4)
    assert row[f"{name}_worst"] == pytest.approx(worst(values[name]), rel=1e-4)
    (row,) = result.rows(family="p", label="1")  # the whole adapter, for certain
    assert row[f"{name}_worst"] == pytest.approx(values[name][-1], rel=1e-4)


@pytest.mark.parametrize("name", list(REFERENCES))
def test_epsilon_is_how_much_worse_the_worst_keep_set_is(result, values, name):
    worse = (values[name] - values[name][-1]) * (-1 if name in HIGHER else 1)
    (summary,) = result.summary["adapters"]
    assert summary[name] == pytest.approx(values[name][-1], rel=1e-4)
    found = {row["family"]: row for row in summary["epsilon"] if row["metric"] == name}
    for family, places in (("non-empty keep-sets", range(1, 7)), ("leave-one-out", (3, 5, 6))):
        row = found[family]
        assert row["value"] == pytest.approx(max(worse[i] for i in places), rel=1e-3)
        assert row["low"] < row["value"] < row["high"]
        on = [f"layers.{i}" for i in np.flatnonzero(SETS[max(places, key=worse.__getitem__)])]
        off = [f"layers.{i}" for i in range(3) if f"layers.{i}" not in on]
        assert row["worst_set"] == (", ".join(on) if len(on) <= len(off) else f"all but {', '.join(off)}")
    (mean,) = [row for row in result.summary["by_method"] if (row["family"], row["metric"]) == ("leave-one-out", name)]
    assert mean["mean"] == found["leave-one-out"]["value"]


def test_its_metrics_are_told_and_drawn_and_its_inequality_is_left_out(result):
    assert {name: said["higher"] for name, said in result.parameters["metrics"].items()} == {
        name: name in HIGHER for name in REFERENCES
    }
    assert result.summary["adapters"][0]["inequality"] == []  # there are no logits
    assert why_not(result.kind, result.schema, result.columns, result.summary) is None
    assert plots.figure([result]).axes[0].get_ylabel() == "spearman"
    assert r"spearman & pearson" in result.to_latex().replace("spearman worst & spearman worst set & ", "")


def test_the_main_metric_and_the_loss_are_told_by_default(adapter):
    found = Stability(samples=2, grid=(), rescale=False).run([adapter], task("rmse", "pearson", "loss"))
    assert list(found.parameters["metrics"]) == ["rmse", "loss"]
    found = Stability(samples=2, grid=(), rescale=False).run([adapter], task())  # which knows its columns once scored
    assert list(found.parameters["metrics"]) == ["prediction", "loss"]


def test_keep_sets_without_a_value_are_named_and_left_out(adapter):
    """Without the first layer's update every answer is the same, of which there is no correlation."""
    base = fresh()

    def only_with_the_first(model, batch):
        changed = not torch.equal(model.get_submodule("layers.0")(batch["x"]), base.layers[0](batch["x"]))
        said = model(batch["x"]) * changed
        return {"prediction": said, "target": batch["y"], "loss": (said - batch["y"]) ** 2}

    asked = Stability(metric=("pearson", "loss"), grid=(0.0, 0.5), rescale=False)
    with pytest.warns(LoraLabWarning, match="pearson has no value for 6 of 11 coalitions, .*: no player"):
        found = asked.run([adapter], task("pearson", "loss", score=only_with_the_first))
    assert {row["label"]: row["sets"] for row in found.rows(family="k-of-G")} == {"1": 1, "2": 2, "3": 1}
    assert [row["label"] for row in found.rows(family="one-alone")] == ["layers.0"]
    assert [row["label"] for row in found.rows(family="p")] == ["0.5"]  # at 0 no keep-set is left
    fixed = {row["label"]: row for row in found.rows(family="fixed")}
    lost = [label for label, row in fixed.items() if row["pearson"] is None]
    assert len(lost) == 2
    assert [fixed[label]["loss"] for label in lost] == pytest.approx([(data("test")["y"] ** 2).mean()] * 2, rel=1e-4)
    assert all(np.isfinite(row["pearson"]) for row in found.rows() if row["label"] not in lost)
    epsilon = found.summary["adapters"][0]["epsilon"]
    assert {row["family"]: row["sets"] for row in epsilon if row["metric"] == "pearson"} == {
        "non-empty keep-sets": 3,
        "half or more kept": 2,
        "leave-one-out": 2,
        "fixed patterns": len(fixed) - 2,
    }

    def never(model, batch):
        return {"prediction": torch.zeros(len(batch["y"])), "target": batch["y"], "loss": batch["y"] ** 2}

    with pytest.warns(LoraLabWarning), pytest.raises(TaskError, match="pearson has no value with everything on"):
        asked.run([adapter], task("pearson", "loss", score=never))


def test_a_metric_that_the_task_lacks_is_refused_before_anything_is_scored(adapter):
    def none(model, batch):
        raise AssertionError

    with pytest.raises(OptionError, match=r"unknown metric of task sums: 'persn' .did you mean 'pearson'"):
        Stability(metric=("persn",)).run([adapter], task("pearson", "loss", score=none))
