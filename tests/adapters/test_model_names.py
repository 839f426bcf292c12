"""Modules of transformers renamed, split and joined: the same ΔW row by row, and what diffusers makes of one file."""

from dataclasses import replace

import pytest
import torch

from lora_lab import Adapter
from lora_lab.adapters.files.converting import converted, save
from lora_lab.adapters.formats.diffusion.model_names import FLUX, to_authors, to_diffusers
from lora_lab.errors import AdapterError, TunerError
from tests.adapters.test_comfy import dotted
from tests.adapters.test_kohya import load, pair, random

BASE = "black-forest-labs/FLUX.1-dev"
WIDTH = 8
ROWS = {"qkv": 3, "linear1": 7, "mlp.0": 4, "adaLN_modulation.1": 2, "lin": 6}


def flux(**options):
    """A LoRA of every module of a Flux of one double and one single block."""
    tensors = {}
    for seed, pattern in enumerate(FLUX):
        rows = next((times for end, times in ROWS.items() if pattern.endswith(end)), 1) * WIDTH
        name = f"diffusion_model.{pattern.replace('#', '5')}"
        tensors |= dotted(name, rows=rows, columns=WIDTH, seed=10 * seed, **options)
    return tensors


def named(adapter, base):
    return replace(adapter, config={**adapter.config, "base_model_name_or_path": base})


def rows_of(adapter, pattern):
    """ΔW of an authors' module, put together from diffusers' ones."""
    names = [f"transformer.{new.replace('#', '5')}" for new in FLUX[pattern]]
    whole = torch.cat([adapter.updates[name].delta() for name in names])
    return torch.cat(whole.chunk(2)[::-1]) if pattern.startswith("final_layer.adaLN") else whole


@pytest.mark.parametrize("alpha", [2.0, 3.0])
def test_flux_has_the_same_delta_under_diffusers_names_and_back(tmp_path, alpha):
    theirs = load(tmp_path, flux(rank=3, alpha=alpha))
    ours = to_diffusers(theirs)
    assert len(ours.sites) == sum(len(names) for names in FLUX.values())
    for pattern in FLUX:
        assert torch.equal(
            rows_of(ours, pattern), theirs.updates[f"diffusion_model.{pattern.replace('#', '5')}"].delta()
        )
    back = to_authors(named(ours, BASE))
    assert back.sites.keys() == theirs.sites.keys()
    for name, update in theirs.updates.items():
        assert torch.equal(back.updates[name].delta(), update.delta())
        assert back.updates[name].rank == update.rank  # its parts have one A


def test_parts_of_their_own_become_blocks_and_come_apart_again(tmp_path):
    """As sd-scripts trains query, key and value apart: ranks add, and units that are 0 in a part leave it."""
    names = [f"transformer.single_transformer_blocks.5.{part}" for part in ("attn.to_q", "attn.to_v", "proj_mlp")]
    tensors = {}
    for seed, (name, rank, alpha) in enumerate(zip(names, (2, 3, 1), (2.0, 1.0, 3.0), strict=True)):
        rows = (4 if name.endswith("mlp") else 1) * WIDTH
        tensors |= dotted(name, rank=rank, alpha=alpha, rows=rows, columns=WIDTH, seed=50 * seed)
    ours = named(load(tmp_path, tensors), BASE)
    joined = to_authors(ours)
    whole = joined.updates["diffusion_model.single_blocks.5.linear1"]
    assert whole.rank == 6
    for name, start, stop in zip(names, (0, 2, 3), (1, 3, 7), strict=True):
        torch.testing.assert_close(whole.delta()[start * WIDTH : stop * WIDTH], ours.updates[name].delta())
    assert not whole.delta()[WIDTH : 2 * WIDTH].any()
    apart = to_diffusers(joined)
    assert [apart.updates[name].rank for name in names] == [2, 3, 1]
    for name in names:
        torch.testing.assert_close(apart.updates[name].delta(), ours.updates[name].delta())
    assert not apart.updates["transformer.single_transformer_blocks.5.attn.to_k"].delta().any()


def test_dora_comes_apart_by_rows_and_goes_together_if_whole(tmp_path):
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    magnitude = random(3 * WIDTH, 1)
    theirs = load(tmp_path, {**dotted(name, rows=3 * WIDTH, columns=WIDTH), f"{name}.dora_scale": magnitude})
    ours = to_diffusers(theirs)
    key = "base_model.model.transformer.transformer_blocks.0.attn.{}.lora_magnitude_vector"
    parts = [ours.tensors[key.format(part)] for part in ("to_q", "to_k", "to_v")]
    assert torch.equal(torch.cat(parts), magnitude.flatten())
    back = to_authors(named(ours, BASE))
    assert torch.equal(back.tensors[f"base_model.model.{name}.lora_magnitude_vector"], magnitude.flatten())
    missing = replace(ours, sites={n: s for n, s in ours.sites.items() if not n.endswith("to_k")})
    with pytest.raises(TunerError, match="a DoRA of some of its parts is none of the whole"):
        to_authors(named(missing, BASE))


