"""The formats of adapter files, by name, and which one a file is in."""

from __future__ import annotations

from lora_lab.adapters.formats import lycoris, mlx
from lora_lab.adapters.formats.diffusion import comfy, diffusers, kohya, model_names
from lora_lab.adapters.formats.layout import Format, Raw
from lora_lab.adapters.formats.peft import peft_files
from lora_lab.registry import Registry

_PEFT = Format(
    about="PEFT: a folder with adapter_config.json, or a lone file",
    matches=peft_files.matches,
    read=peft_files.read,
    write=peft_files.write,
    file="adapter_model.safetensors",
    settings="adapter_config.json",
)

PEFT = "peft"

_DIFFUSERS = Format(
    about="diffusers: pytorch_lora_weights.safetensors in a folder, or a lone file",
    matches=diffusers.matches,
    read=diffusers.read,
    write=diffusers.write,
    renamed=model_names.to_diffusers,
    file="pytorch_lora_weights.safetensors",
)

_KOHYA = Format(
    about="kohya's sd-scripts and what follows them: flat names, lora_down, lora_up, alpha",
    matches=kohya.matches,
    read=kohya.read,
    write=kohya.write,
    renamed=model_names.to_authors,
)

_COMFY = Format(
    about="ComfyUI and trainers that name modules as it does: diffusion_model., factors and alphas",
    matches=comfy.matches,
    read=comfy.read,
    write=comfy.write,
)

_LYCORIS = Format(
    about="LyCORIS: LoHa, LoKr, whole differences, IA³ and their like",
    matches=lycoris.matches,
    read=lycoris.read,
)

_MLX = Format(
    about="mlx-lm: adapters.safetensors with adapter_config.json in a folder",
    matches=mlx.matches,
    read=mlx.read,
    write=mlx.write,
    file="adapters.safetensors",
    settings="adapter_config.json",
)

FORMATS = Registry(
    "format",
    "lora_lab.formats",
    Format,
    {"peft": _PEFT, "lycoris": _LYCORIS, "kohya": _KOHYA, "comfy": _COMFY, "diffusers": _DIFFUSERS, "mlx": _MLX},
)
"""Formats by name. Each is asked whether a file is its; PEFT's last, whose keys are several others', too."""

WRITTEN = ("peft", "diffusers", "kohya", "comfy", "mlx")
"""Those of them that are written, and not only read."""


def recognised(raw: Raw) -> str:
    """The name of the format that a file is in; PEFT's where no other one matches."""
    return next((name for name, entry in FORMATS.items() if name != PEFT and entry.matches(raw)), PEFT)
