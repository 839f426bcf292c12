"""Image classifiers with a head, as a task file describes them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lora_lab.adapters.groups import block
from lora_lab.errors import TaskError
from lora_lab.tasks.kinds.heads import ProbedTask, float_heads
from lora_lab.tasks.kinds.images.images import DATA, ImageKeys, ImageTask
from lora_lab.tasks.settings import COMMON, Head

EXAMPLE = (
    """\
# A task of your own: lora-lab train --task this-file.toml
kind = "image-classification"

base = "path/to/model"        # folder or hub id; AutoModelForImageClassification must be able to load it
"""
    + DATA
    + """\
# labels = ["cat", "dog"]     # names in the order of the model's outputs; by default the dataset's, or sorted
# head = "frozen"             # the classifier: frozen as it is, trained along with the adapter, or a probe: fitted
#                             # to the base's features by logistic regression, then frozen
# image_size = 224            # pixels a side; by default what the base's image processor says
"""
    + COMMON
)


@dataclass(frozen=True, kw_only=True)
class Keys(ImageKeys):
    """The keys of an image-classification file."""

    kind: str = "image-classification"
    head: Head = "frozen"


class ImageClassification(ProbedTask, ImageTask):
    """An image classifier; adapters go where `target_modules` says, by default into all linear layers but the head."""

    kind = "image-classification"
    Keys = Keys

    def heads(self, model: nn.Module) -> list[str]:
        """The modules outside of the base, or the classifier of a model without such a division."""
        return super().heads(model) or [self._head_name(model)]

    @cached_property
    def labels(self) -> int:  # type: ignore[override]
        """Number of labels: of the names, or of a finished classifier's outputs, or of the numbers in training data."""
        if self._names:
            return len(self._names)
        if self._finished and self.settings.head == "frozen":
            return int(self.config.num_labels)
        return int(self._labels(self.table("train")).max()) + 1

    def build_model(self) -> nn.Module:
        """The base, frozen; a head that the checkpoint lacks is drawn from seed 0, or fitted for a probe."""
        model = self._built_anew()
        if self.settings.head == "probe":
            head = model.get_submodule(self._head_name(model))
            for own, fitted in zip((head.weight, head.bias), self._probe, strict=True):
                own.data = fitted.to(own)
        frozen: nn.Module = model.requires_grad_(False).eval()
        return frozen

    def _built_anew(self) -> Any:
        from transformers import AutoModelForImageClassification

        model: Any = self.pretrained_head(AutoModelForImageClassification, finished=self._finished)
        self._head_name(model)  # or TaskError
        float_heads(model, self.heads(model))
        if self.other_size and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            model.forward = partial(model.forward, interpolate_pos_encoding=True)
        return model

    @property
    def _finished(self) -> bool:
        """Whether the checkpoint has a head."""
        return any("ForImageClassification" in name for name in self.config.architectures or [])

    def _head_name(self, model: nn.Module) -> str:
        """The classifier: the last linear module outside of the base and of all blocks that has an output a label."""
        inside = f"{getattr(model, 'base_model_prefix', '')}."
        linear = {n: module for n, module in model.named_modules() if isinstance(module, nn.Linear)}
        name: str
        for name in reversed(linear):
            if linear[name].out_features == self.labels and block(name) == name and not name.startswith(inside):
                return name
        raise TaskError(f"task {self.name}: {type(model).__name__} has no linear head with {self.labels} outputs")

    @torch.inference_mode()
    def _features(self) -> npt.NDArray[np.float64]:
        model = self._built_anew().requires_grad_(False).eval()
        seen: list[npt.NDArray[np.float64]] = []
        head = model.get_submodule(self._head_name(model))
        head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double().numpy()))
        for batch in self.split("train").batches(self.batch_size):
            self.logits(model, batch)
        return np.concatenate(seen)

    def _names_in_data(self) -> list[str] | None:
        return self._in_the_models_order(super()._names_in_data())
