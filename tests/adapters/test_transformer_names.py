"""Flux.2, HunyuanVideo and Stable Diffusion 3 in diffusers' names: against diffusers' own conversions."""

from dataclasses import replace

import pytest
import torch

from lora_lab import Adapter
from lora_lab.adapters.files.converting import converted
from lora_lab.adapters.formats.diffusion.model_names import to_diffusers
from lora_lab.adapters.formats.diffusion.transformer_names import FLUX_2, HUNYUAN_VIDEO, SD_3
from tests.adapters.test_comfy import dotted
from tests.adapters.test_kohya import load

WIDTH = 8
FLUX_2_SHAPES = {"qkv": (3, 1), "linear1": (9, 1), "linear2": (1, 4), "mlp.0": (6, 1), "mlp.2": (1, 3), "1": (2, 1)}


def tensors_of(table, shapes, numbers=(0,)):
    """A LoRA of every module of a table; `shapes` gives rows and columns in widths by the ends of names."""
    tensors = {}
    for number in numbers:
        for seed, pattern in enumerate(table):
            if number == numbers[0] or "#" in pattern:
                rows, columns = next((shape for end, shape in shapes.items() if pattern.endswith(end)), (1, 1))
                name = f"diffusion_model.{pattern.replace('#', str(number))}"
                seed += 100 * number
                tensors |= dotted(name, rank=2, alpha=2.0, rows=rows * WIDTH, columns=columns * WIDTH, seed=seed)
    return tensors


def compared(ours, theirs):
    """The same modules with the same ΔW, alpha being the rank."""
    assert {key.rpartition(".lora_")[0] for key in theirs} == set(ours.sites)
    for name, update in ours.updates.items():
        A, B = (theirs[f"{name}.lora_{half}.weight"] for half in "AB")
        torch.testing.assert_close(update.delta(), B @ A)


def without_alphas(tensors):
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}


def test_flux_2_is_as_diffusers_has_it(tmp_path):
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    tensors = tensors_of(FLUX_2, FLUX_2_SHAPES)
    ours = to_diffusers(load(tmp_path, tensors))
    theirs = conversion._convert_non_diffusers_flux2_lora_to_diffusers(without_alphas(tensors))
    # its LoRA conversion leaves the last modulation as it is, where that of checkpoints turns its halves
    key = "transformer.norm_out.linear.lora_B.weight"
    compared(ours, {**theirs, key: torch.cat(theirs[key].chunk(2)[::-1])})


@pytest.mark.parametrize("end", ["single_blocks.#.linear1", "double_blocks.#.img_mlp.0", "single_blocks.#.linear2"])
def test_one_module_of_another_shape_tells_flux_2_from_flux_1(tmp_path, end):
    shapes = {**FLUX_2_SHAPES, "linear2": (1, 4)}
    (name,) = to_diffusers(load(tmp_path, tensors_of([end], shapes))).sites
    assert name == f"transformer.{FLUX_2[end][0].replace('#', '0')}"


def test_hunyuan_video_is_as_diffusers_has_it(tmp_path):
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    shapes = {"attn_qkv": (3, 1), "adaLN_modulation.1": (2, 1), "linear2": (1, 5)}
    table = [pattern for pattern in HUNYUAN_VIDEO if not pattern.endswith(("linear1", "self_attn_qkv"))]
    tensors = tensors_of(table, shapes)
    ours = to_diffusers(load(tmp_path, tensors))
    theirs = conversion._convert_hunyuan_video_lora_to_diffusers(without_alphas(tensors))
    # of the last modulation it turns the halves of A as well, and with them the ranks
    A = tensors["diffusion_model.final_layer.adaLN_modulation.1.lora_A.weight"]
    compared(ours, {**theirs, "transformer.norm_out.linear.lora_A.weight": A})


@pytest.mark.parametrize(
    ("pattern", "times"),
    [("single_blocks.#.linear1", 7), ("txt_in.individual_token_refiner.blocks.#.self_attn_qkv", 3)],
)
def test_what_hunyuan_video_fuses_comes_apart_by_rows(tmp_path, pattern, times):
    tensors = tensors_of([pattern, "double_blocks.#.img_attn_proj"], {pattern: (times, 1)})
    theirs = load(tmp_path, tensors)
    ours = to_diffusers(theirs)
    parts = [ours.updates[f"transformer.{name.replace('#', '0')}"].delta() for name in HUNYUAN_VIDEO[pattern]]
    name = f"diffusion_model.{pattern.replace('#', '0')}"
    torch.testing.assert_close(torch.cat(parts), theirs.updates[name].delta())


# kohya's flat names

BASES = {"Flux2": "FLUX.2-dev", "HunyuanVideo": "hunyuanvideo-community/HunyuanVideo", "SD3": "stable-diffusion-3.5"}
TABLES = {"Flux2": FLUX_2, "HunyuanVideo": HUNYUAN_VIDEO, "SD3": SD_3}
SHAPES = {
    "Flux2": {**FLUX_2_SHAPES, "img.lin": (6, 1), "txt.lin": (6, 1), "modulation.lin": (3, 1)},
    "HunyuanVideo": {
        "attn_qkv": (3, 1),
        "adaLN_modulation.1": (2, 1),
        "linear1": (7, 1),
        "linear2": (1, 5),
        "mod.linear": (6, 1),
        "modulation.linear": (3, 1),
        "fc1": (4, 1),
        "fc2": (1, 4),
    },
    "SD3": {
        "qkv": (3, 1),
        "block.adaLN_modulation.1": (6, 1),
        "final_layer.adaLN_modulation.1": (2, 1),
        "fc1": (4, 1),
        "fc2": (1, 4),
    },
}


