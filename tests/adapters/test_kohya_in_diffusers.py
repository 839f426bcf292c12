"""Kohya's files as they are written here, loaded by diffusers' own pipelines: the same ΔW in every module.

Of what diffusers' conversion of such files knows: of U-Nets attention alone.
"""

from dataclasses import replace

import pytest
from test_diffusers import BLOCK, CLIP, assert_gives, pipelines, random_adapter

from lora_lab.adapters.files.converting import converted

__all__ = ["pipelines"]  # a fixture

NAMES = {
    "sd": [
        f"unet.{BLOCK}.attn1.to_q",
        f"unet.{BLOCK}.attn2.to_k",
        f"unet.{BLOCK}.attn1.to_out.0",
        f"unet.{BLOCK}.ff.net.0.proj",
        "unet.mid_block.attentions.0.proj_in",
        f"text_encoder.{CLIP}.0.self_attn.q_proj",
        f"text_encoder.{CLIP}.1.self_attn.out_proj",
    ],
    "sdxl": [
        "unet.down_blocks.1.attentions.1.proj_in",
        "unet.down_blocks.2.attentions.0.transformer_blocks.1.attn1.to_q",
        "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2",
        "unet.up_blocks.0.attentions.2.transformer_blocks.1.attn2.to_out.0",
        "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v",
        *(f"text_encoder.{CLIP}.0.self_attn.{part}" for part in ("q_proj", "out_proj")),
        *(f"text_encoder_2.{CLIP}.1.self_attn.{part}" for part in ("v_proj", "out_proj")),
    ],
    "flux": [
        *(f"transformer.transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v", "to_add_out")),
        "transformer.transformer_blocks.0.ff.net.2",
        "transformer.transformer_blocks.0.norm1.linear",
        "transformer.single_transformer_blocks.0.proj_out",
    ],
}


def sdxl_unet():
    """With the levels and layers of SDXL, on which its authors' names depend, and a depth that tells it from SD."""
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8, 8),
        layers_per_block=2,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        cross_attention_dim=8,
        attention_head_dim=2,
    )


@pytest.mark.parametrize("kind", NAMES)
def test_diffusers_gives_the_same_delta(tmp_path, pipelines, kind):
    pipe = pipelines(kind)
    if kind == "sdxl":
        pipe.register_modules(unet=sdxl_unet())
    # diffusers 0.42 loses the alphas of attention in files of U-Nets, so that those are tried at scale 1
    numbers = {"ranks": (4,), "alphas": (4.0,)} if "sd" in kind else {}
    adapter = random_adapter(pipe, tmp_path / "peft", NAMES[kind], **numbers)
    if kind == "flux":
        adapter = replace(adapter, config={**adapter.config, "base_model_name_or_path": "FLUX.1-dev"})
    assert_gives(pipe, converted(adapter, "kohya").adapter.save(tmp_path / "out.safetensors"), adapter)
