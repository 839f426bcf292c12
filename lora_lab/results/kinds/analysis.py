"""What results of questions about adapters hold: lines, dropout stability, Shapley values, pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_lab.results.rows import ADAPTERS, MEASURED, METRIC, METRICS, PLAYERS, Adapted
from lora_lab.results.schema import Kind, Paper, column

MAIN_BARRIER = "entezari"
"""The one by which shrinkage and matrices of pairs are told."""


@dataclass
class Between:
    """Which adapters a row is about."""

    members: list[Any] = column("labels of the adapters that are mixed")
    indices: list[Any] = column("their places among the adapters given, from 0")
    method: str | None = column("training method, of several their names together")


@dataclass
class LinePoint(Between):
    """One mixture of adapters: a point on a line between two, or one of the ratios."""

    t: float = column("place on the line, 0 the first adapter and 1 the second; null of ratios", form=".2f")
    ratio: str | None = column("weights as they were given, such as 1:2; null on a line")
    space: str = column("what is averaged: factors, matched, delta or aligned")
    weights: list[Any] = column("weight of every adapter given")
    norm: float = column("Frobenius norm of the mixture's ΔW over all modules", form=".2f")


@dataclass
class Barrier(Between):
    """How much worse than its ends a line gets."""

    space: str = column("what is averaged")
    metric: str = column(METRIC)
    barrier: str = column("definition: entezari, frankle or others by name")
    value: float = column("how much worse it gets; of midpoint the metric there", "of the metric")
    low: float = column("low end of its interval", "of the metric")
    high: float = column("high end of its interval", "of the metric")


@dataclass
class Shrinkage(Between):
    """How much of a line's barrier comes from ‖ΔW‖ shrinking on it."""

    space: str = column("what is averaged on the line", optional=True)
    metric: str = column(METRIC)
    barrier: float = column("barrier of the line", "of the metric")
    barrier_low: float = column("low end of its interval", "of the metric")
    barrier_high: float = column("high end of its interval", "of the metric")
    stays: float = column("barrier that stays when the norm is matched", "of the metric")
    stays_low: float = column("low end of its interval", "of the metric")
    stays_high: float = column("high end of its interval", "of the metric")
    removed: float = column("barrier − stays", "of the metric")
    removed_low: float = column("low end of its interval", "of the metric")
    removed_high: float = column("high end of its interval", "of the metric")
    share: float = column("removed / barrier; null where the barrier may be 0", "share")


@dataclass
class OverPairs:
    """Barriers over all pairs of one training method."""

    method: str | None = column("training method")
    space: str = column("what is averaged")
    metric: str = column(METRIC)
    barrier: str = column("definition of the barrier")
    mean: float = column("mean over the pairs", "of the metric")
    spread: float = column("spread over the pairs", "of the metric")
    pairs: int = column("pairs", counts=True)


@dataclass
class StabilityRow(Adapted):
    """One family of keep-sets: of one size, at one probability, without one player, or one alone."""

    rescaled: bool = column("whether the updates kept are multiplied by G/k")
    family: str = column("k-of-G, p, leave-one-out, one-alone or fixed patterns")
    label: str = column("which of the family: k, p, the player or the pattern")
    share: float = column("share of the players kept, k/G or p", "share", form=".2f")
    sets: int = column("keep-sets that were looked at")
    exhaustive: bool = column("whether these are all there are")


@dataclass
class Epsilon:
    """ε of ε-dropout-stability: how much worse the worst keep-set of a family is than the whole adapter."""

    family: str = column("family of keep-sets")
    metric: str = column(METRIC)
    value: float = column("how much worse the worst keep-set is than the whole adapter", "of the metric")
    low: float = column("low end of its interval", "of the metric")
    high: float = column("high end of its interval", "of the metric")
    worst_set: str = column("the players of the keep-set where it is reached")
    sets: int = column("keep-sets that were looked at")
    lower_bound: bool = column("whether others, not looked at, may be worse")


