"""Errors of Shapley values at equal work, beside shapiq's: `make bench`.

Games of few players are computed whole, so that their values are exact. Of those that are too large for it, the values
come from a long run of an unbiased estimator, whose own relative error is told: no estimator can be seen to be closer.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from making_games import saturating, table_game

from lora_lab import tasks
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.groups import players
from lora_lab.analysis.coalitions.gates import GatedGame
from lora_lab.errors import OptionError
from lora_lab.games import estimators
from lora_lab.games.coalitions import all_coalitions
from lora_lab.games.gates import Diagonal
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Execution
from lora_lab.scoring.gates import PASSES
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

TIMES = (1, 2, 5, 10)
WORTHS = ("loss", "accuracy")
HALVES = {
    f"{name}{i}": rf"layers\.{i}\..*{pattern}"
    for i in range(6)
    for name, pattern in (("attention", "[qkvo]_proj"), ("mlp", "fc[12]"))
}
OURS = ("permutation", "antithetic", "regression", "gates", "link", "permutation+link", "antithetic+link", "joint")
SHAPIQ = (
    "KernelSHAP",
    "PermutationSamplingSV",
    "OwenSamplingSV",
    "UnbiasedKernelSHAP",
    "SVARM",
    "StratifiedSamplingSV",
)


@dataclass(frozen=True)
class Known:
    """A game whose Shapley values are known."""

    title: str
    game: Any
    values: Any
    error: float = 0.0
    """The values' standard error, over their norm."""
    seeds: int = 20
    rows: Sequence[str] = (*OURS, *SHAPIQ)


class WithGates:
    """A game whose coalitions come from one place, a table, say, and whose gates are a model's, each asked once."""

    def __init__(self, worths: Any, gated: GatedGame) -> None:
        self.worths, self._gated = worths, gated
        self._found: dict[int, Any] = {}

    def along(self, gates: Any, shares: Any, **options: Any) -> Any:
        if len(gates) not in self._found:
            self._found[len(gates)] = self._gated.along(gates, shares, **options)
        return self._found[len(gates)]

    def __call__(self, coalitions: Any) -> Any:
        return self.worths(coalitions)


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


def games_of_the_bench(folder: Path, keep: Path | None, data: Path | None) -> Iterator[Known]:
    """Two games of a formula and those of trained adapters, whose files and scores lie in a folder.

    Large games only where there is a folder to keep them, and of MiniLM with what `make data` wrote.
    """
    place = keep or folder
    for n in (32, 64):
        game = SmoothSaturation(n)
        yield Known(f"{n}, saturating", game, game.values)
    for method in ("lora", "coto"):
        for seed in range(3):
            title = f"{method} {seed}"
            yield from whole_games(f"12 half blocks of digits, {title}", Digits("relabel"), title, place, HALVES)
    if keep is None:
        return
    digits = Digits("relabel")
    yield from long_games("36 modules of digits", digits, "lora 0", keep, "module", examples=100, truth=10_000)
    yield from long_games("144 ranks of digits", digits, "lora 0", keep, "rank", examples=100, truth=20_000)
    if data is None:
        return
    texts = tasks.from_file(data / "part-of-speech.toml")
    yield from whole_games("6 layers of MiniLM", texts, "lora 0", keep, "layer", examples=64)
    yield from long_games("36 modules of MiniLM", texts, "lora 0", keep, "module", examples=32, truth=3_000, seeds=3)


def evaluator_of(task: Any, recipe: str, keep: Path, examples: int | None) -> Evaluator:
    """Of an adapter that is trained unless it lies in the folder; a recipe is a method and a seed."""
    method, seed = recipe.split()
    place = keep / f"{re.sub('[^a-z]+', '-', task.name)}-{method}-{seed}.safetensors"
    if not place.exists():
        train(task, Recipe(method=method, seed=int(seed)))[0].save(place)
    return Evaluator([Adapter.load(place)], task, Execution(cache=keep), examples=examples)


