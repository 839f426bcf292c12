"""Registries: what can be chosen by name, built in, registered, or brought by other packages as entry points.

An entry carries all that is asked of it, so that nothing outside of its registry looks at its name. Packages that are
installed offer theirs under a group such as `lora_lab.merges`; they are looked for when a name is not known or when
all names are listed, and imported only then.
"""

from __future__ import annotations

import ast
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lora_lab.errors import LoraLabWarning, OptionError, unknown

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

E = TypeVar("E")

REGISTRIES: weakref.WeakValueDictionary[int, Registry[Any]] = weakref.WeakValueDictionary()
"""All that there are."""


class Registry(Mapping[str, E], Generic[E]):
    """Name → entry; built-ins first, then what was registered, then the entry points of `group` by package name.

    A name that is not there raises OptionError with the nearest one. An entry point that cannot be loaded, is of
    another type than `kind` (None: a bare function), or has the name of another entry is left out with one warning that
    names its package.
    """

    def __init__(self, what: str, group: str, kind: type[E] | None, builtin: Mapping[str, E]) -> None:
        self.what = what
        """An entry in the words of an error: method, space …"""
        self.group = group
        self.kind = kind
        self.entries = dict(builtin)
        """What is loaded: the built-ins, and all that was registered or brought so far."""
        self._builtin = frozenset(builtin)
        REGISTRIES[id(self)] = self
        self._offered: dict[str, EntryPoint] | None = None  # None: not looked for yet

    def register(self, name: str, entry: E | None = None, **fields: Any) -> Any:
        """Add an entry, or decorate a function of which `kind(function, **fields)` is to be the entry.

        OptionError where the name is taken or the entry is of another type.
        """
        if entry is None:

            def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
                make: Any = self.kind or (lambda entry: entry)
                self.register(name, make(function, **fields))
                return function

            return decorate
        if name in self:
            raise OptionError(f"there is a {self.what} {name!r} already")
        self._require_kind(name, entry)
        self.entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> E:
        if name not in self:
            raise unknown(self.what, str(name), list(self))
        return self.entries[name]

    def get(self, name: object, default: Any = None) -> Any:
        """The entry, or the default where there is none."""
        return self.entries[str(name)] if name in self else default

    @property
    def added(self) -> dict[str, E]:
        """The loaded entries that are not built in."""
        return {name: entry for name, entry in self.entries.items() if name not in self._builtin}

    def __contains__(self, name: object) -> bool:
        if name not in self.entries and isinstance(name, str):
            self._load(name)
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        for name in list(self._offers()):
            self._load(name)
        return iter(list(self.entries))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _offers(self) -> dict[str, EntryPoint]:
        """Entry points that are not loaded yet."""
        if self._offered is None:
            self._offered = {}
            from importlib.metadata import entry_points

            for point in sorted(entry_points(group=self.group), key=_package):
                if point.name in self.entries or point.name in self._offered:
                    self._left_out(point, "the name is taken")
                else:
                    self._offered[point.name] = point
        return self._offered

    def _load(self, name: str) -> None:
        point = self._offers().pop(name, None)
        if point is None or name in self.entries:
            return
        try:
            entry = point.load()
            self._require_kind(name, entry)
        except Exception as error:  # whatever a foreign package raises
            self._left_out(point, f"{type(error).__name__}: {error}")
        else:
            self.entries[name] = entry

    def _require_kind(self, name: str, entry: Any) -> None:
        if not (isinstance(entry, self.kind) if self.kind else callable(entry)):
            needed = self.kind.__name__ if self.kind else "function"
            raise OptionError(f"{name!r} is a {type(entry).__name__}; a {needed} is needed")

    def _left_out(self, point: EntryPoint, reason: str) -> None:
        message = f"{_package(point)} brings the {self.what} {point.name!r}, which is left out: {reason}"
        warnings.warn(message, LoraLabWarning, stacklevel=4)


@dataclass(frozen=True)
class Later:
    """A name of a module that is loaded only when this is called."""

    module: str
    name: str

    def __call__(self) -> Any:
        """What the module has under that name."""
        return getattr(import_module(self.module), self.name)

    @cache  # noqa: B019 (there are a dozen of these, and they stay)
    def names(self) -> list[str]:
        """The names in the registry, mapping or tuple; of a module that is not loaded, from its source.

        Those that other packages bring are among them.
        """
        if self.module in sys.modules:
            return list(self())
        spec = find_spec(self.module)
        text = Path(str(spec and spec.origin)).read_text(encoding="utf-8")
        # the statement alone: its first line, and those after it that are indented or close a bracket
        found = re.search(rf"^{self.name}\b.*(?:\n(?:[ )}}\]].*)?)*", text, re.MULTILINE)
        (node, *_) = ast.parse(found[0]).body if found else [None]
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            return _names_in(node.value)
        raise LookupError(f"{self.module} has no {self.name} of its own")


def _names_in(value: ast.expr) -> list[str]:
    """Elements of a tuple, keys of a mapping, or of a Registry both its built-in entries and what is offered to it."""
    if isinstance(value, ast.Call):
        _, group, _, builtin = value.args
        offered = [point.name for point in sorted(_all_points().select(group=ast.literal_eval(group)), key=_package)]
        return list(dict.fromkeys([*_names_in(builtin), *offered]))
    return list(ast.literal_eval(ast.Tuple(value.keys) if isinstance(value, ast.Dict) else value))  # type: ignore[arg-type]


@cache
def _all_points() -> Any:
    """Of all packages and groups; to look through them takes a few hundredths of a second."""
    from importlib.metadata import entry_points

    return entry_points()


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "a package"
