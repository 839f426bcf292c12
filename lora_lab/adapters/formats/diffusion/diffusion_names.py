"""Names of the modules of diffusion models: the canonical ones, those of the models' authors, and kohya's flat ones.

A canonical name begins with a component, which says whose names follow: `unet.` and `transformer.` those of diffusers,
`text_encoder.`, `text_encoder_2.` and `text_encoder_3.` those of transformers, `diffusion_model.` those of the model's
authors (double_blocks.0.img_attn.qkv). A U-Net's modules always have diffusers' names: its authors' (SGM's: what they
call input_blocks.4.1 is down_blocks.1.attentions.0) are the same ones under other names. Nothing is split here.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

UNET, MODEL, TRANSFORMER = "unet.", "diffusion_model.", "transformer."

_COMPONENTS = {
    "lora_te1_": "text_encoder.",
    "lora_te2_": "text_encoder_2.",
    "lora_te3_": "text_encoder_3.",
    "lora_te_": "text_encoder.",
    "lora_transformer_": TRANSFORMER,
    "lycoris_": TRANSFORMER,
    "lora_unet_": MODEL,
}
"""What a flat name begins with → component; of the last two it is `unet.` where a U-Net's names follow."""

_UNET = re.compile(
    r"((down_blocks|up_blocks|mid_block)[._]|(conv_in|conv_norm_out|conv_out)$|(time|add)_embedding[._]linear)"
)
_SGM = re.compile(r"((input_blocks|middle_block|output_blocks)[._]|(time_embed|label_emb[._]0|out)[._][02]$)")

_WORDS = """
down_blocks up_blocks mid_block resnets attentions transformer_blocks downsamplers upsamplers conv conv1 conv2 conv_in
conv_out conv_shortcut time_emb_proj time_embedding add_embedding proj_in proj_out proj linear linear_1 linear_2 norm
norm1 norm1_context norm_out attn attn1 attn2 to_q to_k to_v to_out to_add_out add_q_proj add_k_proj add_v_proj ff
ff_context net proj_mlp single_transformer_blocks x_embedder context_embedder time_text_embed timestep_embedder
text_embedder guidance_embedder
input_blocks output_blocks middle_block time_embed label_emb in_layers out_layers emb_layers skip_connection op out
text_model encoder layers self_attn mlp fc1 fc2 q_proj k_proj v_proj out_proj text_projection
block layer SelfAttention DenseReluDense wi wi_0 wi_1 wo q k v o
model embed_tokens o_proj gate_proj up_proj down_proj
double_blocks single_blocks img_attn txt_attn img_mlp txt_mlp img_mod txt_mod modulation lin qkv linear1 linear2 img_in
txt_in time_in vector_in guidance_in in_layer out_layer final_layer adaLN_modulation
joint_blocks x_block context_block attn_2 y_embedder
blocks cross_attn ffn k_img v_img patch_embedding text_embedding time_projection head img_emb
noise_refiner context_refiner attention feed_forward w1 w2 w3 t_embedder cap_embedder
linear_3 linear_in linear_out time_guidance_embed double_stream_modulation_img double_stream_modulation_txt
single_stream_modulation to_qkv_mlp_proj distilled_guidance_layer in_proj token_refiner refiner_blocks
condition_embedder time_embedder image_embedder time_proj caption_projection adaln_single emb pos_embed patch_embed
aspect_ratio_embedder resolution_embedder joint_transformer_blocks out_projection time_condition_embed text_proj
time_caption_embed caption_embedder conv_depth conv_inverted conv_point
"""
"""The components of names, by family: diffusers' U-Net and Flux; SGM's U-Net; CLIP; T5; Llama and Qwen; the authors'
Flux; SD3; Wan; Lumina and Z-Image; diffusers' Flux.2, Chroma, HunyuanVideo, LTX, PixArt, AuraFlow, CogView and Sana."""

_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
    "in_layers.0": "norm1",
    "out_layers.0": "norm2",
}
_ENDS = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
"""SGM's name → diffusers', of what lies outside of the numbered blocks."""


def modules_of(flat: Collection[str]) -> dict[str, str | None]:
    """Flat name (lora_unet_…) → canonical name, for all of one file; None for what is not understood for certain."""
    t5 = "text_encoder_3."
    if any("_double_blocks_" in name for name in flat):  # Flux, which has two text encoders, T5 the second
        t5 = "text_encoder_2."
    hunyuan = any(map(_HUNYUAN.match, flat))
    modules: dict[str, str | None] = {}
    for name in flat:
        module = _module(name, hunyuan=hunyuan)
        if module is not None and module.startswith("text_encoder_3."):
            module = t5 + module.removeprefix("text_encoder_3.")
        modules[name] = module
    return modules


