"""Merges that look at data: what the weights of a module are worth to each task, or which coefficients do best.

Every function takes the sources and gives (module, merged ΔW) pairs; those that learn by gradients are in learned.py.
What a method reads is named in its first lines; none ever looks at a test split.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_lab.adapters.lowrank import LowRank, combine
from lora_lab.errors import OptionError, unknown
from lora_lab.merging.kinds import turn
from lora_lab.merging.rules.layer_inputs import grams, information
from lora_lab.merging.sources import Sources
from lora_lab.merging.validation.task_models import MergeModels, mean_loss
from lora_lab.scoring.examples import Examples
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
    check_numbers(examples=(examples, 1), floor=(floor, 0), scale=(scale, None), seed=(seed, 0))
    _check_weights(sources, "fisher")
    models = MergeModels(sources)
    fishers = []
    for i in range(len(sources.adapters)):
        fishers.append(information(models, i, examples, seed))
        sources.tell(i + 1, len(sources.adapters))
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
    check_numbers(examples=(examples, 1), ridge=(ridge, 0), scale=(scale, None), seed=(seed, 0))
    _check_weights(sources, "regmean")
    models = MergeModels(sources)
    inputs = []
    for i in range(len(sources.adapters)):
        inputs.append(grams(models, i, examples, seed, mean=gram == "mean"))
        sources.tell(i + 1, len(sources.adapters))
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
        updates = [turn(u) if stored_transposed else u for u in sources.updates_of(name)]
        # Σ Bᵢ AᵢwᵢGᵢ (ΣwᵢGᵢ)⁻¹, by concatenation; A G total⁻¹ = (total⁻¹ G Aᵀ)ᵀ, as both are symmetric
        A = torch.cat([u.A.double() @ G for u, G in zip(updates, weighted, strict=True)])
        A = torch.linalg.solve(total, A.T).T
        B = scale * torch.cat([u.B.double() for u in updates], dim=1)
        merged = LowRank(A, B, updates[0].shape)
        yield name, turn(merged) if stored_transposed else merged


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
    check_numbers(penalty=(penalty, 0), scale=(scale, None))
    models, count = MergeModels(sources), len(sources.adapters)
    updates = {name: sources.updates_of(name) for name in sources.modules}

    def mixed(coefficients: Sequence[float]) -> dict[str, LowRank]:
        return {
            name: combine(ours, [float(c) * w for c, w in zip(coefficients, sources.weights_of(name), strict=True)])
            for name, ours in updates.items()
        }

    done = 0
    best: tuple[float, list[float]] = (float("inf"), [1 / count] * count)

    def cost(coefficients: Any) -> float:
        nonlocal best, done
        clipped = np.clip(coefficients, -bound, bound)
        made = mixed(clipped)
        loss = mean_loss([models.scores(index, made, Examples("validation")) for index in models.indices])
        loss += penalty * float(np.abs(clipped).mean())
        best = min(best, (loss, clipped.tolist()))
        done += 1
        sources.tell(done, max(done, evaluations))
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


def check_numbers(**options: tuple[float, float | None]) -> None:
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


def _normalized(information: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Divided by the norm over all modules; all 0 stays 0."""
    norm = math.sqrt(math.fsum(float(F.double().square().sum()) for F in information.values()))
    return {name: F / norm if norm else F for name, F in information.items()}
