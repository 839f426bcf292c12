"""What does each part of an adapter contribute? Shapley values of its players, with all their uncertainties."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_lab import files
from lora_lab.adapters.adapter import SIGNATURE_KEY, Adapter
from lora_lab.adapters.describe import described, identity, labels_of, method_of
from lora_lab.adapters.groups import players
from lora_lab.analysis.game import Cost, Game, Progress, game_of, measured
from lora_lab.errors import LoraLabError, OptionError, unknown
from lora_lab.games import estimators, interactions
from lora_lab.games.estimators import EXACT_LIMIT, Bools, Estimate, all_coalitions
from lora_lab.results.result import Result, columns, fingerprint, finite, grouped
from lora_lab.results.stats import INTERVALS, Floats, mean_and_error, mean_and_spread, student
from lora_lab.scoring.examples import examples_of
from lora_lab.scoring.workers import Workers
from lora_lab.tasks.task import Task

SHAPIQ = "shapiq:"


def shapley(
    adapters: Sequence[Adapter],
    task: Task,
    *,
    by: str | Mapping[str, str] = "layer",
    worth: str = "accuracy",
    estimator: str | None = None,
    samples: int = 200,
    until_se: float | None = None,
    budget: int | None = None,
    order: int = 1,
    split: str = "test",
    examples: int | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    confirm: Callable[[Cost], None] | None = None,
    workers: Workers | None = None,
) -> Result:
    """Shapley values of every adapter's players (see `players`), each from its own game.

    Without an `estimator`, all coalitions are enumerated where that takes fewer block evaluations than `samples`
    antithetic orders, which are taken otherwise. Every value has the standard error of its choice of coalitions (`se`:
    0 for exact values; `stats.mean_and_error`), that of the examples (`se_examples`), and a 95 % interval from both.
    `order` 2 adds pairwise interactions with intervals of the choice of coalitions alone.
    `confirm` is told the cost before anything is computed.
    """
    check(adapters, by=by, estimator=estimator, order=order, samples=samples, until_se=until_se, budget=budget)
    began = time.perf_counter()
    settings: dict[str, Any] = {
        "by": by if isinstance(by, str) else dict(by),
        "worth": worth,
        "estimator": estimator,
        "samples": samples,
        "until_se": until_se,
        "budget": budget,
        "order": order,
        "options": dict(options or {}),
        "seed": seed,
    }
    data: dict[str, Any] = {"split": split, "examples": examples, "device": device, "cache": cache}
    data |= {"progress": progress, "workers": workers}
    rows: list[dict[str, Any]] = []
    summaries: list[dict[str, Any]] = []
    for adapter, label in zip(adapters, labels_of(adapters), strict=True):
        game = game_of(adapter, task, by, worth=worth, **data)
        chosen = estimator or choose(game, samples=samples, budget=budget, seed=seed)
        if confirm and not summaries:
            confirm(game.cost(_planned(game, chosen, samples, budget, order, seed, options or {})) * len(adapters))
        found = _estimate(game, chosen, samples, until_se, budget, seed, options or {})
        second = _second_opinion(found)
        rows += _rows(adapter, label, game, found, second)
        summaries.append(_summary(adapter, label, game, found, second))
        if order == 2:
            summaries[-1]["interactions"] = _interactions(game, chosen, samples, seed)
    return Result(
        "shapley",
        finite(columns(rows)),
        {
            "task": task.record,
            "split": split,
            "players": settings["by"],
            **{name: value for name, value in settings.items() if name != "by"},
            "adapters": [described(adapter) for adapter in adapters],
        },
        finite({"adapters": summaries, "by_method": _by_method(summaries)}),
        measured(
            game.outcomes, adapters, began=began, run=run_id(adapters, task, split=split, examples=examples, **settings)
        ),
    )


def check(
    adapters: Sequence[Adapter],
    *,
    by: str | Mapping[str, str],
    estimator: str | None = None,
    order: int = 1,
    samples: int = 1,
    until_se: float | None = None,
    budget: int | None = None,
) -> None:
    """Raise what `shapley` would raise for these options, before anything is computed."""
    if not adapters:
        raise OptionError("no adapter was given")
    if order not in (1, 2):
        raise OptionError(f"order {order}: 1 (values) or 2 (pairwise interactions too) can be had")
    if estimator is not None and estimator.startswith(SHAPIQ):
        _approximator(estimator, 3, 0)
    elif estimator is not None and estimator not in ("exact", *estimators.ESTIMATORS):
        raise unknown("estimator", estimator, ["exact", *estimators.ESTIMATORS, "shapiq:NAME"])
    if order == 2 and budget is not None and estimator != "exact":
        raise OptionError("a budget holds for values alone; leave out --budget or --order 2")
    for adapter in adapters:
        count = len(players(adapter, by))
        estimators.check(count, samples=samples, estimator=estimator, until_se=until_se, budget=budget)


def run_id(adapters: Sequence[Adapter], task: Task, *, split: str, **options: Any) -> str:
    """What a run's result hangs on: the adapters, the examples, and the options."""
    return fingerprint(["shapley", INTERVALS, [identity(a) for a in adapters], examples_of(task, split), options])


