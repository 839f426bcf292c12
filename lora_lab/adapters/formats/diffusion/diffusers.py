"""Adapters of diffusion pipelines as diffusers has them: pytorch_lora_weights.safetensors, keys by component.

What is written is loaded by `load_lora_weights`: it has each component's LoraConfig in the header, by which alone
diffusers (0.34 and later) applies a lora_alpha that is not the rank. Without one it takes alpha tensors, or else the
rank for lora_alpha. Sources: diffusers' loaders/lora_base.py, loaders/peft.py, utils/state_dict_utils.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lora_lab import files
from lora_lab.adapters.formats import carried
from lora_lab.adapters.formats.diffusion.components import (
    COMPONENTS,
    by_component,
    clip_name,
    component_of,
    joined,
    numbers_for,
    values_of,
)
from lora_lab.adapters.formats.keys import PREFIX, clean, split
from lora_lab.adapters.formats.layout import Content, Layout, Part, Raw, Writable
from lora_lab.adapters.formats.peft.peft_config import assumed_config, complete_config, exact_targets
from lora_lab.errors import AdapterError, TunerError, shorten

if TYPE_CHECKING:
    from torch import Tensor

_NAME = "diffusers"
METADATA = "lora_adapter_metadata"
"""Key of the header under which diffusers keeps the LoraConfig of each component, as JSON: component.field → value."""

_PAIR = {"down": "lora_A", "up": "lora_B"}
_OLD = re.compile(r"(?P<module>.+?)(?P<kind>_lora|\.lora|\.lora_linear_layer)\.((?P<half>down|up)\.weight|alpha)$")
"""Keys as diffusers wrote them until 2023."""
_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""What old attention processors called their LoRA → the module of a text encoder; a UNet's has the same name."""
_FIRST = {
    **dict.fromkeys(
        ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding"), "unet"
    ),
    "text_model": "text_encoder",
}
"""First part of a module's name, in files that name no component → its component; any other is a transformer's."""
_NORMS = ("norm_q.weight", "norm_k.weight", "norm_added_q.weight", "norm_added_k.weight")
"""Whole weights that diffusers takes from a file for Flux's transformer (its Control LoRAs have them)."""
_SWITCHES = ("use_rslora", "use_dora", "lora_bias")


def matches(raw: Raw) -> bool:
    """By its header, by old spellings, or by keys of components where there is no configuration."""
    if METADATA in raw.header or any(_OLD.match(key) for key in raw.tensors):
        return True
    adapted = [key for key in raw.tensors if split(key, "lora_")]
    return raw.settings is None and bool(adapted) and all(component_of(key) in COMPONENTS for key in adapted)


def read(raw: Raw) -> Content:
    """The tensors by PEFT's keys, every module's name with its component first, and one configuration for all."""
    layout = Layout(_NAME, header={key: text for key, text in raw.header.items() if _kept(key)})
    tensors: dict[str, Tensor] = {}
    bare = [key for key in raw.tensors if component_of(clean(key)) is None]
    for key, tensor in raw.tensors.items():
        name = PREFIX + _modern(_whole(clean(key)))
        if name in tensors:
            return Content({}, {}, problems=[f"two tensors for {name.removeprefix(PREFIX)}, one of them is {key}"])
        tensors[name] = tensor
    said, problem = _metadata(raw.header)
    if problem:
        return Content({}, {}, problems=[problem])
    notes = [f"{len(bare)} keys name no component: {shorten(bare, 1)} is read as {_whole(bare[0])}"] if bare else []
    names = dict.fromkeys(found[0] for key in tensors if (found := split(clean(key), "lora_")))
    modules = by_component(names) or {}
    if not modules:
        return Content(tensors, {"peft_type": "LORA"}, layout, notes)  # whose parser tells what it holds
    configs: dict[str, Mapping[str, Any]] = {}
    try:
        for part in modules:
            own = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{PREFIX}{part}.")}
            configs[part], more = _config(said.get(part) or said.get("") or raw.settings, own, part, raw)
            notes += [f"{part}: {note}" for note in more]
        config, problems = joined(configs, modules)
    except AdapterError as error:
        return Content({}, {}, problems=[str(error)])
    return Content(tensors, config, layout, notes, problems)


def _kept(key: str) -> bool:
    """Whether metadata stays true when the tensors change: not of hashes, nor of what is written anew."""
    return key not in (METADATA, "format") and not key.startswith("lora_lab.") and "hash" not in key


def _whole(key: str) -> str:
    """The key with its component, once: some files repeat it, and those of one model have none."""
    part = component_of(key)
    if part is None:
        return f"{_FIRST.get(key.partition('.')[0], 'transformer')}.{key}"
    while key.startswith(f"{part}.{part}."):
        key = key.removeprefix(f"{part}.")
    return clip_name(key)  # diffusers takes both


