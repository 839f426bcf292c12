"""Names of the modules of diffusion models: against the models that diffusers and transformers build."""

import pytest
import torch

from lora_lab.adapters.formats.diffusion.diffusion_names import (
    Scheme,
    dotted,
    from_sgm,
    is_sgm,
    kernel_of,
    modules_of,
    scheme_of,
    to_sgm,
)

SD = {"cross_attention_dim": 768}
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
}
SDXL_NAMES = Scheme(sgm=True, numbered=True)


def adaptable(model):
    return [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv2d")]


def unet_names(config):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        return adaptable(diffusers.UNet2DConditionModel(**config))


@pytest.fixture(scope="module")
def sdxl():
    return unet_names(SDXL)


def test_every_module_of_sd_has_a_flat_name_that_is_read_back():
    names = [f"unet.{name}" for name in unet_names(SD)]
    assert len(names) == 192 + 90  # in and around 16 attentions, and of everything else
    flat = Scheme().flat(names)
    assert flat[names[0]] == "lora_unet_conv_in"
    assert modules_of(flat.values()) == {text: name for name, text in flat.items()}


def test_every_module_of_sdxl_has_its_authors_name_and_is_read_back(sdxl):
    flat = SDXL_NAMES.flat([f"unet.{name}" for name in sdxl])
    assert all(is_sgm(text.removeprefix("lora_unet_")) for text in flat.values())
    assert modules_of(flat.values()) == {text: name for name, text in flat.items()}
    assert all(from_sgm(to_sgm(name, wide=True)) == name for name in sdxl)


def test_sdxl_names_are_those_that_diffusers_reads(sdxl):
    """Against diffusers' own conversion of the attention's names; of the others it knows some."""
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    names = [name for name in sdxl if ".attentions." in name]
    flat = SDXL_NAMES.flat([f"unet.{name}" for name in names])
    state = {f"{text}.{end}.weight": torch.zeros(1, 1) for text in flat.values() for end in ("lora_down", "lora_up")}

    class Config:
        layers_per_block = 2

    mapped = _maybe_map_sgm_blocks_to_diffusers(state, Config)
    theirs, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
    read = {key.removeprefix("unet.").replace(".processor", "").partition("lora")[0][:-1] for key in theirs}
    assert len(names) == 722
    assert {name.removesuffix(".to_out") + ".to_out.0" if name.endswith("to_out") else name for name in read} == set(
        names
    )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("input_blocks.0.0", "conv_in"),
        ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks.5.1.proj_in", "down_blocks.1.attentions.1.proj_in"),
        ("input_blocks.4.0.in_layers.2", "down_blocks.1.resnets.0.conv1"),
        ("input_blocks.4.0.skip_connection", "down_blocks.1.resnets.0.conv_shortcut"),
        ("middle_block.1.transformer_blocks.9.ff.net.2", "mid_block.attentions.0.transformer_blocks.9.ff.net.2"),
        ("middle_block.2.out_layers.3", "mid_block.resnets.1.conv2"),
        ("output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks.8.0.emb_layers.1", "up_blocks.2.resnets.2.time_emb_proj"),
        ("label_emb.0.2", "add_embedding.linear_2"),
        ("time_embed.0", "time_embedding.linear_1"),
        ("out.2", "conv_out"),
    ],
)
def test_single_names_of_sdxl(theirs, ours):
    assert from_sgm(theirs) == ours
    assert to_sgm(ours, wide=True) == theirs


def test_the_first_upsampler_of_sd_stands_where_its_attention_would():
    assert to_sgm("up_blocks.0.upsamplers.0.conv", wide=False) == "output_blocks.2.1.conv"
    assert to_sgm("up_blocks.1.upsamplers.0.conv", wide=False) == "output_blocks.5.2.conv"
    assert from_sgm("output_blocks.2.1.conv") == "up_blocks.0.upsamplers.0.conv"


@pytest.mark.parametrize(
    "name",
    [
        "input_blocks.3.0.in_layers.2",
        "input_blocks.4.2.conv",
        "input_blocks.4.0.conv1",
        "output_blocks.1.1.conv.x",
        "down_blocks.0.resnets.0.conv1",
        "out.1",
    ],
)
def test_what_is_no_name_of_the_authors_is_none(name):
    read = from_sgm(name)
    assert read is None or to_sgm(read, wide=True) == name


