"""Several adapters beside each other by their weights alone: every pair, in total and by layer, type or module."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lora_lab.errors import MismatchError, OptionError
from lora_lab.options import check_options, option

if TYPE_CHECKING:
    from lora_lab.adapters.adapter import Adapter
    from lora_lab.geometry.canonical import Canonical
    from lora_lab.geometry.pairs import ModulePair
    from lora_lab.results.result import Result

LEVELS = ("layer", "type", "module")
"""Parts of adapters that can be compared besides the total."""

_EQUAL = 1e-6
"""‖ΔW₁ − ΔW₂‖ / ‖ΔW‖ up to which two are the same but for rounding."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class Compare:
    """Which parts are compared, and how; `run` answers."""

    kind: ClassVar[str] = "compare"

    levels: tuple[str, ...] = option(
        ("layer", "type"), "Parts besides the total, with commas: NAMES.", choices=lambda: LEVELS
    )
    energy: float = option(
        1.0,
        "Share of ‖ΔW‖² in each module that its subspaces hold: below 1, directions of small singular values do not "
        "count for angles and overlap.",
        above=0,
        most=1,
    )
    digits: int = option(
        4, "Digits to which ΔW is rounded for its hash; more tell more adapters apart.", least=1, most=12
    )
    similar: float = option(0.999, "Cosine above which two adapters are called near-duplicates.", least=0, most=1)

    signs: bool = option(
        False,
        "Also count the entries of ΔW that agree in sign, for which ΔW itself is made, block by block: half a minute "
        "for each pair at 8 billion parameters.",
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def record(self) -> dict[str, Any]:
        """The fields in JSON types."""
        return {**vars(self), "levels": list(self.levels)}

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise what `run` would raise for these adapters, before anything is computed."""
        from lora_lab.adapters.adapter import same_base
        from lora_lab.adapters.renames import require_shared_modules

        if len(adapters) < 2:
            raise OptionError(
                f"{len(adapters)} adapter{'s' * (not adapters)} given; to compare, two or more are needed"
            )
        require_shared_modules(adapters)
        same_base(adapters)
        shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        for adapter in adapters:
            for name, update in adapter.updates.items():
                shape, source = shapes.setdefault(name, (update.shape, adapter.source))
                if shape != update.shape:
                    raise MismatchError(
                        f"{source} and {adapter.source}: {name} is {_size(shape)} and {_size(update.shape)}; adapters "
                        "of one base model are needed"
                    )

    def run_id(self, adapters: Sequence[Adapter]) -> str:
        """What the answer hangs on, hashed."""
        from lora_lab.results.result import fingerprint

        about = [
            [adapter.label, adapter.record.get("method"), adapter.record.get("seed"), adapter.config, adapter.digest]
            for adapter in adapters
        ]
        return fingerprint([self.kind, about, self.record])

    def run(self, adapters: Sequence[Adapter], progress: Callable[[int, int], None] | None = None) -> Result:
        """The answer; MismatchError where adapters share no module, or one of another shape."""
        from lora_lab.adapters.describe import labels_of
        from lora_lab.results.result import Result, columns, provenance

        began = time.perf_counter()
        self.check(adapters)
        labels = labels_of(adapters)
        found = _measure(adapters, self, progress or (lambda *_: None))
        groups = _groups(found.modules, self.levels)
        pairs = list(itertools.combinations(range(len(adapters)), 2))
        rows = [row for level, name, held in groups for pair in pairs if (row := _row(found, pair, level, name, held))]
        named = [{**_named(labels, (row["indices"][0], row["indices"][1])), **row} for row in rows]
        about = _about(adapters, labels, found, self.digits)
        parts = [
            {"adapter": label, **part}
            for level, name, held in groups
            for i, label in enumerate(labels)
            if (part := _part(found.alone[i], level, name, held))
        ]
        totals = {(row["indices"][0], row["indices"][1]): row for row in rows if row["level"] == "total"}
        return Result(
            self.kind,
            columns(named),
            {**self.record, "adapters": [_described(*each) for each in zip(adapters, found.alone, strict=True)]},
            {
                "adapters": about,
                "parts": parts,
                "twins": _twins(totals, labels, [str(one["hash"]) for one in about], self.similar),
                **_order(totals, len(adapters)),
            },
            provenance(
                inputs=[Path(adapter.source) for adapter in adapters],
                elapsed_s=time.perf_counter() - began,
                run=self.run_id(adapters),
            ),
        )


@dataclass(frozen=True)
class _Alone:
    """What is kept of one ΔW."""

    norm: float
    singular_values: tuple[float, ...]
    effective_rank: float
    stable_rank: float


@dataclass
class _Measured:
    """What is kept of every module: of each adapter, and of each pair."""

    modules: list[str]
    alone: list[dict[str, _Alone]]
    sketches: list[dict[str, Any]]
    pairs: dict[Pair, dict[str, tuple[ModulePair, tuple[float, float] | None]]] = field(default_factory=dict)


def _measure(adapters: Sequence[Adapter], asked: Compare, progress: Callable[[int, int], None]) -> _Measured:
    """Module by module, so that only one of them is in memory in float64."""
    from lora_lab.adapters.formats.keys import natural_key
    from lora_lab.adapters.initial import alike
    from lora_lab.geometry.canonical import Canonical
    from lora_lab.geometry.pairs import module_pair

    names = sorted({name for adapter in adapters for name in adapter.updates}, key=natural_key)
    found = _Measured(names, [{} for _ in adapters], [{} for _ in adapters])
    for done, name in enumerate(names):
        forms: dict[int, Canonical] = {}
        for i, adapter in enumerate(adapters):
            if name in adapter.updates:
                form = forms[i] = Canonical(adapter.updates[name], asked.energy)
                values = tuple(form.singular_values.tolist())
                found.alone[i][name] = _Alone(form.norm, values, form.effective_rank(), form.stable_rank())
                found.sketches[i][name] = form.sketch(name)
        for i, j in itertools.combinations(forms, 2):
            start = alike(adapters[i], adapters[j], name)
            found.pairs.setdefault((i, j), {})[name] = module_pair(forms[i], forms[j], signs=asked.signs), start
        progress(done + 1, len(names))
    return found


def _about(adapters: Sequence[Adapter], labels: Sequence[str], found: _Measured, digits: int) -> list[dict[str, Any]]:
    """Each adapter as a whole."""
    from lora_lab.adapters.describe import method_of
    from lora_lab.geometry.canonical import hash_of

    return [
        {
            "adapter": label,
            "method": method_of(adapter, label),
            "modules": len(adapter.updates),
            "rank": max((update.rank for update in adapter.updates.values()), default=0),
            "hash": hash_of(sketches, {name: one.norm for name, one in alone.items()}, digits),
        }
        for adapter, label, alone, sketches in zip(adapters, labels, found.alone, found.sketches, strict=True)
    ]


def _described(adapter: Adapter, alone: Mapping[str, _Alone]) -> dict[str, Any]:
    """As `adapters.describe.described` has it, with the norm that is known already."""
    norm = math.hypot(*(one.norm for one in alone.values()))
    return {
        "label": adapter.label,
        "method": adapter.record.get("method"),
        "seed": adapter.record.get("seed"),
        "norm": norm,
    }


def _groups(names: Sequence[str], levels: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """(level, name of the part, its modules), the total first."""
    from lora_lab.adapters.groups import blocks, locate

    places, block_of = locate(names), blocks(names)
    label: dict[str, Callable[[str], str | None]] = {
        "layer": lambda name: block_of[name] if places[name].layer is not None else None,
        "type": lambda name: places[name].type,
        "module": lambda name: name,
    }
    groups: dict[tuple[str, str], list[str]] = {("total", ""): list(names)}
    for level in levels:
        for name in names:
            part = label[level](name)
            if part is not None:
                groups.setdefault((level, part), []).append(name)
    return [(level, part, held) for (level, part), held in groups.items()]


def _row(found: _Measured, pair: Pair, level: str, group: str, names: Sequence[str]) -> dict[str, Any] | None:
    """One pair in one part: ΔW of several modules is the block-diagonal matrix of theirs, so that all sums are plain.

    None where neither adapter has a module there.
    """
    sides = [[found.alone[i][name] for name in names if name in found.alone[i]] for i in pair]
    if not any(sides):
        return None
    both = {name: each for name, each in found.pairs.get(pair, {}).items() if name in set(names)}
    measured, starts = [each for each, _ in both.values()], [start for _, start in both.values() if start]
    norms = [math.hypot(*(one.norm for one in side)) for side in sides]
    largest = [max((one.singular_values[0] for one in side if one.singular_values), default=0.0) for side in sides]
    inner = sum(each.inner for each in measured)
    alone = [found.alone[i][name].norm for i in pair for name in names if name in found.alone[i] and name not in both]
    z = sum(z for _, z in starts) / len(starts) if starts else None
    return {
        "indices": list(pair),
        "level": level,
        "group": group,
        "modules": len(both),
        "norm_first": norms[0],
        "norm_second": norms[1],
        "norm_ratio": _ratio(norms[0], norms[1]),
        "sigma_ratio": _ratio(largest[0], largest[1]),
        "inner": inner,
        "cosine": _ratio(inner, norms[0] * norms[1]),
        "distance": math.hypot(*(each.distance for each in measured), *alone),
        **_subspaces("left", measured),
        **_subspaces("right", measured),
        **_signs(both, *(found.alone[i] for i in pair)),
        "A_cosine": sum(cosine for cosine, _ in starts) / len(starts) if starts else None,
        "A_z": z,
        "A_shared": None if z is None else z > _flagged(),
    }


def _subspaces(side: str, measured: Sequence[ModulePair]) -> dict[str, float | None]:
    """The columns of one side: a direct sum of subspaces has the angles of all its parts."""
    import numpy as np

    parts = [getattr(each, side) for each in measured]
    angles = np.concatenate([np.zeros(0), *(part.angles for part in parts)])
    names = ("overlap", "over_chance", "smallest", "mean", "largest", "grassmann")
    if not len(angles):
        return {f"{side}_{name}": None for name in names}
    shared = sum(part.shared for part in parts)
    values = (
        shared / len(angles),
        shared / sum(part.chance for part in parts),
        float(angles.min()),
        float(angles.mean()),
        float(angles.max()),
        float(np.linalg.norm(angles)),
    )
    return {f"{side}_{name}": value for name, value in zip(names, values, strict=True)}


def _signs(
    both: Mapping[str, tuple[ModulePair, Any]], first: Mapping[str, _Alone], second: Mapping[str, _Alone]
) -> dict[str, float | None]:
    """The share of entries that agree in sign, and what it would be of normal entries with these cosines."""
    from lora_lab.geometry.pairs import gaussian_agreement

    same = counted = expected = 0.0
    for name, (pair, _) in both.items():
        if pair.signs and pair.signs[1]:
            same, counted = same + pair.signs[0], counted + pair.signs[1]
            expected += pair.signs[1] * gaussian_agreement(pair.inner / (first[name].norm * second[name].norm))
    return {"sign_agreement": _ratio(same, counted), "sign_expected": _ratio(expected, counted)}


def _part(alone: Mapping[str, _Alone], level: str, group: str, names: Sequence[str]) -> dict[str, Any] | None:
    """One adapter in one part; None where it has no module there."""
    held = [alone[name] for name in names if name in alone]
    moved = [one for one in held if one.norm]
    if not held:
        return None
    powers = [[value**2 for value in one.singular_values] for one in held]
    return {
        "level": level,
        "group": group,
        "modules": len(held),
        "norm": math.hypot(*(one.norm for one in held)),
        "sigma": max((one.singular_values[0] for one in moved), default=0.0),
        "effective_rank": sum(one.effective_rank for one in moved) / len(moved) if moved else 0.0,
        "stable_rank": sum(one.stable_rank for one in moved) / len(moved) if moved else 0.0,
        "spectrum": [math.sqrt(sum(k) / len(held)) for k in itertools.zip_longest(*powers, fillvalue=0.0)],
    }


def _twins(
    totals: Mapping[Pair, Mapping[str, Any]], labels: Sequence[str], hashes: Sequence[str], similar: float
) -> list[dict[str, Any]]:
    """The pairs that are equal or nearly; the distance decides too, since rounding may part two hashes by chance."""
    twins = []
    for (i, j), row in totals.items():
        difference = _ratio(row["distance"], max(row["norm_first"], row["norm_second"]))
        equal = hashes[i] == hashes[j] or (difference is not None and difference <= _EQUAL)
        if equal or (row["cosine"] is not None and row["cosine"] > similar):
            more = {"equal": equal, "cosine": row["cosine"], "difference": difference}
            twins.append({**_named(labels, (i, j)), **more})
    return twins


def _order(totals: Mapping[Pair, Mapping[str, Any]], count: int) -> dict[str, Any]:
    """Average linkage of 1 − cosine (1 where there is none), its leaves ordered so that neighbours are alike."""
    distances = [1.0 if row["cosine"] is None else max(0.0, 1 - row["cosine"]) for row in totals.values()]
    if count == 2:  # scipy takes as long to load as the adapters
        return {"order": [0, 1], "linkage": [[0.0, 1.0, distances[0], 2.0]]}
    from scipy.cluster.hierarchy import leaves_list, linkage

    merges = linkage(distances, "average", optimal_ordering=True)
    return {"order": leaves_list(merges).tolist(), "linkage": merges.tolist()}


def _named(labels: Sequence[str], pair: Pair) -> dict[str, Any]:
    return {"first": labels[pair[0]], "second": labels[pair[1]], "indices": list(pair)}


def _ratio(value: float, by: float) -> float | None:
    return value / by if by else None


def _flagged() -> float:
    from lora_lab.adapters.initial import FLAGGED

    return FLAGGED


def _size(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))
