"""`lora-lab tasks`: what can be trained and scored on."""

from __future__ import annotations

from dataclasses import dataclass

from lora_lab.cli.options import AsJson
from lora_lab.cli.terminal import console, print_json, table
from lora_lab.options import option


@dataclass(frozen=True)
class Listing:
    """What is listed."""

    example: str | None = option(None, "Print a commented task file of this kind, e.g. text-classification.")
    adapter: str | None = option(
        None,
        "Print a short task file for this adapter, of the kind that its base model is for (or of that of --example); "
        "its data is yours to name.",
        flag="for",
    )


def command(listing: Listing, output: AsJson) -> None:
    """List the built-in tasks, or print a file that describes a task of your own.

    Example:  lora-lab tasks --example text-classification > my-task.toml

    Example:  lora-lab tasks --for adapter/ > my-task.toml
    """
    from lora_lab import tasks
    from lora_lab.tasks.task import SPLITS

    if listing.adapter is not None:
        from lora_lab.adapters.adapter import Adapter
        from lora_lab.tasks.proposed import task_file_for

        print(task_file_for(Adapter.load(listing.adapter), listing.example), end="")
        return
    if listing.example is not None:
        print(tasks.example(listing.example), end="")
        return
    rows = [
        {"name": t.name, "labels": t.labels, "about": t.about, **{s: len(t.split(s)) for s in SPLITS}}
        for t in tasks.iterate()
    ]
    if output.json:
        print_json(rows)
        return
    headings = ("task", "labels", *SPLITS, "what is asked")
    table("Built-in tasks", headings, [[r["name"], r["labels"], *(r[s] for s in SPLITS), r["about"]] for r in rows])
    console.print(f"Kinds of task files: {', '.join(tasks.KINDS)} (--example KIND prints one)")
