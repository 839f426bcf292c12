"""Adapters of mlx-lm: adapters.safetensors, with lora_a [in, r] and lora_b [r, out], and one scale for all modules.

ΔW = scale · (lora_a lora_b)ᵀ of a linear layer, scale · lora_a lora_b of an embedding. DoRA adds m, the magnitude of
each output, as PEFT has it. Source: mlx-lm 0.32, tuner/lora.py, tuner/dora.py and tuner/utils.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_lab.adapters.formats import carried
from lora_lab.adapters.formats.keys import PREFIX
from lora_lab.adapters.formats.layout import Content, Layout, Part, Raw, Writable
from lora_lab.adapters.formats.peft.peft_config import brief, count, exact_targets, number
from lora_lab.errors import TunerError, shorten
from lora_lab.files import later

if TYPE_CHECKING:
    from torch import Tensor

_NAME = "mlx"
_PARTS = {"lora_a": "lora_A", "lora_b": "lora_B", "m": "lora_magnitude_vector"}
_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "tok_embeddings", "word_embeddings", "embedding", "embeddings")
"""What mlx-lm's models call their embeddings, whose update is not transposed."""
_KINDS = {"lora": False, "dora": True}
"""fine_tune_type → whether every module has a magnitude."""


def matches(raw: Raw) -> bool:
    """By keys that end in lora_a and lora_b, or by what only mlx-lm says in its configuration."""
    said = raw.settings or {}
    return any(key.endswith((".lora_a", ".lora_b")) for key in raw.tensors) or (
        "peft_type" not in said and ("lora_parameters" in said or "fine_tune_type" in said)
    )


def read(raw: Raw) -> Content:
    """The tensors transposed to PEFT's, with lora_alpha = scale · rank."""
    said = raw.settings or {}
    problems = _problems(raw, said)
    if problems:
        return Content({}, {}, problems=problems)
    tensors: dict[str, Tensor] = {}
    modules: dict[str, None] = {}
    for key, tensor in raw.tensors.items():
        module, _, last = key.rpartition(".")
        part = _PARTS.get(last) if f"{module}.lora_a" in raw.tensors or f"{module}.lora_b" in raw.tensors else None
        if part is None:
            tensors[PREFIX + key] = tensor
            continue
        modules[module] = None
        end = part.replace("lora_", "lora_embedding_") if _is_embedding(module) else f"{part}.weight"
        if tensor.ndim == 2:
            tensors[f"{PREFIX}{module}.{end}"] = later(_transposed, tensor)
        else:
            tensors[f"{PREFIX}{module}.{part}"] = tensor
    parameters = said["lora_parameters"]
    rank, scale = parameters["rank"], float(parameters["scale"])
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": number(parameters.get("dropout")) or 0.0,
        "target_modules": exact_targets(modules, ()),
        "use_dora": _KINDS[_kind(said)],
        "fan_in_fan_out": said.get("fan_in_fan_out") is True,
    }
    if isinstance(said.get("model"), str):
        config["base_model_name_or_path"] = said["model"]
    notes = []
    if "alpha" in parameters:
        notes.append(
            f"alpha beside the scale {scale:g} in its configuration is not used, as in today's mlx-lm; its first "
            "versions multiplied by alpha / rank too"
        )
    if raw.alpha is not None and raw.alpha != config["lora_alpha"]:
        notes.append(f"alpha {raw.alpha:g} is not used, the scale {scale:g} of its configuration is")
    return Content(tensors, config, Layout(_NAME), notes)


def _is_embedding(module: str) -> bool:
    return module.rpartition(".")[2] in _EMBEDDINGS


def _kind(said: Mapping[str, Any]) -> Any:
    return said.get("fine_tune_type", "lora")


