"""`lora-lab sweep`: how much of adapters can be pruned away."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from . import common


def command(
    adapters: Annotated[list[str], typer.Argument(help="Adapters; several are summed up by training method.")],
    structured: Annotated[bool, typer.Option("--structured", help="Patterns of modules.")] = False,
    unstructured: Annotated[bool, typer.Option("--unstructured", help="Single entries, over sparsities.")] = False,
    rank: Annotated[bool, typer.Option("--rank", help="Lower ranks.")] = False,
    sparsities: Annotated[str, typer.Option(help="Shares of entries set to 0, with commas.")] = (
        "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,0.95,0.99"
    ),
    criteria: Annotated[
        str, typer.Option(help="magnitude, random, delta-magnitude, with commas.")
    ] = "magnitude,random",
    per_matrix: Annotated[
        bool, typer.Option("--per-matrix/--global", help="That share of every matrix, or of all entries together.")
    ] = False,
    draws: Annotated[int, typer.Option(help="Draws of every random control.")] = 5,
    examples: common.ExamplesOption = None,
    task: common.TaskOption = None,
    trust_record: common.TrustOption = False,
    config: common.ConfigOption = None,
    alpha: common.AlphaOption = None,
    adapter_name: common.NameOption = None,
    split: common.SplitOption = "test",
    seed: Annotated[int, typer.Option(help="Of random controls and the bootstrap.", min=0)] = 0,
    device: common.DeviceOption = None,
    ray: common.RayOption = None,
    yes: common.YesOption = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for sweep.json, .pdf and .png.")] = Path("out"),
    force: common.ForceOption = False,
    json: common.JsonOption = False,
) -> None:
    """Accuracy and loss of pruned adapters: all patterns, sparsities and ranks (or those named), with random controls.

    A pattern names what is **kept**. Half of the layers by Shapley value are chosen on the validation split. Nothing is
    trained again after pruning.

    Example:  lora-lab sweep lora-s0.safetensors lora-s1.safetensors coto-s0.safetensors coto-s1.safetensors
    """
    from ..adapters.adapter import Adapter
    from ..analysis import sweep
    from ..errors import OptionError
    from ..tasks.choosing import task_of

    chosen_kinds = {"structured": structured, "unstructured": unstructured, "rank": rank}
    kinds = [kind for kind, wanted in chosen_kinds.items() if wanted] or list(chosen_kinds)
    try:
        shares = [float(part) for part in sparsities.split(",")]
    except ValueError as error:
        raise OptionError(
            f"--sparsities {sparsities!r}: shares with commas between them are needed, as 0,0.5,0.9"
        ) from error
    outputs = common.Outputs(output, "sweep")
    loaded = [Adapter.load(path, config=config, alpha=alpha, adapter_name=adapter_name) for path in adapters]
    settings: dict[str, Any] = {
        "kinds": kinds,
        "sparsities": shares,
        "criteria": criteria.split(","),
        "per_matrix": per_matrix,
        "draws": draws,
        "examples": examples,
        "seed": seed,
    }
    names = ("kinds", "sparsities", "criteria", "draws")
    sweep.check(loaded, **{name: settings[name] for name in names})
    task_chosen = task_of(*loaded, given=task, trust_record=trust_record)
    compute = partial(sweep.sweep, loaded, task_chosen, split=split, **settings)
    run = sweep.run_id(loaded, task_chosen, split=split, **settings)
    result = common.computed(outputs, run, "pruning", compute, force=force, yes=yes, ray=ray, device=device)
    if json:
        common.print_json(result.to_json())
    else:
        show(result)


def show(result: Any) -> None:
    """The result as tables: adapters side by side, or methods where there are several seeds."""
    by_method = len({row["method"] for row in result.rows()}) < len(result.parameters["adapters"])
    for kind in result.parameters["kinds"]:
        rows = [row for row in (result.summary["by_method"] if by_method else result.rows()) if row["kind"] == kind]
        if not rows:
            continue
        columns = list(dict.fromkeys(str(row["method" if by_method else "adapter"]) for row in rows))
        table: dict[tuple[str, str], dict[str, str]] = {}
        for row in rows:
            cells = table.setdefault((row["criterion"], row["label"]), {})
            cells[str(row["method" if by_method else "adapter"])] = _cell(row, by_method)
        shown = [
            (
                label if label.partition(":")[0] == criterion else f"{criterion} {label}",
                *(cells.get(c, "–") for c in columns),
            )
            for (criterion, label), cells in table.items()
        ]
        spread = "mean ± s.d. over adapters" if by_method else "95 % intervals"
        title = (
            f"Accuracy, {kind} ({result.parameters['split']} split, {result.provenance['examples']} examples; {spread})"
        )
        common.table(title, ("kept", *columns) if kind == "structured" else (kind, *columns), shown)
        common.console.print()


def _cell(row: dict[str, Any], by_method: bool) -> str:
    if by_method:
        return f"{row['accuracy']:.3f} ± {row['accuracy_spread']:.3f}"
    return common.estimate(row["accuracy"], row["accuracy_low"], row["accuracy_high"])
