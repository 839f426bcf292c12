"""What can be told of merges: their differences from the first one, and whether nulls keep as much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_lab.brief import Brief
from lora_lab.results.stats import (
    ENOUGH,
    Floats,
    half_of_strata,
    holm,
    interval,
    mean_and_spread,
    p_of_draws,
    p_of_strata,
    paired_differences,
)

ALPHA = 0.05
UNTOLD = "cannot be told"

Row = dict[str, Any]
Group = tuple[str | None, str | None]
"""Training method, ratio."""


@dataclass(repr=False)
class Outcomes(Brief):
    """How the merges of the sets of one training method and ratio did on every example, each at its best."""

    members: list[tuple[int, ...]] = field(default_factory=list)
    """Of each set."""
    merges: dict[str, dict[int, list[Floats]]] = field(default_factory=dict)
    """Merge → place of a set → outcomes of the examples of each task."""

    def add(self, merge: str, outcomes: Sequence[Floats]) -> None:
        """What a merge of the last set came to."""
        self.merges.setdefault(merge, {})[len(self.members) - 1] = list(outcomes)

    def compared(self, reference: str) -> dict[str, Row]:
        """Merge → its difference from the reference over the sets that have both, with interval and p-values."""
        first, found = self.merges.get(reference, {}), dict[str, Row]()
        by_sets: dict[tuple[int, ...], list[str]] = {}
        for merge, sets in self.merges.items():
            if merge != reference and (both := tuple(sorted(first.keys() & sets.keys()))):
                by_sets.setdefault(both, []).append(merge)
        for both, names in by_sets.items():
            others = [[self.merges[name][i] for i in both] for name in names]
            members = [self.members[i] for i in both]
            independent = len({member for each in members for member in each}) / len(members[0])
            differences = paired_differences([first[i] for i in both], others, independent=independent)
            for name, (value, strata) in zip(names, differences, strict=True):
                half = half_of_strata(strata)
                found[name] = {
                    "difference": value,
                    "difference_low": value - half,
                    "difference_high": value + half,
                    "p": p_of_strata(value, strata),
                }
        for row, corrected in zip(found.values(), holm([row["p"] for row in found.values()]), strict=True):
            told = ("ahead" if row["difference"] > 0 else "behind") if corrected < ALPHA else UNTOLD
            row |= {"p_holm": corrected, "verdict": told}
        return found


NO_DIFFERENCE: Mapping[str, Any] = dict.fromkeys(
    ("difference", "difference_low", "difference_high", "p", "p_holm", "verdict")
)


@dataclass(frozen=True)
class NullScores:
    """What a merge of a set keeps, of the adapters and of the draws of a null."""

    group: Group
    merge: str
    null: str
    replaced: str
    of_adapters: float
    draws: tuple[float, ...]


def null_rows(scores: Sequence[NullScores], random: Mapping[str, bool]) -> list[Row]:
    """A row for each merge and null over the sets: the k-th draws of all sets are one draw of their mean.

    `random`: null → whether it is drawn.
    """
    groups: dict[tuple[Group, str, str], dict[str, list[NullScores]]] = {}
    for each in scores:
        groups.setdefault((each.group, each.null, each.replaced), {}).setdefault(each.merge, []).append(each)
    rows = []
    for ((method, ratio), null, replaced), merges in groups.items():
        family = []
        for merge, sets in merges.items():
            draws = np.mean([each.draws for each in sets], axis=0)
            value = float(np.mean([each.of_adapters for each in sets]))
            low, high = interval(draws)
            p, p_below = (p_of_draws(s * value, s * draws) if random[null] else None for s in (1.0, -1.0))
            row: Row = {"method": method, "ratio": ratio, "merge": merge, "null": null, "replaced": replaced}
            row |= {"sets": len(sets), "draws": len(draws), "normalised": mean_and_spread(draws)[0]}
            row |= {"normalised_low": low, "normalised_high": high, "of_adapters": value, "p": p, "p_holm": None}
            row["p_below"] = p_below
            told = (
                "above the null" if p and p <= ALPHA else "below the null" if p_below and p_below <= ALPHA else UNTOLD
            )
            why = None if p is not None else _why(null, len(draws), random)
            family.append(row | {"verdict": None if why else told, "why": why})
        known = [row for row in family if row["p"] is not None]
        for row, corrected in zip(known, holm([row["p"] for row in known]), strict=True):
            row["p_holm"] = corrected
        rows += family
    return rows


def _why(null: str, draws: int, random: Mapping[str, bool]) -> str:
    if not random[null]:
        return f"{null} is one adapter, and none of many"
    if draws < ENOUGH:
        return f"{draws} draws cannot give a p-value below {1 / (1 + draws):.2g}; at least {ENOUGH} are needed"
    return "scores that are no numbers"
