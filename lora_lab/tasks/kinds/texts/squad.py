"""How far an answer's words are those of right ones: exact match and F1 as SQuAD 2.0's evaluation script has them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """In small letters, without punctuation and articles, one space between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(found: str, right: str) -> float:
    """1 where they are the same, normalised, else 0."""
    return float(normalised(found) == normalised(right))


def overlap(found: str, right: str) -> float:
    """F1 over their words as bags, normalised; where one has none, 1 if both have none, else 0."""
    said, there = normalised(found).split(), normalised(right).split()
    if not said or not there:
        return float(said == there)
    shared = (Counter(said) & Counter(there)).total()
    return 2 * shared / (len(said) + len(there))


def best(measure: Callable[[str, str], float], found: str, answers: Sequence[str]) -> float:
    """The most that it agrees with one of the right answers; of a question without any, with the empty text.

    Right answers of which normalising leaves nothing do not count.
    """
    return max(measure(found, right) for right in ([a for a in answers if normalised(a)] or [""]))
