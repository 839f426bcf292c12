"""`lora-lab inspect`: what is in an adapter file."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from lora_lab.cli.options import AsJson, Reading
from lora_lab.cli.terminal import console, messages, number, print_json, table, with_flags

SCHEMA = 3
"""Of the report: version 2 had no hash, and version 1 problems and notes together as warnings, and no `ok`."""


def command(
    paths: Annotated[list[str], typer.Argument(help="Files or folders of any format, checkpoints, hub ids org/name.")],
    reading: Reading,
    output: AsJson,
) -> None:
    """Print modules, ranks, scales, norms and everything odd; reports also on adapters that other verbs refuse.

    Ends with exit code 1 where one cannot be used. JSON is an object for one path and a list of them for several;
    `lora-lab schema inspect` tells what it says.

    Example:  lora-lab inspect a.safetensors --json
    """
    from lora_lab.adapters.files.reading import inspect
    from lora_lab.errors import LoraLabError

    reports = []
    for path in paths:
        try:
            report = describe(inspect(path, **vars(reading)))
        except LoraLabError as error:
            report = _unread(str(error))
        reports.append({"path": path, "schema": SCHEMA, **report})
        if not output.json:
            _show(path, report)
        for problem in report["problems"]:
            messages.print(f"error: {with_flags(problem)}")
    if output.json:
        print_json(reports if len(paths) > 1 else reports[0])
    if not all(report["ok"] for report in reports):
        raise typer.Exit(1)


def _unread(problem: str) -> dict[str, Any]:
    """The report on what is no adapter at all."""
    nothing = dict.fromkeys(("format", "tuner", "base_model", "total_norm", "hash"))
    return {
        "ok": False,
        "problems": [problem],
        "notes": [],
        **nothing,
        "modules": [],
        "other_tensors": [],
        "record": {},
    }


def _show(path: str, content: dict[str, Any]) -> None:
    """One adapter as a table, and what is odd with it."""
    if content["format"] is None:
        return
    rows = [
        (
            m["name"],
            m["type"],
            m["rank"],
            m["scale"],
            m["dtype"],
            "×".join(map(str, m["shape"] or [])),
            m["norm"],
            m["effective_rank"],
        )
        for m in content["modules"]
    ]
    base = f", base model {content['base_model']}" if content["base_model"] else ""
    heading = f"{path}: {content['tuner']} in {content['format']} format{base}"
    table(heading, ("module", "type", "rank", "scale", "dtype", "shape", "‖ΔW‖", "effective rank"), rows)
    if content["other_tensors"]:
        console.print(f"other tensors: {', '.join(content['other_tensors'])}")
    ranks = sorted({m["rank"] for m in content["modules"] if m["rank"]})
    total, hashed = number(content["total_norm"]), number(content["hash"])
    shown = ", ".join(map(str, ranks)) or "–"
    console.print(f"{len(rows)} modules, ranks {shown}, total ‖ΔW‖ {total}, hash of ΔW {hashed}")
    if content["record"]:
        console.print(_record(content["record"]))
        for step in _listed(content["record"].get("pruned")):
            if not isinstance(step, dict):
                continue
            options = ", ".join(f"{name} {value}" for name, value in step.items() if name != "from")
            console.print(f"pruned since (what was measured then is of the whole): {options}")
    for note in content["notes"]:
        messages.print(f"warning: {with_flags(note)}")


def describe(listing: Any) -> dict[str, Any]:
    """The report as JSON types; what has no ΔW gets no norm, and the warnings say why."""
    from lora_lab.adapters.formats import keys, products
    from lora_lab.adapters.formats.peft import peft_format
    from lora_lab.errors import LoraLabError
    from lora_lab.geometry.canonical import Canonical, hash_of

    adapter = listing.adapter
    notes = [*listing.warnings]
    reason = products.why_no_delta(adapter.config, adapter.sites.values())
    if reason and adapter.sites:
        notes.append(f"no ΔW from the factors alone: {reason}")
    scales = {}
    if not reason and adapter.why_not_additive:  # LoHa and LoKr
        with contextlib.suppress(LoraLabError):
            scales = products.scales_of(adapter.sites, adapter.config)
    modules, total, sketches = [], 0.0, {}
    for name, site in adapter.sites.items():
        tensors = [adapter.tensors[key] for key in site.keys.values()]
        entry: dict[str, Any] = {"name": name, "type": site.kind, "rank": site.rank, "scale": site.scale}
        entry["dtype"] = str(tensors[0].dtype).removeprefix("torch.")
        entry |= {"shape": None, "norm": None, "effective_rank": None}
        with contextlib.suppress(LoraLabError, RuntimeError):  # an SVD of NaN; the warnings name the tensor
            if name in scales:
                found = products.measures(site, adapter.tensors, adapter.tuner, scales[name])
                entry |= dict(zip(("shape", "norm", "effective_rank"), (list(found[0]), *found[1:]), strict=True))
            elif site.scale is not None:
                update = peft_format.update(site, adapter.tensors, adapter.config)
                entry["shape"] = list(update.shape)
                if not reason:
                    form = Canonical(update)
                    entry |= {"norm": form.norm, "effective_rank": form.effective_rank()}
                    sketches[name] = form.sketch(name)
        modules.append(entry)
        total += (entry["norm"] or 0.0) ** 2
    known = bool(modules) and all(entry["norm"] is not None for entry in modules)
    hashed = known and not listing.problems and len(sketches) == len(modules)
    return {
        "ok": not listing.problems,
        "problems": list(listing.problems),
        "notes": notes,
        "format": listing.format,
        "tuner": adapter.tuner,
        "base_model": adapter.base_model,
        "modules": modules,
        "other_tensors": [key.removeprefix(keys.PREFIX) for key in adapter.others],
        "total_norm": total**0.5 if known else None,
        "hash": hash_of(sketches, {entry["name"]: entry["norm"] for entry in modules}) if hashed else None,
        "record": dict(adapter.record),
    }


def _record(record: dict[str, Any]) -> str:
    """What the record says of how the adapter came to be, as far as it says it."""
    if "merge" in record:
        made = record["merge"]
        inputs = [entry.get("adapter", "?") for entry in _listed(made.get("inputs")) if isinstance(entry, dict)]
        error = made.get("error")
        told = f" (relative error of ΔW {error:.3g})" if isinstance(error, float | int) else ""
        return f"merged by {made.get('method', '?')}{told} from: {', '.join(map(str, inputs))}"
    metrics = record.get("metrics", {}).get("validation", {})
    metrics = metrics if isinstance(metrics, dict) else {}
    main, value = next(((name, value) for name, value in metrics.items() if name != "examples"), ("", None))
    text = f"trained: {record.get('method')} on {record.get('task', {}).get('name', '?')}, seed {record.get('seed')}"
    return text + (f", validation {main.replace('_', ' ')} {value:.3f}" if isinstance(value, float | int) else "")


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
