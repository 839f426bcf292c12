"""Transformers of diffusion models under their authors' names and under diffusers': modules renamed, split and joined.

What the authors fuse into one weight (query, key and value, in single blocks with the MLP) diffusers keeps apart, so
that a LoRA of the one is several: the rows of B are shared out, and A is the same; back, B becomes a matrix of blocks.
Both are exact. To the authors' names go models that the name of the base tells: nothing in a file tells the names that
diffusers has for two models apart. The names of some more models are in transformer_names.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_lab.adapters.formats.diffusion.components import numbers_for
from lora_lab.adapters.formats.diffusion.diffusion_names import MODEL, TRANSFORMER
from lora_lab.adapters.formats.diffusion.transformer_names import (
    FLUX_2,
    HUNYUAN_VIDEO,
    ROWS_OF_FLUX_2,
    ROWS_OF_HUNYUAN_VIDEO,
    ROWS_OF_SD_3,
    SD_3,
    SWAPPED_IN_THE_LAST,
    is_flux_2,
)
from lora_lab.adapters.formats.keys import PREFIX
from lora_lab.adapters.formats.peft.peft_config import exact_targets, tuner_of
from lora_lab.adapters.formats.sites import PLAIN, Site
from lora_lab.brief import Brief
from lora_lab.errors import AdapterError, TunerError, shorten

_DOUBLE, _SINGLE = "double_blocks.#.", "single_blocks.#."
_TWO, _ONE = "transformer_blocks.#.", "single_transformer_blocks.#."
_ATTENTION = tuple(f"{_TWO}attn.{part}" for part in ("to_q", "to_k", "to_v"))
_ADDED = tuple(f"{_TWO}attn.{part}" for part in ("add_q_proj", "add_k_proj", "add_v_proj"))
_EMBEDDER = "time_text_embed."

FLUX: Mapping[str, tuple[str, ...]] = {
    f"{_DOUBLE}img_attn.qkv": _ATTENTION,
    f"{_DOUBLE}txt_attn.qkv": _ADDED,
    f"{_DOUBLE}img_attn.proj": (f"{_TWO}attn.to_out.0",),
    f"{_DOUBLE}txt_attn.proj": (f"{_TWO}attn.to_add_out",),
    f"{_DOUBLE}img_mlp.0": (f"{_TWO}ff.net.0.proj",),
    f"{_DOUBLE}img_mlp.2": (f"{_TWO}ff.net.2",),
    f"{_DOUBLE}txt_mlp.0": (f"{_TWO}ff_context.net.0.proj",),
    f"{_DOUBLE}txt_mlp.2": (f"{_TWO}ff_context.net.2",),
    f"{_DOUBLE}img_mod.lin": (f"{_TWO}norm1.linear",),
    f"{_DOUBLE}txt_mod.lin": (f"{_TWO}norm1_context.linear",),
    f"{_SINGLE}linear1": (*(f"{_ONE}attn.{part}" for part in ("to_q", "to_k", "to_v")), f"{_ONE}proj_mlp"),
    f"{_SINGLE}linear2": (f"{_ONE}proj_out",),
    f"{_SINGLE}modulation.lin": (f"{_ONE}norm.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": (f"{_EMBEDDER}timestep_embedder.linear_1",),
    "time_in.out_layer": (f"{_EMBEDDER}timestep_embedder.linear_2",),
    "vector_in.in_layer": (f"{_EMBEDDER}text_embedder.linear_1",),
    "vector_in.out_layer": (f"{_EMBEDDER}text_embedder.linear_2",),
    "guidance_in.in_layer": (f"{_EMBEDDER}guidance_embedder.linear_1",),
    "guidance_in.out_layer": (f"{_EMBEDDER}guidance_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
"""The authors' name → diffusers' names, from the first row on; # is a number."""
_SWAPPED = "final_layer.adaLN_modulation.1"
"""Whose two halves, shift and scale, diffusers has the other way round."""
_ROWS = {f"{_DOUBLE}img_attn.qkv": 3, f"{_DOUBLE}txt_attn.qkv": 3, f"{_SINGLE}linear1": 7}
_ROWS |= {f"{_DOUBLE}img_mlp.0": 4, f"{_DOUBLE}txt_mlp.0": 4}
"""How many times as many rows as columns; of Flux.2, whose names are the same in part, there are more."""