_HUNYUAN = re.compile(
    r"lora_unet_(double_blocks_\d+_(img|txt)_(mlp_fc|mod_linear)|single_blocks_\d+_modulation_linear|"
    r"txt_in_(individual|input|[ct]_embedder)|img_in_proj|(time|guidance)_in_mlp)"
)
"""Flat names that HunyuanVideo alone has. Its img_attn_qkv is one word where Flux's is two, and flat they look the
same: a file of such modules alone is read as Flux's."""
_HUNYUAN_WORDS = """
img_attn_qkv img_attn_proj txt_attn_qkv txt_attn_proj self_attn_qkv self_attn_proj individual_token_refiner
input_embedder c_embedder
"""


def _module(flat: str, *, hunyuan: bool = False) -> str | None:
    prefix = next((prefix for prefix in _COMPONENTS if flat.startswith(prefix)), None)
    path = dotted(flat.removeprefix(prefix), hunyuan=hunyuan) if prefix else None
    if prefix is None or path is None:
        return None
    unet = with_unet(path) if prefix in ("lycoris_", "lora_unet_") else None
    return unet or _COMPONENTS[prefix] + path


def with_unet(path: str) -> str | None:
    """The canonical name of a U-Net's module from its authors' name or from diffusers'; None where it is neither."""
    if _UNET.match(path):
        return UNET + path
    renamed = from_sgm(path)
    return UNET + renamed if renamed else None


def unet_path(flat: str) -> str | None:
    """The canonical name of a U-Net's module from a flat one without prefix, in either scheme; None for others."""
    path = dotted(flat)
    return with_unet(path) if path else None


def is_sgm(path: str) -> bool:
    """Whether a module of a U-Net, flat or dotted, without a component, has its authors' name."""
    return _SGM.match(path) is not None


@dataclass(frozen=True)
class Scheme:
    """How kohya's files name modules, where there are several ways."""

    sgm: bool = False
    """A U-Net's modules by their authors' names (SDXL), not by diffusers' (SD 1 and 2)."""
    narrow: bool = False
    """The first up block has no attention (SD 1 and 2), on which the authors' name of its upsampler depends."""
    numbered: bool = False
    """The first text encoder is lora_te1 (SDXL, SD3, Flux), not lora_te (SD 1 and 2)."""
    second: bool = False
    """T5 is lora_te2 where it is text_encoder_2, not lora_te3 as sd-scripts and ComfyUI have it for every model."""
    lycoris: bool = False
    """The diffusion model's modules begin with lycoris_, as the package's own wrapper names them."""

    def flat(self, modules: Collection[str]) -> dict[str, str | None]:
        """Canonical name → flat one, for all modules of one file; None where it could not be read back from there."""
        flat = {module: self._flat(module) for module in modules}
        read = modules_of(set(filter(None, flat.values())))
        return {module: name if name and _same(read[name], module) else None for module, name in flat.items()}

    def _flat(self, module: str) -> str | None:
        component, _, path = module.partition(".")
        head: str | None = None
        if component == "unet":
            head, path = "lora_unet_", (to_sgm(path, wide=not self.narrow) or "") if self.sgm else path
        elif component in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            number = component.removeprefix("text_encoder").removeprefix("_") or ("1" if self.numbered else "")
            if path.startswith("encoder.block.") and not self.second:
                number = "3"
            head = f"lora_te{number}_"
        elif component in ("diffusion_model", "transformer"):
            head = "lora_unet_" if component == "diffusion_model" else "lora_transformer_"
        if head and self.lycoris and not head.startswith("lora_te"):
            head = "lycoris_"
        return f"{head}{path.replace('.', '_')}" if head else None


def _same(read: str | None, module: str) -> bool:
    """Whether a flat name is read as the module that it stands for; which T5 is meant depends on its file."""
    if read is None or module == read:
        return read is not None
    return read.startswith("text_encoder_3.encoder.block.") and read.partition(".")[2] == module.partition(".")[2]


def scheme_of(modules: Collection[str]) -> Scheme:
    """The scheme that trainers use for a model with these canonical modules."""
    deep = any(re.match(r"unet\..*\.transformer_blocks\.[1-9]", name) for name in modules)  # of SD they have one each
    sdxl = deep or any(name.startswith("text_encoder_2.text_model.") for name in modules)
    unet = any(name.startswith(UNET) for name in modules)
    return Scheme(sgm=sdxl and unet, numbered=sdxl or not unet)


