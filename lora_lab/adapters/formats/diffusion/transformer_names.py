"""Modules of Flux.2, HunyuanVideo and Stable Diffusion 3 under their authors' names, and under diffusers'.

As in model_names.py: # is a number, and an authors' module of several names is shared out by rows.
"""

from __future__ import annotations

from collections.abc import Mapping

_DOUBLE, _SINGLE = "double_blocks.#.", "single_blocks.#."
_TWO, _ONE = "transformer_blocks.#.", "single_transformer_blocks.#."
_ATTENTION = tuple(f"{_TWO}attn.{part}" for part in ("to_q", "to_k", "to_v"))
_ADDED = tuple(f"{_TWO}attn.{part}" for part in ("add_q_proj", "add_k_proj", "add_v_proj"))

FLUX_2: Mapping[str, tuple[str, ...]] = {
    f"{_DOUBLE}img_attn.qkv": _ATTENTION,
    f"{_DOUBLE}txt_attn.qkv": _ADDED,
    f"{_DOUBLE}img_attn.proj": (f"{_TWO}attn.to_out.0",),
    f"{_DOUBLE}txt_attn.proj": (f"{_TWO}attn.to_add_out",),
    f"{_DOUBLE}img_mlp.0": (f"{_TWO}ff.linear_in",),
    f"{_DOUBLE}img_mlp.2": (f"{_TWO}ff.linear_out",),
    f"{_DOUBLE}txt_mlp.0": (f"{_TWO}ff_context.linear_in",),
    f"{_DOUBLE}txt_mlp.2": (f"{_TWO}ff_context.linear_out",),
    f"{_SINGLE}linear1": (f"{_ONE}attn.to_qkv_mlp_proj",),
    f"{_SINGLE}linear2": (f"{_ONE}attn.to_out",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    **{
        f"{part}_in.{layer}_layer": (f"time_guidance_embed.{name}_embedder.linear_{number}",)
        for part, name in (("time", "timestep"), ("guidance", "guidance"))
        for layer, number in (("in", 1), ("out", 2))
    },
    **{
        f"{part}.lin": (f"{part}.linear",)
        for part in ("single_stream_modulation", "double_stream_modulation_img", "double_stream_modulation_txt")
    },
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
ROWS_OF_FLUX_2 = {f"{_DOUBLE}{part}_attn.qkv": 3 for part in ("img", "txt")}
_WIDE = {f"{_DOUBLE}img_mlp.0": (6, 1), f"{_DOUBLE}txt_mlp.0": (6, 1), f"{_SINGLE}linear1": (9, 1)}
_WIDE |= {f"{_DOUBLE}img_mlp.2": (1, 3), f"{_DOUBLE}txt_mlp.2": (1, 3), f"{_SINGLE}linear2": (1, 4)}
"""Modules of which Flux.2 has other shapes than Flux.1: as many rows to so many columns."""


def is_flux_2(shapes: Mapping[str, tuple[int, int]], base: str | None) -> bool:
    """Whether modules (their names with # → rows and columns) are Flux.2's, which has most of its names from Flux.1."""
    return "flux.2" in str(base).lower() or any(
        name.partition(".")[0].endswith(("stream_modulation", "modulation_img", "modulation_txt"))
        or (name in _WIDE and rows * _WIDE[name][1] == columns * _WIDE[name][0])
        for name, (rows, columns) in shapes.items()
    )


_REFINER, _REFINED = "txt_in.individual_token_refiner.blocks.#.", "context_embedder.token_refiner.refiner_blocks.#."
HUNYUAN_VIDEO: Mapping[str, tuple[str, ...]] = {
    f"{_DOUBLE}img_attn_qkv": _ATTENTION,
    f"{_DOUBLE}txt_attn_qkv": _ADDED,
    f"{_DOUBLE}img_attn_proj": (f"{_TWO}attn.to_out.0",),
    f"{_DOUBLE}txt_attn_proj": (f"{_TWO}attn.to_add_out",),
    f"{_DOUBLE}img_mlp.fc1": (f"{_TWO}ff.net.0.proj",),
    f"{_DOUBLE}img_mlp.fc2": (f"{_TWO}ff.net.2",),
    f"{_DOUBLE}txt_mlp.fc1": (f"{_TWO}ff_context.net.0.proj",),
    f"{_DOUBLE}txt_mlp.fc2": (f"{_TWO}ff_context.net.2",),
    f"{_DOUBLE}img_mod.linear": (f"{_TWO}norm1.linear",),
    f"{_DOUBLE}txt_mod.linear": (f"{_TWO}norm1_context.linear",),
    f"{_SINGLE}linear1": (*(f"{_ONE}attn.{part}" for part in ("to_q", "to_k", "to_v")), f"{_ONE}proj_mlp"),
    f"{_SINGLE}linear2": (f"{_ONE}proj_out",),
    f"{_SINGLE}modulation.linear": (f"{_ONE}norm.linear",),
    "img_in.proj": ("x_embedder.proj",),
    **{
        f"{part}_in.mlp.{place}": (f"time_text_embed.{name}_embedder.linear_{number}",)
        for part, name in (("time", "timestep"), ("guidance", "guidance"))
        for place, number in ((0, 1), (2, 2))
    },
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    f"{_REFINER}self_attn_qkv": tuple(f"{_REFINED}attn.to_{letter}" for letter in "qkv"),
    f"{_REFINER}self_attn_proj": (f"{_REFINED}attn.to_out.0",),
    f"{_REFINER}mlp.fc1": (f"{_REFINED}ff.net.0.proj",),
    f"{_REFINER}mlp.fc2": (f"{_REFINED}ff.net.2",),
    f"{_REFINER}adaLN_modulation.1": (f"{_REFINED}norm_out.linear",),
    "txt_in.input_embedder": ("context_embedder.proj_in",),
    "txt_in.t_embedder.mlp.0": ("context_embedder.time_text_embed.timestep_embedder.linear_1",),
    "txt_in.t_embedder.mlp.2": ("context_embedder.time_text_embed.timestep_embedder.linear_2",),
    "txt_in.c_embedder.linear_1": ("context_embedder.time_text_embed.text_embedder.linear_1",),
    "txt_in.c_embedder.linear_2": ("context_embedder.time_text_embed.text_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
ROWS_OF_HUNYUAN_VIDEO = {f"{_DOUBLE}{part}_attn_qkv": 3 for part in ("img", "txt")}
ROWS_OF_HUNYUAN_VIDEO |= {f"{_SINGLE}linear1": 7, f"{_REFINER}self_attn_qkv": 3}

_IMAGE, _CONTEXT = "joint_blocks.#.x_block.", "joint_blocks.#.context_block."
SD_3: Mapping[str, tuple[str, ...]] = {
    f"{_IMAGE}attn.qkv": _ATTENTION,
    f"{_CONTEXT}attn.qkv": _ADDED,
    f"{_IMAGE}attn2.qkv": tuple(f"{_TWO}attn2.to_{letter}" for letter in "qkv"),
    f"{_IMAGE}attn.proj": (f"{_TWO}attn.to_out.0",),
    f"{_IMAGE}attn2.proj": (f"{_TWO}attn2.to_out.0",),
    f"{_CONTEXT}attn.proj": (f"{_TWO}attn.to_add_out",),
    f"{_IMAGE}mlp.fc1": (f"{_TWO}ff.net.0.proj",),
    f"{_IMAGE}mlp.fc2": (f"{_TWO}ff.net.2",),
    f"{_CONTEXT}mlp.fc1": (f"{_TWO}ff_context.net.0.proj",),
    f"{_CONTEXT}mlp.fc2": (f"{_TWO}ff_context.net.2",),
    f"{_IMAGE}adaLN_modulation.1": (f"{_TWO}norm1.linear",),
    f"{_CONTEXT}adaLN_modulation.1": (f"{_TWO}norm1_context.linear",),
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    **{
        f"{part}_embedder.mlp.{place}": (f"time_text_embed.{name}_embedder.linear_{number}",)
        for part, name in (("t", "timestep"), ("y", "text"))
        for place, number in ((0, 1), (2, 2))
    },
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
ROWS_OF_SD_3 = {f"{_IMAGE}attn.qkv": 3, f"{_CONTEXT}attn.qkv": 3, f"{_IMAGE}attn2.qkv": 3}
SWAPPED_IN_THE_LAST = f"{_CONTEXT}adaLN_modulation.1"
"""In the last block of Stable Diffusion 3, where it is two parts, diffusers has them the other way round."""
