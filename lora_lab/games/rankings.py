"""Cheap baselines beside Shapley values, from one pass or a few: they rank the players and add up to nothing."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from lora_lab.results.stats import Floats, mean_and_error

NO_VALUES = "being a ranking alone, which does not add up to the worth"


class Sloped(Protocol):
    """A game with gates, asked at any of their values."""

    def slopes(self, gates: Floats, **options: Any) -> Floats:
        """∂f/∂g_i [m, n] with gates [m, n]."""

    def outputs(self) -> Floats:
        """Σ_x ‖ΔW x‖² over the modules of each player and all inputs x that they see, [n]."""


def taylor(
    game: Sloped, n: int, generator: np.random.Generator, *, temperature: float = 2.0, batch: int = 0
) -> tuple[Floats, Floats]:
    """∂f/∂g_i with all gates at 1: what the worth loses, to first order, as player i is turned down from there.

    It equals ⟨A, ∂f/∂A⟩ = ⟨B, ∂f/∂B⟩ of the player's factors, the weight-times-gradient score of pruning (Molchanov et
    al. 2017), which ranks by its size.
    """
    slopes = game.slopes(np.ones((1, n)), temperature=temperature, batch=batch)
    return slopes[0], np.zeros(n)


def sensitivity(
    game: Sloped,
    n: int,
    generator: np.random.Generator,
    *,
    passes: int = 16,
    temperature: float = 2.0,
    batch: int = 0,
) -> tuple[Floats, Floats]:
    """E |∂f/∂g_i| at the gates of coalitions that i is in, after ShapLoRA (2601.17921), which draws them of ranks.

    A coalition of a random size and its complement, in one of which every player is, are two passes; the larger ones
    so hold a player the oftener. Standard errors are those of the coalitions.
    """
    sizes = generator.integers(1, n + 1, size=passes // 2)
    inside = np.array([generator.permutation(n) < size for size in sizes])
    at = np.concatenate([inside, ~inside]).astype(np.float64)
    found = np.abs(game.slopes(at, temperature=temperature, batch=batch))
    return mean_and_error(np.where(inside, found[: len(inside)], found[len(inside) :]))


def drop(game: Sloped, n: int, generator: np.random.Generator) -> tuple[Floats, Floats]:
    """Each player's share of Σ_x ‖ΔW x‖², how much its modules say, from a pass without gradients.

    LoRA-drop (2402.07721) keeps the largest and lets the others share one LoRA. Tokens of padding are inputs, too.
    """
    outputs = game.outputs()
    total = outputs.sum()
    return outputs / total if total > 0 else np.zeros(n), np.zeros(n)
