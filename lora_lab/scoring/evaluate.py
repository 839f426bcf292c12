"""An adapter's score on a task."""

from __future__ import annotations

import base64
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_lab import tasks
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.attached import attach
from lora_lab.errors import LoraLabError, LoraLabWarning, MismatchError, OptionError, TunerError
from lora_lab.files.trust import ANYWHERE, Reach, judged
from lora_lab.results.result import Journal, Result, columns, fingerprint, provenance
from lora_lab.results.stats import Sampled, proportion
from lora_lab.tasks import digests
from lora_lab.tasks.task import Scores, Split, Task, resolve_device

TASK_HELP = (
    "say on which with --task NAME (`lora-lab tasks` lists them) or --task FILE.toml, a file such as: "
    'kind = "text-classification" / base = "path/to/model" / data = "reviews.csv" / text = "text" / label = "label" '
    "(one a line; `lora-lab tasks --example text-classification` prints a commented one)"
)


def score(
    task: Task,
    adapter: Adapter | None,
    split: str = "test",
    *,
    device: torch.device | None = None,
    keep_logits: bool = False,
) -> Scores:
    """Per-example scores of the task's base model with the adapter on (None: the base alone)."""
    model = task.model_on(device or resolve_device())
    if adapter is None:
        return task.score(model, split, keep_logits=keep_logits)
    with attach(model, adapter) as attached:
        return task.score(attached.model, split, keep_logits=keep_logits)


def evaluate(
    adapters: Sequence[Adapter],
    *,
    given: str | None = None,
    trust_record: bool = False,
    split: str = "test",
    base: bool = True,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Every adapter on its own task (or the one given), and every base model alone, with 95 % intervals.

    What an adapter's record may name without `trust_record` says trust.py.
    """
    began = time.perf_counter()
    found = [task_of(adapter, given=given, trust_record=trust_record) for adapter in adapters]
    shared = {fingerprint(task.record): task for task in reversed(found)}  # equal tasks load their data once
    runs: list[tuple[Adapter | None, Task]] = [*((None, task) for task in shared.values() if base)]
    runs += [(adapter, shared[fingerprint(task.record)]) for adapter, task in zip(adapters, found, strict=True)]
    measures = list(dict.fromkeys(name for task in shared.values() for name in task.measures))
    rows = []
    for i, (adapter, task) in enumerate(runs):
        scores = score(task, adapter, split, device=device, keep_logits=bool(task.measures))
        rows.append({**_described(adapter, task), "examples": len(scores), **_estimates(scores, seed)})
        if any(not each.classifies for each in found):
            rows[-1] |= _perplexity(scores, None if task.classifies else task.target_counts(split), seed)
        rows[-1] |= _shares(measures, task.measured(scores, split))
        if progress:
            progress(i + 1, len(runs))
    return Result(
        "evaluate",
        columns(rows),
        {"split": split, "tasks": [task.record for task in shared.values()], "seed": seed},
        {},
        provenance(
            inputs=[Path(a.source) for a in adapters], elapsed_s=time.perf_counter() - began, examples=len(scores)
        ),
    )


def _described(adapter: Adapter | None, task: Task) -> dict[str, Any]:
    record = adapter.record if adapter else {}
    label = adapter.label if adapter else "(base model alone)"
    return {"adapter": label, "task": task.name, "method": record.get("method"), "seed": record.get("seed")}


def _estimates(scores: Scores, seed: int) -> dict[str, float]:
    """Mean loss with a bootstrap interval, and accuracy with Wilson's (see `proportion`)."""
    loss = Sampled.of(scores.loss[None], seed=seed).estimate(lambda means: means[0])
    cells = dict(zip(("loss", "loss_low", "loss_high"), loss, strict=True))
    return cells | dict(zip(("accuracy", "accuracy_low", "accuracy_high"), proportion(scores.correct), strict=True))


def _shares(measures: Sequence[str], right: Mapping[str, npt.NDArray[np.bool_]]) -> dict[str, float | None]:
    """Share of examples that are right by each measure, with Wilson's interval; None where there is no such measure."""
    cells: dict[str, float | None] = {}
    for name in measures:
        found: tuple[float | None, ...] = (None, None, None)
        if name in right:
            found = proportion(right[name])
        cells |= dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))
    return cells


def _perplexity(scores: Scores, counts: npt.NDArray[np.int64] | None, seed: int) -> dict[str, float | None]:
    """exp of the mean loss over all tokens, so that a long text counts for more than a short one; None without."""
    if counts is None:
        return dict.fromkeys(("perplexity", "perplexity_low", "perplexity_high"))
    sampled = Sampled.of(np.stack([scores.loss * counts, counts.astype(np.float64)]), seed=seed)
    value, low, high = sampled[[0, 1]].estimate(lambda means: np.exp(means[0] / means[1]))
    return {"perplexity": value, "perplexity_low": low, "perplexity_high": high}


