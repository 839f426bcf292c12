"""Metrics: references of scikit-learn and scipy, intervals by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lora_lab.errors import TaskError
from lora_lab.tasks.metrics import METRICS, mean_of

sklearn = pytest.importorskip("sklearn.metrics")

REFERENCES = {
    "rmse": sklearn.root_mean_squared_error,
    "pearson": lambda target, prediction: stats.pearsonr(target, prediction).statistic,
    "spearman": lambda target, prediction: stats.spearmanr(target, prediction).statistic,
    "f1": lambda target, prediction: sklearn.f1_score(target, prediction, zero_division=0.0),
    "mcc": sklearn.matthews_corrcoef,
}


def value(name, **columns):
    return METRICS[name].estimate({key: np.asarray(column) for key, column in columns.items()}, seed=0)[0]


@pytest.mark.parametrize("name", ["rmse", "pearson", "spearman"])
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
