"""Null adapters: what keeps some properties of an adapter and nothing else of what it learnt.

A number that an adapter has and its nulls have not, is owed to what the nulls lack. All are made of the factors, and
have the adapter's norm ‖ΔW‖ in every module; A and B share it as in the adapter, for methods that hang on the gauge.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lab.adapters.adapter import Adapter, from_updates
from lora_lab.adapters.groups import locate
from lora_lab.adapters.lowrank import LowRank
from lora_lab.errors import MismatchError, shorten
from lora_lab.registry import Registry

Updates = Mapping[str, LowRank]
Generators = Callable[[str], torch.Generator]
"""Function (name of a module) → the generator of its random numbers."""


@dataclass(frozen=True)
class Null:
    """A way to make nulls."""

    make: Callable[[Updates, Generators], Updates]
    """Function (ΔW of all modules, generators) → those of the null."""
    about: str = ""
    """What it keeps and what it draws, in a few words."""
    random: bool = True
    """Whether it is drawn; else there is but one."""
    why_not: Callable[[Mapping[str, tuple[int, ...]]], str | None] | None = None
    """Function (module → shape of ΔW) → why there is none for these, in words, or None."""


def null_adapter(adapter: Adapter, name: str, *seed: object) -> Adapter:
    """A null of the adapter, by its name in NULLS: a plain LoRA with the adapter's heads.

    Equal seeds give equal nulls. Raises TunerError where ΔW is not known without the base model, MismatchError where
    the adapter has no such null.
    """
    updates = adapter.updates

    def generator(module: str) -> torch.Generator:
        digest = hashlib.sha256(repr((seed, module)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    return from_updates(NULLS[name].make(updates, generator), like=adapter, source=f"{name} null of {adapter.source}")


def require_null(adapter: Adapter, name: str) -> None:
    """Raise what `null_adapter` would raise for the adapter's kind and shapes, before anything is computed."""
    why_not, updates = NULLS[name].why_not, adapter.updates
    reason = why_not({module: update.shape for module, update in updates.items()}) if why_not else None
    if reason:
        raise MismatchError(f"{adapter.source}: {reason}")


def in_every_module(make: Callable[[LowRank, torch.Generator], LowRank]) -> Callable[[Updates, Generators], Updates]:
    """A null of one ΔW as one of all modules."""

    @functools.wraps(make)
    def of_all(updates: Updates, generator: Generators) -> Updates:
        return {name: _matched(make(update, generator(name)), update) for name, update in updates.items()}

    return of_all


def _matched(null: LowRank, update: LowRank) -> LowRank:
    """The null with the ‖ΔW‖ and the ‖A‖ of an update."""
    norm, size, wanted = null.norm(), float(null.A.norm()), float(update.A.norm())
    if not norm or not wanted:
        return LowRank(update.A * 0, update.B * 0, update.shape)
    A, B = null.A * (wanted / size), null.B * (update.norm() / norm * size / wanted)
    return LowRank(A.to(update.A.dtype), B.to(update.A.dtype), update.shape)


def haar(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns of the uniform (Haar) law, in float64.

    Q of a Gaussian matrix, its signs fixed by R, without which the law hangs on the QR routine (Mezzadri 2007).
    """
    Q, R = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    signed: Tensor = Q * R.diagonal().sign()
    return signed


def _gaussian(update: LowRank, generator: torch.Generator) -> LowRank:
    A, B = (torch.randn(f.shape, generator=generator, dtype=torch.float64) for f in (update.A, update.B))
    return LowRank(A, B, update.shape)


def _turned(update: LowRank, generator: torch.Generator, *, left: bool, right: bool) -> LowRank:
    """The same singular values with other singular vectors on one side or both: ΔW = U S Vᵀ."""
    U, S, Vh = update.svd()
    k = min(U.shape[1], Vh.shape[0], len(S))
    U = haar(U.shape[0], k, generator) if left else U[:, :k]
    Vh = haar(Vh.shape[1], k, generator).T if right else Vh[:k]
    root = S[:k].sqrt()
    return LowRank(root[:, None] * Vh, U * root, update.shape)


def _permuted(update: LowRank, generator: torch.Generator) -> LowRank:
    rows = torch.randperm(update.B.shape[0], generator=generator)
    columns = torch.randperm(update.A.shape[1], generator=generator)
    return LowRank(update.A[:, columns], update.B[rows], update.shape)


def _negative(updates: Updates, _: Generators) -> Updates:
    return {name: -update for name, update in updates.items()}


def _shuffled(updates: Updates, generator: Generators) -> Updates:
    """Every ΔW from another module of its shape, none from its own; a ΔW of 0 stays, and is lent to none."""
    lent = {name: update for name, update in updates.items() if update.norm()}
    donors = dict.fromkeys(updates.keys() - lent.keys(), "")
    for names in _alike({name: update.shape for name, update in lent.items()}):
        if len(names) < 2:
            raise MismatchError(_LONELY.format(names[0], list(updates[names[0]].shape)))
        order, draw = list(range(len(names))), generator(names[0])
        while any(i == j for i, j in enumerate(order)):  # about e = 2.7 times
            order = torch.randperm(len(names), generator=draw).tolist()
        donors |= {name: names[j] for name, j in zip(names, order, strict=True)}
    return {name: _matched(updates[donors[name] or name], update) for name, update in updates.items()}


_LONELY = "{}: no other module has a ΔW of shape {}, so there is none to put in its place"


def _alike(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """Modules of one type and shape; those that are alone of their type, by shape alone."""
    places, groups = locate(list(shapes)), dict[object, list[str]]()
    for name, shape in shapes.items():
        groups.setdefault((places[name].encoder, places[name].type, tuple(shape)), []).append(name)
    alone: dict[object, list[str]] = {}
    for names in groups.values():
        if len(names) == 1:
            alone.setdefault(tuple(shapes[names[0]]), []).extend(names)
    return [names for names in groups.values() if len(names) > 1] + list(alone.values())


def _lonely(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    single = [names[0] for names in _alike(shapes) if len(names) == 1]
    return _LONELY.format(shorten(single), list(shapes[single[0]])) if single else None


def _by_svd(*, left: bool, right: bool) -> Callable[[Updates, Generators], Updates]:
    return in_every_module(functools.partial(_turned, left=left, right=right))


NULLS = Registry(
    "null",
    "lora_lab.nulls",
    Null,
    {
        "gaussian": Null(in_every_module(_gaussian), "the norm; A and B are Gaussian"),
        "spectrum": Null(_by_svd(left=True, right=True), "the singular values; both sides have random directions"),
        "random-output": Null(_by_svd(left=True, right=False), "what ΔW reads; it writes in random directions"),
        "random-input": Null(_by_svd(left=False, right=True), "what ΔW writes; it reads random directions"),
        "permuted": Null(in_every_module(_permuted), "the entries; rows and columns change places"),
        "shuffled-layers": Null(_shuffled, "ΔW of the other layers, norms matched; none in its own", why_not=_lonely),
        "negative": Null(_negative, "all but the sign: −ΔW", random=False),
    },
)
"""Nulls by name: what each keeps of the adapter."""
