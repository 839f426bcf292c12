"""The page of results: what is in it, that nothing gets out of its quotes, and that it loads nothing."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from driving_browser import CHROMIUM, browser
from making_results import compared, line, run, shapley_result, tried_result

import lora_lab as ll
from lora_lab import plots
from lora_lab.errors import FileError, LoraLabWarning, OptionError
from lora_lab.pages import Collected, as_html, collect, save
from lora_lab.pages import drawing as page_drawing
from lora_lab.pages.tables import number, shown
from lora_lab.plots import hover
from lora_lab.plots.hover import spots
from lora_lab.results.result import Result, columns

EVIL = "</script><script>alert(1)</script>\"'\u202e\x1b[31m&amp;$x_1$]]>-->"
TRIED = [(1e-4 * 2**k, [0.6 + 0.02 * k, 0.61], k == 4) for k in range(8)]
_EMPTY = {"meta", "link", "br", "img", "input"}


class Read(HTMLParser):
    """What a page holds; AssertionError where its tags do not close one another."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.texts, self.script = [], [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        for name, value in attrs:
            self.ids += [value] * (name == "id")
            self.links += [value] * (name in ("href", "src", "xlink:href", "action", "data", "srcset"))
            self.links += re.findall(r"url\((.*?)\)", value or "")
            assert not name.startswith("on")

    def handle_endtag(self, tag):
        if tag not in _EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.script += data
        elif self.open[-1:] != ["style"]:
            self.texts.append(data)


def evil_result():
    """Adapters, parameters and provenance that try to leave their place."""
    made = shapley_result()
    rows = [{**row, "adapter": EVIL, "player": f"{EVIL}{i}"} for i, row in enumerate(made.rows())]
    said = {**made.parameters, EVIL: EVIL, "adapters": [{"label": EVIL}], "task": {"name": EVIL}}
    return Result("shapley", columns(rows), said, {"adapters": []}, {"command": EVIL, "date": EVIL, EVIL: EVIL})


@pytest.fixture(scope="module")
def whole():
    """A page of several kinds, one of them evil, one of a kind that nobody knows."""
    unknown = Result("mine", {"a": [1, 2], "b": [{"x": 1}, {"x": 2}]})
    results = [line(), evil_result(), unknown, tried_result("lora", TRIED), run()]
    found = Collected([(f"{i}/{EVIL}.json", result) for i, result in enumerate(results)], [(EVIL, f"{EVIL}: broken")])
    return as_html(found, title=EVIL)


def test_a_page_is_one_sound_file_that_loads_nothing(whole):
    read = Read(whole)
    assert len(set(read.ids)) == len(read.ids)
    assert all(link[0] == "#" or link.startswith("data:image/") for link in read.links)
    assert {link[1:] for link in read.links if link[0] == "#"} <= set(read.ids)
    assert not {tag for tag, _ in read.tags} & {"link", "iframe", "object", "embed", "form", "base", "image:"}
    for address in re.findall(r"https?://[^\s\"'<)]*", whole):
        pytest.fail(address)
    assert "@import" not in whole


