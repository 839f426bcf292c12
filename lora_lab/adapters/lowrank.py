"""A weight update kept as the product of two thin matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lora_lab.errors import MismatchError, OptionError
from lora_lab.options import check_options, check_type


@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """ΔW = B A, in the layout in which the model stores the weight that it is added to.

    A is [rank, columns] and B [rows, rank], in float32 or wider; the adapter's scale is folded into B. `shape`
    is the shape of ΔW: (rows, columns), or that of a convolution kernel whose columns are flattened in A.
    Norms, inner products and the SVD go through rank × rank cores; only `delta()` makes ΔW itself.
    """

    A: Tensor
    B: Tensor
    shape: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if not all(map(isinstance, (self.A, self.B, self.shape), (Tensor, Tensor, tuple))):
            check_options(self)
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise MismatchError(
                f"A {list(self.A.shape)} and B {list(self.B.shape)} are not [rank, columns] and [rows, rank]"
            )
        if self.A.dtype != self.B.dtype or not self.A.is_floating_point() or self.A.itemsize < 4:
            raise MismatchError(f"A ({self.A.dtype}) and B ({self.B.dtype}) must share float32 or wider")
        shape = tuple(self.shape) or (self.B.shape[0], self.A.shape[1])
        if shape[0] != self.B.shape[0] or math.prod(shape[1:]) != self.A.shape[1]:
            raise MismatchError(f"shape {shape} does not fit A {list(self.A.shape)} and B {list(self.B.shape)}")
        object.__setattr__(self, "shape", shape)

    def __repr__(self) -> str:
        kind = str(self.A.dtype).removeprefix("torch.")
        return f"LowRank({' × '.join(map(str, self.shape))} of rank {self.rank}, {kind})"

    @property
    def rank(self) -> int:
        """Rows of A, which is at least the rank of ΔW."""
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """ΔW itself, dense, of shape `shape`."""
        dense: Tensor = self.B @ self.A
        return dense.reshape(self.shape)

    def to(self, device: torch.device) -> LowRank:
        """The same ΔW with its factors on a device."""
        if self.A.device == self.B.device == device:
            return self
        return LowRank(self.A.to(device), self.B.to(device), self.shape)

    def __mul__(self, factor: float) -> LowRank:
        check_type("the factor", factor, float | Tensor)
        return LowRank(self.A, self.B * factor, self.shape)

    __rmul__ = __mul__

    def __neg__(self) -> LowRank:
        return self * -1.0

    def __add__(self, other: LowRank) -> LowRank:
        return combine([self, other], [1.0, 1.0])

    def __sub__(self, other: LowRank) -> LowRank:
        return combine([self, other], [1.0, -1.0])

    def inner(self, other: LowRank) -> float:
        """⟨ΔW₁, ΔW₂⟩ = tr((B₂ᵀB₁)(A₁A₂ᵀ)), summed in float64."""
        _same_shape([self, other])
        B_core = other.B.T.double() @ self.B.double()
        A_core = other.A.double() @ self.A.T.double()
        return float((B_core * A_core).sum())

    @cached_property
    def products(self) -> Tensor:
        """⟨bₖ, bₗ⟩ ⟨aₖ, aₗ⟩ [rank, rank] in float64, the inner products of the terms bₖ aₖ; their sum is ‖ΔW‖²."""
        A, B = self.A.double(), self.B.double()
        return (B.T @ B) * (A @ A.T)

    def norm(self) -> float:
        """‖ΔW‖_F, in float64; where the terms of B A cancel, from triangular cores, and so exact to rounding, too."""
        squared, size = float(self.products.sum()), float(self.products.abs().sum())
        if _CANCELS * size < squared < math.inf:
            return math.sqrt(squared)
        return float(torch.linalg.matrix_norm(self._reduced()[0]))

    def rough_norm(self) -> float:
        """‖ΔW‖_F to some three digits, in the dtype of the factors; as `norm` where digits cancel or squares vanish."""
        B, A = self.B.T @ self.B, self.A @ self.A.T
        terms = B * A
        squared, sizes = float(terms.sum()), [gram.diagonal() for gram in (B, A, terms)]
        within = all(float(size.min()) > _ROUGH and float(size.max()) < 1 / _ROUGH for size in sizes if len(size))
        return math.sqrt(squared) if within and squared > 1e-2 * float(terms.abs().sum()) else self.norm()

    def distance(self, other: LowRank) -> tuple[float, float]:
        """‖ΔW₁ − ΔW₂‖ and ‖ΔW₁‖: among the inner products of the terms of both are those of the first's."""
        difference = self - other
        self.__dict__.setdefault("products", difference.products[: self.rank, : self.rank])
        return difference.norm(), self.norm()

    def vanishes(self, share: float) -> bool:
        """Whether ‖ΔW‖ is at most this share of `bound`; some rows that are clearly not 0 spare the norm."""
        largest, rows = self._largest, self.B[:8]
        some = float(torch.linalg.vector_norm(rows @ self.A)) if self.rank else 0.0
        rounding = self.rank * torch.finfo(self.A.dtype).eps
        if some > largest * max(2 * rounding * math.sqrt(len(rows) / len(self.B)), 2 * share):
            return False
        return self.norm() <= share * self.bound()

    @cached_property
    def _largest(self) -> float:
        """What `bound` cannot exceed, from the largest entries alone: r √(rows · columns) max |A| max |B|."""
        entries = [max(abs(float(end)) for end in f.aminmax()) if f.numel() else 0.0 for f in (self.A, self.B)]
        return self.rank * math.sqrt(self.B.shape[0] * self.A.shape[1]) * entries[0] * entries[1]

    def bound(self) -> float:
        """Σ ‖bₖ‖ ‖aₖ‖ over the rank: no sum of theirs exceeds it, and rounding errors of ΔW are shares of it.

        NaN where a factor is not finite.
        """
        a, b = (torch.linalg.vector_norm(f, dim=d, dtype=torch.float64) for f, d in ((self.A, 1), (self.B, 0)))
        return float(a @ b) if bool(torch.isfinite(a).all() and torch.isfinite(b).all()) else math.nan

    def singular_values(self) -> Tensor:
        """The min(rank, rows, columns) leading singular values of ΔW in float64, largest first."""
        S: Tensor = torch.linalg.svdvals(self._reduced()[0])
        return S

    def svd(self, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """U [rows, k], S [l], Vh [k, columns] with ΔW = U diag(S) Vh; float64, without a dense ΔW.

        With `rank`, U and Vh have the leading triplets only; S is whole.
        """
        core, B, A = self._reduced()
        U, S, Vh = torch.linalg.svd(core, full_matrices=False)
        return B.times(U[:, :rank]), S, A.times(Vh[:rank].T).T

    def truncate(self, rank: int) -> tuple[LowRank, float]:
        """The best approximation of the given rank, and its relative Frobenius error (0 for ΔW = 0)."""
        kept, error, _ = self.cut(rank)
        return kept, error

    def cut(self, rank: int) -> tuple[LowRank, float, Tensor]:
        """As `truncate`, with all singular values in float64, whose norm is ‖ΔW‖."""
        check_type("`rank`", rank, int)
        if rank < 1:
            raise OptionError(f"a rank of {rank} was asked for; it is at least 1")
        U, S, Vh = self.svd(rank)
        root = S[:rank].sqrt()
        total, lost = float(S.square().sum()), float(S[rank:].square().sum())
        kept = LowRank((root[:, None] * Vh).to(self.A.dtype), (U * root).to(self.A.dtype).contiguous(), self.shape)
        return kept, math.sqrt(lost / total) if total else 0.0, S

    def effective_rank(self) -> float:
        """exp of the entropy of the normalised singular values (Roy & Vetterli 2007); 0 for ΔW = 0."""
        S = self.singular_values()
        if not float(S.sum()):
            return 0.0
        share = S / S.sum()
        return float(torch.special.entr(share).sum().exp())

    def balanced(self) -> LowRank:
        """The same ΔW in its canonical gauge: B = U√S, A = √S Vh, the largest entry of each row of A positive."""
        U, S, Vh = self.svd()
        k = min(self.rank, len(S))
        size = Vh.abs()
        # The first of the largest entries: of two that tie, rounding would choose another in every twin.
        first = (size > 0.999 * size.amax(1, keepdim=True)).byte().argmax(1, keepdim=True)
        sign = torch.sign(Vh.gather(1, first))
        root = S.sqrt()[:, None]
        A, B = root * sign * Vh, (U.T * sign * root).T
        pad = self.rank - k  # keep the rank, so that balanced factors can still be interpolated
        A, B = torch.nn.functional.pad(A, (0, 0, 0, pad)), torch.nn.functional.pad(B, (0, pad))
        return LowRank(A.to(self.A.dtype), B.to(self.A.dtype), self.shape)

    def rotated_to(self, other: LowRank) -> LowRank:
        """The same ΔW with factors turned by the orthogonal R that brings them nearest to `other`'s.

        R minimises ‖B R − B'‖² + ‖Rᵀ A − A'‖² (orthogonal Procrustes); the ranks must be equal.
        """
        _same_shape([self, other])
        if self.rank != other.rank:
            raise MismatchError(f"factors of rank {self.rank} and {other.rank} cannot be aligned")
        B_core = self.B.T.double() @ other.B.double()
        A_core = self.A.double() @ other.A.T.double()
        U, _, Vh = torch.linalg.svd(B_core + A_core)
        R = (U @ Vh).to(self.A.dtype)
        return LowRank(R.T @ self.A, self.B @ R, self.shape)

    def _reduced(self) -> tuple[Tensor, Basis, Basis]:
        """The core [k, l] with ΔW = Q_B core Q_Aᵀ in float64, and what Q_B and Q_A are."""
        B, A = Basis(self.B.double()), Basis(self.A.double().T)
        return B.R @ A.R.T, B, A


class Basis:
    """Q R of a tall matrix X, with Q never written down: `times` applies it.

    Well-conditioned columns go through the Cholesky factor of XᵀX, which costs a third; its error grows with the
    square of the condition, so all others (`_CONDITION`) go through Householder reflectors.
    """

    def __init__(self, X: Tensor) -> None:
        self._X = X
        self._tau: Tensor | None = None
        if X.shape[0] >= 2 * X.shape[1] > 0:
            gram = X.T @ X
            size = gram.diagonal().sqrt()
            if float(size.min()) > _TINY and float(size.max()) < 1 / _TINY:
                L, failed = torch.linalg.cholesky_ex(gram / size / size[:, None])
                inverse = torch.linalg.solve_triangular(
                    L, torch.eye(len(L), dtype=L.dtype, device=L.device), upper=False
                )
                if not int(failed) and float(inverse.norm()) < _CONDITION:
                    self.R, self._inverse = L.T * size, inverse.T / size[:, None]
                    return
        self._X, self._tau = torch.geqrf(X)
        self.R = self._X[: X.shape[1]].triu()

    def times(self, Y: Tensor) -> Tensor:
        """Q Y."""
        if not Y.shape[1] or not self._X.shape[1]:
            return Y.new_zeros(len(self._X), Y.shape[1])
        product: Tensor
        if self._tau is None:
            # as (Y'ᵀ Xᵀ)ᵀ, which takes from a half to a third of the time of X Y'
            product = ((self._inverse @ Y).T.contiguous() @ self._X.T).T
        else:
            padded = torch.nn.functional.pad(Y, (0, 0, 0, len(self._X) - len(Y)))
            product = torch.ormqr(self._X[:, : len(self._tau)], self._tau, padded)
        return product

    def whole(self) -> Tensor:
        """Q itself."""
        return self.times(torch.eye(len(self.R), dtype=self.R.dtype, device=self.R.device))

    def cross(self, other: Basis) -> Tensor:
        """QᵀQ' of two matrices with as many rows, whose singular values are cosines of principal angles."""
        if self._tau is None and other._tau is None:
            product: Tensor = self._inverse.T @ (self._X.T @ other._X) @ other._inverse
            return product
        return self.whole().T @ other.whole()


_CANCELS = 1e-6
"""‖ΔW‖² by the sum of the sizes of its terms, below which so many digits of them cancel that cores are needed."""
_ROUGH = 1e-30
"""Of squares in float32, which has no smaller ones of full precision from 1e-38 on."""
_CONDITION = 1e3
"""‖L⁻¹‖ of unit columns, and so their condition but for the root of their number: errors stay below 1e-9."""
_TINY = 1e-100
"""Of a column whose square would leave float64's range."""


def combine(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Σ wᵢ ΔWᵢ, exact by concatenation: the ranks add."""
    _same_shape(updates, weights)
    A = torch.cat([update.A for update in updates])
    pairs = zip(updates, weights, strict=True)
    B = torch.cat([update.B if weight == 1 else update.B * weight for update, weight in pairs], dim=1)
    return LowRank(A, B, updates[0].shape)


def all_finite(tensor: Tensor) -> bool:
    """Whether every entry is a number, from the ends alone: NaN is one of them wherever it is."""
    return not tensor.numel() or all(math.isfinite(float(end)) for end in tensor.aminmax())


def is_finite(update: LowRank | Tensor) -> bool:
    """Whether every entry of ΔW is a number that float32 can hold, in whatever order a processor sums B A.

    Of factors it is their `bound` that must be within float32.
    """
    limit = torch.finfo(torch.float32).max
    if isinstance(update, Tensor):
        return not update.numel() or all(abs(float(end)) <= limit for end in update.aminmax())
    return update._largest <= limit or update.bound() <= limit


def combine_factors(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """(Σ wᵢ Bᵢ)(Σ wᵢ Aᵢ): what averaging the factors gives. It has cross terms and depends on the gauge."""
    _same_shape(updates, weights)
    if len({update.rank for update in updates}) > 1:
        raise MismatchError(
            f"factors of ranks {', '.join(str(u.rank) for u in updates)} cannot be averaged; ΔW can (delta)"
        )
    A = sum((u.A * w for u, w in zip(updates, weights, strict=True)), torch.zeros_like(updates[0].A))
    B = sum((u.B * w for u, w in zip(updates, weights, strict=True)), torch.zeros_like(updates[0].B))
    return LowRank(A, B, updates[0].shape)


def _same_shape(updates: Sequence[LowRank], weights: Sequence[float] | None = None) -> None:
    if not updates:
        raise MismatchError("no updates to combine")
    for update in updates:
        check_type("an update", update, LowRank)
    if weights is not None and len(weights) != len(updates):
        raise MismatchError(f"{len(updates)} updates and {len(weights)} weights")
    shapes = [update.shape for update in updates]
    if len(set(shapes)) > 1:
        raise MismatchError(f"updates of different shapes: {', '.join(map(str, dict.fromkeys(shapes)))}")