def choose(game: Game, *, samples: int, budget: int | None = None, seed: int = 0) -> str:
    """ "exact" where all coalitions take no more block evaluations than `samples` antithetic orders do."""
    n = game.n_players
    if n > EXACT_LIMIT or 2**n > 8 * (samples * n + 2) or (budget is not None and 2**n > budget):
        return "antithetic"
    sampled = _coalitions(estimators.plan(n, estimator="antithetic", samples=samples, seed=seed, budget=budget))
    return "exact" if game.blocks(all_coalitions(n)) <= game.blocks(sampled) else "antithetic"


def values_of(
    adapter: Adapter,
    task: Task,
    *,
    by: str | Mapping[str, str] = "layer",
    worth: str = "accuracy",
    samples: int = 200,
    split: str = "validation",
    seed: int = 0,
    **data: Any,
) -> dict[str, float]:
    """Player → Shapley value, by the default estimator; on the validation split, as for choosing.

    `data` are the further options of `Outcomes`.
    """
    game = game_of(adapter, task, by, worth=worth, split=split, **data)
    found = _estimate(game, choose(game, samples=samples, seed=seed), samples, None, None, seed, {})
    return dict(zip(game.player_names, found.values.tolist(), strict=True))


def forecast(
    adapter: Adapter,
    task: Task,
    *,
    by: str | Mapping[str, str] = "layer",
    samples: int = 200,
    split: str = "validation",
    **data: Any,
) -> Cost:
    """What `values_of` would cost."""
    game = game_of(adapter, task, by, split=split, **data)
    return game.cost(_planned(game, choose(game, samples=samples), samples, None, 1, 0, {}))


