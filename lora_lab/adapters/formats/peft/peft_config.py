"""PEFT's adapter_config.json: what it must say, what it leaves out, and which modules PEFT adapts by it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lora_lab.adapters.formats.keys import anchored, clean, natural_key, split
from lora_lab.adapters.formats.peft.matching import by_path, by_whole, first_match, numbered, shown
from lora_lab.errors import AdapterError, shorten

if TYPE_CHECKING:
    from torch import Tensor

# What an early PEFT wrote and a later one removed, and it never changed a plain adapter.
_LEGACY = {"enable_lora", "merge_weights"}

_YES_OR_NO = ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "use_qalora")
_INITS = ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "mica", "lora_ga")
_BASE_CHANGING = re.compile(r"pissa|olora|corda|loftq|lora_ga")
# Adapters that PEFT does not place by target_modules, or not by it alone.
_PLACED_OTHERWISE = {"ADAPTION_PROMPT", "XLORA", "SHADOW"}


def tuner_of(config: Mapping[str, Any]) -> str:
    """PEFT's type of the adapter in upper case, LORA where the configuration names none."""
    return str(config.get("peft_type") or "LORA").rpartition(".")[2].upper()


def changes_base(config: Mapping[str, Any]) -> bool:
    """Whether the adapter was begun by taking something out of the base's weights, so that ΔW is not B A."""
    return _BASE_CHANGING.match(str(config.get("init_lora_weights")).lower()) is not None


def patterns_of(config: Mapping[str, Any], field_name: str) -> Mapping[str, Any]:
    """rank_pattern or alpha_pattern, empty where it is none."""
    patterns = config.get(field_name)
    return patterns if isinstance(patterns, Mapping) else {}


def pattern_values(patterns: Mapping[str, Any], names: Collection[str], default: Any) -> dict[str, Any]:
    """Name → what rank_pattern or alpha_pattern gives it: PEFT takes the first key that matches the name's end."""
    values = first_match(patterns, names)
    return {name: values.get(name, default) for name in names}


_FLOAT32 = (2 - 2**-23) * 2.0**127
"""Its largest number."""


def number(value: Any) -> float | None:
    """A finite number of a configuration as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def too_large(scale: float) -> str | None:
    """What is wrong with a scale that float32 cannot hold; None for any other."""
    return f"a scale of {scale:.4g}, and float32 ends at 3.4e38" if abs(scale) > _FLOAT32 else None


def count(value: Any) -> int | None:
    """A rank of a configuration; None for what is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31 else None


def field_problems(config: Mapping[str, Any]) -> list[str]:
    """What in a LoRA configuration has a type or a value with which it means something else, or nothing, to PEFT."""
    problems = []
    for name in _YES_OR_NO:
        if not isinstance(config.get(name), bool | None):
            problems.append(f"{name} is {brief(config[name])}; true or false belongs there")
    if config.get("bias") not in (None, "none", "all", "lora_only"):
        problems.append(f"bias is {brief(config['bias'])}; none, all or lora_only belongs there")
    if count(config.get("r")) is None:
        problems.append(f"r is {brief(config.get('r'))} in the config; a rank of at least 1 belongs there")
    for name in ("rank_pattern", "alpha_pattern"):
        said = config.get(name)
        if said is not None and not isinstance(said, Mapping):
            problems.append(f"{name} is a {type(said).__name__}; an object of module and number belongs there")
    wrong = [
        f"{shown(key)}: {brief(value)}"
        for key, value in patterns_of(config, "rank_pattern").items()
        if not count(value)
    ]
    if wrong:
        problems.append(f"rank_pattern has {shorten(wrong)}; ranks of at least 1 belong there")
    for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "layers_pattern"):
        said = config.get(name)
        parts = said if isinstance(said, list | tuple | set) else ()
        if not isinstance(said, str | list | tuple | set | None) or not all(isinstance(p, str) for p in parts):
            problems.append(f"{name} is {brief(said)}; names of modules belong there")
    if not isinstance(config.get("init_lora_weights"), bool | str | None):
        problems.append(
            f"init_lora_weights is {brief(config['init_lora_weights'])}; true, false or a name belongs there"
        )
    return problems


def field_notes(config: Mapping[str, Any]) -> list[str]:
    """What in a LoRA configuration is odd but changes no number."""
    init = config.get("init_lora_weights")
    notes = []
    if isinstance(init, str) and init not in _INITS and not init.startswith("pissa_niter_"):
        notes.append(f"init_lora_weights is {brief(init)}, which PEFT does not know and refuses to load")
    if isinstance(config.get("target_modules"), str) and config.get("layers_to_transform") is not None:
        notes.append("layers_to_transform beside a pattern in target_modules, which PEFT refuses to load")
    return notes