def _modern(key: str) -> str:
    """The key in the spelling of today, with the modules' own names."""
    key = key.replace(".processor.", ".")
    old = _OLD.match(key)
    text = key.startswith("text_encoder")
    if not old:
        return key if text else key.replace(".to_out.lora_magnitude_vector", ".to_out.0.lora_magnitude_vector")
    stem, _, last = old["module"].rpartition(".")
    if old["kind"] == "_lora" and last in _ATTENTION:
        last = _ATTENTION[last] if text else "to_out.0" if last == "to_out" else last
    return f"{stem}.{last}." + (f"{_PAIR[old['half']]}.weight" if old["half"] else "alpha")


def _metadata(header: Mapping[str, str]) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Component ('' where none is named) → its fields, as far as the header has any; and what is wrong with them."""
    try:
        content = files.parse_json(header.get(METADATA, "{}"))
    except ValueError as error:
        return {}, f"{METADATA} in its header is not JSON ({error})"
    if not isinstance(content, dict):
        return {}, f"{METADATA} in its header is no object of fields, as unet.lora_alpha"
    said: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        part, _, field = key.rpartition(".")
        said.setdefault(part, {})[field] = value
    return said, None


def _config(
    said: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], part: str, raw: Raw
) -> tuple[dict[str, Any], list[str]]:
    """The configuration of one component, its patterns for names without the component, and what is to be told."""
    own = {key.replace(f"{PREFIX}{part}.", PREFIX, 1): tensor for key, tensor in tensors.items()}
    if said is None:
        config, notes = assumed_config(own, raw.alpha, raw.adapter_name)
        return config, [note for note in notes if "alpha tensors" in note]  # the rest is diffusers' rule
    config, notes = complete_config({"peft_type": "LORA", **said}, own, raw.adapter_name)
    for field in ("rank_pattern", "alpha_pattern"):
        if part.startswith("text_encoder") and isinstance(config.get(field), dict):
            config[field] = {re.sub(r"^\^encoder", r"^text_model\.encoder", k): v for k, v in config[field].items()}
    if raw.alpha is not None and config["lora_alpha"] != raw.alpha:
        notes.append(f"alpha {raw.alpha:g} is not used, the file says {config['lora_alpha']!r}")
    return config, notes


def write(adapter: Writable) -> Mapping[str, Part]:
    """One file for all components, with the LoraConfig of each in its header."""
    norms = [k for k in adapter.tensors if k.startswith(f"{PREFIX}transformer.") and k.endswith(_NORMS)]
    carried.require(
        adapter,
        "a diffusers file",
        kinds=("linear", "conv1d", "conv2d", "conv3d"),
        parts=("lora_magnitude_vector", "lora_B.bias"),
        whole=norms,
    )
    odd = [name for name in adapter.sites if component_of(name) not in COMPONENTS]
    modules = by_component(adapter.sites)
    if modules is None or odd:
        raise TunerError(
            f"a diffusers file has modules of {', '.join(COMPONENTS)}, not {shorten(odd)}; of a UNet alone, `rename` "
            "=unet says whose they are"
        )
    said: dict[str, Any] = {}
    for part, names in modules.items():
        said |= {f"{part}.{field}": value for field, value in _fields(adapter.config, part, names).items()}
    bare = [part for part in modules if part.startswith("text_encoder") and not _has_attention(modules[part])]
    tensors = {}
    for key, tensor in adapter.tensors.items():
        name = clip_name(key.removeprefix(PREFIX))
        if name.startswith("text_encoder") and name.endswith("lora_magnitude_vector"):
            name += ".weight"  # as transformers, which loads these, takes it; PEFT itself takes both
        tensors[_old(name) if component_of(name) in bare else name] = tensor
    kept = adapter.layout.header if adapter.layout.format == _NAME else {}
    return {"": Part(tensors, {**kept, METADATA: json.dumps(said, indent=2)})}


def _fields(config: Mapping[str, Any], part: str, names: list[str]) -> dict[str, Any]:
    """The LoraConfig of one component, of fields that every version of PEFT knows unless they are needed."""
    short = {name: name.removeprefix("text_model.") if part.startswith("text_encoder") else name for name in names}
    ranks, alphas = values_of(config, [f"{part}.{name}" for name in names])
    ranks, alphas = ({short[name]: values[f"{part}.{name}"] for name in names} for values in (ranks, alphas))
    numbers = numbers_for(ranks, alphas)
    targets = exact_targets(names, ())
    if part.startswith("text_encoder"):
        # CLIP's modules lie below text_model or not, by transformers' version, so that only the ends are said
        targets = sorted(short.values())
        for field in ("rank_pattern", "alpha_pattern"):
            numbers[field] = {key.removeprefix("^"): value for key, value in numbers[field].items()}
    switches = {field: True for field in _SWITCHES if config.get(field) is True}
    return {**numbers, "target_modules": targets, **switches}


def _has_attention(names: Iterable[str]) -> bool:
    return any(name.endswith(tuple(_ATTENTION.values())) for name in names)


def _old(name: str) -> str:
    """The old spelling of a text encoder's key; diffusers takes no other one where no attention is adapted."""
    for half, part in _PAIR.items():
        name = name.replace(f".{part}.weight", f".lora_linear_layer.{half}.weight")
    return name
