"""Adapters of stochastic depth as its paper scores them: each group's ΔW times how often it was on in training.

Huang et al. 2016 (arXiv:1603.09382, equation 5) multiply a block's branch by its survival rate at test time. Where the
branch is a LoRA update that is exact: ΔW × p is the same factors at p times the scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.formats.keys import anchored
from lora_lab.adapters.groups import group
from lora_lab.errors import OptionError, TunerError
from lora_lab.training.schedule import Schedule

UNSCALED, SCALED = "stochastic-depth", "stochastic-depth-scaled"
"""The methods of adapters as they were trained, and with their updates scaled."""


def rates(schedule: Schedule, groups: Sequence[str]) -> dict[str, float]:
    """Group → the chance that it is on in a step of stochastic depth, which is the same in all steps."""
    return dict(zip(groups, schedule.survival(len(groups)), strict=True))


def scaled(adapter: Adapter) -> Adapter:
    """The adapter with every ΔW multiplied by its group's survival rate, as its record has it; the factors stay.

    The scales go into alpha_pattern, one key a module. One training so gives both adapters: as trained, and as the
    paper scores it. Raises OptionError where the record has no survival rates or they are in already, TunerError where
    ΔW is not scale · B A.
    """
    source, record = adapter.source or "the adapter", adapter.record
    survival = record.get("survival")
    if record.get("method") == SCALED:
        raise OptionError(f"{source}: its updates are multiplied by their survival rates already")
    if not isinstance(survival, Mapping):
        raise OptionError(f"{source}: its record has no survival rates; an adapter of stochastic depth is needed")
    adapter.require_additive()
    chances = {name: survival.get(label) for label, held in _groups(adapter).items() for name in held}
    alphas, sites = {}, {}
    for name, site in adapter.sites.items():
        chance = chances[name]
        if not isinstance(chance, int | float) or not 0 <= chance <= 1:
            raise OptionError(f"{source}: its record has no survival rate between 0 and 1 for {name}")
        if site.scale is None or not site.rank:
            raise TunerError(f"{source}: {name} has no scale that a survival rate could multiply")
        divisor = math.sqrt(site.rank) if adapter.config.get("use_rslora") else site.rank
        alphas[anchored(name)] = site.scale * chance * divisor
        sites[name] = dataclasses.replace(site, scale=site.scale * chance)
    kept = {key: value for key, value in record.items() if key != "metrics"}  # those are of the unscaled adapter
    return dataclasses.replace(
        adapter,
        config={**adapter.config, "alpha_pattern": alphas},
        sites=sites,
        record={**kept, "method": SCALED},
    )


def _groups(adapter: Adapter) -> dict[str, list[str]]:
    recipe: Any = adapter.record.get("recipe")
    return group(
        list(adapter.sites), recipe["groups"] if isinstance(recipe, Mapping) and "groups" in recipe else "block"
    )
