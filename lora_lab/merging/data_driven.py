"""Merges that look at data: what the weights of a module are worth to each task, or which coefficients do best.

Every function takes the sources and gives (module, merged ΔW) pairs. What it reads is named in its first lines; none
ever looks at a test split.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_lab.adapters.attached import NAME
from lora_lab.adapters.lowrank import LowRank, combine
from lora_lab.errors import OptionError, unknown
from lora_lab.merging.layer_inputs import grams, information, predictions
from lora_lab.merging.sources import Sources
from lora_lab.merging.task_models import MergeModels, mean_loss
from lora_lab.tasks.task import Task

Merged = Iterator[tuple[str, LowRank | Tensor]]


def fisher(
    sources: Sources,
    *,
    examples: int = 256,
    normalize: bool = False,
    floor: float = 1e-6,
    scale: float = 1.0,
    seed: int = 0,
) -> Merged:
    """Entries weighted by their Fisher information on each task.

    Σ wᵢFᵢ∘ΔWᵢ / Σ wᵢFᵢ (Matena & Raffel 2021, arXiv:2111.09832), Fᵢ diagonal, from `examples` of each training split
    without their labels: the mean of p(y|x) (∂ log p(y|x)/∂W)² over all labels y; of a text, an unbiased estimate, from
    one token drawn by p at every target's place. With `normalize`, each Fᵢ is divided by its norm over all modules, so
    that no task counts for more because its gradients are larger. `floor`, times the mean information, is added, so
    that entries that no task depends on are averaged. Takes as much memory as T copies of the adapted weights.
    """
    _check(examples=(examples, 1), floor=(floor, 0), scale=(scale, None), seed=(seed, 0))
    _check_weights(sources, "fisher")
    models = MergeModels(sources)
    fishers = [information(models, i, examples, seed) for i in range(len(sources.adapters))]
    if normalize:
        fishers = [_normalized(fisher) for fisher in fishers]
    for name in sources.modules:
        # Σ sᵢ∘ΔWᵢ / Σ sᵢ with sᵢ = wᵢ (Fᵢ + floor · mean F)
        shares = torch.stack([fisher[name] for fisher in fishers])
        shares += floor * shares.mean() + torch.finfo(shares.dtype).tiny
        weights = torch.tensor(sources.weights_of(name), dtype=shares.dtype)
        shares *= weights.reshape(-1, *[1] * (shares.ndim - 1))
        deltas = torch.stack([u.delta().flatten(1) for u in sources.updates_of(name)])
        merged = scale * (shares * deltas).sum(0) / shares.sum(0)
        yield name, merged.reshape(sources.shapes[name])


def fisher_cost(options: Mapping[str, Any], tasks: Sequence[Task]) -> float:
    """Forward passes of one example: one, and a forward and a backward pass (which counts as two) for each label."""
    labels = [task.labels if task.classifies else 1 for task in tasks]
    return float(sum(options["examples"] * (1 + 3 * count) for count in labels))


def regmean(
    sources: Sources,
    *,
    examples: int = 256,
    gram: str = "mean",
    off_diagonal: float = 0.9,
    ridge: float = 1e-6,
    scale: float = 1.0,
    seed: int = 0,
) -> Merged:
    """The ΔW nearest to each one on its own task's inputs.

    Σ ΔWᵢwᵢGᵢ (Σ wᵢGᵢ)⁻¹ with Gᵢ = XᵢᵀXᵢ of each layer (Jin et al. 2022, arXiv:2212.09849), from the inputs of
    `examples` of each training split, without their labels and without padding. `gram` mean divides Gᵢ by the number of
    inputs, as the authors' code does, so that a task of long texts counts no more than one of short ones; sum is the
    paper's formula. Entries of G off the diagonal are multiplied by
    `off_diagonal`; `ridge` times its mean diagonal is added, so that directions that no task uses are averaged. Exact
    in factor space: Bᵢ stays, Aᵢ becomes AᵢwᵢGᵢ (ΣwᵢGᵢ)⁻¹.
    """
    if not 0 <= off_diagonal <= 1:
        raise OptionError(f"off_diagonal is {off_diagonal:g}; a share from 0 to 1 is needed")
    if gram not in ("mean", "sum"):
        raise unknown("gram", gram, ("mean", "sum"))
    _check(examples=(examples, 1), ridge=(ridge, 0), scale=(scale, None), seed=(seed, 0))
    _check_weights(sources, "regmean")
    models = MergeModels(sources)
    inputs = [grams(models, i, examples, seed, mean=gram == "mean") for i in range(len(sources.adapters))]
    for name in sources.modules:
        stored_transposed = inputs[0][name][1]
        weighted = []  # wᵢ Gᵢ, off the diagonal times `off_diagonal`, plus the ridge
        for of_modules, weight in zip(inputs, sources.weights_of(name), strict=True):
            G = of_modules[name][0]
            diagonal = G.diagonal().clone()
            G = off_diagonal * G
            G.diagonal().copy_(diagonal)
            weighted.append(weight * (G + (ridge * diagonal.mean() + 1e-300) * torch.eye(len(G), dtype=G.dtype)))
        total = torch.stack(weighted).sum(0)
        updates = [_turned(u) if stored_transposed else u for u in sources.updates_of(name)]
        # Σ Bᵢ AᵢwᵢGᵢ (ΣwᵢGᵢ)⁻¹, by concatenation; A G total⁻¹ = (total⁻¹ G Aᵀ)ᵀ, as both are symmetric
        A = torch.cat([u.A.double() @ G for u, G in zip(updates, weighted, strict=True)])
        A = torch.linalg.solve(total, A.T).T
        B = scale * torch.cat([u.B.double() for u in updates], dim=1)
        merged = LowRank(A, B, updates[0].shape)
        yield name, _turned(merged) if stored_transposed else merged


def regmean_cost(options: Mapping[str, Any], tasks: Sequence[Task]) -> float:
    """Forward passes of one example."""
    return float(options["examples"] * len(tasks))


def lorahub(
    sources: Sources,
    *,
    evaluations: int = 60,
    bound: float = 1.5,
    penalty: float = 0.05,
    scale: float = 1.0,
) -> Merged:
    """Σ cᵢwᵢΔWᵢ, c found without gradients on validation data.

    After Huang et al. 2023, arXiv:2307.13269: the lowest mean loss over the tasks plus `penalty` · mean |c|, c within
    ±`bound`, at most `evaluations` of them (COBYLA, from 1/T each). The paper mixes the factors; this mixes ΔW.
    """
    from scipy.optimize import minimize

    if evaluations < 1 or not 0 < bound < np.inf:
        raise OptionError(f"evaluations is {evaluations} and bound {bound:g}; both must be above 0")
    _check(penalty=(penalty, 0), scale=(scale, None))
    models, count = MergeModels(sources), len(sources.adapters)
    updates = {name: sources.updates_of(name) for name in sources.modules}

    def mixed(coefficients: Sequence[float]) -> dict[str, LowRank]:
        return {
            name: combine(ours, [float(c) * w for c, w in zip(coefficients, sources.weights_of(name), strict=True)])
            for name, ours in updates.items()
        }

    best: tuple[float, list[float]] = (float("inf"), [1 / count] * count)

    def cost(coefficients: Any) -> float:
        nonlocal best
        clipped = np.clip(coefficients, -bound, bound)
        made = mixed(clipped)
        loss = mean_loss([models.scores(index, made, "validation") for index in models.indices])
        loss += penalty * float(np.abs(clipped).mean())
        best = min(best, (loss, clipped.tolist()))
        return loss

    if evaluations < count + 2:  # which COBYLA needs to begin with
        cost(best[1])
    else:
        options = {"maxiter": evaluations, "rhobeg": min(0.3, bound / 2)}
        minimize(cost, best[1], method="COBYLA", bounds=[(-bound, bound)] * count, options=options)
    for name, update in mixed(best[1]).items():
        yield name, scale * update


def lorahub_cost(options: Mapping[str, Any], tasks: Sequence[Task]) -> float:
    """Forward passes of one example: all of every validation split for each choice of coefficients."""
    return float(options["evaluations"] * sum(len(task.split("validation")) for task in tasks))


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
    if steps < 1 or batch_size < 1:
        raise OptionError(f"steps is {steps} and batch_size {batch_size}; both must be at least 1")
    if not 0 < learning_rate < np.inf:
        raise OptionError(f"learning_rate is {learning_rate:g}; a number above 0 is needed")
    _check(start=(start, None), scale=(scale, None))
    models, count = MergeModels(sources), len(sources.adapters)
    joined = {name: combine(sources.updates_of(name), sources.weights_of(name)) for name in sources.modules}
    ranks = {name: torch.tensor([u.rank for u in sources.updates_of(name)]) for name in sources.modules}
    coefficients = torch.full((len(joined), count), start, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=learning_rate, betas=(0.9, 0.999))
    places = {index: _load_joined(models, index, joined) for index in models.indices}
    shared = len({id(models.model(index)) for index in models.indices}) < len(models.indices)
    generator = torch.Generator().manual_seed(seed)
    batches = {index: _unlabelled(models, index, batch_size, generator) for index in models.indices}
    for _ in range(steps):
        optimizer.zero_grad()
        for index in models.indices:
            batch = next(batches[index])
            if shared:  # a model that several indices share has the head of the last
                models.load(index, joined)
            swapped = {}
            for m, name in enumerate(joined):
                key, B = places[index][name]
                # B diag(λ₁ … λ₁, λ₂ …): a λ for each column of the concatenated B
                columns = coefficients[m].repeat_interleave(ranks[name]).to(B)
                swapped[key] = B * columns.reshape(1, -1, *[1] * (B.ndim - 2))
            asked = _Asked(models.tasks[index], models.model(index))
            logits = functional_call(asked, {f"model.{key}": B for key, B in swapped.items()}, (batch,))
            logs = predictions(models.tasks[index], logits, batch).log_softmax(-1)
            logs = logs.clamp(min=torch.finfo(torch.float32).min)  # −inf: no such option
            # H = −Σ p log p, a mean over the batch's predictions, summed over the tasks
            entropy = -(logs.exp() * logs).sum(-1).mean()
            torch.autograd.backward(entropy)
        optimizer.step()
    final = coefficients.detach()
    for m, name in enumerate(joined):
        weighted = (final[m].double() * torch.tensor(sources.weights_of(name), dtype=torch.float64)).tolist()
        yield name, scale * combine(sources.updates_of(name), weighted)


def adamerging_cost(options: Mapping[str, Any], tasks: Sequence[Task]) -> float:
    """Forward passes of one example, a backward pass counted as two."""
    return float(3 * options["steps"] * options["batch_size"] * len(tasks))


def _check(**options: tuple[float, float | None]) -> None:
    """OptionError for an option (value, least value or None) that is no finite number or too small."""
    for name, (value, least) in options.items():
        if not math.isfinite(value) or (least is not None and value < least):
            needed = "a finite number" if least is None else f"a number of at least {least:g}"
            raise OptionError(f"{name} is {value:g}; {needed} is needed")


def _check_weights(sources: Sources, method: str) -> None:
    """These methods divide by the weighted sum of positive matrices."""
    for name in sources.modules:
        weights = sources.weights_of(name)
        if min(weights) < 0 or not any(weights):
            shown = ", ".join(f"{weight:g}" for weight in weights)
            raise OptionError(f"{method} needs weights of 0 or more, not all of them 0; in {name} they are {shown}")


class _Asked(nn.Module):
    """A model with a task's question as its forward pass."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The task's logits."""
        return self.task.logits(self.model, batch)


def _load_joined(models: MergeModels, index: int, joined: Mapping[str, LowRank]) -> dict[str, tuple[str, Tensor]]:
    """Module → the live name of PEFT's B in the model (its second dimension is the rank), and its value."""
    models.load(index, joined)
    named = dict(models.model(index).named_parameters())
    places = {}
    for name in joined:
        embedded = f"{name}.lora_embedding_B.{NAME}"
        key = embedded if embedded in named else f"{name}.lora_B.{NAME}.weight"
        places[name] = key, named[key].detach().clone()
    return places


def _unlabelled(models: MergeModels, index: int, size: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Batches of validation inputs, shuffled anew every time they have run out."""
    inputs = models.tasks[index].split("validation").inputs
    count = len(inputs["labels"])
    order: list[int] = []
    while True:
        if len(order) < min(size, count):
            order = torch.randperm(count, generator=generator).tolist()
        drawn, order = order[:size], order[size:]
        yield {name: tensor[drawn].to(models.device) for name, tensor in inputs.items()}


def _normalized(information: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Divided by the norm over all modules; all 0 stays 0."""
    norm = math.sqrt(math.fsum(float(F.double().square().sum()) for F in information.values()))
    return {name: F / norm if norm else F for name, F in information.items()}


def _turned(update: LowRank) -> LowRank:
    return LowRank(update.B.T, update.A.T)
