"""`lora-lab.toml` in the current folder: as if the user had typed it, but for what must be typed."""

import json
import os
from pathlib import Path

import pytest
from making_adapters import lora, write

from lora_lab import tasks, training
from lora_lab.adapters.adapter import Adapter
from lora_lab.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("few_digits", "quick_figures")


def kept(text):
    Path("lora-lab.toml").write_text(text)


@pytest.fixture
def trained(lora_lab):
    """An adapter `a` that records no task."""
    adapter, _ = training.train(tasks.from_name("digits/relabel"), Recipe("lora", steps=2, batch_size=8))
    Adapter(adapter.tensors, adapter.config, adapter.sites, {}, "x").save(Path("a"))


def test_what_is_typed_wins_over_the_verbs_table_that_over_defaults_and_these_over_the_programs(lora_lab, trained):
    kept('task = "digits/relabel"\n[defaults]\nexamples = 20\nsamples = 4\n[stability]\nexamples = 30\nlatex = true\n')
    code, _, err = lora_lab("stability", "a", "-o", "first")
    assert code == 0, err
    taken, *_ = err.splitlines()
    assert taken == "from lora-lab.toml: --samples 4, --examples 30, --task digits/relabel, --latex True"
    result = json.loads(Path("first/stability.json").read_text())
    assert result["provenance"]["examples"] == 30
    assert result["provenance"]["folder_file"] == {
        "--examples": "30",
        "--samples": "4",
        "--latex": "True",
        "--task": "digits/relabel",
    }
    assert result["parameters"]["samples"] == 4
    assert Path("first/stability.tex").exists()
    code, _, err = lora_lab("stability", "a", "--examples", 12, "-o", "second")
    assert "--examples" not in err.splitlines()[0]
    assert json.loads(Path("second/stability.json").read_text())["provenance"]["examples"] == 12


def test_without_the_file_and_for_help_nothing_is_said(lora_lab):
    write(Path("a"), lora())
    code, _, err = lora_lab("inspect", "a")
    assert (code, err) == (0, "")
    kept("nonsense")
    code, out, err = lora_lab("inspect", "--help")
    assert (code, err) == (0, "")
    assert "Usage" in out


def test_what_is_written_down_as_a_fact_is_typed(lora_lab):
    write(Path("a"), lora())
    kept('task = "digits/relabel"\n[defaults]\nseed = 3\n')
    code, _, err = lora_lab("record", "a")
    assert (code, err) == (0, "")
    assert Adapter.load("a").record == {}


def test_lists_tables_and_switches_are_read_as_their_options_are(lora_lab):
    write(Path("a"), lora())
    write(Path("b"), lora(seed=1))
    kept('[merge]\nmethod = "ties"\nset = {density = 0.5}\nweights = [1, 2]\noutput = "m"\nrank = 2\n')
    code, out, err = lora_lab("merge", "a", "b")
    assert code == 0, err
    assert "density=0.5" in out
    record = Adapter.load("m").record
    assert record["merge"]["options"]["density"] == 0.5
    assert record["recipe"]["steps"] == [
        {"merge": {"adapters": ["a", "b"], "method": "ties", "rank": "2", "set": ["density=0.5"], "weights": ["1,2"]}}
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "unknown key in lora-lab.toml 'x'; there are: task, defaults, quickstart, train"),
        ("[stabilty]", "unknown key in lora-lab.toml 'stabilty' (did you mean 'stability'?)"),
        ("stability = 1", "lora-lab.toml: stability is 1; a table [stability] with options is needed"),
        ("[record]\nseed = 1", "unknown key in lora-lab.toml 'record'"),
        (
            "[stability]\nsmples = 3",
            "unknown option in [stability] of lora-lab.toml 'smples' (did you mean 'samples'?)",
        ),
        ("[defaults]\nsmples = 3", "unknown option in [defaults] of lora-lab.toml 'smples' (did you mean 'samples'?)"),
        ("[stability]\nadapters = ['a']", "unknown option in [stability] of lora-lab.toml 'adapters'"),
        ('[stability]\nsamples = "a"', "lora-lab.toml: [stability] samples is 'a'; a whole number is needed"),
        ("[stability]\nsamples = true", "lora-lab.toml: [stability] samples is True; a whole number is needed"),
        ("[stability]\nsamples = 2.5", "lora-lab.toml: [stability] samples is 2.5; a whole number is needed"),
        ("[defaults]\nlatex = 1", "lora-lab.toml: [defaults] latex is 1; true or false is needed"),
        ("[stability]\nsplit = true", "lora-lab.toml: [stability] split has True; a text, a number or a list"),
        (
            '[stability]\nsplit = "tset"',
            "lora-lab.toml: [stability] split: unknown split 'tset' (did you mean 'test'?)",
        ),
        ("[stability]\nsamples = 0", "lora-lab.toml: [stability] samples: --samples is 0; it must be at least 2"),
        ("[stability", "lora-lab.toml: not a TOML file"),
        ('task = "none.toml"', "none.toml: no such task file"),
    ],
)
def test_what_cannot_be_is_named_with_file_key_and_what_is_allowed(lora_lab, text, message):
    write(Path("a"), lora())
    kept(text)
    code, out, err = lora_lab("stability", "a")
    assert (code, out) == (1, "")
    (line,) = [line for line in err.splitlines() if not line.startswith("from lora-lab.toml")]
    assert line.startswith(f"error: {message}")
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["force", "yes", "trust-record", "trust_record", "ray"])
@pytest.mark.parametrize("section", ["defaults", "stability"])
def test_what_only_the_user_can_allow_must_be_typed(lora_lab, section, name):
    kept(f"[{section}]\n{name} = true\n")
    code, out, err = lora_lab("stability", "a")
    typed = "--" + name.replace("_", "-")
    assert (code, out) == (1, "")
    assert err == f"error: lora-lab.toml: [{section}] {name} is never taken from a file; type {typed}\n"


@pytest.mark.parametrize("text", ['task = "{}"', '[defaults]\ntask = "{}"', '[stability]\ntask = ["{}"]'])
def test_a_task_in_python_and_one_that_asks_for_code_must_be_typed(lora_lab, text):
    Path("mine.py").write_text("open('ran', 'w')\n")
    Path("base.toml").write_text('kind = "causal-lm"\nbase = "x"\ndata = "y"\ntext = "t"\ntrust_remote_code = true\n')
    for name in ("mine.py", "mine.py:task", "base.toml"):
        kept(text.format(name))
        code, _, err = lora_lab("stability", "a")
        assert code == 1
        assert err.count("\n") == 1
        assert err.endswith(f"it runs only where you type it: --task {name}\n")
    assert not Path("ran").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_pipe_keeps_nobody_waiting(lora_lab):
    os.mkfifo("lora-lab.toml")
    code, _, err = lora_lab("stability", "a")
    assert (code, err) == (1, "error: lora-lab.toml: neither a file nor a folder\n")
