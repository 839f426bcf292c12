"""`lora-lab compare-merges`: every merge on every adapter's own task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import common


def command(
    adapters: Annotated[list[str], typer.Argument(help="Adapters of several tasks, or seeds of one.")],
    methods: Annotated[
        str, typer.Option(help="Names with commas (`lora-lab merge --methods`), NAME:RULE for an inner rule, or all.")
    ] = "all",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="METHOD.OPTION=VALUE, e.g. ties.density=0.3 (repeatable).")
    ] = None,
    coefficients: Annotated[
        str, typer.Option(help="Factors of the merged ΔW to choose from on the validation splits, with commas.")
    ] = "0.1,0.2,0.3,0.5,0.7,1,1.5,2,3,4",
    ratios: Annotated[str, typer.Option(help="For seeds of one task: weights of the mixtures.")] = "0:1,1:2,1:1,1:1:1",
    base: Annotated[
        str | None, typer.Option(help="Folder or hub id of the base model, for DoRA, HiRA and others.")
    ] = None,
    rename: common.RenameOption = None,
    task: common.TasksOption = None,
    trust_record: common.TrustOption = False,
    config: common.ConfigOption = None,
    alpha: common.AlphaOption = None,
    adapter_name: common.NameOption = None,
    split: common.SplitOption = "test",
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.", min=0)] = 0,
    latex: Annotated[bool, typer.Option("--latex", help="Also write the table as compare-merges.tex.")] = False,
    device: common.DeviceOption = None,
    ray: common.RayOption = None,
    yes: common.YesOption = False,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for compare-merges.json, .pdf and .png.")
    ] = Path("out"),
    force: common.ForceOption = False,
    json: common.JsonOption = False,
) -> None:
    """What every merge keeps of every adapter, on the adapter's own task and with its own head.

    Adapters of several tasks are merged in sets: those of one training method and seed, one a task. Adapters of one
    task are seeds, merged in ratios. The coefficient of each merge is chosen on the validation splits, the same for all
    tasks; the table shows the test split at that coefficient, and at 1. **normalised** is the share of the adapter's
    own accuracy. The ensemble averages the adapters' logits: no merge at all, at the cost of all of them.

    Example:  lora-lab compare-merges a.safetensors b.safetensors c.safetensors --methods ties,tsv,average
    """
    from ..adapters.adapter import Adapter
    from ..adapters.renames import rename_all
    from ..analysis import compare
    from ..analysis.connectivity import parse_ratios
    from ..errors import OptionError
    from ..merging.methods import MERGES
    from ..merging.sources import base_of
    from ..results import tables
    from ..scoring.execution import Execution
    from ..tasks.choosing import tasks_of

    outputs = common.Outputs(output, "compare-merges")
    tex = output / "compare-merges.tex"
    if latex:
        tables.refuse(tex, force=force)
    options: dict[str, dict[str, Any]] = {}
    names = [name.strip() for name in methods.split(",")]
    for given, value in common.pairs(set_).items():
        name, dot, option = given.rpartition(".")
        if not dot:
            raise OptionError(f"--set {given}: METHOD.OPTION=VALUE is needed here, such as ties.{given}={value}")
        method, _, inner = name.partition(":")
        known = MERGES[method].defaults({"inner": inner} if inner else {})
        options.setdefault(name, {}).update(common.parse_set([f"{option}={value}"], known, name))
    loaded = [Adapter.load(path, config=config, alpha=alpha, adapter_name=adapter_name) for path in adapters]
    loaded = rename_all(loaded, common.parse_renames(rename))
    question = compare.CompareMerges(
        tuple(names),
        options,
        tuple(common.parse_numbers(coefficients, "--coefficients")),
        tuple(map(tuple, parse_ratios(ratios, 99))),
        base_name=base,
        split=split,
        seed=seed,
    )
    question.check(loaded)
    tasks = tasks_of(loaded, task or [], trust_record=trust_record)
    question.check_sets(loaded, tasks)  # what cannot be merged is refused first
    built = base_of(loaded, base, trust_record=trust_record)
    result = outputs.earlier(question.run_id(loaded, tasks), force=force)
    if result is None:
        with common.workers_on(ray, device) as (workers, place), common.progress("merging and scoring") as report:
            on = Execution(place, outputs.cache, workers, report, common.confirm(yes))
            result = question.run(loaded, tasks, on, base=built)
        common.say_written(outputs.save(result))
    if latex:
        common.say_written(tables.save(result, tex))
    if json:
        common.print_json(result.to_json())
    else:
        show(result)


def show(result: Any) -> None:
    """The result as a table, a line for each merge and columns for each training method."""
    from ..results.result import grouped

    table = result.summary["by_method"]
    methods = list(dict.fromkeys(row["method"] for row in table))
    several = max(row["sets"] for row in table) > 1
    headings = ["merge"]
    for method in methods:
        name = method or "adapters"
        headings += [f"{name}\naccuracy", "\nnormalised", "\nat coef.", "\naccuracy at 1"]
    rows = []
    for head, members in grouped(table, "merge", "ratio"):
        cells = [head["merge"] + (f" {head['ratio']}" if head["ratio"] else "")]
        for method in methods:
            row = next((r for r in members if r["method"] == method), None)
            cells += _cells(result, row) if row else ["–"] * 4
        rows.append(cells)
    n = result.provenance["examples"]
    spread = "mean ± s.d. over sets, or [95 % interval] of one" if several else "95 % intervals"
    where = ", ".join(result.parameters["task_names"])
    common.table(f"Merges on {where} ({result.parameters['split']} split, {n} examples; {spread})", headings, rows)
    edges = [row for row in table if row["at_edge"]]
    if edges:
        common.console.print("* in some sets the best coefficient lies at the edge of those that were tried")
    for name, others in result.parameters.get("stands_for", {}).items():
        common.console.print(f"{name} stands for {' and '.join(others)}, too: the same sum at another coefficient")
    shared = {row["shared"] for row in result.summary.get("shared_initial_A", [])}
    if True in shared:
        common.console.print(
            f"adapters of {'every set' if shared == {True} else 'some sets'} share their initial A, "
            "as those trained with one --init-seed do"
        )
    for why in dict.fromkeys((row["merge"], row["why"]) for row in result.summary["skipped"]):
        common.console.print(f"left out: {why[0]}: {why[1]}")


def _cells(result: Any, row: dict[str, Any]) -> list[str]:
    if row["sets"] > 1:
        shown = [
            f"{common.number(row[key])} ± {common.number(row[f'{key}_spread'])}" for key in ("accuracy", "normalised")
        ]
    else:
        found = next(
            r
            for r in result.summary["sets"]
            if r["chosen"] and all(r[key] == row[key] for key in ("merge", "method", "ratio"))
        )
        shown = [common.estimate(found[k], found[f"{k}_low"], found[f"{k}_high"]) for k in ("accuracy", "normalised")]
    if row["coefficient"] is None:
        return [*shown, "–", "–"]
    return [*shown, f"{row['coefficient']:.2g}" + ("*" if row["at_edge"] else ""), common.number(row["plain_accuracy"])]
