"""One row of outputs a text: a sequence classifier's, or a linear layer's on the mean of the base's tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lora_lab.errors import OptionError
from lora_lab.tasks.kinds.heads import ProbedTask, float_heads
from lora_lab.tasks.settings import Column, Count, Head, Settings
from lora_lab.tasks.splits import by_length
from lora_lab.tasks.tables import text_of
from lora_lab.tasks.task import Split

POOLED = """\
# head = "frozen"             # the last layer: frozen as it is, trained along with the adapter, or a probe: fitted
#                             # to the base's features by {fit}, then frozen
# pool = "own"                # what it sees: the model's own choice, or the mean of all tokens
# max_length = 128            # tokens; longer texts are cut
"""
"""The keys of all such kinds, for their example files."""


@dataclass(frozen=True, kw_only=True)
class PooledKeys(Settings):
    """The keys of a task file; kinds add what there is to be said of a text."""

    text: Column
    text_pair: Column | None = None
    head: Head = "frozen"
    pool: Literal["own", "mean"] = "own"
    max_length: Count = 128

    def check(self, where: str) -> None:
        """OptionError for values that do not go together."""
        super().check(where)
        if self.head == "probe" and self.pool == "own":
            raise OptionError(f'{where}: a probe needs pool = "mean"')


class PooledText(ProbedTask):
    """A model with a row of outputs a text; adapters go where `target_modules` says, by default all linear layers."""

    problem: ClassVar[str | None] = None
    """What transformers calls the model's loss; None: by the type of the labels, cross-entropy of classes."""

    @property
    def _finished(self) -> bool:
        """Whether the checkpoint has a head."""
        return any("ForSequenceClassification" in name for name in self.config.architectures or [])

    def build_model(self) -> nn.Module:
        """The base, frozen; a head that the checkpoint lacks is drawn from seed 0, or fitted for a probe."""
        model = self._built_anew()
        if self.settings.head == "probe":
            weight, bias = self._probe
            model.classifier.weight.data, model.classifier.bias.data = weight, bias
        frozen: nn.Module = model.requires_grad_(False).eval()
        return frozen

    def _built_anew(self) -> Any:
        return _mean_pooled(self) if self.settings.pool == "mean" else self._classifier()

    def _classifier(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        more = {} if self.problem is None else {"problem_type": self.problem}
        model: Any = self.pretrained_head(AutoModelForSequenceClassification, finished=self._finished, **more)
        # by this, decoders find a text's last token
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        float_heads(model, self.heads(model))
        return model

    @abstractmethod
    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of every text, [texts], of outputs [texts, labels] in float32."""

    @torch.inference_mode()
    def _features(self) -> npt.NDArray[np.float64]:
        model = self._built_anew().requires_grad_(False).eval()
        batches = self.split("train").batches(self.batch_size)
        pooled = [model(**{n: t for n, t in batch.items() if n != "labels"}).pooled for batch in batches]
        return np.concatenate([features.double().numpy() for features in pooled])

    def _encoded(self, table: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
        """The texts of a table as the model takes them."""
        keys = self.settings
        columns = [keys.text, *([keys.text_pair] if keys.text_pair else [])]
        return self._tokenized(*([text_of(self, text, name) for text in table[name]] for name in columns))

    @property
    def why_no_texts(self) -> str | None:  # type: ignore[override]
        """Of a task on pairs of texts."""
        return "its model takes pairs of texts" if self.settings.text_pair else None

    def encode_texts(self, texts: Sequence[str], targets: Sequence[str] | None = None) -> Split:
        """TaskError of a task on pairs of texts."""
        if self.why_no_texts:
            return super().encode_texts(texts)
        return by_length(Split(self._tokenized(list(texts))))

    def _tokenized(self, *texts: list[str]) -> dict[str, Tensor]:
        most = self.settings.max_length
        found = self.tokenizer(*texts, truncation=True, max_length=most, padding=True, return_tensors="pt")
        return dict(found.items())


class _Outputs(dict[str, Any]):
    """What a model returns, by attribute, as transformers has it."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def _mean_pooled(task: PooledText) -> Any:
    """The base with a linear layer on the mean of its tokens; modules are named as in transformers' classifiers."""
    from transformers import AutoModel

    base = task.pretrained_model(AutoModel)
    prefix = base.base_model_prefix or "model"

    class MeanPooled(nn.Module):
        base_model_prefix = prefix

        def __init__(self) -> None:
            super().__init__()
            self.config = base.config
            if getattr(base, "pooler", None) is not None:
                base.pooler = nn.Identity()  # what it would make of the first token is not used
            setattr(self, prefix, base)
            width = (
                base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
            ).hidden_size
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.classifier = nn.Linear(width, task.labels)

        def gradient_checkpointing_enable(self, **options: Any) -> None:
            base.gradient_checkpointing_enable(**options)

        def gradient_checkpointing_disable(self) -> None:
            base.gradient_checkpointing_disable()

        def enable_input_require_grads(self) -> None:
            base.enable_input_require_grads()

        def forward(self, attention_mask: Tensor, labels: Tensor | None = None, **inputs: Tensor) -> _Outputs:
            hidden = getattr(self, prefix)(attention_mask=attention_mask, **inputs).last_hidden_state
            share = attention_mask[..., None].float()
            pooled = (hidden.float() * share).sum(1) / share.sum(1).clamp(min=1)
            logits = self.classifier(pooled)
            loss = None if labels is None else task.losses(logits, labels).mean()
            return _Outputs(logits=logits, loss=loss, pooled=pooled)

    return MeanPooled()
