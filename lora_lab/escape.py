"""Texts from files (names, labels, records) made harmless for where they go, each way in one place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# C0 and C1 control characters, invisible and bidirectional formats, line and paragraph separators, lone surrogates:
# all that moves a cursor, starts a new line or changes the order of what is read.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "#$%&_{}"},
}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$])")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_QUOTES = {'"': "&quot;", "'": "&#x27;"}


def visible(text: str) -> str:
    """The text with control characters and what reorders text as escapes that are seen, such as \\x1b and \\u202e."""
    return _UNSEEN.sub(lambda found: _SHORT.get(found[0]) or _code(found[0]), text)


def shortened(text: str, most: int = 400) -> str:
    """The text with every word of more characters cut in the middle: names of files may have thousands of them."""
    return re.sub(rf"\S{{{most + 1},}}", lambda word: f"{word[0][: most // 2]}…{word[0][-most // 4 :]}", text)


def visible_json(text: str) -> str:
    """JSON with the same characters within its texts as JSON's own escapes; line breaks between values stay."""
    return _UNSEEN.sub(lambda found: "\n" if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


def visible_stream(text: str) -> str:
    """As `visible`, for what others write: line breaks, tabs and colours stay."""
    parts = re.split(r"(\x1b\[[0-9;]*m|[\n\r\t])", text)
    return "".join(part if i % 2 else visible(part) for i, part in enumerate(parts))


def latex(text: str) -> str:
    """The text for LaTeX, its ten special characters as commands."""
    return "".join(_LATEX.get(sign, sign) for sign in visible(text))


def markdown(text: str) -> str:
    """The text for a line or a table's cell of Markdown, which shows it as it is; HTML within it is shown, too."""
    escaped = _MARKDOWN.sub(r"\\\1", visible(text))
    return "".join(_HTML.get(sign, sign) for sign in escaped)


def html(text: str) -> str:
    """The text for HTML, within a tag or between two."""
    return "".join({**_HTML, **_QUOTES}.get(sign, sign) for sign in visible(text))


def spreadsheet(text: str) -> str:
    """The text for a cell of a CSV file, which no spreadsheet takes for a formula."""
    return f"'{visible(text)}" if text.startswith(("=", "+", "-", "@")) else visible(text)


def drawn(value: Any) -> Any:
    """All texts within JSON types for matplotlib: no dollar begins a formula, no underscore hides a label."""
    if isinstance(value, str):
        text = visible(value).replace("$", r"\$")
        return f" {text}" if text.startswith("_") else text
    if isinstance(value, Mapping):
        return {drawn(key): drawn(part) for key, part in value.items()}
    return [drawn(part) for part in value] if isinstance(value, list | tuple) else value


def file_name(text: str, most: int = 100) -> str:
    """A name for a file: letters, digits, dots and dashes of the text, not hidden, of so many characters at most."""
    return re.sub(r"[^\w.-]+", "_", text)[:most].strip("._") or "adapter"


def _code(sign: str) -> str:
    return f"\\x{ord(sign):02x}" if ord(sign) < 256 else f"\\u{ord(sign):04x}"
