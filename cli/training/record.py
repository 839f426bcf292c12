"""`lora-lab record`: what an adapter was trained on, put into its file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from lora_lab.cli.options import AsJson
from lora_lab.cli.terminal import print_json, table
from lora_lab.options import option


@dataclass(frozen=True)
class Facts:
    """What was not recorded when the adapters were trained."""

    task: str | None = option(None, "Built-in task or task file, on which later commands score them without --task.")
    method: str | None = option(
        None, "How they were trained (lora, coto, or any other word); adapters of one method are a group."
    )
    seed: int | None = option(
        None, "Seed of the run, by which adapters of several tasks are brought together.", least=0
    )


def command(
    adapters: Annotated[list[str], typer.Argument(help="Files or folders of adapters, of one task, method and seed.")],
    facts: Facts,
    output: AsJson,
) -> None:
    """Put task, training method and seed into the files of adapters that another program trained.

    Only the header of the weights' file is changed; tensors and configuration stay bit for bit. The record is signed
    as your own, so that later commands follow it. What a stranger has recorded is not taken over. Without options, the
    records are shown.

    Example:  lora-lab record runs/plain/adapter --task my.toml --method lora --seed 3
    """
    from lora_lab import tasks
    from lora_lab.adapters.adapter import Adapter
    from lora_lab.adapters.files.recording import Recorded, put_record

    given: dict[str, Any] = {name: value for name, value in vars(facts).items() if value is not None}
    if facts.task is not None:
        given["task"] = tasks.from_name(facts.task).record
    found = put_record(adapters, given) if given else [Recorded(Adapter.load(path).record) for path in adapters]
    reports = [
        {"path": path, "record": each.record, "dropped": each.dropped}
        for path, each in zip(adapters, found, strict=True)
    ]
    if output.json:
        print_json(reports if len(reports) > 1 else reports[0])
        return
    for report in reports:
        _show(report)


def _show(report: dict[str, Any]) -> None:
    record = report["record"]
    task = record.get("task")
    named = task.get("name") or task.get("kind") if isinstance(task, dict) else None
    rows: list[tuple[str, object]] = [("task", named), ("method", record.get("method")), ("seed", record.get("seed"))]
    others = sorted(set(record) - {"task", "method", "seed"})
    if others:
        rows.append(("also recorded", ", ".join(others)))
    if report["dropped"]:
        rows.append(("a stranger's, not taken over", ", ".join(report["dropped"])))
    table(f"Record of {report['path']}", ("", ""), [(what, "–" if value is None else value) for what, value in rows])
