"""`lora-lab interpolate`: the line between adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import common

_SPACES = {
    "both": ["factors", "delta"],
    "factors": ["factors"],
    "delta": ["delta"],
    "aligned": ["aligned"],
    "all": ["factors", "delta", "aligned"],
}


def command(
    adapters: Annotated[list[str], typer.Argument(help="Two adapters or more; every pair is walked.")],
    points: Annotated[int, typer.Option(help="Points on each line, both ends among them.")] = 11,
    space: Annotated[
        str, typer.Option(help="both (factors and delta), factors, delta, aligned, or all; see above.")
    ] = "both",
    ratios: Annotated[
        str | None, typer.Option(help="Also score weighted mixtures of the adapters, e.g. 0:1,1:2,1:1,1:1:1.")
    ] = None,
    rename: common.RenameOption = None,
    task: common.TaskOption = None,
    trust_record: common.TrustOption = False,
    config: common.ConfigOption = None,
    alpha: common.AlphaOption = None,
    adapter_name: common.NameOption = None,
    split: common.SplitOption = "test",
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.", min=0)] = 0,
    device: common.DeviceOption = None,
    ray: common.RayOption = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for interpolate.json, .pdf and .png.")] = Path(
        "out"
    ),
    force: common.ForceOption = False,
    json: common.JsonOption = False,
) -> None:
    """Loss and accuracy along the straight line between adapters, and the barriers on it.

    **factors** averages A and B, as papers on merging LoRA seeds do. Halfway between two independent adapters
    that also halves ‖ΔW‖, so a dip may be a barrier or mere shrinkage. **matched** therefore walks the same line with
    every module's ‖ΔW‖ kept at the average of its ends: a dip that stays is a barrier, a dip that goes was shrinkage
    (the last lines). **delta** averages ΔW = BA itself, exactly. **aligned** first rotates b's factors onto a's.

    Example:  lora-lab interpolate a.safetensors b.safetensors --ratios 1:2,1:1
    """
    from ..adapters.adapter import Adapter
    from ..adapters.renames import rename_all
    from ..analysis import connectivity
    from ..errors import unknown
    from ..scoring.execution import Execution
    from ..tasks.choosing import task_of

    if space not in _SPACES:
        raise unknown("space", space, _SPACES)
    outputs = common.Outputs(output, "interpolate")
    loaded = [Adapter.load(path, config=config, alpha=alpha, adapter_name=adapter_name) for path in adapters]
    loaded = rename_all(loaded, common.parse_renames(rename))
    mixtures = connectivity.parse_ratios(ratios, len(loaded)) if ratios else []
    question = connectivity.Interpolate(
        points, tuple(_SPACES[space]), tuple(map(tuple, mixtures)), split=split, seed=seed
    )
    question.check(loaded)
    chosen = task_of(*loaded, given=task, trust_record=trust_record)
    result = outputs.earlier(question.run_id(loaded, chosen), force=force)
    if result is None:
        with common.workers_on(ray, device) as (workers, place), common.progress("interpolating") as report:
            result = question.run(loaded, chosen, Execution(place, outputs.cache, workers, report))
        common.say_written(outputs.save(result))
    if json:
        common.print_json(result.to_json())
    else:
        show(result)


def show(result: Any) -> None:
    """The result as tables."""
    n = result.provenance["examples"]
    pairs = {tuple(row["indices"]): row for row in result.rows(ratio=None)}
    for indices, first in pairs.items():
        _show_line(result, list(indices), " and ".join(first["members"]), n)
    _show_ratios(result)
    _show_barriers(result)
    _show_shrinkage(result)


def _show_line(result: Any, indices: list[int], title: str, n: int) -> None:
    spaces = result.parameters["spaces"]
    lines = [result.rows(ratio=None, indices=indices, space=space) for space in spaces]
    metrics = {"accuracy": "accuracy", "loss": "loss", "‖ΔW‖": "norm"}
    if lines[0][0]["norm"] is None:
        del metrics["‖ΔW‖"]
    headings = ["\nt", *(f"{metric}\n{space}" for metric in metrics for space in spaces)]
    rows = [
        [f"{cells[0]['t']:.2f}", *(cell[name] for name in metrics.values() for cell in cells)]
        for cells in zip(*lines, strict=True)
    ]
    common.table(f"From {title} ({result.parameters['split']} split, {n} examples)", headings, rows)
    common.console.print()


def _show_ratios(result: Any) -> None:
    rows = [row for row in result.rows() if row["ratio"]]
    if rows:
        cells = [(f"{r['ratio']} of {', '.join(r['members'])}", r["space"], *_estimates(r)) for r in rows]
        common.table("Weighted mixtures", ("ratio", "space", "accuracy", "loss"), cells)
        common.console.print()


def _estimates(row: dict[str, Any]) -> tuple[str, str]:
    return tuple(common.estimate(row[m], row[f"{m}_low"], row[f"{m}_high"]) for m in ("accuracy", "loss"))  # type: ignore[return-value]


def _show_barriers(result: Any) -> None:
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in result.summary["barriers"]:
        key = (" – ".join(row["members"]), row["metric"], row["space"])
        found.setdefault(key, {})[row["barrier"]] = row
    rows = []
    for (pair, metric, space), cells in found.items():
        main, *others = (cells[name] for name in ("entezari", "frankle", "max_end", "midpoint"))
        estimate = common.estimate(main["value"], main["low"], main["high"])
        rows.append((f"{pair}, {space}", metric, estimate, *(other["value"] for other in others)))
    headings = ("line", "metric", "above the chord", "above mean end", "above worse end", "value at ½")
    title = "Barriers (error = 1 − accuracy; 95 % intervals of all are in the JSON)"
    common.table(title, headings, rows)
    common.console.print()


def _show_shrinkage(result: Any) -> None:
    for row in result.summary.get("shrinkage", []):
        if row["metric"] != "error":
            continue
        pair = " – ".join(row["members"])
        names = ("barrier", "removed", "stays")
        height, removed, stays = (common.estimate(row[n], row[f"{n}_low"], row[f"{n}_high"]) for n in names)
        share = f" ({row['share']:.0%})" if row["share"] is not None and row["barrier_low"] > 0 else ""
        common.console.print(
            f"{pair}: error barrier of the factor line {height}; matching ‖ΔW‖ removes {removed}{share}, {stays} stays."
        )
