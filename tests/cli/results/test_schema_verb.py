"""`lora-lab schema`, and what verbs print as JSON beside it."""

import json

import pytest
from making_adapters import lora, write

from lora_lab.results import schema
from lora_lab.results.kinds.registry import KINDS
from lora_lab.results.reports import REPORTS


def test_the_verb_lists_all_kinds_and_tells_every_column_of_one(lora_lab):
    code, out, _ = lora_lab("schema")
    assert code == 0
    assert all(f"\n{name} " in out for name in KINDS)
    code, out, _ = lora_lab("schema", "stability")
    assert code == 0
    for name in ("adapters.epsilon", "worst_set", "adapters.inequality", "how much worse the worst keep-set is"):
        assert name in out
    assert "rows may have further columns: each metric with its interval" in " ".join(
        lora_lab("schema", "evaluate")[1].split()
    )
    code, _, err = lora_lab("schema", "shaply")
    assert code == 1
    assert "did you mean 'shapley'" in err


@pytest.mark.parametrize("name", ["shapley_type_layer", "minilm_rates_coto", "train_coto", "minilm_line_lora"])
def test_the_json_schema_holds_for_published_results(lora_lab, request, name):
    jsonschema = pytest.importorskip("jsonschema")
    path = request.config.rootpath / "figures" / "results" / f"{name}.json"
    result = json.loads(path.read_text())
    code, out, _ = lora_lab("schema", result["kind"], "--json")
    assert code == 0
    check = jsonschema.Draft202012Validator(json.loads(out))
    said = {"schema": 1, **result}
    assert not list(check.iter_errors(said))
    column = next(iter(result["columns"]))
    del said["columns"], result["columns"][column]
    assert [error.message for error in check.iter_errors(said)] == ["'columns' is a required property"]


def test_reports_of_verbs_on_adapters_have_the_columns_they_say(lora_lab, tmp_path):
    write(tmp_path / "a.safetensors", lora())
    write(tmp_path / "b.safetensors", lora())
    for verb, *arguments in (
        ("inspect", "a.safetensors"),
        ("merge", "a.safetensors", "b.safetensors", "-o", "m.safetensors"),
        ("prune", "a.safetensors", "--rank", 1, "-o", "p.safetensors"),
        ("convert", "a.safetensors", "--to", "mlx", "-o", "c"),
        ("record", "a.safetensors", "--method", "lora"),
    ):
        code, out, err = lora_lab(verb, *arguments, "--json")
        assert code == 0, err
        report = json.loads(out)
        said = schema.columns_of(REPORTS[verb])
        assert set(report) == set(said)
        listed = schema.documented(verb)
        assert {each["column"] for each in listed if each["table"] == "report"} == set(said)
        jsonschema = pytest.importorskip("jsonschema")
        jsonschema.validate(report, schema.json_schema(verb))
