"""The program around its verbs: version, completion, help in panels, and the doctor."""

import json
import re
import shlex
from importlib import metadata
from pathlib import Path

import pytest

from lora_lab import cli, diagnosis
from lora_lab.cli.verbs import VERBS, command_of, function_of
from lora_lab.diagnosis import Check
from lora_lab.results.reports import REPORTS
from lora_lab.results.schema import columns_of


def test_the_version_is_printed(lora_lab):
    assert lora_lab("--version") == (0, f"lora-lab {metadata.version('lora-lab')}\n", "")


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("lora-lab figu", "figure"), ("lora-lab figure --wid", "--width"), ("lora-lab --vers", "--version")],
)
def test_a_shell_completes_verbs_and_options(monkeypatch, lora_lab, typed, completed):
    monkeypatch.setenv("_LORA_LAB_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    monkeypatch.setattr("sys.argv", ["lora-lab"])
    _, out, _ = lora_lab()
    assert out.split() == [completed]


def test_options_stand_in_panels(lora_lab):
    _, out, _ = lora_lab("shapley", "--help")
    panels = [line.split()[1] for line in out.splitlines() if line.startswith("╭─")]
    assert panels[:2] == ["Arguments", "Options"]
    assert sorted(panels[2:]) == ["Adapters", "Computing", "Output", "Task"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_what_comes_out_then_shows_an_example(lora_lab, verb):
    code, out, _ = lora_lab(verb, "--help")
    assert code == 0
    about = out.partition("╭─")[0]
    text, _, example = about.partition("Example:")
    assert len(text.split()) > 8
    assert example.split()[:2] == ["lora-lab", verb]


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_of_a_help_are_commands_that_the_program_takes(verb):
    told = function_of(verb).__doc__
    examples = re.findall(r"Example:\s+(lora-lab .*?)(?:\n\n|\Z)", told, flags=re.DOTALL)
    assert examples
    for example in examples:
        cli.check(shlex.split(example.partition(" > ")[0])[1:])  # OptionError names what is wrong


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_what_an_update_is_and_names_no_folder_of_this_machine(lora_lab, verb):
    _, out, _ = lora_lab(verb, "--help")
    assert str(Path(diagnosis.__file__).parent) not in re.sub(r"[\s│]", "", out)
    if "ΔW" in out:
        about = " ".join(out.partition("╭─")[0].split())
        assert re.search(
            r"adds ΔW|ΔW is what|is its ΔW|ΔW \(what|ΔW = BA( is what|, which) an adapter|updates? ΔW", about
        )


@pytest.mark.parametrize("name", ["examples", "jobs", "ray"])
def test_options_that_verbs_share_tell_their_default(name):
    found = []
    for verb in VERBS:
        function = function_of(verb)
        option = command_of(function).__signature__.parameters.get(name)
        if option is not None and option.default is None:
            found.append(option.annotation.__metadata__[0].help)
    assert found
    assert all("default" in text for text in found), found


def test_the_doctor_ends_with_1_only_where_something_is_broken(lora_lab, monkeypatch):
    told = [Check("package", "peft", "right", "0.21", ">=0.21"), Check("extra ray", "ray", "missing", "", ">=2")]
    monkeypatch.setattr(diagnosis, "checks", lambda: iter(told))
    code, out, err = lora_lab("doctor")
    assert (code, err) == (0, "")
    assert "not installed" in out
    assert out.endswith("nothing is broken\n")
    told.append(Check("package", "torch", "broken", "", ">=2.6"))
    code, out, _ = lora_lab("doctor")
    assert code == 1
    assert out.endswith("broken: torch\n")
    code, out, _ = lora_lab("doctor", "--json")
    assert code == 1
    report = json.loads(out)
    assert set(report) == set(columns_of(REPORTS["doctor"]))
    assert report["ok"] is False
    assert set(report["checks"][0]) == set(columns_of(columns_of(REPORTS["doctor"])["checks"].rows))


def test_a_needed_package_that_is_missing_is_named_in_a_line(lora_lab, monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'matplotlib.pyplot'", name="matplotlib.pyplot")

    monkeypatch.setattr(diagnosis, "checks", missing)
    code, out, err = lora_lab("doctor")
    assert (code, out) == (1, "")
    assert err == (
        "error: matplotlib is needed for this and not installed; `lora-lab doctor` tells all that is missing\n"
    )
