"""Everything lora-lab raises or warns of on purpose.

LoraLabError
├── FileError (OSError)             a file is missing, broken, foreign, or in the way
├── AdapterError (ValueError)       a readable adapter whose content cannot be used
│   └── TunerError                  a question that this kind of adapter has no answer to
├── MismatchError (ValueError)      inputs that do not fit together
├── TaskError (ValueError)          a task that cannot be built or scored
│   └── DivergedError               a loss that is no number
├── TrustError (ValueError)         a file asks for what only the user can allow
└── OptionError (ValueError)        a name or value that the user gave

LoraLabWarning (UserWarning)        worth telling, but no error
LoraLabNote (UserWarning)           what is about to be done at a file's word
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from lora_lab.escape import shortened, visible


class LoraLabError(Exception):
    """Base of every error of this project; its text is one line for the user, whatever a file put into it.

    Names of options stand in backticks, which the command line replaces by its own: `adapter_name`, --adapter-name.
    """

    def __str__(self) -> str:  # OSError would print its first argument as an errno
        return visible(shortened(" ".join(str(part) for part in self.args).strip()))


class FileError(LoraLabError, OSError):
    """A file is missing, broken, foreign, or in the way."""


class AdapterError(LoraLabError, ValueError):
    """An adapter was read, and its content cannot be used."""


class TunerError(AdapterError):
    """A question that this kind of adapter (DoRA, LoHa …) has no answer to."""


class MismatchError(LoraLabError, ValueError):
    """Inputs that do not fit together: other modules, other shapes, another base model."""


class TaskError(LoraLabError, ValueError):
    """A task that cannot be built or scored."""


class DivergedError(TaskError):
    """A training whose loss is no number any more, or a model whose loss is none."""


class TrustError(LoraLabError, ValueError):
    """A file asks for what only the user can allow: code, paths outside of its folder, other repositories."""


class OptionError(LoraLabError, ValueError):
    """A name or a value that the user gave and that cannot be."""


class LoraLabWarning(UserWarning):
    """Something worth telling that is no error."""


class LoraLabNote(UserWarning):
    """What is about to be done because a file says so, such as the data that it names."""


def shorten(names: Iterable[object], limit: int = 3) -> str:
    """Names joined for a message: the first `limit` of them, then how many there are in all."""
    listed = [str(name) for name in names]
    shown = ", ".join(listed[:limit])
    return shown if len(listed) <= limit else f"{shown} ({len(listed)} in all)"


def unknown(kind: str, name: str, known: Collection[str]) -> OptionError:
    """The error for a name that is not in `known`, with the nearest one and the whole list."""
    close = nearest(name, known)
    hint = f" (did you mean {close!r}?)" if close else ""
    return OptionError(f"unknown {kind} {name!r}{hint}; there are: {', '.join(known)}")


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that was most likely meant: letters swapped, or else the closest spelling."""
    swapped = [option for option in known if sorted(option) == sorted(name.lower())]
    return next(iter([*swapped, *difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)]), None)