WAN: Mapping[str, tuple[str, ...]] = {
    **{
        f"blocks.#.{theirs}.{part}": (f"blocks.#.{ours}.{name}",)
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    },
    "blocks.#.cross_attn.k_img": ("blocks.#.attn2.add_k_proj",),
    "blocks.#.cross_attn.v_img": ("blocks.#.attn2.add_v_proj",),
    "blocks.#.ffn.0": ("blocks.#.ffn.net.0.proj",),
    "blocks.#.ffn.2": ("blocks.#.ffn.net.2",),
    "patch_embedding": ("patch_embedding",),
    "text_embedding.0": ("condition_embedder.text_embedder.linear_1",),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2",),
    "time_embedding.0": ("condition_embedder.time_embedder.linear_1",),
    "time_embedding.2": ("condition_embedder.time_embedder.linear_2",),
    "time_projection.1": ("condition_embedder.time_proj",),
    "head.head": ("proj_out",),
}

_LAYERS = ("layers", "noise_refiner", "context_refiner")
Z_IMAGE: Mapping[str, tuple[str, ...]] = {
    **{f"{part}.#.attention.qkv": tuple(f"{part}.#.attention.to_{letter}" for letter in "qkv") for part in _LAYERS},
    **{f"{part}.#.attention.out": (f"{part}.#.attention.to_out.0",) for part in _LAYERS},
}
_ROWS |= {f"{part}.#.attention.qkv": 3 for part in _LAYERS}
_SAME = re.compile(
    rf"transformer_blocks\.\d+\.|({'|'.join(_LAYERS)})\.\d+\.(attention|feed_forward|adaLN_modulation)\."
)
"""Of models whose other modules have one name in both: Qwen-Image and Z-Image."""


@dataclass(frozen=True, repr=False)
class Factors(Brief):
    """A LoRA of one module."""

    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None
    """Of DoRA, a number for each row of B."""


def to_diffusers(adapter: Any) -> Any:
    """The adapter with diffusers' names (transformer.…) for modules of `diffusion_model.`; itself where there are none.

    Raises AdapterError, listing them, for modules that diffusers' name is not known of.
    """
    theirs = [name for name in adapter.sites if name.startswith(MODEL)]
    if not theirs or tuner_of(adapter.config) != "LORA":
        return adapter
    paths = [name.removeprefix(MODEL) for name in theirs]
    factors = {path: _factors(adapter, name) for name, path in zip(theirs, paths, strict=True)}
    table, rows = _table_of(factors, adapter.base_model)
    made: dict[str, Factors] = {}
    unknown = []
    for name, path in zip(theirs, paths, strict=True):
        pattern = _pattern(path)
        ours = table.get(pattern) or table.get(path)
        own = factors[path]
        if ours is None or (pattern in rows and own.A.ndim == 2 and len(own.B) != rows[pattern] * own.A.shape[1]):
            unknown.append(name)
            continue
        number = re.search(r"\.(\d+)\.", path)
        names = [TRANSFORMER + new.replace("#", number[1] if number else "") for new in ours]
        made |= _shared_out(names, own) if len(names) > 1 else {names[0]: _as_ours(own, pattern)}
    if unknown:
        raise AdapterError(
            f"diffusers' names are not known of {len(unknown)} of {len(theirs)} modules: {shorten(unknown, 8)}"
        )
    return _with(adapter, theirs, made)


def _table_of(
    factors: Mapping[str, Factors], base: str | None
) -> tuple[Mapping[str, tuple[str, ...]], Mapping[str, int]]:
    """The names of the model that has these modules, and how many times as many rows as columns some of them have."""
    shapes = {_pattern(path): (len(own.B), own.A.shape[1]) for path, own in factors.items()}
    if any(path.startswith("joint_blocks.") for path in shapes):
        return SD_3, ROWS_OF_SD_3
    if any(map(_HUNYUAN.match, shapes)):
        return HUNYUAN_VIDEO, ROWS_OF_HUNYUAN_VIDEO
    if any(path.startswith(("double_", "single_")) for path in shapes):
        return (FLUX_2, ROWS_OF_FLUX_2) if is_flux_2(shapes, base) else (FLUX, _ROWS)
    if any(map(_SAME.match, factors)):
        return {**{path: (path,) for path in factors}, **Z_IMAGE}, _ROWS
    return WAN, _ROWS


