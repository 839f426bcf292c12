"""`lora-lab evaluate`: how good adapters are on their task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import common


def command(
    paths: Annotated[list[str], typer.Argument(help="Adapters.")],
    task: Annotated[str | None, typer.Option(help="Built-in task or task file; by default the adapter's own.")] = None,
    trust_record: common.TrustOption = False,
    config: common.ConfigOption = None,
    alpha: common.AlphaOption = None,
    adapter_name: common.NameOption = None,
    split: common.SplitOption = "test",
    base: Annotated[bool, typer.Option(help="Score the base model without an adapter, too.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.", min=0)] = 0,
    device: common.DeviceOption = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the result to this JSON file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Score adapters on their own task's test split, with 95 % intervals over the examples.

    A language model's loss and accuracy are means over texts of the mean over a text's tokens; its perplexity is the
    exponential of the mean loss over all tokens. Of multiple choice, accuracy takes the option of the highest mean
    log-likelihood per token; acc, acc_norm and acc_bytes are lm-evaluation-harness's: of the highest sum over the
    option's tokens, and of that sum per character and per byte of the option.

    Example:  lora-lab evaluate a.safetensors b.safetensors
    """
    from ..adapters.adapter import Adapter
    from ..analysis.evaluate import evaluate
    from ..files.disk import refuse_existing
    from ..tasks.task import resolve_device

    if output:
        refuse_existing(output, force=force, inputs=[Path(path) for path in paths])
    adapters = [Adapter.load(path, config=config, alpha=alpha, adapter_name=adapter_name) for path in paths]
    with common.progress("evaluating") as report:
        result = evaluate(
            adapters,
            given=task,
            trust_record=trust_record,
            split=split,
            base=base,
            seed=seed,
            device=resolve_device(device),
            progress=report,
        )
    if output:
        result.save(output)
    if json:
        common.print_json(result.to_json())
        return
    more = [name for name in ("perplexity", "acc", "acc_norm", "acc_bytes") if name in result.columns]
    headings = ("adapter", "task", "n", "accuracy", "loss", *more)
    common.table(f"Scores on the {split} split, 95 % intervals", headings, _rows(result, more))
    if output:
        common.say_written([output])


def _rows(result: Any, more: list[str]) -> list[tuple[object, ...]]:
    return [
        (
            row["adapter"],
            row["task"],
            row["examples"],
            common.estimate(row["accuracy"], row["accuracy_low"], row["accuracy_high"]),
            common.estimate(row["loss"], row["loss_low"], row["loss_high"]),
            *(common.estimate(row[name], row[f"{name}_low"], row[f"{name}_high"]) for name in more),
        )
        for row in result.rows()
    ]
