"""Tasks of lm-evaluation-harness: its own results on every example are the columns of scores."""

from __future__ import annotations

import copy
import json
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Ge, Len
from torch import Tensor, nn

from lora_lab.errors import (
    OptionError,
    TaskError,
    TunerError,
    shorten,
    unknown,
)
from lora_lab.tasks import digests
from lora_lab.tasks.kinds.harness_tasks import (
    SPLITS,
    called,
    described,
    hashed,
    loaded,
    metrics_of,
    placed_on,
    prompt_and_answer,
    quiet,
    telling,
)
from lora_lab.tasks.kinds.language.language import CausalLM
from lora_lab.tasks.scores.metrics import Metric, mean_of
from lora_lab.tasks.settings import COMMON, Count, Seed, Settings
from lora_lab.tasks.splits import by_length
from lora_lab.tasks.task import Scores, Split, Task

_OF_TABLES = ("data_config", "splits", "split_seed", "limit")

EXAMPLE = """\
# A task of your own: lora-lab evaluate ADAPTER --task this-file.toml
kind = "lm-eval"              # needs pip install 'lora-lab[lm-eval]'; the data of most tasks come from the hub

base = "path/to/model"        # folder or hub id; AutoModelForCausalLM must be able to load it
tasks = ["arc_easy"]          # of lm-evaluation-harness (lm-eval ls tasks lists them); of several, a metric is the mean
# metric = "acc"              # the main one; by default the first that the first task names
# num_fewshot = 0             # examples in a prompt; by default what the task says
# fewshot_seed = 1234         # draws them
# limit = 200                 # the first examples of each task
# max_length = 512            # tokens of prompt and answer in training
# include = "my_tasks"        # folder with task files (YAML) of your own, and their code, which is run
""" + "".join(line for line in COMMON.splitlines(keepends=True) if line[2:].split(" ")[0] not in _OF_TABLES)


@dataclass(frozen=True, kw_only=True)
class Keys(Settings):
    """The keys of an lm-eval file."""

    kind: str = "lm-eval"
    data: str | dict[str, str] = ""
    tasks: Annotated[list[str], Len(1), "a list of names of tasks"]
    metric: str | None = None
    num_fewshot: Annotated[int, Ge(0), "a whole number of at least 0"] | None = None
    fewshot_seed: Seed = 1234
    limit: Count | None = None
    include: str | None = None
    max_length: Annotated[int, Ge(2), "a whole number of at least 2"] = 512

    places: ClassVar[tuple[str, ...]] = ("include",)

    @property
    def name(self) -> str:
        """The kind, and the tasks."""
        return f"{self.kind}/{'+'.join(self.tasks)}"

    def check(self, where: str) -> None:
        """OptionError for values that do not go together."""
        for key in ("data", "data_config", "splits"):
            if getattr(self, key):
                raise OptionError(f"{where}: {key} has no use here, since the harness brings its tasks' data")
        for name in self.tasks:
            if not _NAME.fullmatch(name):
                raise OptionError(f"{where}: {name!r} in tasks is no name of a task (letters, digits, _, - and .)")
        if len(set(self.tasks)) < len(self.tasks):
            raise OptionError(f"{where}: a task is named twice in tasks")


_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_OUTCOMES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
"""Metrics of the harness that are right or wrong of an example."""