def brief(value: Any) -> str:
    """A value of a configuration as it goes into a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def not_placed(config: Mapping[str, Any], kinds: Mapping[str, str]) -> tuple[list[str], str]:
    """The modules that PEFT would not adapt by this configuration, and the fields that leave them out.

    `kinds` gives each module's kind (see sites.py). What PEFT does not adapt it drops from the file with no more than
    a warning. Where the model decides (no target_modules, which linear layers there are, what is tied to an embedding)
    nothing is left out. Raises AdapterError for patterns that take too long.
    """
    if tuner_of(config) in _PLACED_OTHERWISE:
        return [], ""
    parameters = parameter_sites(config, kinds)
    rest = [name for name in kinds if name not in parameters]
    excluded = _excluded(config, rest)
    targeted = _targeted(config, rest)
    if _is_all_linear(config.get("target_modules")):
        targeted = {name for name in targeted if not kinds[name].startswith(("embedding", "conv"))}
    gone = [name for name in rest if name in excluded or name not in targeted]
    if config.get("ensure_weight_tying"):  # embeddings and heads, which lie in no numbered block, may be tied
        gone = [name for name in gone if any(part.isdecimal() for part in name.split("."))]
    fields = [
        field
        for field in ("exclude_modules", "modules_to_save", "target_modules", "layers_to_transform")
        if config.get(field) not in (None, [], "")
    ]
    return gone, " and ".join(fields)


def parameter_sites(config: Mapping[str, Any], names: Collection[str]) -> set[str]:
    """The modules of which target_parameters adapts a parameter, not the module (PEFT takes the ends of names)."""
    targets = config.get("target_parameters")
    if not isinstance(targets, list | tuple | set):
        return set()
    owners = {str(target).rpartition(".")[0] for target in targets}
    sites = set()
    for name in names:
        bare = ".".join(part for part in name.split(".") if part != "base_layer")
        if bare in owners or any(bare[i + 1 :] in owners for i, letter in enumerate(bare) if letter == "."):
            sites.add(name)
    if "" in owners:  # a parameter's bare name, in any module
        sites |= set(names) - (_targeted(config, names) if config.get("target_modules") else set())
    return sites


def _excluded(config: Mapping[str, Any], names: Collection[str]) -> set[str]:
    said = config.get("exclude_modules") or ()
    gone = set(by_whole([said], names)[said]) if isinstance(said, str) else _ending_in(said, names)
    saved = config.get("modules_to_save") or ()
    saved = list(saved)  # of a text PEFT takes every letter for a name
    for matched in by_path(saved, names).values():
        gone.update(matched)
    return gone


def _targeted(config: Mapping[str, Any], names: Collection[str]) -> set[str]:
    said = config.get("target_modules")
    if said is None or _is_all_linear(said):
        return set(names)
    if isinstance(said, str):
        return set(by_whole([said], names)[said])
    targeted = _ending_in(said, names)
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return targeted
    wanted = layers if isinstance(layers, list | tuple | set) else [layers]
    pattern = config.get("layers_pattern") or []
    index = numbered([pattern] if isinstance(pattern, str) else pattern, targeted)
    return {name for name in targeted if name in said or index.get(name) in wanted}


def _is_all_linear(said: Any) -> bool:
    """Whether target_modules leaves it to PEFT to find the linear layers, and those alone."""
    return isinstance(said, str) and said.lower() == "all-linear"


def exact_targets(names: Iterable[str], others: Iterable[str]) -> list[str] | str:
    """What target_modules says for these modules and none of `others`: their names, or else a pattern."""
    names = sorted(names)
    # PEFT takes listed names as endings, so a list must hold none that another module's name ends in.
    endings = {name[i + 1 :] for name in {*names, *others} for i, letter in enumerate(name) if letter == "."}
    listable = all("." in name for name in names) and endings.isdisjoint(names)
    return names if listable else f"^({'|'.join(map(re.escape, names))})$"


def _ending_in(said: Iterable[str], names: Collection[str]) -> set[str]:
    listed = set(said)
    return {
        name
        for name in names
        if name in listed or any(name[i + 1 :] in listed for i, letter in enumerate(name) if letter == ".")
    }


def missing_saved(config: Mapping[str, Any], keys: Collection[str]) -> list[str]:
    """The entries of modules_to_save without a tensor among these clean keys; of classifier and score, one will do."""
    saved = config.get("modules_to_save") or ()
    if isinstance(saved, str):
        return []
    paths = {key[:i] for key in keys for i, letter in enumerate(key) if letter == "."}
    missing = [name for name in saved if not any(path == name or path.endswith(f".{name}") for path in paths)]
    heads = {"classifier", "score"}  # PEFT names both for any classifier
    return [name for name in missing if name not in heads or heads.issubset(missing) or not heads.issubset(saved)]


def complete_config(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], adapter_name: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The configuration with the fields that its maths needs, and what had to be assumed for them.

    Raises AdapterError for one without peft_type, which PEFT has always written: of another tool, or cut by hand.
    """
    config = dict(config)
    notes: list[str] = []
    if not isinstance(config.get("peft_type"), str) or not config["peft_type"].strip():
        raise AdapterError(
            f"peft_type is {brief(config.get('peft_type'))} in the config; PEFT writes LORA or another there"
        )
    if tuner_of(config) != "LORA":
        return config, notes
    if config.get("r") is None:
        common, uneven = _ranks(tensors, adapter_name)
        config["r"] = common
        if uneven:
            config["rank_pattern"] = {**patterns_of(config, "rank_pattern"), **uneven}
        notes.append(f"the config gives no r: taken from the tensors ({common})")
    if config.get("lora_alpha") is None:
        alphas, free = alpha_tensors(tensors), not patterns_of(config, "alpha_pattern")
        config["lora_alpha"] = 8
        if alphas and free:
            config["alpha_pattern"] = {anchored(name): alpha for name, alpha in alphas.items()}
            notes.append(_from_tensors(alphas))
        if not (free and alphas.keys() >= _modules(tensors)):
            notes.append("the config gives no lora_alpha: PEFT's default of 8 is used")
    foreign = sorted(key for key in config if key not in LORA_FIELDS and key not in _LEGACY and config[key])
    if foreign:
        notes.append(f"config fields that this version does not know, and ignores: {shorten(foreign, 6)}")
    return config, notes


