"""ComfyUI's files, and those of trainers that name modules as it does: dotted names, factors and alpha tensors.

Keys are diffusion_model.NAME.lora_A.weight or .lora_down.weight, with the authors' names of modules (Flux, Wan,
Qwen-Image, Z-Image …), text_encoders.clip_l.transformer.NAME, or, as ai-toolkit writes them, diffusers' components.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lora_lab.adapters.formats.diffusion.components import COMPONENTS, component_of
from lora_lab.adapters.formats.diffusion.diffusers import METADATA
from lora_lab.adapters.formats.diffusion.diffusion_names import MODEL, UNET, from_sgm, scheme_of, to_sgm
from lora_lab.adapters.formats.layout import Content, Layout, Part, Raw, Writable
from lora_lab.adapters.formats.pieces import Pieces, lora_content, split, taken_apart, written

_NAME = "comfy"
_ENCODERS = {
    "text_encoders.clip_l.transformer.": "text_encoder.",
    "text_encoders.clip_g.transformer.": "text_encoder_2.",
    "text_encoders.t5xxl.transformer.": "text_encoder_3.",
}
"""What ComfyUI calls the text encoders of SD, SDXL, SD3 and Flux → the canonical component."""
_DOWN, _COMPONENTS, _ALPHAS, _NARROW = "down", "components", "alphas", "narrow"
"""Words of `Layout.names`: factors are lora_down and lora_up; modules begin with diffusers' components; the file has
alphas where all scales are 1, too; the first up block of a U-Net has no attention (SD 1 and 2)."""


def matches(raw: Raw) -> bool:
    """By dotted names beside lora_down, by ComfyUI's prefixes, or by alphas beside diffusers' names."""
    if METADATA in raw.header:
        return False
    places = [(key, place[0]) for key in raw.tensors if (place := split(key)) and "." in place[0]]
    if any(".lora_down." in key or ".lora_up." in key for key, _ in places):
        return True
    if raw.settings is not None:
        return False
    factors = [module for key, module in places if ".lora_A." in key]
    if any(module.startswith((MODEL, *_ENCODERS)) for module in factors):
        return True
    return any(key.endswith(".alpha") for key, _ in places) and any(
        component_of(module) in COMPONENTS for module in factors
    )


def read(raw: Raw) -> Content:
    """The adapter with the names that it has, those of a U-Net and of CLIP made canonical."""
    file = taken_apart(raw.tensors, modules_of)
    return lora_content(file, raw.alpha, layout_of(file, raw))


def layout_of(file: Pieces, raw: Raw) -> Layout:
    """How a file with dotted names is laid out."""
    modules = file.modules.values()
    said = {
        _DOWN: any(".lora_down." in key for key in raw.tensors),
        _COMPONENTS: any(component_of(module.own) in COMPONENTS for module in modules),
        _ALPHAS: any("alpha" in module.pieces for module in modules),
        _NARROW: any(module.own == f"{MODEL}output_blocks.2.1.conv" for module in modules),
    }
    header = {key: text for key, text in raw.header.items() if key != "format" and not key.startswith("lora_lab.")}
    return Layout(_NAME, " ".join(word for word, is_so in said.items() if is_so), header, file.apart)


def modules_of(names: Collection[str]) -> dict[str, str | None]:
    """The file's name of a module → the canonical one."""
    flux = any(".double_blocks." in name for name in names)
    return {name: _canonical(name, "text_encoder_2." if flux else "text_encoder_3.") for name in names}


def _canonical(name: str, t5: str) -> str:
    for prefix, component in _ENCODERS.items():
        if name.startswith(prefix):
            return (t5 if component == "text_encoder_3." else component) + name.removeprefix(prefix)
    renamed = from_sgm(name.removeprefix(MODEL)) if name.startswith(MODEL) else None
    return UNET + renamed if renamed else name


def write(adapter: Writable) -> Mapping[str, Part]:
    """One file; what is under diffusers' names stays so, unless it is a U-Net or a text encoder of another format's.

    Raises TunerError for what is no LoRA, AdapterError for modules that have no name there.
    """
    same = adapter.layout.format == _NAME and adapter.layout.names is not None
    words = (adapter.layout.names or "").split() if same else [_ALPHAS]
    wide = _NARROW not in words if same else _is_wide(adapter.sites)
    names = {name: name if _COMPONENTS in words else _own(name, wide=wide) for name in adapter.sites}
    if same:
        names = {name: own or name for name, own in names.items()}
    halves = ("lora_down", "lora_up") if _DOWN in words else ("lora_A", "lora_B")
    tensors = written(adapter, names, "a ComfyUI file", halves)
    if _ALPHAS not in words and all(site.scale == 1 for site in adapter.sites.values()):
        tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    if not same:
        return {"": Part(tensors)}
    return {"": Part({**tensors, **adapter.layout.apart}, adapter.layout.header)}


def _is_wide(names: Collection[str]) -> bool:
    """Whether the U-Net is SDXL's, whose first up block has attention, as far as its modules tell; else SD's."""
    return scheme_of(names).sgm or any(name.startswith(f"{UNET}up_blocks.0.attentions.") for name in names)


def _own(name: str, *, wide: bool) -> str | None:
    """ComfyUI's name of a module; None for what is of no diffusion pipeline, or of a U-Net and without such a name."""
    if name.startswith(UNET):
        renamed = to_sgm(name.removeprefix(UNET), wide=wide)
        return MODEL + renamed if renamed else None
    component = component_of(name) or ""
    if component.startswith("text_encoder"):
        rest = name.removeprefix(f"{component}.")
        second = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}.get(component, "t5xxl")
        return f"text_encoders.{'t5xxl' if rest.startswith('encoder.block.') else second}.transformer.{rest}"
    return name if component or name.startswith("text_encoders.") else None
