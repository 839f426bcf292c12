"""How much of an adapter can be pruned away? All patterns, sparsities and ranks, each beside a random control."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import described, identity, labels_of, method_of
from lora_lab.analysis.game import Cost, Outcomes, Progress, measured
from lora_lab.analysis.shapley import forecast, values_of
from lora_lab.errors import AdapterError, OptionError, TunerError, unknown
from lora_lab.pruning import patterns, prune
from lora_lab.pruning.patterns import Choice
from lora_lab.results.result import Result, columns, fingerprint, finite, grouped
from lora_lab.results.stats import INTERVALS, Floats, Sampled, half_width, mean_and_spread, proportion
from lora_lab.scoring.examples import examples_of
from lora_lab.scoring.prefixes import Variant
from lora_lab.scoring.scorer import Make
from lora_lab.scoring.workers import Workers
from lora_lab.tasks.task import Scores, Task

KINDS = ("structured", "unstructured", "rank")
SPARSITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
CRITERIA = ("magnitude", "random")

Row = dict[str, Any]


@dataclass(frozen=True)
class _Other:
    """A draw that is another adapter, by the key under which its scores are kept."""

    key: str
    make: Make


Piece = tuple[Row, list[_Other | Callable[[], Scores]]]
"""What a row says of itself, and how to get the scores of each of its draws."""


def sweep(
    adapters: Sequence[Adapter],
    task: Task,
    *,
    kinds: Sequence[str] = KINDS,
    sparsities: Sequence[float] = SPARSITIES,
    criteria: Sequence[str] = CRITERIA,
    per_matrix: bool = False,
    draws: int = 5,
    split: str = "test",
    examples: int | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    confirm: Callable[[Cost], None] | None = None,
    workers: Workers | None = None,
) -> Result:
    """Accuracy and loss of every adapter pruned in every way; several adapters are summed up by method.

    structured: patterns of modules kept (fixed ones; half of the layers by norm, and by Shapley values computed on the
    validation split; as many random layers). unstructured: `criteria` at `sparsities`. rank: each lower rank by
    SVD, by the largest units, and random units. Random rows are means over `draws`; every number has a 95 % interval.
    """
    check(adapters, kinds=kinds, sparsities=sparsities, criteria=criteria, draws=draws)
    began = time.perf_counter()
    data: dict[str, Any] = {"examples": examples, "device": device, "cache": cache, "workers": workers}
    rows: list[Row] = []
    done = 0
    for adapter, label in zip(adapters, labels_of(adapters), strict=True):
        outcomes = Outcomes(adapter, task, split=split, **data)
        shapley = functools.partial(values_of, adapter, task, **data)  # on the validation split
        choice = replace(patterns.choice_of(adapter, seed=seed), shapley=shapley)
        pieces: list[Piece] = []
        if "structured" in kinds:
            pieces += _structured(outcomes, choice, draws)
        if "unstructured" in kinds:
            pieces += _unstructured(sparsities, criteria, per_matrix, draws, seed)
        if "rank" in kinds:
            pieces += _ranks(adapter, draws, seed)
        total = sum(len(made) for _, made in pieces) * len(adapters)
        if confirm and not rows:
            blocks = total * outcomes.batches * outcomes.layout.blocks
            plain = Cost(total, blocks, blocks, outcomes.seconds(total))
            choosing = forecast(adapter, task, **data) * len(adapters) if "structured" in kinds else plain * 0
            confirm(plain + choosing)
        others = [draw for _, made in pieces for draw in made if isinstance(draw, _Other)]
        report = functools.partial(_report, progress, done, total)
        found = outcomes.of_others({draw.key: draw.make for draw in others}, progress=report)
        done += len(others)
        scored: list[tuple[Row, list[Scores]]] = []
        for head, made in pieces:
            scores = []
            for draw in made:
                if isinstance(draw, _Other):
                    scores.append(found[draw.key])
                    continue
                scores.append(draw())
                done += 1
                if progress:
                    progress(done, total)
            scored.append((head, scores))
        who = {"adapter": label, "method": method_of(adapter, label), "seed": adapter.record.get("seed")}
        reach = _reach([scores for _, scores in scored])
        rows += [{**who, **head, "draws": len(each), **_cells(each, reach, seed)} for head, each in scored]
    settings = {
        "kinds": list(kinds),
        "sparsities": list(sparsities),
        "criteria": list(criteria),
        "per_matrix": per_matrix,
        "draws": draws,
        "examples": examples,
        "seed": seed,
    }
    return Result(
        "sweep",
        finite(columns(rows)),
        {"task": task.record, "split": split, **settings, "adapters": [described(adapter) for adapter in adapters]},
        finite({"by_method": _by_method(rows)}),
        measured(outcomes, adapters, began=began, run=run_id(adapters, task, split=split, **settings)),
    )


def check(
    adapters: Sequence[Adapter],
    *,
    kinds: Sequence[str],
    sparsities: Sequence[float],
    criteria: Sequence[str],
    draws: int,
) -> None:
    """Raise what `sweep` would raise for these options, before anything is computed."""
    if not adapters:
        raise OptionError("no adapter was given")
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("kind of pruning", kind, KINDS)
    for name in criteria:
        if name not in prune.WEIGHTS:
            raise unknown("criterion", name, prune.WEIGHTS)
    wrong = [s for s in sparsities if not 0 <= s <= 1]
    if wrong:
        raise OptionError(f"sparsity {wrong[0]} is outside of 0 to 1")
    if "unstructured" in kinds and 1 in sparsities:
        for adapter in adapters:
            if adapter.why_not_additive:
                raise OptionError(
                    f"{adapter.source}: at sparsity 1 nothing of {adapter.tuner} is left; a lower one is needed"
                )
    if draws < 1:
        raise OptionError(f"{draws} random draws; at least 1 is needed")
    needs_delta = "unstructured" in kinds and any(prune.needs_delta(name) for name in criteria)
    if needs_delta or list(kinds) == ["rank"]:
        for adapter in adapters:
            adapter.require_additive()


def _report(progress: Progress | None, before: int, total: int, done: int, _: int) -> None:
    if progress:
        progress(before + done, total)


def run_id(adapters: Sequence[Adapter], task: Task, *, split: str, **options: Any) -> str:
    """What a run's result hangs on: the adapters, the examples, and the options."""
    return fingerprint(["sweep", INTERVALS, [identity(a) for a in adapters], examples_of(task, split), options])


