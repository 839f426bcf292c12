"""`lora-lab compare-merges`: every merge on every adapter's own task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from lora_lab.analysis.merge_tables.question import CompareMerges
from lora_lab.cli.options import Computing, Output, Several, TaskEach
from lora_lab.cli.outputs import answer
from lora_lab.cli.terminal import console, estimate, number, size, table


def command(
    adapters: Annotated[list[str], typer.Argument(help="Adapters of several tasks, or seeds of one.")],
    question: CompareMerges,
    task: TaskEach,
    loading: Several,
    computing: Computing,
    output: Output,
) -> None:
    """What every merge keeps of every adapter, on the adapter's own task and with its own head.

    Adapters of several tasks are merged in sets: those of one training method and seed, one a task. Adapters of one
    task are seeds, merged in ratios. The coefficient of each merge is chosen on the validation splits, the same for
    all tasks; the table shows the test split at that coefficient, and at 1. A task is judged by its main metric, or
    the first of `--metric` that it has. **normalised** is the share of the adapter's own score, where the metric is
    a share of which more is better; of other metrics **lost** is how much worse it became. Merges come back at
    equal rank, by default that of the adapters; **size** is that of the factors in the file, **cut error** what the
    cut lost of the merged update ΔW. `--rank largest,exact` adds rows without a cut.

    For comparison: the base alone, each task's own adapter (**alone**: what routing without errors gives), and the
    ensemble, which averages the adapters' logits: no merge at all, at the cost of all of them. The last column compares
    every merge with the first one, or the one `--against` names, by paired differences and Holm's correction; what may
    be chance cannot be told.
    `--nulls spectrum` merges with adapters of the same norms and random directions in the place of the others (does
    what the others learnt help?) and of all (does what was learnt matter?): a p-value from 20 draws on, each of which
    costs as much as the merge, with `--quick-nulls` a tenth. `lora-lab merge --methods` lists the merges.

    Example:  lora-lab compare-merges a.safetensors b.safetensors c.safetensors --methods average,ties --nulls spectrum
    """

    def fitting(loaded: Any, tasks: Any) -> dict[str, Any]:
        from lora_lab.merging.sources import base_of

        question.check_sets(loaded, tasks)
        return {"base": base_of(loaded, question.base_name, trust_record=task.trust_record)}

    doing = "merging and scoring"
    output.print(answer(question, adapters, loading, task, computing, output, doing=doing, more=fitting), show)


def show(result: Any) -> None:
    """The result as tables, a line for each merge and columns for each training method; below, what else was found."""
    from lora_lab.results.result import grouped

    means = result.summary["by_method"]
    methods = list(dict.fromkeys(row["method"] for row in means))
    several = max(row["sets"] for row in means) > 1
    first = result.parameters.get("reference")
    headings = ["merge", "rank", "size", "cut error"]
    scores = [name for name in _scores(result) if any(row.get(name) is not None for row in means)]
    for method in methods:
        name = method or "adapters"
        of_method = [*scores, "at coef.", *(f"{each} at 1" for each in scores[:1]), f"less {first}"]
        headings += [f"{'' if i else name}\n{heading}" for i, heading in enumerate(of_method)]
    rows = []
    for head, members in grouped(means, "merge", "ratio"):
        error = members[0].get("cut_error")
        cells = [_named(head), members[0].get("rank"), _size(members[0]), error if error is None else f"{error:.2g}"]
        for method in methods:
            row = next((r for r in members if r["method"] == method), None)
            cells += [*_cells(result, row, scores), _verdict(row)] if row else ["–"] * len(of_method)
        rows.append(cells)
    n = result.provenance["examples"]
    spread = "mean ± s.d. over sets, or [95 % interval] of one" if several else "95 % intervals"
    where = ", ".join(result.parameters["task_names"])
    table(f"Merges on {where} ({result.parameters['split']} split, {n} examples; {spread})", headings, rows)
    _show_tasks(result, methods, first)
    _show_nulls(result, methods)
    _show_notes(result, means)


def _scores(result: Any) -> list[str]:
    """The columns that say how good a merge is: metrics, and what is kept of the adapters alone."""
    from lora_lab.results.rows import metrics_of

    return [*metrics_of(result.parameters), "normalised", "lost"]


def _show_tasks(result: Any, methods: list[Any], first: str | None) -> None:
    """Every merge on every task of several, at the chosen coefficients."""
    from lora_lab.results.result import grouped

    rows = result.summary.get("by_task", [])
    if len({row["task"] for row in rows}) < 2:
        return
    for method in methods:
        of_method = [row for row in rows if row["method"] == method]
        tasks, scores = list(dict.fromkeys(row["task"] for row in of_method)), _scores(result)
        shown = []
        for head, members in grouped(of_method, "merge", "ratio"):
            found = {row["task"]: row for row in members}
            shown.append([_named(head), *(_task_cell(found.get(task), scores) for task in tasks)])
        console.print()
        title = f"{method or 'adapters'}: each task by its metric, and beside the adapter alone (mean ± s.d. over sets)"
        table(title, ["merge", *tasks], shown)


def _task_cell(row: Mapping[str, Any] | None, scores: list[str]) -> str:
    if row is None:
        return "–"
    known = [name for name in scores if row.get(name) is not None]
    texts = [number(row[name]) + (f" ± {number(row[f'{name}_spread'])}" if row["sets"] > 1 else "") for name in known]
    words = {"normalised": "× alone", "lost": "lost"}
    return ", ".join(f"{text} {words.get(name, name)}" for name, text in zip(known, texts, strict=True))


def _show_nulls(result: Any, methods: list[Any]) -> None:
    """What merges of nulls keep, beside those of the adapters."""
    from lora_lab.results.result import grouped

    nulls = result.summary.get("nulls", [])
    if not nulls:
        return
    headings = ["merge", "null", "in the place of"]
    for method in methods:
        headings += [f"{method or 'adapters'}\nadapters", "\nnull [95 % of draws]", "\np", "\nand"]
    rows = []
    for head, members in grouped(nulls, "merge", "ratio", "null", "replaced"):
        cells = [_named(head), head["null"], head["replaced"]]
        for method in methods:
            row = next((r for r in members if r["method"] == method), None)
            if row is None:
                cells += ["–"] * 4
                continue
            kept = estimate(row["normalised"], row["normalised_low"], row["normalised_high"])
            p = "–" if row["p"] is None else f"{row['p']:.2g}"
            cells += [number(row["of_adapters"]), kept, p, row["verdict"] or "–"]
        rows.append(cells)
    console.print()
    table("What is kept with nulls in the place of adapters", headings, rows, texts=3)
    if result.parameters.get("quick_nulls"):
        console.print(
            "nulls at the adapters' coefficients, which favours the adapters: p-values of being above are low"
        )
    for why in dict.fromkeys(row["why"] for row in nulls if row["why"]):
        console.print(f"no p-value: {why}")


def _show_notes(result: Any, means: list[dict[str, Any]]) -> None:
    """What is to be known of the table."""
    if any(row["at_edge"] for row in means):
        console.print("* in some sets the best coefficient lies at the edge of those that were tried")
    for name, others in result.parameters.get("stands_for", {}).items():
        console.print(f"{name} stands for {' and '.join(others)}, too: the same sum at another coefficient")
    starts = [row for row in result.summary.get("shared_initial_A", []) if row["cosine"] is not None]
    words = {True: "shared", False: "separate", None: "shared by some"}
    for told in dict.fromkeys(words[row["shared"]] for row in starts):
        those = [row for row in starts if words[row["shared"]] == told]
        where = "every set" if len(those) == len(starts) else f"{len(those)} of {len(starts)} sets"
        cosine, z = (sum(row[key] for row in those) / len(those) for key in ("cosine", "z"))
        console.print(f"initial A of the adapters of {where}: {told} (mean cosine {cosine:.2f}, z = {z:.1f})")
    for why in dict.fromkeys((row["merge"], row["why"]) for row in result.summary["skipped"]):
        console.print(f"left out: {why[0]}: {why[1]}")


def _named(head: Mapping[str, Any]) -> str:
    return f"{head['merge']} {head['ratio']}" if head["ratio"] else str(head["merge"])


def _size(row: Mapping[str, Any]) -> str:
    return "–" if row.get("bytes") is None else size(row["bytes"])


def _verdict(row: Mapping[str, Any]) -> str:
    """A difference with its interval, and what can be told of it."""
    if row.get("verdict") is None:
        return "–"
    ends = (f"{row[key]:+.3f}" for key in ("difference", "difference_low", "difference_high"))
    return "{} [{}, {}] {}".format(*ends, row["verdict"])


def _cells(result: Any, row: Mapping[str, Any], scores: list[str]) -> list[str]:
    if row["sets"] > 1:
        shown = [f"{number(row[k])} ± {number(row[f'{k}_spread'])}" if row[k] is not None else "–" for k in scores]
    else:
        found = next(
            r
            for r in result.summary["sets"]
            if r["chosen"] and all(r[key] == row[key] for key in ("merge", "method", "ratio"))
        )
        shown = [estimate(found[k], found.get(f"{k}_low"), found.get(f"{k}_high")) for k in scores]
    plain = [] if not scores else ["–" if row["coefficient"] is None else number(row[f"plain_{scores[0]}"])]
    if row["coefficient"] is None:
        return [*shown, "–", *plain]
    return [*shown, f"{row['coefficient']:.2g}" + ("*" if row["at_edge"] else ""), *plain]
