"""PEFT's adapter format: what its keys and its configuration mean.

`parse` never raises on what a tensor or a configuration says: it lists problems, so that `inspect` can report
on files that everything else refuses.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_lab.adapters.formats import beside, checks, keys
from lora_lab.adapters.formats.keys import PREFIX, natural_key
from lora_lab.adapters.formats.peft.peft_config import (
    brief,
    changes_base,
    count,
    number,
    parameter_sites,
    pattern_values,
    patterns_of,
    too_large,
    tuner_of,
)
from lora_lab.adapters.formats.sites import PLAIN, Parsed, Site
from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import AdapterError, shorten
from lora_lab.files import in_memory

VARIANTS = ("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config")


def parse(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str, adapter_name: str | None = None
) -> Parsed:
    """Bring keys to PEFT's canonical form, group them by module and check them against the configuration.

    `where` names the file in messages; `adapter_name` picks one adapter where the keys hold several.
    """
    parsed = Parsed()
    tuner, prefix = tuner_of(config), _prefix(tuner_of(config), where)
    bad_name = keys.unusable(tensors)
    if bad_name:
        parsed.problems.append(f"{where}: {bad_name}")
        return parsed
    sorted_keys = _Keys(parsed, keys.masked(tensors), prefix, bare=tuner == "ADALORA")
    name = _choose(parsed, sorted_keys, tensors, tuner, where, adapter_name)
    if name is None:
        return parsed
    if sorted_keys.clashes[name]:
        parsed.problems.append(f"{where}: two tensors each for {shorten(sorted_keys.clashes[name])}")
    modules = sorted_keys.by_name.get(name, {})
    try:
        settings = _Settings(config, modules)
        for module in sorted(modules, key=natural_key):
            _add_site(parsed, module, modules[module], config, settings, where)
        _check_ranks(parsed, settings, where)
        _add_others(parsed, sorted_keys, name, settings, config, where)
        checks.configuration(parsed, config, where)
    except AdapterError as error:
        parsed.problems.append(f"{where}: {error}")
    checks.values(parsed, where)
    checks.gathered(parsed)
    checks.replaced(parsed)
    moved = keys.misplaced(tensors)
    if moved:
        parsed.warnings.append(
            f"{len(moved)} keys have {PREFIX!r} behind another name ({shorten(moved, 1)}): read as one path, though "
            "PEFT itself would attach nothing"
        )
    return parsed


class _Keys:
    """The file's tensors by adapter, module and part; what belongs to no module of the tuner is `loose`."""

    def __init__(self, parsed: Parsed, tensors: Mapping[str, Tensor], prefix: str, *, bare: bool) -> None:
        self.by_name: dict[str, dict[str, dict[str, tuple[str, Tensor]]]] = {}
        self.clashes: dict[str, list[str]] = defaultdict(list)
        self.loose: list[tuple[str, Tensor]] = []
        for raw, tensor in tensors.items():
            shared = raw.startswith("base_model.") and not raw.startswith(PREFIX)
            if shared and prefix != "lora_":  # by all modules, as VeRA's A and B
                parsed.tensors[raw] = tensor
                parsed.others.append(raw)
                continue
            split = keys.split(keys.clean(raw), prefix, bare=bare)
            if split is None:
                self.loose.append((keys.clean(raw), tensor))
                continue
            module, part, name = split
            parts = self.by_name.setdefault(name, {}).setdefault(module, {})
            if part in parts:
                self.clashes[name].append(f"{module}.{part}")
            parts[part] = (raw, tensor)


def _choose(
    parsed: Parsed, sorted_keys: _Keys, tensors: Mapping[str, Tensor], tuner: str, where: str, adapter_name: str | None
) -> str | None:
    """The name in the keys of the adapter that is read; None, with a problem noted, where there is no such one."""
    if not (sorted_keys.by_name or parsed.others):
        what = "LoRA" if tuner == "LORA" else tuner
        parsed.problems.append(f"{where}: no {what} tensors found{_other_content(tensors)}")
        return None
    listed = [repr(name) if name else "(unnamed)" for name in sorted(sorted_keys.by_name)]
    if adapter_name is None and len(sorted_keys.by_name) > 1:
        parsed.problems.append(
            f"{where}: holds several adapters, {' and '.join(listed)}; choose one with `adapter_name`"
        )
        return None
    if adapter_name is not None and adapter_name not in sorted_keys.by_name:
        parsed.problems.append(f"{where}: has no adapter {adapter_name!r}; it holds {shorten(listed)}")
        return None
    return next(iter(sorted_keys.by_name), "") if adapter_name is None else adapter_name


