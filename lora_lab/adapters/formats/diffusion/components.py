"""The models of a diffusion pipeline that one adapter changes: their names, and one configuration for all or each.

In an adapter of a pipeline, a module's name begins with its component: unet.down_blocks…, text_encoder.text_model….
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_lab.adapters.formats.keys import PREFIX, anchored
from lora_lab.adapters.formats.peft.peft_config import (
    brief,
    changes_base,
    exact_targets,
    field_problems,
    number,
    pattern_values,
    patterns_of,
    tuner_of,
)

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""What diffusers calls the models of a pipeline that it loads adapters into."""
PARTS = (*COMPONENTS, "diffusion_model")
"""The same, and the model of a pipeline by its authors' names of modules, as ComfyUI has it."""

TOGETHER = "components"
"""`Layout.names` of a PEFT folder that has a folder for each component."""

_PLACING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Fields that choose modules, in whose place the modules of the file are listed."""
_NUMBERS = ("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_WHOLE = ("trainable_token_indices", "target_parameters", "layer_replication", "alora_invocation_tokens")
"""Fields that say of one model what it cannot say of several together."""
_SWITCHES = ("use_dora", "lora_bias", "fan_in_fan_out", "peft_type")
"""Fields that change ΔW of every module, so that all components must have the same."""

_FLAT_CLIP = re.compile(r"^(text_encoder(?:_\d)?\.)encoder\.(?=layers\.)")
# Language models whose own modules lie below a `transformer`: GPT-2 and its kin, MPT, DBRX, ChatGLM.
_LANGUAGE = re.compile(
    r"transformer\.(h|wte|wpe|ln_f|word_embeddings|embedding|encoder|output_layer|"
    r"blocks\.\d+\.(attn\.Wqkv|attn\.out_proj|ffn\.(up|down)_proj|norm_attn_norm))(\.|$)"
)


def component_of(name: str) -> str | None:
    """The component that a module's name, or a key, begins with; None for one of no pipeline."""
    first, _, rest = name.partition(".")
    return first if first in PARTS and rest and not _LANGUAGE.match(name) else None


def clip_name(name: str) -> str:
    """The name, or key, of a module of CLIP below text_model, where transformers had it before 5.0."""
    return _FLAT_CLIP.sub(r"\1text_model.encoder.", name)


def by_component(names: Iterable[str]) -> dict[str, list[str]] | None:
    """Component → its modules, by their names without it; None unless all are of a pipeline."""
    apart: dict[str, list[str]] = {}
    for name in names:
        component = component_of(name)
        if component is None:
            return None
        apart.setdefault(component, []).append(name.removeprefix(f"{component}."))
    return apart or None


def key_within(key: str, component: str) -> str:
    """PEFT's key of a tensor of the whole, as the component alone has it."""
    return PREFIX + key.removeprefix(PREFIX).removeprefix(f"{component}.")


def numbers_for(ranks: Mapping[str, Any], alphas: Mapping[str, Any], field: str = "lora_alpha") -> dict[str, Any]:
    """The fields of a configuration that give each module its rank and alpha: the commonest, and patterns."""
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": r,
        field: alpha,
        "rank_pattern": {anchored(name): rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {anchored(name): value for name, value in alphas.items() if value != alpha},
    }


def values_of(config: Mapping[str, Any], names: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rank and alpha that a configuration gives each module."""
    ranks = pattern_values(patterns_of(config, "rank_pattern"), names, config.get("r"))
    return ranks, pattern_values(patterns_of(config, "alpha_pattern"), names, config.get(_alpha_field(config)))


def _alpha_field(config: Mapping[str, Any]) -> str:
    """What the tuner calls its alpha: LoRA's is lora_alpha, those of LoHa and LoKr alpha."""
    return "lora_alpha" if tuner_of(config) == "LORA" else "alpha"


def joined(
    configs: Mapping[str, Mapping[str, Any]], modules: Mapping[str, Collection[str]]
) -> tuple[dict[str, Any], list[str]]:
    """One configuration for the modules of all components, and why there is none.

    `modules` has the names of each component's modules without it. Where components differ in rsLoRA, the scale of it,
    alpha / √r, is written as the alpha √r of a plain one. Raises AdapterError for patterns that take too long.
    """
    lora = [part for part, config in configs.items() if tuner_of(config) == "LORA"]
    problems = [f"{part}: {problem}" for part in lora for problem in field_problems(configs[part])]
    for field in _SWITCHES:
        said = {part: config.get(field) or None for part, config in configs.items()}
        if len(set(map(str, said.values()))) > 1:
            words = ", ".join(f"{value} in {part}" for part, value in said.items())
            problems.append(f"{field} is not the same in all components ({words}); a file for each is needed")
    problems += [
        f"{part}: {field} cannot be said of several components together"
        for part, config in configs.items()
        for field in _WHOLE
        if config.get(field) and len(configs) > 1
    ]
    if problems:
        return {}, problems
    rooted = {part: config.get("use_rslora") is True for part, config in configs.items()}
    alpha_field = _alpha_field(next(iter(configs.values())))
    ranks: dict[str, Any] = {}
    alphas: dict[str, Any] = {}
    for part, config in configs.items():
        own_ranks, own_alphas = values_of(config, modules[part])
        for name in modules[part]:
            rank, alpha = own_ranks[name], own_alphas[name]
            if number(alpha) is None and alpha_field in config:
                return {}, [f"{part}.{name}: {alpha_field} is {brief(alpha)}; a number belongs there"]
            ranks[f"{part}.{name}"] = rank
            alphas[f"{part}.{name}"] = alpha * math.sqrt(rank) if rooted[part] and not all(rooted.values()) else alpha
    saved = [f"{part}.{name}" for part, config in configs.items() for name in _saved(config)]
    return {
        **_agreed(configs),
        **(
            numbers_for(ranks, alphas, alpha_field) if any(alpha_field in config for config in configs.values()) else {}
        ),
        **({"use_rslora": all(rooted.values())} if any(rooted.values()) else {}),
        "target_modules": exact_targets(ranks, ()),
        **({"modules_to_save": saved} if saved else {}),
    }, []


def _agreed(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The other fields, those on which all components agree; and how the base was changed, where one says so."""
    first, *others = configs.values()
    apart = (*_PLACING, *_NUMBERS, "modules_to_save")
    kept = {
        field: value
        for field, value in first.items()
        if field not in apart and all(other.get(field) == value for other in others)
    }
    changed = next((c["init_lora_weights"] for c in configs.values() if changes_base(c)), None)
    return kept if changed is None else {**kept, "init_lora_weights": changed}


def alone(config: Mapping[str, Any], component: str, names: Collection[str]) -> dict[str, Any]:
    """The configuration of one component's model: that of the whole for its modules (names without it)."""
    ranks, alphas = values_of(config, [f"{component}.{name}" for name in names])
    own_ranks, own_alphas = ({name: said[f"{component}.{name}"] for name in names} for said in (ranks, alphas))
    alpha_field = _alpha_field(config)
    numbers = numbers_for(own_ranks, own_alphas, alpha_field) if alpha_field in config else {}  # no IA³ has an alpha
    saved = [name for name in _saved(config) if name.startswith(f"{component}.")]
    return {
        **{field: value for field, value in config.items() if field not in (*_PLACING, "modules_to_save")},
        **numbers,
        "target_modules": exact_targets(names, ()),
        **({"modules_to_save": [name.removeprefix(f"{component}.") for name in saved]} if saved else {}),
    }


def _saved(config: Mapping[str, Any]) -> list[str]:
    said = config.get("modules_to_save")
    return list(said) if isinstance(said, list | tuple) else []
