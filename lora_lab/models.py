"""Pretrained models, tokenizers and configurations by folder or hub id; no code from a repository is run unasked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_lab.errors import MismatchError, TaskError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pretrained(cls: Any, name: str, *, where: str = "the model", **options: Any) -> Any:
    """`cls.from_pretrained(name)`; TaskError with one line of why not, `where` naming what asked for it."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        return cls.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        raise TaskError(
            f"{where} {name!r} cannot be loaded ({str(error).strip().partition(chr(10))[0]}); "
            "give a folder, or a hub id where there is a network"
        ) from error


def base_model(name: str, modules: Sequence[str] = ()) -> nn.Module:
    """The model of a folder or hub id in the class that its configuration names, float32, frozen.

    With `modules`, a model that lacks any of them is refused.
    """
    import transformers

    config = pretrained(transformers.AutoConfig, name, where="the base model")
    named = [getattr(transformers, each, None) for each in getattr(config, "architectures", None) or []]
    cls = next((each for each in named if each is not None), transformers.AutoModel)
    with torch.random.fork_rng():
        model: nn.Module = pretrained(cls, name, where="the base model", dtype=torch.float32)
    known = {each for each, _ in model.named_modules()}
    missing = [each for each in modules if each not in known]
    if missing:
        raise MismatchError(f"the base model {name!r} ({cls.__name__}) has no module {missing[0]}; another base?")
    return model.requires_grad_(False).eval()
