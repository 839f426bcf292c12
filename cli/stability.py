"""`lora-lab stability`: what happens when parts of an adapter are dropped."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from . import common


def command(
    adapters: Annotated[list[str], typer.Argument(help="Adapters.")],
    players: common.PlayersOption = None,
    samples: Annotated[int, typer.Option(help="Keep-sets of each size, where there are more.")] = 50,
    grid: Annotated[str, typer.Option("--p", help="Probabilities of the p-curve, with commas.")] = (
        "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"
    ),
    rescale: Annotated[
        bool, typer.Option(help="Everything a second time with the updates multiplied by G/k, k of G players on.")
    ] = True,
    every: Annotated[
        bool | None,
        typer.Option(help="All 2^G keep-sets or only samples; by default all where that costs little more."),
    ] = None,
    examples: common.ExamplesOption = None,
    task: common.TaskOption = None,
    trust_record: common.TrustOption = False,
    config: common.ConfigOption = None,
    alpha: common.AlphaOption = None,
    adapter_name: common.NameOption = None,
    split: common.SplitOption = "test",
    seed: Annotated[int, typer.Option(help="Draws the keep-sets and the bootstrap.", min=0)] = 0,
    device: common.DeviceOption = None,
    ray: common.RayOption = None,
    yes: common.YesOption = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for stability.json, .pdf and .png.")] = Path(
        "out"
    ),
    force: common.ForceOption = False,
    json: common.JsonOption = False,
) -> None:
    """Accuracy and loss with only some layers' adapters on: by number, by probability, one left out, fixed patterns.

    θ is ε-stable over a family of keep-sets if the loss rises by at most ε whichever of them is kept; ε and the worst
    keep-set are reported for several families (a working definition after Kuditipudi et al. 2019). From the same
    keep-sets come both sides of CoTo's progressive-optimisation inequality, for masks with at least one layer on, as
    CoTo draws them, and for independent coins.

    Example:  lora-lab stability lora.safetensors coto.safetensors --samples 30
    """
    from ..adapters.adapter import Adapter
    from ..analysis import stability
    from ..errors import OptionError
    from ..tasks.choosing import task_of

    try:
        probabilities = [float(part) for part in grid.split(",")]
    except ValueError as error:
        raise OptionError(
            f"--p {grid!r}: numbers with commas between them are needed, such as 0.25,0.5,0.75"
        ) from error
    outputs = common.Outputs(output, "stability")
    loaded = [Adapter.load(path, config=config, alpha=alpha, adapter_name=adapter_name) for path in adapters]
    settings: dict[str, Any] = {
        "by": common.parse_players(players),
        "samples": samples,
        "grid": probabilities,
        "rescale": rescale,
        "every": every,
        "examples": examples,
        "seed": seed,
    }
    stability.check(loaded, by=settings["by"], samples=samples, grid=probabilities)
    chosen = task_of(*loaded, given=task, trust_record=trust_record)
    compute = partial(stability.stability, loaded, chosen, split=split, **settings)
    run = stability.run_id(loaded, chosen, split=split, **settings)
    result = common.computed(outputs, run, "dropping layers", compute, force=force, yes=yes, ray=ray, device=device)
    if json:
        common.print_json(result.to_json())
    else:
        show(result)


def show(result: Any) -> None:
    """The result as tables."""
    for summary in result.summary["adapters"]:
        where = {"adapter": summary["adapter"], "rescaled": summary["rescaled"], "seed": summary["seed"]}
        scaled = ", updates × G/k" if summary["rescaled"] else ""
        n, split = result.provenance["examples"], result.parameters["split"]
        title = f"{summary['adapter']}{scaled} ({split} split, {n} examples)"
        rows = [
            (
                f"{row['family']} {row['label']}",
                row["sets"],
                common.estimate(1 - row["error"], 1 - row["error_high"], 1 - row["error_low"]),
                1 - row["error_worst"],
                common.estimate(row["loss"], row["loss_low"], row["loss_high"]),
                row["loss_worst"],
            )
            for row in result.rows(**where)
        ]
        common.table(title, ("kept", "sets", "accuracy", "worst", "loss", "worst"), rows)
        common.console.print()
        _show_epsilon(summary)
        _show_inequality(summary)


def _show_epsilon(summary: dict[str, Any]) -> None:
    rows = [
        (
            row["family"],
            row["metric"],
            ("≥ " if row["lower_bound"] else "") + common.estimate(row["value"], row["low"], row["high"]),
            row["sets"],
            row["worst_set"],
        )
        for row in summary["epsilon"]
    ]
    title = f"ε of {summary['adapter']}: the largest rise over a family (≥: of the sampled keep-sets only)"
    common.table(title, ("family", "metric", "ε [95 %]", "sets", "worst keep-set"), rows)
    common.console.print()


def _show_inequality(summary: dict[str, Any]) -> None:
    def cells(row: dict[str, Any]) -> list[str]:
        return [common.estimate(row[n], row[f"{n}_low"], row[f"{n}_high"]) for n in ("left", "right", "gap")]

    rows = [(row["law"], f"{row['p']:g}", *cells(row)) for row in summary["inequality"]]
    title = "E[loss] ≥ Σ P(j) loss of the mean output of j players on; CoTo's masks have at least one on"
    common.table(title, ("masks", "p", "left [95 %]", "right [95 %]", "gap [95 %]"), rows)
    common.console.print()
