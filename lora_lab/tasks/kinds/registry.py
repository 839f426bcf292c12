"""The tasks that there are: built in by name, or described in a file or in an adapter's record."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_lab.errors import OptionError, TrustError, unknown
from lora_lab.files.toml import read_toml
from lora_lab.files.trust import ANYWHERE, Reach
from lora_lab.registry import Registry
from lora_lab.tasks.kinds import harness
from lora_lab.tasks.kinds.digits import LABELLINGS, Digits
from lora_lab.tasks.kinds.harness import Harness
from lora_lab.tasks.kinds.images import clip, vision
from lora_lab.tasks.kinds.images.clip import Clip
from lora_lab.tasks.kinds.images.vision import ImageClassification
from lora_lab.tasks.kinds.language import generation, preference, seq2seq
from lora_lab.tasks.kinds.language.generation import Generation
from lora_lab.tasks.kinds.language.language import CAUSAL_EXAMPLE, CHOICE_EXAMPLE, CausalLM, MultipleChoice
from lora_lab.tasks.kinds.language.preference import Preference
from lora_lab.tasks.kinds.language.seq2seq import Seq2Seq
from lora_lab.tasks.kinds.texts import multi_label, reading, regression, tagging, text
from lora_lab.tasks.kinds.texts.multi_label import MultiLabel
from lora_lab.tasks.kinds.texts.reading import QuestionAnswering
from lora_lab.tasks.kinds.texts.regression import Regression
from lora_lab.tasks.kinds.texts.tagging import TokenClassification
from lora_lab.tasks.kinds.texts.text import TextClassification
from lora_lab.tasks.python.own import PYTHON
from lora_lab.tasks.python.python_file import from_python, is_python
from lora_lab.tasks.task import Task


def from_name(name: str) -> Task:
    """A built-in task by its name, or the one that a TOML file describes, or a Python file has (PATH.py:NAME).

    A Python file is run: only for names that the user has typed.
    """
    if is_python(name):
        return from_python(name)
    if name.endswith(".toml"):
        return from_file(Path(name))
    if name not in TASKS:
        if os.path.isfile(name):
            return from_file(Path(name))
        raise unknown("task", name, TASKS)
    return TASKS[name]()


def from_file(path: Path) -> Task:
    """The task described in a TOML file (see `example`)."""
    return from_record(read_toml(path, "a task file"), base=path.parent, where=str(path))


def from_record(
    record: Mapping[str, Any], *, base: Path | None = None, where: str = "the record", reach: Reach = ANYWHERE
) -> Task:
    """The task that an adapter's record or a task file describes; relative paths are taken from `base`.

    Whether a record may have it is judged before (see trust.py); `reach` is what came of it.
    """
    if "name" in record and "kind" not in record:
        if record["name"] not in list(TASKS):  # a record's name is never a file's
            raise unknown(f"task in {where}:", str(record["name"]), TASKS)
        return TASKS[record["name"]]()
    kind = record.get("kind")
    if kind == PYTHON:
        raise TrustError(
            f"{where}: trained on a task in Python ({record.get('file') or record.get('name')}), which runs only where "
            "you name it: `task` FILE.py:NAME"
        )
    if kind is None:
        raise OptionError(f"{where}: no kind of task; there are: {', '.join(KINDS)}")
    if kind not in list(KINDS):
        raise unknown(f"kind of task in {where}:", str(kind), KINDS)
    task = KINDS[kind].build(record, base or Path(), where)
    task.reach = reach
    return task


def from_spec(spec: Mapping[str, Any], *, reach: Reach = ANYWHERE) -> Task:
    """The task of a `Task.spec` that this program made and handed on, to another process: of Python files, too."""
    if spec.get("kind") == PYTHON and spec.get("file"):
        return from_python(spec["file"])
    return from_record(spec, reach=reach)


def example(kind: str) -> str:
    """A commented task file of this kind."""
    return KINDS[kind].example


def iterate() -> Iterator[Task]:
    """Every built-in task."""
    for build in TASKS.values():
        yield build()


TASKS: dict[str, Callable[[], Task]] = {f"digits/{name}": partial(Digits, name) for name in LABELLINGS}
"""Built-in tasks, each on the base model that is shipped in the package."""


@dataclass(frozen=True)
class TaskKind:
    """A kind of task that a file can describe."""

    build: Callable[[Mapping[str, Any], Path, str], Task]
    """(keys, folder of relative paths, where they stand) → task."""
    example: str
    """A commented file."""
    fits: tuple[str, ...] = ()
    """How the names of the classes of models end that it is proposed for."""


_CAUSAL = ("ForCausalLM", "LMHeadModel")
_ONE_ROW = ("ForSequenceClassification",)

KINDS = Registry(
    "kind of task",
    "lora_lab.task_kinds",
    TaskKind,
    {
        "text-classification": TaskKind(TextClassification.from_record, text.EXAMPLE, _ONE_ROW),
        "regression": TaskKind(Regression.from_record, regression.EXAMPLE, _ONE_ROW),
        "multi-label": TaskKind(MultiLabel.from_record, multi_label.EXAMPLE, _ONE_ROW),
        "token-classification": TaskKind(TokenClassification.from_record, tagging.EXAMPLE, ("ForTokenClassification",)),
        "question-answering": TaskKind(QuestionAnswering.from_record, reading.EXAMPLE, ("ForQuestionAnswering",)),
        "causal-lm": TaskKind(CausalLM.from_record, CAUSAL_EXAMPLE, _CAUSAL),
        "multiple-choice": TaskKind(MultipleChoice.from_record, CHOICE_EXAMPLE, _CAUSAL),
        "generation": TaskKind(Generation.from_record, generation.EXAMPLE, _CAUSAL),
        "preference": TaskKind(Preference.from_record, preference.EXAMPLE, _CAUSAL),
        "lm-eval": TaskKind(Harness.from_record, harness.EXAMPLE),
        "seq2seq": TaskKind(Seq2Seq.from_record, seq2seq.EXAMPLE, ("ForConditionalGeneration",)),
        "image-classification": TaskKind(ImageClassification.from_record, vision.EXAMPLE, ("ForImageClassification",)),
        "clip": TaskKind(Clip.from_record, clip.EXAMPLE, ("CLIPModel",)),
    },
)
"""Kinds of tasks by name."""
