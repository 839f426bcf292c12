"""Passes with gates: what every example is worth where they have some values, and its slope by every gate."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_lab.adapters.groups import Unit
from lora_lab.adapters.models.gates import Gates, gated, measured
from lora_lab.brief import Brief
from lora_lab.errors import LoraLabWarning, TaskError, TunerError
from lora_lab.results.result import fingerprint
from lora_lab.results.stats import Floats
from lora_lab.scoring.journal import Journal
from lora_lab.tasks.task import Targets, Task

if TYPE_CHECKING:
    from lora_lab.scoring.evaluator import Evaluator

PASSES = 3.0
"""What a pass with gradients takes of a CPU, in passes without (2.5 to 2.7 on the digits, 2 by operations alone)."""


@dataclass(frozen=True)
class Smooth:
    """What a worth is where a gradient is needed."""

    number: Callable[[Targets], Tensor]
    """Targets → the numbers that gradients are taken of, [examples, targets]; higher is better."""
    smooth: Callable[[Tensor, float], Tensor] | None = None
    """(numbers, temperature) → what stands for the worth, where that has no gradient; None: the number is the worth."""
    finish: Callable[[Floats], Floats] | None = None
    """Numbers → the worth itself, of examples with one target."""
    known_as: str = ""
    """The worth that the number of an example with one target is, where it is not this one."""


def _margin(targets: Targets) -> Tensor:
    if targets.margin is None:
        raise TaskError("the task has no margin, since not one answer alone is right; only its loss has gradients")
    return targets.margin


_RIGHT = Smooth(
    _margin,
    lambda margin, temperature: torch.sigmoid(margin / temperature),
    lambda margin: (margin > 0).astype(np.float64),
    "margin",
)

SMOOTH: dict[str, Smooth] = {
    "accuracy": _RIGHT,
    "token_accuracy": _RIGHT,
    "loss": Smooth(lambda targets: -targets.loss),
    "log-likelihood": Smooth(lambda targets: -targets.loss),
    "margin": Smooth(_margin),
}
"""Worth → what gradients are taken of.

Right or wrong has none, so the accuracy is σ(margin / temperature): with two labels and a temperature of 1 the
probability of the right one.
"""


@dataclass(frozen=True, repr=False)
class Passed(Brief):
    """What a pass gives of every example (or player, see `MeasuredPass`)."""

    numbers: Floats
    """[examples]"""
    slopes: npt.NDArray[np.float32]
    """[examples, players]: ∂number/∂gate; [examples, 0] of a pass without."""
    apart: bool
    """Whether each row is its example's own; where it is not, only the mean of the rows means something."""
    smoothed: bool
    """Whether the numbers stand for the worth already, since no example has one number that it is made of."""

    def smooth(self, worth: str, temperature: float) -> Passed:
        """The same of what stands for the worth, by the chain rule."""
        smooth = SMOOTH[worth].smooth
        if smooth is None or self.smoothed:
            return self
        with torch.inference_mode(False), torch.enable_grad():
            numbers = torch.tensor(self.numbers, requires_grad=True)
            worths = smooth(numbers, temperature)
            (slope,) = torch.autograd.grad(worths.sum(), numbers)
        slopes = (slope.numpy()[:, None] * self.slopes).astype(np.float32)
        return Passed(worths.detach().numpy(), slopes, self.apart, True)

    def packed(self) -> dict[str, Any]:
        """In JSON types, nothing lost."""
        numbers, slopes = (base64.b64encode(a.astype(t).tobytes()).decode() for a, t in self._arrays)
        return {"numbers": numbers, "slopes": slopes, "apart": self.apart, "smoothed": self.smoothed}

    @classmethod
    def unpacked(cls, text: Mapping[str, Any], count: int) -> Passed:
        """The inverse of `packed`; ValueError, KeyError or TypeError where it is not what that gives."""
        numbers, slopes = (np.frombuffer(base64.b64decode(text[name]), t) for name, t in _KEPT)
        if len(numbers) != count:
            raise ValueError(f"{len(numbers)} numbers, not {count}")
        return cls(numbers, slopes.reshape(count, -1), bool(text["apart"]), bool(text["smoothed"]))

    @property
    def _arrays(self) -> list[tuple[npt.NDArray[Any], str]]:
        return [(getattr(self, name), dtype) for name, dtype in _KEPT]


_KEPT = (("numbers", "<f8"), ("slopes", "<f4"))


