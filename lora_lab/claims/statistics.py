"""Numbers that claims are about, read from results: a value for every adapter, pair, or set of adapters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_lab.claims.asking import Answer
from lora_lab.claims.verdicts import Unit, Value
from lora_lab.registry import Registry
from lora_lab.results.result import Result

if TYPE_CHECKING:
    from lora_lab.results.stats import Floats

Found = dict[Unit, Value]
"""Seeds of the adapters it is of → its value, with what is known of its examples."""


@dataclass(frozen=True)
class Statistic:
    """A number of one way of training, and the question that gives it."""

    about: str
    of: Callable[[Answer, Mapping[str, Any]], Found]
    verb: str | None
    """The question whose result it is read from; None: the logs of the trainings, joined as one result."""
    where: tuple[str, ...] = ()
    """Names that choose among the rows; all are needed."""
    several: bool = False
    """Whether it is of one adapter a task, merged, rather than of adapters of one task."""
    unit: str = "metric"
    """metric: the unit of the task's main metric; else its own."""
    of_control: Callable[[Answer, Mapping[str, Any]], Found] | None = None
    """Where it is of the adapters of both ways of training together, treated ones first: what it is compared with."""


def main_metric(result: Result) -> str:
    """The name of the metric that the result's task goes by; nothing of results that are by none, such as logs."""
    return next(iter(result.parameters.get("metrics", ())), "")


def _half(row: Mapping[str, Any], low: str, high: str) -> float:
    start, end = row.get(low), row.get(high)
    return 0.0 if start is None or end is None else float(end - start) / 2


def _value(row: Mapping[str, Any], name: str, examples: tuple[Floats, ...] = ()) -> Value:
    """What a cell holds; its ends are NAME_low and NAME_high, of a `value` alone low and high."""
    value, stem = row[name], "" if name == "value" else f"{name}_"
    return Value(math.nan if value is None else float(value), _half(row, f"{stem}low", f"{stem}high"), examples)


def _seeds(result: Result, row: Mapping[str, Any]) -> Unit:
    """Of a row's adapter, or of all that are mixed in it."""
    if "indices" not in row:
        return (row["seed"],)
    adapters = result.parameters["adapters"]
    return tuple(sorted(adapters[i]["seed"] for i in row["indices"]))


def _read(
    answer: Answer,
    rows: Iterable[Mapping[str, Any]],
    name: str,
    where: Mapping[str, Any],
    tables: Sequence[str] = (),
) -> Found:
    """A cell of the rows that `where` chooses, with what lies behind it in these tables; rows of a base are none.

    Nothing of rows without such a cell: an encoder, say, has no loss on texts beside its task.
    """
    return {
        _seeds(answer.result, row): _value(row, name, answer.behind(tables, i))
        for i, row in enumerate(rows)
        if name in row and all(row[key] == value for key, value in where.items()) and row.get("seed", 0) is not None
    }


def _scored(answer: Answer, where: Mapping[str, Any]) -> Found:
    """The main metric of every adapter, or mixture of adapters, in the rows that `where` chooses."""
    return _read(answer, answer.result.rows(), main_metric(answer.result), where, ["rows"])


def _barrier(answer: Answer, where: Mapping[str, Any]) -> Found:
    wanted = {**where, "metric": main_metric(answer.result)}
    return _read(answer, answer.result.summary["barriers"], "value", wanted, ["barriers"])


def _epsilon(answer: Answer, where: Mapping[str, Any]) -> Found:
    rows = [
        {"seed": of["seed"], "rescaled": of["rescaled"], **each}
        for of in answer.result.summary["adapters"]
        for each in of["epsilon"]
    ]
    return _read(answer, rows, "value", {**where, "metric": main_metric(answer.result)}, ["epsilon"])


def _inequality(answer: Answer, where: Mapping[str, Any]) -> Found:
    """The mean over the probabilities that were tried."""
    found: Found = {}
    for row in answer.result.summary["adapters"]:
        gaps = [_value(each, "gap") for each in row["inequality"]]
        if gaps and not row["rescaled"]:
            value, half = (sum(getattr(gap, name) for gap in gaps) / len(gaps) for name in ("value", "half"))
            found[(row["seed"],)] = Value(value, half)
    return found


def _of_adapters(name: str) -> Callable[[Answer, Mapping[str, Any]], Found]:
    return lambda answer, where: _read(answer, answer.result.summary["adapters"], name, where, [name])


def _of_pairs(name: str) -> Callable[[Answer, Mapping[str, Any]], Found]:
    return lambda answer, where: _read(answer, answer.result.rows(), name, {**where, "level": "total"})


