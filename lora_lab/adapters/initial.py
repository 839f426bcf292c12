"""Whether adapters began from the same A, as those of one seed do: told from what they have become."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

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
    keys = [adapter.sites[name].keys.get("lora_A") for adapter in (a, b)]
    if None in keys:
        return None
    one, two = (adapter.tensors[str(key)].double().flatten() for adapter, key in zip((a, b), keys, strict=True))
    if one.shape != two.shape or not (float(one.norm()) and float(two.norm())):
        return None
    cosine = float(torch.dot(one, two) / one.norm() / two.norm())
    return cosine, cosine * math.sqrt(len(one))
