"""CLIP: images told apart by their classes in words, as a task file describes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from lora_lab.errors import OptionError, TaskError
from lora_lab.tasks.kinds.images.images import DATA, ImageKeys, ImageTask
from lora_lab.tasks.settings import COMMON, Count

ATTENTION = r".*\.(q_proj|k_proj|v_proj)"
"""Where the paper puts adapters in CLIP; the names are the same in both encoders."""

_LINEAR = r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"

EXAMPLE = (
    """\
# A task of your own: lora-lab train --task this-file.toml
kind = "clip"

base = "path/to/clip"         # folder or hub id; CLIPModel must be able to load it
"""
    + DATA
    + """\
# labels = ["cat", "dog"]     # the classes' names as the prompts have them, in the order of the labels; by default the
#                             # dataset's, with spaces for underscores
# prompt = "a photo of a {}." # or a list of prompts, whose embeddings are averaged
# shots = 16                  # training examples of each class, drawn with split_seed (all, where there are fewer)
# encoders = "both"           # where the adapters are: vision, text, or both
# image_size = 224            # pixels a side; by default what the base's image processor says
"""
    + COMMON.replace('"all-linear"', '["q_proj", "k_proj", "v_proj"]   # within these encoders')
)


@dataclass(frozen=True, kw_only=True)
class Keys(ImageKeys):
    """The keys of a clip file."""

    kind: str = "clip"
    prompt: str | list[str] = "a photo of a {}."
    shots: Count | None = None
    encoders: Literal["both", "vision", "text"] = "both"
    target_modules: str | list[str] = ATTENTION

    def check(self, where: str) -> None:
        """OptionError for values that do not go together."""
        super().check(where)
        if not self.prompt:
            raise OptionError(f"{where}: prompt is empty")
        for prompt in _listed(self.prompt):
            if "{}" not in prompt:
                raise OptionError(f"{where}: prompt {prompt!r} has no {{}} for the name of a class")


class Clip(ImageTask):
    """Images told apart by the nearest of their classes' prompts, both encoded by CLIP; adapters go into either."""

    kind = "clip"
    rows_are_examples = False
    Keys = Keys

    def __init__(self, settings: Any, name: str) -> None:
        super().__init__(settings, name)
        self.target_modules = self.targets(settings.target_modules)

    def targets(self, asked: str | Sequence[str] | None) -> str | Sequence[str]:
        """The modules asked for, in the encoders of the task."""
        return self.target_modules if asked is None else _within(asked, self.settings.encoders)

    @cached_property
    def labels(self) -> int:  # type: ignore[override]
        """Number of classes."""
        return len(self.classes)

    @cached_property
    def classes(self) -> list[str]:
        """The classes' names, as the prompts have them."""
        names = self._names
        if names is None:
            raise TaskError(
                f"task {self.name}: the labels are numbers; prompts need the classes' names: labels = [...]"
            )
        return names if self.settings.labels else [name.replace("_", " ") for name in names]

    def build_model(self) -> nn.Module:
        """CLIP, frozen, with its classes' prompts; modules are named as in CLIPModel."""
        if self.config.model_type != "clip":
            raise TaskError(f"task {self.name}: {self.settings.base!r} is a {self.config.model_type} model, not a clip")
        model: Any = self.pretrained_model(_classifier())
        model.prompt_with(self._prompts(), len(self.classes))
        model.interpolates = self.other_size
        frozen: nn.Module = model.requires_grad_(False).eval()
        return frozen

    @property
    def digest(self) -> Sequence[Tensor]:
        """The prompts, which name the classes."""
        return list(self._prompts().values())

    def _prompts(self) -> Mapping[str, Tensor]:
        """Tokens of every class in every prompt, class by class."""
        texts = [prompt.replace("{}", name) for name in self.classes for prompt in _listed(self.settings.prompt)]
        longest = self.config.text_config.max_position_embeddings
        encoded: Mapping[str, Tensor] = self.tokenizer(
            texts, truncation=True, max_length=longest, padding=True, return_tensors="pt"
        )
        return encoded

    def _chosen(self, split: str, labels: Tensor) -> list[int]:
        shots = self.settings.shots
        if shots is None or split != "train":
            return super()._chosen(split, labels)
        draw = np.random.default_rng(self.settings.split_seed)
        drawn: list[int] = []
        for label in sorted(set(labels.tolist())):  # more shots add to fewer
            drawn += draw.permutation((labels == label).nonzero()[:, 0].numpy())[:shots].tolist()
        return sorted(drawn)


@cache
def _classifier() -> Any:
    from transformers import CLIPModel
    from transformers.modeling_outputs import ImageClassifierOutput

    class ClipClassifier(CLIPModel):  # type: ignore[misc]
        """CLIP as a classifier of images. Prompts are encoded in every pass: adapters may have changed the encoder."""

        interpolates = False

        def prompt_with(self, tokens: Mapping[str, Tensor], classes: int) -> None:
            """Tell images apart by these prompts, as many for each class, class by class."""
            self.classes = classes
            for name in ("input_ids", "attention_mask"):
                self.register_buffer(f"prompt_{name}", tokens[name].to(self.device), persistent=False)

        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
            """Logits [images, classes]: cosines times exp(logit_scale), prompts of one class averaged before."""
            seen = self.get_image_features(pixel_values, interpolate_pos_encoding=self.interpolates).pooler_output
            read = self.get_text_features(self.prompt_input_ids, self.prompt_attention_mask).pooler_output
            seen, read = seen.float(), read.float()  # cosines, which are multiplied by about 100
            classes = _unit(_unit(read).reshape(self.classes, -1, read.shape[-1]).mean(1)).to(seen.device)
            logits = self.logit_scale.exp().to(seen.device) * _unit(seen) @ classes.T
            loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels.to(logits.device))
            return ImageClassifierOutput(loss=loss, logits=logits)

    return ClipClassifier


def _unit(embeds: Tensor) -> Tensor:
    return nn.functional.normalize(embeds, dim=-1)


def _within(modules: str | Sequence[str], encoders: str) -> str | Sequence[str]:
    """Target modules of one encoder alone, or as they are for both."""
    if encoders == "both":
        return modules
    if not isinstance(modules, str):
        modules = rf".*\.({'|'.join(map(re.escape, modules))})"
    elif modules == "all-linear":
        modules = _LINEAR
    return rf"(?={encoders}_model\.)(?:{modules})"


def _listed(prompt: str | list[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else prompt
