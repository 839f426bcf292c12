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
from lora_lab.hub import quiet_transformers
from lora_lab.tasks.digests import cache
from lora_lab.tasks.file import FileTask
from lora_lab.tasks.task import Split

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


CERTAIN = 30.0
"""A logit that leaves no doubt."""
Fit = Callable[[npt.NDArray[np.float64], npt.NDArray[Any], int], tuple[Tensor, Tensor]]
"""(Features [n, width], labels [n] or [n, outputs], outputs) → weight [outputs, width] and bias [outputs]."""


def probe(
    key: Sequence[Any], split: Split, labels: int, features: Callable[[], npt.NDArray[np.float64]], fit: Fit
) -> tuple[Tensor, Tensor]:
    """Weight [labels, width] and bias [labels] that are fitted to `features` [examples, width] of a split.

    `key` is all that the features hang on besides the split's inputs. Fitted once: afterwards it comes from
    $XDG_CACHE_HOME/lora-lab, and `features` is not called.
    """
    path = _place(key, split)
    fitted = _kept(path, labels) if path.exists() else None
    if fitted is None:
        fitted = fit(features(), split.inputs["labels"].numpy(), labels)
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


def logistic(features: npt.NDArray[np.float64], answers: npt.NDArray[Any], labels: int) -> tuple[Tensor, Tensor]:
    """Logistic regression of one label among several; TaskError where there is only one."""
    with needs("data", "a head that is fitted to the data"):
        from sklearn.linear_model import LogisticRegression

    if len(set(answers.tolist())) < 2:
        raise TaskError(f"a probe cannot be fitted: all {len(answers)} training examples have the label {answers[0]}")
    fitted = LogisticRegression(max_iter=2000).fit(features, answers)
    weight, bias = np.zeros((labels, features.shape[1])), np.full(labels, -CERTAIN)  # a label that never occurs
    if len(fitted.classes_) == 2:  # one function for two labels
        weight[fitted.classes_] = np.array([[-0.5], [0.5]]) * fitted.coef_
        bias[fitted.classes_] = np.array([-0.5, 0.5]) * fitted.intercept_
    else:
        weight[fitted.classes_], bias[fitted.classes_] = fitted.coef_, fitted.intercept_
    return torch.tensor(weight, dtype=torch.float32), torch.tensor(bias, dtype=torch.float32)


class HeadedTask(FileTask):
    """A task whose model has a head of `labels` outputs, which `settings.head` says how to treat."""

    @property
    def trains_head(self) -> bool:  # type: ignore[override]
        """Whether the head is trained along with the adapter."""
        return bool(self.settings.head == "trained")

    def pretrained_head(self, cls: Any, *, finished: bool, **options: Any) -> Any:
        """The model with so many outputs as the data needs; TaskError for a finished, frozen head with others."""
        count = int(self.config.num_labels)
        other = finished and count != self.labels
        if other and self.settings.head == "frozen":
            raise TaskError(
                f"task {self.name}: {self.settings.base!r} has {count} outputs and the data {self.labels} labels; "
                'head = "trained" or "probe" gives it others'
            )
        with quiet_transformers() if other or not finished else contextlib.nullcontext():
            return self.pretrained_model(cls, num_labels=self.labels, ignore_mismatched_sizes=other, **options)


class ProbedTask(HeadedTask):
    """A task whose head may be a probe, fitted to what `_features` gives of the training data."""

    @cached_property
    def _probe(self) -> tuple[Tensor, Tensor]:
        """Weight and bias, fitted to the features; kept in the cache."""
        key = [self.base_digest, self.record, self.labels]
        return probe(key, self.split("train"), self.labels, self._features, self._fit)

    def _fit(self, features: npt.NDArray[np.float64], answers: npt.NDArray[Any], labels: int) -> tuple[Tensor, Tensor]:
        """As `Fit` says; logistic regression where the kind has nothing else."""
        return logistic(features, answers, labels)

    @property
    def digest(self) -> Sequence[Tensor]:
        """The probe, which is fitted to other data than is scored."""
        return self._probe if self.settings.head == "probe" else ()

    @abstractmethod
    def _features(self) -> npt.NDArray[np.float64]:
        """What the base gives of every training example, [n, width]."""