def labels_of(adapters: Sequence[Adapter]) -> list[str]:
    """A different name for each adapter: its label, with the folder before it where labels are the same."""
    labels = [adapter.label for adapter in adapters]
    for i, adapter in enumerate(adapters):
        if [a.label for a in adapters].count(adapter.label) > 1:
            labels[i] = "/".join(Path(adapter.source).parts[-2:]).removesuffix(".safetensors")
    return [f"{label} ({i})" if labels.count(label) > 1 else label for i, label in enumerate(labels)]


def method_of(adapter: Adapter, label: str) -> str:
    """The training method that an adapter records, else its own label: adapters of unknown methods are no group."""
    return str(adapter.record.get("method") or label)


def described(adapter: Adapter) -> dict[str, Any]:
    """What a result's parameters say of an adapter: label, method, seed, ‖ΔW‖ (None where there is no ΔW)."""
    try:
        norm = adapter.total_norm
    except TunerError:
        norm = None
    return {
        "label": adapter.label,
        "method": adapter.record.get("method"),
        "seed": adapter.record.get("seed"),
        "norm": norm,
    }


def identity(adapter: Adapter) -> list[Any]:
    """All that an adapter's scores hang on, every bit of it hashed; for run ids."""
    return [described(adapter), adapter.config, sorted(adapter.tensors), _digest(adapter.tensors.values())]


_SCORING = 1
"""Of how the tasks of this package score: another number, and what was scored before is scored again."""


def examples_of(task: Task, split: str) -> list[Any]:
    """All that scores hang on besides the adapter, for run ids: task, base model, examples, and the code that scores.

    That of this package counts by its version of scoring, that of a task class of the user's own by what it does.
    """
    examples = _digest([*task.split(split).inputs.values(), *task.digest])
    return [task.spec, task.base_digest, split, examples, _SCORING, digests.of_code(task)]


@dataclass(frozen=True)
class Sent:
    """A task on its way to workers, as all that it is built from; made of a task, which was judged before."""

    record: Mapping[str, Any]
    reach: Reach = ANYWHERE

    @classmethod
    def of(cls, task: Task) -> Sent:
        """OptionError for a task that its record does not give again, such as one of a class of the user's own."""
        try:
            again = tasks.from_record(task.spec)
        except LoraLabError:
            again = None
        if type(again) is not type(task):
            kind = type(task).__name__
            raise OptionError(f"task {task.name} ({kind}) cannot be built again from its record, as workers have to")
        return cls(task.spec, task.reach)

    def task(self) -> Task:
        """The task, built again."""
        return tasks.from_record(self.record, reach=self.reach)


@dataclass(frozen=True)
class Examples:
    """So many examples of a split (all for None), and a hash by which another machine knows that it has the same."""

    split: str
    count: int | None = None
    digest: str | None = None
    """Of the whole split; None is not compared."""

    @classmethod
    def of(cls, task: Task, split: str, count: int | None = None) -> Examples:
        """Those of this machine."""
        return cls(split, count, _digest(task.split(split).inputs.values()))

    def of_task(self, task: Task) -> Split:
        """The examples themselves; MismatchError where this machine has others."""
        whole = task.split(self.split)
        if self.digest not in (None, _digest(whole.inputs.values())):
            raise MismatchError(f"task {task.name}: a worker's machine has other data in the {self.split} split")
        return whole.subset(self.count)


def bare(adapter: Adapter) -> Adapter:
    """The adapter without what was computed of it, each tensor with a storage of its own: small to send."""
    return replace(adapter, tensors={key: tensor.detach().cpu().clone() for key, tensor in adapter.tensors.items()})


def pack(scores: Scores) -> dict[str, Any]:
    """Scores as text, with their number; losses and margins were computed in float32, so nothing is lost."""
    text: dict[str, Any] = {"examples": len(scores), "loss": _floats(scores.loss), "margin": _floats(scores.margin)}
    if scores.correct.dtype == np.bool_:
        text["correct"] = base64.b64encode(np.packbits(scores.correct.astype(np.bool_)).tobytes()).decode()
    else:  # shares of tokens
        text["shares"] = base64.b64encode(scores.correct.astype("<f8").tobytes()).decode()
    if scores.logits is not None:
        text["logits"] = _floats(scores.logits)
    return text


