"""Which adapters are merged together, and by which merges: what a comparison of merges consists of."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import labels_of
from lora_lab.adapters.renames import require_shared_modules
from lora_lab.analysis.questions import in_words
from lora_lab.errors import MismatchError, OptionError, shorten, unknown
from lora_lab.merging.budgets import EXACT, Rank
from lora_lab.merging.methods import MERGES, check
from lora_lab.results.result import fingerprint
from lora_lab.tasks.task import Task


@dataclass(frozen=True)
class MergeSet:
    """Adapters that are merged together, by their places in the list of all."""

    label: str
    method: str | None
    """Their training method, where it is one."""
    seed: int | None
    members: tuple[int, ...]
    weights: tuple[float, ...]
    ratio: str | None = None
    """For seeds of one task: their weights in words."""


@dataclass(frozen=True)
class MergeSpec:
    """A merge to be compared: its name in the table, the method, its options, and the rank at which it comes back."""

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: Rank = EXACT
    also: tuple[float, ...] = ()
    """Coefficients that are tried beside those of the grid."""

    def coefficients(self, grid: Sequence[float]) -> tuple[float, ...]:
        """All that are tried, in order of first mention."""
        return tuple(dict.fromkeys((*grid, *self.also)))


def specs_of(
    methods: Sequence[str], options: Mapping[str, Mapping[str, Any]], ranks: Sequence[Rank] = (EXACT,)
) -> list[MergeSpec]:
    """The merges that names stand for, their options checked; those at other ranks than the first say so."""
    names = list(dict.fromkeys(name for given in methods for name in (MERGES if given == "all" else [given])))
    for name in options:
        if name not in names:
            raise OptionError(
                f"options are given for {name}, which is not among the methods compared: {shorten(names)}"
            )
    specs = []
    for name in names:
        method, colon, inner = name.partition(":")
        settings = {**({"inner": inner} if colon else {}), **options.get(name, {})}
        specs.append(MergeSpec(name, method, check(method, settings), ranks[0]))
    for rank in list(dict.fromkeys(ranks))[1:]:
        shown = f"rank {rank}" if isinstance(rank, int) else rank
        specs += [replace(spec, name=f"{spec.name} ({shown})", rank=rank) for spec in specs[: len(names)]]
    return specs


def joined(specs: Sequence[MergeSpec]) -> tuple[list[MergeSpec], dict[str, list[str]]]:
    """The specs without those that are others by another name, and name → the names that it stands for.

    Methods with a divisor d are points of one line, c Σ wᵢΔWᵢ / d: average at c is task arithmetic at c / Σ wᵢ.
    The first of them that is compared stays. One with options of its own stays, too.
    """
    stands_for, left_out = dict[str, list[str]](), list[MergeSpec]()
    for rank in dict.fromkeys(spec.rank for spec in specs):
        same = [s for s in specs if s.rank == rank and MERGES[s.method].divisor and not s.options]
        if same[1:]:
            stands_for[same[0].name] = [spec.method for spec in same[1:]]
            left_out += same[1:]
    return [spec for spec in specs if spec not in left_out], stands_for


def reference_of(against: str | None, specs: Sequence[MergeSpec], stands_for: Mapping[str, Sequence[str]]) -> str:
    """The merge that the others are compared with: the first, or the one of that name or that stands for it."""
    if against is None:
        return specs[0].name
    names = {spec.name: spec.name for spec in specs}
    for name, others in stands_for.items():
        for other in others:
            names.setdefault(other, name)  # at the first rank
    if against not in names:
        raise unknown("merge to compare with:", against, list(names))
    return names[against]


def tried(
    specs: Sequence[MergeSpec], merge_sets: Sequence[MergeSet], stands_for: Mapping[str, Sequence[str]]
) -> list[MergeSpec]:
    """The specs, with the places on its line beside the grid at which those that one stands for are at 1."""
    completed = []
    for spec in specs:
        pairs = [(MERGES[spec.method].divisor, MERGES[name].divisor) for name in stands_for.get(spec.name, ())]
        extra = {ours(s.weights) / theirs(s.weights) for ours, theirs in pairs if ours and theirs for s in merge_sets}
        extra = {c for c in extra if not math.isclose(c, 1.0)}
        completed.append(replace(spec, also=tuple(sorted(extra))))
    return completed


def merge_sets_of(
    adapters: Sequence[Adapter], tasks: Sequence[Task], ratios: Sequence[Sequence[float]]
) -> list[MergeSet]:
    """Which adapters are merged together.

    Several tasks: those of one training method and seed, each of another task. One task: the seeds of each training
    method, in every combination of every ratio.
    """
    if len(adapters) < 2:
        raise OptionError("a merge needs two adapters or more")
    who = [
        (a.record.get("method"), a.record.get("seed"), fingerprint(t.record))
        for a, t in zip(adapters, tasks, strict=True)
    ]
    if len({task for _, _, task in who}) == 1:
        return _checked(adapters, _sets_of_seeds(adapters, ratios))
    groups: dict[Any, list[int]] = {}
    for index, (method, seed, _) in enumerate(who):
        groups.setdefault((method, seed), []).append(index)
    if any(len(members) == 1 for members in groups.values()) and len({task for *_, task in who}) == len(who):
        groups = {(_common(m for m, _, _ in who), _common(s for _, s, _ in who)): list(range(len(who)))}
    merge_sets = []
    for (recorded, seed), members in groups.items():
        label = f"{recorded or 'adapters'}" + (f", seed {seed}" if seed is not None else "")
        method = label if recorded is None and len(groups) > 1 else recorded  # sets of unknown methods are no group
        if len(members) < 2 or len({who[i][2] for i in members}) < len(members):
            raise MismatchError(
                f"it cannot be told which adapters belong together: of {label} there are "
                f"{shorten(adapters[i].source for i in members)}; a set is one adapter a task, of one method and seed"
            )
        merge_sets.append(MergeSet(label, method, seed, tuple(members), (1.0,) * len(members)))
    return _checked(adapters, merge_sets)


def _checked(adapters: Sequence[Adapter], merge_sets: list[MergeSet]) -> list[MergeSet]:
    for merge_set in merge_sets:
        require_shared_modules([adapters[i] for i in merge_set.members])
    return merge_sets


def _sets_of_seeds(adapters: Sequence[Adapter], ratios: Sequence[Sequence[float]]) -> list[MergeSet]:
    groups: dict[Any, list[int]] = {}
    for index, adapter in enumerate(adapters):
        groups.setdefault(adapter.record.get("method"), []).append(index)
    merge_sets = []
    names = labels_of(adapters)
    for recorded, members in groups.items():
        for ratio in ratios:
            if not all(0 <= weight < math.inf for weight in ratio) or not any(ratio):
                raise OptionError(f"ratio {in_words(ratio)}: weights of 0 or more are needed, not all of them 0")
            shares = [weight / math.fsum(ratio) for weight in ratio if weight]
            for merged in itertools.combinations(members, len(shares)):
                method = recorded or " + ".join(names[i] for i in merged)  # seeds of unknown methods are no group
                label = f"{recorded or 'adapters'} {in_words(ratio)} of {', '.join(str(i) for i in merged)}"
                merge_sets.append(MergeSet(label, method, None, merged, tuple(shares), in_words(ratio)))
    if not any(len(merge_set.members) > 1 for merge_set in merge_sets):
        raise OptionError("no two adapters of one training method and task are among these: nothing to merge")
    return merge_sets


def seeds_in(label: str) -> tuple[int, ...]:
    """The places of the adapters that the label of a set of seeds names at its end; none of other labels."""
    places = re.search(r" of (\d+(?:, \d+)*)$", label)
    return tuple(map(int, places[1].split(", "))) if places else ()


def _common(values: Any) -> Any:
    different = set(values)
    return different.pop() if len(different) == 1 else None