_KERNELS = {
    3: re.compile(r"unet\.(conv_in|conv_out|.*\.(resnets\.\d+\.conv[12]|(downsamplers|upsamplers)\.\d+\.conv))$"),
    1: re.compile(r"unet\..*\.conv_shortcut$"),
}


def kernel_of(module: str) -> tuple[int, ...]:
    """The kernel of a U-Net's convolution by its canonical name; () of other layers, and where it is not known.

    proj_in and proj_out are convolutions in SD 1 and linear in SDXL.
    """
    return next(((size, size) for size, pattern in _KERNELS.items() if pattern.match(module)), ())


def from_sgm(path: str) -> str | None:
    """Diffusers' name of a U-Net's module from its authors' (input_blocks.4.1.proj_in); None for any other name."""
    for theirs, ours in _ENDS.items():
        if path == theirs or path.startswith(f"{theirs}."):
            rest = path[len(theirs) + 1 :]
            return _resnet(ours, rest, _RESNET) if ".resnets." in ours else _joined(ours, rest)
    match = re.match(r"(input|output)_blocks\.(\d+)\.([012])\.(.+)$", path)
    if not match:
        return None
    side, number, part, rest = match[1], int(match[2]), int(match[3]), match[4]
    level, layer = divmod(number - 1, 3) if side == "input" else divmod(number, 3)
    block = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
    if side == "input" and layer == 2:
        return f"{block}.downsamplers.0.conv" if (part, rest) == (0, "op") else None
    if side == "output" and layer == 2 and part and rest == "conv":
        return f"{block}.upsamplers.0.conv"
    if part == 0:
        return _resnet(f"{block}.resnets.{layer}", rest, _RESNET)
    return f"{block}.attentions.{layer}.{rest}" if part == 1 else None


def to_sgm(path: str, *, wide: bool) -> str | None:
    """The authors' name of a U-Net's module from diffusers'; None for any other name.

    `wide`: the outermost up block with attention is the first (SDXL), not the second (SD 1 and 2), on which the
    number of its upsampler depends.
    """
    back = {ours: theirs for theirs, ours in _RESNET.items()}
    for theirs, ours in _ENDS.items():
        if path == ours or path.startswith(f"{ours}."):
            rest = path[len(ours) + 1 :]
            return _resnet(theirs, rest, back) if ".resnets." in ours else _joined(theirs, rest)
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)$", path)
    if not match:
        return None
    side, kind, rest = match[1], match[3], match[5]
    level, layer = int(match[2]), int(match[4])
    if (kind, layer, rest) == ("downsamplers", 0, "conv") and side == "down":
        return f"input_blocks.{3 * level + 3}.0.op"
    if (kind, layer, rest) == ("upsamplers", 0, "conv") and side == "up":
        return f"output_blocks.{3 * level + 2}.{2 if wide or level else 1}.conv"
    if kind not in ("resnets", "attentions") or layer > (1 if side == "down" else 2):
        return None
    block = f"input_blocks.{3 * level + layer + 1}" if side == "down" else f"output_blocks.{3 * level + layer}"
    return _resnet(f"{block}.0", rest, back) if kind == "resnets" else f"{block}.1.{rest}"


def _resnet(block: str, rest: str, names: dict[str, str]) -> str | None:
    return f"{block}.{names[rest]}" if rest in names else None


def _joined(block: str, rest: str) -> str:
    return f"{block}.{rest}" if rest else block


@cache
def _vocabulary(hunyuan: bool) -> tuple[frozenset[tuple[str, ...]], int]:
    all_words = f"{_WORDS} {_HUNYUAN_WORDS}" if hunyuan else _WORDS
    words = frozenset(tuple(word.split("_")) for word in all_words.split())
    return words, max(map(len, words))


def dotted(flat: str, *, hunyuan: bool = False) -> str | None:
    """A flat name as a path: numbers, and of the words above the longest that fits; None where one is unknown."""
    words, longest = _vocabulary(hunyuan)
    parts = flat.split("_")
    path, at = [], 0
    while at < len(parts):
        length = next((n for n in range(longest, 0, -1) if tuple(parts[at : at + n]) in words), 0)
        if not length and not (parts[at].isascii() and parts[at].isdecimal()):
            return None
        path.append("_".join(parts[at : at + (length or 1)]))
        at += length or 1
    return ".".join(path)
