"""Whether numbers of pairs of adapters tell what merges of them lose: rank correlations with what was measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import labels_of
from lora_lab.brief import Brief
from lora_lab.errors import MismatchError, OptionError
from lora_lab.results.result import Result
from lora_lab.results.rows import metrics_of
from lora_lab.results.stats import student

Floats = npt.NDArray[np.float64]
Row = Mapping[str, Any]
Pair = tuple[int, int]

FEWEST = 5
"""Sets of adapters below which a rank correlation tells nothing: of 4, one order in 12 is perfect by chance."""

_REFERENCE = "reference"
"""Category of rows that no merge made."""
_SAME_NORM = 1e-3
"""How far ‖ΔW‖ may be from what a result says of the adapter, as a share; the rest is rounding."""


def _either_way(key: str) -> Callable[[Row], float | None]:
    """A ratio whose order says nothing, as the larger / the smaller."""
    return lambda row: max(row[key], 1 / row[key]) if row[key] else None


def _excess(row: Row) -> float | None:
    """Entries that agree in sign beyond what normal ones with these cosines would."""
    return None if row["sign_agreement"] is None else float(row["sign_agreement"] - row["sign_expected"])


PREDICTORS: dict[str, Callable[[Row], float | None]] = {
    **{
        key: itemgetter(key)
        for key in (
            "cosine",
            "left_overlap",
            "right_overlap",
            "left_grassmann",
            "right_grassmann",
            "pico_share",
            "A_cosine",
        )
    },
    "norm_ratio": _either_way("norm_ratio"),
    "sigma_ratio": _either_way("sigma_ratio"),
    "sign_excess": _excess,
}
"""Name → a number of a pair, in total; None where it has none."""


@dataclass(frozen=True, repr=False)
class _Merge(Brief):
    """One merge of one set of adapters, and what it lost."""

    members: tuple[int, ...]
    lost: Mapping[str, float]
    """By metric, the main one first: of shares the share of the adapters' own that is gone, else how much worse."""

    def mean(self, number: Callable[[Row], float | None], pairs: Mapping[Pair, Row]) -> float | None:
        """Of the pairs of its adapters; None where one has no such number."""
        values = [number(pairs[pair]) for pair in itertools.combinations(self.members, 2)]
        known = [value for value in values if value is not None and math.isfinite(value)]
        return sum(known) / len(known) if len(known) == len(values) else None


def forecast(adapters: Sequence[Adapter], pairs: Mapping[Pair, Row], results: Sequence[Result]) -> list[dict[str, Any]]:
    """For every merge, outcome and predictor: their rank correlation over the sets of adapters, with its interval.

    `pairs` are the rows of all pairs in total. Of sets of more than two adapters, a predictor is its mean over their
    pairs. Raises what `collected` does.
    """
    merges = collected(adapters, results)
    rows = []
    for name, of_sets in merges.items():
        outcomes = dict.fromkeys(outcome for merge in of_sets.values() for outcome in merge.lost)
        for outcome, (predictor, number) in itertools.product(outcomes, PREDICTORS.items()):
            known = [
                (merge.members, value, merge.lost[outcome])
                for merge in of_sets.values()
                if (value := merge.mean(number, pairs)) is not None and math.isfinite(merge.lost[outcome])
            ]
            if len(known) >= FEWEST:
                rows.append({"merge": name, "outcome": outcome, "predictor": predictor, **_correlated(known)})
    return rows


def collected(adapters: Sequence[Adapter], results: Sequence[Result]) -> dict[str, dict[tuple[int, ...], _Merge]]:
    """Merge → set of adapters → what it lost; sets with other adapters, or of unequal weights, are left out.

    OptionError for results of another kind or by another metric than the others, or where no merge has been made of
    five sets; MismatchError where one is about other adapters of the same names.
    """
    from lora_lab.analysis.merge_tables.question import CompareMerges
    from lora_lab.analysis.merge_tables.table import ALONE

    merges: dict[str, dict[tuple[int, ...], _Merge]] = {}
    for result in results:
        if result.kind != CompareMerges.kind:
            raise OptionError(f"a result of {result.kind} was given; those of {CompareMerges.kind} tell of merges")
        mains = [next(iter(metrics_of(each.parameters))) for each in (results[0], result)]
        if mains[0] != mains[1]:
            raise OptionError(f"results of merges by {mains[0]} and by {mains[1]}; a forecast is of one metric")
        for name, merge in _merges(result, adapters):
            merges.setdefault(name, {})[merge.members] = merge
    most = max(map(len, merges.values()), default=0)
    if results and not any(result.rows(merge=ALONE) for result in results):
        raise OptionError(
            "the results of merges tell no adapter's own score, by which a loss is told: ratio 0:1 has it"
        )
    if results and most < FEWEST:
        raise OptionError(
            f"{most} set{'s' * (most != 1)} of these adapters (by their labels) in the results of merges; a rank "
            f"correlation needs {FEWEST} or more: seeds of one task, in pairs, or several results"
        )
    return merges


