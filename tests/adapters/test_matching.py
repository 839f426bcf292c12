"""Patterns of a configuration match as PEFT's do, and cannot keep the reader busy."""

import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lab.adapters.formats.peft.matching import by_ending, by_path, by_whole, first_match, numbered
from lora_lab.errors import AdapterError

NAMES = [
    *(f"model.layers.{i}.{block}" for i in (0, 1, 10) for block in ("self_attn.q_proj", "mlp.up-proj", "lora_proj")),
    *("lm_head", "a", "a.b", "x.a.b", "axb", "layers.1", "model.vision.0.q_proj"),
]
ATOMS = [
    *("q_proj", ".", "\\.", "^", "$", "layers", "1", "0", "\\d+", ".*", "(", "|", ")", "[qk]", "a", "b", "self_attn"),
    *(
        "_",
        "-",
        "\\-",
        "?",
        "x{e}",
        "{1}",
        "{1,}",
        "[:a]",
        "(?!model)",
        "(?<=a)",
        "\\b",
        "lm_head",
        "model",
        "(?i)",
        "A",
    ),
]
PATTERNS = st.lists(st.sampled_from(ATOMS), max_size=6).map("".join)


def reference(match, pattern):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [name for name in NAMES if match(pattern, name)]
    except re.error:
        return []


@settings(max_examples=600, deadline=None)
@given(PATTERNS)
def test_every_harmless_pattern_matches_what_pefts_own_look_ups_match(pattern):
    found = (
        by_ending([pattern], NAMES)[pattern],
        by_whole([pattern], NAMES)[pattern],
        by_path([pattern], NAMES)[pattern],
    )
    wanted = (
        reference(lambda p, n: re.match(rf"(.*\.)?({p})$", n), pattern),
        reference(lambda p, n: re.fullmatch(p, n), pattern),
        reference(lambda p, n: re.match(rf"(^|.*\.){p}($|\..*)", n), pattern),
    )
    assert tuple(map(sorted, found)) == tuple(map(sorted, wanted))


@pytest.mark.parametrize("pattern", ["^(a|a.b|lm_head)$", "(layers.1|b)", "(?:a|b)$", "(a|)", "(a|b\\.c)"])
def test_a_list_of_alternatives_matches_as_in_re(pattern):
    assert sorted(by_whole([pattern], NAMES)[pattern]) == sorted(n for n in NAMES if re.fullmatch(pattern, n))
    wanted = sorted(n for n in NAMES if re.match(rf"(.*\.)?({pattern})$", n))
    assert sorted(by_ending([pattern], NAMES)[pattern]) == wanted


def test_the_first_of_the_patterns_counts():
    patterns = {"q_proj": 1, r".*\.1\..*": 2, "layers.10.self_attn.q_proj": 3, "b": 4, "^a.b": 5}
    assert first_match(patterns, NAMES) == {
        **{f"model.layers.{i}.self_attn.q_proj": 1 for i in (0, 1, 10)},
        **{f"model.layers.1.{end}": 2 for end in ("mlp.up-proj", "lora_proj")},
        "model.vision.0.q_proj": 1,
        "a.b": 4,
        "x.a.b": 4,
        "axb": 5,
    }


def test_a_layers_number_is_that_of_pefts_look_up():
    names = ["model.layers.1.experts.0.up", "layers.3.up", "a.b.c.7.d", "h.2.x", "model.layers.12.up"]
    found = {name: re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name) for name in names}
    assert numbered([], names) == {name: int(match["idx"]) for name, match in found.items() if match}
    assert numbered(["layers"], names) == {names[0]: 1, names[1]: 3, names[4]: 12}
    assert numbered(["h", "layers"], names) == {names[0]: 1, names[1]: 3, names[3]: 2, names[4]: 12}


LAYERS = [f"model.layers.{i}.{b}.{x}_proj" for i in range(40) for b in ("self_attn", "mlp") for x in "qkvoud"]


def test_a_hundred_thousand_names_are_looked_up_at_once():
    keys = [f"^model.layers.{i}.self_attn.q_proj" for i in range(100_000)]
    start = time.process_time()
    found = by_ending(keys, LAYERS)
    assert time.process_time() - start < 3  # a tenth of that on an idle machine; each by its own look-up takes minutes
    assert sum(map(len, found.values())) == 40


@pytest.mark.parametrize("look_up", [by_ending, by_whole, by_path])
@pytest.mark.parametrize(
    "pattern", ["(.*)*(.*)*" * 300 + "q", "((x|model|.)+)+" * 400 + "!", "(?:(?:.+)+)+\\d{9}z" * 20]
)
def test_a_pattern_that_would_run_for_ever_is_refused_or_done_soon(look_up, pattern):
    start = time.process_time()
    try:
        assert not any(look_up([pattern], LAYERS).values())
        text = ""
    except AdapterError as error:
        text = str(error)
    assert time.process_time() - start < 4
    assert not text or ("takes longer than 1 s" in text and "\n" not in text)


def test_all_patterns_together_have_one_time_limit():
    with pytest.raises(AdapterError, match="takes longer"):
        by_ending([f"(.*)*(.*)*(.*)*{i}x?!" * 50 for i in range(300)], LAYERS)


@pytest.mark.parametrize(("pattern", "word"), [("(" * 4000 + ")" * 4000, "nested"), ("[a]" * 7000, "characters")])
def test_a_pattern_beyond_reason_is_refused(pattern, word):
    with pytest.raises(AdapterError, match=word) as caught:
        by_ending([pattern], LAYERS)
    assert len(str(caught.value)) < 300


def test_a_long_list_of_names_is_no_long_pattern():
    pattern = f"^({'|'.join(map(re.escape, LAYERS * 5))})$"
    assert set(by_whole([pattern], LAYERS)[pattern]) == set(LAYERS)


@pytest.mark.parametrize("look_up", [by_ending, by_path])
def test_without_patterns_no_name_is_looked_at(look_up):
    class Names(list):
        def __iter__(self):
            raise AssertionError("a hundred thousand names are gone through")

    assert look_up([], Names("ab")) == {}
