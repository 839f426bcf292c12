"""ComfyUI's files and ai-toolkit's: names, alphas, and what is written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lora_lab import Adapter, inspect
from lora_lab.errors import AdapterError, LoraLabWarning
from tests.adapters.test_cases import CASES
from tests.adapters.test_kohya import load, one, pair, problems, random
from tests.making_adapters import lora, write

FLUX = "diffusion_model.double_blocks.0.img_attn.qkv"
WAN = "diffusion_model.blocks.0.self_attn.q"
AI_TOOLKIT = "transformer.transformer_blocks.0.attn.to_q"
SDXL = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q"
CLIP = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"


def dotted(name, halves=("lora_A", "lora_B"), alpha=2.0, **options):
    renamed = dict(zip(("lora_down", "lora_up"), halves, strict=True))
    return {
        key.replace("lora_down", renamed["lora_down"]).replace("lora_up", renamed["lora_up"]): tensor
        for key, tensor in pair(name, alpha=alpha, **options).items()
    }


@pytest.mark.parametrize("halves", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
@pytest.mark.parametrize("name", [FLUX, WAN, "diffusion_model.layers.0.attention.to_out.0", "blocks.0.attn.q"])
def test_the_names_of_a_models_authors_stay(tmp_path, name, halves):
    if name == "blocks.0.attn.q" and halves[0] == "lora_A":
        return  # PEFT's
    tensors = dotted(name, halves)
    adapter = load(tmp_path, tensors)
    assert inspect(tmp_path / "in.safetensors").format == "comfy"
    down, up, _ = tensors.values()
    assert list(adapter.sites) == [name]
    torch.testing.assert_close(one(adapter).delta(), 0.5 * up @ down)
    adapter.save(tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in tensors.items())


def test_flux_has_the_same_names_as_in_kohyas_files(tmp_path):
    theirs = load(tmp_path, pair("lora_unet_double_blocks_0_img_attn_qkv"))
    assert list(theirs.sites) == list(load(tmp_path, dotted(FLUX)).sites) == [FLUX]


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        (SDXL, "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
        ("diffusion_model.output_blocks.2.1.conv", "unet.up_blocks.0.upsamplers.0.conv"),
        ("diffusion_model.output_blocks.2.2.conv", "unet.up_blocks.0.upsamplers.0.conv"),
        (CLIP, "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
        (CLIP.replace("clip_l", "clip_g"), "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"),
        ("text_encoders.t5xxl.transformer.encoder.block.0.layer.1.DenseReluDense.wi_0", None),
    ],
)
def test_a_unet_and_text_encoders_get_canonical_names_and_are_written_under_their_own(tmp_path, name, canonical):
    tensors = dotted(name, kernel=(3, 3) if name.endswith("conv") else ())
    adapter = load(tmp_path, tensors)
    assert list(adapter.sites) == [canonical or name.replace("text_encoders.t5xxl.transformer", "text_encoder_3")]
    adapter.save(tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize(
    ("others", "written"),
    [
        ([], "output_blocks.2.1.conv"),
        (["lora_te2_text_model_encoder_layers_0_mlp_fc1"], "output_blocks.2.2.conv"),
        (["lora_unet_up_blocks_0_attentions_0_proj_in"], "output_blocks.2.2.conv"),
    ],
)
def test_the_first_upsampler_has_the_name_that_its_model_gives_it(tmp_path, others, written):
    tensors = pair("lora_unet_up_blocks_0_upsamplers_0_conv", kernel=(3, 3))
    for name in others:
        tensors |= pair(name)
    load(tmp_path, tensors).save(tmp_path / "out.safetensors", format="comfy")
    assert f"diffusion_model.{written}.lora_A.weight" in load_file(tmp_path / "out.safetensors")


def test_t5_is_the_second_text_encoder_of_flux(tmp_path):
    t5 = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"
    adapter = load(tmp_path, {**dotted(FLUX), **dotted(t5)})
    assert sorted(adapter.sites) == [FLUX, "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"]
    adapter.save(tmp_path / "kohya.safetensors", format="kohya")
    again = Adapter.load(tmp_path / "kohya.safetensors")
    assert sorted(again.sites) == sorted(adapter.sites)
    again.save(tmp_path / "out.safetensors", format="comfy")
    assert f"{t5}.lora_A.weight" in load_file(tmp_path / "out.safetensors")


def test_alphas_beside_diffusers_names_are_used_and_written(tmp_path):
    tensors = dotted(AI_TOOLKIT)
    adapter = load(tmp_path, tensors)
    assert inspect(tmp_path / "in.safetensors").format == "comfy"
    assert adapter.sites[AI_TOOLKIT].scale == 0.5
    adapter.save(tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors").keys() == tensors.keys()


def test_without_alphas_the_scale_is_one_and_none_is_written(tmp_path):
    tensors = dotted(FLUX, alpha=None)
    with pytest.warns(LoraLabWarning, match="1 of 1 modules have no alpha tensor: scale 1 is assumed"):
        adapter = load(tmp_path, tensors)
    adapter.save(tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors").keys() == tensors.keys()
    scaled = load(tmp_path, tensors, alpha=2)
    scaled.save(tmp_path / "scaled.safetensors")
    assert float(load_file(tmp_path / "scaled.safetensors")[f"{FLUX}.alpha"]) == 2


def test_n01_is_written_again_with_its_alphas(tmp_path):
    source = CASES / "N01_comfy_alpha_tensors/comfy.safetensors"
    Adapter.load(source).save(tmp_path / "out.safetensors")
    before, after = load_file(source), load_file(tmp_path / "out.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_a_magnitude_may_have_pefts_name(tmp_path):
    for end in ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"):
        magnitude = random(6, 1) if end == "dora_scale" else random(6)
        adapter = load(tmp_path, {**dotted(FLUX), f"{FLUX}.{end}": magnitude})
        assert torch.equal(adapter.tensors[f"base_model.model.{FLUX}.lora_magnitude_vector"], magnitude.flatten())


def test_language_models_have_no_names_there(tmp_path):
    adapter = Adapter.load(write(tmp_path / "llm", lora("model.layers.0.self_attn.q_proj")))
    with pytest.raises(
        AdapterError, match=r"a ComfyUI file has no name that is known for 1 of 1 modules: model\.layers"
    ):
        adapter.save(tmp_path / "out.safetensors", format="comfy")


def test_a_pefts_folder_with_such_names_stays_pefts(tmp_path):
    folder = write(tmp_path / "peft", lora(FLUX), target_modules=["qkv"])
    assert inspect(folder).format == "peft"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({f"{FLUX}.alpha": torch.ones(2)}, f"{FLUX}.alpha: an alpha of shape [2]"),
        (dotted(FLUX, ("lora_down", "lora_up")), f"{FLUX}.lora_B.weight and {FLUX}.lora_up.weight: two"),
        ({f"{FLUX}.diff_b": torch.ones(6)}, f"{FLUX}.diff_b"),
        ({f"{FLUX}.lora_B.bias": torch.ones(6)}, f"{FLUX}.lora_B.bias: changes the model"),
        ({f"{FLUX}.reshape_weight": torch.ones(2)}, f"{FLUX}.reshape_weight: changes the model"),
        ({"diffusion_model.img_in.weight": torch.ones(2)}, "diffusion_model.img_in.weight: changes the model"),
    ],
)  # fmt: skip
def test_a_tensor_that_changes_weights_is_used_or_refused_by_name(tmp_path, change, line):
    found = problems(tmp_path, {**dotted(FLUX), **change})
    assert any(line in problem for problem in found), found


@settings(max_examples=30, deadline=None)
@given(
    names=st.lists(st.sampled_from([FLUX, WAN, SDXL, CLIP]), min_size=1, unique=True),
    rank=st.integers(1, 5),
    alpha=st.floats(0.0625, 64, width=32),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    form=st.sampled_from(["comfy", "peft"]),
)
def test_what_is_written_is_what_was_read(tmp_path_factory, names, rank, alpha, dtype, form):
    folder = tmp_path_factory.mktemp("trip")
    tensors = {key: t for name in names for key, t in dotted(name, rank=rank, alpha=alpha).items()}
    tensors = {key: t if key.endswith("alpha") else t.to(dtype) for key, t in tensors.items()}
    before = load(folder, tensors)
    before.save(folder / "out.safetensors" if form == "comfy" else folder / "out", format=form)
    after = Adapter.load(folder / "out.safetensors" if form == "comfy" else folder / "out")
    assert {name: site.scale for name, site in after.sites.items()} == {n: s.scale for n, s in before.sites.items()}
    assert all(torch.equal(after.tensors[key], tensor) for key, tensor in before.tensors.items())
    if form == "comfy":
        assert all(torch.equal(load_file(folder / "out.safetensors")[key], t) for key, t in tensors.items())
