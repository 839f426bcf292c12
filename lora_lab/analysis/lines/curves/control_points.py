"""Curves of one control point between two adapters, and how that point is trained; ends stay fixed.

Garipov et al. 2018 (arXiv:1802.10026): a curve φ(t) with φ(0) = a and φ(1) = b, whose control point c minimises the
mean over t of the loss on it, ∫ L(φ(t)) dt, by one t ~ U[0, 1] a batch. The gradient comes through the mixture: ΔW(t)
or the factors at t are put into the model, and what the backward pass gives for them goes on to those of c.

Everything that is drawn for a step (its batch, its t, dropout) hangs on the seed and the step alone, so that a run that
was killed goes on from its last checkpoint with the same numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_lab import files
from lora_lab.adapters.adapter import Adapter
from lora_lab.analysis.lines.curves.control_factors import ControlFactors
from lora_lab.brief import Brief
from lora_lab.errors import DivergedError, FileError, LoraLabWarning, TaskError
from lora_lab.files.trust import Origin
from lora_lab.merging.paths import SPACES, Paths
from lora_lab.registry import Registry
from lora_lab.results.result import fingerprint
from lora_lab.scoring.examples import Examples, TaskSpec, detached, examples_of
from lora_lab.scoring.models import TaskModels
from lora_lab.scoring.sharing.worker import report, telling
from lora_lab.tasks.task import Task
from lora_lab.training.trainer import Batches, training_mode

CHECKED = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Places on the curve whose mean validation loss chooses the control point: middles of five equal parts."""

_WARMUP, _DECAY, _CLIP = 0.06, 0.25, 1.0
"""Shares of the steps in which the rate rises and falls, and the norm that gradients are clipped to: as a Recipe's."""


@dataclass(frozen=True)
class CurveShape:
    """A curve of one control point: what it gives at t, and how figures show it."""

    weights: Callable[[float], tuple[float, float, float]]
    """t → weights of a, of the control point c, and of b, which sum to 1."""
    label: str = ""
    place: int | None = None
    """Its place among the colours of all figures; None: one that is free, in each."""
    about: str = ""
    """Its formula; a and b are the adapters, c is the control point."""


CURVES = Registry(
    "curve",
    "lora_lab.curves",
    CurveShape,
    {
        "bezier": CurveShape(
            lambda t: ((1 - t) ** 2, 2 * t * (1 - t), t**2),
            "quadratic Bézier, control point trained",
            1,
            "(1−t)²a + 2t(1−t)c + t²b (Garipov et al. 2018, arXiv:1802.10026)",
        ),
        "polychain": CurveShape(
            lambda t: (max(0.0, 1 - 2 * t), 1 - abs(2 * t - 1), max(0.0, 2 * t - 1)),
            "one bend, trained",
            2,
            "straight from a to c for t up to ½, then straight to b (the same)",
        ),
    },
)
"""Curves by name."""


@dataclass(frozen=True)
class Training:
    """How a control point is trained."""

    shape: str
    space: str
    """What is mixed on the curve, a name in SPACES."""
    steps: int
    learning_rate: float
    batch_size: int
    rank: int | None
    """Of the control point's ΔW; None: that of the midpoint it starts at."""
    checks: int
    seed: int


@dataclass(frozen=True, repr=False)
class Control(Brief):
    """A trained control point."""

    adapter: Adapter
    step: int
    """After which step it was the best on validation; 0: the midpoint that it started as."""
    trace: Sequence[Mapping[str, Any]]
    """Step, mean training loss since the check before, and mean validation loss over the curve, at every check."""


