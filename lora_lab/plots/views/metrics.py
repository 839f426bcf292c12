"""Which metric of results a figure shows, and what its axes call it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lora_lab.errors import OptionError, unknown
from lora_lab.results.result import Result

_UNSAID = ("", "share")
"""Units that no axis names: a share goes from 0 to 1."""


def names(results: Sequence[Result]) -> list[str]:
    """The metrics that all of these results have, in the order of the first: the main one first."""
    first, *others = (result.parameters["metrics"] for result in results)
    shared = [name for name in first if all(name in metrics for metrics in others)]
    if not shared:
        told = " and ".join(", ".join(result.parameters["metrics"]) for result in results)
        raise OptionError(f"these results cannot share a figure: no metric is in all of them: {told}")
    return shared


def main(results: Sequence[Result]) -> str:
    """The metric that figures of these results show."""
    return names(results)[0]


def label(results: Sequence[Result], name: str, of: str = "") -> str:
    """A metric as an axis calls it: its name, with what of it is shown behind it, and its unit."""
    unit = results[0].parameters["metrics"][name]["unit"]
    return in_words(name) + of + (f" ({unit})" if unit not in _UNSAID else "")


def in_words(name: str) -> str:
    """The name of a metric as text."""
    return name.replace("_", " ")


def higher(results: Sequence[Result], name: str) -> bool:
    """Whether more of a metric is better."""
    return bool(results[0].parameters["metrics"][name]["higher"])


def showing(result: Result, metric: str) -> Result:
    """The result with another one of its metrics as the main one; OptionError where it has not got it."""
    there = result.parameters.get("metrics")
    if not there:
        raise OptionError(f"results of kind {result.kind!r} name no metrics to choose from")
    if metric not in there:
        raise unknown(f"metric of {result.kind} results:", metric, list(there))
    first = {metric: there[metric]}
    return replace(result, parameters={**result.parameters, "metrics": {**first, **there}})
