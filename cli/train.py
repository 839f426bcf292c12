"""`lora-lab train`: adapters by CoTo and by what it is compared to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import common


def command(
    method: Annotated[
        str, typer.Option(help="coto, coto-h, coto-l, lora, dropout, progressive-dropout or stochastic-depth.")
    ] = "coto",
    seed: Annotated[int, typer.Option(help="Orders the data and draws the masks.")] = 0,
    seeds: Annotated[str | None, typer.Option(help="Several runs, e.g. 0-4; -o is then a folder.")] = None,
    init_seed: Annotated[
        int | None,
        typer.Option(help="Draws the adapter's initial A; by default the seed. One value for all runs shares A."),
    ] = None,
    task: Annotated[str, typer.Option(help="Built-in task or task file (see `lora-lab tasks`).")] = "digits/relabel",
    peft: Annotated[
        str | None, typer.Option(help="Tuner: lora (the default), rslora, dora, pissa, hira, loha, lokr, oft …")
    ] = None,
    peft_config: Annotated[
        Path | None, typer.Option(help="JSON file with fields of PEFT's configuration; they win over other options.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="r; by default the task's.")] = None,
    alpha: Annotated[float | None, typer.Option(help="lora_alpha; by default twice the rank.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Names with commas, a regular expression, or all-linear; by default the task's.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--lr", help="Peak learning rate; by default the task's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; by default the task's.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per batch; by default the task's.")] = None,
    accumulate: Annotated[int, typer.Option(help="Batches per optimiser step.")] = 1,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations to save memory.")
    ] = False,
    warmup: Annotated[float, typer.Option(help="Share of the steps over which the learning rate rises.")] = 0.06,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to this norm.")] = 1.0,
    optimizer: Annotated[
        str, typer.Option(help="A name of transformers' TrainingArguments.optim.")
    ] = "adamw_torch_fused",
    dropout: Annotated[float, typer.Option(help="(Initial) rate for dropout and progressive-dropout.")] = 0.25,
    ramp: Annotated[str, typer.Option(help="Shape of p(t): linear, exponential or sine.")] = "linear",
    p0: Annotated[
        float | None,
        typer.Option(help="p at the first step (0.1); for stochastic-depth the last block's survival (0.5)."),
    ] = None,
    stage: Annotated[float, typer.Option(help="Share of the steps after which every adapter is on.")] = 0.75,
    group: Annotated[
        list[str] | None, typer.Option(help="What is switched together: block, module, or NAME=REGEX (repeatable).")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Keep a checkpoint every N steps; a killed run resumes there.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs side by side, a process each; by default one a core.")] = None,
    device: common.DeviceOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="NAME.safetensors, or a name for a PEFT folder.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Train an adapter, with CoTo unless told otherwise; beside it lies the run's log (.train.json) and its figure.

    CoTo switches the adapters of each block on with a probability p(t) that grows from 0.1 to 1 over the first
    three quarters of the steps; the rest is plain training. The adapter carries the record of how it was made.

    Example:  lora-lab train --method coto --seed 0 -o a.safetensors
    """
    from .. import tasks
    from ..files import read_json
    from ..parallel import Job, train_all
    from ..recipe import Recipe

    chosen = tasks.from_name(task)
    settings = read_json(peft_config) if peft_config else {}
    wanted = common.parse_seeds(seeds) if seeds is not None else [seed]
    recipes = [
        Recipe(
            method=method,
            seed=each,
            init_seed=init_seed,
            peft=peft or str(settings.get("peft_type") or "lora").lower(),
            peft_config=settings,
            rank=rank,
            alpha=alpha,
            target_modules=_target_modules(target_modules),
            learning_rate=learning_rate,
            steps=steps,
            batch_size=batch_size,
            accumulate=accumulate,
            checkpointing=checkpointing,
            warmup=warmup,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            optimizer=optimizer,
            dropout=dropout,
            ramp=ramp,
            p0=p0,
            stage=stage,
            groups=common.parse_groups(group) if group else "block",
            save_every=save_every,
        )
        for each in wanted
    ]
    paths = [_path(output, recipe, folder=seeds is not None) for recipe in recipes]
    todo = [Job(chosen.record, recipe, path, device) for recipe, path in zip(recipes, paths, strict=True)]
    with common.progress("training") as report:
        results = train_all(todo, workers=jobs, force=force, progress=report)
    if json:
        common.print_json(
            [{"path": str(path), **result.to_json()} for path, result in zip(paths, results, strict=True)]
        )
        return
    show(paths, results)


def show(paths: list[Path], results: list[Any]) -> None:
    """What was trained, as a table."""
    rows = []
    for path, result in zip(paths, results, strict=True):
        record, found = result.parameters["record"], result.summary["validation"]
        rows.append(
            (str(path), record["method"], record["seed"], found["accuracy"], found["loss"], result.summary["cpu_s"])
        )
    headings = ("adapter", "method", "seed", "validation accuracy", "validation loss", "training CPU s")
    common.table("Trained adapters", headings, rows)


def _target_modules(text: str | None) -> str | list[str] | None:
    if text is None or text == "all-linear" or any(sign in text for sign in "*()[]\\^$|"):
        return text
    return text.split(",")


def _path(output: Path | None, recipe: Any, *, folder: bool) -> Path:
    name = f"{recipe.method}-s{recipe.seed}.safetensors"
    if folder:
        return (output or Path()) / name
    return output or Path(name)
