"""Files of claims: those that come along, and what is said of wrong ones."""

import pytest

from lora_lab import tasks
from lora_lab.analysis.merge_tables.sets import specs_of
from lora_lab.analysis.merge_tables.table import ALONE, BASE, ENSEMBLE
from lora_lab.claims.asking import QUESTIONS, Answer
from lora_lab.claims.claims import OWN, PUBLISHED, Published, chosen, read
from lora_lab.claims.reproduce import Plan, Reproduce
from lora_lab.claims.statistics import STATISTICS
from lora_lab.errors import FileError, OptionError
from lora_lab.results.result import Result
from lora_lab.training.recipe import Recipe

ROW = """[[claim]]
name = "a"
says = "b"
source = "c"
statistic = "task-score"
direction = "higher"
treated = { method = "coto" }
least = 0.01
"""


def test_what_comes_along_can_be_run_as_it_stands():
    claims, beds = read()
    assert len(claims) > 30
    for claim in claims:
        for fields in claim.trainings:
            Recipe(**fields)
        statistic = STATISTICS[claim.statistic]
        if statistic.verb is not None:
            QUESTIONS[statistic.verb].made(claim.options)
        assert set(claim.testbeds) <= set(beds)
    for task in beds["digits"].tasks + beds["digits"].merged:
        tasks.from_name(task)


def test_every_statistic_is_of_a_question_that_can_be_asked():
    assert {each.verb for each in STATISTICS.values()} <= {None, *QUESTIONS}


def test_claims_about_merges_are_of_rows_that_a_comparison_has():
    asked = [each for each in read()[0] if STATISTICS[each.statistic].verb == "compare-merges"]
    assert len(asked) > 10
    for claim in asked:
        there = [BASE, ALONE, ENSEMBLE, *(spec.name for spec in specs_of(claim.options["methods"], {}))]
        assert claim.where["merge"] in there, claim.name


def test_claims_about_keep_sets_find_numbers_in_a_result_of_stability(request):
    """Of the adapters of every seed, in the main metric's unit; an ε that no family is called by would be none."""
    result = Result.load(request.config.rootpath / "figures" / "results" / "stability.json")
    asked = [each for each in read()[0] if STATISTICS[each.statistic].verb == "stability"]
    assert len(asked) > 2
    for claim in asked:
        found = STATISTICS[claim.statistic].of(Answer(result), claim.where)
        assert set(found) == {(seed,) for seed in range(5)}, claim.name
    layers = {"family": "k-of-G", "label": "3", "rescaled": False}
    found = STATISTICS["with-layers"].of(Answer(result), layers)
    last = {(row["seed"],): row["accuracy"] for row in result.rows(**layers)}
    assert {unit: each.value for unit, each in found.items()} == last


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[claim]]\nname = 'a'", ("claim 1 (a): has no says",)),
        (ROW.replace("task-score", "task-scores"), ("claim 1 (a)", "'task-scores'", "task-score")),
        (ROW.replace("higher", "better"), ("'better'", "higher")),
        (ROW.replace("task-score", "on-line"), ("needs space, t in `where`",)),
        (ROW + "where = { space = 'delta' }", ("'space'",)),
        (ROW + "lest = 1", ("'lest'", "did you mean 'least'")),
        (ROW.replace("0.01", "-1"), ("least is -1", "at least 0")),
        (ROW.replace("0.01", "'x'"), ("least is 'x'", "a number is needed")),
        (ROW.replace("higher", "equal").replace("0.01", "0.0"), ("equal needs a `least` above 0",)),
        (ROW + ROW, ("two claims are called 'a'",)),
        (ROW + "shared_a = true", ("shared_a is of adapters of several tasks; statistic task-score is of one",)),
        (
            ROW.replace("task-score", "twins-cosine"),
            ("statistic twins-cosine is of two ways of training; a control is needed",),
        ),
        ("[testbed.x]\nabout = 'y'\ntasks = ['a']\ntraining_s = 0", ("training s is 0", "above 0")),
        ("[testbed.x]\nabout = 'y'", ("testbed x: has no tasks",)),
        ("[testbed.x]\nabout = 'y'\ntasks = []", ("a testbed needs a task",)),
        ("[testbed]\nx = 3", ("testbed x", "a table of fields")),
        ("claim = 3", ("[[claim]] tables",)),
        ("[other]\nx = 1", ("[other]", "[[claim]] and [testbed.NAME]")),
        ("[[claim", ("not a TOML file",)),
    ],
)
def test_a_wrong_file_is_named_with_its_row_and_field(tmp_path, text, words):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(FileError) as error:
        read(path)
    for word in ("mine.toml", *words):
        assert word in str(error.value)