def whole_games(
    title: str, task: Any, recipe: str, keep: Path, by: str | Mapping[str, str], *, examples: int | None = None
) -> Iterator[Known]:
    """Both worths of all coalitions of few players."""
    evaluator = evaluator_of(task, recipe, keep, examples)
    for worth in WORTHS:
        gated = GatedGame(evaluator, players(evaluator.adapters[0], by), worth=worth)
        every = all_coalitions(gated.n_players)
        tell_cost(f"{title}, {worth}", gated, every)
        table = table_game(gated(every))
        yield Known(f"{title}, {worth}", WithGates(table, gated), estimators.exact(table, gated.n_players).values)


def long_games(
    title: str, task: Any, recipe: str, keep: Path, by: str, *, examples: int, truth: int, seeds: int = 5
) -> Iterator[Known]:
    """Both worths of players whose coalitions are computed as they are asked for; `truth` of them tell the values."""
    evaluator = evaluator_of(task, recipe, keep, examples)
    for worth in WORTHS:
        gated = GatedGame(evaluator, players(evaluator.adapters[0], by), worth=worth)
        game = WithGates(gated, gated)
        options = {"estimator": "antithetic+link", "samples": truth, "budget": truth, "seed": 10**6}
        draws = estimators.plan(gated.n_players, **options)
        tell_cost(f"{title}, {worth}", gated, np.concatenate([draw.coalitions for draw in draws]))
        found = estimators.estimate(game, gated.n_players, **options)
        error = float(np.linalg.norm(found.se) / np.linalg.norm(found.values))
        rows = [row for row in OURS if not row.startswith("permutation")]
        yield Known(f"{title}, {worth}", game, found.values, error, seeds, (*rows, "PermutationSamplingSV"))


def tell_cost(title: str, game: GatedGame, coalitions: Any) -> None:
    """Say what a truth will take."""
    cost = game.cost(coalitions)
    print(f"{title}: {cost.variants} coalitions to be scored, about {cost.seconds:.0f} s", flush=True)


def ours(name: str, budget: int, seed: int, n: int, game: Any) -> Any:
    """Values of one of our estimators; None where the budget is too small."""
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
    """Values of one of shapiq's."""
    import shapiq

    found = getattr(shapiq, name)(n=n, random_state=seed).approximate(
        budget=budget, game=lambda coalitions: game(np.atleast_2d(coalitions))
    )
    return np.array([found[(i,)] for i in range(n)])


def mean_error(run: Callable[..., Any], name: str, times: int, known: Known) -> float:
    """Mean over the seeds of ‖v − values‖ / ‖values‖; NaN where there are none."""
    n, seeds = len(known.values), 1 if name in ("gates", "link") else known.seeds  # these draw nothing
    found = [run(name, times * n, seed, n, known.game) for seed in range(seeds)]
    off = [np.linalg.norm(values - known.values) for values in found if values is not None]
    return float(np.mean(off) / np.linalg.norm(known.values)) if len(off) == seeds else math.nan


def bench_estimators(folder: Path, keep: Path | None = None, data: Path | None = None) -> None:
    """Relative L2 error at equal evaluations, mean over seeds, beside shapiq's estimators."""
    estimators._checkpoints = lambda draws: []  # a fit for each point of the trace, of which nothing is shown
    print(f"relative L2 error, mean over seeds; evaluations {' / '.join(f'{t}n' for t in TIMES)}", flush=True)
    for known in games_of_the_bench(folder, keep, data):
        began = time.process_time()
        told = f", of values known to {known.error:.3f}" if known.error else ""
        print(f"{known.title}, {known.seeds} seeds{told}", flush=True)
        for name in known.rows:
            run, label = (ours, "ours") if name in OURS else (theirs, "shapiq")
            errors = [mean_error(run, name, times, known) for times in TIMES]
            cells = " / ".join("–" if math.isnan(error) else f"{error:.3f}" for error in errors)
            print(f"  {label + ': ' + name:<32} {cells}", flush=True)
        print(f"  ({time.process_time() - began:.0f} CPU s)", flush=True)
