"""Every result fits the schema of its kind, and what does not is told in one line."""

import dataclasses
import json
import typing
from pathlib import Path

import pytest

from lora_lab.errors import FileError, OptionError
from lora_lab.results import schema
from lora_lab.results.kinds.registry import KINDS
from lora_lab.results.result import Result, _checksum
from lora_lab.results.rows import Adapted
from lora_lab.results.schema import Kind, Paper, column

PUBLISHED = sorted((Path(__file__).parents[2] / "figures" / "results").glob("*.json"))
TRAINED = {"step": [0, 1], "p": [1.0, 1], "mask": [None, None], "loss": [2.0, None], "learning_rate": [0.0, 0.1]}


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_every_published_result_fits_its_schema_and_says_no_more(path):
    result = Result.load(path)
    assert schema.why_not(result.kind, result.schema, result.columns, result.summary) is None
    said = KINDS[result.kind]
    assert set(result.summary) <= set(said.tables) | set(said.summary)


def test_all_kinds_of_the_paper_are_among_the_published():
    assert {Result.load(path).kind for path in PUBLISHED} == set(KINDS) - {
        "checkpoints",
        "curve",
        "evaluate",
        "layerwise",
        "plane",
    }


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_every_column_is_documented_with_json_types(kind):
    for name, row in kind.tables.items():
        assert row.__doc__, row
        for each in schema.columns_of(row).values():
            assert each.meaning, (name, each.name)
            assert each.type_names
    known = schema.columns_of(kind.tables[kind.paper.table])
    assert set(kind.paper.columns) | set(kind.paper.index) <= set(known)
    assert {*kind.open, *kind.optional} <= set(kind.tables)


def test_a_result_carries_its_version_and_one_of_before_is_of_the_first(tmp_path):
    path = Result("train", TRAINED).save(tmp_path / "r.json")
    content = json.loads(path.read_text())
    assert content["schema"] == KINDS["train"].version == 1
    del content["schema"], content["sha256"]
    path.write_text(json.dumps(content))
    assert Result.load(path).schema == 1


def changed(path, **more):
    """The file with other content, its checksum made anew."""
    content = json.loads(path.read_text()) | more
    content.pop("sha256")
    path.write_text(json.dumps(content | {"sha256": _checksum(content)}))
    return path


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"p": None}, "table rows of kind train: without column p"),
        ({"loss": ["x", 1.0]}, "column loss holds a str, not number or null"),
        ({"step": [0.5, 1]}, "column step holds a float, not integer"),
        ({"lr": [0, 1]}, "with column lr, which its schema does not have"),
    ],
)
def test_what_does_not_fit_is_a_damaged_result_and_is_not_written(tmp_path, columns, text):
    wrong = {name: values for name, values in (TRAINED | columns).items() if values is not None}
    path = changed(Result("train", TRAINED).save(tmp_path / "r.json"), columns=wrong)
    with pytest.raises(FileError, match=f"r.json: a damaged result .*{text}") as error:
        Result.load(path)
    assert "\n" not in str(error.value)
    with pytest.raises(OptionError, match=f"new.json: not written .*{text}"):
        Result("train", wrong).save(tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


def test_a_newer_version_may_know_more_but_not_less(tmp_path):
    path = Result("train", TRAINED).save(tmp_path / "r.json")
    newer = Result.load(changed(path, schema=2, columns=TRAINED | {"lr": [0, 1]}))
    assert newer.schema == 2
    assert Result.load(newer.save(tmp_path / "again.json")) == newer
    less = {name: values for name, values in TRAINED.items() if name != "mask"}
    with pytest.raises(FileError, match="without column mask; schema 2, this lora-lab knows 1"):
        Result.load(changed(path, columns=less))
    for version in (0, "1", True, None):
        with pytest.raises(FileError, match="its schema is no version number"):
            Result.load(changed(path, schema=version))


def test_tables_of_the_summary_and_those_within_them_are_looked_at():
    result = Result.load(next(path for path in PUBLISHED if path.stem == "stability"))
    kind, version, columns, summary = result.kind, result.schema, result.columns, result.summary
    without = {name: rows for name, rows in summary.items() if name != "by_method"}
    assert schema.why_not(kind, version, columns, without) == "table by_method of kind stability: it is not there"
    for wrong, reason in (
        ({"epsilon": [{"family": "p"}]}, "epsilon: without column metric, value, low"),
        ({"epsilon": 3}, "epsilon: no list of rows"),
        ({"keep_sets": "low"}, "column keep_sets holds a str, not integer"),
    ):
        rows = [{**row, **wrong} for row in summary["adapters"]]
        assert reason in schema.why_not(kind, version, columns, {**summary, "adapters": rows})


def test_a_kind_without_a_schema_is_taken_as_it_is(tmp_path):
    result = Result("third party", {"x": [1, "a"]})
    assert Result.load(result.save(tmp_path / "r.json")) == result
    assert result.schema == 1


def test_results_of_an_older_version_are_not_measured_by_the_present_one(monkeypatch):
    @dataclasses.dataclass
    class Row(Adapted):
        new: float = column("what came with version 2")

    monkeypatch.setitem(KINDS, "demo", Kind("demo", "a demo", {"rows": Row}, Paper(("new",)), version=2))
    assert schema.why_not("demo", 1, {"adapter": ["a"]}, {}) is None
    assert "without column new" in schema.why_not("demo", 2, {"adapter": ["a"], "method": [None], "seed": [0]}, {})
    assert Result("demo", {}).schema == 2


def test_a_number_may_be_null_and_a_whole_one_stands_for_a_fraction():
    hints = typing.get_type_hints(Adapted)
    assert hints["seed"] == int | str | None
    known = schema.columns_of(KINDS["train"].tables["rows"])
    assert known["loss"].type_names == "number or null"
    assert known["step"].type_names == "integer"
    assert known["mask"].type_names == "string or null"
