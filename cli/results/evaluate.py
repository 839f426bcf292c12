"""`lora-lab evaluate`: how good adapters are on their task."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_lab.analysis.questions import Evaluate
from lora_lab.cli.options import Computing, Output, Several, TaskEach
from lora_lab.cli.terminal import estimates, in_words, say_not_defined, say_written, table
from lora_lab.options import option


@dataclass(frozen=True)
class File(Output):
    """The file that the scores go to."""

    output: Path | None = option(
        None, "Write the result to this JSON file; by default it is only printed.", flag="o output"
    )  # type: ignore[assignment]
    force: bool = option(False, "Replace an existing file.")
    latex: bool = option(False, "Also write the table as .tex beside that file (or as evaluate.tex).")
    csv: bool = option(False, "Also write the rows as .csv beside that file (or as evaluate.csv).")


def command(
    adapters: Annotated[list[str], typer.Argument(help="Adapters.")],
    question: Evaluate,
    task: TaskEach,
    loading: Several,
    computing: Computing,
    output: File,
) -> None:
    """Score adapters on their own task's test split, with 95 % intervals over the examples.

    A language model's loss and token accuracy are means over texts of the mean over a text's tokens; its perplexity is
    the exponential of the mean loss over all tokens. Of multiple choice, accuracy takes the option of the highest mean
    log-likelihood per token; acc, acc_norm and acc_bytes are lm-evaluation-harness's: of the highest sum over the
    option's tokens, and of that sum per character and per byte of the option.

    With `--behaviour`, also what the adapters change beside their task: forgetting, divergence from the base, and
    calibration. Metrics of calibration, brier and ece, are told with `--metric`, too; ece beside ece_null, what a model
    of the same confidences shows that is calibrated. An ece within the range of ece_null is no miscalibration.

    Example:  lora-lab evaluate a.safetensors b.safetensors

    Example:  lora-lab evaluate a.safetensors --behaviour wiki.txt
    """
    from lora_lab.cli.verbs import step
    from lora_lab.files.disk import refuse_existing
    from lora_lab.results import tables

    json = output.output or Path("evaluate.json")
    beside = [json.with_suffix(f".{ending}") for ending in output.tables]
    if output.output:
        refuse_existing(json, force=output.force, inputs=[Path(path) for path in adapters])
    for path in beside:
        tables.refuse(path, force=output.force)
    loaded = loading.load(adapters)
    tasks = task.of(loaded)
    with computing.execution("evaluating") as on:
        result = question.run(loaded, tasks, on)
    result = replace(result, provenance={**result.provenance, "recipe": {"steps": [step()]}})
    written = [result.save(json)] if output.output else []
    for path in beside:
        written += tables.save(result, path)
    output.print(result, show)
    if written:
        say_written(written)


def show(result: Any) -> None:
    """The scores as a table."""
    metrics = list(result.parameters["metrics"])
    heading = f"Scores on the {result.parameters['split']} split, 95 % intervals"
    table(heading, ("adapter", "task", "n", *map(in_words, metrics)), _rows(result, metrics))
    say_not_defined(result)


def _rows(result: Any, metrics: list[str]) -> list[tuple[object, ...]]:
    return [
        (
            row["adapter"],
            row["task"],
            row["examples"],
            *estimates(row, metrics),
        )
        for row in result.rows()
    ]
