"""Calibration: whether what a classifier is sure of is right as often as it is sure.

With p the chances that it gives to the labels of an example, its confidence is max p; of a calibrated model, a share c
of the examples of confidence c is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Column = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

BINS = 15
"""Of equal mass: as many examples in each, but equal confidences are in one."""
DRAWS = 2000


def chances(logits: Tensor, labels: Tensor) -> dict[str, Column]:
    """`confidence`, max p, and `brier`, Σ(p − y)² over the labels, of logits [examples, labels]; each [examples]."""
    p = logits.double().softmax(-1)
    error = (p - nn.functional.one_hot(labels, p.shape[-1])).square().sum(-1)
    # of float32 precision, as journals keep them
    return {"confidence": _numbers(p.amax(-1)), "brier": _numbers(error)}


def gaps(confidence: Column, correct: Column) -> Sequence[Floats]:
    """correct − confidence in each bin, 0 outside of it: the sufficient columns of the calibration error."""
    places, gap = _bins(confidence), correct - confidence.astype(np.float64)
    return [np.where(places == k, gap, 0.0) for k in range(BINS)]


def calibration_error(*means: Floats) -> Floats:
    """ECE = Σ_b |B_b|/n · |accuracy_b − confidence_b|, which is Σ_b |mean of bin b's gaps over all n examples|."""
    error: Floats = np.abs(np.stack(means)).sum(0)
    return error


def errors_if_calibrated(confidence: Column, _: Column, *, seed: int) -> Floats:
    """The calibration errors of DRAWS models that are calibrated and as confident: right with chance `confidence`.

    They are above 0, since bins of few examples are never right exactly as often as they should be; an error among them
    is no sign of miscalibration.
    """
    generator, n = np.random.default_rng(seed), len(confidence)
    inside = np.eye(BINS)[_bins(confidence)]  # [n, bins]
    found = np.empty(DRAWS)
    step = max(1, 2**22 // n)
    for start in range(0, DRAWS, step):
        drawn = generator.random((min(step, DRAWS - start), n)) < confidence
        found[start : start + step] = np.abs((drawn - confidence) @ inside / n).sum(1)
    return found


def _bins(confidence: Column) -> npt.NDArray[np.int64]:
    """The bin of every example, [..., examples], between quantiles of the model's own confidences."""
    edges = np.quantile(confidence, np.arange(1, BINS) / BINS, axis=-1)
    places: npt.NDArray[np.int64] = (edges[..., None] < confidence).sum(0)
    return places


def _numbers(values: Tensor) -> Column:
    numbers: Column = values.to(torch.float32).double().cpu().numpy()
    return numbers