def file_of(family):
    """A LoRA of every module of a model, by its authors' names; of SD3 two blocks, of which the last is smaller."""
    tensors = tensors_of(TABLES[family], SHAPES[family])
    if family != "SD3":
        return tensors
    last = tensors_of(SD_3, {"context_block.adaLN_modulation.1": (2, 1), **SHAPES[family]}, numbers=(1,))
    only_before = ("context_block.attn.proj", "context_block.mlp")
    return {**tensors, **{key: t for key, t in last.items() if not any(name in key for name in only_before)}}


def flat(tensors):
    """The same file under kohya's names, by hand: each dot of a module's name an underscore."""
    made = {}
    for key, tensor in tensors.items():
        name, _, end = key.rpartition(".lora_") if ".lora_" in key else key.rpartition(".")
        end = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}.get(end, end)
        made[f"lora_unet_{name.removeprefix('diffusion_model.').replace('.', '_')}.{end}"] = tensor
    return made


def tiny(family):
    """A transformer of two blocks of each kind and of WIDTH columns, as diffusers builds it."""
    diffusers = pytest.importorskip("diffusers")
    heads = {"num_attention_heads": 2, "attention_head_dim": 4}
    if family == "Flux2":
        sizes = {"in_channels": 8, "joint_attention_dim": 8, "axes_dims_rope": (2, 2, 0, 0)}
        sizes |= {"num_layers": 2, "num_single_layers": 2, "timestep_guidance_channels": 8}
        return diffusers.Flux2Transformer2DModel(**heads, **sizes)
    if family == "HunyuanVideo":
        sizes = {"num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 2, "rope_axes_dim": (2, 2, 0)}
        widths = {"in_channels": 8, "text_embed_dim": 8, "pooled_projection_dim": 8, "guidance_embeds": True}
        return diffusers.HunyuanVideoTransformer3DModel(**heads, **sizes, **widths)
    sizes = {"num_layers": 2, "caption_projection_dim": 8, "joint_attention_dim": 8, "pooled_projection_dim": 8}
    return diffusers.SD3Transformer2DModel(**heads, **sizes, in_channels=8, dual_attention_layers=(0, 1))


def by_checkpoints(family, dense):
    """Module → ΔW under diffusers' names: what its conversion of a whole checkpoint makes of the authors' ones."""
    conversion = pytest.importorskip("diffusers.loaders.single_file_utils")
    names = {"Flux2": "flux2_transformer_checkpoint", "SD3": "sd3_transformer_checkpoint"}
    convert = getattr(conversion, f"convert_{names.get(family, 'hunyuan_video_transformer')}_to_diffusers")
    checkpoint = {f"{name.removeprefix('diffusion_model.')}.weight": delta for name, delta in dense.items()}
    if family == "SD3":  # which asks for biases, too
        checkpoint |= {key.replace(".weight", ".bias"): delta[:, 0].clone() for key, delta in checkpoint.items()}
        checkpoint["pos_embed"] = torch.zeros(1)
    made = convert(checkpoint)
    return {f"transformer.{key.removesuffix('.weight')}": made[key] for key in made if key.endswith(".weight")}


@pytest.mark.parametrize("family", TABLES)
def test_kohyas_file_is_read_converted_and_written_again_with_the_delta_that_diffusers_has(tmp_path, family):
    tensors = file_of(family)
    theirs = load(tmp_path, flat(tensors))
    assert set(theirs.sites) == {key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")}
    converted(theirs, "diffusers").adapter.save(tmp_path / "ours.safetensors")
    ours = Adapter.load(tmp_path / "ours.safetensors")
    dense = {name: update.delta() for name, update in theirs.updates.items()}
    wide = "diffusion_model.single_blocks.0.linear1"  # of Hunyuan, whose real width stands in diffusers' conversion
    wanted = by_checkpoints(family, {n: d for n, d in dense.items() if family != "HunyuanVideo" or n != wide})
    if family == "HunyuanVideo":
        parts = dict(zip(HUNYUAN_VIDEO["single_blocks.#.linear1"], dense[wide].split([8, 8, 8, 32]), strict=True))
        wanted |= {f"transformer.{name.replace('#', '0')}": part for name, part in parts.items()}
    assert set(wanted) == set(ours.sites)
    for name, update in ours.updates.items():
        torch.testing.assert_close(update.delta(), wanted[name])
    named = replace(ours, config={**ours.config, "base_model_name_or_path": BASES[family]})
    back = converted(named, "kohya").adapter
    back.save(tmp_path / "back.safetensors")
    again = Adapter.load(tmp_path / "back.safetensors")
    assert again.sites.keys() == theirs.sites.keys()
    for name, update in again.updates.items():
        torch.testing.assert_close(update.delta(), theirs.updates[name].delta())


@pytest.mark.parametrize("family", TABLES)
def test_every_module_under_diffusers_names_is_one_of_the_model(tmp_path, family):
    modules = dict(tiny(family).named_modules())
    for name in {name for names in TABLES[family].values() for name in names}:
        assert name.replace("#", "0") in modules


def test_diffusers_reads_the_same_from_kohyas_file_of_flux_2(tmp_path):
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    known = [name for name in FLUX_2 if "modulation" not in name.lower() and "guidance" not in name]
    tensors = flat(tensors_of(known, FLUX_2_SHAPES, numbers=(0, 1)))
    ours = to_diffusers(load(tmp_path, tensors))
    compared(ours, conversion._convert_kohya_flux2_lora_to_diffusers(dict(tensors)))
