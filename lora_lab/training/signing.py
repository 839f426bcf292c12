"""Records in what a PEFT model saves while it is trained by somebody else's loop."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from lora_lab.adapters.files.recording import put_record
from lora_lab.errors import LoraLabError, LoraLabWarning


class Recorded(Protocol):
    """What knows the record of a training, as it is now."""

    @property
    def record(self) -> Mapping[str, Any]:
        """In JSON types."""


def sign_saves(model: nn.Module, training: Recorded) -> None:
    """From now on, what `model.save_pretrained` writes, for a Trainer or its user, has the training's record in it."""
    peft_model: Any = getattr(model, "module", model)  # what DistributedDataParallel wraps
    if hasattr(peft_model, "save_pretrained") and hasattr(peft_model, "peft_config"):
        vars(peft_model)["save_pretrained"] = _Saving(peft_model, training)


class _Saving:
    """Stands in for a model's save_pretrained; unlike a closure, it is copied and pickled with the model."""

    def __init__(self, model: Any, training: Recorded) -> None:
        self._model, self._training = model, training

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        saved = type(self._model).save_pretrained(self._model, save_directory, *args, **kwargs)
        given = inspect.signature(type(self._model).save_pretrained).bind(self._model, save_directory, *args, **kwargs)
        if given.arguments.get("is_main_process", True):
            for name in given.arguments.get("selected_adapters") or self._model.peft_config:
                self._record(os.path.join(save_directory, *([] if name == "default" else [name])))
        return saved

    def _record(self, folder: str) -> None:
        """Put the record in; whatever goes wrong, the adapter is saved, and the training goes on."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                put_record([folder], self._training.record)
        except (LoraLabError, OSError) as error:
            warnings.warn(f"{folder}: saved without a record of its training: {error}", LoraLabWarning, stacklevel=4)
