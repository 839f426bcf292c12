"""The Hessian of the loss in an adapter's own tensors, by products with vectors alone.

Hv is the gradient of ⟨∇L, v⟩ (Pearlmutter 1994), so that no matrix is ever made. Its extreme eigenvalues come from
Lanczos' iteration with full reorthogonalisation, its trace from random signs z as the mean of zᵀHz (Hutchinson 1990).
The examples are taken in parts, and what a number would be on each of them gives its interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lora_lab.errors import DivergedError, TaskError
from lora_lab.results.stats import Floats, student
from lora_lab.scoring.gates import check_targets
from lora_lab.tasks.task import Task

if TYPE_CHECKING:
    from lora_lab.adapters.adapter import Adapter
    from lora_lab.scoring.evaluator import Evaluator

Product = Callable[[Tensor], Tensor]

PARTS = 8
"""Into at least so many parts are the examples cut, where what each of them would give is asked."""
BETA = 0.9
"""Momentum of heavy ball, and Adam's β₁."""
_ENOUGH = 1e-3
"""Residual of the largest eigenvalue, as a share of it, at which Lanczos' iteration ends."""
_EPSILON = 1e-8
"""Adam's."""


@dataclass(frozen=True)
class Extremes:
    """The largest and the smallest eigenvalue that an iteration has found."""

    largest: float
    smallest: float
    residual: float
    """‖Hx − λx‖ of the largest with its unit eigenvector x; the true one is at most that far away from some."""
    iterations: int


def lanczos(product: Product, start: Tensor, iterations: int) -> tuple[Extremes, Tensor]:
    """The extreme eigenvalues of a symmetric matrix that is known by its products, and the largest's eigenvector.

    Every new vector is made orthogonal to all before, twice. It ends early where the residual is 0.1 % of the largest.
    """
    size = len(start)
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    values, vectors, residual = np.zeros(1), np.ones((1, 1)), math.inf
    for k in range(min(iterations, size)):
        w = product(basis[k])
        diagonal.append(float(w.double() @ basis[k].double()))
        for _ in range(2):
            for q in basis:
                w = w - (w @ q) * q
        beta = float(w.double().norm())
        values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
        residual = abs(beta * vectors[-1, -1])  # ‖Hx − λx‖ = β |last entry of the eigenvector of the tridiagonal|
        if residual <= _ENOUGH * abs(values[-1]) or beta <= 1e-12 * max(1e-300, float(np.abs(values).max())):
            break
        beside.append(beta)
        basis.append(w / beta)
    top = vectors[:, -1]
    x = sum((float(share) * q for share, q in zip(top, basis, strict=False)), torch.zeros_like(start))
    return Extremes(float(values[-1]), float(values[0]), float(residual), len(diagonal)), x / x.norm()


class Curvature:
    """The loss of a model over some examples, as a function of some of its tensors: gradients and Hessian products.

    In evaluation mode and float32 (or wider), with attention written out, which alone has second derivatives. Vectors
    are flat, of all tensors one after the other.
    """

    def __init__(self, task: Task, model: Any, tensors: Sequence[Tensor], parts: Sequence[dict[str, Tensor]]) -> None:
        self.task, self.model, self.tensors, self.parts = task, model, list(tensors), list(parts)
        self.size = sum(tensor.numel() for tensor in tensors)
        counts = [self._weight(part) for part in parts]
        self.shares = np.array(counts) / sum(counts)

    def losses(self) -> Floats:
        """Mean loss of each part."""
        with torch.no_grad():
            return np.array([float(self._loss(part)) for part in self.parts])

    def gradients(self) -> Iterator[Tensor]:
        """The gradient on each part."""
        for part in self.parts:
            yield self._flat(torch.autograd.grad(self._loss(part), self.tensors, allow_unused=True))

    def product(self, v: Tensor) -> Tensor:
        """Hv."""
        return self.products(v)[0]

    def products(self, v: Tensor) -> tuple[Tensor, Floats]:
        """Hv, and vᵀHv on each part."""
        split = torch.split(v, [tensor.numel() for tensor in self.tensors])
        pieces = [piece.view_as(tensor) for piece, tensor in zip(split, self.tensors, strict=True)]
        total, along = torch.zeros_like(v), []
        for part, share in zip(self.parts, self.shares, strict=True):
            first = torch.autograd.grad(self._loss(part), self.tensors, create_graph=True, allow_unused=True)
            reached = [(g * piece).sum() for g, piece in zip(first, pieces, strict=True) if g is not None]
            second: Sequence[Tensor | None] = [None] * len(self.tensors)
            if any(each.requires_grad for each in reached):
                second = torch.autograd.grad(torch.stack(reached).sum(), self.tensors, allow_unused=True)
            here = self._flat(second)
            along.append(float(here.double() @ v.double()))
            total += float(share) * here
        if not bool(torch.isfinite(total).all()):
            raise DivergedError("the curvature of the loss is not finite")
        return total, np.array(along)

    def _flat(self, gradients: Sequence[Tensor | None]) -> Tensor:
        filled = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, self.tensors, strict=True)]
        return torch.cat([each.detach().flatten() for each in filled])

    def _loss(self, part: dict[str, Tensor]) -> Tensor:
        """Mean over the examples; over all targets where training counts these."""
        targets = self.task.targets_of(self.task.logits(self.model, part), part)
        if self.task.counts_targets:
            return (targets.loss * targets.counted).sum() / targets.counted.sum()
        return targets.mean(targets.loss).mean().to(targets.loss.dtype)

    def _weight(self, part: dict[str, Tensor]) -> int:
        if not self.task.counts_targets:
            return len(part["labels"])
        with torch.no_grad():
            return int(self.task.targets_of(self.task.logits(self.model, part), part).counted.sum())


