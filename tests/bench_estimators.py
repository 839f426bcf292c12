"""Errors of Shapley values at equal work, beside shapiq's: `make bench`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from making_games import saturating, table_game

from lora_lab.adapters.groups import players
from lora_lab.analysis.gates import GatedGame
from lora_lab.errors import OptionError
from lora_lab.games import estimators
from lora_lab.games.coalitions import all_coalitions
from lora_lab.games.gates import Diagonal
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.gates import PASSES
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe


def real_game(worth: str, evaluator: Evaluator) -> tuple[Any, Any]:
    """Twelve adapters of a trained LoRA (attention and MLP of six layers), all coalitions known."""
    halves = {"attention": "[qkvo]_proj", "mlp": "fc[12]"}
    by = {f"{name}{i}": rf"layers\.{i}\..*{pattern}" for i in range(6) for name, pattern in halves.items()}
    gated = GatedGame(evaluator, players(evaluator.adapters[0], by), worth=worth)
    worths = gated(all_coalitions(12))
    return WithGates(table_game(worths), gated), estimators.exact(table_game(worths), 12).values


class WithGates:
    """A game whose coalitions are in a table and whose gates are a model's, each asked once."""

    def __init__(self, table: Any, gated: GatedGame) -> None:
        self.table, self._gated = table, gated
        self._found: dict[int, Any] = {}

    def along(self, gates: Any, shares: Any, **options: Any) -> Any:
        if len(gates) not in self._found:
            self._found[len(gates)] = self._gated.along(gates, shares, **options)
        return self._found[len(gates)]

    def __call__(self, coalitions: Any) -> Any:
        return self.table(coalitions)


SHAPIQ = (
    "KernelSHAP",
    "PermutationSamplingSV",
    "OwenSamplingSV",
    "UnbiasedKernelSHAP",
    "SVARM",
    "StratifiedSamplingSV",
)


class SmoothSaturation:
    """v(S) = 1 − exp(−Σ a) with gates: f(g) = 1 − exp(−Σ a g)."""

    def __init__(self, n: int) -> None:
        self.game, self.values = saturating(n, total=4.0)
        self.a = -np.log1p(-self.game(np.eye(n, dtype=bool)))

    def along(self, gates: Any, shares: Any, **options: Any) -> Diagonal:
        left = np.exp(-np.append(gates, [0, 1]) * self.a.sum())
        return Diagonal(gates, shares, 1 - left[:-2], np.outer(left[:-2], self.a), 1 - left[-2:])

    def __call__(self, coalitions: Any) -> Any:
        return self.game(coalitions)


def games_of_the_bench() -> dict[str, tuple[Any, Any]]:
    """Title → a game and its Shapley values."""
    games: dict[str, tuple[Any, Any]] = {}
    for method in ("lora", "coto"):
        for seed in range(3):
            adapter = train(Digits("relabel"), Recipe(method=method, seed=seed))[0]
            evaluator = Evaluator([adapter], Digits("relabel"))
            for worth in ("loss", "accuracy"):
                games[f"12 players, {method} {seed}, {worth}"] = real_game(worth, evaluator)
    for n in (32, 64):
        game = SmoothSaturation(n)
        games[f"{n}, saturating"] = game, game.values
    return games


TIMES = (1, 2, 5, 10)


def bench_estimators(seeds: int = 20) -> None:
    """Relative L2 error at equal evaluations, mean over seeds, beside shapiq's estimators."""
    import shapiq

    def ours(name: str, budget: int, seed: int, n: int, game: Any) -> Any:
        budget -= round(PASSES * estimators.ESTIMATORS[name].passes({}))  # those with gradients at what they cost
        samples = 10**6 if name != "regression" else budget / (n - 1)
        if budget < 2 or samples < 1:
            return None
        options = {"samples": math.ceil(samples), "seed": seed, "budget": budget}
        try:
            return estimators.estimate(game, n, estimator=name, **options).values
        except OptionError:  # too few
            return None

    def theirs(name: str, budget: int, seed: int, n: int, game: Any) -> Any:
        found = getattr(shapiq, name)(n=n, random_state=seed).approximate(
            budget=budget, game=lambda coalitions: game(np.atleast_2d(coalitions))
        )
        return np.array([found[(i,)] for i in range(n)])

    names = ["permutation", "antithetic", "regression", "gates", "link", "permutation+link", "antithetic+link", "joint"]
    rows = [("ours: " + name, ours, name) for name in names] + [("shapiq: " + name, theirs, name) for name in SHAPIQ]
    print(f"relative L2 error, mean of {seeds} seeds; evaluations {' / '.join(f'{t}n' for t in TIMES)}", flush=True)
    for title, (game, truth) in games_of_the_bench().items():
        print(title, flush=True)
        for label, run, name in rows:
            errors = []
            for times in TIMES:
                found = [run(name, times * len(truth), seed, len(truth), game) for seed in range(seeds)]
                off = [np.linalg.norm(v - truth) / np.linalg.norm(truth) for v in found if v is not None]
                errors.append(f"{np.mean(off):.3f}" if len(off) == seeds else "–")
            print(f"  {label:<32} {' / '.join(errors)}", flush=True)
