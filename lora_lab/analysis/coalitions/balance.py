"""How evenly contributions are spread over the players."""

from __future__ import annotations

import math

import numpy as np

from lora_lab.results.stats import Floats, mean_and_spread


def balance(values: Floats) -> dict[str, float]:
    """How evenly contributions are spread: coefficient of variation, and the share of the largest third.

    The coefficient is the sample standard deviation over the players (n − 1), over |mean|. The share is of the sum of
    magnitudes, so that negative contributions count as contributions.
    """
    total = float(np.abs(values).sum())
    mean = float(values.mean())
    third = max(1, round(len(values) / 3))
    return {
        "variation": mean_and_spread(values)[1] / abs(mean) if mean else math.nan,
        "top_third": float(np.sort(np.abs(values))[::-1][:third].sum()) / total if total else math.nan,
    }


def behind(values: Floats, of_examples: Floats | None) -> dict[str, Floats]:
    """Name → numbers of the examples that vary as each of `balance` does: Σ_i ∂/∂v_i · (v_i(x) − v_i).

    Nothing where the values by example are not known.
    """
    if of_examples is None:
        return {}
    step = 1e-6 * float(np.abs(values).max())
    moved = of_examples - of_examples.mean(1, keepdims=True)
    found: dict[str, Floats] = {}
    for name in balance(values):
        up, down = ([balance(values + end * row)[name] for row in np.eye(len(values))] for end in (step, -step))
        slopes = (np.array(up) - np.array(down)) / (2 * step) if step else np.full(len(values), np.nan)
        found[name] = slopes @ moved
    return found
