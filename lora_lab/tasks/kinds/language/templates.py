"""Texts with columns in braces, which every row of a table fills in; or the name of one column."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lora_lab.tasks.tables import text_of
from lora_lab.tasks.task import Task

_FIELD = re.compile(r"{([^{}]+)}")
"""A column's place in a text."""


def columns_of(template: str) -> list[str]:
    """The columns in braces; where there are none, the template is the name of one."""
    return list(dict.fromkeys(_FIELD.findall(template))) or [template]


def filled(task: Task, template: str, cells: Mapping[str, object]) -> str | list[object]:
    """The text with an example's cells, or what stands in the one column: a text, or a conversation as a list.

    TaskError as of `text_of`.
    """
    if not _FIELD.search(template):
        cell = cells[template]
        return cell if isinstance(cell, list) else text_of(task, cell, template)
    return _FIELD.sub(lambda field: text_of(task, cells[field[1]], field[1]), template)
