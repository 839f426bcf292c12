"""Several adapters beside each other by their weights alone: every pair, in total and by layer, type or module."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_lab.errors import AdapterError

if TYPE_CHECKING:
    from lora_lab.adapters.adapter import Adapter
    from lora_lab.geometry.canonical import Canonical
    from lora_lab.geometry.pairs import ModulePair

LEVELS = ("layer", "type", "module")
"""Parts of adapters that can be compared besides the total."""

_EQUAL = 1e-6
"""‖ΔW₁ − ΔW₂‖ / ‖ΔW‖ up to which two are the same but for rounding to float32."""

_LARGEST = 1e100
"""‖ΔW‖ beyond which squares and products of several would leave float64."""

SIMILAR = 0.999
"""Cosine above which two are near-duplicates.

Rounding both factors with a relative error of δ leaves a cosine of 1 − δ² (δ ≈ 2⁻ᵇ / 2.4 of b significant bits):
.999997 in bfloat16 (8), .9993 in eight bits (e4m3, 4), and cutting to the share e of ‖ΔW‖² leaves √e: .999 at .998.
Independent adapters have cosines of about 1 / √(degrees of freedom), of a hundredth and less.
"""

Pair = tuple[int, int]


@dataclass(frozen=True)
class Alone:
    """What is kept of one ΔW."""

    rank: int
    """Of its factors."""
    norm: float
    singular_values: tuple[float, ...]
    effective_rank: float
    stable_rank: float


@dataclass
class Measured:
    """What is kept of every module: of each adapter, and of each pair."""

    modules: list[str]
    alone: list[dict[str, Alone]]
    sketches: list[dict[str, Any]]
    pairs: dict[Pair, dict[str, tuple[ModulePair, tuple[float, float] | None]]] = field(default_factory=dict)


def measure(
    adapters: Sequence[Adapter],
    *,
    energy: float = 1.0,
    signs: bool = False,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Measured:
    """All that tables are made of, module by module, so that only one of them is in memory in float64.

    Subspaces hold the share `energy` of ‖ΔW‖²; with `signs`, those of the entries are counted.
    """
    from lora_lab.adapters.formats.keys import natural_key
    from lora_lab.adapters.initial import cosine_of, start_of
    from lora_lab.geometry.canonical import Canonical
    from lora_lab.geometry.pairs import module_pair

    names = sorted({name for adapter in adapters for name in adapter.updates}, key=natural_key)
    found = Measured(names, [{} for _ in adapters], [{} for _ in adapters])
    for done, name in enumerate(names):
        forms: dict[int, Canonical] = {}
        starts: dict[int, Any] = {}
        for i, adapter in enumerate(adapters):
            if name in adapter.updates:
                starts[i] = start_of(adapter, name)
                form = forms[i] = Canonical(adapter.updates[name], energy)
                if not form.norm < _LARGEST:
                    raise AdapterError(
                        f"{adapter.source}: ‖ΔW‖ of {name} is {form.norm:.1e}; less than {_LARGEST:.0e} is needed"
                    )
                values = tuple(form.singular_values.tolist())
                found.alone[i][name] = Alone(
                    form.update.rank, form.norm, values, form.effective_rank(), form.stable_rank()
                )
                found.sketches[i][name] = form.sketch(name)
        for i, j in itertools.combinations(forms, 2):
            measured = module_pair(forms[i], forms[j], signs=signs), cosine_of(starts[i], starts[j])
            found.pairs.setdefault((i, j), {})[name] = measured
        progress(done + 1, len(names))
    return found


def about(adapters: Sequence[Adapter], labels: Sequence[str], found: Measured, digits: int) -> list[dict[str, Any]]:
    """Each adapter as a whole."""
    from lora_lab.adapters.describe import method_of
    from lora_lab.geometry.canonical import hash_of

    return [
        {
            "adapter": label,
            "method": method_of(adapter, label),
            "modules": len(adapter.updates),
            "rank": max((one.rank for one in alone.values()), default=0),
            "hash": hash_of(sketches, {name: one.norm for name, one in alone.items()}, digits),
        }
        for adapter, label, alone, sketches in zip(adapters, labels, found.alone, found.sketches, strict=True)
    ]


def described_by(adapter: Adapter, alone: Mapping[str, Alone]) -> dict[str, Any]:
    """As `adapters.describe.described` has it, with the norm that is known already."""
    norm = math.hypot(*(one.norm for one in alone.values()))
    return {
        "label": adapter.label,
        "method": adapter.record.get("method"),
        "seed": adapter.record.get("seed"),
        "norm": norm,
    }


def parts_of(names: Sequence[str], levels: Sequence[str]) -> list[tuple[str, str, list[str]]]:
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


def pair_row(found: Measured, pair: Pair, level: str, group: str, names: Sequence[str]) -> dict[str, Any] | None:
    """One pair in one part: ΔW of several modules is the block-diagonal matrix of theirs, so that all sums are plain.

    None where neither adapter has a module there.
    """
    sides = [[found.alone[i][name] for name in names if name in found.alone[i]] for i in pair]
    if not any(sides):
        return None
    known = found.pairs.get(pair, {})
    both = {name: known[name] for name in names if name in known}
    measured, starts = [each for each, _ in both.values()], [start for _, start in both.values() if start]
    norms = [math.hypot(*(one.norm for one in side)) for side in sides]
    largest = [max((one.singular_values[0] for one in side if one.singular_values), default=0.0) for side in sides]
    inner = sum(each.inner for each in measured)
    alone = [found.alone[i][name].norm for i in pair for name in names if name in found.alone[i] and name not in both]
    z = _mean([z for _, z in starts])
    return {
        "indices": list(pair),
        "level": level,
        "group": group,
        "modules": len(both),
        "norm_first": norms[0],
        "norm_second": norms[1],
        "norm_ratio": ratio(norms[0], norms[1]),
        "sigma_ratio": ratio(largest[0], largest[1]),
        "inner": inner,
        "cosine": ratio(inner, norms[0] * norms[1]),
        "distance": math.hypot(*(each.distance for each in measured), *alone),
        **_subspaces("left", measured),
        **_subspaces("right", measured),
        **_signs(both, *(found.alone[i] for i in pair)),
        "pico_share": _mean([each.top_share for each in measured if each.top_share is not None]),
        "A_cosine": _mean([cosine for cosine, _ in starts]),
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
    both: Mapping[str, tuple[ModulePair, Any]], first: Mapping[str, Alone], second: Mapping[str, Alone]
) -> dict[str, float | None]:
    """The share of entries that agree in sign, and what it would be of normal entries with these cosines."""
    from lora_lab.geometry.pairs import gaussian_agreement

    same = counted = expected = 0.0
    for name, (pair, _) in both.items():
        if pair.signs and pair.signs[1]:
            same, counted = same + pair.signs[0], counted + pair.signs[1]
            expected += pair.signs[1] * gaussian_agreement(pair.inner / (first[name].norm * second[name].norm))
    return {"sign_agreement": ratio(same, counted), "sign_expected": ratio(expected, counted)}


def part_rows(
    found: Measured, labels: Sequence[str], level: str, group: str, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Every adapter that has a module in one part."""
    rows = []
    for label, alone in zip(labels, found.alone, strict=True):
        held = [alone[name] for name in names if name in alone]
        moved = [one for one in held if one.norm]
        if not held:
            continue
        powers = [[value**2 for value in one.singular_values] for one in held]
        rows.append(
            {
                "adapter": label,
                "level": level,
                "group": group,
                "modules": len(held),
                "norm": math.hypot(*(one.norm for one in held)),
                "sigma": max((one.singular_values[0] for one in moved), default=0.0),
                "effective_rank": _mean([one.effective_rank for one in moved]) or 0.0,
                "stable_rank": _mean([one.stable_rank for one in moved]) or 0.0,
                "spectrum": [math.sqrt(sum(k) / len(held)) for k in itertools.zip_longest(*powers, fillvalue=0.0)],
            }
        )
    return rows


