"""`lora-lab record`, and names and groups that the command line gives."""

import json

import pytest
from making_adapters import lora, write

from lora_lab.adapters.adapter import Adapter

pytestmark = pytest.mark.usefixtures("few_digits", "quick_figures")


def test_facts_are_put_in_afterwards_and_shown(lora_lab, tmp_path):
    write(tmp_path / "a", lora("layers.0.q_proj"))
    code, out, err = lora_lab("record", "a", "--task", "digits/relabel", "--method", "mine", "--seed", 3)
    assert code == 0, err
    assert "digits/relabel" in out
    assert Adapter.load(tmp_path / "a").record == {"task": {"name": "digits/relabel"}, "method": "mine", "seed": 3}
    code, out, _ = lora_lab("record", "a", "--json")
    assert json.loads(out)["record"]["method"] == "mine"
    for options, message in (
        (["a", "--task", "digits/none"], "unknown task"),
        (["b", "--seed", 1], "b: no such file or folder"),
        (["a", "--seed", -1], "at least 0"),
    ):
        code, out, err = lora_lab("record", *options)
        assert code
        assert not out
        assert message in err
        assert len(err.splitlines()) == 1


def test_labels_and_groups_of_the_command_line_are_in_tables_and_results(lora_lab, tmp_path, few_digits):
    from lora_lab import tasks, training
    from lora_lab.training.recipe import Recipe

    for name, seed in (("plain-0", 0), ("plain-1", 1), ("other", 2)):
        adapter, _ = training.train(tasks.from_name("digits/relabel"), Recipe("lora", seed=seed, steps=2, batch_size=8))
        record = {key: value for key, value in adapter.record.items() if key != "method"}
        Adapter(adapter.tensors, adapter.config, adapter.sites, record, "x", adapter.origin).save(tmp_path / name)
    names = ["plain-0", "plain-1", "other"]
    given = ["--task", "digits/relabel", "--examples", 12, "--json"]
    code, out, err = lora_lab("sweep", *names, *given, "--rank", "--group", "lora=plain*")
    assert code == 0, err
    methods = json.loads(out)["columns"]["method"]
    assert set(methods) == {"lora", "other"}
    labelled = ["--label", "first", "--label", "second", "--label", "third"]
    code, out, err = lora_lab("evaluate", *names, "--task", "digits/relabel", *labelled)
    assert code == 0, err
    assert all(label in out for label in ("first", "second", "third"))
    code, out, err = lora_lab("evaluate", *names, "--label", "first", "--force")
    assert (code, out) == (1, "")
    assert err == "error: 3 adapters and 1 labels; one label an adapter is needed\n"
