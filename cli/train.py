"""`lora-lab train`: adapters by CoTo and by what it is compared to."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from . import common


def command(
    method: Annotated[
        str,
        typer.Option(
            help="coto, coto-h, coto-l, lora, dropout, progressive-dropout, stochastic-depth, or "
            "stochastic-depth-scaled: each block's update then times its survival rate, as its paper scores it."
        ),
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
    rank: Annotated[str | None, typer.Option(help="r; by default the task's. ☰")] = None,
    alpha: Annotated[str | None, typer.Option(help="lora_alpha; by default twice the rank. ☰")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Names with commas, a regular expression, or all-linear; by default the task's.")
    ] = None,
    learning_rate: Annotated[
        str | None, typer.Option("--lr", help="Peak learning rate; by default the task's. ☰")
    ] = None,
    lora_plus: Annotated[
        str | None, typer.Option(help="LoRA+: the learning rate of B is so many times that of A. ☰")
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Optimiser steps; by default the task's. ☰")] = None,
    batch_size: Annotated[
        str | None, typer.Option(help="Examples per batch, of all processes together; by default the task's. ☰")
    ] = None,
    accumulate: Annotated[int, typer.Option(help="Batches per optimiser step.")] = 1,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations to save memory.")
    ] = False,
    warmup: Annotated[str, typer.Option(help="Share of the steps over which the learning rate rises. ☰")] = "0.06",
    weight_decay: Annotated[str, typer.Option(help="AdamW's weight decay. ☰")] = "0.0",
    max_grad_norm: Annotated[str, typer.Option(help="Gradients are clipped to this norm. ☰")] = "1.0",
    bf16: Annotated[bool, typer.Option("--bf16", help="Train in bfloat16 mixed precision.")] = False,
    optimizer: Annotated[
        str, typer.Option(help="A name of transformers' TrainingArguments.optim.")
    ] = "adamw_torch_fused",
    dropout: Annotated[str, typer.Option(help="(Initial) rate for dropout and progressive-dropout. ☰")] = "0.25",
    ramp: Annotated[str, typer.Option(help="Shape of p(t): linear, exponential or sine.")] = "linear",
    p0: Annotated[
        str | None,
        typer.Option(help="p at the first step (0.1); for stochastic-depth the last block's survival (0.5). ☰"),
    ] = None,
    stage: Annotated[str, typer.Option(help="Share of the steps after which every adapter is on. ☰")] = "0.75",
    group: Annotated[
        list[str] | None, typer.Option(help="What is switched together: block, module, or NAME=REGEX (repeatable).")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Keep a checkpoint every N steps; a killed run resumes there.")
    ] = None,
    report_to: Annotated[
        str, typer.Option(help="Where the Trainer logs to: tensorboard, wandb … (which must be installed).")
    ] = "none",
    jobs: Annotated[int | None, typer.Option(help="Runs side by side, a process each; by default one a core.")] = None,
    device: common.DeviceOption = None,
    ray: common.RayOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="NAME.safetensors, or a name for a PEFT folder.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Train an adapter, with CoTo unless told otherwise; beside it lies the run's log (.train.json) and its figure.

    CoTo switches the adapters of each block on with a probability p(t) that grows from 0.1 to 1 over the first
    three quarters of the steps; the rest is plain training. The adapter carries the record of how it was made. A
    training that is finished already is kept: called again, a call that was cut off goes on where it was.

    Options with ☰ take several values with commas (--lr 1e-3,2e-3,3e-3): each combination is trained, and the one with
    the best validation accuracy (of a language model, loss), a mean over the seeds, is kept. NAME.tuning.json and its
    figure tell of all of them, and the others lie in tried/.

    Example:  lora-lab train --method coto --seed 0 -o a.safetensors
    """
    import dataclasses

    from .. import tasks
    from ..files.disk import read_json
    from ..training import tuning
    from ..training.recipe import Recipe
    from ..training.runs import Job, is_first, train_all

    chosen = tasks.from_name(task)
    settings = read_json(peft_config) if peft_config else {}
    wanted = common.parse_seeds(seeds) if seeds is not None else [seed]
    whole = {"rank": rank, "steps": steps, "batch_size": batch_size}
    real = {"alpha": alpha, "learning_rate": learning_rate, "lora_plus": lora_plus, "warmup": warmup}
    real |= {"weight_decay": weight_decay, "max_grad_norm": max_grad_norm, "dropout": dropout, "p0": p0, "stage": stage}
    values = {name: tuning.parse_values(text, _option(name), int) for name, text in whole.items()}
    values |= {name: tuning.parse_values(text, _option(name), float) for name, text in real.items()}
    recipes = [
        Recipe(
            method=method,
            seed=each,
            init_seed=init_seed,
            peft=peft or str(settings.get("peft_type") or "lora").lower(),
            peft_config=settings,
            target_modules=_target_modules(target_modules),
            accumulate=accumulate,
            checkpointing=checkpointing,
            bf16=bf16,
            optimizer=optimizer,
            ramp=ramp,
            groups=common.parse_groups(group) if group else "block",
            save_every=save_every,
            **{name: each_value[0] for name, each_value in values.items()},
        )
        for each in wanted
    ]
    paths = [_path(output, recipe, folder=seeds is not None) for recipe in recipes]
    settings = tuning.settings_of(values)
    tried = None
    if is_first():
        _check_test_split(chosen)
    with common.workers_on(ray, device) as (workers, _), common.progress("training") as report:
        if len(settings) > 1:
            for setting in settings:  # refused before anything is trained
                dataclasses.replace(recipes[0], **setting)
            results, tried = tuning.train_best(
                chosen.spec,
                recipes,
                settings,
                paths,
                device=device,
                processes=jobs,
                report_to=report_to,
                force=force,
                progress=report,
                workers=workers,
            )
        else:
            todo = [Job(chosen.spec, r, path, device, report_to) for r, path in zip(recipes, paths, strict=True)]
            results = train_all(todo, processes=jobs, force=force, progress=report, workers=workers)
    if not is_first():
        return
    written = _save_tuning(tried, paths, recipes[0].method) if tried else []
    if json:
        common.print_json(
            [{"path": str(path), **result.to_json()} for path, result in zip(paths, results, strict=True)]
        )
        return
    if tried:
        _show_tuning(tried)
    show(paths, results)
    if written:
        common.say_written(written)


