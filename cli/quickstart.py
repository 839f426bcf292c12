"""`lora-lab quickstart`: from nothing to a first figure."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from . import common, interpolate, train


def command(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for everything that is made.")] = Path(
        "quickstart"
    ),
    jobs: Annotated[int | None, typer.Option(help="Runs side by side; by default one a core.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Train two LoRA and two CoTo adapters on the embedded digits and draw the lines between them (a minute or two).

    Adapters that an earlier call has finished are kept, so that a call that was cut off is simply called again.

    Example:  lora-lab quickstart -o quickstart
    """
    from .. import plots, tasks
    from ..adapters.adapter import Adapter
    from ..analysis import connectivity
    from ..scoring.execution import Execution
    from ..training.recipe import Recipe
    from ..training.runs import Job, train_all

    began = time.perf_counter()
    chosen = tasks.from_name("digits/relabel")
    recipes = [Recipe(method=method, seed=seed) for method in ("lora", "coto") for seed in (0, 1)]
    paths = [output / f"{recipe.method}-s{recipe.seed}.safetensors" for recipe in recipes]
    todo = [Job(chosen.spec, recipe, path) for recipe, path in zip(recipes, paths, strict=True)]
    with common.progress("training 2 LoRA and 2 CoTo adapters") as report:
        trained = train_all(todo, processes=jobs, force=force, progress=report)
    train.show(paths, trained)
    common.console.print()
    results = []
    for method, pair in (("lora", paths[:2]), ("coto", paths[2:])):
        outputs = common.Outputs(output / method, "interpolate")
        with common.progress(f"walking from one {method} adapter to the other") as report:
            loaded, on = [Adapter.load(path) for path in pair], Execution(progress=report)
            results.append(connectivity.Interpolate().run(loaded, chosen, on))
        outputs.save(results[-1])
        interpolate.show(results[-1])
    drawn = [output / "line.pdf", output / "line.png"]
    plots.save(plots.figure(results), *drawn, force=True)
    common.say_written([*paths, *(output / m / "interpolate.json" for m in ("lora", "coto")), *drawn])
    common.messages.print(f"done in {time.perf_counter() - began:.0f} s; open {drawn[1]}")