@dataclass(frozen=True)
class CurvaturePass:
    """A question to an evaluator (see `Evaluator.gather`): all numbers of one adapter on its model. Picklable."""

    adapter: Adapter
    """In the evaluator's adapter's place."""
    iterations: int
    probes: int
    batch: int
    """Examples of a minibatch, over which Adam's second moment is a mean."""
    seed: int

    def __call__(self, evaluator: Evaluator) -> dict[str, float]:
        """What `measured` gives."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        check_targets(evaluator.task)
        models, adapter = evaluator.models, self.adapter
        model = models.attached.model
        if next(model.parameters()).dtype not in (torch.float32, torch.float64):
            model.float()
        batches = models.batches(evaluator.drawn(evaluator.split))
        with torch.inference_mode(False), torch.enable_grad(), models.wearing(adapter), sdpa_kernel(SDPBackend.MATH):
            model.eval()
            live = models.attached.live([key for site in adapter.sites.values() for key in site.keys.values()])
            for tensor in live:
                tensor.data = tensor.data.clone()  # those of inference mode have no gradient
                tensor.requires_grad_(True)
            try:
                return measured(self, evaluator.task, model, live, batches)
            except RuntimeError as error:
                if "derivative" not in str(error) and "differentia" not in str(error):
                    raise
                text = str(error).strip().partition("\n")[0]
                raise TaskError(
                    f"task {evaluator.task.name}: a layer of its model has no second derivative ({text[:120]})"
                ) from error
            finally:
                for tensor in live:
                    tensor.requires_grad_(False)


def measured(
    asked: CurvaturePass, task: Task, model: Any, live: Sequence[Tensor], batches: Sequence[dict[str, Tensor]]
) -> dict[str, float]:
    """Loss, extreme eigenvalues with residual, trace, and the same after Adam's scaling, by name."""
    count = sum(len(batch["labels"]) for batch in batches)
    largest = max(1, min(task.batch_size, -(-count // PARTS)))
    curvature = Curvature(task, model, live, list(cut(batches, count)))
    apart = Curvature(task, model, live, list(cut(batches, largest)))
    generator = torch.Generator().manual_seed(asked.seed)

    def draw() -> Tensor:
        return torch.randn(curvature.size, generator=generator).to(live[0])

    loss = float(curvature.shares @ curvature.losses())
    found, top = lanczos(curvature.product, draw(), asked.iterations)
    along = apart.products(top)[1]
    signs = [apart.products(draw().sign())[1] for _ in range(asked.probes)]
    trace, trace_half = _trace(np.array(signs), apart.shares)
    minibatches = Curvature(task, model, live, list(cut(batches, asked.batch)))
    second = torch.zeros(curvature.size).to(live[0])
    for gradient in minibatches.gradients():
        second += gradient.square() / len(minibatches.parts)
    # D^-½ of D = √v̂ + ε; what no gradient reaches (A, while B is 0) does not move: its curvature counts for nothing
    scale = torch.where(second > 0, (second.sqrt() + _EPSILON).rsqrt(), 0.0)
    adam, _ = lanczos(lambda v: scale * curvature.product(scale * v), draw(), asked.iterations)
    half = student(len(along)) * float(along.std(ddof=1)) / math.sqrt(len(along)) if len(along) > 1 else math.nan
    return {
        "parameters": curvature.size,
        "loss": loss,
        "sharpness": found.largest,
        "sharpness_low": found.largest - half,
        "sharpness_high": found.largest + half,
        "residual": found.residual,
        "iterations": found.iterations,
        "smallest": found.smallest,
        "trace": trace,
        "trace_low": trace - trace_half,
        "trace_high": trace + trace_half,
        "adam_sharpness": adam.largest,
        "adam_residual": adam.residual,
    }


def cut(batches: Sequence[dict[str, Tensor]], size: int) -> Iterator[dict[str, Tensor]]:
    """The examples in parts of at most so many; copies, as tensors of inference mode cannot be kept for gradients."""
    for batch in batches:
        for start in range(0, len(batch["labels"]), size):
            yield {name: tensor[start : start + size].clone() for name, tensor in batch.items()}


def _trace(values: Floats, shares: Floats) -> tuple[float, float]:
    """Mean of zᵀHz [probes, parts], and half of its 95 % interval over both signs and examples.

    The variance of a mean over draws of both is the sum of those of its row means and of its column means.
    """
    by_probe, by_part = values @ shares, values.mean(0)
    variances = [each.var(ddof=1) / len(each) if len(each) > 1 else math.nan for each in (by_probe, by_part)]
    return float(by_probe.mean()), student(min(values.shape)) * math.sqrt(sum(variances))


def largest_rates(sharpness: float, adam_sharpness: float, beta: float = BETA) -> dict[str, float]:
    """The largest rates at which a quadratic of this sharpness is stable, by optimiser; NaN where it is not convex.

    Gradient descent 2/λ; heavy ball 2(1 + β)/λ; Adam without bias correction 2(1 + β₁)/((1 − β₁)λ) of the Hessian
    scaled by D^-½ on both sides (Cohen et al. 2022, arXiv:2207.14484), as its momentum is a mean of gradients.
    """
    return {
        "rate_gd": _over(2.0, sharpness),
        "rate_momentum": _over(2 * (1 + beta), sharpness),
        "rate_adam": _over(2 * (1 + beta) / (1 - beta), adam_sharpness),
    }


def _over(bound: float, sharpness: float) -> float:
    return bound / sharpness if sharpness > 0 else math.nan
