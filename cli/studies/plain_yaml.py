"""YAML as a recipe needs it: what is written is what is read, and nothing grows."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

_MOST = 100_000
"""Values of a file, each as often as anchors repeat it."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # of a package without types
    """Without YAML 1.1's surprises: 11:0 is no number of seconds, 010 not 8, 2024-1-1 no date; no key comes twice."""

    yaml_implicit_resolvers: ClassVar = {
        first: [
            (tag, pattern) for tag, pattern in entries if tag.rpartition(":")[2] not in ("int", "float", "timestamp")
        ]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping; an error where a key stands there twice."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        made: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return made


_NUMBER = r"[-+]?(?:0|[1-9][0-9]*)"
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(rf"{_NUMBER}$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(rf"(?:{_NUMBER}?\.[0-9]+|{_NUMBER}\.?)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def load(text: str) -> Any:
    """What a YAML text says; yaml.YAMLError, ValueError or RecursionError for what it cannot say."""
    content = yaml.load(text, _Loader)  # noqa: S506 (a safe loader)
    _require_small(content)
    return content


def _require_small(content: Any) -> None:
    """ValueError for a value that holds itself, or that anchors repeat without end."""
    sizes: dict[int, int] = {}

    def size(value: Any) -> int:
        if not isinstance(value, dict | list):
            return 1
        if id(value) not in sizes:
            sizes[id(value)] = _MOST  # while it is looked into: whoever meets it there is within it
            sizes[id(value)] = 1 + sum(map(size, [*value, *value.values()] if isinstance(value, dict) else value))
        return sizes[id(value)]

    if size(content) >= _MOST:
        raise ValueError(f"an anchor within itself, or anchors that repeat more than {_MOST} values")
