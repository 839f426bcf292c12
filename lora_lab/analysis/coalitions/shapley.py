"""What does each part of an adapter contribute? Shapley values of its players, with all their uncertainties."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_lab import files
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import described, labels_of, method_of
from lora_lab.adapters.files.writing import SIGNATURE_KEY
from lora_lab.adapters.groups import players
from lora_lab.analysis.coalitions import balance, gates
from lora_lab.analysis.coalitions.gates import GatedGame
from lora_lab.analysis.measured import told
from lora_lab.analysis.questions import Shapley as Shapley
from lora_lab.errors import LoraLabError, OptionError, unknown
from lora_lab.extras import needs
from lora_lab.games import estimators, interactions
from lora_lab.games.coalitions import EXACT_LIMIT, Bools, Draw, Estimate, all_coalitions
from lora_lab.games.gates import check as check_gates
from lora_lab.games.regression import fit_pairs
from lora_lab.results.result import Result, columns, finite, grouped
from lora_lab.results.stats import Floats, Z, mean_and_error, mean_and_spread, student
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Cost, Execution
from lora_lab.tasks.task import Task

SHAPIQ = "shapiq:"


def answer(question: Shapley, adapters: Sequence[Adapter], task: Task, on: Execution) -> Result:
    """The values of every adapter's players; the cost of all is told before anything is computed."""
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    summaries: list[dict[str, Any]] = []
    behind: dict[str, list[Floats]] = {}
    for i, (adapter, label) in enumerate(zip(adapters, labels_of(adapters), strict=True)):
        game = _game(question, adapter, task, on.part(i, len(adapters)))
        if _has_gates(question.estimator):
            gates.check(adapter, game.worth)
        estimator = choose(question, game)
        if on.confirm and not summaries:
            on.confirm(_cost(question, game, estimator) * len(adapters))
        estimate = _estimate(question, game, estimator)
        second = _second_opinion(estimate)
        of_examples = _of_examples(game, estimate)
        rows += _rows(adapter, label, game, estimate, second, of_examples)
        for name, found in balance.behind(estimate.values, of_examples).items() if on.by_example else ():
            behind.setdefault(name, []).append(found)
        summaries.append(_summary(adapter, label, game, estimate, second))
        if question.order == 2:
            summaries[-1]["interactions"] = _interactions(question, game, whole=_whole(estimator))
    for name, each in behind.items():
        if on.by_example and len(each) == len(adapters):
            on.by_example(name, each)
    return Result(
        question.kind,
        finite(columns(rows)),
        {"task": task.record, **question.record, **_of_worth(game), "adapters": [described(a) for a in adapters]},
        finite({"adapters": summaries, "by_method": _by_method(summaries)}),
        game.evaluator.provenance(adapters, began=began, run=question.run_id(adapters, task)),
    )


def check(question: Shapley, adapters: Sequence[Adapter]) -> None:
    """Raise what `answer` would raise for this question about these adapters."""
    estimator = question.estimator
    if estimator is not None and estimator.startswith(SHAPIQ):
        _approximator(estimator, 3, 0)
    elif estimator is not None and estimator not in estimators.ESTIMATORS:
        raise unknown("estimator", estimator, [*estimators.ESTIMATORS, "shapiq:NAME"])
    _check_options(question)
    if _has_gates(estimator):
        check_gates(**question.options)
        for adapter in adapters:
            gates.check(adapter, question.worth)
    if question.order == 2 and question.budget is not None and not _whole(estimator):
        raise OptionError("a budget holds for values alone; leave out the budget, or the interactions (order 2)")
    for adapter in adapters:
        estimators.check(
            len(players(adapter, question.players)),
            samples=question.samples,
            estimator=estimator,
            until_se=question.until_se,
            budget=question.budget,
        )


def _check_options(question: Shapley) -> None:
    """OptionError for an option that the estimator does not have."""
    entry = estimators.ESTIMATORS.get(question.estimator)
    names = list(entry.options if entry else {})
    for name in question.options:
        if name not in names:
            of = question.estimator or "the default estimator"
            raise unknown(f"option of {of}", name, names) if names else OptionError(f"{of} has no options to set")