class ControlTraining:
    """Trains the control point of a curve between two adapters (with factors as they are mixed) on their task."""

    def __init__(self, ends: Sequence[Adapter], how: Training, task: Task, device: torch.device) -> None:
        self.ends, self.how, self.task = ends, how, task
        self._start = _midpoint(ends, how)
        self._models = TaskModels([ends[0], self._start, ends[1]], [task] * 3, device)
        self._shape = CURVES[how.shape]
        self._points = ControlFactors(ends, self._start, device, summed=SPACES[how.space].needs_factors)
        self._orders: dict[int, list[int]] = {}

    @cached_property
    def run(self) -> str:
        """What the control point hangs on, hashed."""
        data = [examples_of(self.task, split) for split in ("train", "validation")]
        return fingerprint(["control", [end.identity for end in self.ends], dataclasses.asdict(self.how), data])

    def train(self, folder: Path | None = None, progress: Callable[[int, int], None] | None = None) -> Control:
        """The control point that was best on the validation split; checkpoints lie in the folder.

        DivergedError where a loss is no finite number.
        """
        how, path = self.how, folder / f"control-{self.run}.safetensors" if folder else None
        state = _State([tensor.detach().clone() for tensor in self._points.leaves])
        if path is not None and path.exists():
            state = _State.load(path, self.run, state)
        every = max(1, -(-how.steps // how.checks))
        model = self._models.attached.model
        live = self._points.live(self._models.attached, self._start)
        optimizer = torch.optim.Adam(self._points.leaves, lr=how.learning_rate, fused=True)
        state.put_into(self._points.leaves, optimizer)
        devices = [live[0].device] if live[0].is_cuda else []
        with torch.random.fork_rng(devices=devices):
            while state.step < how.steps or not state.trace:
                if not state.trace:
                    self._check(state, live, [])
                losses = []
                with training_mode(model):
                    for _ in range(min(every, how.steps - state.step)):
                        losses.append(self._step(model, live, optimizer, state.step))
                        state.step += 1
                        if progress:
                            progress(state.step, how.steps)
                state.take_from(self._points.leaves, optimizer)
                self._check(state, live, losses)
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    state.save(path, self.run)
        best = min(state.trace, key=lambda row: row["validation_loss"])
        return Control(self._made(state.best, best), int(best["step"]), state.trace)

    def _step(self, model: Any, live: Sequence[Tensor], optimizer: torch.optim.Adam, step: int) -> float:
        """One step on one batch at one t; the loss there."""
        how = self.how
        generator = np.random.default_rng([how.seed, step])
        torch.manual_seed(int(generator.integers(2**63)))  # of the base's own dropout
        weights = self._shape.weights(float(generator.random()))
        optimizer.param_groups[0]["lr"] = how.learning_rate * _rate(step, how.steps)
        for tensor, place in zip(self._points.mixed(weights), live, strict=True):
            place.data, place.grad = tensor, None
            place.requires_grad_(True)
        loss = _loss_of(model(**self._batch(step)), self.task)
        if not torch.isfinite(loss):
            raise DivergedError(
                f"the control point diverged: loss {loss.item()} at step {step}; lower the learning rate"
            )
        loss.backward()
        self._points.take_gradients([place.grad for place in live], weights)
        torch.nn.utils.clip_grad_norm_(self._points.leaves, _CLIP)
        optimizer.step()
        return float(loss.detach())

    def _batch(self, step: int) -> dict[str, Tensor]:
        """The step's examples: consecutive ones of a permutation for each turn through the split."""
        split = self.task.training_split()
        size, count = min(self.how.batch_size, len(split)), len(split)
        turn, at = divmod(step * size, count)
        chosen = self._order(turn)[at : at + size]
        if len(chosen) < size:
            chosen = [*chosen, *self._order(turn + 1)[: size - len(chosen)]]
        device = self._points.leaves[0].device
        return {name: tensor.to(device) for name, tensor in Batches(split).__getitems__(chosen).items()}

    def _order(self, turn: int) -> list[int]:
        """The examples in the order of one turn through the split."""
        if turn not in self._orders:
            order = np.random.default_rng([self.how.seed, turn, 1]).permutation(len(self.task.training_split()))
            self._orders = {**{k: v for k, v in self._orders.items() if k == turn - 1}, turn: order.tolist()}
        return self._orders[turn]

    def _check(self, state: _State, live: Sequence[Tensor], losses: Sequence[float]) -> None:
        """Score the curve on the validation split, and keep the control point where it is the best so far."""
        found = []
        with torch.no_grad():
            for t in CHECKED:
                for tensor, place in zip(self._points.mixed(self._shape.weights(t)), live, strict=True):
                    place.data = tensor
                    place.requires_grad_(False)
                found.append(self._models.score(self._models.attached.model, Examples("validation")).mean_loss)
        loss = float(np.mean(found))
        if not np.isfinite(loss):
            raise DivergedError(f"the validation loss on the curve is {loss} at step {state.step}")
        if all(loss < row["validation_loss"] for row in state.trace):
            state.best = [leaf.detach().clone() for leaf in self._points.leaves]
        training = float(np.mean(losses)) if losses else None
        state.trace.append({"step": state.step, "training_loss": training, "validation_loss": loss})

    def _made(self, leaves: Sequence[Tensor], best: Mapping[str, Any]) -> Adapter:
        """The control point as an adapter, with its record."""
        how, ends = self.how, [end.label for end in self.ends]
        adapter = self._points.adapter(leaves)
        record = {
            **{key: self.ends[0].record[key] for key in ("base_config",) if key in self.ends[0].record},
            "task": self.task.record,
            "method": how.shape,
            "seed": how.seed,
            "curve": {"ends": ends, "hashes": [end.digest[1] for end in self.ends], **dataclasses.asdict(how), **best},
        }
        source = f"{how.shape}-{how.space}"
        return dataclasses.replace(adapter, record=record, source=source, origin=Origin(own=True))


@dataclass(repr=False)
class _State(Brief):
    """Where a training is: all that it goes on from."""

    values: list[Tensor]
    """Of the leaves."""
    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)
    """Adam's moments; none before the first step."""
    best: list[Tensor] = field(default_factory=list)
    step: int = 0
    trace: list[dict[str, Any]] = field(default_factory=list)

    def put_into(self, leaves: Sequence[Tensor], optimizer: torch.optim.Adam) -> None:
        """Make the leaves and the optimiser go on from here."""
        with torch.no_grad():
            for i, leaf in enumerate(leaves):
                leaf.copy_(self.values[i])
                if self.first:
                    # laid out as the leaf is: the fused step goes through memory, whatever the strides
                    first, second = (torch.empty_like(leaf).copy_(part[i]) for part in (self.first, self.second))
                    step = torch.tensor(float(self.step), device=leaf.device)
                    optimizer.state[leaf] = {"step": step, "exp_avg": first, "exp_avg_sq": second}

    def take_from(self, leaves: Sequence[Tensor], optimizer: torch.optim.Adam) -> None:
        """Remember where the leaves and the optimiser are."""
        self.values = [leaf.detach().clone() for leaf in leaves]
        zeros = [torch.zeros_like(leaf) for leaf in self.values]  # of a leaf that no gradient has reached
        states = [optimizer.state.get(leaf, {}) for leaf in leaves]
        self.first = [state.get("exp_avg", zero) for state, zero in zip(states, zeros, strict=True)]
        self.second = [state.get("exp_avg_sq", zero) for state, zero in zip(states, zeros, strict=True)]

    def save(self, path: Path, run: str) -> None:
        """Write a checkpoint, whole or not at all."""
        parts = {"values": self.values, "first": self.first, "second": self.second, "best": self.best}
        tensors = {f"{name}.{i}": t.cpu().contiguous() for name, part in parts.items() for i, t in enumerate(part)}
        files.write_safetensors(path, tensors, {"run": run, "state": json.dumps([self.step, self.trace])})

    @classmethod
    def load(cls, path: Path, run: str, fresh: _State) -> _State:
        """The state of a checkpoint; a fresh one, with a warning, where it is damaged or of another run."""
        try:
            tensors, said = files.read_safetensors(path)
            parts = [
                [tensors[f"{name}.{i}"] for i in range(len(fresh.values))]
                for name in ("values", "first", "second", "best")
            ]
            step, trace = json.loads(said["state"])
            fits = all(
                found.shape == value.shape for part in parts for found, value in zip(part, fresh.values, strict=True)
            )
            if said["run"] == run and fits:
                values, first, second, best = parts
                return cls(values, first, second, best, int(step), list(trace))
            reason = "it is of another training"
        except (FileError, KeyError, ValueError, TypeError) as error:
            reason = str(error)
        warnings.warn(f"{path}: not used ({reason}); the training starts again", LoraLabWarning, stacklevel=4)
        return fresh


@dataclass(frozen=True, repr=False)
class ControlTrainings(Brief):
    """Trains control points in a worker, each by its key; checkpoints lie where they are trained."""

    ends: Mapping[Any, Sequence[Adapter]]
    how: Mapping[Any, Training]
    task: TaskSpec
    examples: Sequence[Examples]
    """Of the driver's machine."""
    device: str
    folder: Path | None

    @classmethod
    def of(
        cls,
        ends: Mapping[Any, Sequence[Adapter]],
        how: Mapping[Any, Training],
        task: Task,
        device: str,
        folder: Path | None,
    ) -> ControlTrainings:
        """OptionError for a task that cannot be built again in a worker."""
        sent = {key: [detached(end) for end in pair] for key, pair in ends.items()}
        examples = [Examples.of(task, split) for split in ("train", "validation")]
        return cls(sent, how, TaskSpec.of(task), examples, device, folder)

    @cached_property
    def fingerprint(self) -> str:
        """What is trained, hashed."""
        ends = [end.identity for pair in self.ends.values() for end in pair]
        how = [dataclasses.asdict(each) for each in self.how.values()]
        return fingerprint(["controls", ends, how, self.task.record, self.device, str(self.folder)])

    def __call__(self) -> Callable[[Any], tuple[Control, list[Warning]]]:
        """What trains the control point of a key, and has the warnings told by the driver."""
        task = self.task.task()
        for examples in self.examples:
            examples.of_task(task)  # the same ones, or it says so

        def train(key: Any) -> tuple[Control, list[Warning]]:
            training = ControlTraining(self.ends[key], self.how[key], task, torch.device(self.device))
            return telling(functools.partial(training.train, self.folder, report))

        return train


def _midpoint(ends: Sequence[Adapter], how: Training) -> Adapter:
    """Where the control point starts: halfway, in balanced factors (of a lower rank, if told) where ΔW is mixed."""
    made = Paths(ends).mix([0.5, 0.5], how.space)
    if SPACES[how.space].needs_factors:
        return made
    updates = {
        name: each.balanced() if how.rank is None else each.truncate(min(how.rank, each.rank))[0]
        for name, each in made.updates.items()
    }
    return made.with_updates(updates, source=made.source)


def _loss_of(said: Any, task: Task) -> Any:
    """The loss of a training step; TaskError where the model gives none."""
    loss = said.get("loss") if isinstance(said, Mapping) else getattr(said, "loss", None)
    if loss is None:
        raise TaskError(f"task {task.name}: its model gives no `loss` of a training batch, which a curve is trained by")
    return loss


def _rate(step: int, steps: int) -> float:
    """The learning rate's share at a step: rising over the first steps, falling over the last quarter."""
    return min(1.0, (step + 1) / max(1.0, _WARMUP * steps), (steps - step) / max(1.0, _DECAY * steps))
