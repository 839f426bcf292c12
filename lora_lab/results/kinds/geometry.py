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
    pico_share: float = column("σ₁² / Σσ² of [B₁, B₂] in the balanced gauge, mean over modules", "share")
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
    norm_ratio: float = column("‖ΔW‖ of the first / of the second; null where the second is 0", form=".2f")
    cosine: float = column("⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖)", form=".6f")
    difference: float = column("‖ΔW₁ − ΔW₂‖ / the larger ‖ΔW‖", "share", form=".1e")


@dataclass
class Placed:
    """One adapter, or the base, as a point in a plane."""

    adapter: str | None = column("label of the adapter; null of the base, where ΔW = 0 and all of them began")
    x: float = column("first principal component of ΔW")
    y: float = column("second principal component of ΔW")
    tsne_x: float = column("place by t-SNE; null where it was not asked for")
    tsne_y: float = column("the same, upward")
    start: int | None = column("number of the group of adapters with one initial A; null without another")


@dataclass
class InBase(Part):
    """One adapter in one part beside the weights W of the base; of several modules, W and ΔW are block-diagonal."""

    adapter: str = column("label of the adapter")
    modules: int = column("modules")
    intruders: int = column("leading left singular vectors of W + ΔW that are like none of W's")
    looked_at: int = column("leading left singular vectors that were looked at")
    least_similar: float = column("of these, the smallest largest |cosine| with a left singular vector of W")
    left_share: float = column("share of ‖ΔW‖² in the span of W's leading left singular vectors", "share")
    left_over_chance: float = column("the same / its expectation for random directions", form=".1f")
    right_share: float = column("share of ‖ΔW‖² in the span of W's leading right singular vectors", "share")
    right_over_chance: float = column("the same / its expectation for random directions", form=".1f")
    norm_ratio: float = column("‖ΔW‖ / ‖W‖", form=".1e")
    similarities: list[Any] | None = column("of one module: largest |cosine| of each leading vector, in order")


@dataclass
class Forecast:
    """How well a number of pairs tells what merges of them lose."""

    merge: str = column("name of the merge")
    outcome: str = column(
        "what was lost: the main metric (of a share, the share of the adapters' own; else how much worse) or loss "
        "(nats more than their own)"
    )
    predictor: str = column("column of the pairs; of sets of more than two adapters, its mean over their pairs")
    sets: int = column("sets of adapters that were merged", counts=True)
    adapters: int = column("adapters in them")
    correlation: float = column("rank correlation (Spearman) of predictor and outcome over the sets", form=".2f")
    correlation_low: float = column("low end of its interval", form=".2f")
    correlation_high: float = column("high end of its interval", form=".2f")
    points: list[Any] = column("predictor and outcome of every set")


KINDS = (
    Kind(
        "compare",
        "adapters side by side by their weights alone",
        {
            "rows": PairRow,
            "adapters": ComparedAdapter,
            "parts": PartOfAdapter,
            "twins": Twins,
            "map": Placed,
            "inside": InBase,
            "forecast": Forecast,
        },
        Paper(("first", "second", "norm_ratio", "cosine", "left_over_chance", "right_over_chance", "A_z")),
        version=2,
        optional=("inside", "forecast"),
        summary={
            "order": "places of the adapters as hierarchical clustering (average linkage of 1 − cosine) orders them",
            "linkage": "its merges: two clusters, the distance at which they are joined, how many adapters they hold",
            "map_held": "share of the sum of all squared distances that the first two components show",
            "map_perplexity": "about how many neighbours weigh in t-SNE; null where it was not asked for",
        },
        parameters={
            "levels": "parts that were compared besides the total",
            "energy": "share of ‖ΔW‖² in each module that its subspaces hold",
            "digits": "digits that the hash hangs on",
            "signs": "whether signs of entries were counted",
            "similar": "cosine above which adapters are near-duplicates",
            "tsne": "whether they were placed by t-SNE",
            "base": "name of the checkpoint in whose weights ΔW was looked for; null without",
            "top": "leading singular vectors that were looked at in the base",
            "threshold": "|cosine| below which one of them is an intruder",
            **ADAPTERS,
        },
    ),
)