class Harness(CausalLM):
    """Tasks that lm-evaluation-harness asks a model and judges; adapters are trained on prompt and right answer.

    The test split is what the harness itself scores. Only metrics that are means over examples are kept; of several
    tasks, a metric that all have is the mean of the tasks' means, each of which is one as well.
    """

    kind = "lm-eval"
    Keys = Keys  # type: ignore[assignment]
    batch_size = 64
    why_not_shared = "lm-evaluation-harness asks the model in batches of its own, whose passes share no block"
    targets_of = Task.targets_of  # there are none: what the harness gives has no gradient

    def __init__(self, settings: Any, name: str) -> None:
        super().__init__(settings, name)
        self.base = settings.base
        self._asked: dict[str, list[list[Any]]] = {}
        self._lms: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()

    @cached_property
    def metrics(self) -> Sequence[str]:  # type: ignore[override]
        """The main one, then those of the tasks: of all together first."""
        each = [self._metrics_of(task) for task in self._tasks("test")]
        common = [name for name in each[0] if all(name in names for names in each)]
        if len(each) > 1:
            named = [
                f"{task.task_name}:{name}"
                for task, names in zip(self._tasks("test"), each, strict=True)
                for name in names
            ]
            common += named
        main = self.settings.metric
        if main is not None and main not in common:
            raise unknown(f"metric of task {self.name}:", main, common)
        return list(dict.fromkeys([*([main] if main else []), *common]))

    def metric(self, name: str) -> Metric:
        """The mean of a column, over one task or as the mean of all tasks' means."""
        one, _, column = name.rpartition(":")
        tasks = self._tasks("test")
        places = [i for i, task in enumerate(tasks) if not one or task.task_name == one]
        higher = tasks[places[0]].higher_is_better().get(column.partition(",")[0], True)
        where = one or " and ".join(task.task_name for task in tasks)
        about = f"{column} of {shorten([where])} by lm-evaluation-harness"
        if len(tasks) == 1:
            return mean_of(column, about, higher=higher)
        return Metric(about, (_TASK, column), _mean_of_ratios, _within(places), higher=higher, unit="")

    @property
    def digest(self) -> Sequence[Tensor]:
        """The versions of the harness and of its tasks, all that these say, and the code that comes with them."""
        from importlib.metadata import version

        told = [version("lm_eval")] + (
            [digests.of_folder(Path(self.settings.include))] if self.settings.include else []
        )
        for task in self._tasks("test"):
            told += [str(task.VERSION), json.dumps(task.dump_config(), sort_keys=True, default=described)]
        return [torch.frombuffer(bytearray(hashed(told)), dtype=torch.uint8)]

    def build_model(self) -> nn.Module:
        """The language model, frozen, or an encoder with a decoder."""
        if not getattr(self.config, "is_encoder_decoder", False):
            return super().build_model()
        from transformers import AutoModelForSeq2SeqLM

        model: Any = self.pretrained_model(AutoModelForSeq2SeqLM)
        frozen: nn.Module = model.requires_grad_(False).eval()
        return frozen

    def check_split(self, name: str) -> None:
        """Whether the tasks have such a split."""
        self.split(name)

    def _load(self, split: str) -> Split:
        """Every example by what is asked of it and what is right, hashed; the requests themselves are kept aside."""
        asked: list[list[Any]] = []
        places, hashes = [], []
        for place, task in enumerate(self._tasks(split)):
            with telling(f"task {self.name}: lm-eval's {task.task_name}"), quiet():
                task.build_all_requests(limit=self.settings.limit, rank=0, world_size=1)
            documents: dict[Any, list[Any]] = {}
            for instance in task.instances:
                documents.setdefault(instance.doc_id, []).append(instance)
            for instances in documents.values():
                asked.append(sorted(instances, key=lambda instance: instance.idx))
                places.append(place)
                told = [[each.request_type, each.args] for each in instances]
                hashes.append(list(hashed([json.dumps([told, instances[0].doc], sort_keys=True, default=described)])))
        self._asked[split] = asked
        return Split(
            {
                "index": torch.arange(len(asked)),
                _TASK: torch.tensor(places),
                "asked": torch.tensor(hashes, dtype=torch.uint8),
                _SPLIT: torch.full((len(asked),), list(SPLITS).index(split)),
            }
        )

    def judge(self, model: nn.Module, batch: Mapping[str, Tensor], *, keep_logits: bool = False) -> Scores:
        """What the harness says of each example of a batch."""
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        split = list(SPLITS)[int(batch[_SPLIT][0])]
        tasks, places = self._tasks(split), batch[_TASK].tolist()
        if len(set(batch["index"].tolist())) < len(batch["index"]):  # for several models, whose rows would be mixed
            raise TaskError(f"task {self.name}: the harness asks in an order of its own, so one model at a time")
        asked = [[replace(each, resps=[], filtered_resps={}) for each in self._asked[split][i]] for i in batch["index"]]
        with telling(f"task {self.name}: lm-eval"), quiet():
            self._answer(model, [instance for instances in asked for instance in instances])
            found = [dict[str, float]() for _ in asked]
            for place in sorted(set(places)):
                rows = [i for i, each in enumerate(places) if each == place]
                judged = self._judged(tasks[place], [asked[i] for i in rows])
                for i, values in zip(rows, judged, strict=True):
                    found[i] = values
        names = list(dict.fromkeys(name for task in tasks for name in self._metrics_of(task)))
        columns = {name: self._column(name, [values.get(name, 0.0) for values in found]) for name in names}
        return Scores({**columns, **({_TASK: np.array(places)} if len(tasks) > 1 else {})})

    def _answer(self, model: nn.Module, instances: Sequence[Any]) -> None:
        """Put the model's responses into requests, each kind of them at once, repeated as they ask."""
        if model not in self._lms:
            from lm_eval.models.huggingface import HFLM

            backend = "seq2seq" if getattr(self.config, "is_encoder_decoder", False) else "causal"
            self._lms[model] = HFLM(
                pretrained=model, backend=backend, tokenizer=copy.deepcopy(self.tokenizer), batch_size=16
            )
        lm = self._lms[model]
        for kind in dict.fromkeys(instance.request_type for instance in instances):
            wanted = [each for each in instances if each.request_type == kind for _ in range(each.repeats or 1)]
            for instance, response in zip(wanted, getattr(lm, kind)(wanted), strict=True):
                instance.resps.append(response)

    def _judged(self, task: Any, asked: Sequence[Sequence[Any]]) -> list[dict[str, float]]:
        """Metric → value of some examples of one task, by the harness's filters and its own count."""
        before, task._instances = task._instances, [instance for instances in asked for instance in instances]
        try:
            task.apply_filters()
        finally:
            task._instances = before
        judged = []
        for instances in asked:
            values: dict[str, float] = {}
            for name in instances[0].filtered_resps:
                given = task.process_results(instances[0].doc, [each.filtered_resps[name] for each in instances])
                values |= {called(metric, name): value for metric, value in given.items()}
            judged.append({name: float(values[name]) for name in self._metrics_of(task)})
        return judged

    def _metrics_of(self, task: Any) -> list[str]:
        """As `metrics_of`, told once."""
        if task.task_name not in self._names:
            self._names[task.task_name] = metrics_of(task, f"task {self.name}")
        return self._names[task.task_name]

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        return {}

    def _column(self, name: str, values: Sequence[float]) -> npt.NDArray[Any]:
        column = np.array(values)
        if name.partition(",")[0] in _OUTCOMES and np.isin(column, (0.0, 1.0)).all():
            return column.astype(np.bool_)
        return column

    def columns(self, scores: Scores, split: Split) -> Mapping[str, npt.NDArray[Any]]:
        """Those that the harness gives."""
        return scores.columns

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """TunerError: the harness asks the model itself."""
        raise TunerError(
            f"task {self.name}: lm-evaluation-harness judges, so that nothing is known of logits or gradients"
        )

    def training_split(self) -> Split:
        """Prompts of the tasks' own training examples with the right answers, which alone are the target."""
        rows = []
        for task in self._tasks("train"):
            with telling(f"task {self.name}: lm-eval's {task.task_name}"):
                for document in list(task.eval_docs)[: self.settings.limit]:
                    rows.append(self._row(*prompt_and_answer(task, document, f"task {self.name}")))
        return by_length(Split(self._padded(rows)))

    def _tasks(self, split: str) -> list[Any]:
        """The harness's tasks, such that what they score is this split."""
        if split not in self._harnessed:
            made = loaded(self.settings, self.reach, f"task {self.name}")
            self._harnessed[split] = [placed_on(task, split, self.settings, f"task {self.name}") for task in made]
        return self._harnessed[split]

    @cached_property
    def _harnessed(self) -> dict[str, list[Any]]:
        return {}


_TASK, _SPLIT = "task", "split"


def _within(places: Sequence[int]) -> Callable[..., list[Any]]:
    """(Task, column) → for each of these tasks what its examples have, 0 for others', then whether they are its."""

    def sufficient(task: Any, column: Any) -> list[Any]:
        its = [task == place for place in places]
        return [*(column * each for each in its), *(each.astype(np.float64) for each in its)]

    return sufficient


def _mean_of_ratios(*means: Any) -> Any:
    """Mean over tasks of mean(column of t) / share(t); over those that a resample has examples of."""
    values, shares = np.stack(means[: len(means) // 2]), np.stack(means[len(means) // 2 :])
    there = shares > 0
    ratios = np.divide(values, shares, out=np.zeros_like(shares), where=there)
    return ratios.sum(0) / there.sum(0)