def choose(question: Shapley, game: GatedGame) -> str:
    """The estimator: by default "exact" where that takes no more block evaluations than as many samples do.

    Else it is "joint" where the players have gates, and "antithetic" where they have none.
    """
    if question.estimator:
        return question.estimator
    n, budget = game.n_players, question.budget
    otherwise = "antithetic" if game.why_no_gates else "joint"
    if n > EXACT_LIMIT or 2**n > 8 * (question.samples * n + 2) or (budget is not None and 2**n > budget):
        return otherwise
    sampled = _coalitions(
        estimators.plan(n, estimator=otherwise, samples=question.samples, seed=question.seed, budget=budget)
    )
    return "exact" if game.blocks(all_coalitions(n)) <= game.blocks(sampled) else otherwise


def values(
    question: Shapley, adapter: Adapter, task: Task, on: Execution, evaluator: Evaluator | None = None
) -> dict[str, float]:
    """Player → Shapley value, asked of an evaluator of the adapter where one is at hand."""
    game = _game(question, adapter, task, on, evaluator)
    estimator = choose(question, game)
    if on.confirm:
        on.confirm(_cost(question, game, estimator))
    estimate = _estimate(question, game, estimator)
    return dict(zip(game.player_names, estimate.values.tolist(), strict=True))


def cost(question: Shapley, adapter: Adapter, task: Task, on: Execution, evaluator: Evaluator | None = None) -> Cost:
    """What the values of one adapter would cost."""
    game = _game(question, adapter, task, on, evaluator)
    return _cost(question, game, choose(question, game))


def why_not(question: Shapley, evaluator: Evaluator) -> str | None:
    """Why an estimator has nothing to ask the evaluator's adapter for, or None."""
    game = _game(question, evaluator.adapter, evaluator.task, evaluator.on, evaluator)
    return game.why_no_gates if _has_gates(question.estimator) else None


