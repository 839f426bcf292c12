"""`lora-lab doctor`: what of the installation is there, fits or is missing."""

from __future__ import annotations

import dataclasses

import typer

from lora_lab.cli.options import AsJson
from lora_lab.cli.terminal import console, print_json, table

_SIGNS = {"right": "", "missing": "not installed", "outside": "not supported", "broken": "BROKEN"}


def command(output: AsJson) -> None:
    """Say what of the installation is there, fits, or is missing, and for what.

    Versions of packages against those that are supported; extras, with the verbs and methods that need them; devices;
    folders that are kept between runs, with their sizes. Nothing is changed, and no network is asked. Exit code 1
    where something is broken; an extra that is not installed is not.

    Example:  lora-lab doctor --json > doctor.json
    """
    from lora_lab import diagnosis

    found = list(diagnosis.checks())
    broken = [check for check in found if check.status == "broken"]
    if output.json:
        print_json({"ok": not broken, "checks": [dataclasses.asdict(check) for check in found]})
    else:
        rows = [(c.group, c.name, c.found, c.wanted, _SIGNS[c.status]) for c in found]
        table("The installation", ("", "", "found", "supported, or for what", ""), rows, texts=5)
        named = ", ".join(check.name for check in broken)
        console.print(f"broken: {named}" if broken else "nothing is broken")
    if broken:
        raise typer.Exit(1)