@dataclass(frozen=True)
class GatedPass:
    """A question to an evaluator (see `Evaluator.gather`): gates at some values. Picklable for workers."""

    players: tuple[tuple[Unit, ...], ...]
    gates: float | tuple[float, ...]
    """One for all, or one a player."""
    worth: str
    temperature: float = 2.0
    batch: int = 0
    """Examples a pass; 0: as they are scored."""
    slopes: bool = True

    @property
    def key(self) -> str:
        """By which a journal knows it."""
        return f"gates {fingerprint(asdict(self))}"

    def size(self, examples: int) -> int:
        """How many numbers it gives."""
        return examples

    def __call__(self, evaluator: Evaluator) -> Passed:
        """Every example's number and its slopes, in float32."""
        task, models = evaluator.task, evaluator.models
        check_targets(task)
        found: list[Passed] = []
        with torch.inference_mode(False), torch.enable_grad(), gated(models.attached, self.players) as gates:
            models.attached.model.eval()
            for batch in self._cut(models.batches(evaluator.drawn(evaluator.split))):
                found.append(self._pass(task, models.attached.model, batch, gates))
        if any(each.smoothed for each in found):
            found = [each.smooth(self.worth, self.temperature) for each in found]
        numbers, slopes = (np.concatenate([getattr(each, name) for each in found]) for name, _ in _KEPT)
        return Passed(numbers, slopes, gates.apart, found[0].smoothed)

    def _pass(self, task: Task, model: Any, batch: dict[str, Tensor], gates: Gates) -> Passed:
        labels, entry = batch["labels"], SMOOTH[self.worth]
        if not task.rows_are_examples and len(labels) > 1:
            gates.apart = False
        values = torch.tensor(self.gates, dtype=torch.float32, device=labels.device)
        values = values.expand(len(labels), gates.players).clone().requires_grad_(self.slopes)
        gates.set(values)
        targets = task.targets_of(task.logits(model, batch), batch)
        numbers = entry.number(targets)
        smoothed = entry.smooth is not None and (numbers.shape[1] > 1 or not gates.apart)
        if entry.smooth and smoothed:
            numbers = entry.smooth(numbers, self.temperature)
        means = targets.mean(numbers)
        slope = torch.zeros(len(labels), 0)
        if self.slopes:
            # no example's number hangs on another's gates, so the gradient of the sum holds every example's own
            (found,) = torch.autograd.grad(means.sum(), values, allow_unused=True)
            slope = torch.zeros_like(values) if found is None else found
        return Passed(means.detach().double().cpu().numpy(), slope.cpu().numpy(), gates.apart, smoothed)

    def _cut(self, batches: Sequence[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        for batch in batches:
            size = len(batch["labels"])
            for start in range(0, size, self.batch or size):
                # tensors of inference mode cannot be kept for a backward pass; copies can
                yield {name: tensor[start : start + (self.batch or size)].clone() for name, tensor in batch.items()}


@dataclass(frozen=True)
class MeasuredPass:
    """A question to an evaluator: Σ_x ‖ΔW x‖² of each of these players, [players]."""

    players: tuple[tuple[Unit, ...], ...]

    @property
    def key(self) -> str:
        """By which a journal knows it."""
        return f"outputs {fingerprint(asdict(self))}"

    def size(self, examples: int) -> int:
        """How many numbers it gives."""
        return len(self.players)

    def __call__(self, evaluator: Evaluator) -> Passed:
        """From one pass over all examples."""
        task, attached = evaluator.task, evaluator.models.attached
        with torch.no_grad(), measured(attached, self.players) as total:
            attached.model.eval()
            for batch in evaluator.models.batches(evaluator.drawn(evaluator.split)):
                task.pass_through(attached.model, batch)
        return Passed(total.numpy(), np.zeros((len(total), 0), np.float32), False, False)


@dataclass(frozen=True)
class PlacesOfGates:
    """A question to an evaluator: why these players have no gates there, or None."""

    players: tuple[tuple[Unit, ...], ...]

    def __call__(self, evaluator: Evaluator) -> str | None:
        """The error that a pass would raise, before any."""
        try:
            check_targets(evaluator.task)
            with gated(evaluator.models.attached, self.players):
                return None
        except (TaskError, TunerError) as error:
            return str(error)


Pass = GatedPass | MeasuredPass


def remembered_pass(journal: Journal | None, asked: Pass, examples: int) -> Passed | None:
    """A pass that a journal holds; None where it is not there, or is not one over so many examples."""
    if journal is None or asked.key not in journal:
        return None
    try:
        return Passed.unpacked(journal[asked.key], asked.size(examples))
    except (KeyError, TypeError, ValueError) as error:
        text = f"{journal.path}: a pass that does not fit ({error}) is computed again"
        warnings.warn(text, LoraLabWarning, stacklevel=3)
        return None


def check_targets(task: Task) -> None:
    """TaskError for a task of a class that judges in a way of its own and says nothing of its targets."""
    kind = type(task)
    own = kind.judge is not Task.judge or kind.judge_logits is not Task.judge_logits
    if own and kind.targets_of is Task.targets_of:
        way = f"{kind.__name__} judges in a way of its own"
        raise TaskError(f"task {task.name}: {way}; gradients need its `targets_of`")
