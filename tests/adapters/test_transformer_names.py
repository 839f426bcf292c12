"""Flux.2, HunyuanVideo and Stable Diffusion 3 in diffusers' names: against diffusers' own conversions."""

import pytest
import torch

from lora_lab.adapters.formats.model_names import to_diffusers
from lora_lab.adapters.formats.transformer_names import FLUX_2, HUNYUAN_VIDEO, SD_3
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


def test_stable_diffusion_3_is_as_diffusers_has_its_weights(tmp_path):
    conversion = pytest.importorskip("diffusers.loaders.single_file_utils")
    shapes = {
        "qkv": (3, 1),
        "x_block.adaLN_modulation.1": (6, 1),
        "final_layer.adaLN_modulation.1": (2, 1),
        "fc1": (4, 1),
        "fc2": (1, 4),
    }
    tensors = tensors_of(SD_3, {"context_block.adaLN_modulation.1": (6, 1), **shapes})
    last = tensors_of(SD_3, {"context_block.adaLN_modulation.1": (2, 1), **shapes}, numbers=(1,))
    only_here = ("context_block.attn.proj", "context_block.mlp")  # which the last block has not
    last = {key: t for key, t in last.items() if "joint_blocks" in key and not any(n in key for n in only_here)}
    theirs = load(tmp_path, {**tensors, **last})
    ours = to_diffusers(theirs)
    dense = {name.removeprefix("diffusion_model."): update.delta() for name, update in theirs.updates.items()}
    checkpoint = {f"{name}.weight": delta for name, delta in dense.items()}
    checkpoint |= {f"{name}.bias": delta[:, 0].clone() for name, delta in dense.items()}
    wanted = conversion.convert_sd3_transformer_checkpoint_to_diffusers({**checkpoint, "pos_embed": torch.zeros(1)})
    assert {f"transformer.{key.removesuffix('.weight')}" for key in wanted if key.endswith(".weight")} == set(
        ours.sites
    )
    for name, update in ours.updates.items():
        torch.testing.assert_close(update.delta(), wanted[f"{name.removeprefix('transformer.')}.weight"])
