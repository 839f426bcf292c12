"""Tensors beside an adapter's own: heads and whole weights that are kept, and those that change what the adapter is."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_lab.adapters.formats.keys import PREFIX, clean, odd_content, split, without_name
from lora_lab.brief import Brief
from lora_lab.errors import shorten

if TYPE_CHECKING:
    from torch import Tensor

_WITHIN = ("base_layer", "original_module", "modules_to_save", "token_adapter")
"""What PEFT's own wrappers call what they hold."""


@dataclass(repr=False)
class Beside(Brief):
    """The tensors that belong to no module of the tuner."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """PEFT's key → tensor, to be carried along: heads, biases, embeddings, trained tokens."""
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def others(
    loose: Collection[tuple[str, Tensor]],
    adapter_name: str,
    names: Collection[str],
    alphas: Mapping[str, float | None],
    config: Mapping[str, Any],
    *,
    strict: bool,
) -> Beside:
    """What to make of the loose tensors (clean key, tensor) of the adapter `chosen` among `names`.

    `alphas` has what the configuration gives each adapted module; of them, no tensor is carried along that PEFT
    has no place for (`strict`; other tuners have tensors of names unknown here).
    """
    beside = Beside()
    # PEFT itself saves no key with an adapter's name in it: such a file is the state_dict of the whole model.
    weights = {f"{module}.weight" for module in alphas}
    whole = adapter_name != "" and any(key.endswith(".base_layer.weight") or key in weights for key, _ in loose)
    copies, strange = [], []
    for raw, tensor in loose:
        key, name = without_name(raw, names)
        owner = _owner(key, alphas)
        trained = key != raw or (config.get("bias", "none") != "none" and key.endswith(".bias"))
        odd = odd_content(key)
        if ".original_module." in f".{key}" or (whole and not trained and not odd):
            copies.append(key)
        elif owner is not None and key == f"{owner}.alpha":
            beside.problems += _alpha_problems(owner, tensor, alphas[owner])
        elif odd:
            strange.append(f"{key} ({odd})")
        elif strict and (split(key, "lora_") or ".lora_A." in key or ".lora_B." in key):
            strange.append(f"{key} (no .weight of a factor)")
        elif strict and owner is not None and key == f"{owner}.bias":  # as an early PEFT saved it
            beside.tensors[f"{PREFIX}{owner}.base_layer.bias"] = tensor
        elif strict and owner is not None and key[len(owner) + 1 :].split(".")[0] not in _WITHIN:
            strange.append(f"{key} (beside the factors of {owner})")
        elif name in ("", adapter_name) or name not in names:
            beside.tensors[PREFIX + key] = tensor
    if copies:
        beside.warnings.append(f"{len(copies)} copies of the base model's weights left out: {shorten(copies)}")
    if strange:
        beside.problems.append(
            f"tensors that no plain adapter has, and that may change what it does: {shorten(strange)}"
        )
    beside.problems += _token_problems(beside.tensors, config)
    return beside


def _owner(key: str, modules: Collection[str]) -> str | None:
    """The adapted module that the key's tensor lies in, the innermost one."""
    cut = key.rfind(".")
    while cut > 0:
        if key[:cut] in modules:
            return key[:cut]
        cut = key.rfind(".", 0, cut)
    return None


def _alpha_problems(module: str, tensor: Tensor, configured: float | None) -> list[str]:
    if tensor.numel() != 1 or tensor.is_complex():
        return [f"{module}.alpha has the shape {list(tensor.shape)}; one number belongs there"]
    value = float(tensor.reshape(()))
    if configured is None or not math.isclose(value, configured, rel_tol=1e-3):  # bfloat16 has three digits
        return [f"{module}.alpha is {value:g}, but the config gives that module lora_alpha {configured}"]
    return []


def _token_problems(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[str]:
    """Trained tokens whose number is not that of the configuration's token ids, which say where they go."""
    said = config.get("trainable_token_indices", config.get("token_indices"))
    problems = []
    for key, tensor in tensors.items():
        if not key.endswith("trainable_tokens_delta") or not tensor.ndim:
            continue
        layer = clean(key).removesuffix(".token_adapter.trainable_tokens_delta")
        ids = said
        if isinstance(said, Mapping):
            ids = next((tokens for name, tokens in said.items() if f".{layer}".endswith(f".{name}")), None)
        listed = len(ids) if isinstance(ids, list | tuple) else 0
        if listed != tensor.shape[0]:
            problems.append(
                f"{clean(key)} has {tensor.shape[0]} rows, but the config gives {layer} {listed} token ids "
                "(trainable_token_indices)"
            )
    return problems
