"""Results and journals mutated at random: a LoraLabError or what was written, in a moment; never a wrong number."""

import json
import time
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_lab import plots
from lora_lab.errors import LoraLabError
from lora_lab.results.result import FORMAT, Result, _checksum
from lora_lab.scoring.examples import pack, remembered
from lora_lab.scoring.journal import Journal, discard
from lora_lab.tasks.task import Scores

MOST_S = 5.0
QUICK = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
LONG = settings(QUICK, max_examples=10_000)
DRAWN = settings(QUICK, max_examples=40)
KEPT = settings(QUICK, max_examples=100)

TRAINED = Result(
    "train",
    {"step": [1, 2], "loss": [2.0, 1.0], "p": [0.5, 1.0], "mask": ["10", "11"]},
    {"record": {"method": "coto", "seed": 0, "task": {"name": "digits/relabel"}}, "groups": ["a", "b"]},
    {"validation": {"accuracy": 0.5, "loss": 1.0}},
    {"examples": 3, "run": "0123"},
)
SCORES = Scores.judged(np.arange(9.0), np.arange(9) % 2 == 0, np.arange(9.0) / 4)
ENTRIES = {"110": pack(SCORES), "key é": [1.5, None, "\udcff"], "": {}}

numbers = st.one_of(st.integers(), st.floats(), st.just(10**400), st.just(1e308))
leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8), st.just("$\\frac$\x1b[31m\udc80"))
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def places(content, before=()):
    """Every place within JSON types."""
    yield before
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inside:
        yield from places(value, (*before, key))


@st.composite
def damaged_json(draw, content, changes=3):
    """The content with some of its parts replaced by anything, or gone."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, changes))):
        place = draw(st.sampled_from(sorted(places(content), key=repr)))
        if not place:
            content = draw(anything)
            continue
        holder = content
        for key in place[:-1]:
            holder = holder[key]
        if draw(st.booleans()):
            holder[place[-1]] = draw(anything)
        else:
            del holder[place[-1]]
    return content


@st.composite
def damaged_bytes(draw, content):
    """The bytes with some of them flipped, gone, doubled or put in."""
    for _ in range(draw(st.integers(1, 4))):
        i, j = sorted(draw(st.integers(0, len(content))) for _ in range(2))
        kind = draw(st.sampled_from(("flip", "cut", "drop", "double", "put")))
        if kind == "flip" and i < len(content):
            content = content[:i] + bytes([content[i] ^ (1 << draw(st.integers(0, 7)))]) + content[i + 1 :]
        elif kind == "cut":
            content = content[:i]
        elif kind == "drop":
            content = content[:i] + content[j:]
        elif kind == "double":
            content = content[:j] + content[i:j] + content[j:]
        else:
            content = content[:i] + draw(st.binary(max_size=40)) + content[i:]
    return content


@st.composite
def signed(draw, content):
    """Damaged content with a checksum that agrees, as an attacker would have it; or without one."""
    found = draw(damaged_json(content))
    if isinstance(found, dict):
        found.pop("sha256", None)
        if draw(st.booleans()):
            found["format"] = FORMAT
        if draw(st.booleans()):
            found["sha256"] = _checksum(found)
    return found


def text_of(content):
    return json.dumps(content).encode()


def told(error, path=""):
    """One line, which names the file."""
    assert "\n" not in str(error)
    assert str(path) in str(error)


def read(path, content):
    """The result in these bytes; None where it is refused."""
    path.write_bytes(content)
    began = time.monotonic()
    try:
        found = Result.load(path)
    except LoraLabError as error:
        found = told(error, path)
    assert time.monotonic() - began < MOST_S
    return found


def check_bytes(tmp_path, content):
    found = read(tmp_path / "r.json", content)
    assert found is None or found == TRAINED  # the checksum sees whatever changes a number


def check_content(tmp_path, content):
    found = read(tmp_path / "r.json", text_of(content))
    if found is not None:
        found.rows()
        again = Result.load(found.save(tmp_path / "again.json"))
        assert list(again.columns) == list(found.columns)


WRITTEN = (json.dumps(TRAINED.to_json(), indent=1) + "\n").encode()


@given(damaged_bytes(WRITTEN))
@QUICK
def test_a_result_of_other_bytes_is_refused_or_the_same(tmp_path, content):
    check_bytes(tmp_path, content)


@given(signed(TRAINED.to_json()))
@QUICK
def test_a_result_of_other_content_is_refused_or_can_be_used(tmp_path, content):
    check_content(tmp_path, content)


@pytest.mark.slow
@given(damaged_bytes(WRITTEN), signed(TRAINED.to_json()))
@LONG
def test_results_for_long(tmp_path, content, other):
    check_bytes(tmp_path, content)
    check_content(tmp_path, other)


@given(signed(TRAINED.to_json()))
@DRAWN
def test_a_result_of_other_content_is_drawn_or_refused(tmp_path, content):
    found = read(tmp_path / "r.json", text_of(content))
    if found is None:
        return
    began = time.monotonic()
    try:
        plots.save(plots.figure([found]), tmp_path / "x.png", force=True)
    except LoraLabError as error:
        told(error)
    assert time.monotonic() - began < MOST_S


def journal(path):
    made = Journal(path, "run")
    for key, value in ENTRIES.items():
        made.add(key, value)
    made._leave()
    return path.read_bytes()


def check_journal(path, content):
    """What is read is what was written, and what is written afterwards is read."""
    discard(path)
    path.write_bytes(content)
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Journal(path, "run")
        again = {key: found[key] for key in ENTRIES if key in found}
        assert again == {key: ENTRIES[key] for key in again}
        found.add("new", 1)
        assert Journal(path, "run")["new"] == 1
        assert len(Journal(path, "run")) == len(found)
    assert time.monotonic() - began < MOST_S


def check_values(path, values):
    """Entries with seals that agree, over anything: scores or none, and no exception."""
    discard(path)
    found = Journal(path, "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, value in enumerate(values):
            found.add(str(i), value)
            scores = remembered(found, str(i), 9)
            assert scores is None or {len(column) for column in scores.columns.values()} == {9}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return journal(tmp_path_factory.mktemp("journal") / "j")


@given(st.data())
@KEPT
def test_a_journal_of_other_bytes_loses_entries_and_nothing_else(tmp_path, whole, data):
    check_journal(tmp_path / "j", data.draw(damaged_bytes(whole)))


strict = st.lists(damaged_json(ENTRIES["110"], changes=2).map(lambda value: _finite(value)), max_size=3)


def _finite(value):
    """Without NaN and infinities, which a journal does not write."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


@given(strict)
@KEPT
def test_entries_with_a_seal_of_their_own_over_anything_are_scores_or_none(tmp_path, values):
    check_values(tmp_path / "j", values)


@pytest.mark.slow
@given(st.data(), strict)
@LONG
def test_journals_for_long(tmp_path, whole, data, values):
    check_journal(tmp_path / "j", data.draw(damaged_bytes(whole)))
    check_values(tmp_path / "j", values)