@dataclass
class Inequality:
    """Both sides of CoTo's inequality between expected losses, for one law of masks."""

    law: str = column("law that keep-sets are drawn by", optional=True)
    p: float = column("its probability", "share", form=".2f")
    covered: float = column("probability of the sizes that were looked at", "share", optional=True)
    left: float = column("left side", "nats")
    left_low: float = column("low end of its interval", "nats")
    left_high: float = column("high end of its interval", "nats")
    right: float = column("right side", "nats")
    right_low: float = column("low end of its interval", "nats")
    right_high: float = column("high end of its interval", "nats")
    gap: float = column("right − left", "nats")
    gap_low: float = column("low end of its interval", "nats")
    gap_high: float = column("high end of its interval", "nats")


@dataclass
class StabilityAdapter(Adapted):
    """What is said of one adapter as a whole."""

    rescaled: bool = column("whether the updates kept are multiplied by G/k")
    keep_sets: int = column("keep-sets that were looked at")
    exhaustive: bool = column("whether these are all there are")
    epsilon: list[Epsilon] = column("ε of each family and metric")
    inequality: list[Inequality] = column("both sides of the inequality, for each law and p")
    always_on: list[Any] = column("modules of no player, which are never left out")


@dataclass
class StabilityMethod:
    """ε over the adapters of one training method."""

    method: str | None = column("training method")
    rescaled: bool = column("whether the updates kept are multiplied by G/k")
    family: str = column("family of keep-sets")
    metric: str = column(METRIC)
    mean: float = column("mean ε over the adapters", "of the metric")
    spread: float = column("spread over the adapters", "of the metric")
    adapters: int = column("adapters", counts=True)


@dataclass
class ShapleyRow(Adapted):
    """One player."""

    player: str = column("name of the player")
    encoder: str = column("encoder that it lies in, where the model has several")
    type: str | None = column("type of its modules, where it has one")
    layer: int | None = column("layer of its modules, where it has one")
    modules: int = column("modules that it stands for")
    value: float = column("Shapley value", "of the worth")
    low: float = column("low end of its interval (coalitions and examples)", "of the worth")
    high: float = column("high end of its interval (coalitions and examples)", "of the worth")
    se: float = column("standard error that comes from drawing coalitions; 0 of exact values", "of the worth")
    se_examples: float = column("standard error that comes from the examples", "of the worth")
    second: float = column("value by a second estimator from the same coalitions; null without", "of the worth")
    second_se: float = column("its standard error", "of the worth")
    gates: float = column(
        "Aumann–Shapley value from gradients along equal gates; null without", "of the worth", optional=True
    )


@dataclass
class Trace:
    """Where an estimator stood after some draws."""

    draws: int = column("draws so far")
    evaluations: int = column("coalitions asked for so far")
    values: list[Any] = column("value of every player", "of the worth")
    se: list[Any] = column("standard error of every player", "of the worth")


@dataclass
class ShapleyAdapter(Adapted):
    """What is said of one adapter as a whole."""

    estimator: str = column("how the values were estimated")
    draws: int = column("draws of the estimator")
    evaluations: int = column("coalitions asked for")
    bias: str | None = column("what is known of the estimator's bias; null of an unbiased one")
    full: float = column("worth of all players together", "of the worth")
    empty: float = column("worth of none", "of the worth")
    efficiency_gap: float = column("|sum of the values − (full − empty)|", "of the worth", form=".1e")
    largest_se: float = column("largest standard error of any player", "of the worth")
    trace: list[Trace] = column("the values after more and more draws")
    always_on: list[Any] = column("modules of no player, which are never left out")
    variation: float = column("coefficient of variation of the values: standard deviation / |mean|")
    top_third: float = column("share of the largest third of the players in the sum of magnitudes", "share")
    engine: dict[str, Any] = column("block evaluations, those that nothing shared would take, bytes kept")
    disagreement: dict[str, Any] | None = column(
        "the second estimator, and the player on which it differs most", optional=True
    )
    gates: dict[str, Any] | None = column(
        "values from gradients alone: passes with gradients, efficiency gap, the player farthest from `value`",
        optional=True,
    )
    interactions: dict[str, Any] | None = column(
        "pairwise interactions: matrices of values, standard errors and half intervals", optional=True
    )


