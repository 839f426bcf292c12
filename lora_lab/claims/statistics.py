"""Numbers that claims are about, read from results: a value for every adapter, pair, or set of adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_lab.claims.verdicts import Unit
from lora_lab.registry import Registry
from lora_lab.results.result import Result

Found = dict[Unit, tuple[float, float]]
"""Seeds of the adapters it is of → a value, and half of its interval over the examples."""


@dataclass(frozen=True)
class Statistic:
    """A number of one way of training, and the question that gives it."""

    about: str
    of: Callable[[Result, Mapping[str, Any]], Found]
    verb: str | None
    """The question whose result it is read from; None: the logs of the trainings, joined as one result."""
    where: tuple[str, ...] = ()
    """Names that choose among the rows; all are needed."""
    several: bool = False
    """Whether it is of one adapter a task, merged, rather than of adapters of one task."""
    unit: str = "metric"
    """metric: the unit of the task's main metric; else its own."""


def main_metric(result: Result) -> str:
    """The name of the metric that the result's task goes by; nothing of results that are by none, such as logs."""
    return next(iter(result.parameters.get("metrics", ())), "")


def _half(row: Mapping[str, Any], name: str) -> float:
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return 0.0 if low is None or high is None else (high - low) / 2


def _value(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _by_seed(rows: Iterable[Mapping[str, Any]], name: str) -> Found:
    """The value of each row's adapter; rows of a base alone are none."""
    return {(row["seed"],): (_value(row[name]), _half(row, name)) for row in rows if row.get("seed") is not None}


def _seeds(result: Result, indices: Iterable[int]) -> Unit:
    adapters = result.parameters["adapters"]
    return tuple(sorted(adapters[i]["seed"] for i in indices))


def _scored(result: Result, where: Mapping[str, Any]) -> Found:
    """The main metric of every adapter in the rows that `where` chooses."""
    return _by_seed(result.rows(**where), main_metric(result))


def _mixed(result: Result, where: Mapping[str, Any]) -> Found:
    """The main metric of every mixture of seeds in the rows that `where` chooses."""
    metric = main_metric(result)
    return {_seeds(result, row["indices"]): (_value(row[metric]), _half(row, metric)) for row in result.rows(**where)}


def _barrier(result: Result, where: Mapping[str, Any]) -> Found:
    wanted = {"space": where["space"], "barrier": where["barrier"], "metric": main_metric(result)}
    rows = [r for r in result.summary["barriers"] if all(r[name] == value for name, value in wanted.items())]
    return {
        _seeds(result, r["indices"]): (_value(r["value"]), (_value(r["high"]) - _value(r["low"])) / 2) for r in rows
    }


def _epsilon(result: Result, where: Mapping[str, Any]) -> Found:
    metric = main_metric(result)
    found: Found = {}
    for row in result.summary["adapters"]:
        for each in row["epsilon"] if row["rescaled"] == where["rescaled"] else ():
            if each["family"] == where["family"] and each["metric"] == metric:
                found[(row["seed"],)] = (_value(each["value"]), (_value(each["high"]) - _value(each["low"])) / 2)
    return found


def _inequality(result: Result, where: Mapping[str, Any]) -> Found:
    """The mean over the probabilities that were tried."""
    found: Found = {}
    for row in result.summary["adapters"]:
        gaps = [(_value(each["gap"]), _half(each, "gap")) for each in row["inequality"]]
        if gaps and not row["rescaled"]:
            value, half = (sum(part) / len(gaps) for part in zip(*gaps, strict=True))
            found[(row["seed"],)] = value, half
    return found


def _of_adapters(name: str) -> Callable[[Result, Mapping[str, Any]], Found]:
    return lambda result, where: _by_seed(result.summary["adapters"], name)


def _of_pairs(name: str) -> Callable[[Result, Mapping[str, Any]], Found]:
    def of(result: Result, where: Mapping[str, Any]) -> Found:
        rows = result.rows(level="total")
        return {_seeds(result, row["indices"]): (_value(row[name]), 0.0) for row in rows}

    return of


def _merged(result: Result, where: Mapping[str, Any]) -> Found:
    rows = [row for row in result.summary["sets"] if row["merge"] == where["merge"]]
    return {(row["seed"],): (_value(row["normalised"]), _half(row, "normalised")) for row in rows}


def _sharpness(result: Result, where: Mapping[str, Any]) -> Found:
    return _by_seed(result.rows(at=where["at"]), "sharpness")


STATISTICS = Registry(
    "statistic",
    "lora_lab.statistics",
    Statistic,
    {
        "task-score": Statistic("the task's main metric", _scored, "evaluate"),
        "on-line": Statistic(
            "the same at a place of the line between two seeds", _mixed, "interpolate", ("space", "t")
        ),
        "of-mixture": Statistic("the same of a mixture of seeds", _mixed, "interpolate", ("space", "ratio")),
        "line-barrier": Statistic(
            "how much worse it gets on the line between two seeds", _barrier, "interpolate", ("space", "barrier")
        ),
        "with-layers": Statistic(
            "the same with some layers on, mean over keep-sets", _scored, "stability", ("family", "label", "rescaled")
        ),
        "worst-keep-set": Statistic(
            "how much worse the worst keep-set is than the whole", _epsilon, "stability", ("family", "rescaled")
        ),
        "progressive-gap": Statistic(
            "left less right side of the progressive inequality, mean over p",
            _inequality,
            "stability",
            unit="nats",
        ),
        "after-pruning": Statistic("the same after pruning", _scored, "sweep", ("kind", "criterion", "label")),
        "shapley-variation": Statistic(
            "standard deviation of the Shapley values / |their mean|", _of_adapters("variation"), "shapley", unit=""
        ),
        "shapley-top-third": Statistic(
            "share of the largest third of the Shapley values", _of_adapters("top_third"), "shapley", unit="share"
        ),
        "seeds-cosine": Statistic("cosine of ΔW of two seeds", _of_pairs("cosine"), "compare", unit=""),
        "seeds-distance": Statistic("‖ΔW₁ − ΔW₂‖ of two seeds", _of_pairs("distance"), "compare", unit=""),
        "after-merging": Statistic(
            "share of the adapters' own metric that a merge keeps, mean over tasks",
            _merged,
            "compare-merges",
            ("merge",),
            several=True,
            unit="share",
        ),
        "largest-eigenvalue": Statistic("largest eigenvalue of the Hessian", _sharpness, "sharpness", ("at",), unit=""),
        "training-time": Statistic(
            "CPU seconds of the training", lambda result, _: _by_seed(result.rows(), "cpu_s"), None, unit="s"
        ),
    },
)
"""What a claim can be about, by name."""
