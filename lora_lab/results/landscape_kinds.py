"""What results about the loss around and between adapters hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_lab.results.rows import ADAPTERS, Accuracy, Loss
from lora_lab.results.schema import Kind, Paper, column


@dataclass
class PlanePoint(Loss, Accuracy):
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

    metric: str = column("loss or error")
    value: float = column("best corner − best point, both chosen on half of the examples and compared on the others")
    low: float = column("low end of its interval")
    high: float = column("high end of its interval")
    x: float = column("where the best point lies", "‖ΔW‖", form=".2f")
    y: float = column("where the best point lies", "‖ΔW‖", form=".2f")


KINDS = (
    Kind(
        "plane",
        "accuracy and loss on the plane through three adapters, or two and the base",
        {"rows": PlanePoint, "corners": PlaneCorner, "gains": PlaneGain},
        Paper(("adapter", "x", "y", "norm", "accuracy", "loss"), "corners"),
        summary={"gram": "inner products of the three ΔW, as a square; zeros of the base"},
        parameters={
            "base": "whether the base is the third point",
            "points": "points on each side of the grid",
            "margin": "room beyond the three points, as a share of their extent",
            **ADAPTERS,
        },
    ),
)
