"""Metrics as worths: Shapley values of F1, perplexity and correlations are those of every coalition's own metric."""

import itertools
import math

import numpy as np
import pytest
import torch
from making_adapters import PREFIX, write
from torch import nn

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.groups import players
from lora_lab.analysis.coalitions.game import Game
from lora_lab.analysis.questions import Shapley, Sweep
from lora_lab.errors import LoraLabWarning, OptionError
from lora_lab.games.coalitions import all_coalitions
from lora_lab.plots.registry import figure
from lora_lab.pruning.entries import prune_weights
from lora_lab.results.schema import why_not
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.tasks.python.own import Task

sklearn = pytest.importorskip("sklearn.metrics")


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
    return {"x": x, "y": x.sum(1) + generator.normal(size=60).astype(np.float32)}


def score(model, batch):
    found, tokens = model(batch["x"]), 1 + (batch["x"][:, 0] > 0).int()
    return {
        "prediction": (found > 0.8).int(),
        "target": (batch["y"] > 0.8).int(),
        "loss": (found - batch["y"]).abs(),
        "tokens": tokens,
    }


def task(*metrics, score=score, model=fresh):
    return Task(model=model, data=data, score=score, metrics=metrics, name="stack", target_modules=["0", "1", "2"])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"{PREFIX}layers.{i}.lora_{part}.weight": torch.randn(shape, generator=generator)
        for i in range(3)
        for part, shape in (("A", (2, 4)), ("B", (4, 2)))
    }
    return Adapter.load(write(tmp_path_factory.mktemp("worths") / "a", tensors, target_modules=["0", "1", "2"]))


def predictions(adapter, coalition):
    """Of the test split, with ΔW added to the layers in the coalition."""
    model = fresh()
    with torch.no_grad():
        for i in np.flatnonzero(coalition):
            model.layers[i].weight += adapter.updates[f"layers.{i}"].delta()
        x = torch.from_numpy(data("test")["x"])
        return {
            key: values.numpy()
            for key, values in score(model, {"x": x, "y": torch.from_numpy(data("test")["y"])}).items()
        }


def by_orders(worth):
    """Shapley values of three players as means over all orders of joining; `worth`: coalition → number."""
    values, orders = np.zeros(3), list(itertools.permutations(range(3)))
    for order in orders:
        on = np.zeros(3, bool)
        for player in order:
            before = worth(on)
            on = on | (np.arange(3) == player)
            values[player] += (worth(on) - before) / len(orders)
    return values


