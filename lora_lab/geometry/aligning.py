"""Factors of several ΔW turned onto each other, and the mean of what is left: orthogonal Procrustes.

A ΔW of rank r has balanced factors Z = [U√S; V√S], unique but for an orthogonal matrix (Z and ZO are of one ΔW).
Between two of them, with that matrix chosen best,

    d² = min over O(r) of ‖Zᵢ − ZⱼO‖² = ‖Zᵢ‖² + ‖Zⱼ‖² − 2‖ZᵢᵀZⱼ‖_*   (‖·‖_* the sum of the singular values),

which hangs on no gauge (BR, R⁻¹A) of either. Only r × r cores ZᵢᵀZⱼ are ever decomposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_lab.adapters.lowrank import LowRank
from lora_lab.brief import Brief
from lora_lab.errors import MismatchError, OptionError

STILL = 1e-10
"""Change of an entry of the orthogonal matrices at which the iteration to a mean ends."""
_ROUNDS = 1000
_FIRST = 10
"""Rounds from each start, before the best goes on."""


@dataclass(frozen=True, repr=False)
class ProcrustesMean(Brief):
    """The mean of the balanced factors of several ΔW, and these factors turned onto it; in float64."""

    mean: LowRank
    """Z̄_top Z̄_botᵀ, of the largest rank among them; its factors are the means of those in `turned`.

    The columns of Z̄ are orthogonal, largest first, the largest entry of each positive.
    """
    turned: list[LowRank]
    """The same ΔW as before, in the factors that lie nearest to the mean's; the gauge changes nothing of them."""
    spread: float
    """Σ wᵢ‖ZᵢRᵢ − Z̄‖², with weights of sum 1: 0 where all ΔW are the same."""


def aligned(updates: Sequence[LowRank]) -> list[LowRank]:
    """The same ΔW in balanced factors of one rank, those after the first turned onto its.

    Ranks below the largest are filled up with zeros. MismatchError where shapes differ.
    """
    first, *others = _balanced(updates)
    return [first, *(other.rotated_to(first) for other in others)]


def factor_distance(one: LowRank, other: LowRank) -> float:
    """d = min over O(r) of ‖Z₁ − Z₂O‖ between the balanced factors Z = [U√S; V√S] of two ΔW; no gauge changes it."""
    first, second = aligned([_wide(one), _wide(other)])
    # ‖Z₁ − Z₂O‖ itself, as ‖Z₁‖² + ‖Z₂‖² − 2‖Z₁ᵀZ₂‖_* loses half of the digits of a small one
    return float(torch.cat([(first.A - second.A).flatten(), (first.B - second.B).flatten()]).norm())


