"""Heads: in float32 on any base, and the probe, fitted to a frozen base's features and kept in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_lab import files
from lora_lab.errors import FileError, LoraLabWarning, TaskError
from lora_lab.extras import needs
from lora_lab.tasks.digests import cache
from lora_lab.tasks.task import Split, Task

_FORMAT = 2
"""Of what is kept: another one is fitted anew."""


def float_heads(model: torch.nn.Module, heads: Sequence[str]) -> None:
    """Heads compute in float32 whatever the base does: small steps of training are lost in bfloat16."""
    if next(model.parameters()).dtype == torch.float32:
        return

    def as_float(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(value.float() if isinstance(value, torch.Tensor) else value for value in inputs)

    for name in heads:
        model.get_submodule(name).float().register_forward_pre_hook(as_float)


def probe(
    key: Sequence[Any], split: Split, labels: int, features: Callable[[], npt.NDArray[np.float64]]
) -> tuple[Tensor, Tensor]:
    """Weight [labels, width] and bias [labels] of logistic regression on `features` [examples, width] of a split.

    `key` is all that the features hang on besides the split's inputs. Fitted once: afterwards it comes from
    $XDG_CACHE_HOME/lora-lab, and `features` is not called.
    """
    path = _place(key, split)
    fitted = _kept(path, labels) if path.exists() else None
    if fitted is None:
        fitted = _fit(features(), split.inputs["labels"].numpy(), labels)
        weight, bias = fitted
        files.write_safetensors(path, {"weight": weight, "bias": bias}, {"format": "pt", _CHECKSUM: _checksum(*fitted)})
    return fitted


def _kept(path: Path, labels: int) -> tuple[Tensor, Tensor] | None:
    """What was fitted before; None, and a warning, where it is damaged."""
    with contextlib.suppress(FileError, KeyError):
        tensors, metadata = files.read_safetensors(path)
        weight, bias = tensors["weight"], tensors["bias"]
        sound = metadata.get(_CHECKSUM) == _checksum(weight, bias)
        if sound and weight.ndim == 2 and len(weight) == len(bias) == labels:
            return weight, bias
    warnings.warn(f"{path}: damaged; the probe is fitted again", LoraLabWarning, stacklevel=4)
    return None


_CHECKSUM = "lora_lab.sha256"


def _checksum(weight: Tensor, bias: Tensor) -> str:
    return hashlib.sha256(weight.contiguous().numpy().tobytes() + bias.contiguous().numpy().tobytes()).hexdigest()


def _place(key: Sequence[Any], split: Split) -> Path:
    digest = hashlib.sha256(repr([*key, _FORMAT]).encode())
    for name, tensor in sorted(split.inputs.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return cache() / f"{digest.hexdigest()[:24]}.safetensors"


def _fit(features: npt.NDArray[np.float64], answers: npt.NDArray[np.int64], labels: int) -> tuple[Tensor, Tensor]:
    with needs("data", "a head that is fitted to the data"):
        from sklearn.linear_model import LogisticRegression

    if len(set(answers.tolist())) < 2:
        raise TaskError(f"a probe cannot be fitted: all {len(answers)} training examples have the label {answers[0]}")
    fitted = LogisticRegression(max_iter=2000).fit(features, answers)
    weight, bias = np.zeros((labels, features.shape[1])), np.full(labels, -30.0)  # a label that never occurs
    if len(fitted.classes_) == 2:  # one function for two labels
        weight[fitted.classes_] = np.array([[-0.5], [0.5]]) * fitted.coef_
        bias[fitted.classes_] = np.array([-0.5, 0.5]) * fitted.intercept_
    else:
        weight[fitted.classes_], bias[fitted.classes_] = fitted.coef_, fitted.intercept_
    return torch.tensor(weight, dtype=torch.float32), torch.tensor(bias, dtype=torch.float32)


class ProbedTask(Task):
    """A task whose head may be a probe, fitted to what `_features` gives of the training data."""

    settings: Any
    """Has `head`."""

    @cached_property
    def _probe(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the logistic regression on the features; kept in the cache."""
        return probe([self.base_digest, self.record, self.labels], self.split("train"), self.labels, self._features)

    @property
    def digest(self) -> Sequence[Tensor]:
        """The probe, which is fitted to other data than is scored."""
        return self._probe if self.settings.head == "probe" else ()

    @abstractmethod
    def _features(self) -> npt.NDArray[np.float64]:
        """What the base gives of every training example, [n, width]."""