@dataclass
class ShapleyMethod:
    """How even the values are, over the adapters of one training method."""

    method: str | None = column("training method")
    adapters: int = column("adapters", counts=True)
    variation: float = column("mean coefficient of variation")
    variation_spread: float = column("spread over the adapters")
    top_third: float = column("mean share of the largest third", "share")
    top_third_spread: float = column("spread over the adapters", "share")
    full: float = column("mean worth of all players together", "of the worth")
    full_spread: float = column("spread over the adapters", "of the worth")
    empty: float = column("mean worth of none", "of the worth")
    empty_spread: float = column("spread over the adapters", "of the worth")


@dataclass
class SweepRow(Adapted):
    """One way of pruning one adapter."""

    kind: str = column("structured, unstructured or rank")
    criterion: str = column("what is pruned first, or the pattern")
    label: str = column("the pattern, the sparsity or the rank kept")
    kept: float = column("share of the modules, entries or ranks that are kept", "share", form=".2f")
    draws: int = column("random draws of the criterion")


@dataclass
class SweepMethod:
    """One way of pruning, over the adapters of one training method."""

    method: str | None = column("training method")
    kind: str = column("structured, unstructured or rank")
    criterion: str = column("what is pruned first, or the pattern")
    label: str = column("the pattern, the sparsity or the rank kept")
    kept: float = column("share of the modules, entries or ranks that are kept", "share", form=".2f")
    adapters: int = column("adapters", counts=True)


KINDS = (
    Kind(
        "interpolate",
        "metrics along lines between adapters, and of mixtures of them",
        {"rows": LinePoint, "barriers": Barrier, "shrinkage": Shrinkage, "over_pairs": OverPairs},
        Paper(("members", "space", "metric", "barrier", "value"), "barriers"),
        version=2,
        optional=("shrinkage", "over_pairs"),
        open={"rows": MEASURED},
        summary={"matrix": "space → metric → barriers between all adapters, as a square; absent of one pair"},
        parameters={
            "points": "points on each line",
            "spaces": "what was averaged",
            "looks": "space → what figures call it, and its place among their colours (null: any)",
            "ratios": "weights of the mixtures",
            "behaviour": "file of texts beside the task; null for none",
            "texts": "how many these are, and a hash of them; only with such a file",
            "not_defined": "what of behaviour has no meaning on the tasks, a line each; only with such a file",
            "examples": "of the split; null for all",
            **METRICS,
            **ADAPTERS,
        },
    ),
    Kind(
        "stability",
        "metrics with some players off",
        {"rows": StabilityRow, "adapters": StabilityAdapter, "by_method": StabilityMethod},
        Paper(("adapter", "rescaled", "family", "label"), further_last=True),
        version=2,
        open={
            "rows": f"{MEASURED}, a mean over the keep-sets; its spread over them (accuracy_spread), its value of the "
            "worst one (accuracy_worst), and the players of that one (accuracy_worst_set)",
            "adapters": "each metric of the whole adapter",
        },
        parameters={
            **PLAYERS,
            **METRICS,
            "samples": "keep-sets of each size",
            "grid": "probabilities",
            "player_names": "the players, in order",
            **ADAPTERS,
        },
    ),
    Kind(
        "shapley",
        "Shapley values of parts of adapters",
        {"rows": ShapleyRow, "adapters": ShapleyAdapter, "by_method": ShapleyMethod},
        Paper(("adapter", "player", "value")),
        parameters={
            **PLAYERS,
            "worth": "what a coalition is worth: its unit",
            "estimator": "the estimator asked for; null for the one that the game decides",
            "order": "1: values; 2: pairwise interactions too",
            **ADAPTERS,
        },
    ),
    Kind(
        "sweep",
        "metrics of pruned adapters",
        {"rows": SweepRow, "by_method": SweepMethod},
        Paper(("adapter", "kind", "criterion", "label"), further_last=True),
        version=2,
        open={
            "rows": f"{MEASURED}, and its spread over the draws (accuracy_spread)",
            "by_method": "each metric, a mean over the adapters, and its spread",
        },
        parameters={
            "kinds": "structured, unstructured, rank",
            "criteria": "what was pruned first",
            **METRICS,
            **ADAPTERS,
        },
    ),
)
