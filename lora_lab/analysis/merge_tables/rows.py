"""The rows of a comparison of merges: each task's, means over tasks, over sets, and over the sets of a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lora_lab.analysis.merge_tables.coefficients import SetScores, loss
from lora_lab.analysis.merge_tables.verdicts import NO_DIFFERENCE, Group, Row
from lora_lab.geometry.nulls import NULLS
from lora_lab.results.result import grouped
from lora_lab.results.stats import ADDED, Floats, Sampled, around, interval, mean_and_spread, proportion
from lora_lab.tasks.scores.judging import Judge, all_shares, one_metric, share
from lora_lab.tasks.task import Scores


def measured(
    head: Row,
    who: Sequence[tuple[str, str]],
    scores: SetScores,
    alone: SetScores,
    by: Sequence[Judge],
    seed: int,
) -> tuple[list[Row], Row]:
    """A row for each task, and the row of the mean over them; `who`: task and adapter of each member.

    A task's share of right answers has the interval of `proportion`; its share of the adapter's own, and the means over
    tasks, a bootstrap one, which of a metric that is no mean of examples resamples `Metric.influence`. Of the examples
    added to outcomes (see `Sampled.of`), each of the tasks of a mean gets its part.
    """
    rows: list[Row] = []
    means: dict[str, list[tuple[Floats, Floats]]] = {}
    pairs = list(zip(who, alone, scores, by, strict=False))
    for (task, adapter), own, scored, judge in pairs:
        row: Row = {**head, "task": task, "adapter": adapter, "loss": loss(scored), **_NOTHING}
        row |= zip(_names(judge.name), _estimated(judge, scored, seed), strict=True)
        how = {"normalised": share} if judge.shares else {"lost": _lost(judge)}
        for key, function in how.items():
            row |= _cells(key, *(function(*part) for part in _both(judge, scored, own, ADDED, seed)))
        rows.append(row)
        of_task, samples = _both(judge, scored, own, ADDED / len(pairs), seed)
        told = {judge.name: lambda scored, own: scored} if one_metric(by) else {}
        told |= how if all_shares(by) or one_metric(by) else {}
        for key, function in told.items():
            means.setdefault(key, []).append((function(*of_task), function(*samples)))
    whole: Row = {**head, "loss": float(np.mean([row["loss"] for row in rows])), **_NOTHING}
    for key, parts in means.items():
        whole |= _cells(key, *(np.mean([part[k] for part in parts], axis=0) for k in (0, 1)))
    names = [end for judge in by for end in _names(judge.name)]
    return [{**dict.fromkeys(names), **row} for row in rows], {**dict.fromkeys(names), **whole}


def by_example(scores: SetScores, alone: SetScores, by: Sequence[Judge]) -> list[Floats]:
    """For each task numbers of its examples that vary as the mean share of the adapters' own does.

    Of a share s/o of a task it is (s(x) − s·o(x)/o) / o, divided by how many tasks there are; nothing of other metrics.
    """
    if not all_shares(by):
        return []
    found = []
    for own, scored, judge in zip(alone, scores, by, strict=True):
        s, o = (judge.outcomes(each).astype(np.float64) for each in (scored, own))
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append((s - s.mean() * o / o.mean()) / o.mean() / len(by))
    return found


def _names(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


_NOTHING: Row = dict.fromkeys((*_names("normalised"), *_names("lost")))


def _lost(judge: Judge) -> Callable[[Floats, Floats], Floats]:
    return lambda scored, own: -judge.better(scored, own)


def _estimated(judge: Judge, scored: Sequence[Scores], seed: int) -> tuple[float, float, float]:
    outcomes = judge.outcomes(scored)
    if judge.metric.of_outcomes(outcomes):
        return proportion(outcomes)
    return Sampled.of(outcomes[None].astype(np.float64), seed=seed).estimate(lambda means: means[0])


def _both(
    judge: Judge, scored: Sequence[Scores], own: Sequence[Scores], added: float, seed: int
) -> tuple[Floats, Floats]:
    """Means, [2, 1], and resampled means, [2, resamples], of the outcomes of a merge and of the adapter alone."""
    same = all(a is b for a, b in zip(scored, own, strict=True)) if len(scored) == len(own) else False
    values = [judge.outcomes(scored)] if same else [judge.outcomes(scored), judge.outcomes(own)]
    of_each = [judge.outcomes([each]) for each in (*scored, *own)]
    right_or_wrong = all(each.dtype == np.bool_ for each in of_each)
    sampled = Sampled.of(np.stack(values), seed=seed, added=added if right_or_wrong else 0.0)
    both = sampled[[0, 0] if same else [0, 1]]
    return both.means, both.samples


def signed(judge: Judge, scored: Sequence[Scores], own: Sequence[Scores], by: Sequence[Judge]) -> Floats:
    """Outcomes of which more is better; of tasks with several metrics as shares of the adapter's own size."""
    outcomes = judge.outcomes(scored).astype(np.float64)
    signed = outcomes if judge.metric.higher else -outcomes
    return signed if one_metric(by) else signed / abs(judge.value(own))


def _cells(key: str, mean: Floats, samples: Floats) -> Row:
    low, high = around(float(mean[0]), interval(samples[np.isfinite(samples)]))
    return {key: float(mean[0]), f"{key}_low": low, f"{key}_high": high}


def by_task(chosen: Sequence[Row], metrics: Sequence[str]) -> list[Row]:
    """Every merge at its chosen coefficients on every task: means and standard deviations over the sets."""
    rows = []
    for head, members in grouped(chosen, "method", "ratio", "merge", "task"):
        row = {**head, "sets": len({each["set"] for each in members}), "category": members[0]["category"]}
        for key in (*metrics, "normalised", "lost"):
            row[key], row[f"{key}_spread"] = _over([each.get(key) for each in members])
        rows.append(row)
    return rows


def _over(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation; None where one is missing."""
    known = [value for value in values if value is not None]
    return mean_and_spread(np.array(known)) if known and len(known) == len(values) else (None, None)


def by_method(
    sets: Sequence[Row], compared: Mapping[Group, Mapping[str, Row]], nulls: Sequence[Row], metrics: Sequence[str]
) -> list[Row]:
    """Mean and standard deviation over the sets of each training method, at the chosen coefficient and at 1.

    With them the difference from the first merge, and the largest p-value against nulls.
    """
    rows = []
    for head, members in grouped(sets, "method", "ratio", "merge"):
        at_best = [row for row in members if row["chosen"]]
        plain = [row for row in members if row["coefficient"] in (None, 1.0)]
        row = {**head, "sets": len(at_best), "at_edge": sum(bool(r["at_edge"]) for r in at_best)}
        row |= {"category": members[0]["category"]}
        for key, over in (("rank", max), ("bytes", max), ("cut_error", np.mean), ("coefficient", np.mean)):
            values = [r[key] for r in at_best]
            row[key] = None if None in values else over(values)
        for key in dict.fromkeys((*metrics, "normalised", "lost", "loss")):
            row[key], row[f"{key}_spread"] = _over([r.get(key) for r in at_best])
            row[f"plain_{key}"], row[f"plain_{key}_spread"] = _over([r.get(key) for r in plain])
        row |= compared.get((head["method"], head["ratio"]), {}).get(head["merge"], NO_DIFFERENCE)
        p = [n["p"] for n in nulls if all(n[k] == head[k] for k in head) and NULLS[n["null"]].random]
        row["p_nulls"] = max(p) if p and None not in p else None
        rows.append(row)
    return rows