def test_what_a_file_lacks_comes_along_and_its_tasks_lie_beside_it(tmp_path):
    own, beds = read()
    (tmp_path / "bed.toml").write_text(
        "[testbed.x]\nabout = 'y'\ntasks = ['a.toml', 'digits/mod3']\nmerged = ['b.toml']"
    )
    claims, found = read(tmp_path / "bed.toml")
    assert claims == own
    assert list(found) == ["x"]
    assert found["x"].tasks == (str(tmp_path / "a.toml"), "digits/mod3")
    assert found["x"].merged == (str(tmp_path / "b.toml"),)
    (tmp_path / "claim.toml").write_text(ROW)
    claims, found = read(tmp_path / "claim.toml")
    assert [claim.name for claim in claims] == ["a"]
    assert found == beds


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{ of = 'DTD' }", ("claim 1 (a): published 1", "needs control, treated or both, or else the difference")),
        ("{ control = 1.0, difference = 2.0 }", ("published 1", "or else the difference alone")),
        ("{ treated = '71' }", ("published 1", "treated is '71'", "a number is needed")),
        ("{ treeted = 71.0 }", ("published 1", "'treeted'", "did you mean 'treated'")),
        ("3", ("published 1", "a table of fields is needed")),
    ],
)
def test_published_numbers_that_are_none(tmp_path, row, words):
    path = tmp_path / "mine.toml"
    path.write_text(ROW + f"published = [{row}]")
    with pytest.raises(FileError) as error:
        read(path)
    for word in words:
        assert word in str(error.value)


def test_published_numbers_stand_as_they_do_there_and_the_difference_is_theirs():
    both = Published("DTD", "accuracy, %", control=71.5, treated=72.75)
    assert str(both) == "DTD: 71.5 → 72.75 (accuracy, %)"
    assert both.cells == dict(zip(PUBLISHED, ("DTD", "accuracy, %", 71.5, 72.75, 1.25), strict=True))
    alone = Published(difference=-7.2, unit="%")
    assert str(alone) == "−7.2 (%)"
    assert alone.cells["published_difference"] == -7.2
    assert alone.cells["published_control"] is None
    assert Published(treated=73.6).cells["published_difference"] is None


def test_names_that_are_not_there():
    with pytest.raises(FileError, match="no such file of claims"):
        read(OWN.with_name("none.toml"))
    with pytest.raises(OptionError, match="did you mean 'midpoint'"):
        Reproduce(claims=("midpont",)).plan()
    with pytest.raises(OptionError, match="unknown testbed 'digit'"):
        Reproduce(testbed="digit").plan()
    with pytest.raises(OptionError, match="claim rate can be put to digits alone, not to text"):
        Reproduce(claims=("rate",), testbed="text").plan()
    with pytest.raises(OptionError, match="seeds is 1; it must be at least 2"):
        Reproduce(seeds=1)


def test_a_training_that_several_claims_need_is_planned_once_and_merged_adapters_share_no_initial_a():
    claims, beds = read()
    plan = Plan(beds["digits"], tuple(chosen(claims, ["midpoint", "barrier", "gain-lora"], "digits")), (0, 1))
    assert list(plan.trainings()) == [("digits/relabel", {"method": "coto"}), ("digits/relabel", {"method": "lora"})]
    merged = Plan(beds["digits"], tuple(chosen(claims, ["ties"], "digits")), (0, 1))
    seeds = {task: fields["init_seed"] for task, fields in merged.trainings()}
    assert len(set(seeds.values())) == len(beds["digits"].merged) == 4


def test_adapters_that_share_their_initial_a_are_those_of_their_tasks_own_claims():
    claims, beds = read()
    plan = Plan(beds["digits"], tuple(chosen(claims, ["ties-shared"], "digits")), (0, 1))
    assert {task for task, _ in plan.trainings()} == set(beds["digits"].merged)
    assert {tuple(fields.items()) for _, fields in plan.trainings()} == {(("method", "coto"),), (("method", "lora"),)}


def test_the_trainings_on_fashion_are_every_method_and_tuner_on_two_tasks_and_two_methods_on_all():
    claims, beds = read()
    bed = beds["fashion"]
    planned = list(Plan(bed, tuple(chosen(claims, (), "fashion")), (0,)).trainings())
    own = {(task, f["method"]) for task, f in planned if "init_seed" in f}
    shared = {(task, f["method"]) for task, f in planned if set(f) == {"method"}}
    pairs = {(task, method) for task in bed.merged for method in ("lora", "coto")}
    assert own == pairs
    assert pairs <= shared
    assert len(bed.merged) == 8
    on_two = {
        (task, f["method"], f.get("peft", "lora")) for task, f in planned if set(f) in ({"method"}, {"method", "peft"})
    }
    rivals = ("coto-h", "coto-l", "dropout", "progressive-dropout", "stochastic-depth")
    wanted = [(method, "lora") for method in rivals]
    wanted += [(method, peft) for method in ("lora", "coto") for peft in ("dora", "hira")]
    assert {(task, *way) for task in bed.tasks for way in wanted} <= on_two
