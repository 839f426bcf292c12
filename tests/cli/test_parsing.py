"""Texts of the command line become values, or it is said in one line why not."""

import re

import pytest

from lora_lab.cli import parsing
from lora_lab.errors import FileError, OptionError
from lora_lab.merging.sources import Weights
from lora_lab.merging.validation.search import Grid, Interval


def test_values_are_numbers_with_commas():
    assert parsing.values("1e-3,2e-3", "--lr", float) == [1e-3, 2e-3]
    with pytest.raises(OptionError, match=r"--rank '2,x': a whole number is needed"):
        parsing.values("2,x", "--rank", int)
    with pytest.raises(OptionError, match="given twice"):
        parsing.values("2,2", "--rank", int)


# weights


def test_without_any_text_each_adapter_counts_once():
    assert parsing.weights([], 3) == Weights((1.0, 1.0, 1.0))


def test_a_list_is_a_weight_for_each_adapter():
    assert parsing.weights(["1,-2,0.5"], 3) == Weights((1.0, -2.0, 0.5))
    assert parsing.weights([" 1 , 1e-3"], 2).plain == (1.0, 1e-3)


def test_a_line_of_layers_and_weights_for_each_adapter():
    assert parsing.weights(["0:1,4:0.5", "2:-1"], 2) == Weights((1.0, 1.0), layers=({0: 1.0, 4: 0.5}, {2: -1.0}))


def test_a_file_gives_patterns_in_its_order_and_a_default(tmp_path):
    path = tmp_path / "w.json"
    path.write_text('{"q_proj": [1, 0], "default": [0.5, 0.5], "k_proj": [0, 1]}')
    found = parsing.weights([str(path)], 2)
    assert found == Weights((0.5, 0.5), {"q_proj": (1.0, 0.0), "k_proj": (0.0, 1.0)})
    assert list(found.patterns) == ["q_proj", "k_proj"]
    path.write_text('{"head": [3, 4]}')
    assert parsing.weights([str(path)], 2) == Weights((1.0, 1.0), {"head": (3.0, 4.0)})


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["1,1,1"], "2 adapters and 3 weights; one weight an adapter is needed"),
        (["1"], "2 adapters and 1 weights"),
        ([""], "weights '': numbers with commas"),
        (["1,"], "numbers with commas"),
        (["1,x"], "weights '1,x': numbers with commas"),
        (["1,nan"], "weights: nan is no weight; finite numbers are needed"),
        (["1,-inf"], "-inf is no weight"),
        (["1,1", "1,1"], r"weights are given twice; one list with commas"),
        (["0:1"], r"2 adapters and 1 lines of layer:weight; one line an adapter"),
        (["0:1", "0:1", "0:1"], "2 adapters and 3 lines"),
        (["0:1", "0:1,5"], "weights '0:1,5': layer:weight pairs are needed"),
        (["0:1", "x:1"], "layer:weight pairs are needed"),
        (["0:1", "-1:1"], "weights '-1:1': layers count from 0"),
        (["0:1", "0:nan"], "nan is no weight"),
    ],
)
def test_weights_that_cannot_be_are_refused(given, text):
    with pytest.raises(OptionError, match=text):
        parsing.weights(given, 2)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"head": 1}', "'head' has 1; a list of 2 numbers is needed"),
        ('{"head": [1, "2"]}', "'head' has .*a list of 2 numbers"),
        ('{"head": [1, true]}', "a list of 2 numbers"),
        ('{"head": [1, 1, 1]}', r"w\.json: 'head': 2 adapters and 3 weights"),
        ('{"default": [1]}', r"w\.json: 'default': 2 adapters and 1 weights"),
        ('{"head": [1, NaN]}', "nan is no weight"),
        ('{"(": [1, 1]}', r"w\.json: not a regular expression: '\('"),
    ],
)
def test_a_file_of_weights_that_cannot_be_is_refused_by_pattern(tmp_path, content, text):
    (tmp_path / "w.json").write_text(content)
    with pytest.raises(OptionError, match=text):
        parsing.weights([str(tmp_path / "w.json")], 2)