def test_only_the_pages_own_script_may_run(whole):
    read = Read(whole)
    assert [tag for tag, _ in read.tags].count("script") == 1
    (policy,) = [said["content"] for tag, said in read.tags if said.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(read.script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "alert(1)" not in read.script


def test_texts_of_others_are_shown_as_they_are_and_control_codes_as_escapes(whole):
    shown = "".join(Read(whole).texts)
    assert shown.count(EVIL.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")) > 10
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", whole)


def test_equal_results_give_equal_bytes():
    found = Collected([("a.json", tried_result("lora", TRIED)), ("b.json", run(steps=5))], [])
    assert as_html(found, title="x") == as_html(found, title="x")


def test_tables_have_intervals_in_the_cell_and_leave_out_what_says_nothing():
    barriers, rows = shown(line(), 3)
    assert (barriers.name, rows.name) == ("barriers", "rows")  # that of papers first
    headings = [heading.text for heading in rows.headings]
    assert headings == ["space", "t", "accuracy", "loss", "norm"]
    assert ("members", "labels of the adapters that are mixed", "lora0, lora1") in rows.alike
    assert [cell.text for cell in rows.rows[1]] == [
        "factors", "0.25", "0.675 [0.655, 0.695]", "0.325 [0.225, 0.425]", "6.25"
    ]  # fmt: skip
    assert [cell.number for cell in rows.rows[1]] == pytest.approx([None, 0.25, 0.675, 0.325, 6.25], nan_ok=True)
    assert (len(rows.rows), rows.count) == (3, 15)
    assert rows.headings[1].about == "place on the line, 0 the first adapter and 1 the second; null of ratios"
    result = line()
    result.parameters["metrics"] = {"accuracy": {"about": "share that is right", "unit": "share"}, "loss": None}
    assert [heading.about for heading in shown(result, 3)[1].headings[2:4]] == ["share that is right (share)", ""]


def test_small_numbers_keep_digits_and_negative_ones_have_a_minus():
    assert [number(value, ".3f") for value in (0.0, 0.0004, -0.25, 1.0)] == ["0.000", "0.0004", "−0.250", "1.000"]
    assert number(1e-7, ".3f") == "1e−07"


def test_values_are_told_where_they_are_drawn():
    result = line()
    figure = plots.figure([result])
    told = spots(figure)
    ax = figure.axes[0]
    for row in result.rows():
        x, y = ax.transData.transform((row["t"], row["accuracy"])) * 72 / figure.dpi
        here = [spot.text for spot in told if np.hypot(spot.x - x, spot.y - (figure.bbox.height * 0.72 - y)) < 0.01]
        ends = f"{row['accuracy_low']:.4g}, {row['accuracy_high']:.4g}"
        assert any(f"= {row['accuracy']:.4g} [{ends}]" in text for text in here), row
    assert any(text.startswith("LoRA · factors A, B averaged\nt") for text in (spot.text for spot in told))


def test_bars_and_cells_tell_their_names_and_values():
    bars = [spot.text for spot in spots(plots.figure([shapley_result(players="layer")], kind="shapley:bars"))]
    assert any("= 0.08 [0.05, 0.11]" in text for text in bars)
    assert any("= 0.22 [0.19, 0.25]" in text for text in bars)
    three = compared(("a", "b", "c"))
    cells = [spot for spot in spots(plots.figure([three])) if spot.width]
    assert sorted(spot.text for spot in cells) == sorted(
        ["c, c\n1", "b, b\n1", "a, a\n1", "b, a\n0.5", "a, b\n0.5"]
    )  # of c, whose ΔW is 0, no cosine is told


def test_every_view_that_shows_something_is_drawn_once():
    titles = [drawn.title for drawn in page_drawing.drawings(shapley_result(interactions=True), "r1")]
    assert titles == [
        "Shapley values",  # and no second time as a heat map
        "Values with their intervals",
        "Standard errors over the coalitions",
        "Pairwise interactions",
    ]
    (none,) = page_drawing.drawings(Result("plane", {"x": [1.0]}, {"task": {"name": "x"}, "split": "test"}), "r1")
    assert none.content is None
    assert none.note.startswith("no figure: ")


def test_a_figure_that_is_too_large_is_a_picture(monkeypatch):
    monkeypatch.setattr(page_drawing, "_LARGEST", 1000)
    (first, *_) = page_drawing.drawings(line(), "r1")
    assert first.content.startswith('<img alt="The main metric along lines, and ‖ΔW‖" src="data:image/png;base64,')
    assert "in the tables" in first.note


def test_a_figure_of_more_values_than_fit_tells_none(monkeypatch):
    figure = plots.figure([line()])
    count = len(spots(figure))
    monkeypatch.setattr(hover, "MOST", count - 1)
    assert count == 30
    assert spots(figure) == []


@pytest.fixture
def folder(tmp_path):
    """Two results, and what lies about beside them."""
    place = tmp_path / "runs"
    for name in ("s10", "s2", ".hidden"):
        Result("mine", {"a": [1, 2]}, {}, {}, {"date": "2025-01-02T03:04:05"}).save(place / name / "mine.json")
    (place / "list.json").write_text("[1, 2]")
    (place / "other.json").write_text('{"format": "somebody else"}')
    (place / "cut.json").write_text('{"format": "lora-lab result 1", "kind": ')
    damaged = json.loads((place / "s2" / "mine.json").read_text())
    (place / "changed.json").write_text(json.dumps({**damaged, "columns": {"a": [1, 3]}}))
    (place / "folder.json").mkdir()
    return place


def test_results_are_found_in_all_folders_and_what_is_damaged_is_named(folder):
    found = collect([folder])
    assert [place for place, _ in found.results] == ["s2/mine.json", "s10/mine.json"]
    assert [place for place, _ in found.unread] == ["changed.json", "cut.json"]
    assert "does not agree with its own checksum" in found.unread[0][1]
    assert [place for place, _ in collect([folder / "s2" / "mine.json"]).results] == ["mine.json"]


def test_a_page_is_written_whole_and_replaces_only_another_page(folder, tmp_path):
    target = tmp_path / "report.html"
    with pytest.warns(LoraLabWarning, match="left out") as warned:
        assert ll.report(folder, target, progress=False) == target
    assert len(warned) == 2
    text = target.read_text()
    assert text.count("<article ") == 2
    assert "<h1>runs</h1>" in text
    assert "2 files that cannot be read" in text
    with pytest.raises(FileError, match="exists already"):
        save([folder], target)
    result = collect([folder]).results[0][1]
    ll.report(result, target, title="Mine", force=True, progress=False)
    assert "<h1>Mine</h1>" in target.read_text()
    target.write_text("<!doctype html><title>somebody's</title>")
    with pytest.raises(FileError, match="not written by lora-lab"):
        save([folder], target, force=True)


def test_nothing_is_written_of_nothing(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match=r"empty: no result of lora-lab in it$"):
        save([tmp_path / "empty"], tmp_path / "a.html")
    with pytest.raises(FileError, match="nowhere: no such file"):
        save([tmp_path / "nowhere"], tmp_path / "a.html")
    with pytest.raises(OptionError, match=r"a\.pdf: a page is written as \.html"):
        save([folder], tmp_path / "a.pdf")
    assert not list(tmp_path.glob("a.*"))


def test_the_command_names_damaged_files_and_the_size_of_the_page(folder, lora_lab, tmp_path):
    code, out, err = lora_lab("report", folder, "-o", "page.html", "--rows", "1")
    assert (code, out) == (0, "")
    assert err.count("warning: ") == 2
    assert re.search(r"wrote page\.html \(\d+(\.\d+)? kB\)", err)
    assert "The first 1 of 2 rows; all of them are in s2/mine.json." in (tmp_path / "page.html").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_in_a_browser_figures_are_seen_tables_sort_and_nothing_is_loaded(whole, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(whole, encoding="utf-8")
    with browser(tmp_path / "profile") as tab:
        tab.open(path)
        assert tab.value("document.querySelectorAll('article').length") == 5
        seen = "[...document.querySelectorAll('figure svg')].filter((drawn) => drawn.checkVisibility()).length"
        assert tab.value(seen) == 4  # the usual view of each kind that has one
        rows = "document.querySelectorAll('#r1 details.table[open] tbody tr')"
        values = f"[...{rows}].map((row) => +row.lastChild.dataset.value)"
        before = tab.value(values)
        heading = "document.querySelector('#r1 details.table[open] th:last-child span')"
        tab.value(f"{heading}.click()")
        assert tab.value(values) == sorted(before)
        tab.value(f"{heading}.click()")
        assert tab.value(values) == sorted(before, reverse=True) != sorted(before)
        search = "document.querySelector('#r5 input[type=search]')"
        tab.value(f"{search}.value = '1111'; {search}.dispatchEvent(new Event('input'))")
        left = (
            "[...document.querySelectorAll('#r5 details.table[open] tbody tr:not([hidden])')].map((r) => r.textContent)"
        )
        assert 0 < len(tab.value(left)) < 40
        assert all("1111" in text for text in tab.value(left))
        point = "document.querySelector('#r1 .values circle')"
        tab.value(f"{point}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = tab.value(f"{point}.getBoundingClientRect().toJSON()")
        place = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
        assert "accuracy = " in tab.value("document.querySelector('.tip').innerText")
        ground = "getComputedStyle(document.body).backgroundColor"
        light = tab.value(ground)
        tab.value("document.querySelector('button.theme').click()")
        assert tab.value(ground) != light
        assert tab.value("typeof window.alerted") == "undefined"
        assert not tab.events("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        asked = [event["request"]["url"] for event in tab.events("Network.requestWillBeSent")]
        assert [url for url in asked if not url.startswith("data:image/")] == [path.as_uri()]