def twins(
    totals: Mapping[Pair, Mapping[str, Any]], labels: Sequence[str], similar: float = SIMILAR
) -> list[dict[str, Any]]:
    """The pairs that are equal but for rounding, or whose cosine is above `similar`."""
    found = []
    for pair, row in totals.items():
        difference = ratio(row["distance"], max(row["norm_first"], row["norm_second"]))
        equal = not difference or difference <= _EQUAL  # None of two that are 0
        if equal or (row["cosine"] is not None and row["cosine"] > similar):
            more = {"norm_ratio": row["norm_ratio"], "cosine": row["cosine"], "difference": difference}
            found.append({**named(labels, pair), "equal": equal, **more})
    return found


def order_of(totals: Mapping[Pair, Mapping[str, Any]], count: int) -> dict[str, Any]:
    """Average linkage of 1 − cosine (1 where there is none), its leaves ordered so that neighbours are alike."""
    distances = [1.0 if row["cosine"] is None else max(0.0, 1 - row["cosine"]) for row in totals.values()]
    if count == 1:
        return {"order": [0], "linkage": []}
    if count == 2:  # scipy takes as long to load as the adapters
        return {"order": [0, 1], "linkage": [[0.0, 1.0, distances[0], 2.0]]}
    from scipy.cluster.hierarchy import leaves_list, linkage

    merges = linkage(distances, "average", optimal_ordering=True)
    return {"order": leaves_list(merges).tolist(), "linkage": merges.tolist()}


def placed(
    totals: Mapping[Pair, Mapping[str, Any]], found: Measured, labels: Sequence[str], *, tsne: bool = False
) -> dict[str, Any]:
    """The map of the adapters and of the base, where all of them began: by classical scaling, and by t-SNE if asked."""
    import numpy as np

    from lora_lab.geometry.placing import classical, groups_of, neighbours, perplexity

    gram = np.diag([sum(one.norm**2 for one in alone.values()) for alone in found.alone])
    for (i, j), row in totals.items():
        gram[i, j] = gram[j, i] = row["inner"]
    plane = classical(gram)
    near = neighbours(gram, plane).tolist() if tsne else [(None, None)] * len(plane.points)
    starts = [*groups_of(len(labels), [pair for pair, row in totals.items() if row["A_shared"]]), None]
    return {
        "map": [
            {"adapter": label, "x": x, "y": y, "tsne_x": u, "tsne_y": v, "start": start}
            for label, (x, y), (u, v), start in zip([*labels, None], plane.points.tolist(), near, starts, strict=True)
        ],
        "map_held": plane.held,
        "map_perplexity": perplexity(len(labels)) if tsne else None,
    }


def named(labels: Sequence[str], pair: Pair) -> dict[str, Any]:
    """Which two adapters a row is about."""
    return {"first": labels[pair[0]], "second": labels[pair[1]], "indices": list(pair)}


def ratio(value: float, by: float) -> float | None:
    """The one by the other; None by 0."""
    return value / by if by else None


def _flagged() -> float:
    from lora_lab.adapters.initial import FLAGGED

    return FLAGGED


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
