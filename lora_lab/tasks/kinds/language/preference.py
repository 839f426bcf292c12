"""Pairs of answers of which one was preferred: which one a language model finds likelier, as a task file says."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn

from lora_lab.errors import TaskError
from lora_lab.tasks.kinds.kept import kept
from lora_lab.tasks.kinds.language.chat import NO_TARGET, Chat
from lora_lab.tasks.kinds.language.language import CausalLM, Row
from lora_lab.tasks.kinds.language.templates import columns_of, filled
from lora_lab.tasks.scores import calibration
from lora_lab.tasks.settings import COMMON, Column, Rate, Settings
from lora_lab.tasks.splits import by_length
from lora_lab.tasks.tables import text_of
from lora_lab.tasks.task import Scores, Split, Targets, Task, resolve_device

EXAMPLE = (
    """\
# A task of your own: lora-lab train --task this-file.toml
kind = "preference"

base = "path/to/model"        # folder or hub id; AutoModelForCausalLM must be able to load it
data = "pairs.jsonl"          # csv, json, jsonl, parquet, a folder, or a dataset on the hub; or a file a split
prompt = "Question: {question}\\nAnswer:"   # columns in braces, or the name of one column; of conversations (lists of
#                             # {role, content}) the base's chat template makes a prompt
chosen = "chosen"             # column with the answer that was preferred: a text, or messages
rejected = "rejected"         # column with the other
# beta = 0.1                  # of DPO: reward = beta * (log-likelihood - that of the base alone)
# max_length = 512            # tokens; longer prompts are cut at their beginning, the same for both answers
"""
    + COMMON
)


@dataclass(frozen=True, kw_only=True)
class Keys(Settings):
    """The keys of a preference file."""

    kind: str = "preference"
    prompt: str
    chosen: Column
    rejected: Column
    beta: Rate = 0.1
    max_length: Annotated[int, Ge(2), "a whole number of at least 2"] = 512

    columns: ClassVar[tuple[str, ...]] = ("prompt", "chosen", "rejected")


class Preference(CausalLM):
    """Pairs of answers to a prompt; a pair is won where the chosen one has the higher log-likelihood.

    With log p the sum over an answer's tokens and log q that of the base without adapters, the reward that DPO
    implies (Rafailov et al. 2023, arXiv 2305.18290, eq. 5 and 7) is β (log p − log q), and the loss

        −log σ(β ((log p_chosen − log q_chosen) − (log p_rejected − log q_rejected))),

    on which adapters are trained: log 2 of the base itself. Its log-likelihoods are computed once, and kept. The σ
    is the chance that the chosen one is preferred, of which `brier` and `ece_by_reward` are.
    """

    kind = "preference"
    Keys = Keys  # type: ignore[assignment]
    labels = 2
    classifies = True
    counts_targets = False
    rows_are_examples = False
    metrics: Sequence[str] = (
        *("won", "loss", "won_per_token", "won_by_reward", "margin", "reward_margin"),
        *("brier", "ece_by_reward"),
    )

    def build_model(self) -> nn.Module:
        """The language model, frozen, whose own loss is that of pairs where it is given such."""
        model: Any = super().build_model()
        model.__class__ = _of_pairs(type(model))  # type: ignore[arg-type]
        model.beta = self.settings.beta
        built: nn.Module = model
        return built

    def _wanted(self) -> list[str]:
        keys = self.settings
        return list(dict.fromkeys([*columns_of(keys.prompt), keys.chosen, keys.rejected]))

    def _load(self, split: str) -> Split:
        keys, table = self.settings, self.table(split)
        names = columns_of(keys.prompt)
        rows: list[Row] = []
        for i, answers in enumerate(zip(table[keys.chosen], table[keys.rejected], strict=True)):
            rows += self._pair(filled(self, keys.prompt, {name: table[name][i] for name in names}), answers)
        padded = {name: tensor.reshape(-1, 2, tensor.shape[-1]) for name, tensor in self._padded(rows).items()}
        padded["targets"] = padded.pop("labels")
        inputs = {**padded, "labels": torch.zeros(len(rows) // 2, dtype=torch.long)}  # the chosen one is the first
        whole = by_length(Split(inputs))
        return Split({**whole.inputs, "reference": self._of_base(whole)})

    def _pair(self, prompt: str | list[object], answers: Sequence[object]) -> list[Row]:
        """Rows of both answers; what is longer than `max_length` loses the same part of the prompt."""
        keys = self.settings
        if isinstance(prompt, str):
            texts = [text_of(self, a, name) for a, name in zip(answers, (keys.chosen, keys.rejected), strict=True)]
            for text, name in zip(texts, (keys.chosen, keys.rejected), strict=True):
                if not text.strip():
                    raise TaskError(f"task {self.name}: an example with an empty answer in {name!r}")
            rows = [self._row(prompt, text, most=sys.maxsize) for text in texts]
        else:
            rows = [self._of_chat(prompt, answer) for answer in answers]
        over = max(len(ids) for ids, _ in rows) - keys.max_length
        begun = len(self._start)
        given = min(next(i for i, label in enumerate(labels) if label != NO_TARGET) for _, labels in rows)
        over = max(0, min(over, given - max(1, begun)))
        cut = [tuple([*part[:begun], *part[begun + over :]][: keys.max_length] for part in row) for row in rows]
        if any(all(label == NO_TARGET for label in labels) for _, labels in cut):
            raise TaskError(f"task {self.name}: max_length = {keys.max_length} leaves nothing of an answer")
        return [(ids, labels) for ids, labels in cut]

    def _of_chat(self, prompt: object, answer: object) -> Row:
        chat = Chat(self.tokenizer, self.settings.base, f"task {self.name}: column {self.settings.prompt!r}")
        said = (
            answer if isinstance(answer, list) else [{"role": "assistant", "content": text_of(self, answer, "answer")}]
        )
        try:
            return chat.row(prompt, said)
        except TaskError as error:
            if self.reach.quotes:
                raise
            raise TaskError(f"{chat.where} holds other conversations than its base's template takes") from error

    def _of_base(self, split: Split) -> Tensor:
        """Log-likelihood of both answers under the base alone, [examples, 2, 1]; the last one is not of tokens."""
        device = resolve_device()

        @torch.inference_mode()
        def make() -> Tensor:
            model = self.model_on(device)
            batches = ({n: t.to(device) for n, t in batch.items()} for batch in split.batches(self.batch_size))
            return torch.cat([self.logits(model, batch).float().cpu() for batch in batches])[..., None]

        keys = self.settings
        key = ["log-likelihoods of pairs", self.base_digest, keys.dtype, keys.revision, device.type]
        return kept(key, list(split.inputs.values()), make)

    def training_split(self) -> Split:
        """Pairs, with what the model's own loss needs."""
        inputs = self.split("train").inputs
        return Split({name: tensor for name, tensor in inputs.items() if name != "labels"})

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Log-likelihood of the chosen and of the rejected answer, [examples, 2]."""
        flat = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
        return _likelihoods(model(**flat).logits, batch["targets"])

    def choices(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The pair, [examples, 2]."""
        return logits.float()

    def judge_logits(self, logits: Tensor, batch: Mapping[str, Tensor], *, keep_logits: bool = False) -> Scores:
        """DPO's loss, whether the pair is won by three counts, and the margins: chosen minus rejected, in nats."""
        said, tokens = logits.double(), _counts(batch)
        margin, per_token = _difference(said), _difference(said / tokens)
        reward = self._reward(said, batch)
        columns = {
            "loss": -nn.functional.logsigmoid(reward),
            "correct": margin > 0,
            "margin": margin,
            "won_per_token": per_token > 0,
            "won_by_reward": reward > 0,
            "reward_margin": reward,
        }
        found = {
            name: (each if each.dtype == torch.bool else each.float().double()).cpu().numpy()
            for name, each in columns.items()
        }
        chances = calibration.chances(torch.stack([reward, torch.zeros_like(reward)], -1), batch["labels"])
        return Scores({**found, **chances}, logits.float().cpu().numpy() if keep_logits else None)

    def targets_of(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Targets:
        """DPO's loss and the margin of every pair."""
        loss = -nn.functional.logsigmoid(self._reward(logits, batch))
        return Targets(loss[:, None], _difference(logits)[:, None], torch.ones_like(loss[:, None], dtype=torch.bool))

    def columns(self, scores: Scores, split: Split) -> Mapping[str, Any]:
        """Those of the scores."""
        return Task.columns(self, scores, split)

    def _reward(self, likelihoods: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """β times how much more the log-likelihood rose of the chosen than of the rejected answer, [examples]."""
        reward: Tensor = self.settings.beta * _difference(likelihoods - batch["reference"][..., 0])
        return reward


def _difference(pair: Tensor) -> Tensor:
    return pair[:, 0] - pair[:, 1]


def _counts(batch: Mapping[str, Tensor]) -> Tensor:
    """Tokens of both answers, [examples, 2]."""
    return (batch["targets"][..., 1:] != NO_TARGET).sum(-1)


def _likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over an answer's tokens of their log-probability, [examples, 2]; logits are [2 × examples, tokens, words]."""
    wanted = targets.flatten(0, 1)[:, 1:]
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), wanted, reduction="none", ignore_index=NO_TARGET
    )
    return -losses.sum(1).reshape(-1, 2)


@cache
def _of_pairs(cls: Any) -> Any:
    """A class of language models whose forward pass takes pairs, too, and gives DPO's loss of them."""
    from transformers.modeling_outputs import CausalLMOutput

    class OfPairs(cls):  # type: ignore[misc]
        beta: float

        def forward(self, input_ids: Any = None, attention_mask: Any = None, **given: Any) -> Any:
            targets, reference = given.pop("targets", None), given.pop("reference", None)
            if targets is None:
                return super().forward(input_ids=input_ids, attention_mask=attention_mask, **given)
            flat = {"input_ids": input_ids.flatten(0, 1), "attention_mask": attention_mask.flatten(0, 1)}
            likelihoods = _likelihoods(super().forward(**flat).logits, targets)
            rewards = self.beta * _difference(likelihoods - reference[..., 0])
            return CausalLMOutput(loss=-nn.functional.logsigmoid(rewards).mean(), logits=likelihoods)

    OfPairs.__name__ = cls.__name__  # transformers looks classes up by it
    return OfPairs