def _structured(outcomes: Outcomes, choice: Choice, draws: int) -> list[Piece]:
    fixed = patterns.fixed(choice)
    count, total = len(choice.players), len(outcomes.names)
    picks = {name: [modules] for name, modules in fixed.items()}
    if count > 1:
        half, third = count // 2, max(1, count // 3)
        if choice.adapter.why_not_additive is None:
            picks[f"top-norm:{half}"] = [patterns.keep(choice, f"top-norm:{half}")]
        for size in dict.fromkeys((half, third)):
            others = [replace(choice, seed=choice.seed + i) for i in range(draws)]
            picks[f"random:{size}"] = [patterns.keep(other, f"random:{size}") for other in others]

    @functools.cache
    def together() -> dict[Variant, Scores]:
        variants = [outcomes.keeping(modules) for made in picks.values() for modules in made]
        return dict(zip(variants, outcomes.of(variants), strict=True))

    def scored(modules: Sequence[str]) -> Callable[[], Scores]:
        return lambda: together()[outcomes.keeping(modules)]

    pieces: list[Piece] = []
    for name, made in picks.items():
        share = float(np.mean([len(modules) for modules in made])) / total
        pieces.append((_head("structured", name.partition(":")[0], name, share), [scored(m) for m in made]))
    if count > 1 and choice.shapley:
        head = _head("structured", "top-shapley", f"top-shapley:{half}", math.nan)

        def by_shapley() -> Scores:
            kept = patterns.keep(choice, f"top-shapley:{half}")  # computed only now
            head["kept"] = len(kept) / total
            return outcomes.of([outcomes.keeping(kept)])[0]

        pieces.append((head, [by_shapley]))
    return pieces


def _unstructured(
    sparsities: Sequence[float], criteria: Sequence[str], per_matrix: bool, draws: int, seed: int
) -> list[Piece]:
    def other(sparsity: float, by: str, draw: int) -> _Other:
        make = functools.partial(_pruned, sparsity=sparsity, by=by, per_matrix=per_matrix, seed=seed + draw)
        scope = "matrix" if per_matrix else "global"
        return _Other(f"{by}:{scope}:{sparsity!r}:{seed + draw if by == 'random' else 0}", make)

    return [
        (
            _head("unstructured", by, f"{sparsity:g}", 1 - sparsity),
            [other(sparsity, by, draw) for draw in range(draws if by == "random" else 1)],
        )
        for by in criteria
        for sparsity in sparsities
    ]


