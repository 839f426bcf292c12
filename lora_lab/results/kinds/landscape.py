"""What results about the loss around and between adapters hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_lab.results.rows import ADAPTERS, MEASURED, METRIC, METRICS, PLAYERS, Adapted
from lora_lab.results.schema import Kind, Paper, column


@dataclass
class PlanePoint:
    """One point of a plane."""

    x: float = column("distance from the first point along the line to the second", "‖ΔW‖", form=".2f")
    y: float = column("distance from that line, towards the third point", "‖ΔW‖", form=".2f")
    weights: list[Any] = column("weights of the three points, which sum to 1")
    norm: float = column("Frobenius norm of ΔW over all modules", form=".2f")
    matched_norm: float = column(
        "mean of the adapters' norms by these weights; null where the weights sum to 0 or less", form=".2f"
    )


@dataclass
class PlaneCorner(PlanePoint):
    """One of the three points that a plane goes through."""

    adapter: str = column("label of the adapter, or base")


@dataclass
class PlaneGain:
    """How much better the best point of a plane is than the best of its corners."""

    metric: str = column(METRIC)
    value: float = column(
        "how much worse the best corner is than the best point, both chosen on half of the examples, on the others"
    )
    low: float = column("low end of its interval")
    high: float = column("high end of its interval")
    x: float = column("where the best point lies", "‖ΔW‖", form=".2f")
    y: float = column("where the best point lies", "‖ΔW‖", form=".2f")


@dataclass
class OneGroup:
    """Which layer or group is mixed, and where all others come from."""

    group: str = column("the layer or group that is mixed")
    others: str = column("label of the adapter that all other layers are of")
    index: int = column("its place among the adapters given, from 0")


@dataclass
class LayerPoint(OneGroup):
    """One layer mixed, all others of one adapter."""

    t: float = column("share of the other adapter's ΔW in this layer", "share", form=".2f")


@dataclass
class LayerBarrier(OneGroup):
    """How much worse it gets where one layer is mixed."""

    metric: str = column(METRIC)
    value: float = column("how much worse than the chord it gets", "of the metric")
    low: float = column("low end of its interval", "of the metric")
    high: float = column("high end of its interval", "of the metric")
    exchange: float = column("how much worse at t = 1 than at 0: the whole layer exchanged", "of the metric")
    exchange_low: float = column("low end of its interval", "of the metric")
    exchange_high: float = column("high end of its interval", "of the metric")


@dataclass
class OnPath:
    """Which way between two adapters a row is about."""

    space: str = column("what is mixed: delta, aligned (factors, b's turned onto a's) or factors")
    path: str = column("line, matched line (at kept norm), or the curve")


@dataclass
class CurvePoint(OnPath):
    """One point of a line or curve between two adapters."""

    t: float = column("place on the curve, 0 the first adapter and 1 the second", form=".2f")
    arc: float = column("share of the curve's length in ‖ΔW‖ that lies behind it", "share", form=".2f")
    norm: float = column("Frobenius norm of ΔW over all modules", form=".2f")


@dataclass
class CurveBarrier(OnPath):
    """How much worse than its ends a line or curve gets."""

    metric: str = column(METRIC)
    by: str = column("what the chord is straight in: t or arc")
    barrier: str = column("definition: entezari, frankle or others by name")
    value: float = column("how much worse it gets; of midpoint the metric there", "of the metric")
    low: float = column("low end of its interval", "of the metric")
    high: float = column("high end of its interval", "of the metric")


@dataclass
class CurveMean(OnPath):
    """The mean of a metric over a line or curve."""

    metric: str = column(METRIC)
    by: str = column("over what it is a mean: t or arc")
    value: float = column("the mean", "of the metric")
    low: float = column("low end of its interval", "of the metric")
    high: float = column("high end of its interval", "of the metric")


@dataclass
class CurveGain(OnPath):
    """How much lower a curve's barrier is than a line's."""

    over: str = column("the line: line or matched line")
    metric: str = column(METRIC)
    value: float = column("barrier of the line − barrier of the curve", "of the metric")
    low: float = column("low end of its interval, paired over the examples", "of the metric")
    high: float = column("high end of its interval", "of the metric")


@dataclass
class Check:
    """A control point scored on the way."""

    step: int = column("optimiser steps so far")
    training_loss: float = column("mean training loss since the check before; null of the midpoint", "nats")
    validation_loss: float = column("mean validation loss over five places of the curve", "nats")


@dataclass
class CurveControl(OnPath):
    """A trained control point."""

    length: float = column("length of the curve in ‖ΔW‖", form=".2f")
    line_length: float = column("length of the straight line in the same space", form=".2f")
    rank: int = column("largest rank of the control point")
    step: int = column("after which step it was the best on validation; 0: the midpoint it started at")
    trace: list[Check] = column("the control point at every check")


@dataclass
class AlongRow:
    """One model at one step of training."""

    step: int = column("optimiser steps behind it")
    model: str = column("alone, pruned, midpoint (of two runs) or average (of all runs of a method, three or more)")
    space: str | None = column("what is averaged: delta, factors, matched …; null of alone and pruned")
    members: list[str] = column("labels of the runs whose checkpoints it is made of")
    indices: list[int] = column("their places among the runs given, from 0")
    method: str = column("training method of these runs; of one that records none, its label")
    p: float = column("probability p of the members' schedule at this step; null without a schedule")


@dataclass
class SharpnessRow(Adapted):
    """One adapter in one set of tensors."""

    at: str = column("trained (its own tensors), balanced (B = U√S, A = √S V) or initial (where training began)")
    parameters: int = column("numbers in these tensors")
    loss: float = column("mean loss over the examples", "nats")
    sharpness: float = column("largest eigenvalue of the Hessian")
    sharpness_low: float = column("low end of its interval over the examples, the eigenvector held")
    sharpness_high: float = column("high end of its interval")
    residual: float = column("‖Hx − λx‖ of that eigenvalue and its unit vector", form=".1e")
    iterations: int = column("Lanczos iterations")
    smallest: float = column("smallest eigenvalue found")
    trace: float = column("trace of the Hessian")
    trace_low: float = column("low end of its interval over random vectors and examples")
    trace_high: float = column("high end of its interval")
    adam_sharpness: float = column("largest eigenvalue of D^-½ H D^-½, D the root of Adam's second moment")
    adam_residual: float = column("residual of that eigenvalue", form=".1e")
    rate_gd: float = column("largest stable rate of gradient descent, 2/λ", form=".2g")
    rate_momentum: float = column("the same with momentum β = 0.9, 2(1 + β)/λ", form=".2g")
    rate_adam: float = column("the same of Adam, 2(1 + β)/((1 − β)λ) of its scaled Hessian", form=".2g")


@dataclass
class TriedRate(Adapted):
    """A learning rate that was tried for an adapter, by its record."""

    rate: float = column("learning rate", form=".2g")
    chosen: bool = column("whether it is that of the adapter")


KINDS = (
    Kind(
        "plane",
        "metrics on the plane through three adapters, or two and the base",
        {"rows": PlanePoint, "corners": PlaneCorner, "gains": PlaneGain},
        Paper(("adapter", "x", "y", "norm"), "corners", further_last=True),
        version=2,
        open={"rows": MEASURED, "corners": MEASURED},
        summary={"gram": "inner products of the three ΔW, as a square; zeros of the base"},
        parameters={
            "base": "whether the base is the third point",
            "points": "points on each side of the grid",
            "margin": "room beyond the three points, as a share of their extent",
            **METRICS,
            **ADAPTERS,
        },
    ),
    Kind(
        "layerwise",
        "metrics with one layer at a time mixed between two adapters",
        {"rows": LayerPoint, "barriers": LayerBarrier},
        Paper(("group", "others", "metric", "value", "exchange"), "barriers"),
        version=2,
        open={"rows": MEASURED},
        parameters={
            **PLAYERS,
            "points": "points on each line",
            "examples": "of the split; null for all",
            **METRICS,
            **ADAPTERS,
        },
    ),
    Kind(
        "curve",
        "metrics on curves with a trained control point between two adapters, and on straight lines",
        {
            "rows": CurvePoint,
            "barriers": CurveBarrier,
            "means": CurveMean,
            "gains": CurveGain,
            "controls": CurveControl,
        },
        Paper(("space", "path", "over", "metric", "value"), "gains"),
        version=2,
        open={"rows": MEASURED},
        parameters={
            "shapes": "the curves",
            "spaces": "what was mixed",
            "points": "points on each of them",
            "looks": "curve → what figures call it, and its place among their colours (null: any)",
            "steps": "optimiser steps of each control point; null for the task's",
            "learning_rate": "peak learning rate; null for the task's",
            "batch_size": "examples per batch; null for the task's",
            "rank": "of the control point where ΔW is mixed; null for that of the midpoint",
            "checks": "how often the control point was scored on the validation split",
            "examples": "of the split; null for all",
            **METRICS,
            **ADAPTERS,
        },
    ),
    Kind(
        "checkpoints",
        "metrics along training: checkpoints alone, pruned, and averaged with those of other runs",
        {"rows": AlongRow},
        Paper(("step", "model", "space", "method"), further_last=True),
        version=2,
        open={
            "rows": f"{MEASURED}, and how much worse it is than the mean of the members alone, 0 of one alone "
            "(accuracy_worse, accuracy_worse_low …)"
        },
        parameters={
            "spaces": "in which midpoints were taken",
            "keep": "pattern of the modules kept of pruned checkpoints",
            "examples": "of the split; null for all",
            "steps": "optimiser steps at which all runs have a checkpoint",
            **METRICS,
            "runs": "label, method and seed of each run",
        },
    ),
    Kind(
        "sharpness",
        "the curvature of the loss around adapters, and the learning rates that it allows",
        {"rows": SharpnessRow, "rates": TriedRate},
        Paper(("adapter", "at", "sharpness", "trace", "rate_gd", "rate_momentum", "rate_adam")),
        version=2,
        open={"rates": "each metric on the validation split; null where the training diverged, or unknown"},
        parameters={
            "iterations": "Lanczos iterations at most",
            "probes": "random vectors for the trace",
            "examples": "examples of the split; null for all",
            "metrics": "metric → about, unit, and higher: whether more is better; the loss first",
            **ADAPTERS,
        },
    ),
)
