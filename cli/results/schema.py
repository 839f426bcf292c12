"""`lora-lab schema`: what the files of results hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from lora_lab.cli.terminal import console, print_json, table
from lora_lab.options import option


@dataclass(frozen=True)
class Form:
    """As what."""

    json: bool = option(False, "Print a JSON Schema of the kind's files.")


def command(
    *,
    kind: Annotated[
        str | None, typer.Argument(help="Kind of result, by the verb; without one, all are listed.")
    ] = None,
    output: Form,
) -> None:
    """Every column of a kind of results: its type, its unit and what it means.

    Shares are fractions from 0 to 1, losses nats; an interval is of 95 %, from `x_low` to `x_high` for `x`. A number
    that is not finite is null.

    Example:  lora-lab schema shapley
    """
    from lora_lab.results import schema

    if kind is None:
        listed = {name: [said.version, said.meaning] for name, said in schema.kinds().items()}
        if output.json:
            print_json({name: schema.json_schema(name) for name in listed})
            return
        table(
            "Kinds of results",
            ("kind", "schema", "what they hold"),
            [[n, str(v), m] for n, (v, m) in listed.items()],
            texts=3,
        )
        return
    if output.json:
        print_json(schema.json_schema(kind))
        return
    rows = schema.documented(kind)
    table(f"Schema of {kind}", list(rows[0]), [list(row.values()) for row in rows], texts=5)
    for name, meaning in (schema.kinds()[kind].open if kind in schema.kinds() else {}).items():
        console.print(f"{name} may have further columns: {meaning}")
