"""What adapters are called, and which of them belong together, where the user says it or their files do not."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import labels_of
from lora_lab.errors import LoraLabNote, OptionError, shorten

LONGEST = 200
"""Characters of a name that is given."""


def named(
    adapters: Sequence[Adapter], labels: Sequence[str] = (), groups: Sequence[tuple[str, str]] = ()
) -> list[Adapter]:
    """The adapters with a name each that tells it apart, and the training methods that the user says.

    `labels` are one an adapter, or none: then the names of their files, with what their paths differ in where these are
    the same. `groups` are pairs of a training method and a pattern with * and ?, of adapters' paths, files' names or
    labels: what matches was trained by that method, whatever its record says. OptionError for labels that are too few
    or the same, for a pattern of no adapter, and for an adapter in two groups.
    """
    if labels and len(labels) != len(adapters):
        raise OptionError(f"{len(adapters)} adapters and {len(labels)} labels; one label an adapter is needed")
    for label in labels:
        check_name("label", label)
    twice = sorted({label for label in labels if list(labels).count(label) > 1})
    if twice:
        raise OptionError(f"the label {twice[0]!r} is given twice; a different one for each adapter is needed")
    called = [
        replace(adapter, name=label) for adapter, label in zip(adapters, labels or labels_of(adapters), strict=True)
    ]
    return _grouped(called, groups) if groups else called


def check_name(what: str, name: str) -> None:
    """OptionError for a name that no table or legend could show."""
    if not name.strip() or not name.isprintable():
        raise OptionError(f"{what} {name!r}: a name that can be printed is needed")
    if len(name) > LONGEST:
        raise OptionError(f"{what} {name[:40]!r}…: {len(name)} characters; at most {LONGEST} are needed")


def _grouped(adapters: Sequence[Adapter], groups: Sequence[tuple[str, str]]) -> list[Adapter]:
    """The adapters, those that a pattern matches with its method in their records."""
    found: dict[int, str] = {}
    for method, pattern in groups:
        check_name("group", method)
        members = [i for i, adapter in enumerate(adapters) if _matches(adapter, pattern)]
        if not members:
            raise OptionError(
                f"group {method}={pattern}: no adapter is called so; there are: {shorten(a.source for a in adapters)}"
            )
        for i in members:
            if found.setdefault(i, method) != method:
                raise OptionError(f"{adapters[i].source}: is in two groups, {found[i]} and {method}; one is needed")
    for i, method in found.items():
        recorded = adapters[i].record.get("method")
        if recorded not in (None, method):
            warnings.warn(
                f"{adapters[i].source}: taken for {method}, its record says {recorded}", LoraLabNote, stacklevel=4
            )
    return [
        replace(adapter, record={**adapter.record, "method": found[i]}) if i in found else adapter
        for i, adapter in enumerate(adapters)
    ]


def _matches(adapter: Adapter, pattern: str) -> bool:
    return any(
        fnmatch.fnmatchcase(name, pattern) for name in (adapter.source, Path(adapter.source).name, adapter.label)
    )