def newest_adapter(folder: Path) -> Path | None:
    """The newest of the user's own adapters (see trust.py) below `folder`; hidden folders are left out."""
    found: list[tuple[int, str]] = []
    for path in folder.rglob("*.safetensors"):
        if any(part.startswith(".") or part == "site-packages" for part in path.relative_to(folder).parts):
            continue
        with contextlib.suppress(OSError):  # FileError is one, too: of what is no adapter
            metadata = files.read_header(path)[0].get("__metadata__")
            if isinstance(metadata, dict) and SIGNATURE_KEY in metadata:
                found.append((path.stat().st_mtime_ns, str(path)))
    for _, name in sorted(found, reverse=True):
        path = Path(name).parent if Path(name).name == "adapter_model.safetensors" else Path(name)
        with contextlib.suppress(LoraLabError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if Adapter.load(path).origin.own:
                return path
    return None


def _estimate(
    game: Game,
    estimator: str,
    samples: int,
    until_se: float | None,
    budget: int | None,
    seed: int,
    options: Mapping[str, Any],
) -> Estimate:
    n = game.n_players
    if estimator.startswith(SHAPIQ):
        return _by_shapiq(game, estimator, budget or samples * (n - 1) + 2, seed)
    return estimators.estimate(
        game, n, estimator=estimator, samples=samples, seed=seed, until_se=until_se, budget=budget, **options
    )


def _planned(
    game: Game,
    chosen: str,
    samples: int,
    budget: int | None,
    order: int,
    seed: int,
    options: Mapping[str, Any],
) -> Any:
    """All coalitions that the run will at most ask for."""
    n = game.n_players
    if chosen == "exact":
        if n > EXACT_LIMIT:
            raise OptionError(f"2^{n} coalitions are too many to enumerate; --estimator antithetic samples them")
        return all_coalitions(n)
    name = "antithetic" if chosen.startswith(SHAPIQ) else chosen
    draws = estimators.plan(n, estimator=name, samples=samples, seed=seed, budget=budget, **options)
    asked = [_coalitions(draws)]
    if order == 2:
        asked.append(interactions.interaction_coalitions(n, samples=samples, seed=seed))
    return np.concatenate(asked)


def _coalitions(draws: Sequence[estimators.Draw]) -> Any:
    return np.unique(np.concatenate([draw.coalitions for draw in draws]), axis=0)


def _second_opinion(found: Estimate) -> Estimate | None:
    """Another estimate from the same coalitions."""
    if found.estimator in ("exact", "regression") or not len(found.coalitions):
        return None
    return estimators.fit_pairs(found.coalitions, found.worths)


def _rows(adapter: Adapter, label: str, game: Game, found: Estimate, second: Estimate | None) -> list[dict[str, Any]]:
    by_examples = np.full(game.n_players, np.nan)
    if found.weights.any():
        values = found.weights @ game.per_example(found.coalitions)
        by_examples = mean_and_error(values.T)[1]
    by_draws = student(found.draws) * found.se if found.draws > 1 else found.se
    half = np.hypot(by_draws, student(game.outcomes.examples) * by_examples)
    rows = []
    for i, (name, units) in enumerate(game.players.units.items()):
        place = game.players.places.get(name)
        rows.append(
            {
                "adapter": label,
                "method": method_of(adapter, label),
                "seed": adapter.record.get("seed"),
                "player": name,
                "encoder": place.encoder if place else None,
                "type": place.type if place else None,
                "layer": place.layer if place else None,
                "modules": len(units),
                "value": found.values[i],
                "low": found.values[i] - half[i],
                "high": found.values[i] + half[i],
                "se": found.se[i],
                "se_examples": by_examples[i],
                "second": second.values[i] if second else None,
                "second_se": second.se[i] if second else None,
            }
        )
    return rows


def _summary(adapter: Adapter, label: str, game: Game, found: Estimate, second: Estimate | None) -> dict[str, Any]:
    n = game.n_players
    empty, full = game(np.array([[False] * n, [True] * n]))
    outcomes = game.outcomes
    summary = {
        "adapter": label,
        "method": method_of(adapter, label),
        "seed": adapter.record.get("seed"),
        "estimator": found.estimator,
        "draws": found.draws,
        "evaluations": len(found.coalitions),
        "bias": found.bias,
        "full": full,
        "empty": empty,
        "efficiency_gap": abs(float(found.values.sum()) - (full - empty)),
        "largest_se": float(np.nanmax(found.se)) if np.isfinite(found.se).any() else None,
        "trace": found.trace,
        "always_on": list(game.players.left_out),
        **balance(found.values),
        "engine": {
            "block_evaluations": outcomes.effort.computed,
            "naive_block_evaluations": outcomes.evaluated * outcomes.layout.blocks * outcomes.batches,
            "kept_bytes": outcomes.effort.kept_bytes,
            "why_not_shared": outcomes.effort.why_not,
        },
    }
    if second:
        difference = np.abs(second.values - found.values)
        summary["disagreement"] = {
            "estimator": second.estimator,
            "largest": float(difference.max()),
            "player": game.player_names[int(difference.argmax())],
        }
    return summary


def balance(values: Floats) -> dict[str, float]:
    """How evenly contributions are spread: coefficient of variation, and the share of the largest third.

    The coefficient is the sample standard deviation over the players (n − 1), over |mean|. The share is of the sum of
    magnitudes, so that negative contributions count as contributions.
    """
    total = float(np.abs(values).sum())
    mean = float(values.mean())
    third = max(1, round(len(values) / 3))
    return {
        "variation": mean_and_spread(values)[1] / abs(mean) if mean else math.nan,
        "top_third": float(np.sort(np.abs(values))[::-1][:third].sum()) / total if total else math.nan,
    }


def _by_method(summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the adapters of each method."""
    rows = []
    for head, members in grouped(summaries, "method"):
        row: dict[str, Any] = {**head, "adapters": len(members)}
        for name in ("variation", "top_third", "full", "empty"):
            row[name], row[f"{name}_spread"] = mean_and_spread(np.array([m[name] for m in members]))
        rows.append(row)
    return rows


def _interactions(game: Game, estimator: str, samples: int, seed: int) -> dict[str, Any]:
    """Pairwise interactions with their standard errors and half widths of their 95 % intervals, of sampling alone."""
    whole = estimator == "exact"
    found = interactions.interactions(game, game.n_players, samples=samples, seed=seed, every=whole)
    parts = {name: getattr(found, name).tolist() for name in ("values", "se", "half")}
    return {"players": game.player_names, **parts, "exact": whole}


def _by_shapiq(game: Game, estimator: str, budget: int, seed: int) -> Estimate:
    """Values by one of shapiq's approximators, which tell neither weights nor standard errors."""
    n = game.n_players
    budget = min(budget, 2**n) if n <= 62 else budget
    asked: dict[bytes, Bools] = {}

    def counted(coalitions: Bools) -> Floats:
        asked.update((row.tobytes(), row) for row in np.atleast_2d(coalitions).astype(np.bool_))
        return game(coalitions)

    try:
        found = _approximator(estimator, n, seed).approximate(budget=budget, game=counted)
    except (ValueError, ImportError, IndexError) as error:
        raise OptionError(f"{estimator} fails with {budget} coalitions: {str(error).partition(chr(10))[0]}") from error
    values = np.array([float(found[(i,)]) for i in range(n)])
    coalitions = np.array(list(asked.values()))
    unknown_weights = np.zeros((n, len(coalitions)))
    nothing = np.full(n, np.nan)
    return Estimate(estimator, values, nothing, coalitions, unknown_weights, game(coalitions), 1)


def _approximator(estimator: str, n: int, seed: int) -> Any:
    try:
        import shapiq
        from shapiq.approximator import Approximator
    except ImportError as error:
        raise OptionError(f"{estimator} needs shapiq: pip install 'lora-lab[shapiq]'") from error
    name = estimator.removeprefix(SHAPIQ)
    known = {
        key: cls
        for key, cls in vars(shapiq).items()
        if isinstance(cls, type) and issubclass(cls, Approximator) and cls is not Approximator
    }
    if name not in known:
        raise unknown("estimator of shapiq", name, sorted(known))
    for options in ({"index": "SV", "max_order": 1}, {"index": "SII", "max_order": 1}, {"max_order": 1}, {}):
        try:
            made = known[name](n=n, random_state=seed, **options)
        except (TypeError, ValueError):
            continue
        except ImportError as error:
            raise OptionError(f"{estimator}: {str(error).partition(chr(10))[0]}") from error
        # of interaction indices, order 1 alone is the Shapley value only where nothing of higher order is taken out
        if made.index == "SV" or (made.index in ("SII", "k-SII") and made.max_order == 1):
            return made
    raise OptionError(f"{estimator} estimates other indices than the Shapley value")
