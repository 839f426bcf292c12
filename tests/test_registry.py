"""Registries: names, entries, and what other packages bring."""

import ast
import importlib.metadata
import subprocess
import sys
import warnings
from dataclasses import dataclass

import pytest

from lora_lab import registry
from lora_lab.errors import LoraLabWarning, OptionError
from lora_lab.registry import Later, Registry


@dataclass(frozen=True)
class Way:
    function: object
    label: str = ""


@pytest.fixture
def ways():
    return Registry("way", "lora_lab.test_ways", Way, {"plain": Way(abs), "round": Way(round)})


def package(folder, name, entries, code):
    """An installed package, as pip leaves it: a module and its metadata."""
    (folder / f"{name}.py").write_text(code)
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{entry} = {where}" for entry, where in entries.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[lora_lab.test_ways]", *lines]) + "\n")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda *what: package(tmp_path, *what)
    for module in ("waymaker", "broken", "aaa", "zzz"):
        sys.modules.pop(module, None)


MAKER = f"from {__name__} import Way\nfar = Way(len, 'far')\nnear = Way(min, 'near')\n"


def test_a_registry_is_a_mapping_in_the_order_it_was_told(ways):
    assert list(ways) == ["plain", "round"]
    assert len(ways) == 2
    assert ways["plain"] == Way(abs)
    assert ways.get("plain") == Way(abs)
    assert ways.get("none") is None
    assert "plain" in ways
    assert "none" not in ways
    assert 3 not in ways
    assert {**ways} == {"plain": Way(abs), "round": Way(round)}


def test_an_unknown_name_is_told_with_the_nearest(ways):
    with pytest.raises(OptionError, match=r"^unknown way 'plian' \(did you mean 'plain'\?\); there are: plain, round$"):
        ways["plian"]


def test_entries_are_registered_by_call_and_by_decorator(ways):
    assert ways.register("far", Way(len, "x")).label == "x"

    @ways.register("near", label="y")
    def near():
        return 1

    assert near() == 1
    assert ways["near"] == Way(near, "y")
    assert list(ways) == ["plain", "round", "far", "near"]


def test_a_taken_name_and_another_type_are_refused(ways):
    with pytest.raises(OptionError, match=r"^there is a way 'plain' already$"):
        ways.register("plain", Way(len))
    with pytest.raises(OptionError, match=r"^'far' is a int; a Way is needed$"):
        ways.register("far", 3)
    assert list(ways) == ["plain", "round"]


def test_packages_bring_entries_which_are_loaded_when_asked_for(ways, installed):
    installed("waymaker", {"far": "waymaker:far", "near": "waymaker:near"}, MAKER)
    assert ways["plain"]
    assert "waymaker" not in sys.modules
    assert ways["far"].label == "far"
    assert list(ways) == ["plain", "round", "far", "near"]
    with pytest.raises(OptionError, match="already"):
        ways.register("near", Way(len))


@pytest.mark.parametrize(
    ("entries", "code", "reason"),
    [
        ({"far": "broken:far"}, "import not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ({"far": "broken:far"}, "", "AttributeError: module 'broken' has no attribute 'far'"),
        ({"far": "broken:far"}, "far = 3", "'far' is a int; a Way is needed"),
        ({"plain": "broken:far"}, "far = 3", "the name is taken"),
    ],
)
def test_a_broken_or_clashing_entry_is_one_warning(ways, installed, entries, code, reason):
    installed("broken", entries, code)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert list(ways) == ["plain", "round"]
        assert "far" not in ways
        assert len(ways) == 2
    assert [w.category for w in caught] == [LoraLabWarning]
    text = str(caught[0].message)
    assert text.startswith(f"broken brings the way {next(iter(entries))!r}, which is left out: ")
    assert reason in text
    assert ways["plain"] == Way(abs)


def test_of_two_packages_with_one_name_the_first_by_its_name_counts(ways, installed):
    installed("zzz", {"far": "zzz:near"}, MAKER)
    installed("aaa", {"far": "aaa:far"}, MAKER)
    with pytest.warns(LoraLabWarning, match="^zzz brings the way 'far', which is left out: the name is taken$"):
        assert ways["far"].label == "far"


LISTS = [
    ("lora_lab.merging.paths", "SPACES"),
    ("lora_lab.analysis.lines.curves.control_points", "CURVES"),
    ("lora_lab.analysis.lines.curves.curve", "CURVE_SPACES"),
    ("lora_lab.merging.methods", "MERGES"),
    ("lora_lab.games.estimators", "ESTIMATORS"),
    ("lora_lab.adapters.groups", "PLAYERS"),
    ("lora_lab.analysis.coalitions.sweep", "KINDS"),
    ("lora_lab.tasks.splits", "SPLITS"),
]


def test_names_are_listed_without_loading_what_they_name():
    code = (
        "import sys; from lora_lab.registry import Later\n"
        f"print([Later(*place).names() for place in {LISTS}])\n"
        "assert not {'torch', 'numpy', *(module for module, _ in " + repr(LISTS) + ")} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == [list(Later(*place)()) for place in LISTS]


def test_names_that_packages_bring_are_listed_before_they_are_loaded(installed, tmp_path, monkeypatch):
    (tmp_path / "laterways.py").write_text(
        "from lora_lab.registry import Registry\nWAYS = Registry('way', 'lora_lab.test_ways', None, {'straight': 1})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    installed("pack", {"bent": "nowhere:bent"}, "")
    registry._all_points.cache_clear()
    assert Later("laterways", "WAYS").names() == ["straight", "bent"]
    assert "laterways" not in sys.modules


def test_nothing_is_looked_for_at_import(monkeypatch):
    code = (
        "import importlib.metadata as m, sys\n"
        "m.entry_points = None\n"
        "from lora_lab.registry import Registry\n"
        "assert Registry('way', 'g', int, {'one': 1})['one'] == 1\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert importlib.metadata.entry_points