def test_diffusers_reads_the_same_from_kohyas_file(tmp_path):
    """Against diffusers' own conversion, at Flux's real width, which that has written into it."""
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    width = 3072
    tensors = {}
    for name, times in (
        ("double_blocks_0_txt_attn_qkv", 3),
        ("single_blocks_0_linear1", 7),
        ("single_blocks_0_linear2", 1),
    ):
        tensors |= pair(f"lora_unet_{name}", rank=2, rows=times * width, columns=width, alpha=1.0)
    tensors |= pair("lora_unet_final_layer_adaLN_modulation_1", rank=2, rows=2 * width, columns=width, alpha=2.0)
    adapter = to_diffusers(load(tmp_path, tensors))
    theirs = conversion._convert_kohya_flux_lora_to_diffusers(dict(tensors))
    names = {key.rpartition(".lora_")[0] for key in theirs}
    assert {name if name.startswith("transformer.") else f"transformer.{name}" for name in names} == set(adapter.sites)
    probe = random(width)
    for name in names:
        ours = adapter.updates[name if name.startswith("transformer.") else f"transformer.{name}"]
        A, B = (theirs[f"{name}.lora_{half}.weight"] for half in "AB")
        torch.testing.assert_close(ours.B @ (ours.A @ probe), B @ (A @ probe), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("blocks.3.self_attn.o", "blocks.3.attn1.to_out.0"),
        ("blocks.3.cross_attn.k_img", "blocks.3.attn2.add_k_proj"),
        ("blocks.3.ffn.0", "blocks.3.ffn.net.0.proj"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("transformer_blocks.3.attn.add_q_proj", "transformer_blocks.3.attn.add_q_proj"),
        ("layers.3.attention.to_q", "layers.3.attention.to_q"),
        ("layers.3.attention.out", "layers.3.attention.to_out.0"),
    ],
)
def test_names_of_wan_qwen_image_and_z_image(tmp_path, theirs, ours):
    adapter = to_diffusers(load(tmp_path, dotted(f"diffusion_model.{theirs}")))
    assert list(adapter.sites) == [f"transformer.{ours}"]


def test_z_images_fused_attention_comes_apart(tmp_path):
    theirs = load(tmp_path, dotted("diffusion_model.layers.0.attention.qkv", rows=24, columns=8))
    ours = to_diffusers(theirs)
    parts = [ours.updates[f"transformer.layers.0.attention.to_{letter}"].delta() for letter in "qkv"]
    assert torch.equal(torch.cat(parts), next(iter(theirs.updates.values())).delta())


@pytest.mark.parametrize(
    "tensors",
    [
        dotted("diffusion_model.joint_blocks.0.x_block.attn.qkv"),  # of a shape that it cannot have
        dotted("diffusion_model.joint_blocks.0.y_block.attn.proj"),
        dotted("diffusion_model.double_blocks.0.img_attn.qkv", rows=9, columns=8),
        dotted("diffusion_model.single_blocks.0.linear1", rows=64, columns=8),
        {**dotted("diffusion_model.double_blocks.0.img_attn.proj"), **dotted("diffusion_model.double_blocks.0.x")},
    ],
)
def test_names_that_are_not_known_are_listed(tmp_path, tensors):
    with pytest.raises(AdapterError, match=r"diffusers' names are not known of 1 of \d modules: diffusion_model\."):
        converted(load(tmp_path, tensors), "diffusers")


def test_convert_takes_kohyas_flux_to_diffusers_and_back(tmp_path):
    theirs = load(
        tmp_path, {**flux(), **dotted("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1")}
    )
    made = converted(theirs, "diffusers")
    assert made.changes == ["24 modules are 31 under the names that the format has for them"]
    read, _ = save(made.adapter, tmp_path / "diffusers")
    assert all(name.startswith(("transformer.", "text_encoder.")) for name in read.sites)
    back, _ = save(converted(named(read, BASE), "kohya").adapter, tmp_path / "back.safetensors")
    assert back.sites.keys() == theirs.sites.keys()
    for name, update in theirs.updates.items():
        torch.testing.assert_close(back.updates[name].delta(), update.delta())


def test_only_a_model_that_is_called_flux_gets_its_authors_names(tmp_path):
    adapter = load(tmp_path, dotted("transformer.transformer_blocks.0.attn.to_q"))
    assert to_authors(adapter) is adapter
    converted(adapter, "kohya").adapter.save(tmp_path / "out.safetensors")
    assert list(Adapter.load(tmp_path / "out.safetensors").sites) == list(adapter.sites)


def test_other_tuners_stay_as_they_are(tmp_path):
    from tests.adapters.test_lycoris import loha

    adapter = load(tmp_path, loha("diffusion_model.blocks.0.self_attn.q"))
    assert to_diffusers(adapter) is adapter
