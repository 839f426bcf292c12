"""What `make data` makes of packages, on small made-up ones."""

import gzip
import io
import json
import sys
import tarfile

import corpora
import pytest
from corpora import MissingError, build, definitions, mail_text, mails, pages, paragraphs, snippets, table

from lora_lab import tasks


def rows(count, label, word):
    return [(f"{word} {i}", label) for i in range(count)]


def test_a_table_holds_each_text_once_and_none_of_two_minds():
    found = table([*rows(120, "a", "x"), *rows(120, "b", "y"), ("x  7\n", "a"), ("y 3", "a"), ("", "a")])
    assert len(found) == 239
    assert len({text for text, _ in found}) == 239
    assert "y 3" not in dict(found)
    assert found == table(reversed([*rows(120, "a", "x"), *rows(120, "b", "y"), ("y 3", "a")]))
    assert {label for _, label in found[:20]} == {"a", "b"}  # as good as shuffled


def test_rare_labels_are_left_out_and_frequent_ones_cut():
    found = table([*rows(99, "rare", "x"), *rows(100, "b", "y"), *rows(300, "c", "z")], 150)
    assert [sum(label == name for _, label in found) for name in ("rare", "b", "c")] == [0, 100, 150]


def test_what_cannot_be_had_is_told_in_a_line_and_the_rest_is_built(tmp_path, capsys):
    def absent(folder):
        raise MissingError("npm is not installed")

    def broken(folder):
        (folder / "x.tgz").write_bytes(b"no archive")
        return corpora._unpacked(folder / "x.tgz")

    def read(folder):
        return [*rows(150, "a", "x"), *rows(150, "b", 'y, "z"')]

    sources = {
        "one": (absent, {"first": (read, None)}),
        "two": (broken, {"second": (read, None), "third": (read, None)}),
        "three": (lambda folder: folder, {"fourth": (read, None), "fifth": (lambda folder: [], None)}),
    }
    assert build(tmp_path, sources) == ["fourth"]
    said = capsys.readouterr().out
    assert "first: not built, one cannot be had (npm is not installed)\n" in said
    assert "second, third: not built, two cannot be had (" in said
    assert "fifth: not built, three holds no such texts\n" in said
    assert {path.name for path in tmp_path.iterdir()} == {"fourth.csv", "fourth.toml"}
    assert len(tasks.from_name(str(tmp_path / "fourth.toml")).table("train")["text"]) == 210


def test_clients_that_are_missing_or_fail_are_named(tmp_path):
    with pytest.raises(MissingError, match="no-such-client is not installed"):
        corpora._run("no-such-client", at=tmp_path)
    failing = "import sys; print('E: no such package', file=sys.stderr); print('more', file=sys.stderr); sys.exit(3)"
    with pytest.raises(MissingError, match=r"^E: no such package$"):
        corpora._run(sys.executable, "-c", failing, at=tmp_path)


def packed(path, members, links=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for name in links:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.LNKTYPE if name == "hard" else tarfile.SYMTYPE, links[name]
            tar.addfile(entry)
    return path


@pytest.mark.parametrize("name", ["../outside.txt", "/tmp/outside.txt", "a/../../outside.txt"])
def test_an_archive_that_would_leave_its_folder_is_refused(tmp_path, name):
    archive = packed(tmp_path / "in" / "bad.tgz", {"good.txt": b"x", name: b"x"})
    with pytest.raises(tarfile.TarError, match="lies outside of its archive"):
        corpora._unpacked(archive)
    assert [path.name for path in tmp_path.rglob("*.txt")] == ["good.txt"]


def test_links_in_an_archive_are_not_made(tmp_path):
    archive = packed(tmp_path / "in" / "links.tgz", {"a.txt": b"x"}, {"out": "../..", "hard": "a.txt"})
    assert [path.name for path in corpora._unpacked(archive).iterdir()] == ["a.txt"]


def test_snippets_are_labelled_by_their_ratings(tmp_path):
    lines = "1\t2.5\tGood &amp; nice\r\n2\t-0.5\tPoor\r\n3\t0.4\tSo so\r\n4\t-0.49\tHm\r\n"
    content = {"hutto_ICWSM_2014/tweets_GroundTruth.txt": lines.encode()}
    packed(tmp_path / "v-1" / "additional_resources" / "hutto_ICWSM_2014.tar.gz", content)
    assert list(snippets("tweets", tmp_path)) == [("Good & nice", "positive"), ("Poor", "negative")]


def test_mails_become_subject_and_text(tmp_path):
    html = (
        "Subject: Win\nContent-Type: text/html; charset=iso-8859-1\nContent-Transfer-Encoding: quoted-printable\n\n"
        "<style>p {x: y}</style><p>Caf=E9 &amp; <b>more</b></p><!-- hidden -->"
    )
    assert mail_text(html) == "Win\nCafé & more"
    both = (
        'Subject: Two\nContent-Type: multipart/alternative; boundary="b"\n\n'
        "--b\nContent-Type: text/html\n\n<p>rich</p>\n"
        "--b\nContent-Type: text/plain; charset=unheard-of\n\nplain\n--b--\n"
    )
    assert mail_text(both) == "Two\nplain"
    for group, name in (("spam-1", "a"), ("hard-ham-1", "b")):
        place = tmp_path / "package" / "data" / group
        place.mkdir(parents=True)
        (place / f"{name}.json").write_text(json.dumps({"group": group, "text": html}))
    assert [label for _, label in mails(tmp_path)] == ["ham", "spam"]


def test_definitions_come_without_examples_and_words(tmp_path):
    place = tmp_path / "usr" / "share" / "wordnet"
    place.mkdir(parents=True)
    synsets = (
        "  1 This software and database is being provided …\n"
        '00001740 29 v 02 breathe 0 respire 0 000 01 + 02 00 | draw air into; "I can breathe"; "we respire"  \n'
        "00002573 38 v 01 go 0 000 | change place  \n"
    )
    (place / "data.verb").write_text(synsets)
    assert list(definitions(tmp_path, "verb")) == [(29, "draw air into"), (38, "change place")]
    assert list(corpora.categories("verb", tmp_path)) == [("draw air into", "body"), ("change place", "motion")]
    assert corpora.CATEGORIES["noun"][28] == "time"
    assert corpora.CATEGORIES["verb"][43] == "weather"


MAN = r""".TH LS 1
.SH BESCHREIBUNG
Auflistung von \fIInformationen\fP über die DATEIen, nach Kurz\- und Langform
sortiert wie gewünscht.
.PP
zu kurz
.PP
Using a custom database or the existing one is discouraged, see section fourteen.
.PP
$ resolvectl 169.254.208.106%senp0s21f0u2u4 fe80::213:3bff:fe49:8aa 1234567890
'\" a comment
"""


def test_man_pages_give_their_translated_paragraphs(tmp_path):
    text = "Auflistung von Informationen über die DATEIen, nach Kurz- und Langform sortiert wie gewünscht."
    assert list(paragraphs(MAN)) == [text]
    for folder in ("de", "pt_BR"):
        place = tmp_path / "usr" / "share" / "man" / folder / "man1"
        place.mkdir(parents=True)
        (place / "ls.1.gz").write_bytes(gzip.compress(MAN.encode()))
    assert list(pages(tmp_path)) == [(text, "de"), (text, "pt-br")]