def test_a_file_of_weights_that_is_none_is_refused(tmp_path):
    with pytest.raises(FileError, match="cannot be read"):
        parsing.weights([str(tmp_path / "w.json")], 2)
    (tmp_path / "w.json").write_text("[1, 1]")
    with pytest.raises(FileError, match="a JSON list; an object"):
        parsing.weights([str(tmp_path / "w.json")], 2)


# searches


def test_a_search_parses_grids_with_the_types_of_the_options():
    found = parsing.searches(["density=0.1,1", "seed=0,1", "coefficient=-1..2.5"], "dare", {})
    assert found == {
        "density": Grid((0.1, 1.0)),
        "seed": Grid((0, 1)),
        "coefficient": Interval(-1.0, 2.5),
    }
    assert [type(value) for value in found["seed"].values] == [int, int]
    assert parsing.searches(["inner=ties,dare"], "knots", {}) == {"inner": Grid(("ties", "dare"))}
    assert parsing.searches([], "ties", {}) == {}


def test_a_search_of_an_unknown_option_names_those_that_there_are():
    with pytest.raises(OptionError, match=r"unknown option of ties 'densty' \(did you mean 'density'\?\)"):
        parsing.searches(["densty=0.1"], "ties", {})


def test_a_search_of_an_unknown_method_is_refused():
    with pytest.raises(OptionError, match="did you mean 'ties'"):
        parsing.searches(["density=0.1"], "tise", {})


def test_a_search_without_values_is_refused():
    for text in ("coefficient", "coefficient=", "coefficient=1,,2", "coefficient=1,"):
        with pytest.raises(OptionError, match=r"NAME=VALUE,VALUE or coefficient=LOW\.\.HIGH is needed"):
            parsing.searches([text], "ties", {})


def test_a_search_of_truth_takes_true_and_false():
    assert parsing.searches(["normalize=true,false"], "fisher", {})["normalize"].values == (True, False)
    with pytest.raises(OptionError, match="normalize=yes"):
        parsing.searches(["normalize=yes"], "fisher", {})


def test_a_search_of_what_is_no_number_is_refused():
    for text in ("density=high", "coefficient=0.1..high", "coefficient=..", "coefficient=0..1..2"):
        with pytest.raises(OptionError, match=r"NAME=VALUE,VALUE or coefficient=LOW\.\.HIGH is needed"):
            parsing.searches([text], "ties", {})


def test_a_search_of_a_fraction_of_a_seed_is_refused():
    with pytest.raises(OptionError, match=r"seed=0\.5"):
        parsing.searches(["seed=0.5"], "dare", {})


def test_an_interval_of_another_option_is_refused():
    with pytest.raises(OptionError, match="can be searched for coefficient only"):
        parsing.searches(["density=0.1..0.5"], "ties", {})


def test_an_interval_from_high_to_low_is_refused():
    for text in ("coefficient=2..1", "coefficient=1..1", "coefficient=nan..1"):
        with pytest.raises(OptionError, match=rf"search .{re.escape(text)}.: the ends of an interval must be finite"):
            parsing.searches([text], "ties", {})


def test_an_interval_without_an_end_is_refused():
    with pytest.raises(OptionError):
        parsing.searches(["coefficient=0..inf"], "ties", {})


def test_a_coefficient_that_is_no_finite_number_is_refused():
    with pytest.raises(OptionError):
        parsing.searches(["coefficient=nan,1"], "ties", {})


def test_an_option_that_is_searched_twice_is_refused():
    with pytest.raises(OptionError, match="both set and searched"):
        parsing.searches(["density=0.1"], "ties", {"density": 0.2})
    with pytest.raises(OptionError, match="twice"):
        parsing.searches(["density=0.1", "density=0.2"], "ties", {})


def test_numbers_of_clusters_can_be_searched():
    values = parsing.searches(["clusters=2,4"], "lego", {})["clusters"].values
    assert [type(value) for value in values] == [int, int]
