"""Verbs and the dataclasses that they are made from say the same."""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import get_args, get_origin, get_type_hints

import pytest
import typer

from lora_lab.analysis import questions
from lora_lab.analysis.merge_tables import question as merges
from lora_lab.analysis.question import Question
from lora_lab.cli import verbs
from lora_lab.cli.verbs import VERBS, Grid, build, flags, shown
from lora_lab.options import help_of, options_of
from lora_lab.training.recipe import Recipe

MODULES = questions, merges
QUESTIONS = [
    each for module in MODULES for each in vars(module).values() if inspect.isclass(each) and issubclass(each, Question)
]
TOLD = {"train": Recipe} | {each.kind: each for each in QUESTIONS if each is not Question}


def command_of(verb):
    return verbs.command_of(verbs.function_of(verb))


def groups_of(verb):
    """The dataclasses among the parameters of a verb's function."""
    hints = get_type_hints(command_of(verb).__wrapped__, include_extras=True)
    groups = [get_args(hint)[0] if get_origin(hint) is Grid else hint for hint in hints.values()]
    return [group for group in groups if dataclasses.is_dataclass(group)]


def written(value):
    """A default as somebody would write it."""
    if isinstance(value, tuple):
        return ",".join(":".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value)
    return str(value)


def read(text):
    """The numbers and names of what is written."""

    def number(part):
        try:
            return float(part)
        except ValueError:
            return part

    return [[number(part) for part in item.split(":")] for item in text.replace(" ", "").split(",")]


@pytest.mark.parametrize("verb", TOLD)
def test_every_option_of_a_question_is_in_the_help_of_its_verb_with_its_default(lora_lab, verb):
    code, out, err = lora_lab(verb, "--help")
    assert code == 0, err
    blocks = re.split(r"\n│ (?=[ *]*--)", out)
    for field, said in options_of(TOLD[verb]):
        if said.flag == "":
            continue
        name = flags(field, said)[-1].partition("/")[0]
        (block,) = [block for block in blocks if name in block.split()[0].split(",")]
        words = " ".join(block.replace("│", " ").split())
        assert help_of(said).replace("`", "").split(".")[0][:40] in words
        default = None if field.default is dataclasses.MISSING else field.default
        if default is None or default is False or default == ():
            assert "[default: " not in words or "/" in flags(field, said)[-1]
        elif default is True:
            assert f"[default: {name[2:]}]" in words
        else:
            (told,) = re.findall(r"\[default: (.*?)\]", words)
            assert not told.startswith("(")  # what stands there can be typed
            assert read(told) == read(written(default))


@pytest.mark.parametrize("verb", VERBS)
def test_no_option_of_a_verb_is_told_outside_of_a_dataclass(verb):
    known = [field.name for group in groups_of(verb) for field, _ in shown(group)]
    assert len(set(known)) == len(known)
    for name, parameter in inspect.signature(command_of(verb)).parameters.items():
        (said,) = parameter.annotation.__metadata__
        if not isinstance(said, typer.models.ArgumentInfo) and not said.is_eager:  # an eager one lists and ends
            assert name in known


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_without_options_asks_with_the_defaults(verb):
    given = {name: each.default for name, each in inspect.signature(command_of(verb)).parameters.items()}
    for group in groups_of(verb):
        if any(field.default is dataclasses.MISSING is field.default_factory for field in dataclasses.fields(group)):
            continue  # it has an option that must be given
        if verb == "prune" and "keep" in given and group.__name__ == "Pruning":
            continue  # one way must be named
        made, plain = build(group, given), group()
        for field, _ in shown(group):
            value, default = getattr(made, field.name), getattr(plain, field.name)
            assert (dict(value) if isinstance(value, Mapping) else value) == default


OF_ALL_THAT_SCORE = ("label", "group", "examples", "jobs", "split", "task", "metric")


def test_every_verb_that_scores_has_the_options_of_all():
    lacking, scoring = set(), []
    for verb in VERBS:
        groups = groups_of(verb)
        if any(issubclass(group, Question) for group in groups):
            scoring.append(verb)
            known = {name.strip("-") for group in groups for each in shown(group) for name in flags(*each)}
            lacking |= {(verb, name) for name in OF_ALL_THAT_SCORE if name not in known}
    assert {"checkpoints", "plane", "sharpness", "compare-merges", "evaluate"} <= set(scoring)
    assert not lacking


def test_values_are_read_as_the_types_of_the_fields():
    names = {field.name: None for field, _ in shown(merges.CompareMerges)}
    given = names | {
        "methods": ["ties, dare", "knots"],
        "options": ["ties.density=0.5"],
        "quick_nulls": False,
        "coefficients": "0.5,1",
        "split": "test",
    }
    asked = build(merges.CompareMerges, given | {"ratios": "1:2,1:1:1", "seed": 3, "draws": 20, "ranks": "sum,8"})
    assert asked.methods == ("ties", "dare", "knots")
    assert asked.options == {"ties": {"density": 0.5}}
    assert asked.coefficients == (0.5, 1.0)
    assert asked.ratios == ((1.0, 2.0), (1.0, 1.0, 1.0))
    assert asked.ranks == ("sum", 8)
    assert asked.base_name is None
    names = {field.name: each for field, _ in shown(Recipe) for each in [field.default]}
    names |= {"groups": ["a=x", "b=y"], "rank": "2,4", "warmup": "0.1", "dropout": "0", "stage": "0.5"}
    grid = build(Grid[Recipe], names | {"weight_decay": "0", "max_grad_norm": "1"})
    assert grid.first.groups == {"a": "x", "b": "y"}
    assert (grid.first.rank, grid.values["rank"], grid.values["alpha"]) == (2, [2, 4], [None])


def test_the_built_in_tasks_are_listed(lora_lab):
    code, out, err = lora_lab("tasks")
    assert code == 0, err
    assert "digits/relabel" in out
    assert "causal-lm" in out
    code, out, err = lora_lab("tasks", "--example", "text-classification")
    assert code == 0, err
    assert 'kind = "text-classification"' in out


WITH_METRICS = [
    (verb, group)
    for verb in VERBS
    for group in groups_of(verb)
    if get_type_hints(group).get("metric") == tuple[str, ...]
]


@pytest.mark.parametrize(("verb", "group"), WITH_METRICS, ids=lambda value: str(value)[:20])
def test_metrics_are_named_one_after_the_other_or_with_commas_and_the_first_is_the_main_one(verb, group):
    plain = {name: each.default for name, each in inspect.signature(command_of(verb)).parameters.items()}
    assert build(group, plain | {"metric": ["f1", "accuracy"]}).metric == ("f1", "accuracy")
    assert build(group, plain | {"metric": ["loss, f1"]}).metric == ("loss", "f1")
    assert build(group, plain | {"metric": None}).metric == build(group, plain | {"metric": []}).metric == ()


def test_all_verbs_that_choose_by_metrics_take_several():
    assert {verb for verb, _ in WITH_METRICS} >= {"train", "merge", "compare-merges", "sweep", "evaluate", "curve"}
