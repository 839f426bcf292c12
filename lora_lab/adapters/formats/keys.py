"""Keys of adapter files: the prefixes before a module's name, and what stands after it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from lora_lab.files import later

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "base_model.model."
"""What PEFT puts before the module's name in every key."""

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_LEADING = re.compile(r"^(?:module\.|base_model\.model\.)")

_PARTS = (
    "lora_A",
    "lora_B",
    "lora_E",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "lora_diag",
    "lora_arrow",
    "lora_monteclora_sampler",
)
"""What PEFT's LoRA layers call their tensors; a base module may have a name that only begins with lora_."""
_LORA = re.compile(rf"^(?P<module>.+?)\.(?P<part>{'|'.join(_PARTS)})(?P<rest>(?:\..+)?)$", re.DOTALL)
_BARE = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_E", "lora_arrow")
"""Parts that are parameters of PEFT's layers, not modules: an adapter's name follows them without .weight."""

_MISREAD = {
    "dora_scale": "a DoRA magnitude in another tool's format",
    "diff": "a whole weight's difference in another tool's format",
    "diff_b": "a bias's difference in another tool's format",
    "lora_mid": "a Tucker core (LoCon)",
    "weight_orig": "a pruned weight without its mask",
    "weight_mask": "a mask without the pruned weight",
    "weight_g": "weight normalisation",
    "weight_v": "weight normalisation",
    "qweight": "a quantised weight",
    "qzeros": "a quantised weight",
    "scales": "a quantised weight",
    "g_idx": "a quantised weight",
    "absmax": "a quantised weight",
    "nested_absmax": "a quantised weight",
    "quant_map": "a quantised weight",
    "nested_quant_map": "a quantised weight",
    "quant_state": "a quantised weight",
    "weight_scale": "a quantised weight",
    "weight_scale_inv": "a quantised weight",
    "weight_format": "a quantised weight",
    "SCB": "a quantised weight",
    "parametrizations": "a parametrised weight",
    "w_norm": "a norm in another tool's format",
    "b_norm": "a norm in another tool's format",
}
"""Component of a key → what it says; each changes what the weight is, and none is plain."""


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """A key that sorts paths by their numbers' values."""
    return [(0, int(part)) if part.isdecimal() and len(part) < 19 else (1, part) for part in name.split(".")]


def anchored(name: str) -> str:
    """A pattern key that matches this module alone."""
    return "^" + re.escape(name)


def clean(key: str) -> str:
    """The key without the prefixes of PEFT and of the wrappers (torch.compile, DDP, FSDP, checkpointing)."""
    return _unwrapped(key).replace(f".{PREFIX}", ".")


def misplaced(keys: Iterable[str]) -> list[str]:
    """The keys that have PEFT's prefix behind another module's name, where PEFT itself does not look for it."""
    return [key for key in keys if f".{PREFIX}" in _unwrapped(key)]


def _unwrapped(key: str) -> str:
    """The key without the wrappers' components and without the prefixes at its beginning."""
    key = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    while _LEADING.match(key):
        key = _LEADING.sub("", key, count=1)
    return key


def split(key: str, prefix: str, *, bare: bool = False) -> tuple[str, str, str] | None:
    """Module, part and adapter name ('' for none) of an adapter tensor's clean key; None for any other tensor.

    `bare`: the factors are parameters, not modules, so that an adapter's name may end the key (AdaLoRA).
    """
    if prefix == "lora_":
        return _split_lora(key, bare)
    match = re.match(rf"^(?P<module>.+?)\.(?P<part>{prefix}\w+)(?P<rest>(?:\..+)?)$", key)
    if not match:
        return None
    # parts may themselves be dotted, so only PEFT's usual name counts as one
    parts = match["rest"].removeprefix(".").split(".")
    name = "default" if "default" in parts else ""
    return match["module"], ".".join([match["part"], *(p for p in parts if p and p != name)]), name


def _split_lora(key: str, bare: bool) -> tuple[str, str, str] | None:
    match = _LORA.match(key)
    if not match or odd_content(key):
        return None
    module, part, rest = match["module"], match["part"], match["rest"].removeprefix(".")
    name, _, last = rest.rpartition(".")
    if last in ("weight", "bias"):
        return module, part + (".bias" if last == "bias" else ""), name
    if bare or part in _BARE or not rest or part == "lora_monteclora_sampler":
        return module, part, rest
    return None


def odd_content(key: str) -> str | None:
    """What a key's last components say that makes its tensor no plain weight, or None."""
    parts = key.split(".")
    if "parametrizations" in parts:
        return _MISREAD["parametrizations"]
    if "quant_state" in parts[-2:]:
        return _MISREAD["quant_state"]
    return _MISREAD.get(parts[-1])


def masked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with every weight_orig and its weight_mask (torch.nn.utils.prune) replaced by their product."""
    done = dict(tensors)
    for key, tensor in tensors.items():
        if not key.endswith("_orig"):
            continue
        stem = key.removesuffix("_orig")
        mask = tensors.get(f"{stem}_mask")
        if mask is not None and mask.shape == tensor.shape and stem not in tensors and tensor.is_floating_point():
            del done[key], done[f"{stem}_mask"]
            done[stem] = later(_masked, tensor, mask)
    return done


def _masked(tensor: Tensor, mask: Tensor) -> Tensor:
    return tensor * mask.to(tensor.dtype)


def without_name(key: str, names: Collection[str]) -> tuple[str, str]:
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


def unusable(keys: Iterable[str], longest: int = 1000) -> str | None:
    """What is wrong with the first key that can name no tensor of a module: too long, or control characters in it."""
    for key in keys:
        if len(key) > longest:
            return f"a tensor's name of {len(key)} characters ({key[:60]}…); at most {longest} are read"
        if not key.isprintable():
            return f"a tensor's name with characters that cannot be printed ({key[:200]!r})"
    return None
