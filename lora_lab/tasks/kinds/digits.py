"""The embedded testbed: a small vision transformer on 1797 handwritten digits, 8 × 8 pixels.

The digits are the test set of Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak, 1998, UCI Machine
Learning Repository, CC BY 4.0), as scikit-learn carries it; they lie in data/digits.safetensors. The base
model is shipped as data/digits_vit.safetensors; `python -m lora_lab.tasks.kinds.digits` makes it again.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_lab import files
from lora_lab.errors import unknown
from lora_lab.tasks.task import CLASSIFIED, Split, Task

CHECKPOINT = "data/digits_vit.safetensors"
DIGITS = "data/digits.safetensors"
TEST, VALIDATION = 500, 297  # the remaining 1000 digits are for training
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Labelling:
    """What is asked of a digit y, and how its picture is changed first."""

    about: str
    labels: int
    own_head: bool
    """Whether the task has a frozen random head of its own in place of the pretrained one."""


LABELLINGS = {
    "relabel": Labelling("y → (3y + 4) mod 10, pretrained head", 10, False),
    "rot90": Labelling("digits turned by 90°, pretrained head", 10, False),
    "invert": Labelling("black and white exchanged, pretrained head", 10, False),
    "rot4": Labelling("by how many quarter turns the digit is turned", 4, True),
    "identity": Labelling("which digit, head of its own", 10, True),
    "mod3": Labelling("y mod 3", 3, True),
    "mod5": Labelling("y mod 5", 5, True),
    "div2": Labelling("y // 2", 5, True),
}


class Digits(Task):
    """One of the digit tasks; the head stays frozen, or adapters would be redundant."""

    target_modules = r"vit\..*\.(q_proj|k_proj|v_proj|o_proj|fc1|fc2)"
    base = "lora-lab/digits-vit"
    learning_rate = 3e-3
    rank = 4
    batch_size = 100  # fits the caches of a core
    metrics = CLASSIFIED
    threads = 1  # two would cost twice the CPU time for the same wall time

    def __init__(self, labelling: str) -> None:
        if labelling not in LABELLINGS:
            raise unknown("digits task", labelling, LABELLINGS)
        self.labelling = labelling
        self.name = f"digits/{labelling}"
        self.about = LABELLINGS[labelling].about
        self.labels = LABELLINGS[labelling].labels

    @property
    def base_digest(self) -> str:
        """The shipped checkpoint's own hash."""
        return hashlib.sha256(package_files("lora_lab").joinpath(CHECKPOINT).read_bytes()).hexdigest()

    @property
    def record(self) -> dict[str, Any]:
        """The built-in name says everything."""
        return {"name": self.name}

    def build_model(self) -> nn.Module:
        """The pretrained transformer, frozen, with this task's head."""
        model: Any = load_base()
        if LABELLINGS[self.labelling].own_head:
            generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
            weight = torch.randn(self.labels, model.config.hidden_size, generator=generator)
            with torch.random.fork_rng():
                model.classifier = nn.Linear(model.config.hidden_size, self.labels)
            nn.init.zeros_(model.classifier.bias)
            model.classifier.weight.data = model.config.initializer_range * weight
            model.config.num_labels = model.num_labels = self.labels
        frozen: nn.Module = model.requires_grad_(False).eval()
        return frozen

    def _load(self, split: str) -> Split:
        pixels, digits = images(split)
        y = digits
        match self.labelling:
            case "relabel":
                y = (3 * digits + 4) % 10
            case "rot90":
                pixels = pixels.rot90(1, (2, 3))
            case "invert":
                pixels = -pixels
            case "rot4":
                y = torch.arange(len(digits)) % 4
                pixels = torch.stack([image.rot90(int(turns), (1, 2)) for image, turns in zip(pixels, y, strict=True)])
            case "mod3":
                y = digits % 3
            case "mod5":
                y = digits % 5
            case "div2":
                y = digits // 2
        return Split({"pixel_values": pixels.contiguous(), "labels": y})


@cache
def images(split: str) -> tuple[Tensor, Tensor]:
    """Pixels [n, 1, 8, 8] in [−1, 1] and digits [n] of a split: 1000 train, 297 validation, 500 test."""
    data, _ = files.read_safetensors(Path(str(package_files("lora_lab").joinpath(DIGITS))))
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(data["images"]))
    bounds = {"test": (0, TEST), "validation": (TEST, TEST + VALIDATION), "train": (TEST + VALIDATION, len(order))}
    indices = order[slice(*bounds[split])]
    return data["images"][indices].float()[:, None] / 8 - 1, data["labels"][indices].long()


def config() -> Any:
    """Configuration of the base: 203,082 parameters, 6 blocks of width 64."""
    from transformers import ViTConfig

    return ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=128,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
    )


def load_base() -> Any:
    """A fresh copy of the pretrained base in float32."""
    from safetensors.torch import load
    from transformers import ViTForImageClassification

    weights = load(package_files("lora_lab").joinpath(CHECKPOINT).read_bytes())
    with torch.random.fork_rng():  # its initial weights are drawn, and then replaced
        model = ViTForImageClassification(config())
    model.load_state_dict({key: tensor.float() for key, tensor in weights.items()})
    return model


def train_base(seed: int = 0, steps: int = 700, batch: int = 48) -> Any:
    """Pretrain the base on the training split (about 46 CPU seconds)."""
    from transformers import ViTForImageClassification

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ViTForImageClassification(config()).train()
        pixels, digits = images("train")
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
        order: list[int] = []
        for _ in range(steps):
            if len(order) < batch:
                order = torch.randperm(len(digits)).tolist()
            indices, order = order[:batch], order[batch:]
            loss = model(pixel_values=pixels[indices], labels=digits[indices]).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    """Train the base anew, write it as fp16, and print its accuracy on the test split."""
    from pathlib import Path

    from lora_lab.files.streamed import write_safetensors

    torch.set_num_threads(1)
    model = train_base()
    half = {key: tensor.half() for key, tensor in model.state_dict().items()}
    path = Path(str(package_files("lora_lab").joinpath(CHECKPOINT)))
    write_safetensors(path, half, {"format": "pt"})
    pixels, digits = images("test")
    with torch.inference_mode():
        accuracy = (load_base()(pixel_values=pixels).logits.argmax(-1) == digits).double().mean()
    print(f"{path.name}: {path.stat().st_size:,} bytes, test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