_HUNYUAN = re.compile(
    r"double_blocks\.#\.(img|txt)_(attn_|mlp\.fc|mod\.linear)|single_blocks\.#\.modulation\.linear|txt_in\."
)
"""Modules that HunyuanVideo has by names of its own."""


_MODELS: Mapping[str, tuple[Mapping[str, tuple[str, ...]], Mapping[str, int]]] = {
    "FLUX.1": (FLUX, _ROWS),
    "FLUX.2": (FLUX_2, ROWS_OF_FLUX_2),
    "stable-diffusion-3": (SD_3, ROWS_OF_SD_3),
    "HunyuanVideo": (HUNYUAN_VIDEO, ROWS_OF_HUNYUAN_VIDEO),
}
"""What the name of a base model has in it → its modules' names, and how many times as many rows as columns."""


def to_authors(adapter: Any) -> Any:
    """The adapter with the authors' names (diffusion_model.…) for modules of `transformer.`, or itself.

    Which model it is, the name of the base model must say (Flux.2's own modules do, too): a file's names alone are
    those of other models. Raises AdapterError for a module that its model does not have.
    """
    ours = [name for name in adapter.sites if name.startswith(TRANSFORMER)]
    model = _model_of(str(adapter.base_model), ours)
    if model is None or not ours or tuner_of(adapter.config) != "LORA":
        return adapter
    table, rows = _MODELS[model]
    whole = {new: (pattern, news.index(new)) for pattern, news in table.items() for new in news}
    parts: dict[str, dict[int, Factors]] = {}
    for name in ours:
        path = name.removeprefix(TRANSFORMER)
        found = whole.get(_pattern(path))
        if found is None:
            raise AdapterError(f"{name} is no module of {model} that its authors' name is known of")
        number = re.search(r"\.(\d+)\.", path)
        theirs = MODEL + found[0].replace("#", number[1] if number else "")
        parts.setdefault(theirs, {})[found[1]] = _factors(adapter, name)
    made = {}
    for theirs, own in parts.items():
        pattern = _pattern(theirs.removeprefix(MODEL))
        if len(table[pattern]) > 1:
            made[theirs] = _joined(theirs, own, rows[pattern], len(table[pattern]))
        else:
            made[theirs] = _as_ours(own[0], pattern)
    return _with(adapter, ours, made)


def _model_of(base: str, names: Sequence[str]) -> str | None:
    if any(re.search(r"\.to_qkv_mlp_proj$|_stream_modulation\w*\.linear$", name) for name in names):
        return "FLUX.2"
    if re.search(r"hunyuanvideo-?1\.5", base, re.IGNORECASE):
        return None  # whose names are its own
    return next((model for model in _MODELS if model.lower() in base.lower()), None)


