"""Metrics: references of scikit-learn and scipy, intervals by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lora_lab.errors import TaskError
from lora_lab.tasks.scores.metrics import METRICS, mean_of

sklearn = pytest.importorskip("sklearn.metrics")

REFERENCES = {
    "rmse": sklearn.root_mean_squared_error,
    "r2": sklearn.r2_score,
    "pearson": lambda target, prediction: stats.pearsonr(target, prediction).statistic,
    "spearman": lambda target, prediction: stats.spearmanr(target, prediction).statistic,
    "f1": lambda target, prediction: sklearn.f1_score(target, prediction, zero_division=0.0),
    "mcc": sklearn.matthews_corrcoef,
}


def value(name, **columns):
    return METRICS[name].estimate({key: np.asarray(column) for key, column in columns.items()}, seed=0)[0]


@pytest.mark.parametrize("name", ["rmse", "pearson", "spearman", "r2"])
@given(st.integers(3, 40), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e6]), st.sampled_from([1e-3, 1.0, 1e3]))
def test_metrics_of_numbers_are_those_of_the_libraries(name, n, seed, offset, scale):
    generator = np.random.default_rng(seed)
    target = generator.normal(size=n) * scale + offset
    prediction = np.round(target + generator.normal(size=n) * scale, 3)  # with ties
    expected = REFERENCES[name](target, prediction)
    assert value(name, prediction=prediction, target=target) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("name", "labels"), [("f1", 2), ("mcc", 2), ("mcc", 5)])
@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")
@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_metrics_of_labels_are_those_of_scikit_learn(name, labels, n, seed):
    target, prediction = np.random.default_rng(seed).integers(0, labels, (2, n))
    expected = REFERENCES[name](target, prediction)
    assert value(name, prediction=prediction, target=target) == pytest.approx(expected, abs=1e-12)


def test_perplexity_is_over_all_tokens():
    assert value("perplexity", loss=[1.0, 2.0], tokens=[3, 1]) == pytest.approx(math.exp((3 + 2) / 4))


@pytest.mark.parametrize("name", ["pearson", "f1", "mcc", "rmse"])
def test_intervals_of_statistics_hold_the_truth(name):
    """Of 200 examples each, 200 draws; the truth from 200,000."""
    generator = np.random.default_rng(0)

    def drawn(n):
        target = generator.normal(size=n)
        prediction = 0.7 * target + generator.normal(size=n) * 0.5
        return (target, prediction) if name in ("pearson", "rmse") else (target > 0.5, prediction > 0.5)

    truth = REFERENCES[name](*drawn(200_000))
    inside = []
    for seed in range(200):
        target, prediction = drawn(200)
        _, low, high = METRICS[name].estimate({"target": target, "prediction": prediction}, seed=seed)
        inside.append(low <= truth <= high)
    assert 0.9 < np.mean(inside) < 0.99


def test_a_metric_says_what_it_lacks():
    with pytest.raises(TaskError, match="no 'target' among the scores: prediction, loss; the metric needs it"):
        METRICS["rmse"].estimate({"prediction": np.zeros(3), "loss": np.zeros(3)}, seed=0)
    with pytest.raises(TaskError, match="1 examples; Pearson's correlation needs 2 or more"):
        value("pearson", prediction=[1.0], target=[1.0])


def test_what_is_not_defined_is_no_number():
    assert math.isnan(value("pearson", prediction=[1.0, 1.0], target=[1.0, 2.0]))
    assert mean_of("x").estimate({"x": np.array([1.0, 3.0])}, seed=0)[0] == 2


def labelled(generator, n, share=0.3):
    target = generator.random(n) < share
    return {"target": target, "prediction": np.where(generator.random(n) < 0.7, target, generator.random(n) < share)}


def correlated(generator, n):
    target = generator.normal(size=n)
    return {"target": target, "prediction": 0.5 * target + generator.normal(size=n)}


def texts(generator, n):
    return {"loss": generator.gamma(4, 0.5, n), "tokens": generator.integers(5, 60, n)}


def closed_f1(prediction, target):
    hit, false, missed = prediction & target, prediction & ~target, ~prediction & target
    whole = (2 * hit + false + missed).mean()
    f1 = 2 * hit.mean() / whole
    return f1 + (2 * hit - f1 * (2 * hit + false + missed)) / whole


def closed_pearson(prediction, target):
    x, y = stats.zscore(prediction), stats.zscore(target)
    r = (x * y).mean()
    return r + x * y - r - r / 2 * (x**2 + y**2 - 2)


def closed_perplexity(loss, tokens):
    mean = (loss * tokens).sum() / tokens.sum()
    return np.exp(mean) * (1 + (loss - mean) * tokens / tokens.mean())


def closed_rmse(prediction, target):
    square = (prediction - target) ** 2
    return np.sqrt(square.mean()) + (square - square.mean()) / (2 * np.sqrt(square.mean()))


CLOSED = {
    "f1": (labelled, closed_f1),
    "pearson": (correlated, closed_pearson),
    "perplexity": (texts, closed_perplexity),
    "rmse": (correlated, closed_rmse),
}


@pytest.mark.parametrize("name", CLOSED)
@given(st.integers(4, 300), st.integers(0, 2**32 - 1))
def test_influence_is_that_of_the_closed_form(name, n, seed):
    draw, closed = CLOSED[name]
    columns = draw(np.random.default_rng(seed), n)
    if name == "f1" and not (columns["prediction"] | columns["target"]).any():
        return
    found = METRICS[name].influence(columns)
    assert found == pytest.approx(closed(**columns), rel=1e-8, abs=1e-9)
    assert found.mean() == pytest.approx(METRICS[name].value(columns), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", ["f1", "mcc", "rmse"])
def test_influence_is_what_a_little_more_weight_of_an_example_does(name):
    """ψ_i − g = d/dε of the metric with weights (1 − ε)/n + ε at i, by scikit-learn's weights."""
    columns = labelled(np.random.default_rng(1), 40)
    n, step = 40, 1e-6
    found = METRICS[name].influence({key: values.astype(int) for key, values in columns.items()})
    reference = {**REFERENCES, "f1": sklearn.f1_score}[name]
    for i in range(n):
        ends = []
        for epsilon in (step, -step):
            weights = np.full(n, (1 - epsilon) / n)
            weights[i] += epsilon
            given = {key: values.astype(int) for key, values in columns.items()}
            ends.append(reference(given["target"], given["prediction"], sample_weight=weights))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert found[i] - found.mean() == pytest.approx(slope, abs=1e-6)


