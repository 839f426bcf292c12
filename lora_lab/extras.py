"""Packages that come with an extra of the installation, and what is said where one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lora_lab.errors import OptionError

EXTRAS = {
    "data": "tasks on data of one's own (all kinds but digits), fitted heads, t-SNE (`compare`), the merge lego",
    "docs": "the site of the documentation (`make docs`)",
    "lm-eval": "tasks of lm-evaluation-harness (kind lm-eval)",
    "pandas": "results as data frames",
    "ray": "computing on a Ray cluster",
    "rouge": "the metric ROUGE",
    "shapiq": "the estimators of shapiq (`shapley`)",
}
"""Extra → what needs it."""


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Packages that are imported within belong to an extra: OptionError, naming it, where one is not installed.

    `what` says what they are needed for, as the beginning of a sentence.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or extra).partition(".")[0]
        raise OptionError(f"{what} needs {package}, which is not installed: pip install 'lora-lab[{extra}]'") from error
