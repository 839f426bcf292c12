"""Adapters for tests: files written by hand, and random weights on a task's base."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from lora_lab.adapters.adapter import Adapter
from lora_lab.tasks.task import Task

PREFIX = "base_model.model."


def lora(
    module: str = "layers.0.q_proj",
    *,
    rank: int = 2,
    rows: int = 6,
    columns: int = 4,
    seed: int = 0,
    name: str = "",
    prefix: str = PREFIX,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The two tensors of one adapted linear module; `name` is the adapter's, inside the keys."""
    generator = torch.Generator().manual_seed(seed)
    middle = f".{name}" if name else ""
    return {
        f"{prefix}{module}.lora_A{middle}.weight": torch.randn(rank, columns, generator=generator).to(dtype),
        f"{prefix}{module}.lora_B{middle}.weight": torch.randn(rows, rank, generator=generator).to(dtype),
    }


def product(tensors: Mapping[str, Tensor]) -> Tensor:
    """B A of the one pair in `tensors`."""
    A, B = tensors.values()
    return B.to(torch.float32) @ A.to(torch.float32)


def write(folder: Path, tensors: Mapping[str, Tensor], **config: object) -> Path:
    """A PEFT folder with rank 2 and alpha 4 (scale 2) unless `config` says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def perturbed(task: Task, config: Any, *, seed: int, scale: float) -> Any:
    """The task's base in PEFT, every trained parameter moved by noise of this scale."""
    torch.manual_seed(seed)
    model = get_peft_model(task.build_model(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn_like(parameter)
    return model


def random_adapter(task: Task, folder: Path, config: Any, *, seed: int = 0, scale: float) -> Adapter:
    """A random adapter as PEFT saves it, read back."""
    perturbed(task, config, seed=seed, scale=scale).save_pretrained(folder)
    return Adapter.load(folder)
