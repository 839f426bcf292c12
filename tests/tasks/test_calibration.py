"""Calibration: references of scikit-learn, and the null by simulated models that are calibrated."""

import json

import numpy as np
import pytest
import torch
from making_adapters import random_adapter
from peft import LoraConfig

import lora_lab as ll
from lora_lab.errors import TaskError
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.tasks.scores import calibration
from lora_lab.tasks.scores.metrics import METRICS
from lora_lab.tasks.task import Scores

sklearn = pytest.importorskip("sklearn")

ECE = METRICS["ece"]


def drawn(n, labels=3, *, seed=0, sharper=1.0):
    """Scores of a model that is calibrated where `sharper` is 1: labels are drawn from its chances."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, labels, generator=generator) * 2
    chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return logits * sharper, chosen, Scores.of(logits * sharper, chosen).columns


def test_brier_scores_are_scikit_learns():
    for labels in (2, 5):
        logits, chosen, columns = drawn(60, labels)
        p = logits.double().softmax(-1).numpy()
        expected = ((p - np.eye(labels)[chosen.numpy()]) ** 2).sum(1).mean()
        assert METRICS["brier"].value(columns) == pytest.approx(expected, rel=1e-6)
        if labels == 2:  # scikit-learn takes one of the two labels, so half of the sum
            once = sklearn.metrics.brier_score_loss(chosen.numpy(), p[:, 1])
            assert METRICS["brier"].value(columns) == pytest.approx(2 * once, rel=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_calibration_errors_are_those_of_scikit_learns_curve(ties):
    from sklearn.calibration import calibration_curve

    _, _, columns = drawn(200, sharper=2.0)
    confidence = np.round(columns["confidence"], 1) if ties else columns["confidence"]
    right, said = calibration_curve(columns["correct"], confidence, n_bins=calibration.BINS, strategy="quantile")
    inner = np.quantile(confidence, np.arange(1, calibration.BINS) / calibration.BINS)
    sizes = np.bincount(np.searchsorted(inner, confidence), minlength=calibration.BINS)
    expected = (sizes[sizes > 0] / 200 * np.abs(right - said)).sum()
    assert ECE.value({**columns, "confidence": confidence}) == pytest.approx(expected, rel=1e-9)


def test_bins_are_of_equal_mass_in_every_model():
    confidence = np.random.default_rng(0).random((3, 150)) ** np.array([[1], [2], [9]])
    gaps = calibration.gaps(confidence, np.ones((3, 150), bool))
    assert [(gap != 0).sum(1).tolist() for gap in gaps] == [[10, 10, 10]] * calibration.BINS


def test_the_null_holds_errors_of_calibrated_models_and_of_no_other():
    """Of 200 draws of 100 examples, 95 % are in the range; the mean is the null's; overconfidence is out."""
    inside, errors, means = 0, [], []
    for seed in range(200):
        _, _, columns = drawn(100, seed=seed)
        error, (mean, low, high) = ECE.value(columns), ECE.without(columns, seed=0)
        inside += low <= error <= high
        errors.append(error)
        means.append(mean)
    assert 180 <= inside <= 198
    assert np.mean(errors) > 0.08  # read alone, this would look like miscalibration
    assert np.mean(means) == pytest.approx(np.mean(errors), abs=0.004)
    _, _, columns = drawn(400, sharper=3.0)
    assert ECE.value(columns) > ECE.without(columns, seed=0)[2]


def test_a_calibration_error_needs_an_example_a_bin():
    _, _, columns = drawn(14)
    with pytest.raises(TaskError, match=r"14 examples; calibration error: .* needs 15 or more"):
        ECE.estimate(columns, seed=0)


def test_evaluate_tells_calibration_on_request(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    adapter = random_adapter(Digits("relabel"), tmp_path, config, scale=0.3)
    plain = ll.evaluate([adapter], "digits/relabel", examples=40, progress=False)
    assert list(plain.parameters["metrics"]) == ["accuracy", "loss"]
    result = ll.evaluate([adapter], "digits/relabel", examples=40, metric=("ece", "brier"), progress=False)
    assert list(result.parameters["metrics"]) == ["brier", "ece", "ece_null"]
    for row in result.rows():
        assert 0 < row["ece_null_low"] < row["ece_null"] < row["ece_null_high"] < 1
        assert row["ece_low"] <= row["ece"] <= row["ece_high"]
    json.dumps(result.parameters)
