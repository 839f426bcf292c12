"""Texts as tokens of a base that predicts the next one, and its logits of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_lab.errors import TaskError
from lora_lab.tasks.file import FileTask
from lora_lab.tasks.kinds.language.chat import NO_TARGET
from lora_lab.tasks.splits import by_length
from lora_lab.tasks.task import Split

Row = tuple[list[int], list[int]]
"""Tokens and, for each of them, the label: the token itself where it is a target, else NO_TARGET."""


class TokenTask(FileTask):
    """A task whose base predicts tokens."""

    writes = True
    why_no_texts = None

    def encode_texts(self, texts: Sequence[str], targets: Sequence[str] | None = None) -> Split:
        """All tokens but the first as targets; texts with none are left out, TaskError where all are."""
        cut = [[*self._start, *self._tokens(text)][: self.settings.max_length] for text in texts]
        rows = [(tokens, [NO_TARGET, *tokens[1:]]) for tokens in cut if len(tokens) > 1]
        if not rows:
            raise TaskError(
                f"task {self.name}: none of {len(texts)} texts has a token to predict (two tokens at least)"
            )
        return by_length(Split(self._padded(rows)))

    def text_logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """What the model says of every token but the first, [texts, tokens, vocabulary]."""
        logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits[:, :-1].float()

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    @property
    def _start(self) -> list[int]:
        """What the tokenizer puts before a text, if anything."""
        empty: list[int] = self.tokenizer("")["input_ids"]
        return [token for token in empty if token == self.tokenizer.bos_token_id]

    def _padded(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Rows as input_ids, attention_mask and labels."""
        longest = max(len(tokens) for tokens, _ in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(rows), longest), pad, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, NO_TARGET)
        for i, (tokens, targets) in enumerate(rows):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = 1
            labels[i, : len(tokens)] = torch.tensor(targets)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
