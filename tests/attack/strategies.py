"""What hostile and odd files say: JSON of every kind, texts of every kind, bytes of a sound file changed."""

import json
import struct
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

ATTACKS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck), "database": None}

NASTY = [
    "",
    ".",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "~nobody/x",
    "a\x00b",
    "\x1b[2J\x1b]0;title\x07",
    "‮evil",
    "line\nline",
    "x" * 300,
    "p$\\frac$q",
    "&%$#_{}~^\\",
    "<script>alert(1)</script>",
    "| a | b |",
    "{{ 7 * 7 }}",
    "%s%n",
    "http://127.0.0.1:1/x",
    "file:///etc/passwd",
    "hf://datasets/a/b",
    "(a+)+$",
    "((((a*)*)*)*)*b",
    "[",
    "*",
    "NaN",
    "-1",
    "1e400",
    "None",
    "true",
]

texts = st.one_of(st.sampled_from(NASTY), st.text(max_size=30))
numbers = st.one_of(
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 1, 10**400, 2**31, 2**63]),
    st.floats(allow_nan=True, allow_infinity=True),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)


def dumps(value: Any) -> str:
    """JSON as Python writes it, NaN and infinities included; whole numbers of any length."""
    return json.dumps(value)


@st.composite
def changed(draw: st.DrawFn, data: bytes) -> bytes:
    """A file's bytes, cut, overwritten, doubled or with something put between, up to four times."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = draw(st.integers(at, min(len(data), at + 64)))
        put = draw(st.one_of(st.binary(max_size=24), st.just(data[at:end] * 2), st.just(b"")))
        kind = draw(st.sampled_from(["cut", "put", "put", "put"]))
        data = data[:at] if kind == "cut" else data[:at] + put + data[end:]
    return data


def safetensors_of(header: Any, body: bytes, length: int | None = None) -> bytes:
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def attack(*, examples: int = 150, **strategies: Any) -> Any:
    """A test of 150 examples; a second one of 10,000, its name ending in `_many`, is run by `make slow`."""

    def both(function: Any) -> Any:
        few, many = (
            settings(max_examples=count, **ATTACKS)(given(**strategies)(function)) for count in (examples, 10_000)
        )
        function.__globals__[f"{function.__name__}_many"] = pytest.mark.slow(many)
        return few

    return both
