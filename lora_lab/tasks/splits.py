"""Examples as tensors: the three splits, batches of one without needless padding, and their order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_lab.errors import OptionError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, repr=False)
class Split:
    """Examples as tensors with the example as first dimension, of this package's own tasks `labels` among them."""

    inputs: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def __repr__(self) -> str:
        shapes = (f"{name} {list(tensor.shape)}" for name, tensor in self.inputs.items())
        return f"Split({len(self)} examples: {', '.join(shapes)})"

    def subset(self, examples: int | None, seed: int = 0) -> Split:
        """So many examples drawn without replacement, in the split's order; all of them for None."""
        n = len(self)
        if examples is None or examples >= n:
            return self
        if examples < 1:
            raise OptionError(f"{examples} examples; at least 1 is needed")
        indices = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(n)[:examples]))
        return Split({name: tensor[indices] for name, tensor in self.inputs.items()})

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """Consecutive batches, without the padding that all examples of a batch share."""
        return [
            trimmed({name: tensor[start : start + size] for name, tensor in self.inputs.items()})
            for start in range(0, len(self), size)
        ]


def trimmed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch of padded texts cut to the longest of them; any other batch as it is."""
    mask = batch.get("attention_mask")
    if mask is None:
        return batch
    used = mask.flatten(0, -2).any(0)
    width, whole = int(used.nonzero()[-1]) + 1 if used.any() else 1, mask.shape[-1]
    if width == whole:
        return batch
    # labels that are numbers, as many as there happen to be tokens, are none of tokens
    whose = [n for n, t in batch.items() if t.ndim > 1 and t.shape[-1] == whole and not _numbers(n, t)]
    return {n: t[..., :width] if n in whose else t for n, t in batch.items()}


def _numbers(name: str, tensor: Tensor) -> bool:
    return name == "labels" and tensor.is_floating_point()


def by_length(split: Split) -> Split:
    """The same examples, shortest first, so that batches of texts have little padding."""
    lengths = split.inputs["attention_mask"].flatten(1).sum(1)
    order = lengths.argsort(stable=True)
    return Split({name: tensor[order] for name, tensor in split.inputs.items()})