def unpack(text: Mapping[str, Any]) -> Scores:
    """The inverse of `pack`; ValueError, KeyError or TypeError where it is not what `pack` gives."""
    loss, margin = _from_text(text["loss"]), _from_text(text["margin"])
    n = len(loss)
    logits = None
    if "shares" in text:
        correct: npt.NDArray[Any] = np.frombuffer(base64.b64decode(text["shares"]), "<f8").astype(np.float64)
    else:
        bits = np.frombuffer(base64.b64decode(text["correct"]), np.uint8)
        if len(bits) != -(-n // 8):
            raise ValueError(f"{len(bits)} bytes of right and wrong for {n} losses")
        correct = np.unpackbits(bits, count=n).astype(np.bool_)
    if "logits" in text:
        logits = _from_text(text["logits"]).astype(np.float32).reshape(n, -1)
    if not text["examples"] == n == len(margin) == len(correct):
        raise ValueError(f"{n} losses, {len(margin)} margins, {len(correct)} answers of {text['examples']} examples")
    return Scores(loss, correct, margin, logits)


def remembered(journal: Journal | None, key: str, examples: int | None = None) -> Scores | None:
    """Scores that a journal holds; None where they are not there, or are not those of so many examples."""
    if journal is None or key not in journal:
        return None
    try:
        scores = unpack(journal[key])
        if examples is not None and len(scores) != examples:
            raise ValueError(f"{len(scores)} examples, not {examples}")
    except (KeyError, TypeError, ValueError) as error:
        text = f"{journal.path}: scores that do not fit ({error}) are computed again"
        warnings.warn(text, LoraLabWarning, stacklevel=3)
        return None
    return scores


def _floats(values: npt.NDArray[Any]) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _from_text(text: str) -> npt.NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tasks_of(adapters: Sequence[Adapter], given: Sequence[str] = (), *, trust_record: bool = False) -> list[Task]:
    """A task for each adapter: its own, or the one that is given for all, or one given for each of them."""
    if len(given) > 1 and len(given) != len(adapters):
        raise OptionError(f"{len(adapters)} adapters and {len(given)} tasks; one for all, or one an adapter")
    names: list[str | None] = [*given] or [None]
    names = names * len(adapters) if len(names) == 1 else names
    built: dict[str, Task] = {}  # equal tasks load their data once
    found = []
    for adapter, name in zip(adapters, names, strict=True):
        task = task_of(adapter, given=name, trust_record=trust_record)
        found.append(built.setdefault(fingerprint(task.record), task))
    return found


def task_of(*adapters: Adapter, given: str | None = None, trust_record: bool = False) -> Task:
    """The task named by the user, or else the one that the adapters' records agree on.

    TrustError where a record that is not the user's own asks for more than it may without `trust_record`.
    """
    if given is not None:
        return tasks.from_name(given)
    records = [adapter.record.get("task") for adapter in adapters]
    for adapter, record in zip(adapters, records, strict=True):
        if not record or not isinstance(record, dict):
            raise MismatchError(f"{adapter.source}: carries no record of its task; {TASK_HELP}")
    first = records[0]
    for adapter, record in zip(adapters, records, strict=True):
        if record != first:
            raise MismatchError(
                f"{adapters[0].source} and {adapter.source} were trained on different tasks, "
                f"{_difference(first, record)}; choose one with --task"
            )
    assert isinstance(first, dict)
    # of equal records, one of the user's own speaks for all
    speaker = next((adapter for adapter in adapters if adapter.origin.own), adapters[0])
    reach = judged(first, speaker.origin, speaker.config, speaker.source, trust_record=trust_record)
    base = _beside(first, speaker) if reach.folder is None else Path(reach.folder)
    return tasks.from_record(first, base=base, where=f"the record of {speaker.source}", reach=reach)


def _beside(record: Mapping[str, Any], adapter: Adapter) -> Path:
    """Where a record's relative paths begin: the current folder, or the adapter's, if the base is only found there."""
    base, folder = record.get("base"), Path(adapter.source).parent
    if not isinstance(base, str):
        return Path()
    return folder if not os.path.exists(base) and base and os.path.isdir(folder / base) else Path()


def _difference(first: object, second: object) -> str:
    """How two records of tasks differ, in words: by name, or by the first key."""
    if not isinstance(first, dict) or not isinstance(second, dict):
        return f"{first} and {second}"
    if "name" in first and "name" in second:
        return f"{first['name']} and {second['name']}"
    key = next(key for key in {**first, **second} if first.get(key) != second.get(key))
    return f"whose {key} is {first.get(key)!r} and {second.get(key)!r}"
