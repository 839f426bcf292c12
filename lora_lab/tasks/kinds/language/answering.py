"""Answers that a model generates: greedily or drawn by a seed, each as if it were alone, and how good they are."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from lora_lab.errors import LoraLabWarning, OptionError, TaskError
from lora_lab.extras import needs
from lora_lab.hub import quiet_transformers
from lora_lab.tasks.kinds.language.extracting import EXTRACTORS, check_pattern
from lora_lab.tasks.settings import Count, Seed, Settings
from lora_lab.tasks.task import Scores, Task

KEYS = """\
# max_new_tokens = 256        # tokens of an answer, references too
# temperature = 0.0           # above 0, answers are drawn: those of an example by its place and sample_seed alone
# top_p = 1.0                 # drawn from the likeliest tokens that have this much of the probability
# sample_seed = 0
# stop = ["\\n\\n"]             # an answer ends before the first of these
# extract = "whole"           # of answer and reference, what must be equal: whole, last-line, number (the last one, or
#                             # that after GSM8K's ####), or regex (a reference in which it finds nothing is whole):
# pattern = "answer is (.*?)\\\\."   # of regex: its one group, in the first match
# rouge = false               # true gives ROUGE-1, 2 and L of answers, too (rouge-score)
"""
"""The keys of generated answers, for an example file."""


@dataclass(frozen=True, kw_only=True)
class AnswerKeys(Settings):
    """The keys of a task whose answers are generated."""

    max_new_tokens: Count = 256
    temperature: Annotated[float, Ge(0), Lt(float("inf")), "a number of at least 0"] = 0.0
    top_p: Annotated[float, Gt(0), Le(1), "a number above 0, up to 1"] = 1.0
    sample_seed: Seed = 0
    stop: list[str] | None = None
    extract: Literal["whole", "last-line", "number", "regex"] = "whole"
    pattern: str | None = None
    rouge: bool = False

    def check(self, where: str) -> None:
        """OptionError for values that do not go together."""
        super().check(where)
        check_pattern(self.extract, self.pattern, where)
        if not self.temperature and self.top_p < 1:
            raise OptionError(f"{where}: top_p is of answers that are drawn; a temperature above 0 is needed")
        if self.stop is not None and not all(self.stop):
            raise OptionError(f"{where}: stop is {self.stop}; texts that are not empty are needed")


class Answering(Task):
    """A task whose model generates answers beside what it is scored on otherwise.

    Batches hold `index` (an example's place in its split) and `reference` (see `as_bytes`).
    """

    settings: Any
    tokenizer: Any
    why_not_shared = "answers are generated token by token, whose passes share no block"
    batch_size = 16

    @property
    def metrics(self) -> Sequence[str]:  # type: ignore[override]
        """Whether answers are right first, then the loss of the references."""
        asked = self.settings.rouge
        return ("exact_match", *(ROUGE if asked else ()), "unextracted", "unfinished", "loss", "perplexity")

    @property
    def digest(self) -> Sequence[Tensor]:
        """The version of rouge-score, where it is asked for."""
        return [as_bytes([_version("rouge-score")])] if self.settings.rouge else []

    def judge(self, model: nn.Module, batch: Mapping[str, Tensor], *, keep_logits: bool = False) -> Scores:
        """Scores of the reference, then of the answer: whether it is right, could be extracted, came to its end."""
        scores = super().judge(model, batch, keep_logits=keep_logits)
        found = self._generated(model, batch)
        references = as_texts(batch["reference"])
        texts = [self._text(tokens) for tokens, _ in found]
        answers = [self.extracted(text) for text in texts]
        wanted = [self.extracted(text) or text.strip() for text in references]
        columns: dict[str, npt.NDArray[Any]] = {
            "exact_match": np.array([a is not None and a == b for a, b in zip(answers, wanted, strict=True)]),
            "unextracted": np.array([answer is None for answer in answers]),
            "unfinished": np.array([not ended for _, ended in found]),
        }
        if self.settings.rouge:
            columns |= self._rouge(texts, references)
        return Scores({**scores.columns, **columns}, scores.logits)

    def extracted(self, text: str) -> str | None:
        """The answer in a text, or None; TaskError as of the extractor."""
        try:
            return EXTRACTORS[self.settings.extract](text, self.settings.pattern)
        except TaskError as error:
            raise TaskError(f"task {self.name}: {error}") from error

    def _tell_cut(self, split: str, longer: int) -> None:
        """Warn of references that no answer can be as long as."""
        if longer:
            told = f"{longer} of the answers of its {split} split are longer than max_new_tokens"
            warnings.warn(f"task {self.name}: {told}: cut, and never reached", LoraLabWarning, stacklevel=3)

    def _asked(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What `generate` is given of a batch: input_ids and attention_mask."""
        raise NotImplementedError

    def _given(self, asked: Mapping[str, Tensor]) -> int:
        """How many of the tokens that `generate` returns are no answer."""
        return asked["input_ids"].shape[1]

    def _generated(self, model: nn.Module, batch: Mapping[str, Tensor]) -> list[tuple[list[int], bool]]:
        """Tokens of every answer, and whether it came to its end."""
        generates: Any = model
        config, asked = self._config(generates), self._asked(batch)
        processors = [_Draws(self.settings, batch["index"].tolist())] if self.settings.temperature else []
        with quiet_transformers():
            rows = generates.generate(**asked, generation_config=config, logits_processor=processors)
        ends = set(_listed(config.eos_token_id))
        return [_up_to(row[self._given(asked) :].tolist(), ends) for row in rows]

    def _config(self, model: Any) -> Any:
        """The base's own configuration of generation, as far as it says how an answer begins and ends."""
        config = copy.deepcopy(model.generation_config)
        ends = {*_listed(config.eos_token_id), *_listed(self.tokenizer.eos_token_id)}
        config.update(
            **_NEUTRAL,
            max_new_tokens=self.settings.max_new_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return config

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        for stop in self.settings.stop or ():
            text = text.partition(stop)[0]
        return text

    def _rouge(self, texts: Sequence[str], references: Sequence[str]) -> dict[str, npt.NDArray[np.float64]]:
        found = [self._scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
        return {name: np.array([scores[name].fmeasure for scores in found]) for name in ROUGE}

    @cached_property
    def _scorer(self) -> Any:
        with needs("rouge", "ROUGE"):
            from rouge_score.rouge_scorer import RougeScorer
        return RougeScorer(list(ROUGE))


ROUGE = ("rouge1", "rouge2", "rougeL")
"""As rouge-score calls them."""

_NEUTRAL: dict[str, Any] = {
    "do_sample": False,  # what is drawn, is drawn by `_Draws`
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_return_sequences": 1,
    "use_cache": True,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
"""Plain greedy decoding: a base's own penalties and beams would make of its adapters what they are not."""


class _Draws:
    """Gumbel noise on the logits of some examples, whose largest value is then a draw (Gumbel 1954; Maddison 2014).

        argmax_v (log p_v − log(−log u_v)),  u uniform,  has the distribution p

    The noise hangs on the seed, the example's place and the number of the token alone: so an answer is the same in
    every batch, process and machine, and two models are compared under one noise.
    """

    def __init__(self, keys: Any, places: Sequence[int]) -> None:
        self._temperature, self._top_p = keys.temperature, keys.top_p
        self._generators = [torch.Generator().manual_seed(_seed(keys.sample_seed, place)) for place in places]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        from transformers import TopPLogitsWarper

        scores = scores.double() / self._temperature
        if self._top_p < 1:
            scores = TopPLogitsWarper(self._top_p)(input_ids, scores)
        drawn = [torch.rand(scores.shape[1], generator=each, dtype=torch.float64) for each in self._generators]
        noise: Tensor = -(-torch.stack(drawn).log()).log()
        return scores + noise.to(scores.device)


def _seed(seed: int, place: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {place}".encode()).digest()[:7])


def _up_to(tokens: Sequence[int], ends: set[int]) -> tuple[list[int], bool]:
    """Tokens before the first that ends an answer, and whether there is one."""
    end = next((i for i, token in enumerate(tokens) if token in ends), None)
    return list(tokens[:end]), end is not None


def _listed(tokens: int | Sequence[int] | None) -> list[int]:
    if tokens is None:
        return []
    return [tokens] if isinstance(tokens, int) else list(tokens)


def as_bytes(texts: Sequence[str]) -> Tensor:
    """Texts as UTF-8, [texts, longest, 1], filled up with 0: as tensors they are cut and hashed with their examples."""
    encoded = [text.replace("\0", "").encode("utf-8", "replace") for text in texts]
    table = torch.zeros(len(encoded), max(1, *map(len, encoded)) if encoded else 1, 1, dtype=torch.uint8)
    for row, text in zip(table, encoded, strict=True):
        row[: len(text), 0] = torch.tensor(list(text), dtype=torch.uint8)
    return table


def as_texts(table: Tensor) -> list[str]:
    """The inverse of `as_bytes`."""
    return [bytes(row.flatten().tolist()).rstrip(b"\0").decode() for row in table.cpu()]


def padded_left(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Rows as `prompt` [rows, longest, 1], filled up in front, with their `prompt_length`."""
    longest = max(map(len, rows))
    filled = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    return {"prompt": filled[..., None], "prompt_length": torch.tensor([len(row) for row in rows])}


def unpadded(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The prompts of a batch as input_ids and attention_mask, filled up in front to the longest of them."""
    lengths = batch["prompt_length"]
    width = int(lengths.max())
    places = torch.arange(width, device=lengths.device)
    mask = (places >= width - lengths[:, None]).long()
    return {"input_ids": batch["prompt"][:, -width:, 0], "attention_mask": mask}


def require_generating(task: Any, classes: Mapping[str, Any], needed: str) -> None:
    """TaskError where a task's base is, by its configuration, of none of these classes of transformers."""
    names = {name for each in classes.values() for name in ([each] if isinstance(each, str) else each)}
    others = [name for name in task.config.architectures or [] if name not in names]
    if others and not task.settings.trust_remote_code:
        raise TaskError(f"task {task.name}: its base {task.base!r} is a {others[0]}, {needed}")


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} is missing"
