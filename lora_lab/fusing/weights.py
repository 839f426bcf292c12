"""The weights of a base that adapters change, one at a time, and where ΔW lies in them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import tensor_digest
from lora_lab.adapters.formats.keys import natural_key
from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import LoraLabError, MismatchError
from lora_lab.fusing.changes import Changes
from lora_lab.fusing.fuse import layout_of
from lora_lab.geometry.intruders import Inside, Weight
from lora_lab.results.result import finite
from lora_lab.scoring.execution import Cost, Execution
from lora_lab.scoring.journal import Journal

_VERSION = 1
"""Of what the journal holds; raised where its numbers change."""


class Weights:
    """W [out, in] of every module that adapters change, read from a checkpoint when it is asked for, with ΔW beside it.

    A kernel's inputs are flattened; embeddings stay [tokens, features]. MismatchError where the base has not the
    modules or the shapes; TunerError where ΔW is not known without the base.
    """

    def __init__(self, base: Path, adapters: Sequence[Adapter]) -> None:
        plain = [adapter.as_lora for adapter in adapters]
        self._layout = layout_of(base, plain)
        self._changes = [Changes(self._layout, [adapter]) for adapter in plain]
        self._base = base
        self.modules = sorted({name for change in self._changes for name in change.sites}, key=natural_key)

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in)."""
        rows, *rest = self._layout.shape(self._parameter(module)) or ()
        size = rows, int(np.prod(rest))
        return size[::-1] if self._turned(module) else size

    def updates(self, module: str) -> dict[int, LowRank]:
        """Place of each adapter that changes the module → its ΔW [out, in]."""
        found = {}
        for i, changes in enumerate(self._changes):
            if module in changes.sites and (update := changes.of(self._parameter(module)).update) is not None:
                A, B = (update.B.T, update.A.T) if self._turned(module) else (update.A, update.B)
                found[i] = LowRank(A, B)
        return found

    def read(self, module: str) -> Tensor:
        """W, in the dtype of the checkpoint."""
        W = self._layout.read(self._parameter(module)).flatten(1)
        return W.T if self._turned(module) else W

    def decomposed(self, module: str, device: torch.device | None = None) -> Weight:
        """W by its singular vectors; MismatchError, naming it, where it is not finite."""
        try:
            return Weight(self.read(module), device)
        except LoraLabError as error:
            raise MismatchError(f"{self._base}: {self._parameter(module)}: {error}") from error

    def seconds(self, device: torch.device) -> float:
        """About how long it takes to decompose all of them, by a small one."""
        trial = torch.rand(_SMALL, _SMALL, dtype=torch.float64, device=device)
        for _ in range(2):  # the first one loads the library
            began = time.perf_counter()
            torch.linalg.eigvalsh(trial @ trial.T)[0].item()
            spent = time.perf_counter() - began
        sizes = [sorted(self.shape(module)) for module in self.modules]
        work = sum(small**2 * (_EIGEN * small + _PRODUCT * large) for small, large in sizes)
        return spent * work / _SMALL**3

    def _parameter(self, module: str) -> str:
        return f"{module}.weight"

    def _turned(self, module: str) -> bool:
        """Whether the base stores the weight as [in, out], as the Conv1D of GPT-2 does."""
        return type(self._layout.modules.get(module)).__name__ == "Conv1D"


_SMALL = 384
_EIGEN, _PRODUCT = 1.4, 0.3
"""Times that all eigenvectors, and the product W Wᵀ, take beside the eigenvalues of a small matrix, entry by entry."""


def inside_of(
    base: Path, adapters: Sequence[Adapter], top: int, on: Execution = Execution()
) -> list[dict[str, Inside]]:
    """For every adapter: module → where its ΔW lies in the base's weight.

    Every weight is decomposed once, which is most of the work and told as the cost beforehand; what comes of it is kept
    in a journal in `on.cache` under a hash of W and ΔW.
    """
    weights, device = Weights(base, adapters), on.place()
    found: list[dict[str, Inside]] = [{} for _ in adapters]
    if on.confirm:
        on.confirm(Cost(len(weights.modules), 0, 0, weights.seconds(device)))
    run = f"intruders-{_VERSION}-{top}"
    journal = Journal(on.cache / f"{run}.sqlite", run) if on.cache else None
    for done, module in enumerate(weights.modules, 1):
        for i, inside in _of_module(weights, module, top, device, journal):
            found[i][module] = inside
        on.report(done, len(weights.modules))
    return found


def _of_module(
    weights: Weights, module: str, top: int, device: torch.device, journal: Journal | None
) -> Iterator[tuple[int, Inside]]:
    updates, weight = weights.updates(module), None
    digest = tensor_digest([weights.read(module)]) if journal is not None else ""
    for i, update in updates.items():
        key = f"{digest} {tensor_digest([update.A, update.B])}"
        try:
            inside = _unpacked(journal[key] if journal is not None else {})
        except KeyError:
            weight = weight or weights.decomposed(module, device)
            inside = weight.inside(update, top)
            if journal is not None:
                journal.add(key, finite(_packed(inside)))
        yield i, inside


def _packed(inside: Inside) -> dict[str, Any]:
    return {**vars(inside), "similarities": inside.similarities.tolist(), "values": inside.values.tolist()}


def _unpacked(kept: Mapping[str, Any]) -> Inside:
    """KeyError for what is not there."""
    similarities, values = (np.array(kept[name], dtype=float) for name in ("similarities", "values"))
    sides = [(np.nan if kept[side][0] is None else kept[side][0], kept[side][1]) for side in ("left", "right")]
    return Inside(similarities, values, sides[0], sides[1], kept["norm"], kept["sigma"])