REFERENCES = {
    "f1": lambda of: sklearn.f1_score(of["target"], of["prediction"]),
    "mcc": lambda of: sklearn.matthews_corrcoef(of["target"], of["prediction"]),
    "rmse": lambda of: -sklearn.root_mean_squared_error(of["target"], of["prediction"]),
    "perplexity": lambda of: -math.exp((of["loss"] * of["tokens"]).sum() / of["tokens"].sum()),
    "loss": lambda of: -of["loss"].mean(),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_exact_values_of_a_metric_are_those_of_every_coalitions_own(adapter, name):
    found = Shapley(worth=name, estimator="exact").run([adapter], task(*REFERENCES))
    expected = by_orders(lambda on: REFERENCES[name](predictions(adapter, on)))
    assert found.columns["value"] == pytest.approx(expected, abs=1e-6)
    assert max(map(abs, expected)) > 0.01
    summary = found.summary["adapters"][0]
    assert summary["full"] == pytest.approx(REFERENCES[name](predictions(adapter, np.ones(3, bool))), abs=1e-6)
    assert found.parameters["worth"] == name
    assert found.parameters["metrics"][name]["higher"] == (name in ("f1", "mcc"))


@pytest.mark.parametrize("name", ["f1", "perplexity"])
def test_their_standard_errors_over_examples_are_those_of_a_bootstrap(adapter, name):
    found = Shapley(worth=name, estimator="exact").run([adapter], task(*REFERENCES))
    every = {row.tobytes(): predictions(adapter, row) for row in all_coalitions(3)}
    generator, drawn = np.random.default_rng(0), []
    for _ in range(300):
        places = generator.integers(0, 60, 60)
        again = {key: {k: v[places] for k, v in columns.items()} for key, columns in every.items()}
        drawn.append(by_orders(lambda on, again=again: REFERENCES[name](again[on.tobytes()])))
    assert found.columns["se_examples"] == pytest.approx(np.std(drawn, axis=0), rel=0.25)


def test_the_tasks_main_metric_is_the_default(adapter):
    assert Shapley(estimator="exact").run([adapter], task("f1", "loss")).parameters["worth"] == "f1"
    unnamed = Shapley(estimator="exact").run([adapter], task())
    assert unnamed.parameters["worth"] == "prediction"  # its first column


def test_a_worth_that_the_task_lacks_is_refused_with_those_it_has(adapter):
    with pytest.raises(OptionError, match=r"unknown worth of task stack: 'acuracy'.*: f1, loss, log-likelihood, m"):
        Shapley(worth="acuracy").run([adapter], task("f1", "loss"))
    with pytest.raises(OptionError, match=r"unknown worth of task stack: 'f1'.*: prediction, target, loss, tokens, lo"):
        Shapley(worth="f1").run([adapter], task())
    with pytest.raises(OptionError, match="the worth f1 has no gradient for gates; there are: accuracy"):
        Shapley(estimator="joint").run([adapter], task("f1", "loss"))


def zeros():
    model = Stack()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def test_a_coalition_without_a_value_is_named_and_the_others_keep_theirs(adapter):
    """What the layers add to the sum is 0 without any, and has no correlation then."""

    def added(model, batch):
        return {"prediction": model(batch["x"]) - batch["x"].sum(1), "target": batch["y"]}

    own = task("pearson", score=added, model=zeros)
    game = Game(Evaluator([adapter], own), players(adapter))
    with pytest.warns(LoraLabWarning, match="a: pearson has no value for 1 of 8 coalitions, which are left out: no pl"):
        worths = game(all_coalitions(3))
    assert np.isnan(worths[0])
    assert np.isfinite(worths[1:]).all()
    with (
        pytest.warns(LoraLabWarning, match="no player"),
        pytest.raises(OptionError, match="1 of 8 have no finite worth"),
    ):
        Shapley(estimator="exact").run([adapter], own)


def test_a_sweep_is_by_the_metrics_that_are_asked_for(adapter):
    """Magnitude at 0 is the adapter itself, random draws are means of each draw's own metric."""
    own = task("f1", "perplexity", "loss")
    asked = {"kinds": ("unstructured",), "sparsities": (0.0, 0.5), "draws": 3}
    found = Sweep(**asked).run([adapter], own)
    assert list(found.parameters["metrics"]) == ["f1", "loss"]
    assert why_not("sweep", 2, found.columns, found.summary) is None
    whole = found.rows(criterion="magnitude", label="0")[0]
    expected = predictions(adapter, np.ones(3, bool))
    assert whole["f1"] == pytest.approx(REFERENCES["f1"](expected))
    assert whole["f1_low"] < whole["f1"] < whole["f1_high"]
    other = Sweep(**asked, metric=("perplexity",)).run([adapter], own)
    assert other.rows(criterion="magnitude", label="0")[0]["perplexity"] == pytest.approx(
        -REFERENCES["perplexity"](expected), rel=1e-5
    )
    assert "f1" not in other.columns
    pruned = [prune_weights(adapter, sparsity=0.5, by="random", per_matrix=False, seed=i).adapter for i in range(3)]
    each = [REFERENCES["f1"](predictions(one, np.ones(3, bool))) for one in pruned]
    (random,) = found.rows(criterion="random", label="0.5")
    assert random["f1"] == pytest.approx(np.mean(each))
    assert random["f1_spread"] == pytest.approx(np.std(each, ddof=1))
    assert figure(other, kind="sweep:unstructured").axes[0].get_ylabel() == "perplexity"
    with pytest.raises(OptionError, match=r"unknown metric of task stack: 'acc'.*; there are: f1, perplexity, loss"):
        Sweep(**asked, metric=("acc",)).run([adapter], own)


def test_layers_are_chosen_on_a_task_of_ones_own_by_all_that_takes_no_gradient(adapter):
    question = Sweep(kinds=("structured",), draws=1, metric=("rmse",))
    rows = question.run([adapter], task("rmse", "loss")).rows()
    criteria = {row["criterion"] for row in rows}
    assert {"all", "top-norm", "random", "top-shapley", "top-drop"} <= criteria
    assert not {"top-gates", "top-taylor"} & criteria
    whole = next(row["rmse"] for row in rows if row["criterion"] == "all")
    assert whole == pytest.approx(-REFERENCES["rmse"](predictions(adapter, np.ones(3, bool))))
