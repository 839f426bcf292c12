"""PEFT's adapter format: what its keys and its configuration mean.

`parse` never raises on what a tensor or a configuration says: it lists problems, so that `inspect` can report
on files that everything else refuses.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_lab.errors import AdapterError, some
from lora_lab.lowrank import LowRank

PREFIX = "base_model.model."
"""What PEFT puts before the module's name in every key."""

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_LEADING = re.compile(r"^(?:module\.|base_model\.model\.)")
_BASE_CHANGING = re.compile(r"^(pissa|olora|corda|loftq|lora_ga)")
VARIANTS = ("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config")

_PLAIN = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"})

# What an early PEFT wrote and a later one removed, and it never changed a plain adapter.
_LEGACY = {"enable_lora", "merge_weights"}


@dataclass(frozen=True)
class Site:
    """One adapted module: its name in the base model and the keys of its adapter tensors by part."""

    name: str
    kind: str
    """linear, embedding, conv1d … conv3d, or parameter (a stack of expert weights); tuner name for others."""
    keys: Mapping[str, str]
    """Part (lora_A, lora_B, hada_w1_a …, with .bias where it is one) → key in the adapter's tensors."""
    rank: int | None = None
    scale: float | None = None

    @property
    def pair(self) -> tuple[str, str]:
        """Parts that hold A and B."""
        return ("lora_embedding_A", "lora_embedding_B") if self.kind == "embedding" else ("lora_A", "lora_B")


@dataclass
class Parsed:
    """An adapter file taken apart."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def tuner_of(config: Mapping[str, Any]) -> str:
    """PEFT's type of the adapter in upper case, LORA where the configuration names none."""
    return str(config.get("peft_type") or "LORA").rpartition(".")[2].upper()


def parse(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str, adapter_name: str | None = None
) -> Parsed:
    """Bring keys to PEFT's canonical form, group them by module and check them against the configuration.

    `where` names the file in messages; `adapter_name` picks one adapter where the keys hold several.
    """
    parsed = Parsed()
    tuner, prefix = tuner_of(config), _prefix(tuner_of(config), where)
    by_name: dict[str, dict[str, dict[str, tuple[str, Tensor]]]] = {}
    clashes: dict[str, list[str]] = defaultdict(list)
    loose: list[tuple[str, Tensor]] = []
    for raw, tensor in tensors.items():
        shared = raw.startswith("base_model.") and not raw.startswith(PREFIX)
        if shared and prefix != "lora_":  # by all modules, as VeRA's A and B
            parsed.tensors[raw] = tensor
            parsed.others.append(raw)
            continue
        split = _split(_clean(raw), prefix)
        if split is None:
            loose.append((_clean(raw), tensor))
            continue
        module, part, name = split
        parts = by_name.setdefault(name, {}).setdefault(module, {})
        if part in parts:
            clashes[name].append(f"{module}.{part}")
        parts[part] = (raw, tensor)
    foreign = _foreign_format(tensors)
    if foreign or not (by_name or parsed.others):
        parsed.problems.append(
            f"{where}: no {'LoRA' if tuner == 'LORA' else tuner} tensors found{foreign or _other_content(tensors)}"
        )
        return parsed
    listed = [repr(name) if name else "(unnamed)" for name in sorted(by_name)]
    if adapter_name is None and len(by_name) > 1:
        parsed.problems.append(
            f"{where}: holds several adapters, {' and '.join(listed)}; choose one with --adapter-name"
        )
        return parsed
    if adapter_name is not None and adapter_name not in by_name:
        parsed.problems.append(f"{where}: has no adapter {adapter_name!r}; it holds {some(listed)}")
        return parsed
    chosen = next(iter(by_name), "") if adapter_name is None else adapter_name
    if clashes[chosen]:
        parsed.problems.append(f"{where}: two tensors each for {some(clashes[chosen])}")
    found = by_name.get(chosen, {})
    for module in sorted(found, key=natural):
        _add_site(parsed, module, found[module], config, tuner, where)
    _check_ranks(parsed, config, where)
    _add_others(parsed, loose, chosen, by_name, config)
    _check_finite(parsed, where)
    _check_patterns(parsed, config, where)
    _check_zero(parsed)
    _check_config(parsed, config, where)
    return parsed


