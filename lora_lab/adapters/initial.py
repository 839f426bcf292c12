"""Whether adapters began from the same A, as those of one seed do: told from what they have become."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_lab.adapters.adapter import Adapter

FLAGGED = 5.0
"""Standard deviations of chance above which two A are called alike."""


def shared_start(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """How alike the A of every two adapters are, row by row: the mean cosine, the same against chance, and a verdict.

    The cosine of two independent A of r rows and d columns has standard deviation 1/√(rd), so that z = cosine · √(rd)
    is standard normal. `z` is the mean over modules and pairs; `shared` is true where that of every pair is above 5,
    false where that of none is, None where some are, or where there is nothing to compare (other tuners, other ranks).
    """
    similarities = [pair for a, b in itertools.combinations(adapters, 2) if (pair := _pair(a, b))]
    if not similarities:
        return {"cosine": None, "z": None, "shared": None}
    alike = {z > FLAGGED for _, z in similarities}
    cosine, z = (sum(values) / len(similarities) for values in zip(*similarities, strict=True))
    return {"cosine": cosine, "z": z, "shared": alike.pop() if len(alike) == 1 else None}


def _pair(a: Adapter, b: Adapter) -> tuple[float, float] | None:
    """Mean cosine and mean z over the modules in which the A are of one shape."""
    found = [alike(a, b, name) for name in sorted(a.sites.keys() & b.sites.keys())]  # a set's order changes
    values = [value for value in found if value is not None]
    if not values:
        return None
    cosine, z = (sum(each) / len(values) for each in zip(*values, strict=True))
    return cosine, z


def alike(a: Adapter, b: Adapter, name: str) -> tuple[float, float] | None:
    """Cosine and z of the A of one module as they lie in the files; None without two of one shape that are not 0."""
    return cosine_of(start_of(a, name), start_of(b, name))


def start_of(adapter: Adapter, name: str) -> tuple[Tensor, float] | None:
    """The A of one module as it lies in the file, in float64, and its norm; None where there is none, or it is 0."""
    key = adapter.sites[name].keys.get("lora_A")
    if key is None:
        return None
    A = adapter.tensors[key].double()
    norm = float(A.norm())
    return (A, norm) if norm else None


def cosine_of(one: tuple[Tensor, float] | None, other: tuple[Tensor, float] | None) -> tuple[float, float] | None:
    """Cosine and z of two A with their norms; None without two of one shape."""
    if one is None or other is None or one[0].shape != other[0].shape:
        return None
    cosine = float(torch.dot(one[0].flatten(), other[0].flatten())) / one[1] / other[1]
    return cosine, cosine * math.sqrt(one[0].numel())
