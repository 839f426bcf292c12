"""Answers in generated text: what each extractor takes, and patterns that are refused or stopped."""

import time

import pytest

from lora_lab.errors import OptionError, TaskError
from lora_lab.tasks.kinds.language import extracting
from lora_lab.tasks.kinds.language.extracting import EXTRACTORS, check_pattern


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("She has 3 apples and 4 pears, so 7.", "7"),
        ("5 + 5 = 10\n#### 1,234", "1234"),
        ("#### 12 and then 15 more", "15"),  # the last of what follows the mark
        ("12 apples ####", "12"),  # a mark without a number says nothing
        ("-$1,234.50 in all", "-1234.5"),
        ("+0042.000", "42"),
        ("-0.0", "0"),
        (".5", "0.5"),
        ("1" * 60, "1" * 60),  # more digits than floats or default decimals hold
        ("no number here", None),
        ("", None),
    ],
)
def test_the_last_number(text, found):
    assert EXTRACTORS["number"](text, None) == found


@pytest.mark.parametrize(
    ("extract", "text", "found"),
    [
        ("whole", "  a b \n", "a b"),
        ("whole", " \n", None),
        ("last-line", "one\n two \n\n", "two"),
        ("last-line", "\n \n", None),
        ("regex", "the answer is B. the answer is C.", "B"),
        ("regex", "I cannot say", None),
        ("regex", "the answer is .", None),  # an empty group is no answer
    ],
)
def test_other_answers(extract, text, found):
    assert EXTRACTORS[extract](text, r"answer is (\w*)\.?" if extract == "regex" else None) == found


@pytest.mark.parametrize(
    ("extract", "pattern", "told"),
    [
        ("regex", None, 'pattern: extract = "regex" needs it'),
        ("number", "(a)", "pattern: with extract = 'number' it has no use"),
        ("regex", "(a", "no regular expression (missing )"),
        ("regex", "a", "has 0 groups; one, around the answer, is needed"),
        ("regex", "(a)(b)", "has 2 groups"),
        ("regex", "(" + "a" * 1000 + ")", "has 1002 characters; 1000 at most"),
        ("regex", "(" * 490 + ")" * 490, "is no regular expression (maximum recursion depth"),
    ],
)
def test_patterns_that_are_refused(extract, pattern, told):
    with pytest.raises(OptionError) as found:
        check_pattern(extract, pattern, "here.toml")
    assert str(found.value).startswith("here.toml: pattern")
    assert told in str(found.value)


def test_a_pattern_that_takes_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(extracting, "PATIENCE_S", 0.1)
    began = time.perf_counter()
    with pytest.raises(TaskError, match=r"takes over 0.1 s on a text of 62 characters; one without repeats of repeats"):
        EXTRACTORS["regex"]("x" * 60 + "!y", r"((?:x|xx)+)y")
    assert time.perf_counter() - began < 5