def update(site: Site, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRank:
    """ΔW of one LoRA site, the scale folded into B, in the layout of the stored weight."""
    A, B = (tensors[site.keys[part]] for part in site.pair)
    dtype = torch.float64 if torch.float64 in (A.dtype, B.dtype) else torch.float32
    A, B = A.to(dtype), B.to(dtype) * (1.0 if site.scale is None else site.scale)
    if site.kind == "embedding" or (site.kind == "linear" and config.get("fan_in_fan_out")):
        return LowRank(B.T.contiguous(), A.T.contiguous())
    if site.kind == "linear":
        return LowRank(A, B)
    return LowRank(A.flatten(1), B.flatten(1), (B.shape[0], *A.shape[1:]))


def why_not_additive(config: Mapping[str, Any], sites: Collection[Site]) -> str | None:
    """Why ΔW is not scale · B A for this adapter, or None if it is."""
    tuner, init = tuner_of(config), str(config.get("init_lora_weights")).lower()
    if tuner != "LORA":
        return f"{tuner} updates are no plain product B A"
    if config.get("use_dora") or any("lora_magnitude_vector" in site.keys for site in sites):
        return "DoRA rescales the columns of the base weight, so its ΔW needs the base model"
    if _BASE_CHANGING.match(init):
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
    strange = sorted({part for site in sites for part in site.keys} - _PLAIN)
    if strange:
        return f"{some(strange)} is no part of a plain LoRA"
    return None


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """PEFT's look-up in rank_pattern and alpha_pattern: the first key that matches the end of the name."""
    for key, value in patterns.items():
        if _matches(key, name):
            return value
    return default


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error:
        return False


def _prefix(tuner: str, where: str) -> str:
    if tuner in ("LORA", "ADALORA"):
        return "lora_"
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    by_name = {str(kind).rpartition(".")[2].upper(): prefix for kind, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items()}
    if tuner not in by_name:
        raise AdapterError(f"{where}: peft_type {tuner!r} is none that the installed PEFT knows")
    return str(by_name[tuner]).replace("lambda_", "")  # VeRA's prefix names only one of its two vectors


def _clean(key: str) -> str:
    """The key without the prefixes of PEFT and of the wrappers (torch.compile, DDP, FSDP, checkpointing)."""
    key = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    while _LEADING.match(key):
        key = _LEADING.sub("", key, count=1)
    return key


def _split(key: str, prefix: str) -> tuple[str, str, str] | None:
    """Module, part and adapter name ('' for none) of an adapter tensor's key; None for any other tensor."""
    match = re.match(rf"^(?P<module>.+?)\.(?P<part>{prefix}\w+)(?P<rest>(?:\..+)?)$", key)
    if not match:
        return None
    module, part, rest = match["module"], match["part"], match["rest"].removeprefix(".")
    if prefix != "lora_":  # parts may themselves be dotted, so only PEFT's usual name counts as one
        parts = rest.split(".")
        name = "default" if "default" in parts else ""
        return module, ".".join([part, *(p for p in parts if p and p != name)]), name
    name, _, last = rest.rpartition(".")
    if last in ("weight", "bias"):
        return module, part + (".bias" if last == "bias" else ""), name
    return module, part, rest


def _add_site(
    parsed: Parsed,
    module: str,
    parts: Mapping[str, tuple[str, Tensor]],
    config: Mapping[str, Any],
    tuner: str,
    where: str,
) -> None:
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
    expected = _config_rank(config, module)
    if expected and expected != rank and config.get("target_parameters") and rank % expected == 0:
        kind = "parameter"
    rank_for_scale = expected if kind == "parameter" and expected else rank
    alpha = pattern_value(_patterns(config, "alpha_pattern"), module, config.get("lora_alpha"))
    scale = None
    if isinstance(alpha, int | float) and not isinstance(alpha, bool) and math.isfinite(alpha):
        scale = alpha / (math.sqrt(rank_for_scale) if config.get("use_rslora") else rank_for_scale)
    else:
        parsed.problems.append(f"{where}: {module}: lora_alpha is {alpha!r}; a number belongs there")
    parsed.sites[module] = Site(module, kind, keys, rank, scale)


def _canonical(part: str, raw: str) -> str:
    """The end of a PEFT key: modules carry .weight or .bias, bare parameters nothing."""
    if part.endswith(".bias"):
        return part
    bare = part.startswith(("lora_embedding", "lora_magnitude_vector")) or not raw.endswith(".weight")
    return part if bare else part + ".weight"


def _config_rank(config: Mapping[str, Any], module: str) -> int | None:
    said = pattern_value(_patterns(config, "rank_pattern"), module, config.get("r"))
    return said if isinstance(said, int) and not isinstance(said, bool) and said > 0 else None


def _patterns(config: Mapping[str, Any], field_name: str) -> Mapping[str, Any]:
    patterns = config.get(field_name)
    return patterns if isinstance(patterns, Mapping) else {}


def _check_ranks(parsed: Parsed, config: Mapping[str, Any], where: str) -> None:
    by_ranks: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, site in parsed.sites.items():
        expected = _config_rank(config, name)
        if expected and site.rank and expected != site.rank and site.kind != "parameter":
            by_ranks[site.rank, expected].append(name)
    for (rank, expected), names in by_ranks.items():
        parsed.problems.append(
            f"{where}: rank {rank} in the file and {expected} in the config, on which the scale depends "
            f"(an edited config, or one shard of a save?): {some(names)}"
        )


def _add_others(
    parsed: Parsed,
    loose: list[tuple[str, Tensor]],
    chosen: str,
    names: Collection[str],
    config: Mapping[str, Any],
) -> None:
    # PEFT itself saves no key with an adapter's name in it: such a file is the state_dict of the whole model.
    whole = chosen != "" and any(key.endswith(".base_layer.weight") for key, _ in loose)
    copies = []
    for raw, tensor in loose:
        key, name = _without_name(raw, names)
        trained = key != raw or (config.get("bias", "none") != "none" and key.endswith(".bias"))
        if ".original_module." in f".{key}" or (whole and not trained):
            copies.append(key)
        elif name in ("", chosen) or name not in names:
            parsed.tensors[PREFIX + key] = tensor
            parsed.others.append(PREFIX + key)
    if copies:
        parsed.warnings.append(f"{len(copies)} copies of the base model's weights left out: {some(copies)}")


def _without_name(key: str, names: Collection[str]) -> tuple[str, str]:
    """Key of a tensor that is trained in full as PEFT saves it, and the adapter's name that was in it ('' for none)."""
    match = re.match(r"^((?:.+\.)?)(modules_to_save\.|trainable_tokens_delta\.)(.+)$", key)
    if not match:
        return key, ""
    head, mark, rest = match.groups()
    saved = mark == "modules_to_save."
    first = rest.partition(".")[0] if "." in rest or not saved else ""
    name = next((n for n in sorted(names, key=len, reverse=True) if n and f"{rest}.".startswith(f"{n}.")), first)
    rest = rest.removeprefix(name).removeprefix(".")
    return (head + rest if saved else head + mark + rest).removesuffix("."), name


def _foreign_format(tensors: Mapping[str, Tensor]) -> str | None:
    first = some(tensors, 1)
    if any(".lora_down." in key or ".lora_up." in key for key in tensors):
        return f" in PEFT's format: these are kohya-ss keys ({first})"
    if any(re.search(r"[._]lora(_linear_layer)?\.(down|up)\.", key) for key in tensors):
        return f" in PEFT's format: these are diffusers keys ({first})"
    return None


def _other_content(tensors: Mapping[str, Tensor]) -> str:
    if not tensors:
        return ": the file holds none at all (an emptied state_dict was saved?)"
    return f"; it holds {some(tensors)}: a whole model, or another tuner's file?"


def _check_finite(parsed: Parsed, where: str) -> None:
    bad = []
    for key, tensor in parsed.tensors.items():
        if tensor.is_floating_point():
            count = tensor.numel() - int(torch.isfinite(tensor.float() if tensor.itemsize < 2 else tensor).sum())
            if count:
                bad.append(f"{key.removeprefix(PREFIX)} ({count} of {tensor.numel()})")
    if bad:
        parsed.problems.append(f"{where}: non-finite values (NaN or Inf) in {some(bad, 8)}")


def _check_zero(parsed: Parsed) -> None:
    pairs = [site for site in parsed.sites.values() if site.scale is not None]
    zero = [s for s in pairs if not s.scale or any(not parsed.tensors[s.keys[part]].any() for part in s.pair)]
    if zero:
        parsed.warnings.append(
            f"{len(zero)} of {len(pairs)} modules have zero delta (untrained?): {some(s.name for s in zero)}"
        )


def _check_patterns(parsed: Parsed, config: Mapping[str, Any], where: str) -> None:
    for field_name in ("rank_pattern", "alpha_pattern"):
        said = config.get(field_name)
        if said is not None and not isinstance(said, Mapping):
            parsed.problems.append(
                f"{where}: {field_name} is a {type(said).__name__}; an object of module and number belongs there"
            )
        for key in _patterns(config, field_name):
            if not any(_matches(key, name) for name in parsed.sites):
                parsed.warnings.append(f"{field_name} key {key!r} matches no module and has no effect")


def _check_config(parsed: Parsed, config: Mapping[str, Any], where: str) -> None:
    if tuner_of(config) != "LORA":
        return
    r = config.get("r")
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        parsed.problems.append(f"{where}: r is {r!r} in the config; a rank of at least 1 belongs there")
    if config.get("alora_invocation_tokens"):
        parsed.warnings.append("alora_invocation_tokens: the update acts only after those tokens")


def complete_config(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], adapter_name: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The configuration with the fields that its maths needs, and what had to be assumed for them."""
    config, notes = dict(config), []
    if tuner_of(config) == "LORA":
        config.setdefault("peft_type", "LORA")
        if config.get("r") is None:
            common, uneven = _ranks(tensors, adapter_name)
            config["r"] = common
            if uneven:
                config["rank_pattern"] = {**_patterns(config, "rank_pattern"), **uneven}
            notes.append(f"the config gives no r: taken from the tensors ({common})")
        if config.get("lora_alpha") is None:
            config["lora_alpha"] = 8
            notes.append("the config gives no lora_alpha: PEFT's default of 8 is used")
        foreign = sorted(key for key in config if key not in LORA_FIELDS and key not in _LEGACY and config[key])
        if foreign:
            notes.append(f"config fields that this version does not know, and ignores: {some(foreign, 6)}")
    return config, notes


def assumed_config(
    tensors: Mapping[str, Tensor], alpha: float | None, adapter_name: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """A configuration for a file that has none: rank pattern from the tensors, alpha as given or equal to r."""
    modules = {split[0] for key in tensors if (split := _split(_clean(key), "lora_"))}
    common, uneven = _ranks(tensors, adapter_name)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common if alpha is None else alpha,
        "rank_pattern": uneven,
        "alpha_pattern": dict(uneven) if alpha is None else {},
        "target_modules": sorted(modules, key=natural),
    }
    if any("lora_magnitude_vector" in key for key in tensors):
        config["use_dora"] = True
    if alpha is not None or not modules:
        return config, []
    return config, [
        "no configuration found: lora_alpha is assumed equal to the rank (scale 1); --alpha or --config says"
    ]


def _ranks(tensors: Mapping[str, Tensor], adapter_name: str | None) -> tuple[int, dict[str, int]]:
    """The commonest rank of the pairs, and a pattern for the modules of another rank."""
    ranks = {}
    for key, tensor in tensors.items():
        split = _split(_clean(key), "lora_")
        if split and split[1] in ("lora_A", "lora_embedding_A") and tensor.ndim and adapter_name in (None, split[2]):
            ranks[split[0]] = tensor.shape[0]
    common = max(sorted(set(ranks.values())), key=list(ranks.values()).count, default=8)
    return common, {anchored(name): rank for name, rank in sorted(ranks.items()) if rank != common}


def anchored(name: str) -> str:
    """A pattern key that matches this module alone."""
    return "^" + re.escape(name)


# Fields of PEFT's LoraConfig, 0.3 to 0.21, that are known to keep ΔW = scale · B A or are checked above.
LORA_FIELDS = frozenset(
    {
        "alora_invocation_tokens",
        "alpha_pattern",
        "arrow_config",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "kasa_config",
        "layer_replication",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "monteclora_config",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "use_rslora",
        "velora_config",
    }
)


def natural(name: str) -> list[tuple[int, int | str]]:
    """A key that sorts paths by their numbers' values."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
