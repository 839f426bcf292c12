"""Passes with gates: the worth of every example where all gates are at one value, and its slope by every gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lora_lab.adapters.gates import Gates, gated
from lora_lab.adapters.groups import Unit
from lora_lab.errors import TaskError
from lora_lab.results.stats import Floats
from lora_lab.tasks.task import Targets, Task

if TYPE_CHECKING:
    from lora_lab.scoring.evaluator import Evaluator

PASSES = 3.0
"""What a pass with gradients takes of a CPU, in passes without (2.5 to 2.7 on the digits, 2 by operations alone)."""


@dataclass(frozen=True)
class Smooth:
    """What a worth is where a gradient is needed."""

    of: Callable[[Targets, float], Tensor]
    """(targets, temperature) → worths [examples, targets]."""
    stands_in: bool = False
    """Whether it stands for a worth that has no gradient, and so is not that worth itself."""


SMOOTH: dict[str, Smooth] = {
    "accuracy": Smooth(lambda targets, temperature: torch.sigmoid(targets.margin / temperature), stands_in=True),
    "loss": Smooth(lambda targets, temperature: -targets.loss),
    "log-likelihood": Smooth(lambda targets, temperature: -targets.loss),
    "margin": Smooth(lambda targets, temperature: targets.margin),
}
"""Worth → what gradients are taken of.

Right or wrong has none, so the accuracy is σ(margin / temperature): with two labels and a temperature of 1 the
probability of the right one.
"""


@dataclass(frozen=True)
class GatedPass:
    """A question to an evaluator (see `Evaluator.gather`): all gates at one value. Picklable for workers."""

    players: tuple[tuple[Unit, ...], ...]
    gate: float
    worth: str
    temperature: float = 2.0
    batch: int = 0
    """Examples a pass; 0: as they are scored."""
    slopes: bool = True

    def __call__(self, evaluator: Evaluator) -> tuple[Floats, Any, bool]:
        """Worths [examples], ∂worth/∂gate [examples, players] in float32, and whether each row is its example's own.

        Where it is not, only the mean of the rows means something. Without `slopes` there are none, [examples, 0].
        """
        task, models = evaluator.task, evaluator.models
        _check(task)
        worths, slopes = [], []
        with torch.inference_mode(False), torch.enable_grad(), gated(models.attached, self.players) as gates:
            models.attached.model.eval()
            for batch in self._cut(models.batches(evaluator.drawn(evaluator.split))):
                worth, slope = self._pass(task, models.attached.model, batch, gates)
                worths.append(worth)
                slopes.append(slope)
        return np.concatenate(worths), np.concatenate(slopes), gates.apart

    def _pass(self, task: Task, model: Any, batch: dict[str, Tensor], gates: Gates) -> tuple[Any, Any]:
        labels = batch["labels"]
        if not task.rows_are_examples and len(labels) > 1:
            gates.apart = False
        shape = (len(labels), gates.players)
        values = torch.full(shape, self.gate, device=labels.device, requires_grad=self.slopes)
        gates.set(values)
        targets = task.targets_of(task.logits(model, batch), batch)
        worth = targets.mean(SMOOTH[self.worth].of(targets, self.temperature))
        slope = torch.zeros(len(labels), 0)
        if self.slopes:
            # no example's worth hangs on another's gates, so the gradient of the sum holds every example's own
            (found,) = torch.autograd.grad(worth.sum(), values, allow_unused=True)
            slope = torch.zeros(shape) if found is None else found
        return worth.detach().double().cpu().numpy(), slope.cpu().numpy()

    def _cut(self, batches: Sequence[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        for batch in batches:
            size = len(batch["labels"])
            for start in range(0, size, self.batch or size):
                # tensors of inference mode cannot be kept for a backward pass; copies can
                yield {name: tensor[start : start + (self.batch or size)].clone() for name, tensor in batch.items()}


def _check(task: Task) -> None:
    """TaskError for a task of a class that judges in a way of its own and says nothing of its targets."""
    kind = type(task)
    own = kind.judge is not Task.judge or kind.judge_logits is not Task.judge_logits
    if own and kind.targets_of is Task.targets_of:
        raise TaskError(f"task {task.name}: {kind.__name__} judges in a way of its own; gates need its `targets_of`")
