"""Layers whose weights are kept as codes (bitsandbytes, GPTQ, AWQ …): what can be known of them, and what cannot."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_lab.errors import MismatchError


def weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """Of a layer's weight; where that holds codes, packed as they are, of the weight that they stand for."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return tuple(weight.shape)
    if not is_quantised(module):
        return None
    sides = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return None if None in sides else sides  # type: ignore[return-value]


def require_weights(model: nn.Module, base: str) -> None:
    """MismatchError where a base's weights are codes, to which nothing can be added."""
    odd = next((n for n, module in model.named_modules() if is_quantised(module)), None)
    if odd is not None:
        raise MismatchError(
            f"{base}: {odd} is quantised ({type(model.get_submodule(odd)).__name__}), and ΔW cannot be had from codes; "
            "the model that it was made from is needed as base"
        )


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer's weight is kept as codes: packed in `weight`, or in `qweight` (GPTQ, AWQ)."""
    weight = getattr(module, "weight", None)
    return hasattr(module, "qweight") or (isinstance(weight, Tensor) and not weight.is_floating_point())