def _pruned(adapter: Adapter, *, sparsity: float, by: str, per_matrix: bool, seed: int) -> Adapter | None:
    try:
        return prune.prune_weights(adapter, sparsity=sparsity, by=by, per_matrix=per_matrix, seed=seed).adapter
    except AdapterError as error:
        if isinstance(error, TunerError) or adapter.why_not_additive:
            raise  # only of a sum is nothing left the base
        return None


def _ranks(adapter: Adapter, draws: int, seed: int) -> list[Piece]:
    if adapter.why_not_additive:
        return []
    top = max(site.rank or 0 for site in adapter.sites.values())
    total = sum(site.rank or 0 for site in adapter.sites.values())

    def other(rank: int, by: str, draw: int) -> _Other:
        if by == "random":
            make = functools.partial(_random_units, rank=rank, seed=seed + draw)
            return _Other(f"rank:random:{rank}:{seed + draw}", make)
        return _Other(f"rank:{by}:{rank}", functools.partial(_lower_rank, rank=rank, by=by))

    return [
        (
            _head("rank", by, str(rank), sum(min(rank, site.rank or 0) for site in adapter.sites.values()) / total),
            [other(rank, by, draw) for draw in range(draws if by == "random" else 1)],
        )
        for by in [*prune.RANKS, "random"]
        for rank in _some_ranks(top)
    ]


def _lower_rank(adapter: Adapter, *, rank: int, by: str) -> Adapter:
    return prune.prune_rank(adapter, rank=rank, by=by).adapter


def _random_units(adapter: Adapter, *, rank: int, seed: int) -> Adapter:
    generator = np.random.default_rng(seed)
    kept = {}
    for name in sorted(adapter.sites):
        own = adapter.sites[name].rank or 0
        kept[name] = sorted(int(i) for i in generator.permutation(own)[:rank])
    return prune.keep_ranks(adapter, kept)


def _some_ranks(top: int) -> list[int]:
    """1, 2, 4 … and the whole rank; all of them up to 8."""
    return list(range(1, top + 1)) if top <= 8 else sorted({2**i for i in range(top.bit_length())} | {top})


def _head(kind: str, criterion: str, label: str, kept: float) -> Row:
    return {"kind": kind, "criterion": criterion, "label": label, "kept": kept}


def _values(scores: Sequence[Scores], metric: str) -> Floats:
    return np.stack([s.correct.astype(np.float64) if metric == "accuracy" else s.loss for s in scores])


def _reach(rows: Sequence[Sequence[Scores]]) -> dict[str, float]:
    """How far off a draw may be that has not come: as far as any two draws of one row are, or else by one example."""
    metrics = ("accuracy", "loss")
    widest = {m: max((float(np.ptp(_values(scores, m).mean(1))) for scores in rows), default=0.0) for m in metrics}
    return {**widest, "accuracy": max(widest["accuracy"], 1 / len(rows[0][0]) if rows else 0.0)}


def _cells(scores: Sequence[Scores], reach: Mapping[str, float], seed: int) -> Row:
    """Mean over draws; its interval is that over examples, widened by what other draws would have given.

    Over examples: `proportion` for accuracies, a bootstrap for losses. Draws that are all one model add nothing.
    """
    row: Row = {}
    one_model = all((each.loss == scores[0].loss).all() for each in scores)
    for metric in ("accuracy", "loss"):
        values = _values(scores, metric)
        if metric == "accuracy":
            value, low, high = proportion(scores[0].correct if one_model else values.mean(0))
        else:
            value, low, high = Sampled.of(values.mean(0, keepdims=True), seed=seed).estimate(lambda means: means[0])
        _, spread = mean_and_spread(values.mean(1))
        by_draws = 0.0 if one_model else half_width(values.mean(1), reach=reach[metric])
        ends = (value - math.hypot(value - low, by_draws), value + math.hypot(high - value, by_draws))
        if metric == "accuracy":
            ends = (max(0.0, ends[0]), min(1.0, ends[1]))
        row |= {metric: value, f"{metric}_low": ends[0], f"{metric}_high": ends[1], f"{metric}_spread": spread}
    return row


def _by_method(rows: Sequence[Row]) -> list[Row]:
    """Mean and standard deviation over the adapters of each method."""
    found = []
    for row, members in grouped(rows, "method", "kind", "criterion", "label"):
        row |= {"kept": float(np.mean([m["kept"] for m in members])), "adapters": len(members)}
        for metric in ("accuracy", "loss"):
            row[metric], row[f"{metric}_spread"] = mean_and_spread(np.array([m[metric] for m in members]))
        found.append(row)
    return found
