"""`lora-lab quickstart`: from nothing to a first figure."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from lora_lab.cli.lines import interpolate
from lora_lab.cli.outputs import Outputs
from lora_lab.cli.terminal import console, messages, progress, say_written
from lora_lab.cli.training import train
from lora_lab.options import option


@dataclass(frozen=True)
class Making:
    """Where, and by how many processes."""

    output: Path = option(Path("quickstart"), "Folder for everything that is made.", flag="o output")
    jobs: int | None = option(None, "Runs side by side; by default one a core.", least=1)
    force: bool = option(False, "Replace what is there.")


def command(making: Making) -> None:
    """Train two LoRA and two CoTo adapters on the embedded digits and draw the lines between them (a minute or two).

    Adapters that an earlier call has finished are kept, so that a call that was cut off is simply called again.

    Example:  lora-lab quickstart -o quickstart
    """
    from lora_lab import plots, tasks
    from lora_lab.adapters.adapter import Adapter
    from lora_lab.analysis.questions import Interpolate
    from lora_lab.scoring.execution import Execution
    from lora_lab.training.recipe import Recipe
    from lora_lab.training.runs import Job, train_all

    began = time.perf_counter()
    chosen = tasks.from_name("digits/relabel")
    folder = making.output
    recipes = [Recipe(method=method, seed=seed) for method in ("lora", "coto") for seed in (0, 1)]
    paths = [folder / f"{recipe.method}-s{recipe.seed}.safetensors" for recipe in recipes]
    todo = [Job(chosen.spec, recipe, path) for recipe, path in zip(recipes, paths, strict=True)]
    with progress("training 2 LoRA and 2 CoTo adapters") as report:
        trained = train_all(todo, processes=making.jobs, force=making.force, progress=report)
    train.show(paths, trained)
    console.print()
    results = []
    for method, pair in (("lora", paths[:2]), ("coto", paths[2:])):
        outputs = Outputs(folder / method, "interpolate")
        with progress(f"walking from one {method} adapter to the other") as report:
            ends = [Adapter.load(path) for path in pair]
            results.append(Interpolate().run(ends, chosen, Execution(progress=report)))
        outputs.save(results[-1])
        interpolate.show(results[-1])
    drawn = [folder / "line.pdf", folder / "line.png"]
    plots.save(plots.figure(results), *drawn, force=True)
    say_written([*paths, *(folder / m / "interpolate.json" for m in ("lora", "coto")), *drawn])
    messages.print(f"done in {time.perf_counter() - began:.0f} s; open {drawn[1]}")