def _twins(answer: Answer, where: Mapping[str, Any]) -> Found:
    """For two seeds s, t of the treated: the mean cosine of each with the control's adapter of its own seed."""
    seeds = [adapter["seed"] for adapter in answer.result.parameters["adapters"]]
    half = len(seeds) // 2
    alike = {
        seeds[i]: row["cosine"]
        for row in _totals(answer)
        for i, j in [row["indices"]]
        if i < half <= j and seeds[i] == seeds[j]
    }
    return {(s, t): Value((alike[s] + alike[t]) / 2) for s, t in itertools.combinations(sorted(alike), 2)}


def _strangers(answer: Answer, where: Mapping[str, Any]) -> Found:
    """For two seeds s, t of the treated: their cosine."""
    half = len(answer.result.parameters["adapters"]) // 2
    return {_seeds(answer.result, row): _value(row, "cosine") for row in _totals(answer) if max(row["indices"]) < half}


def _totals(answer: Answer) -> list[dict[str, Any]]:
    """The rows of pairs of adapters, over all modules."""
    return [row for row in answer.result.rows() if row["level"] == "total"]


def _merged(answer: Answer, where: Mapping[str, Any], name: str = "normalised", table: str = "sets") -> Found:
    tables = [f"{table} {i}" for i in range(len(answer.result.parameters["tasks"]))]
    return _read(answer, answer.result.summary["sets"], name, {**where, "chosen": True}, tables)


def _merged_score(answer: Answer, where: Mapping[str, Any]) -> Found:
    return _merged(answer, where, main_metric(answer.result), "scores")


def _of_rows(name: str) -> Callable[[Answer, Mapping[str, Any]], Found]:
    return lambda answer, where: _read(answer, answer.result.rows(), name, where)


STATISTICS = Registry(
    "statistic",
    "lora_lab.statistics",
    Statistic,
    {
        "task-score": Statistic("the task's main metric", _scored, "evaluate"),
        "on-line": Statistic(
            "the same at a place of the line between two seeds", _scored, "interpolate", ("space", "t")
        ),
        "of-mixture": Statistic("the same of a mixture of seeds", _scored, "interpolate", ("space", "ratio")),
        "line-barrier": Statistic(
            "how much worse it gets on the line between two seeds", _barrier, "interpolate", ("space", "barrier")
        ),
        "with-layers": Statistic(
            "the main metric with some layers on, mean over keep-sets",
            _scored,
            "stability",
            ("family", "label", "rescaled"),
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
        "after-pruning": Statistic("the main metric after pruning", _scored, "sweep", ("kind", "criterion", "label")),
        "shapley-variation": Statistic(
            "standard deviation of the Shapley values / |their mean|", _of_adapters("variation"), "shapley", unit=""
        ),
        "shapley-top-third": Statistic(
            "share of the largest third of the Shapley values", _of_adapters("top_third"), "shapley", unit="share"
        ),
        "seeds-cosine": Statistic("cosine of ΔW of two seeds", _of_pairs("cosine"), "compare", unit=""),
        "seeds-distance": Statistic("‖ΔW₁ − ΔW₂‖ of two seeds", _of_pairs("distance"), "compare", unit=""),
        "seeds-overlap": Statistic(
            "overlap of the column spaces of ΔW of two seeds, 1 of the same ones",
            _of_pairs("left_overlap"),
            "compare",
            unit="share",
        ),
        "twins-cosine": Statistic(
            "cosine of ΔW with that of the other way's adapter of the same seed, against that of two seeds of one way",
            _twins,
            "compare",
            unit="",
            of_control=_strangers,
        ),
        "after-merging": Statistic(
            "share of the adapters' own metric that a merge keeps, mean over tasks",
            _merged,
            "compare-merges",
            ("merge",),
            several=True,
            unit="share",
        ),
        "merged-score": Statistic(
            "the main metric of a merge, mean over tasks", _merged_score, "compare-merges", ("merge",), several=True
        ),
        "largest-eigenvalue": Statistic(
            "largest eigenvalue of the Hessian", _of_rows("sharpness"), "sharpness", ("at",), unit=""
        ),
        "largest-rate": Statistic(
            "learning rate up to which Adam is stable by the largest eigenvalue",
            _of_rows("rate_adam"),
            "sharpness",
            ("at",),
            unit="learning rate",
        ),
        "forgetting": Statistic(
            "how much worse the loss of texts beside the task gets", _of_rows("forgetting"), "evaluate", unit="nats"
        ),
        "drift": Statistic(
            "KL(base ‖ with the adapter) on texts beside the task", _of_rows("kl"), "evaluate", unit="nats"
        ),
        "training-time": Statistic("CPU seconds of the training", _of_rows("cpu_s"), None, unit="s"),
    },
)
"""What a claim can be about, by name."""