def _problems(raw: Raw, said: Mapping[str, Any]) -> list[str]:
    """Why a file of mlx-lm's is no adapter that can be used."""
    if not said:
        return [
            "an MLX adapter without its adapter_config.json, which says the scale; it is needed beside it (`config`)"
        ]
    if _kind(said) == "full":
        return [
            "whole weights of an MLX fine-tuning (fine_tune_type full), no adapter; the fused model is what it gives"
        ]
    if not (isinstance(_kind(said), str) and _kind(said) in _KINDS):
        return [f"fine_tune_type is {brief(_kind(said))} in its adapter_config.json; {' or '.join(_KINDS)} is read"]
    parameters = said.get("lora_parameters")
    if not isinstance(parameters, Mapping):
        return [f"lora_parameters is {brief(parameters)} in its adapter_config.json; rank and scale belong there"]
    problems = []
    if count(parameters.get("rank")) is None:
        problems.append(f"rank is {brief(parameters.get('rank'))} in lora_parameters; at least 1 belongs there")
    if number(parameters.get("scale")) is None:
        problems.append(f"scale is {brief(parameters.get('scale'))} in lora_parameters; a number belongs there")
    stacks = [key for key, tensor in raw.tensors.items() if key.endswith((".lora_a", ".lora_b")) and tensor.ndim != 2]
    if stacks:
        problems.append(
            f"{shorten(stacks)} has the shape {list(raw.tensors[stacks[0]].shape)}: a stack of experts, which is not "
            "read; two dimensions are needed"
        )
    scaled = [key for key in raw.tensors if key.endswith(".m") and _is_embedding(key.removesuffix(".m"))]
    if scaled:
        problems.append(f"{shorten(scaled)}: DoRA of an embedding, which PEFT computes in another way")
    return problems


def write(adapter: Writable) -> Mapping[str, Part]:
    """One file and its configuration; uneven ranks are padded with zeros, uneven scales multiplied into lora_b."""
    dora = adapter.config.get("use_dora") is True
    kinds = ("linear",) if dora else ("linear", "embedding")
    carried.require(adapter, "an MLX adapter", kinds=kinds, parts=("lora_magnitude_vector",))
    sites = adapter.sites.values()
    odd = [site.name for site in sites if (site.kind == "embedding") != _is_embedding(site.name)]
    if odd:
        raise TunerError(
            f"an MLX adapter tells embeddings by their names ({', '.join(_EMBEDDINGS)}), which does not fit "
            f"{shorten(odd)}"
        )
    rank = max(site.rank or 0 for site in sites)
    scales = Counter(site.scale for site in sites)
    scale = 1.0 if len(scales) > 1 else float(next(iter(scales)) or 0.0)
    tensors: dict[str, Tensor] = {}
    for site in sites:
        A, B = (adapter.tensors[site.keys[part]] for part in site.pair)
        if len(scales) > 1:
            B = _scaled(B, site.scale or 0.0)
        tensors[f"{site.name}.lora_a"] = later(lambda A: _transposed(_padded(A, rank - A.shape[0], 0)), A)
        tensors[f"{site.name}.lora_b"] = later(lambda B: _transposed(_padded(B, rank - B.shape[1], 1)), B)
        if "lora_magnitude_vector" in site.keys:
            tensors[f"{site.name}.m"] = adapter.tensors[site.keys["lora_magnitude_vector"]]
    notes = []
    padded = [site.name for site in sites if site.rank != rank]
    if padded:
        notes.append(f"ranks of {len(padded)} modules are padded with zeros to {rank}, MLX's one rank for all")
    if len(scales) > 1:
        notes.append("scales that differ are multiplied into lora_b, MLX having one scale for all")
    return {"": Part(tensors, {}, _settings(adapter, rank, scale), notes)}


def _settings(adapter: Writable, rank: int, scale: float) -> dict[str, Any]:
    keys: dict[str, None] = {}
    for name in adapter.sites:
        parts = name.split(".")
        layer = next((i for i, part in enumerate(parts) if part.isdecimal()), -1)
        keys[".".join(parts[layer + 1 :])] = None  # within its layer, or of the model where it is in none
    dropout = number(adapter.config.get("lora_dropout")) or 0.0
    base = adapter.config.get("base_model_name_or_path")
    return {
        **({"model": base} if base else {}),
        "fine_tune_type": "dora" if adapter.config.get("use_dora") is True else "lora",
        "num_layers": -1,  # mlx-lm's word for all
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": dropout, "keys": list(keys)},
        **({"fan_in_fan_out": True} if adapter.config.get("fan_in_fan_out") else {}),
    }


def _scaled(B: Tensor, scale: float) -> Tensor:
    """scale · B, in B's type where nothing is lost by it, else in float32 as ΔW is computed."""
    import torch

    wide = B.to(torch.float64 if B.dtype == torch.float64 else torch.float32) * scale
    same = wide.to(B.dtype)
    return same if torch.equal(same.to(wide.dtype), wide) else wide


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous()


def _padded(tensor: Tensor, more: int, dim: int) -> Tensor:
    import torch

    shape = list(tensor.shape)
    shape[dim] = more
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)
