"""What adapters are called, and which of them belong together."""

from dataclasses import replace

import pytest
from making_adapters import lora, write

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.describe import labels_of, method_of
from lora_lab.adapters.naming import named
from lora_lab.errors import LoraLabNote, OptionError
from lora_lab.pruning.modules import keep_modules


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return Adapter.load(
        write(tmp_path_factory.mktemp("naming") / "a", lora("layers.0.q_proj") | lora("layers.1.q_proj"))
    )


def at(adapter, *places, record=None):
    return [replace(adapter, source=place, record=record or {}) for place in places]


@pytest.mark.parametrize(
    ("places", "labels"),
    [
        (["x/a.safetensors", "x/b.safetensors"], ["a", "b"]),
        (["run1/checkpoint-50", "run2/checkpoint-50", "run2/checkpoint-60"], None),
        (["one/seed0/last", "two/seed0/last"], ["one/…/last", "two/…/last"]),
        (["one/seed0/last", "one/seed1/last", "two/seed0/last"], ["one/seed0/last", "seed1/last", "two/seed0/last"]),
        (["last", "two/last"], ["last", "two/last"]),
        (["two/last", "two/last"], ["last (0)", "last (1)"]),
    ],
)
def test_files_of_one_name_are_told_apart_by_their_folders(adapter, places, labels):
    found = labels_of(at(adapter, *places))
    assert found == (labels or ["run1/checkpoint-50", "run2/checkpoint-50", "checkpoint-60"])
    assert [a.label for a in named(at(adapter, *places))] == found


def test_a_given_label_stands_everywhere_but_in_errors(adapter):
    one, two = named(at(adapter, "x/a", "x/b"), ["first run", "second run"])
    assert (one.label, two.label) == ("first run", "second run")
    assert one.source == "x/a"
    assert "first run: LORA" in repr(one)


def test_what_is_made_of_a_named_adapter_has_another_name(adapter):
    (one,) = named(at(adapter, "x/a"), ["first"])
    assert keep_modules(one, ["layers.0.q_proj"]).label == "pruned first"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["one"], "2 adapters and 1 labels"),
        (["one", "one"], "'one' is given twice"),
        (["one", " "], "can be printed"),
        (["one", "t\x1b[2J"], "can be printed"),
        (["one", "x" * 201], "201 characters; at most 200"),
    ],
)
def test_labels_that_tell_nothing_apart_are_refused(adapter, labels, message):
    with pytest.raises(OptionError, match=message.replace("[", r"\[")):
        named(at(adapter, "x/a", "x/b"), labels)


def test_a_pattern_gives_the_method_that_files_do_not_record(adapter):
    adapters = at(adapter, "runs/plain0", "runs/plain1", "runs/coto0", "other")
    found = named(adapters, [], [("lora", "runs/plain*"), ("coto", "coto?")])
    assert [a.record.get("method") for a in found] == ["lora", "lora", "coto", None]
    assert [method_of(a, a.label) for a in found] == ["lora", "lora", "coto", "other"]
    assert [a.record for a in adapters] == [{}] * 4


def test_a_pattern_may_speak_of_labels_and_wins_over_a_record_which_is_told(adapter):
    adapters = at(adapter, "x/a", "x/b", record={"method": "coto"})
    with pytest.warns(LoraLabNote, match="x/b: taken for lora, its record says coto"):
        found = named(adapters, ["one", "two"], [("lora", "two")])
    assert [a.record["method"] for a in found] == ["coto", "lora"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([("lora", "nobody*")], r"group lora=nobody\*: no adapter is called so; there are: x/a, x/b"),
        ([("lora", "x/*"), ("coto", "b")], "x/b: is in two groups, lora and coto"),
        ([("\x07", "*")], "can be printed"),
    ],
)
def test_groups_that_cannot_be_are_refused(adapter, groups, message):
    with pytest.raises(OptionError, match=message):
        named(at(adapter, "x/a", "x/b"), [], groups)