def procrustes_mean(updates: Sequence[LowRank], weights: Sequence[float] | None = None) -> ProcrustesMean:
    """The mean of ΔW of one shape with respect to d: it minimises Σ wᵢ d(ΔWᵢ, ·)², wᵢ ≥ 0 (equal by default).

    Generalised Procrustes analysis (Gower 1975; one at a time as in ten Berge 1977): R_t = polar(Z_tᵀ Σ_{j≠t} wⱼZⱼRⱼ)
    in turn, the largest ΔW first, until no entry of an R_t moves by more than 1e-10. Every step raises ‖Z̄‖,
    Z̄ = Σ w_t Z_t R_t, and so lowers the value; each of the Z_t is tried as a start, and the best goes on, so that the
    order of the updates does not count. OptionError where a weight is negative or all are 0; MismatchError where shapes
    differ.
    """
    weights = [1.0] * len(updates) if weights is None else list(weights)
    if len(weights) != len(updates):
        raise MismatchError(f"{len(updates)} updates and {len(weights)} weights")
    if min(weights) < 0 or not any(weights):
        shown = ", ".join(f"{weight:g}" for weight in weights)
        raise OptionError(f"a mean needs weights of 0 or more, not all of them 0; they are {shown}")
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    factors = _balanced([_wide(update) for update in updates])
    shares = shares.to(factors[0].A.device)
    Z = torch.stack([torch.cat([factor.B, factor.A.T]) for factor in factors])  # [T, rows + columns, r]
    cores = torch.einsum("idr,jds->ijrs", Z, Z)  # ZᵢᵀZⱼ
    sizes = [weight * float(cores[t, t].norm()) for t, weight in enumerate(shares.tolist())]
    order = sorted((t for t, size in enumerate(sizes) if size), key=lambda t: -sizes[t])
    starts = [_iterated(cores, shares, order, _polar(cores[:, t]), _FIRST) for t in order] or [_polar(cores[:, 0])]
    R = _iterated(cores, shares, order, max(starts, key=lambda R: _squared(cores, shares, R)), _ROUNDS)
    # those that the mean does not hang on are turned onto it, too
    R = _polar(torch.einsum("tjrs,j,jsu->tru", cores, shares, R)) if len(order) < len(R) else R
    turned = torch.einsum("tdr,trs->tds", Z, R)
    turned = turned @ _frame(torch.einsum("t,tds->ds", shares, turned))
    mean = torch.einsum("t,tds->ds", shares, turned)
    rows, shape = factors[0].B.shape[0], factors[0].shape
    return ProcrustesMean(
        LowRank(mean[rows:].T, mean[:rows], shape),
        [LowRank(each[rows:].T, each[:rows], shape) for each in turned],
        float(shares @ (turned - mean).square().sum((1, 2))),
    )


def _iterated(cores: Tensor, shares: Tensor, order: Sequence[int], R: Tensor, rounds: int) -> Tensor:
    """R [T, r, r] after so many rounds in this order, or when it is still."""
    R = R.clone()
    for _ in range(rounds):
        before = R.clone()
        for t in order:
            others = torch.einsum("jrs,j,jsu->jru", cores[t], shares, R)  # wⱼ Z_tᵀZⱼRⱼ
            R[t] = _polar(others.sum(0) - others[t])
        if float((R - before).abs().max()) < STILL:
            break
    return R


def _frame(mean: Tensor) -> Tensor:
    """The orthogonal matrix that makes the columns of Z̄ orthogonal, largest first, the largest entry of each positive.

    One for all: without it they would be turned onto each other, but in whatever frame the iteration began.
    """
    turn = torch.linalg.eigh(mean.T @ mean).eigenvectors.flip(1)
    columns = mean @ turn
    first = (columns.abs() > 0.999 * columns.abs().amax(0)).byte().argmax(0, keepdim=True)
    signed: Tensor = turn * torch.where(columns.gather(0, first) < 0, -1.0, 1.0)
    return signed


def _squared(cores: Tensor, shares: Tensor, R: Tensor) -> float:
    """‖Z̄‖² = Σᵢⱼ wᵢwⱼ tr(Rᵢᵀ ZᵢᵀZⱼ Rⱼ), which is Σ wᵢ‖Zᵢ‖² less the spread."""
    return float(torch.einsum("i,j,iru,ijrs,jsu->", shares, shares, R, cores, R))


def _polar(X: Tensor) -> Tensor:
    """The orthogonal matrix that has the largest inner product with this one [r, r], or with each of several."""
    U, _, Vh = torch.linalg.svd(X)
    nearest: Tensor = U @ Vh
    return nearest


def _wide(update: LowRank) -> LowRank:
    return LowRank(update.A.double(), update.B.double(), update.shape)


def _balanced(updates: Sequence[LowRank]) -> list[LowRank]:
    """In balanced factors, filled up to the largest rank."""
    shapes = dict.fromkeys(update.shape for update in updates)
    if len(shapes) != 1:
        raise MismatchError(f"updates of different shapes: {', '.join(map(str, shapes))}")
    rank = max(update.rank for update in updates)
    balanced = [update.balanced() for update in updates]
    more = [rank - update.rank for update in updates]
    return [
        LowRank(pad(u.A, (0, 0, 0, n)), pad(u.B, (0, n)), u.shape) if n else u
        for u, n in zip(balanced, more, strict=True)
    ]
