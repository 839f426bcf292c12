"""Conversations as a language model is trained on them: the base's own chat template, the assistant's tokens marked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.errors import TaskError, shorten

Message = dict[str, Any]
"""{role, content}, and what else the template knows."""

NO_TARGET = -100
"""The label of a token that is not predicted, as in torch's and transformers' losses."""

_MARKED = re.compile(r"{%-?\s*generation\s*-?%}")
"""How a template marks what the assistant says."""


@dataclass(frozen=True)
class Chat:
    """Conversations in a column of a task, and the tokenizer of its base that writes them as tokens."""

    tokenizer: Any
    base: str
    where: str
    """What errors name: the task and its column."""

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise TaskError(
                f"{self.where} holds lists of messages, and the tokenizer of {self.base!r} has no chat template; "
                "a text is needed, or a base whose tokenizer has one"
            )

    def row(self, value: object, answer: object = None) -> tuple[list[int], list[int]]:
        """Tokens and labels of one conversation: what the assistant says is the target, the rest is NO_TARGET.

        With an `answer`, the messages that follow `value`, only what the assistant says in these is. TaskError for
        what is no list of messages, or where the template does not tell where the assistant speaks.
        """
        begun = messages(value, self.where)
        whole = begun if answer is None else [*begun, *messages(answer, self.where)]
        first = 0 if answer is None else len(begun)
        if (
            first == 0
            and isinstance(self.tokenizer.chat_template, str)
            and _MARKED.search(self.tokenizer.chat_template)
        ):
            return self._marked(whole)
        return self._between(whole, first)

    def prompt(self, value: object) -> list[int]:
        """Tokens of a conversation up to where the assistant is to answer."""
        return self._tokens(messages(value, self.where), add_generation_prompt=True)

    def _marked(self, whole: Sequence[Message]) -> tuple[list[int], list[int]]:
        """By the template's own marks."""
        encoded = self._apply(whole, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, marks = list(encoded["input_ids"]), encoded["assistant_masks"]
        return ids, [token if mark else NO_TARGET for token, mark in zip(ids, marks, strict=True)]

    def _between(self, whole: Sequence[Message], first: int) -> tuple[list[int], list[int]]:
        """By how much longer the conversation becomes with each answer, from the message `first` on.

        That holds only where the template writes the beginning of a conversation alike however it goes on.
        """
        ids = self._tokens(whole)
        labels = [NO_TARGET] * len(ids)
        for i, message in enumerate(whole):
            if message["role"] != "assistant" or i < first:
                continue
            if i == 0:
                raise TaskError(
                    f"{self.where}: a conversation begins with the assistant; a message before it is needed"
                )
            before, after = self._tokens(whole[:i], add_generation_prompt=True), self._tokens(whole[: i + 1])
            start, end = len(before), len(after)
            if ids[:start] != before or ids[:end] != after:
                raise TaskError(
                    f"{self.where}: the chat template of {self.base!r} writes a conversation's beginning otherwise "
                    "once it goes on, so what the assistant says cannot be told from the rest; "
                    "a template with {% generation %} marks, or conversations of one answer, are needed"
                )
            labels[start:end] = ids[start:end]
        return ids, labels

    def _tokens(self, whole: Sequence[Message], **options: Any) -> list[int]:
        return list(self._apply(whole, tokenize=True, return_dict=True, **options)["input_ids"])

    def _apply(self, whole: Sequence[Message], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template([dict(message) for message in whole], **options)
        except Exception as error:  # templates are programs that raise what they like
            reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
            raise TaskError(f"{self.where}: the chat template of {self.base!r} refuses it ({reason})") from error


def messages(value: object, where: str) -> list[Message]:
    """A cell as messages with a role and a content that is text; TaskError for anything else."""
    if not isinstance(value, list):
        raise TaskError(f"{where} holds a {type(value).__name__} beside lists of messages; one kind is needed")
    if not value:
        raise TaskError(f"{where} holds an empty conversation")
    checked = []
    for message in value:
        if not isinstance(message, Mapping):
            raise TaskError(f"{where} holds lists of {type(message).__name__}; a text, or messages, are needed")
        there = {key: part for key, part in message.items() if part is not None}  # tables fill up with None
        for key in ("role", "content"):
            if not isinstance(there.get(key), str):
                kind = f"of the type {type(there[key]).__name__}" if key in there else "missing"
                raise TaskError(
                    f"{where} holds a message whose {key} is {kind} (it has {shorten(there)}); a role and a content "
                    "that are texts are needed"
                )
        checked.append(there)
    return checked


def cut(row: tuple[list[int], list[int]], most: int) -> tuple[list[int], list[int]]:
    """A conversation of `most` tokens: without its end, or without its beginning where no target would be left."""
    ids, labels = row
    first = next((i for i, label in enumerate(labels) if i and label != NO_TARGET), None)
    if first is None or first < most:
        return ids[:most], labels[:most]
    after = next((i for i in range(first, len(labels)) if labels[i] == NO_TARGET), len(labels))
    end = min(after, first + most - 1)  # the end of the first answer, at least a token before it
    return ids[end - most : end], labels[end - most : end]