def test_influence_on_a_mean_is_the_column_itself():
    outcomes = np.random.default_rng(0).random(100) < 0.7
    losses = np.random.default_rng(0).gamma(2, 1, 100)
    assert (METRICS["accuracy"].influence({"correct": outcomes}) == outcomes).all()
    assert (METRICS["loss"].influence({"loss": losses}) == losses).all()
    assert METRICS["accuracy"].influence({"correct": outcomes}).dtype == np.float64


def test_influence_where_a_metric_has_no_value_or_none_that_an_example_moves():
    constant = METRICS["pearson"].influence({"prediction": np.ones(4), "target": np.arange(4.0)})
    assert np.isnan(constant).all()
    exact = METRICS["rmse"].influence({"prediction": np.arange(4.0), "target": np.arange(4.0)})
    assert (exact == 0).all()
    none = METRICS["f1"].influence({"prediction": np.zeros(4, int), "target": np.array([0, 1, 1, 0])})
    assert (none == 0).all()
    with pytest.raises(TaskError, match="1 examples; Pearson's correlation needs 2 or more"):
        METRICS["pearson"].influence({"prediction": np.ones(1), "target": np.ones(1)})


@pytest.mark.parametrize(("name", "draw"), [("f1", labelled), ("perplexity", texts), ("pearson", correlated)])
def test_intervals_by_influence_hold_the_truth(name, draw):
    """Student's t of ψ, 200 examples, 400 draws; the truth from 400,000."""
    generator = np.random.default_rng(0)
    truth, inside = METRICS[name].value(draw(generator, 400_000)), []
    for _ in range(400):
        found = METRICS[name].influence(draw(generator, 200))
        half = stats.t.ppf(0.975, 199) * found.std(ddof=1) / math.sqrt(200)
        inside.append(abs(found.mean() - truth) <= half)
    assert 0.92 <= np.mean(inside) <= 0.98
