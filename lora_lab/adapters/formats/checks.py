"""What is wrong, or odd, with an adapter file that could be taken apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_lab.adapters.formats.keys import PREFIX
from lora_lab.adapters.formats.peft.matching import by_ending, shown
from lora_lab.adapters.formats.peft.peft_config import (
    field_notes,
    field_problems,
    missing_saved,
    not_placed,
    patterns_of,
    tuner_of,
)
from lora_lab.adapters.formats.sites import PLAIN, Parsed
from lora_lab.errors import shorten

_OF_VARIANTS = {
    "lora_diag": "kasa_config",
    "lora_arrow": "arrow_config",
    "lora_monteclora_sampler": "monteclora_config",
}
"""Part → the field with which PEFT's layers have it."""


def values(parsed: Parsed, where: str) -> None:
    """Note every tensor with NaN or Inf in it, with their number, and tell how many modules have ΔW = 0."""
    ends = {key: _ends(tensor) for key, tensor in parsed.tensors.items()}
    bad = []
    for key, tensor in parsed.tensors.items():
        if tensor.is_floating_point() and not all(map(math.isfinite, ends[key])):
            count = tensor.numel() - int(torch.isfinite(tensor.bfloat16() if tensor.itemsize < 2 else tensor).sum())
            bad.append(f"{key.removeprefix(PREFIX)} ({count} of {tensor.numel()})")
    if bad:
        parsed.problems.append(f"{where}: non-finite values (NaN or Inf) in {shorten(bad, 8)}")
    pairs = [site for site in parsed.sites.values() if site.scale is not None]
    zero = [s for s in pairs if not s.scale or any(not any(ends[s.keys[part]]) for part in s.pair)]
    if zero:
        parsed.warnings.append(
            f"{len(zero)} of {len(pairs)} modules have zero delta (untrained?): {shorten(s.name for s in zero)}"
        )


def _ends(tensor: Tensor) -> tuple[float, float]:
    """The smallest and the largest entry, NaN where there is one; of complex numbers, of their parts."""
    if not tensor.numel():
        return 0.0, 0.0
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if plain.is_floating_point() and plain.itemsize < 2:
        plain = plain.bfloat16()
    elif plain.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which torch does not order
        plain = plain.double()
    low, high = plain.aminmax()
    return float(low), float(high)


def gathered(parsed: Parsed) -> None:
    """Tell of rows of B, or columns of A, that are zero at the same place in all modules: shards not gathered."""
    for part, dim, what in (("lora_B", 0, "rows"), ("lora_A", 1, "columns")):
        spans = set()
        for site in parsed.sites.values():
            tensor = parsed.tensors[site.keys[part]] if site.scale is not None and part in site.keys else None
            if tensor is not None and tensor.ndim == 2 and tensor.is_floating_point() and tensor.any():
                spans.add(_empty_span(tensor.any(1 - dim).tolist()))
            if None in spans or len(spans) > 1:
                break
        if len(spans) == 1 and None not in spans and len(parsed.sites) > 1:
            start, end = next(iter(spans)) or (0.0, 0.0)
            parsed.warnings.append(
                f"{what} of {part} from {start:.0%} to {end:.0%} are zero in every module (shards that were not "
                "gathered before the save?)"
            )


def replaced(parsed: Parsed) -> None:
    """Tell of whole weights of adapted modules; with an embedding that has grown, PEFT saves them as a rule."""
    whole = [
        name
        for name, site in parsed.sites.items()
        if site.scale is not None and site.kind != "embedding" and f"{PREFIX}{name}.base_layer.weight" in parsed.others
    ]
    if whole:
        parsed.warnings.append(
            f"{len(whole)} adapted modules come with a whole weight (base_layer.weight), which takes the place of the "
            f"base model's own and which ΔW does not hold: {shorten(whole)}"
        )


def _empty_span(filled: list[bool]) -> tuple[float, float] | None:
    """Begin and end of the longest run of zeros, as shares of the whole; None for one alone or less than an eighth."""
    length, start, best = len(filled), 0, (0, 0)
    for i in range(length + 1):
        if i == length or filled[i]:
            if i - start > best[1] - best[0]:
                best = (start, i)
            start = i + 1
    run = best[1] - best[0]
    return (best[0] / length, best[1] / length) if run > 1 and 8 * run >= length else None


def configuration(parsed: Parsed, config: Mapping[str, Any], where: str) -> None:
    """Hold the configuration against the file: where PEFT would run another adapter it is a problem, else a note."""
    lora = tuner_of(config) == "LORA"
    wrong = field_problems(config) if lora else []
    parsed.problems += [f"{where}: {problem}" for problem in wrong]
    if wrong:
        return
    gone, fields = not_placed(config, {name: site.kind for name, site in parsed.sites.items()})
    if gone:
        parsed.problems.append(
            f"{where}: {fields} of the config leaves out modules that the file has tensors for, which PEFT would drop: "
            f"{shorten(gone)}"
        )
    missing = missing_saved(config, [key.removeprefix(PREFIX) for key in parsed.others])
    if missing:
        parsed.warnings.append(
            f"modules_to_save names {shorten(missing)}, of which the file has no tensor: the base model's own stay"
        )
    if not lora:
        return
    parsed.warnings += field_notes(config)
    for field_name in ("rank_pattern", "alpha_pattern"):
        idle = [key for key, names in by_ending(patterns_of(config, field_name), parsed.sites).items() if not names]
        if idle:
            parsed.warnings.append(f"{field_name} key {shorten(map(shown, idle))} matches no module and has no effect")
    parsed.problems += [f"{where}: {problem}" for problem in _unlike_the_file(parsed, config)]
    if config.get("alora_invocation_tokens"):
        parsed.warnings.append("alora_invocation_tokens: the update acts only after those tokens")


def _unlike_the_file(parsed: Parsed, config: Mapping[str, Any]) -> list[str]:
    """Switches of the configuration and tensors of the file that PEFT would not bring together."""
    problems = []
    magnitudes = [name for name, site in parsed.sites.items() if "lora_magnitude_vector" in site.keys]
    if magnitudes and not config.get("use_dora"):
        problems.append(f"lora_magnitude_vector of {shorten(magnitudes)}, but use_dora is off, so PEFT would drop it")
    if config.get("use_dora") and len(magnitudes) < len(parsed.sites):
        bare = [name for name in parsed.sites if name not in magnitudes]
        problems.append(f"use_dora is on, but there is no lora_magnitude_vector of {shorten(bare)}")
    expected = PLAIN | {"lora_magnitude_vector", "lora_A.bias", "lora_B.bias"} | set(_OF_VARIANTS)
    for name, site in parsed.sites.items():
        off = [part for part in site.keys if not (part in expected and config.get(_OF_VARIANTS.get(part, "peft_type")))]
        if off:
            problems.append(f"{name}: {shorten(off)} belongs to no LoRA as the config describes it")
    biased = [name for name, site in parsed.sites.items() if any(part.endswith(".bias") for part in site.keys)]
    if biased and not config.get("lora_bias"):
        problems.append(f"a bias inside the adapter of {shorten(biased)}, but lora_bias is off, so PEFT would drop it")
    return problems