def _pattern(path: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", path, count=1)


def _as_ours(own: Factors, pattern: str) -> Factors:
    """A LoRA of a module whose rows the other side has in the same order, or with its two halves turned."""
    halves = pattern == SWAPPED_IN_THE_LAST and len(own.B) == 2 * own.A.shape[1]
    return _swapped(own) if pattern == _SWAPPED or halves else own


def _factors(adapter: Any, name: str) -> Factors:
    site = adapter.sites[name]
    if site.scale is None or not (PLAIN | {"lora_magnitude_vector"}).issuperset(site.keys) or site.kind == "embedding":
        raise TunerError(f"{name}: of a {site.kind} with {shorten(site.keys)} the name in another model is not known")
    A, B = (adapter.tensors[site.keys[part]] for part in site.pair)
    magnitude = adapter.tensors[site.keys["lora_magnitude_vector"]] if "lora_magnitude_vector" in site.keys else None
    return Factors(A, B, site.scale, magnitude)


def _swapped(own: Factors) -> Factors:
    """The two halves of the rows the other way round."""
    half = len(own.B) // 2
    magnitude = None if own.magnitude is None else own.magnitude.roll(half)
    return Factors(own.A, own.B.roll(half, 0), own.scale, magnitude)


def _shared_out(names: Sequence[str], own: Factors) -> dict[str, Factors]:
    """The rows of B by module: as many as A has columns for each, and the rest for the last; A without idle units."""
    size, parts = own.A.shape[1], {}
    for place, name in enumerate(names):
        rows = slice(place * size, None if place == len(names) - 1 else (place + 1) * size)
        B = own.B[rows]
        used = (B != 0).any(0)
        if not used.any():
            used[:1] = True
        magnitude = None if own.magnitude is None else own.magnitude[rows].clone()
        parts[name] = Factors(own.A[used].clone(), B[:, used].clone(), own.scale, magnitude)
    return parts


def _joined(name: str, parts: Mapping[int, Factors], times: int, count: int) -> Factors:
    """One LoRA of all rows: units of equal A once, those of others in blocks; rows of parts that are missing are 0."""
    first, size = next(iter(parts.values())), next(iter(parts.values())).A.shape[1]
    heights = [size] * (count - 1) + [(times - count + 1) * size]
    wrong = [place for place, part in parts.items() if part.A.shape[1] != size or len(part.B) != heights[place]]
    if wrong:
        raise AdapterError(f"{name}: its parts do not fit together, of {size} columns and {heights} rows")
    if any(part.magnitude is not None for part in parts.values()) and len(parts) < count:
        raise TunerError(f"{name}: a DoRA of some of its parts is none of the whole, whose magnitudes would be missing")
    even = len({part.scale for part in parts.values()}) == 1
    scale = first.scale if even else 1.0
    dtype = first.B.dtype if even else torch.promote_types(first.B.dtype, torch.float32)
    shared = len(parts) > 1 and all(torch.equal(part.A, first.A) for part in parts.values())
    A = first.A if shared else torch.cat([parts[place].A for place in sorted(parts)])
    B, column = torch.zeros(sum(heights), len(A), dtype=dtype), 0
    for place in sorted(parts):
        part, row = parts[place], sum(heights[:place])
        width = len(part.A)
        B[row : row + heights[place], column : column + width] = part.B if even else part.B.to(dtype) * part.scale
        column += 0 if shared else width
    magnitudes = [part.magnitude for _, part in sorted(parts.items()) if part.magnitude is not None]
    return Factors(A, B, scale, torch.cat(magnitudes) if magnitudes else None)


def _with(adapter: Any, gone: Sequence[str], made: Mapping[str, Factors]) -> Any:
    """The adapter with other modules in the place of some."""
    twice = [name for name in made if name in adapter.sites and name not in gone]
    if twice:
        raise AdapterError(f"two modules would have one name: {shorten(twice)}")
    owned = {key for name in gone for key in adapter.sites[name].keys.values()}
    tensors = {key: tensor for key, tensor in adapter.tensors.items() if key not in owned}
    sites = {name: site for name, site in adapter.sites.items() if name not in gone}
    for name, own in made.items():
        keys = {part: f"{PREFIX}{name}.{part}.weight" for part in ("lora_A", "lora_B")}
        tensors |= {keys["lora_A"]: own.A.contiguous(), keys["lora_B"]: own.B.contiguous()}
        if own.magnitude is not None:
            keys["lora_magnitude_vector"] = f"{PREFIX}{name}.lora_magnitude_vector"
            tensors[keys["lora_magnitude_vector"]] = own.magnitude
        kind = "linear" if own.A.ndim == 2 else f"conv{own.A.ndim - 2}d"
        sites[name] = Site(name, kind, keys, len(own.A), own.scale)
    ranks = {name: site.rank for name, site in sites.items()}
    alphas = {name: _alpha(site) for name, site in sites.items()}
    config = {**adapter.config, **numbers_for(ranks, alphas), "target_modules": exact_targets(sites, ())}
    return replace(adapter, tensors=tensors, sites=sites, config={**config, "use_rslora": False})


def _alpha(site: Site) -> float:
    alpha = (site.scale or 0.0) * (site.rank or 0)
    return round(alpha) if abs(alpha - round(alpha)) < 1e-14 * abs(alpha) else alpha
