"""Columns that the rows of several kinds of results share.

Shares are fractions from 0 to 1, losses are nats, an error is 1 − accuracy. An interval is of 95 %: `x_low` to `x_high`
for `x`; a spread is one sample standard deviation, 0 of a single value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_lab.errors import OptionError
from lora_lab.results.schema import column

MEASURED = "each metric with its interval (accuracy, accuracy_low, accuracy_high …)"
"""The columns that rows of scored models have besides."""
METRICS = {"metrics": "metric → about, unit, and higher: whether more is better; the main one first"}
METRIC = "name of the metric"

_SEED = "seed that the adapter records"
_METHOD = "training method; of an adapter that records none, null or its label"

ADAPTERS = {"adapters": "label, method, seed and ‖ΔW‖ of each adapter"}
PLAYERS = {"players": "how modules are grouped into players, or name → regular expression"}
"""What results say of the adapters and players that they are about."""


@dataclass
class Adapted:
    """Whose row it is."""

    adapter: str = column("label of the adapter")
    method: str | None = column(_METHOD)
    seed: int | str | None = column(_SEED)


@dataclass
class Accuracy:
    """An accuracy with its interval."""

    accuracy: float = column("share of examples (of language models, of tokens) that are right", "share")
    accuracy_low: float = column("low end of its interval", "share")
    accuracy_high: float = column("high end of its interval", "share")


@dataclass
class Loss:
    """A loss with its interval."""

    loss: float = column("mean loss over the examples", "nats")
    loss_low: float = column("low end of its interval", "nats")
    loss_high: float = column("high end of its interval", "nats")


def metrics_of(parameters: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The metrics that a result is by, the main one first; OptionError of one that names none."""
    metrics: Mapping[str, Mapping[str, Any]] = parameters.get("metrics") or {}
    if not metrics:
        raise OptionError("a result of an early version, whose parameters name no metrics: it has to be made again")
    return metrics
