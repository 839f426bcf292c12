"""The page itself: what is known of every result, laid into a template; equal results give equal bytes."""

from __future__ import annotations

import base64
import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lora_lab import files
from lora_lab.errors import LoraLabWarning, OptionError
from lora_lab.escape import visible
from lora_lab.files.ownership import MARK
from lora_lab.pages.collecting import Collected, collect
from lora_lab.pages.drawing import Drawing, drawings
from lora_lab.pages.tables import Table, shorter, shown
from lora_lab.progress import duration
from lora_lab.results import schema
from lora_lab.results.result import Result

ROWS = 500
"""Rows of each table that a page holds, by default."""
_LONGEST = 2000
"""Characters of a parameter."""
_MOST = 50
"""Records of a parameter, such as those of adapters."""
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """One result, as the page shows it."""

    id: str
    place: str
    kind: str
    title: str
    facts: list[tuple[str, str]]
    drawings: list[Drawing]
    tables: list[Table]
    adapters: list[str]
    tasks: list[str]
    parameters: list[tuple[str, str, list[str]]]
    """Name, what it means, value in lines."""
    origin: list[tuple[str, str]]
    command: str | None
    date: str


def save(
    places: Sequence[Path | Result],
    path: Path,
    *,
    title: str | None = None,
    rows: int = ROWS,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write the page of all results in some folders, files or at hand; a warning names each file that is damaged.

    At most `rows` of each table are in it. Errors as for `collect`, and FileError where something else is at `path`.
    """
    if path.suffix not in (".html", ".htm"):
        raise OptionError(f"{path}: a page is written as .html")
    files.refuse_existing(path, force=force)
    found = collect(places)
    for _, why in found.unread:
        warnings.warn(f"{why}; left out", LoraLabWarning, stacklevel=2)
    named = [place.resolve().name for place in places if isinstance(place, Path) and place.is_dir()]
    text = as_html(found, title=title or ", ".join(named) or "Results", rows=rows, progress=progress)
    files.write_bytes(path, text.encode("utf-8", "backslashreplace"))
    return path


def as_html(
    found: Collected,
    *,
    title: str,
    rows: int = ROWS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """The page as HTML: one file that loads nothing, and that runs no script but its own."""
    sections = []
    for i, (place, result) in enumerate(found.results):
        progress(i, len(found.results))
        sections.append(_section(f"r{i + 1}", place, result, rows))
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    return environment.get_template("page.html").render(
        mark=MARK,
        title=title,
        sections=sections,
        unread=found.unread,
        counted=_counted(sections),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        style=Markup(style),  # noqa: S704 (our own file)
        script=Markup(script),  # noqa: S704 (our own file)
    )


def _section(name: str, place: str, result: Result, rows: int) -> Section:
    kind, said, origin = schema.kinds().get(result.kind), result.parameters, dict(result.provenance)
    meaning = kind.meaning if kind else f"a result of kind {result.kind}"
    adapters, tasks = _adapters(result), _tasks(said)
    command, date = origin.pop("command", None), str(origin.pop("date", None) or "")
    examples = origin.get("examples")
    facts = [
        ("task", ", ".join(tasks)),
        ("split", str(said.get("split") or "")),
        ("examples", f"{examples:,}" if isinstance(examples, int) else ""),
        ("adapters", str(len(adapters) or "")),
        ("computed", date[:10]),
    ]
    known = {**(kind.parameters if kind else {})}
    return Section(
        name,
        place,
        result.kind,
        meaning[:1].upper() + meaning[1:],
        [(heading, value) for heading, value in facts if value],
        drawings(result, name),
        shown(result, rows),
        adapters,
        tasks,
        [(key.replace("_", " "), known.get(key, ""), _lines(value)) for key, value in said.items()],
        [*([("date", date)] if date else []), *_origin(origin)],
        command if isinstance(command, str) else None,
        date[:10],
    )


def _adapters(result: Result) -> list[str]:
    """The labels of the adapters that a result is about."""
    listed = result.parameters.get("adapters")
    if isinstance(listed, list):
        return [str(each.get("label")) if isinstance(each, Mapping) else str(each) for each in listed]
    named = result.columns.get("adapter", ())
    return list(dict.fromkeys(name for name in named if isinstance(name, str)))


def _tasks(said: Mapping[str, Any]) -> list[str]:
    records = said.get("task_names") or said.get("tasks") or [said.get("task")]
    if not isinstance(records, list):
        return []
    names = [
        (record.get("name") or record.get("kind") or "") if isinstance(record, Mapping) else record
        for record in records
    ]
    return list(dict.fromkeys(str(name) for name in names if name))


def _lines(value: Any) -> list[str]:
    """A parameter in lines: one for each of several records."""
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        more = [f"… {len(value) - _MOST} more"] if len(value) > _MOST else []
        return [*map(_told, value[:_MOST]), *more]
    return [_told(value)]


def _told(value: Any) -> str:
    """A text or number as it is, a list of them between commas, a record as names with values, all else as JSON."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and value and all(isinstance(part, str | int | float) for part in value):
        return shorter(", ".join(map(_told, value)), _LONGEST)
    if isinstance(value, Mapping) and value and all(isinstance(part, str | int | float) for part in value.values()):
        return shorter(", ".join(f"{name} {_told(part)}" for name, part in value.items()), _LONGEST)
    return "–" if value is None else shorter(value, _LONGEST)


def _origin(origin: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for key, value in origin.items():
        if value is None:
            continue
        if key == "elapsed_s" and isinstance(value, int | float):
            found.append(("time", duration(value)))
        elif isinstance(value, Mapping):
            found.append((key, " · ".join(f"{name} {part}" for name, part in value.items() if part is not None)))
        elif isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
            found += [(key, " · ".join(str(part) for part in each.values())) for each in value]
        else:
            found.append((key.replace("_", " "), _told(value)))
    return [(key, shorter(text, _LONGEST)) for key, text in found if text]


def _counted(sections: Sequence[Section]) -> list[tuple[str, str]]:
    """What the summary counts: a number, and of what."""
    kinds = {section.kind for section in sections}
    adapters = {name for section in sections for name in section.adapters}
    tasks = {name for section in sections for name in section.tasks}
    dates = sorted(section.date for section in sections if section.date)
    when = dates[0] if dates and dates[0] == dates[-1] else f"{dates[0]} – {dates[-1]}" if dates else ""
    counts = [(len(sections), "result"), (len(kinds), "kind"), (len(adapters), "adapter"), (len(tasks), "task")]
    told = [(str(count), word if count == 1 else f"{word}s") for count, word in counts if count]
    return [*told, *([(when, "computed")] if when else [])]
