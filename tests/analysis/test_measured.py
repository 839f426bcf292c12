"""Metrics of models together: bit by bit what losses and accuracies were, and statistics of every resample."""

import dataclasses
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from making_measured import measured, places, task
from scipy import stats as scipy_stats

import lora_lab as ll
from lora_lab.analysis.measured import Measured, chosen, of_logits, require, scored
from lora_lab.errors import DivergedError, OptionError, TaskError
from lora_lab.results.stats import Sampled, proportion
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.tasks.kinds.language.language import MultipleChoice
from lora_lab.tasks.scores.metrics import METRICS, Metric
from lora_lab.tasks.task import Scores, Split

sklearn = pytest.importorskip("sklearn.metrics")

GENERATOR = np.random.default_rng(0)
N, MODELS = 40, 3
TARGET = GENERATOR.integers(0, 3, N)
COLUMNS = {
    "loss": GENERATOR.gamma(2.0, size=(MODELS, N)),
    "correct": GENERATOR.random((MODELS, N)) < 0.7,
    "shares": GENERATOR.random((MODELS, N)),
    "tokens": np.tile(GENERATOR.integers(1, 9, N), (MODELS, 1)),
    "target": np.tile(TARGET, (MODELS, 1)),
    # the second model never says 2, the third nothing but 1
    "prediction": np.stack([GENERATOR.integers(0, 3, N), GENERATOR.integers(0, 2, N), np.ones(N)]),
}
REFERENCES = {
    "mcc": lambda prediction, target: sklearn.matthews_corrcoef(target, prediction),
    "f1": lambda prediction, target: sklearn.f1_score(target == 1, prediction == 1, zero_division=0.0),
    "rmse": lambda prediction, target: sklearn.root_mean_squared_error(target, prediction),
    "pearson": lambda prediction, target: scipy_stats.pearsonr(prediction, target).statistic,
}


PLACES = places(MODELS)


@pytest.mark.parametrize("outcomes", ["correct", "shares"])
def test_losses_and_accuracies_are_resampled_as_they_were_bit_by_bit(outcomes):
    right = COLUMNS[outcomes]
    found = measured({**COLUMNS, "correct": right}, "accuracy", "loss")
    wrong = np.logical_not(right) if right.dtype == bool else 1.0 - right
    for name, values in (("accuracy", wrong), ("loss", COLUMNS["loss"])):
        expected, sampled = Sampled.of(values, seed=3), found.worse(PLACES, name)
        assert np.array_equal(sampled.means, expected.means)
        assert np.array_equal(sampled.samples, expected.samples)
        assert (sampled.drawn is None) == (expected.drawn is None)
        assert np.array_equal(found.examples(PLACES, name), values.astype(float))
    for i, place in enumerate(PLACES):
        cells = found.cells(place)
        assert tuple(cells)[:3] == ("accuracy", "accuracy_low", "accuracy_high")
        assert tuple(cells.values())[:3] == proportion(right[i])
        assert tuple(cells.values())[3:] == Sampled.of(COLUMNS["loss"], seed=3)[[i]].estimate(lambda L: L[0])


@pytest.mark.parametrize("name", list(REFERENCES))
def test_statistics_of_models_and_of_every_resample_are_the_libraries(name):
    sampled = measured(COLUMNS, name).values(PLACES, name)
    counts = np.random.default_rng(3).multinomial(N, np.full(N, 1 / N), size=100)
    for i in range(MODELS):
        prediction = COLUMNS["prediction"][i]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert sampled.means[i, 0] == pytest.approx(REFERENCES[name](prediction, TARGET), abs=1e-12, nan_ok=True)
            for r in range(0, 100, 7):
                drawn = np.repeat(np.arange(N), counts[r])
                expected = REFERENCES[name](prediction[drawn], TARGET[drawn])
                assert sampled.samples[i, r] == pytest.approx(expected, abs=1e-10, nan_ok=True)


def test_perplexity_and_ranks_are_those_of_each_model_alone():
    found = measured(COLUMNS, "perplexity", "spearman")
    for i, place in enumerate(PLACES[:2]):
        loss, tokens = COLUMNS["loss"][i], COLUMNS["tokens"][i]
        cells = found.cells(place)
        assert cells["perplexity"] == pytest.approx(np.exp((loss * tokens).sum() / tokens.sum()))
        alone = METRICS["spearman"].estimate({n: each[i] for n, each in COLUMNS.items()}, seed=3)
        assert [cells[f"spearman{end}"] for end in ("", "_low", "_high")] == pytest.approx(alone)


