"""Many adapters as points in a plane, by the distances between their ΔW, with the point at which all of them began."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_lab.brief import Brief
from lora_lab.errors import OptionError
from lora_lab.extras import needs

Floats = npt.NDArray[np.float64]

FEWEST = 4
"""Adapters that t-SNE needs."""


@dataclass(frozen=True, repr=False)
class Plane(Brief):
    """Points in a plane: row i is adapter i, and the last row the base, ΔW = 0."""

    points: Floats
    """[n + 1, 2]."""
    held: float
    """Share of the sum of all squared distances that the plane shows; 0 where all are equal."""


def classical(gram: Floats) -> Plane:
    """The plane that keeps most of the distances between n adapters and the base (classical scaling, Torgerson 1952).

    `gram` [n, n] are the inner products ⟨ΔW_i, ΔW_j⟩. The points are the two leading principal components of the n + 1
    vectors; the entry of largest size of each is positive, so that equal matrices give equal points.
    """
    n = len(gram)
    whole = np.zeros((n + 1, n + 1))
    whole[:n, :n] = gram
    size = float(np.abs(whole).max()) or 1.0
    centred = whole / size - whole.mean(0) / size
    centred -= centred.mean(1, keepdims=True)
    values, vectors = np.linalg.eigh((centred + centred.T) / 2)
    values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
    points = np.zeros((n + 1, 2))
    for k in range(min(2, n)):
        first = int((np.abs(vectors[:, k]) > 0.999 * np.abs(vectors[:, k]).max()).argmax())
        points[:, k] = vectors[:, k] * np.sqrt(values[k] * size) * (-1.0 if vectors[first, k] < 0 else 1.0)
    total = float(values.sum())
    return Plane(points, float(values[:2].sum()) / total if total else 0.0)


def require_enough(count: int) -> None:
    """OptionError for fewer adapters than t-SNE can place, or without scikit-learn."""
    if count < FEWEST:
        raise OptionError(f"{count} adapters; t-SNE needs at least {FEWEST}")
    with needs("data", "t-SNE"):
        importlib.import_module("sklearn")


def perplexity(count: int) -> float:
    """About so many neighbours of each of `count` adapters weigh in t-SNE."""
    return min(30.0, count / 3)


def neighbours(gram: Floats, start: Plane, seed: int = 0) -> Floats:
    """[n + 1, 2] by t-SNE of the same distances (van der Maaten & Hinton 2008), begun at the points of `start`.

    It keeps who is near whom; distances between groups mean nothing. OptionError as `require_enough`.
    """
    require_enough(len(gram))
    from sklearn.manifold import TSNE

    n = len(gram)
    squares = np.append(np.diag(gram), 0.0)
    whole = np.zeros((n + 1, n + 1))
    whole[:n, :n] = gram
    distances = np.sqrt((squares[:, None] + squares - 2 * whole).clip(min=0))
    np.fill_diagonal(distances, 0.0)
    distances /= distances.max() or 1.0
    spread = start.points.std(0).max() or 1.0
    model = TSNE(perplexity=perplexity(n), metric="precomputed", init=1e-4 * start.points / spread, random_state=seed)
    found: Floats = model.fit_transform(distances).astype(np.float64)
    return found


def groups_of(count: int, shared: Sequence[tuple[int, int]]) -> list[int | None]:
    """For each of so many adapters, the number of its group by these pairs, from 1; None for one without a pair."""
    leader = list(range(count))
    for i, j in shared:
        old, new = leader[j], leader[i]
        leader = [new if each == old else each for each in leader]
    many = [each for each in dict.fromkeys(leader) if leader.count(each) > 1]
    return [many.index(each) + 1 if each in many else None for each in leader]