def assumed_config(
    tensors: Mapping[str, Tensor], alpha: float | None, adapter_name: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """A configuration for a file that has none: ranks from the tensors; alpha from tensors, as given, or equal to r."""
    modules = _modules(tensors)
    common, uneven = _ranks(tensors, adapter_name)
    alphas = alpha_tensors(tensors)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common if alpha is None else alpha,
        "rank_pattern": uneven,
        "alpha_pattern": {**(uneven if alpha is None else {}), **{anchored(name): a for name, a in alphas.items()}},
        "target_modules": sorted(modules, key=natural_key),
    }
    if any("lora_magnitude_vector" in key for key in tensors):
        config["use_dora"] = True
    notes = [_from_tensors(alphas)] if alphas else []
    if alphas and alpha is not None and set(alphas.values()) != {alpha}:
        notes.append(f"alpha {alpha:g} is not used where the file has alpha tensors")
    if alpha is None and not alphas.keys() >= modules:
        notes.append(
            "no configuration found: lora_alpha is assumed equal to the rank (scale 1); `alpha` or `config` says"
        )
    return config, notes


def alpha_tensors(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Module → its lora_alpha, of files that hold it as a tensor of one number (ComfyUI and others)."""
    modules = _modules(tensors)
    alphas = {}
    for key, tensor in tensors.items():
        module, _, last = clean(key).rpartition(".")
        if last == "alpha" and module in modules and tensor.numel() == 1 and not tensor.is_complex():
            value = float(tensor.reshape(()))
            if math.isfinite(value):
                alphas[module] = value
    return alphas


def _from_tensors(alphas: Mapping[str, float]) -> str:
    return f"lora_alpha of {len(alphas)} modules is taken from their alpha tensors"


def _modules(tensors: Mapping[str, Tensor]) -> set[str]:
    return {parts[0] for key in tensors if (parts := split(clean(key), "lora_"))}


def _ranks(tensors: Mapping[str, Tensor], adapter_name: str | None) -> tuple[int, dict[str, int]]:
    """The commonest rank of the pairs, and a pattern for the modules of another rank."""
    ranks = {}
    for key, tensor in tensors.items():
        parts = split(clean(key), "lora_")
        if parts and parts[1] in ("lora_A", "lora_embedding_A") and tensor.ndim and adapter_name in (None, parts[2]):
            ranks[parts[0]] = tensor.shape[0]
    counts = Counter(ranks.values())
    common = max(sorted(counts), key=lambda rank: counts[rank], default=8)
    return common, {anchored(name): rank for name, rank in sorted(ranks.items()) if rank != common}


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