def newest_adapter(folder: Path) -> Path | None:
    """The newest of the user's own adapters (see trust.py) below `folder`; hidden folders are left out."""
    candidates: list[tuple[int, str]] = []
    for path in folder.rglob("*.safetensors"):
        if any(part.startswith(".") or part == "site-packages" for part in path.relative_to(folder).parts):
            continue
        with contextlib.suppress(OSError):  # FileError is one, too: of what is no adapter
            metadata = files.read_header(path)[0].get("__metadata__")
            if isinstance(metadata, dict) and SIGNATURE_KEY in metadata:
                candidates.append((path.stat().st_mtime_ns, str(path)))
    for _, name in sorted(candidates, reverse=True):
        path = Path(name).parent if Path(name).name == "adapter_model.safetensors" else Path(name)
        with contextlib.suppress(LoraLabError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if Adapter.load(path).origin.own:
                return path
    return None


def _of_worth(game: GatedGame) -> dict[str, Any]:
    """The worth, and of a metric what it is."""
    return {"worth": game.worth, "metrics": told({game.worth: game.metric}) if game.metric else {}}


def _game(
    question: Shapley, adapter: Adapter, task: Task, on: Execution, evaluator: Evaluator | None = None
) -> GatedGame:
    evaluator = evaluator or Evaluator([adapter], task, on, split=question.split, examples=question.examples)
    return GatedGame(evaluator, players(adapter, question.players), worth=question.worth)


def _estimate(question: Shapley, game: GatedGame, estimator: str) -> Estimate:
    n, samples, budget = game.n_players, question.samples, question.budget
    if estimator.startswith(SHAPIQ):
        return _by_shapiq(game, estimator, budget or samples * (n - 1) + 2, question.seed)
    return estimators.estimate(
        game,
        n,
        estimator=estimator,
        samples=samples,
        seed=question.seed,
        until_se=question.until_se,
        budget=budget,
        **question.options,
    )


def _cost(question: Shapley, game: GatedGame, estimator: str) -> Cost:
    """Of all coalitions that the run will at most ask for, and of the gates."""
    cost = game.cost(_planned(question, game, estimator))
    if _has_gates(estimator) and game.n_players > 1:
        cost += game.cost_along(estimators.ESTIMATORS[estimator].passes(question.options))
    return cost


def _planned(question: Shapley, game: GatedGame, estimator: str) -> Bools:
    """All coalitions that the run will at most ask for."""
    n, samples, seed = game.n_players, question.samples, question.seed
    name = "antithetic" if estimator.startswith(SHAPIQ) else estimator
    draws = estimators.plan(n, estimator=name, samples=samples, seed=seed, budget=question.budget, **question.options)
    asked = [_coalitions(draws)]
    if question.order == 2 and not _whole(estimator):
        asked.append(interactions.interaction_coalitions(n, samples=samples, seed=seed))
    return np.concatenate(asked)


def _whole(estimator: str | None) -> bool:
    entry = estimators.ESTIMATORS.get(estimator)
    return bool(entry and entry.whole)


def _has_gates(estimator: str | None) -> bool:
    entry = estimators.ESTIMATORS.get(estimator)
    return bool(entry and entry.passes({}))


def _coalitions(draws: Sequence[Draw]) -> Bools:
    if len(draws) == 1:
        return draws[0].coalitions
    return np.unique(np.concatenate([draw.coalitions for draw in draws]), axis=0)


def _second_opinion(estimate: Estimate) -> Estimate | None:
    """Another estimate from the same coalitions."""
    entry = estimators.ESTIMATORS.get(estimate.estimator)
    if (entry and (entry.whole or entry.fit)) or not len(estimate.coalitions):
        return None
    return fit_pairs(estimate.coalitions, estimate.worths)


def _of_examples(game: GatedGame, estimate: Estimate) -> Floats | None:
    """The value of every player on each example alone, v_i = Σ_S w_iS · worth(S), [players, examples].

    Its spread over the examples is that of the value. None where the estimator does not tell.
    """
    if not estimate.weights.any():
        return game.by_example
    found: Floats = estimate.weights @ game.per_example(estimate.coalitions)
    return found if estimate.known_of is None else found + estimate.known_of


def _rows(
    adapter: Adapter,
    label: str,
    game: GatedGame,
    estimate: Estimate,
    second: Estimate | None,
    of_examples: Floats | None,
) -> list[dict[str, Any]]:
    # the half width joins both sources: √((t·se of the draws)² + (t·se of the examples)²)
    by_examples = np.full(game.n_players, np.nan) if of_examples is None else mean_and_error(of_examples.T)[1]
    by_draws = (student(estimate.draws) if estimate.draws > 1 else Z) * estimate.se
    half = np.hypot(by_draws, student(game.evaluator.examples) * by_examples)
    rows = []
    for i, (name, units) in enumerate(game.players.units.items()):
        where = game.players.places.get(name)
        rows.append(
            {
                "adapter": label,
                "method": method_of(adapter, label),
                "seed": adapter.record.get("seed"),
                "player": name,
                "encoder": where.encoder if where else None,
                "type": where.type if where else None,
                "layer": where.layer if where else None,
                "modules": len(units),
                "value": estimate.values[i],
                "low": estimate.values[i] - half[i],
                "high": estimate.values[i] + half[i],
                "se": estimate.se[i],
                "se_examples": by_examples[i],
                "second": second.values[i] if second else None,
                "second_se": second.se[i] if second else None,
                "gates": game.values[i] if game.values is not None else None,
            }
        )
    return rows


def _summary(
    adapter: Adapter, label: str, game: GatedGame, estimate: Estimate, second: Estimate | None
) -> dict[str, Any]:
    n = game.n_players
    empty, full = game(np.array([[False] * n, [True] * n]))
    evaluator = game.evaluator
    summary = {
        "adapter": label,
        "method": method_of(adapter, label),
        "seed": adapter.record.get("seed"),
        "estimator": estimate.estimator,
        "draws": estimate.draws,
        "evaluations": len(estimate.coalitions),
        "bias": estimate.bias,
        "full": full,
        "empty": empty,
        "efficiency_gap": abs(float(estimate.values.sum()) - (full - empty)),
        "largest_se": float(np.nanmax(estimate.se)) if np.isfinite(estimate.se).any() else None,
        "trace": estimate.trace,
        "always_on": list(game.players.left_out),
        **balance.balance(estimate.values),
        "engine": {
            "block_evaluations": evaluator.effort.computed,
            "naive_block_evaluations": evaluator.evaluated * evaluator.layout.blocks * evaluator.batches,
            "kept_bytes": evaluator.effort.kept_bytes,
            "why_not_shared": evaluator.effort.why_not,
        },
    }
    if game.values is not None:
        summary["gates"] = gates.summed_up(game, estimate.values, full - empty)
    if second:
        difference = np.abs(second.values - estimate.values)
        summary["disagreement"] = {
            "estimator": second.estimator,
            "largest": float(difference.max()),
            "player": game.player_names[int(difference.argmax())],
        }
    return summary


def _by_method(summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the adapters of each method."""
    rows = []
    for head, members in grouped(summaries, "method"):
        row: dict[str, Any] = {**head, "adapters": len(members)}
        for name in ("variation", "top_third", "full", "empty"):
            row[name], row[f"{name}_spread"] = mean_and_spread(np.array([m[name] for m in members]))
        rows.append(row)
    return rows


def _interactions(question: Shapley, game: GatedGame, *, whole: bool) -> dict[str, Any]:
    """Pairwise interactions with their standard errors and half widths of their 95 % intervals, of sampling alone."""
    pairs = interactions.interactions(game, game.n_players, samples=question.samples, seed=question.seed, every=whole)
    parts = {name: getattr(pairs, name).tolist() for name in ("values", "se", "half")}
    return {"players": game.player_names, **parts, "exact": whole}


def _by_shapiq(game: GatedGame, estimator: str, budget: int, seed: int) -> Estimate:
    """Values by one of shapiq's approximators, which tell neither weights nor standard errors."""
    n = game.n_players
    budget = min(budget, 2**n) if n <= 62 else budget
    asked: dict[bytes, Bools] = {}

    def counted(coalitions: Bools) -> Floats:
        asked.update((row.tobytes(), row) for row in np.atleast_2d(coalitions).astype(np.bool_))
        return game(coalitions)

    try:
        indices = _approximator(estimator, n, seed).approximate(budget=budget, game=counted)
    except (ValueError, ImportError, IndexError) as error:
        raise OptionError(f"{estimator} fails with {budget} coalitions: {str(error).partition(chr(10))[0]}") from error
    values = np.array([float(indices[(i,)]) for i in range(n)])
    coalitions = np.array(list(asked.values()))
    unknown_weights = np.zeros((n, len(coalitions)))
    nothing = np.full(n, np.nan)
    return Estimate(estimator, values, nothing, coalitions, unknown_weights, game(coalitions), 1)


def _approximator(estimator: str, n: int, seed: int) -> Any:
    with needs("shapiq", estimator):
        import shapiq
        from shapiq.approximator import Approximator
    name = estimator.removeprefix(SHAPIQ)
    approximators = {
        key: cls
        for key, cls in vars(shapiq).items()
        if isinstance(cls, type) and issubclass(cls, Approximator) and cls is not Approximator
    }
    if name not in approximators:
        raise unknown("estimator of shapiq", name, sorted(approximators))
    for options in ({"index": "SV", "max_order": 1}, {"index": "SII", "max_order": 1}, {"max_order": 1}, {}):
        try:
            made = approximators[name](n=n, random_state=seed, **options)
        except (TypeError, ValueError):
            continue
        except ImportError as error:
            raise OptionError(f"{estimator}: {str(error).partition(chr(10))[0]}") from error
        # of interaction indices, order 1 alone is the Shapley value only where nothing of higher order is taken out
        if made.index == "SV" or (made.index in ("SII", "k-SII") and made.max_order == 1):
            return made
    raise OptionError(f"{estimator} estimates other indices than the Shapley value")