@pytest.mark.parametrize(
    ("flat", "module"),
    [
        ("lora_te_text_model_encoder_layers_1_mlp_fc2", "text_encoder.text_model.encoder.layers.1.mlp.fc2"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
        ("lora_te2_text_model_encoder_layers_31_mlp_fc2", "text_encoder_2.text_model.encoder.layers.31.mlp.fc2"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"),
        ("lora_unet_joint_blocks_0_context_block_attn_qkv", "diffusion_model.joint_blocks.0.context_block.attn.qkv"),
        ("lora_unet_joint_blocks_0_x_block_attn_2_qkv", "diffusion_model.joint_blocks.0.x_block.attn_2.qkv"),
        ("lora_unet_blocks_0_cross_attn_k_img", "diffusion_model.blocks.0.cross_attn.k_img"),
        ("lora_unet_time_embedding_0", "diffusion_model.time_embedding.0"),
        ("lora_unet_layers_0_attention_to_out_0", "diffusion_model.layers.0.attention.to_out.0"),
        ("lycoris_transformer_blocks_3_attn_to_q", "transformer.transformer_blocks.3.attn.to_q"),
        ("lycoris_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in"),
        ("lora_transformer_single_transformer_blocks_3_proj_mlp", "transformer.single_transformer_blocks.3.proj_mlp"),
        ("lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in"),
        ("lora_unet_down_blocks_0_frobnicator_0", None),
        ("lora_unet_", None),
        ("lora_unet_down_blocks__0", None),
        ("lora_unet_down_blocks_٣", None),
        ("something_else", None),
    ],
)
def test_flat_names_are_read_by_known_words_alone(flat, module):
    assert modules_of([flat]) == {flat: module}


def test_flux_and_its_second_text_encoder_are_read_and_written():
    pairs = {
        "lora_unet_double_blocks_0_img_attn_qkv": "diffusion_model.double_blocks.0.img_attn.qkv",
        "lora_unet_double_blocks_0_txt_mod_lin": "diffusion_model.double_blocks.0.txt_mod.lin",
        "lora_unet_single_blocks_37_linear1": "diffusion_model.single_blocks.37.linear1",
        "lora_unet_single_blocks_0_modulation_lin": "diffusion_model.single_blocks.0.modulation.lin",
        "lora_unet_guidance_in_in_layer": "diffusion_model.guidance_in.in_layer",
        "lora_unet_final_layer_adaLN_modulation_1": "diffusion_model.final_layer.adaLN_modulation.1",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q": "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
    }
    assert modules_of(pairs) == pairs
    assert Scheme(numbered=True).flat(pairs.values()) == {module: name for name, module in pairs.items()}


def test_names_that_flat_are_those_of_flux_are_hunyuan_videos_beside_one_of_its_own():
    pairs = {
        "lora_unet_double_blocks_0_img_attn_qkv": "diffusion_model.double_blocks.0.img_attn_qkv",
        "lora_unet_double_blocks_3_txt_attn_proj": "diffusion_model.double_blocks.3.txt_attn_proj",
        "lora_unet_single_blocks_0_linear1": "diffusion_model.single_blocks.0.linear1",
        "lora_unet_double_blocks_0_img_mlp_fc1": "diffusion_model.double_blocks.0.img_mlp.fc1",
    }
    assert modules_of(pairs) == pairs
    assert Scheme(numbered=True).flat(pairs.values()) == {module: name for name, module in pairs.items()}
    flux = dict(list(pairs.items())[:2])
    assert list(modules_of(flux).values()) == [name.replace("attn_", "attn.") for name in flux.values()]
    assert set(Scheme(numbered=True).flat(flux.values()).values()) == {None}  # it would be read as Flux's


def test_of_two_modules_with_one_flat_name_only_the_one_that_is_read_back_has_it():
    names = [f"diffusion_model.double_blocks.0.img_attn{mark}qkv" for mark in "._"]
    fc = "diffusion_model.double_blocks.0.img_mlp.fc1"
    flat = Scheme(numbered=True).flat([*names, fc])
    assert [flat[name] for name in names] == [None, "lora_unet_double_blocks_0_img_attn_qkv"]


@pytest.mark.parametrize("module", ["unet.conv.a_b", "vae.conv_in", "layers.0.q_proj", "unet", ""])
def test_a_module_that_could_not_be_read_back_has_no_flat_name(module):
    assert Scheme().flat([module]) == {module: None}
    assert SDXL_NAMES.flat([module]) == {module: None}


TRANSFORMERS = [
    *("AuraFlow", "Chroma", "CogView4", "Flux", "Flux2", "HunyuanVideo", "LTXVideo", "Lumina2", "PixArt", "QwenImage"),
    *("SD3", "Sana", "Wan", "ZImage"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_no_module_of_a_transformer_is_read_as_another(family):
    """Nearly all are read as what they are; the others stay flat (patches of several sizes, a mask of a name)."""
    diffusers = pytest.importorskip("diffusers")
    kind = next(name for name in dir(diffusers) if name.startswith(f"{family}Transformer"))
    with torch.device("meta"):
        names = adaptable(getattr(diffusers, kind)())
    flat = {f"lora_transformer_{name.replace('.', '_')}": f"transformer.{name}" for name in names}
    read = modules_of(flat)
    unread = [text for text, module in read.items() if module is None]
    assert {text: module for text, module in read.items() if module is not None} == {
        text: module for text, module in flat.items() if text not in unread
    }
    assert len(flat) == len(names)
    assert len(unread) <= 3, unread


def test_a_number_is_no_word():
    assert dotted("blocks_12_attn_to_q") == "blocks.12.attn.to_q"
    assert dotted("") is None


@pytest.mark.parametrize("config", [SD, SDXL])
def test_kernels_are_those_of_the_models(config):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**config)
    for name in adaptable(model):
        kernel = tuple(model.get_submodule(name).weight.shape[2:])
        assert kernel_of(f"unet.{name}") == kernel or name.endswith(("proj_in", "proj_out"))


def test_the_scheme_of_a_model_is_the_one_that_its_trainers_use(sdxl):
    assert scheme_of([f"unet.{name}" for name in sdxl]) == SDXL_NAMES
    assert scheme_of(["unet.conv_in", "text_encoder.text_model.encoder.layers.0.mlp.fc1"]) == Scheme()
    assert scheme_of(["diffusion_model.double_blocks.0.img_attn.qkv"]) == Scheme(numbered=True)
    assert scheme_of(["text_encoder_2.text_model.encoder.layers.0.mlp.fc1"]) == Scheme(numbered=True)


def test_schemes_that_other_tools_use_are_read_back():
    t5 = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"
    assert Scheme(second=True).flat([t5]) == {t5: "lora_te2_encoder_block_0_layer_0_SelfAttention_q"}
    name = "transformer.transformer_blocks.0.attn.to_q"
    assert Scheme(lycoris=True).flat([name]) == {name: "lycoris_transformer_blocks_0_attn_to_q"}
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    assert Scheme(lycoris=True).flat([name]) == {name: None}  # read as transformer