def _merges(result: Result, adapters: Sequence[Adapter]) -> Iterator[tuple[str, _Merge]]:
    """Name and outcome of every merge at its chosen coefficient, of sets of several of these adapters."""
    from lora_lab.analysis.merge_tables.sets import seeds_in
    from lora_lab.analysis.merge_tables.table import ALONE

    place = {label: i for i, label in enumerate(labels_of(adapters))}
    _require_same(result, adapters)
    rows = [row for row in result.rows() if row["chosen"]]
    own = {row["adapter"]: row for row in rows if row["merge"] == ALONE}
    there = [each.get("name") or each["label"] for each in result.parameters["adapters"]]
    sets: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["category"] != _REFERENCE and len(set((row["ratio"] or "").split(":"))) == 1:
            sets.setdefault((row["set"], row["merge"]), []).append(row)
    for (label, name), parts in sets.items():
        # of seeds of one task, one model is scored once, and belongs to all of them
        owners = [[there[i] for i in seeds_in(label)] if row["ratio"] else [row["adapter"]] for row in parts]
        members = {owner for each in owners for owner in each}
        if len(members) > 1 and place.keys() >= members and own.keys() >= members:
            parted = [(row, [own[owner] for owner in each]) for row, each in zip(parts, owners, strict=True)]
            lost = {
                metric: float(np.mean([_lost(*part, metric, said) for part in parted]))
                for metric, said in _outcomes(result).items()
            }
            yield name, _Merge(tuple(sorted(place[member] for member in members)), lost)


def _outcomes(result: Result) -> dict[str, Row]:
    """The main metric of a result and the loss: what each is."""
    (main, said), *_ = metrics_of(result.parameters).items()
    return {main: said, "loss": {"unit": "nats", "higher": False}}


def _lost(row: Row, own: Sequence[Row], metric: str, said: Row) -> float:
    """What a merge loses beside the adapters alone, of which the mean is taken where several are of this task.

    Of shares of which more is better, 1 − share / theirs; of other metrics how much worse it is. NaN without a value.
    """
    there = [row[metric], *(each[metric] for each in own)]
    if any(value is None for value in there):
        return math.nan
    value, alone = row[metric], float(np.mean(there[1:]))
    if said["higher"] and said["unit"] == "share":
        return 1 - value / alone if alone else math.nan
    return float(alone - value if said["higher"] else value - alone)


def _require_same(result: Result, adapters: Sequence[Adapter]) -> None:
    """MismatchError where the result says another ‖ΔW‖ of an adapter of this name, and of no other one of it."""
    said: dict[str, list[float]] = {}
    for each in result.parameters.get("adapters", ()):
        if each.get("norm") is not None:
            said.setdefault(each["label"], []).append(each["norm"])
    for adapter in adapters:
        norms = said.get(adapter.label, [])
        if norms and not any(math.isclose(norm, adapter.total_norm, rel_tol=_SAME_NORM) for norm in norms):
            raise MismatchError(
                f"{adapter.source}: ‖ΔW‖ is {adapter.total_norm:.4g}, and {norms[0]:.4g} of the {adapter.label} whose "
                "merges were compared; the same adapters are needed"
            )


def _correlated(known: Sequence[tuple[tuple[int, ...], float, float]]) -> dict[str, Any]:
    """The columns of one correlation over (members, predictor, outcome)."""
    members = [each for each, *_ in known]
    x, y = (np.array(values) for values in zip(*(each[1:] for each in known), strict=True))
    value, low, high = rank_correlation(x, y, members)
    return {
        "sets": len(known),
        "adapters": len(set().union(*members)),
        "correlation": value,
        "correlation_low": low,
        "correlation_high": high,
        "points": np.stack([x, y], 1).tolist(),
    }


def rank_correlation(
    x: Floats, y: Floats, members: Sequence[Sequence[int]]
) -> tuple[float | None, float | None, float | None]:
    """Spearman's ρ and its 95 % interval; None where one of the two is constant.

    Sets that share adapters are not independent. The standard error of artanh ρ is the larger of that for independent
    ones, √((1 + ρ²/2) / (n − 3)) (Bonett & Wright 2000), and of the jackknife over the m adapters, each left out with
    all its sets of k (Snijders & Borgatti 1999, whose factor for pairs is the one below at k = 2); the interval goes by
    Student's t with m − 1 degrees of freedom.
    """
    z = _artanh(x, y)
    if z is None:
        return None, None, None
    n, adapters = len(x), sorted(set(itertools.chain(*members)))
    rho, m, k = _spearman(x, y), len(adapters), sum(map(len, members)) / n
    error = math.sqrt((1 + rho**2 / 2) / (n - 3))
    without = [np.array([adapter not in each for each in members]) for adapter in adapters]
    left = [part for stays in without if stays.sum() > 2 and (part := _artanh(x[stays], y[stays])) is not None]
    if len(left) > 2:
        spread = float(np.square(np.array(left) - np.mean(left)).sum()) * m / len(left)
        error = max(error, math.sqrt(max(0.0, (m - k) / (k * m)) * spread))
    half = student(m) * error
    return rho, min(rho, math.tanh(z - half)), max(rho, math.tanh(z + half))


def _spearman(x: Floats, y: Floats) -> float:
    from scipy.stats import rankdata

    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def _artanh(x: Floats, y: Floats) -> float | None:
    """Of ρ, which is kept as far below 1 as half a step: two neighbours in other order are 12 / (n³ − n) away."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    most = 1 - 6 / (len(x) ** 3 - len(x))
    return math.atanh(max(-most, min(most, _spearman(x, y))))
