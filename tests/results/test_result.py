import json
import math

import numpy as np
import pytest

from lora_lab.errors import FileError
from lora_lab.results.result import Result, columns, fingerprint, provenance
from lora_lab.results.stats import Sampled, interval, mean_and_spread, resampled_means


def test_a_result_comes_back_as_it_was(tmp_path):
    result = Result("demo", {"t": [0.0, 1.0], "name": ["a", None]}, {"points": 2}, {"barrier": 0.5}, {"examples": 3})
    assert Result.load(result.save(tmp_path / "r.json")) == result
    assert result.rows(name="a") == [{"t": 0.0, "name": "a"}]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    path = Result("demo", {"x": [math.nan, math.inf, np.float32(1.5)]}).save(tmp_path / "r.json")
    assert json.loads(path.read_text())["columns"]["x"] == [None, None, 1.5]
    assert "NaN" not in path.read_text()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{}", "not a result of lora-lab"),
        ('{"format": "lora-lab result 1"}', "damaged result"),
        (
            '{"format": "lora-lab result 1", "kind": "x", "columns": {"a": [1], "b": []}, "parameters": {}, '
            '"summary": {}, "provenance": {}}',
            "columns differ in length",
        ),
        ("[1]", "a JSON list"),
        ("", "empty"),
    ],
)
def test_what_is_no_result_is_refused_by_name(tmp_path, content, text):
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(FileError, match=text) as error:
        Result.load(path)
    assert "r.json" in str(error.value)


def test_provenance_knows_versions_and_inputs(tmp_path):
    (tmp_path / "in.txt").write_text("x")
    found = provenance(inputs=[tmp_path / "in.txt"], elapsed_s=1.23456, examples=7, seeds=[0])
    assert found["versions"]["torch"]
    assert found["versions"]["lora-lab"]
    assert found["inputs"][0]["path"] == "in.txt"
    assert (found["elapsed_s"], found["examples"], found["seeds"]) == (1.235, 7, [0])


def test_a_number_that_changes_in_a_result_is_noticed(tmp_path):
    path = Result("demo", {"x": [0.25, 1.0]}, {"é": 1e-300}, {"n": 3}).save(tmp_path / "r.json")
    text = path.read_text()
    for old, new in (("0.25", "0.35"), ("demo", "dema"), ('"n": 3', '"n": 4'), ("1e-300", "1e-301")):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(FileError, match=r"r\.json: a damaged result \(it does not agree with its own checksum\)"):
            Result.load(path)
    path.write_text(text)
    assert Result.load(path).columns == {"x": [0.25, 1.0]}


def test_names_that_are_no_text_come_back_from_a_result(tmp_path):
    odd = Result("demo", {"x": ["\udcff"]})
    assert Result.load(odd.save(tmp_path / "r.json")) == odd


def test_fingerprints_tell_content_apart_and_ignore_order_of_keys():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_columns_of_rows():
    assert columns([{"a": 1, "b": 2}, {"a": 3, "b": 4}]) == {"a": [1, 3], "b": [2, 4]}
    assert columns([]) == {}


def test_the_interval_of_a_mean_has_the_textbook_width():
    values = np.random.default_rng(0).normal(size=(1, 400))
    low, high = interval(resampled_means(values, seed=0)[0])
    half = 1.96 * values.std(ddof=1) / 20
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_differences_between_points_are_paired():
    noise = np.random.default_rng(0).normal(size=300)
    sampled = Sampled.of(np.stack([noise, noise + 0.01]), seed=0)
    value, low, high = sampled.estimate(lambda means: means[1] - means[0])
    assert (value, low, high) == pytest.approx((0.01, 0.01, 0.01))


def test_the_same_seed_gives_the_same_samples():
    values = np.random.default_rng(0).random((2, 50))
    assert (resampled_means(values, seed=1) == resampled_means(values, seed=1)).all()
    assert (resampled_means(values, seed=1) != resampled_means(values, seed=2)).any()


def test_mean_and_spread_over_seeds():
    assert mean_and_spread(np.array([1.0, 3.0])) == (2.0, pytest.approx(math.sqrt(2)))
    assert mean_and_spread(np.array([5.0])) == (5.0, 0.0)
