"""What results of comparing adapters by their weights alone hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_lab.results.rows import ADAPTERS
from lora_lab.results.schema import Kind, Paper, column


@dataclass
class Compared:
    """Which two adapters a row is about."""

    first: str = column("label of one adapter")
    second: str = column("label of the other")
    indices: list[Any] = column("their places among the adapters given, from 0")


@dataclass
class Part:
    """Which part of the adapters a row is about."""

    level: str = column("total, layer, type or module")
    group: str = column("name of the layer, type or module; empty of the total")


@dataclass
class PairRow(Part, Compared):
    """Two adapters in one part; ΔW of several modules counts as one block-diagonal matrix, absent modules as 0."""

    modules: int = column("modules that both adapt")
    norm_first: float = column("‖ΔW‖ of the first", form=".2f")
    norm_second: float = column("‖ΔW‖ of the second", form=".2f")
    norm_ratio: float = column("‖ΔW‖ of the first / of the second; null where the second is 0", form=".2f")
    sigma_ratio: float = column("largest singular value of the first / of the second", form=".2f")
    inner: float = column("⟨ΔW₁, ΔW₂⟩", form=".2e")
    cosine: float = column("⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖); null where one is 0")
    distance: float = column("‖ΔW₁ − ΔW₂‖", form=".2f")
    left_overlap: float = column("Σ cos² of the angles between column spaces / their number", "share")
    left_over_chance: float = column("the same / its expectation for random subspaces", form=".1f")
    left_smallest: float = column("smallest principal angle between column spaces", "rad")
    left_mean: float = column("mean principal angle between column spaces", "rad")
    left_largest: float = column("largest principal angle between column spaces", "rad")
    left_grassmann: float = column("Grassmann distance of the column spaces: root of the sum of squared angles", "rad")
    right_overlap: float = column("Σ cos² of the angles between row spaces / their number", "share")
    right_over_chance: float = column("the same / its expectation for random subspaces", form=".1f")
    right_smallest: float = column("smallest principal angle between row spaces", "rad")
    right_mean: float = column("mean principal angle between row spaces", "rad")
    right_largest: float = column("largest principal angle between row spaces", "rad")
    right_grassmann: float = column("Grassmann distance of the row spaces", "rad")
    sign_agreement: float = column("share of ΔW's entries that agree in sign; null where not counted", "share")
    sign_expected: float = column("the same of normal entries with these cosines: mean of ½ + arcsin(ρ)/π", "share")
    A_cosine: float = column("cosine of the A as they lie in the files, mean over modules; null without two of a shape")
    A_z: float = column("A_cosine in standard deviations of independent A, mean over modules", form=".1f")
    A_shared: bool | None = column("whether that is above 5: one initial A")


@dataclass
class PartOfAdapter(Part):
    """One adapter in one part."""

    adapter: str = column("label of the adapter")
    modules: int = column("modules")
    norm: float = column("‖ΔW‖", form=".2f")
    sigma: float = column("largest singular value")
    effective_rank: float = column("exp of the entropy of the singular values, mean over modules", form=".1f")
    stable_rank: float = column("‖ΔW‖² / σ₁², mean over modules", form=".1f")
    spectrum: list[Any] = column("root mean square over modules of the first, second … singular value")


@dataclass
class ComparedAdapter:
    """One adapter as a whole."""

    adapter: str = column("label of the adapter")
    method: str | None = column("training method; of an adapter that records none, its label")
    modules: int = column("modules")
    rank: int = column("largest rank of its factors")
    hash: str = column("hash of ΔW that no change of gauge (BR, R⁻¹A) changes")


@dataclass
class Twins(Compared):
    """Two adapters that are the same, or nearly."""

    equal: bool = column("whether ΔW is the same up to rounding; false of near-duplicates")
    cosine: float = column("⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖)", form=".6f")
    difference: float = column("‖ΔW₁ − ΔW₂‖ / the larger ‖ΔW‖", "share", form=".1e")


KINDS = (
    Kind(
        "compare",
        "adapters side by side by their weights alone",
        {"rows": PairRow, "adapters": ComparedAdapter, "parts": PartOfAdapter, "twins": Twins},
        Paper(("first", "second", "norm_ratio", "cosine", "left_over_chance", "right_over_chance", "A_z")),
        summary={
            "order": "places of the adapters as hierarchical clustering (average linkage of 1 − cosine) orders them",
            "linkage": "its merges: two clusters, the distance at which they are joined, how many adapters they hold",
        },
        parameters={
            "levels": "parts that were compared besides the total",
            "energy": "share of ‖ΔW‖² in each module that its subspaces hold",
            "digits": "digits that the hash hangs on",
            "signs": "whether signs of entries were counted",
            "similar": "cosine above which adapters are near-duplicates",
            **ADAPTERS,
        },
    ),
)