def _check_test_split(task: Any) -> None:
    """Warn of a test split that later verbs could not score, where training could go on without."""
    from ..errors import LoraLabError, LoraLabWarning

    task.check_split("train")
    try:
        task.check_split("test")
    except LoraLabError as error:
        warnings.warn(f"its test split cannot be scored later: {error}", LoraLabWarning, stacklevel=1)


def _save_tuning(tried: Any, paths: list[Path], method: str) -> list[Path]:
    """What every setting gave, as NAME.tuning.json with its figure."""
    from .. import plots

    name = paths[0].name.removesuffix(".safetensors") if len(paths) == 1 else method
    json, *figures = (paths[0].with_name(f"{name}.tuning.{ending}") for ending in ("json", "pdf", "png"))
    tried.save(json)
    plots.save(plots.figure([tried], width="single"), *figures, force=True)
    return [json, *figures]


def _show_tuning(tried: Any) -> None:
    settings, names = tried.summary["settings"], tried.parameters["options"]
    rows = [[*(row[n] for n in names), row["accuracy"], row["loss"], "✓" if row["chosen"] else ""] for row in settings]
    headings = [*(_option(name) for name in names), "validation accuracy", "validation loss", ""]
    common.table("Tried, means over the seeds", headings, rows)
    common.console.print()


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


def _option(name: str) -> str:
    return "--lr" if name == "learning_rate" else "--" + name.replace("_", "-")


def _target_modules(text: str | None) -> str | list[str] | None:
    if text is None or text == "all-linear" or any(sign in text for sign in "*()[]\\^$|"):
        return text
    return text.split(",")


def _path(output: Path | None, recipe: Any, *, folder: bool) -> Path:
    name = f"{recipe.method}-s{recipe.seed}.safetensors"
    if folder:
        return (output or Path()) / name
    return output or Path(name)
