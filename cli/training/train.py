"""`lora-lab train`: adapters by CoTo and by what it is compared to."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_lab.cli import parsing
from lora_lab.cli.options import AdapterFile, Workers
from lora_lab.cli.terminal import console, print_json, progress, say_written, table
from lora_lab.cli.verbs import Grid, flags, shown
from lora_lab.errors import OptionError
from lora_lab.options import option
from lora_lab.registry import Later
from lora_lab.training.recipe import Recipe


@dataclass(frozen=True)
class Runs:
    """On what is trained, and how often."""

    task: str = option("digits/relabel", "Built-in task or task file (see `lora-lab tasks`).")
    seeds: str | None = option(None, "Several runs, e.g. 0-4, in place of --seed; -o is then a folder.")
    peft_config: Path | None = option(
        None, "JSON file with fields of PEFT's configuration; they win over other options."
    )
    metric: tuple[str, ...] = option(
        (), "For options with ☰: a metric (repeatable) of which the first chooses; by default the task's main one."
    )
    report_to: str = option("none", "Where the Trainer logs to: tensorboard, wandb … (which must be installed).")


@dataclass(frozen=True)
class SideBySide(Workers):
    """Where the runs are trained."""

    jobs: int | None = option(None, "Runs side by side, a process each; by default one a core.", title="jobs")


@dataclass(frozen=True)
class Trained(AdapterFile):
    """The trained adapter, in a format."""

    format: str | None = option(
        None,
        "NAMES: the format that is written; by default PEFT's.",
        names=Later("lora_lab.adapters.formats.registry", "WRITTEN"),
    )

    def check(self, paths: Sequence[Path]) -> None:
        """Refuse paths that are none for the format, before anything is trained."""
        if self.format is not None:
            from lora_lab.adapters.files.writing import check_place

            for path in paths:
                check_place(path, self.format)


def command(recipe: Grid[Recipe], runs: Runs, workers: SideBySide, output: Trained) -> None:
    """Train an adapter, with CoTo unless told otherwise; beside it lies the run's log (.train.json) and its figure.

    CoTo switches the adapters of each block on with a probability p(t) that grows from 0.1 to 1 over the first
    three quarters of the steps; the rest is plain training. The adapter carries the record of how it was made. A
    training that is finished already is kept: called again, a call that was cut off goes on where it was.

    Options with ☰ take several values with commas (--lr 1e-3,2e-3,3e-3): each combination is trained, and the one that
    is best by the task's main metric (or `--metric`) on the validation split, a mean over the seeds, is kept (a
    classifier's accuracy, a language model's loss). NAME.tuning.json and its figure tell of all of them, and the others
    lie in tried/.

    Example:  lora-lab train --method coto --seed 0 -o a.safetensors
    """
    from lora_lab import tasks
    from lora_lab.training.runs import is_first

    task = tasks.from_name(runs.task)
    recipes = _recipes(recipe.first, runs)
    paths = [_path(output.output, each, folder=runs.seeds is not None) for each in recipes]
    output.check(paths)
    if is_first():
        _check_test_split(task)
    results, tried = _trained(task.spec, recipes, recipe.values, paths, runs, workers, output)
    if not is_first():
        return
    written = _save_tuning(tried, paths, recipes[0].method) if tried else []
    if output.json:
        print_json([{"path": str(path), **result.to_json()} for path, result in zip(paths, results, strict=True)])
        return
    if tried:
        _show_tuning(tried)
    show(paths, results)
    if written:
        say_written(written)


def _recipes(recipe: Recipe, runs: Runs) -> list[Recipe]:
    """One for each seed, with the fields of PEFT's configuration that a file gives."""
    from lora_lab.files.disk import read_json

    if runs.peft_config:
        recipe = replace(recipe, peft_config=read_json(runs.peft_config))
    seeds = parsing.seeds(runs.seeds) if runs.seeds is not None else [recipe.seed]
    return [replace(recipe, seed=seed) for seed in seeds]


def _trained(
    task: Any,
    recipes: list[Recipe],
    values: Any,
    paths: list[Path],
    runs: Runs,
    where: SideBySide,
    output: Trained,
) -> tuple[list[Any], Any | None]:
    """The log of each run, and where options had several values, what every setting of them gave."""
    from lora_lab.scoring.sharing.workers import open_workers
    from lora_lab.training import tuning
    from lora_lab.training.runs import Job, train_all

    settings = tuning.settings_of(values)
    if runs.metric and len(settings) < 2:
        raise OptionError("--metric chooses among settings; no option with ☰ has several values")
    for setting in settings:  # refused before anything is trained
        replace(recipes[0], **setting)
    with open_workers(None, where.ray, where.device) as workers, progress("training") as report:
        how: dict[str, Any] = {"processes": where.jobs, "force": output.force, "progress": report, "workers": workers}
        each = zip(recipes, paths, strict=True)
        jobs = [Job(task, r, path, where.device, runs.report_to, output.format) for r, path in each]
        if len(settings) > 1:
            return tuning.train_best(jobs, settings, metric=runs.metric, **how)
        return train_all(jobs, **how), None


def _check_test_split(task: Any) -> None:
    """Warn of a test split that later verbs could not score, where training could go on without."""
    from lora_lab.errors import LoraLabError, LoraLabWarning

    task.check_split("train")
    try:
        task.check_split("test")
    except LoraLabError as error:
        warnings.warn(f"its test split cannot be scored later: {error}", LoraLabWarning, stacklevel=1)


def _save_tuning(tried: Any, paths: list[Path], method: str) -> list[Path]:
    """What every setting gave, as NAME.tuning.json with its figure."""
    from lora_lab import plots

    name = paths[0].name.removesuffix(".safetensors") if len(paths) == 1 else method
    json, *figures = (paths[0].with_name(f"{name}.tuning.{ending}") for ending in ("json", "pdf", "png"))
    tried.save(json)
    plots.save(plots.figure([tried], width="single"), *figures, force=True)
    return [json, *figures]


def _show_tuning(tried: Any) -> None:
    settings, names = tried.summary["settings"], tried.parameters["options"]
    metrics = [name for name in settings[0] if name not in (*names, "chosen")]
    rows = [[*(row[name] for name in [*names, *metrics]), "✓" if row["chosen"] else ""] for row in settings]
    flag = {field.name: flags(field, said)[-1] for field, said in shown(Recipe)}
    headings = [*(flag[name] for name in names), *map(_heading, metrics), ""]
    table("Tried, means over the seeds", headings, rows)
    console.print()


def show(paths: list[Path], results: list[Any]) -> None:
    """What was trained, as a table."""
    rows = []
    metrics = [name for name in results[0].summary["validation"] if name != "examples"]
    for path, result in zip(paths, results, strict=True):
        record, found = result.parameters["record"], result.summary["validation"]
        cells = [found[name] for name in metrics]
        rows.append((str(path), record["method"], record["seed"], *cells, result.summary["cpu_s"]))
    table("Trained adapters", ("adapter", "method", "seed", *map(_heading, metrics), "training CPU s"), rows)


def _heading(metric: str) -> str:
    return f"validation {metric.replace('_', ' ')}"


def _path(output: Path | None, recipe: Any, *, folder: bool) -> Path:
    name = f"{recipe.method}-s{recipe.seed}.safetensors"
    if folder:
        return (output or Path()) / name
    return output or Path(name)
