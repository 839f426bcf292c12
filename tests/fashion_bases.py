"""The bases of the Fashion-MNIST testbed, trained from nothing: a vision transformer, and one with a tower for text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Images = npt.NDArray[np.uint8]
"""[n, 28, 28], 0 black."""
Labels = npt.NDArray[np.int64]

VISION = {
    "image_size": 28,
    "patch_size": 7,
    "num_channels": 1,
    "hidden_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 384,
}
"""6 blocks of width 96 on 16 patches."""
TEXT = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
LONGEST = 12
"""Tokens of a text."""
PROMPTS = ("a photo of a {}", "a picture of a {}", "a {}")


def vit(images: Images, steps: int, batch: int) -> Any:
    """A ViTModel after so many steps of SimCLR: two views of an image are alike, views of others are not."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = ViTModel(ViTConfig(**VISION, **still), add_pooling_layer=False)
    width = model.config.hidden_size
    projection = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 64))

    def loss(rows: Tensor) -> Tensor:
        seen = pixels(images[rows.numpy()])
        return contrast(projection(first_of(model, torch.cat([view(seen), view(seen)]), seen_patches=10)))

    fitted([*model.parameters(), *projection.parameters()], loss, len(images), steps, batch, "vit")
    return model.eval()


def pixels(images: Images) -> Tensor:
    """[n, 1, 28, 28] in [−1, 1], as tasks on images without a processor have them."""
    return torch.from_numpy(np.asarray(images, dtype=np.float32) / 127.5 - 1)[:, None]


def first_of(model: Any, images: Tensor, seen_patches: int) -> Tensor:
    """The first token [n, width] of the model's last layer, which has seen so many patches of each, drawn anew.

    Half of the patches cost half of the time (Li et al. 2023, arXiv:2212.00794).
    """
    tokens = model.embeddings(images)
    drawn = torch.rand(len(images), tokens.shape[1] - 1).argsort(1)[:, :seen_patches] + 1
    states = torch.cat([tokens[:, :1], tokens.gather(1, drawn[..., None].expand(-1, -1, tokens.shape[2]))], 1)
    for layer in model.layers:
        states = layer(states)
    first: Tensor = model.layernorm(states[:, 0])
    return first


def view(images: Tensor) -> Tensor:
    """Of every image a random part (three tenths of its area or more), mirrored or not, lighter or darker."""
    n = len(images)
    share = torch.empty(n).uniform_(0.3, 1).sqrt()
    to = torch.zeros(n, 2, 3)
    to[:, 0, 0] = share * torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    to[:, 1, 1] = share
    to[:, :, 2] = (torch.rand(n, 2) * 2 - 1) * (1 - share)[:, None]
    grid = nn.functional.affine_grid(to, list(images.shape), align_corners=False)
    part = nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    gamma = torch.empty(n, 1, 1, 1).uniform_(-0.7, 0.7).exp()
    return ((part + 1) / 2).clamp(1e-4, 1) ** gamma * 2 - 1


def contrast(vectors: Tensor, temperature: float = 0.2) -> Tensor:
    """SimCLR's loss of [2n, width]: row i and row i + n are views of one image, −log softmax of their cosine."""
    unit = nn.functional.normalize(vectors, dim=-1)
    alike = (unit @ unit.T / temperature).fill_diagonal_(float("-inf"))
    return nn.functional.cross_entropy(alike, torch.arange(len(unit)).roll(len(unit) // 2))


def fitted(
    parameters: list[nn.Parameter],
    loss: Callable[[Tensor], Tensor],
    examples: int,
    steps: int,
    batch: int,
    name: str,
) -> None:
    """AdamW on `loss` of drawn rows; the rate rises over a twentieth of the steps and falls like a cosine."""
    optimiser = torch.optim.AdamW(parameters, weight_decay=0.05)
    for step in range(steps):
        done = (step + 1) / steps
        optimiser.param_groups[0]["lr"] = 1e-3 * min(1.0, 20 * done) * 0.5 * (1 + np.cos(np.pi * (done - 1 / steps)))
        value = loss(torch.randint(examples, (min(batch, examples),)))
        optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"{name}: step {step + 1} of {steps}, loss {value.item():.3f}", flush=True)


# Images and texts.


def save_two_towers(
    place: Path,
    images: Images,
    classes: Labels,
    names: Sequence[Sequence[str]],
    words: Sequence[str],
    steps: int,
    batch: int,
) -> None:
    """A CLIPModel and its tokenizer, trained to tell which caption an image has, one of its class's `names`.

    The loss is −log softmax over all captions that there are of the image's own. The vocabulary has the `words`, too.
    """
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    there = sorted({name for of_class in names for name in of_class})
    tokenizer = word_level([*words, *there, *PROMPTS])
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    text = {**TEXT, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": LONGEST, "hidden_act": "gelu"}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**VISION, "hidden_act": "gelu"}, projection_dim=64))
    own = [[there.index(name) for name in of_class] for of_class in names]

    def loss(rows: Tensor) -> Tensor:
        prompt = PROMPTS[int(torch.randint(len(PROMPTS), ()))]
        tokens = tokenizer([prompt.format(name) for name in there], padding=True, return_tensors="pt")
        drawn = torch.rand(len(rows)).tolist()
        target = [own[y][int(u * len(own[y]))] for y, u in zip(classes[rows.numpy()], drawn, strict=True)]
        told = model(**tokens, pixel_values=view(pixels(images[rows.numpy()]))).logits_per_image
        return nn.functional.cross_entropy(told, torch.tensor(target))

    fitted(list(model.parameters()), loss, len(images), steps, batch, place.name)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)


def word_level(texts: Sequence[str]) -> Any:
    """A tokenizer with a token for every word in the texts, and a token at each end."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ["[pad]", "[unknown]", "[start]", "[end]"]
    words = [*special, *sorted({word for text in texts for word in text.split()} - {"{}"})]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[unknown]"))
    made.pre_tokenizer = WhitespaceSplit()
    made.post_processor = TemplateProcessing(single="[start] $A [end]", special_tokens=[("[start]", 2), ("[end]", 3)])
    names = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=LONGEST, **names)