@pytest.mark.parametrize(("name", "sign"), [("mcc", -1), ("f1", -1), ("rmse", 1), ("perplexity", 1)])
def test_worse_is_up_whatever_the_direction(name, sign):
    found = measured(COLUMNS, name)
    assert np.array_equal(found.worse(PLACES, name).means, sign * found.values(PLACES, name).means)
    assert np.array_equal(found.worse(PLACES, name).samples, sign * found.values(PLACES, name).samples)
    assert found.examples(PLACES, name) is None


def test_a_mean_of_which_more_is_better_is_turned_round():
    reward = dataclasses.replace(METRICS["loss"], higher=True)
    found = measured(COLUMNS, "reward", reward=reward)
    assert found.worse(PLACES, "reward").means[:, 0] == pytest.approx(-COLUMNS["loss"].mean(1))
    assert found.examples(PLACES, "reward") == pytest.approx(-COLUMNS["loss"])


def test_the_main_metric_and_the_loss_are_told_by_default():
    assert chosen(task("f1", "accuracy", "loss"), ()) == ["f1", "loss"]
    assert chosen(task("loss", "perplexity", "token_accuracy"), ()) == ["loss"]
    assert chosen(task("f1", "accuracy", "loss"), ("accuracy", "f1")) == ["accuracy", "f1"]
    found = measured(COLUMNS, "f1", "loss")
    assert found.told["f1"] == {"about": "F1 of label 1", "unit": "share", "higher": True}
    assert list(found.told) == ["f1", "loss"]


def test_what_a_metric_lacks_is_said_in_one_line():
    with pytest.raises(OptionError, match="unknown metric of task made: 'pearl'; there are: f1, loss"):
        require(task("f1", "loss"), ("pearl",))
    require(task(), ("f2",))  # known after a scoring
    with pytest.raises(TaskError, match="no 'prediction' among the scores: loss; the metric needs it"):
        measured({"loss": COLUMNS["loss"]}, "f1")
    odd = Metric("halved", ("loss",), lambda mean: mean, lambda loss: [loss[..., ::2]])
    with pytest.raises(
        TaskError, match=r"`sufficient` of 'halved' gave columns of shape \[3, 20\] of ones of \[3, 40\]"
    ):
        measured(COLUMNS, "half", half=odd)
    scores = {"a": Scores({"loss": np.zeros(3)}), "b": Scores({"loss": np.zeros(4)})}
    with pytest.raises(TaskError, match="task made: scores of 3 and of 4 examples; as many are needed"):
        Measured.of_scores(task("loss"), scores, Split({}), ("loss",), seed=0)


def evaluator(made, asked_for):
    """What scores nothing, and says so."""

    def scores(changes, *, logits=False):
        asked_for.append((len(changes), logits))
        return [Scores({"x": np.zeros(1)}) for _ in changes]

    return SimpleNamespace(task=made, scores=scores, data=Split({}), examples=1, total=None)


def test_metrics_that_cannot_be_are_refused_before_anything_is_scored():
    asked = []
    with pytest.raises(TaskError, match="1 examples; Pearson's correlation needs 2 or more"):
        scored(evaluator(task("pearson"), asked), PLACES, ("pearson",))
    with pytest.raises(OptionError, match="unknown metric of task made: 'f1'"):
        scored(evaluator(task("pearson"), asked), PLACES, ("f1",))
    assert not asked


def test_columns_known_after_a_scoring_are_refused_after_the_first():
    mine = ll.Task(model=lambda: None, data={}, score=lambda model, batch: {})
    asked = []
    with pytest.raises(OptionError, match="unknown metric of task own: 'f1'; there are: x"):
        scored(evaluator(mine, asked), PLACES, ("f1",))
    assert asked == [(1, False)]


def test_what_the_model_said_is_kept_only_where_a_metric_is_made_of_it():
    choice = MultipleChoice.__new__(MultipleChoice)
    assert not of_logits(choice, ())
    assert of_logits(choice, ("acc_norm",))
    asked = []
    scored(evaluator(choice, asked), PLACES, ("accuracy", "acc_norm"))
    assert asked == [(MODELS, True)]


def test_any_column_that_a_metric_needs_must_be_finite():
    digits = Digits("relabel")
    fine = {"loss": np.zeros(3), "correct": np.ones(3, bool), "margin": np.full(3, np.inf)}
    digits.require_finite(Scores(fine))  # no metric is made of margins
    with pytest.raises(DivergedError, match=r"the model's loss is not finite on 2 examples with t = 0\.5"):
        digits.require_finite(Scores({**fine, "loss": np.array([np.nan, 1.0, np.inf])}), " with t = 0.5")
    digits.metrics = ("rmse",)
    with pytest.raises(DivergedError, match="the model's prediction is not finite on 1 examples"):
        digits.require_finite(Scores({"prediction": np.array([np.nan, 1.0]), "target": np.zeros(2)}))
