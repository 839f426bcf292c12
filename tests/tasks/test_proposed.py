"""What is proposed for an adapter that records no task: a file of the kind that its base model is for."""

import json
import tomllib

import pytest
from making_adapters import lora, write

from lora_lab import tasks
from lora_lab.adapters.adapter import Adapter
from lora_lab.errors import MismatchError
from lora_lab.tasks.choosing import task_of
from lora_lab.tasks.proposed import kinds_for, task_file_for


def adapter(folder, **config):
    return Adapter.load(write(folder / "a", lora(), **config))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"task_type": "SEQ_CLS"}, "text-classification"),
        ({"task_type": "CAUSAL_LM"}, "causal-lm"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "seq2seq"),
        (
            {"task_type": None, "auto_mapping": {"base_model_class": "BertForSequenceClassification"}},
            "text-classification",
        ),
        ({"auto_mapping": {"base_model_class": "ViTForImageClassification"}}, "image-classification"),
        ({"auto_mapping": {"base_model_class": "CLIPModel"}}, "clip"),
        ({"auto_mapping": {"base_model_class": "GPT2LMHeadModel"}}, "causal-lm"),
    ],
)
def test_the_kind_follows_what_peft_was_told(tmp_path, config, kind):
    named = adapter(tmp_path, base_model_name_or_path="org/model", **config)
    assert kinds_for(named)[0] == kind
    content = tomllib.loads(task_file_for(named))
    assert (content["kind"], content["base"]) == (kind, "org/model")
    assert 3 <= len(content) <= 6
    assert content.keys() == tomllib.loads(tasks.example(kind)).keys()


def test_the_kind_follows_the_cached_configuration_of_the_base_where_nothing_else_says(tmp_path, monkeypatch):
    cached = tmp_path / "cache" / "models--org--model"
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots/abc/config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert kinds_for(adapter(tmp_path, base_model_name_or_path="org/model"))[0] == "causal-lm"
    assert kinds_for(adapter(tmp_path, base_model_name_or_path="org/other")) == []


def test_a_folder_that_a_download_names_is_not_read_unless_it_lies_within(tmp_path):
    config = json.dumps({"architectures": ["LlamaForCausalLM"]})
    for place in (tmp_path / "elsewhere", tmp_path / "a" / "base"):
        place.mkdir(parents=True)
        (place / "config.json").write_text(config)
    assert kinds_for(adapter(tmp_path, base_model_name_or_path=str(tmp_path / "elsewhere"))) == []
    assert kinds_for(adapter(tmp_path, base_model_name_or_path="../elsewhere")) == []
    assert kinds_for(adapter(tmp_path, base_model_name_or_path="base"))[0] == "causal-lm"


def test_the_error_of_a_missing_task_has_the_file_and_other_kinds_that_fit(tmp_path):
    named = adapter(tmp_path, base_model_name_or_path="org/model", task_type="CAUSAL_LM")
    with pytest.raises(MismatchError) as caught:
        task_of(named)
    text = str(caught.value)
    assert 'such as: kind = "causal-lm" / base = "org/model" / data = "texts.jsonl" / text = "text" (one a line' in text
    assert "multiple-choice" in text
    assert "\n" not in text


def test_a_kind_that_another_package_brings_is_proposed_by_one_field(tmp_path, monkeypatch):
    entry = tasks.KINDS["causal-lm"]
    made = type(entry)(entry.build, 'kind = "mine"\nbase = "x"\ndata = "y"\n', fits=("ForMine",))
    monkeypatch.setitem(tasks.KINDS.entries, "mine", made)
    named = adapter(tmp_path, auto_mapping={"base_model_class": "LlamaForMine"})
    assert kinds_for(named) == ["mine"]
    assert task_file_for(named) == 'kind = "mine"\nbase = "x"\ndata = "y"\n'


def test_the_file_is_printed_for_an_adapter(lora_lab, tmp_path):
    adapter(tmp_path, base_model_name_or_path="org/model", task_type="CAUSAL_LM")
    code, out, err = lora_lab("tasks", "--for", tmp_path / "a")
    assert (code, err) == (0, "")
    assert out == 'kind = "causal-lm"\nbase = "org/model"\ndata = "texts.jsonl"\ntext = "text"\n'
    code, out, _ = lora_lab("tasks", "--for", tmp_path / "a", "--example", "multiple-choice")
    assert 'kind = "multiple-choice"\nbase = "org/model"\n' in out
    code, out, err = lora_lab("tasks", "--for", tmp_path / "b")
    assert (code, out) == (1, "")