class _Settings:
    """Rank and alpha that the configuration gives each module."""

    def __init__(self, config: Mapping[str, Any], names: Collection[str]) -> None:
        self.ranks: dict[str, Any] = {}
        self.alphas: dict[str, Any] = {}
        self.parameters = parameter_sites(config, names)
        if tuner_of(config) == "LORA":
            self.ranks = pattern_values(patterns_of(config, "rank_pattern"), names, config.get("r"))
            self.alphas = pattern_values(patterns_of(config, "alpha_pattern"), names, config.get("lora_alpha"))


def update(site: Site, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRank:
    """ΔW of one LoRA site, the scale folded into B, in the layout of the stored weight."""
    A, B = (in_memory(tensors[site.keys[part]]) for part in site.pair)
    dtype = torch.float64 if torch.float64 in (A.dtype, B.dtype) else torch.float32
    A, B = A.to(dtype), B.to(dtype) if site.scale in (None, 1.0) else B.to(dtype) * site.scale
    if site.kind == "embedding" or (site.kind == "linear" and config.get("fan_in_fan_out")):
        return LowRank(B.T.contiguous(), A.T.contiguous())
    if site.kind == "linear":
        return LowRank(A, B)
    return LowRank(A.flatten(1), B.flatten(1), (B.shape[0], *A.shape[1:]))


def shape_of(site: Site, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of `update`, from those of the factors alone."""
    A, B = (tuple(tensors[site.keys[part]].shape) for part in site.pair)
    if site.kind == "embedding" or (site.kind == "linear" and config.get("fan_in_fan_out")):
        return A[1], B[0]
    return B[0], *A[1:]


def why_not_additive(config: Mapping[str, Any], sites: Collection[Site]) -> str | None:
    """Why ΔW is not scale · B A for this adapter, or None if it is."""
    tuner, init = tuner_of(config), str(config.get("init_lora_weights")).lower()
    if tuner != "LORA":
        return f"{tuner} updates are no plain product B A"
    if config.get("use_dora") or any("lora_magnitude_vector" in site.keys for site in sites):
        return "DoRA rescales the columns of the base weight, so its ΔW needs the base model"
    if changes_base(config):
        return (
            f"init_lora_weights={init!r} ({'PiSSA' if init.startswith('pissa') else init}) changes the base weights, "
            "so ΔW is not B A; convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    for variant in VARIANTS:
        if config.get(variant):
            return f"{variant} makes it a LoRA variant whose ΔW is no plain product B A"
    if any(part.endswith(".bias") for site in sites for part in site.keys):
        return "lora_bias adds a bias, which ΔW does not hold"
    if any(site.kind == "parameter" for site in sites):
        return "target_parameters adapts a stack of weights, expert by expert"
    strange = sorted({part for site in sites for part in site.keys} - PLAIN)
    if strange:
        return f"{shorten(strange)} is no part of a plain LoRA"
    return None


def _prefix(tuner: str, where: str) -> str:
    if tuner in ("LORA", "ADALORA"):
        return "lora_"
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    by_name = {str(kind).rpartition(".")[2].upper(): prefix for kind, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items()}
    if tuner not in by_name:
        raise AdapterError(f"{where}: peft_type {brief(tuner)} is none that the installed PEFT knows")
    return str(by_name[tuner]).replace("lambda_", "")  # VeRA's prefix names only one of its two vectors


def _add_site(
    parsed: Parsed,
    module: str,
    parts: Mapping[str, tuple[str, Tensor]],
    config: Mapping[str, Any],
    settings: _Settings,
    where: str,
) -> None:
    tuner = tuner_of(config)
    keys = {}
    for part, (raw, tensor) in parts.items():
        keys[part] = key = f"{PREFIX}{module}.{_canonical(part, raw) if tuner in ('LORA', 'ADALORA') else part}"
        parsed.tensors[key] = tensor
    if tuner != "LORA":
        parsed.sites[module] = Site(module, tuner.lower(), keys)
        return
    embedding = any(part.startswith("lora_embedding") for part in parts)
    site = Site(module, "embedding" if embedding else "linear", keys)
    pair = site.pair
    missing = [part for part in pair if part not in parts]
    if missing:
        parsed.sites[module] = site
        parsed.problems.append(f"{where}: {module} has no {missing[0]}, half of its pair is missing")
        return
    A, B = parts[pair[0]][1], parts[pair[1]][1]
    kind, rank = site.kind, A.shape[0] if A.ndim else 0
    if A.ndim > 2:
        kind = f"conv{A.ndim - 2}d"
    if A.ndim != B.ndim or A.ndim < 2 or not A.numel() or not B.numel() or B.shape[1] != rank:
        reason = (
            "tensors of a sharded save that was not gathered?"
            if A.ndim < 2 or B.ndim < 2 or not A.numel() or not B.numel()
            else "a grouped convolution or another adapter's half?"
        )
        parsed.sites[module] = Site(module, kind, keys)
        parsed.problems.append(
            f"{where}: {module}: lora_A {list(A.shape)} and lora_B {list(B.shape)} are no pair ({reason})"
        )
        return
    if not (A.is_floating_point() and B.is_floating_point()):
        parsed.problems.append(f"{where}: {module}: {A.dtype} and {B.dtype} factors; floating point is needed")
    expected = count(settings.ranks[module])
    if module in settings.parameters:
        kind = "parameter"
    rank_for_scale = expected if kind == "parameter" and expected and rank % expected == 0 else rank
    alpha, scale = number(settings.alphas[module]), None
    if alpha is None:
        parsed.problems.append(
            f"{where}: {module}: lora_alpha is {brief(settings.alphas[module])}; a number belongs there"
        )
    else:
        scale = alpha / (math.sqrt(rank_for_scale) if config.get("use_rslora") is True else rank_for_scale)
        if excess := too_large(scale):
            parsed.problems.append(f"{where}: {module}: {excess}: lora_alpha is {alpha:.4g}, the rank {rank}")
    parsed.sites[module] = Site(module, kind, keys, rank, scale)


def _canonical(part: str, raw: str) -> str:
    """The end of a PEFT key: modules carry .weight or .bias, bare parameters nothing."""
    if part.endswith(".bias"):
        return part
    bare = part.startswith(("lora_embedding", "lora_magnitude_vector")) or not raw.endswith(".weight")
    return part if bare else part + ".weight"


def _check_ranks(parsed: Parsed, settings: _Settings, where: str) -> None:
    by_ranks: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, site in parsed.sites.items():
        expected = count(settings.ranks.get(name))
        if expected and site.rank and expected != site.rank and site.kind != "parameter":
            by_ranks[site.rank, expected].append(name)
    for (rank, expected), names in by_ranks.items():
        parsed.problems.append(
            f"{where}: rank {rank} in the file and {expected} in the config, on which the scale depends "
            f"(an edited config, or one shard of a save?): {shorten(names)}"
        )


def _add_others(
    parsed: Parsed, sorted_keys: _Keys, chosen: str, settings: _Settings, config: Mapping[str, Any], where: str
) -> None:
    alphas = {name: number(settings.alphas.get(name)) for name in parsed.sites if name not in settings.parameters}
    strict = tuner_of(config) == "LORA"
    other = beside.others(sorted_keys.loose, chosen, sorted_keys.by_name, alphas, config, strict=strict)
    parsed.tensors |= other.tensors
    parsed.others += other.tensors
    parsed.warnings += other.warnings
    parsed.problems += [f"{where}: {problem}" for problem in other.problems]


def _other_content(tensors: Mapping[str, Tensor]) -> str:
    if not tensors:
        return ": the file holds none at all (an emptied state_dict was saved?)"
    held = f"; it holds {shorten(tensors)}: "
    if all("." not in key and tensor.ndim <= 2 for key, tensor in tensors.items()):
        return held + "embeddings of new words (textual inversion)? They are no adapter"
    if all(key.endswith((".weight", ".bias")) for key in tensors) and not any(map(keys.odd_content, tensors)):
        return held + "a whole model, not an adapter? What it differs by from its base can be extracted as one"
    return held + "another tuner's file? Its adapter_config.json is needed, which says so by peft_type"
