"""Merges whose coefficients are learned by gradients through the merged model: an objective each, and one loop.

Every function takes the sources and gives (module, merged ΔW) pairs. Of every module the ΔW of all adapters are on the
model as one, [B₁ … B_T] and A₁ … A_T below each other, and what is learned multiplies columns of the one (a number an
adapter) or entries of the other (a number an adapter and column of ΔW). No test split is ever looked at.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_lab.adapters.lowrank import LowRank, combine
from lora_lab.adapters.models.attached import NAME
from lora_lab.brief import Brief
from lora_lab.errors import DivergedError, OptionError
from lora_lab.merging.kinds import stored_turned, turn
from lora_lab.merging.rules.data_driven import check_numbers
from lora_lab.merging.rules.layer_inputs import masks_of, tokens, unpadded, watched
from lora_lab.merging.sources import Sources
from lora_lab.merging.validation.task_models import MergeModels
from lora_lab.tasks.task import Task

Merged = Iterator[tuple[str, LowRank]]
Coefficients = Mapping[str, Tensor]
"""Module → [adapters], or [adapters, columns of ΔW]."""


@dataclass(frozen=True)
class Steps:
    """How long and how fast is learned; OptionError for what cannot be."""

    steps: int
    learning_rate: float
    batch_size: int
    seed: int
    decay: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise OptionError(f"steps is {self.steps} and batch_size {self.batch_size}; both must be at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise OptionError(f"learning_rate is {self.learning_rate:g}; a number above 0 is needed")


@dataclass(frozen=True, repr=False)
class Pass(Brief):
    """What the merged model says of a batch of one task."""

    members: list[int]
    """The sources whose task it is."""
    task: Task
    batch: Mapping[str, Tensor]
    logits: Tensor
    inputs: Mapping[str, Tensor]
    """Module → its inputs [inputs, columns of ΔW] without padding, where they are watched."""
    logits_at: Callable[[Coefficients], Tensor]
    """The logits with other coefficients."""


def adamerging(
    sources: Sources,
    *,
    steps: int = 200,
    learning_rate: float = 5e-3,
    start: float = 0.3,
    batch_size: int = 16,
    scale: float = 1.0,
    seed: int = 0,
) -> Merged:
    """Σ λᵢwᵢΔWᵢ, a λ per module that makes predictions certain.

    Yang et al. 2023, arXiv:2310.02575, layer-wise: Adam minimises the summed entropy of the predictions on unlabelled
    validation examples of every task (of texts, at every target's place), from `start`. The paper takes test inputs,
    500 steps and a rate of 1e-3.
    """
    how = Steps(steps, learning_rate, batch_size, seed)
    check_numbers(start=(start, None), scale=(scale, None))

    def entropy(seen: Pass) -> Tensor:
        logs = _log_chances(seen.task.choices(seen.logits, seen.batch))
        # H = −Σ p log p, a mean over the batch's predictions, summed over the tasks
        return -(logs.exp() * logs).sum(-1).mean()

    starts = {name: torch.full((len(sources.adapters),), start) for name in sources.modules}
    return _weighted_sum(sources, _learned(sources, starts, entropy, how), scale)


def nsc(
    sources: Sources,
    *,
    steps: int = 200,
    learning_rate: float = 5e-3,
    start: float = 1.0,
    batch_size: int = 16,
    scale: float = 1.0,
    seed: int = 0,
) -> Merged:
    """Σ λᵢwᵢΔWᵢ, a λ per module that keeps inputs within the rows of their task's A.

    Null-space compression (Lee et al. 2026, arXiv:2603.26317): AdamW minimises the mean of ‖(I − Pᵢ)x‖ / ‖x‖, Pᵢ the
    projection onto the rows of Aᵢ, over the inputs x of every adapted layer of the merged model on unlabelled
    validation examples of task i, over the layers and over the tasks, from `start`/T. No layer's inputs hang on a λ
    behind the last adapted layer, whose λ so stays at its start. The paper looks at the inputs of some late layers,
    and takes 500 steps at a rate of 1e-3.
    """
    how = Steps(steps, learning_rate, batch_size, seed, decay=0.01)
    check_numbers(start=(start, None), scale=(scale, None))
    turned, rows = stored_turned(sources), {}
    for name in sources.modules:
        updates = [turn(u) if name in turned else u for u in sources.updates_of(name)]
        rows[name] = [torch.linalg.qr(u.A.double().T).Q.float().to(sources.device) for u in updates]

    def outside(seen: Pass) -> Tensor:
        shares = []
        for name, x in seen.inputs.items():
            squares = x.square().sum(-1).clamp(min=1e-30)
            for Q in (rows[name][i] for i in seen.members if rows[name][i].shape[1]):
                # ‖(I − P)x‖² / ‖x‖² = 1 − ‖Qᵀx‖² / ‖x‖², Q an orthonormal basis of the rows of A
                shares.append((1 - (x @ Q).square().sum(-1) / squares).clamp(min=1e-12).sqrt().mean())
        return torch.stack(shares).mean()

    count = len(sources.adapters)
    starts = {name: torch.full((count,), start / count) for name in sources.modules}
    return _weighted_sum(sources, _learned(sources, starts, outside, how, watch=True), scale)


def cat_learned(
    sources: Sources,
    *,
    steps: int = 200,
    learning_rate: float = 2e-2,
    batch_size: int = 16,
    free: bool = False,
    scale: float = 1.0,
    seed: int = 0,
) -> Merged:
    """Σ λᵢwᵢΔWᵢ, a λ per module learned from labelled training examples.

    Learned concatenation (LoRA Soups, Prabhakar et al. 2024, arXiv:2410.13025): λ = softmax(z) over the adapters that
    change the module, so that their λ sum to 1; Adam minimises the summed loss on a batch of every task's training
    examples, from z = 0 (the paper's code starts at random). With `free` the λ themselves are learned, from the same
    start 1/T. The paper takes one pass over 10,000 examples at a rate of 1e-4.
    """
    how = Steps(steps, learning_rate, batch_size, seed)
    check_numbers(scale=(scale, None))
    present = {name: torch.tensor([u.rank > 0 for u in sources.updates_of(name)]) for name in sources.modules}

    def loss(seen: Pass) -> Tensor:
        targets = seen.task.targets_of(seen.logits, seen.batch)
        return targets.mean(targets.loss).mean()

    def shared(name: str, z: Tensor) -> Tensor:
        return z if free else z.masked_fill(~present[name].to(z.device), -math.inf).softmax(-1)

    starts = {name: there / there.sum() if free else there * 0.0 for name, there in present.items()}
    return _weighted_sum(sources, _learned(sources, starts, loss, how, split="train", used=shared), scale)


def ziplora(
    sources: Sources,
    *,
    steps: int = 100,
    learning_rate: float = 1e-2,
    batch_size: int = 16,
    penalty: float = 0.01,
    scale: float = 1.0,
    seed: int = 0,
) -> Merged:
    """Σ wᵢΔWᵢ diag(mᵢ): a number for each column, learned so that each task's outputs stay.

    ZipLoRA (Shah et al. 2023, arXiv:2311.13600): from mᵢ = 1, Adam minimises, summed over the tasks, the mean squared
    difference of the logits from those of the task's own adapter on its unlabelled validation examples (denoised images
    in the paper), plus `penalty` times the mean of Σ |mᵢ∘mⱼ|, i < j, over columns and modules, which keeps columns
    apart. A column is what one input contributes.
    """
    how = Steps(steps, learning_rate, batch_size, seed)
    check_numbers(penalty=(penalty, 0), scale=(scale, None))
    turned, count = stored_turned(sources), len(sources.adapters)
    present = {name: [i for i, u in enumerate(sources.updates_of(name)) if u.rank] for name in sources.modules}
    columns = {n: shape[0] if n in turned else shape[1:].numel() for n, shape in sources.shapes.items()}
    starts = {name: torch.ones(count, columns[name], requires_grad=True) for name in sources.modules}

    def apart(seen: Pass) -> Tensor:
        total = torch.zeros(())
        for i in seen.members:
            with torch.no_grad():
                own = seen.logits_at({name: torch.eye(count)[i] for name in starts})
            pair = (seen.task.choices(logits, seen.batch) for logits in (seen.logits, own))
            # −∞: no such option; the differences of such are 0
            merged, alone = (logits.clamp(min=torch.finfo(torch.float32).min) for logits in pair)
            total = total + (merged - alone).square().mean()
        overlaps = []
        for name, m in starts.items():
            pairs = itertools.combinations(present[name], 2)
            overlaps.append(sum(((m[i] * m[j]).abs().mean() for i, j in pairs), m.new_zeros(())))
        return total + penalty * torch.stack(overlaps).mean().to(total.device)

    learned = _learned(sources, starts, apart, how)
    for name in sources.modules:
        updates = [turn(u) if name in turned else u for u in sources.updates_of(name)]
        A = [update.A * m.to(update.A) for update, m in zip(updates, learned[name], strict=True)]
        scaled = [LowRank(each, update.B, update.shape) for each, update in zip(A, updates, strict=True)]
        merged = combine(scaled, sources.weights_of(name))
        yield name, scale * (turn(merged) if name in turned else merged)


def learning_cost(options: Mapping[str, Any], tasks: Sequence[Task]) -> float:
    """Forward passes of one example, a backward pass counted as two."""
    return float(3 * options["steps"] * options["batch_size"] * len(tasks))


def ziplora_cost(options: Mapping[str, Any], tasks: Sequence[Task]) -> float:
    """Forward passes of one example: those of learning, and one more with each task's own adapter."""
    return learning_cost(options, tasks) * 4 / 3


def _weighted_sum(sources: Sources, learned: Coefficients, scale: float) -> Merged:
    for name in sources.modules:
        weights = torch.tensor(sources.weights_of(name), dtype=torch.float64)
        yield name, scale * combine(sources.updates_of(name), (learned[name].double() * weights).tolist())


def _learned(
    sources: Sources,
    starts: Coefficients,
    objective: Callable[[Pass], Tensor],
    how: Steps,
    *,
    split: str = "validation",
    watch: bool = False,
    used: Callable[[str, Tensor], Tensor] = lambda name, values: values,
) -> dict[str, Tensor]:
    """The coefficients that minimise an objective, summed over the tasks, a batch of each at every step.

    `used` makes coefficients of what is learned. Modules on which no objective hangs stay at their start. DivergedError
    where an objective is not finite.
    """
    model = _JoinedModel(sources)
    values = {name: start.requires_grad_() for name, start in starts.items()}
    weights = {name: torch.tensor(sources.weights_of(name), dtype=torch.float32) for name in sources.modules}
    kind = torch.optim.AdamW if how.decay else torch.optim.Adam
    optimizer = kind(values.values(), lr=how.learning_rate, weight_decay=how.decay)
    generator = torch.Generator().manual_seed(how.seed)
    indices = model.models.indices
    batches = {index: _batches(model.models, index, split, how.batch_size, generator) for index in indices}
    for step in range(how.steps):
        optimizer.zero_grad()
        for index in indices:
            coefficients = {}
            for name, value in values.items():
                found = used(name, value)
                coefficients[name] = found * weights[name].reshape(-1, *[1] * (found.ndim - 1))
            loss = objective(model.passed(index, next(batches[index]), coefficients, watch=watch))
            if not math.isfinite(float(loss.detach())):
                raise DivergedError(
                    f"the objective on {model.models.tasks[index].name} is not finite; a smaller rate may do"
                )
            if loss.requires_grad:
                torch.autograd.backward(loss)
        optimizer.step()
        sources.tell(step + 1, how.steps)
    return {name: used(name, value).detach() for name, value in values.items()}


class _JoinedModel:
    """The tasks' models with the ΔW of all sources side by side, so that coefficients can be put to them."""

    def __init__(self, sources: Sources) -> None:
        self.models, self._sources = MergeModels(sources), sources
        updates = {name: sources.updates_of(name) for name in sources.modules}
        self._joined = {name: combine(each, [1.0] * len(each)) for name, each in updates.items()}
        self._ranks = {name: torch.tensor([u.rank for u in each]) for name, each in updates.items()}
        indices = self.models.indices
        self._places = {index: self._load(index) for index in indices}
        self._shared = len({id(self.models.model(index)) for index in indices}) < len(indices)

    def passed(self, index: int, batch: dict[str, Tensor], coefficients: Coefficients, *, watch: bool) -> Pass:
        """What the model of a source says of a batch with these coefficients."""
        if self._shared:  # a model that several indices share has the head of the last
            self.models.load(index, self._joined)
        model, task = self.models.model(index), self.models.tasks[index]
        with watched(model, list(self._joined) if watch else [], gradients=False) as seen:
            logits = self._logits(index, batch, coefficients)
            masks = masks_of(model, batch)
            inputs = {n: unpadded(tokens(layer, x, None)[0], masks).float() for n, (layer, x, _, _) in seen.items()}
        members = [i for i in range(len(self._sources.adapters)) if self.models.index(i) == index]
        return Pass(members, task, batch, logits, inputs, lambda other: self._logits(index, batch, other))

    def _logits(self, index: int, batch: dict[str, Tensor], coefficients: Coefficients) -> Tensor:
        swapped = {}
        for name, value in coefficients.items():
            (A_key, A), (B_key, B) = self._places[index][name]
            spread = value.repeat_interleave(self._ranks[name], dim=0)
            if value.ndim == 1:  # B diag(λ₁ … λ₁, λ₂ …): a λ for each column of the concatenated B
                swapped[f"model.{B_key}"] = B * spread.to(B).reshape(1, -1, *[1] * (B.ndim - 2))
            else:
                swapped[f"model.{A_key}"] = A * spread.to(A).reshape(A.shape)
        asked = _Asked(self.models.tasks[index], self.models.model(index))
        logits: Tensor = functional_call(asked, swapped, (batch,))
        return logits

    def _load(self, index: int) -> dict[str, list[tuple[str, Tensor]]]:
        """Module → the live names of PEFT's A and B in the model, each with its value."""
        self.models.load(index, self._joined)
        named = dict(self.models.model(index).named_parameters())
        places: dict[str, list[tuple[str, Tensor]]] = {}
        for name in self._joined:
            for part in "AB":
                embedded = f"{name}.lora_embedding_{part}.{NAME}"
                key = embedded if embedded in named else f"{name}.lora_{part}.{NAME}.weight"
                places.setdefault(name, []).append((key, named[key].detach().clone()))
        return places


class _Asked(nn.Module):
    """A model with a task's question as its forward pass."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The task's logits."""
        return self.task.logits(self.model, batch)


def _batches(
    models: MergeModels, index: int, split: str, size: int, generator: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """Batches of a split, shuffled anew every time it has run out."""
    inputs = models.tasks[index].split(split).inputs
    count = len(inputs["labels"])
    order: list[int] = []
    while True:
        if len(order) < min(size, count):
            order = torch.randperm(count, generator=generator).tolist()
        drawn, order = order[:size], order[size:]
        yield {name: tensor[drawn].to(models.device) for name, tensor in inputs.items()}


def _log_chances(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1).clamp(min=torch.finfo(torch.float32).min)  # −∞: no such option
