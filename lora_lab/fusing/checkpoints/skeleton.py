"""A base model without its weights: which modules it has, of what kind and shape, and which weights are tied."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_lab import files
from lora_lab.errors import LoraLabError, MismatchError, TaskError
from lora_lab.files.trust import refuse_indirections
from lora_lab.hub import pretrained

_TASK_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task_type → the class of transformers that builds a model for it."""


def skeleton(folder: Path, modules: Collection[str] = (), task_types: Collection[str] = ()) -> nn.Module | None:
    """The model of a folder on torch's meta device, which takes no memory; None where transformers knows none.

    Of the classes that its configuration and the adapters' task types name, it is the first that has all `modules`, or
    else the configuration's own. MismatchError for quantised weights, to whose codes nothing can be added.
    """
    if not folder.is_dir() or not (folder / "config.json").exists():
        return None
    settings = files.read_json(folder / "config.json")
    _refuse_quantised(folder, settings)
    if "model_type" not in settings:
        return None
    try:
        refuse_indirections(settings, str(folder))
        import transformers

        config = pretrained(transformers.AutoConfig, str(folder), where="the base model")
    except (TaskError, LoraLabError):
        return None
    candidates = list(_classes(config, task_types))
    models = (model for cls in candidates if (model := _empty(cls, config)) is not None)
    first = None
    for model in models:
        first = first or model
        if {name for name, _ in model.named_modules()}.issuperset(modules):
            return model
    return first


def _classes(config: Any, task_types: Collection[str]) -> Iterator[Any]:
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if isinstance(cls := getattr(transformers, str(name), None), type):
            yield cls
    for task_type in (*task_types, "FEATURE_EXTRACTION"):
        if task_type in _TASK_CLASSES:
            mapping = getattr(transformers, _TASK_CLASSES[task_type])._model_mapping
            with contextlib.suppress(KeyError, ValueError):
                cls = mapping[type(config)]
                yield cls if isinstance(cls, type) else cls[0]


def _empty(cls: Any, config: Any) -> nn.Module | None:
    with torch.device("meta"), torch.random.fork_rng(), quiet():
        try:
            model: nn.Module = cls._from_config(config)
        except Exception:  # a configuration of another version, or one that asks for packages that are not here
            return None
    return model.eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers and PEFT log and warn of models that are never run."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _refuse_quantised(folder: Path, settings: Mapping[str, Any]) -> None:
    for part in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        said = part.get("quantization_config") or part.get("compression_config")
        if said:
            method = said.get("quant_method") if isinstance(said, dict) else None
            raise MismatchError(
                f"{folder}: its weights are quantised ({method or 'quantization_config'}), and ΔW cannot be added to "
                "their codes; the model that it was made from, in 16 or 32 bits, is needed"
            )
