"""One nasty name through every command, to every place where names go."""

import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from making_adapters import lora, random_adapter, write
from peft import LoraConfig
from safetensors.torch import save_file

from lora_lab import escape, plots, tasks
from lora_lab.adapters.adapter import Adapter
from lora_lab.files.trust import Origin
from lora_lab.results.result import Result

NASTY = "_p$\\frac$q\x1b[31m[red]:bomb:\u202e\x9b#%&{}^~|`<b>\nerror: x"
ENDINGS = ("json", "pdf", "png")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two adapters of the digits whose files and records are called nastily."""
    folder = tmp_path_factory.mktemp("nasty")
    task = tasks.from_name("digits/mod3")
    config = LoraConfig(r=2, target_modules=["q_proj"])
    for i in range(2):
        adapter = random_adapter(task, folder / f"peft{i}", config, seed=i, scale=0.1)
        record = {"task": task.record, "method": NASTY, "seed": i}
        replace(adapter, record=record).save(folder / f"{i}{NASTY}.safetensors")
        replace(adapter, record=record).save(folder / f"{NASTY}{i}.safetensors")
        replace(adapter, record=record).save(folder / f"run{NASTY}{i}" / "checkpoint-5")
    return folder


VERBS = {
    "inspect": ["--json"],
    "evaluate": ["--no-base"],
    "interpolate": ["--points", "2", "--ratios", "1:1"],
    "plane": ["--base", "--points", "2"],
    "curve": ["--shapes", "bezier", "--spaces", "delta", "--points", "3", "--steps", "1", "--checks", "1"],
    "sharpness": ["--examples", "8", "--iterations", "2", "--probes", "2"],
    "stability": ["--samples", "2", "--examples", "20", "--yes"],
    "shapley": ["--samples", "1", "--examples", "20", "--yes"],
    "sweep": ["--structured", "--draws", "1", "--examples", "20", "--yes"],
    "compare-merges": ["--methods", "average,ties", "--coefficients", "0.5,1", "--ratios", "1:1", "--latex", "--yes"],
    "merge": ["-o", "m"],
    "prune": ["--keep", "every-other", "-o", "p"],
    "convert": ["--dtype", "bf16", "-o", f"c{NASTY}"],
    "checkpoints": ["--spaces", "delta", "--examples", "20", "--yes"],
    "record": ["--seed", "3"],
    "compare": ["--signs", "--csv", "--figure"],
}
ONE = ("inspect", "prune", "convert")
UNNAMED = ("curve", "sharpness", "compare-merges", "merge", "prune", "sweep")
"""Verbs whose tables name no adapter, or in a heading that is wrapped among others."""


def clean(text):
    """No control character but line breaks, and no line that a name has begun."""
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text), text
    assert not any(line.startswith("error: x") for line in text.split("\n"))


@pytest.mark.parametrize("verb", VERBS)
def test_a_nasty_name_is_shown_and_does_nothing(lora_lab, made, tmp_path, verb):
    begin, end = ("run", "") if verb == "checkpoints" else ("", ".safetensors")
    names = [f"{begin}{NASTY}{i}{end}" for i in range(1 if verb in ONE else 2)]
    for name in names:
        (shutil.copytree if verb == "checkpoints" else shutil.copy)(made / name, name)
    code, out, err = lora_lab(verb, *names, *VERBS[verb])
    assert code == 0, err
    clean(out)
    clean(err)
    if verb == "inspect":
        assert json.loads(out)["path"] == names[0]
        code, out, err = lora_lab(verb, *names)
        clean(out)
    shown = re.sub(r"\s", "", out)  # cells are wrapped
    assert r"_p$\frac$q\x1b[31m[red]:bomb:\u202e\x9b#%&{}^~|`<b>\nerror:x" in shown or verb in UNNAMED
    for ending in ENDINGS if (tmp_path / "out").exists() else ():
        assert (tmp_path / "out" / f"{verb}.{ending}").stat().st_size > 500
    if verb == "compare-merges":
        table = (tmp_path / "out" / "compare-merges.tex").read_text()
        clean(table)
        assert r"{\_p\$\textbackslash{}frac\$q\textbackslash{}x1b[31m" in table
        assert r"\#\%\&\{\}\textasciicircum{}\textasciitilde{}|`<b>" in table


MODULE = "m$[red]:bomb:#%&{}^~|`<b>"  # control characters in names of an adapter's tensors are refused


@pytest.fixture
def checkpoints(tmp_path):
    """A base and one tuned of it, and an adapter: files, tensors, modules, records and configuration have the name."""
    generator = torch.Generator().manual_seed(0)
    names = [f"{MODULE}.{i}.weight" for i in range(2)]
    base = {name: torch.randn(4, 6, generator=generator) for name in (*names, f"n{NASTY}.weight", f"n{NASTY}.bias")}
    tuned = {name: tensor + torch.randn(tensor.shape[0], 1, generator=generator) for name, tensor in base.items()}
    for folder, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / f"{folder}{NASTY}").mkdir()
        save_file(tensors, tmp_path / f"{folder}{NASTY}" / "model.safetensors")
    adapter = write(tmp_path / f"a{NASTY}", lora(f"{MODULE}.0", rows=4, columns=6), base_model_name_or_path=NASTY)
    record = {"method": NASTY, NASTY: {NASTY: NASTY}}
    replace(Adapter.load(adapter), record=record, origin=Origin(own=True)).save(tmp_path / f"{NASTY}.safetensors")
    return f"base{NASTY}", f"tuned{NASTY}", f"{NASTY}.safetensors"


def shown_somewhere(text):
    return r"\x1b[31m[red]:bomb:\u202e\x9b#%&{}^~|`<b>\nerror:x" in re.sub(r"\s", "", text)


def quietly(result, code=0):
    clean(result[1])
    clean(result[2])
    assert result[0] == code, result
    return result


def test_nasty_tensors_and_modules_of_checkpoints_do_nothing(lora_lab, checkpoints):
    base, tuned, adapter = checkpoints
    for more in ([], ["--json", "--force"]):
        _, out, _ = quietly(lora_lab("fuse", base, adapter, "-o", f"f{NASTY}", *more))
        assert shown_somewhere(out) or more
        assert not more or json.loads(out)["files"]
        _, out, _ = quietly(lora_lab("extract", base, tuned, "--rank", "1", "-o", f"x{NASTY}", "--keep-whole", *more))
        assert shown_somewhere(out) or more
    for more in ([], ["--json"]):
        quietly(lora_lab("verify", base, adapter, f"f{NASTY}", *more))
        _, out, _ = quietly(lora_lab("verify", base, adapter, tuned, *more), 1)
        assert shown_somewhere(out) or more
    _, out, _ = quietly(lora_lab("prune", adapter, "--rank", "1", "--in-place"))
    assert shown_somewhere(out)
    for fault in (
        ("fuse", adapter, adapter, "-o", "y"),
        ("fuse", base, adapter, "-o", f"f{NASTY}"),
        ("extract", base, adapter, "--rank", "1", "-o", "y"),
        ("verify", base, adapter, f"nowhere{NASTY}"),
        ("run", f"nowhere{NASTY}"),
        ("convert", adapter, "--to", NASTY, "-o", "y"),
        ("compare", f"a{NASTY}", base),
    ):
        code, out, err = lora_lab(*fault)
        clean(err)
        assert (code, out) == (1, ""), fault
        assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1, err


def test_a_nasty_recipe_does_nothing(lora_lab, checkpoints):
    base, tuned, adapter = checkpoints
    steps = [
        {"convert": {"adapter": adapter, "dtype": "bf16", "output": f"c{NASTY}"}},
        {"extract": {"base": base, "tuned": tuned, "rank": 1, "output": f"x{NASTY}"}},
        {"fuse": {"base": base, "adapters": f"c{NASTY}", "output": f"f{NASTY}"}},
    ]
    name = f"r{NASTY}.yaml"
    Path(name).write_text(json.dumps({"steps": steps}))
    for more in (["--dry-run"], [], ["--json"]):
        _, out, _ = quietly(lora_lab("run", name, *more))
        assert "[red]:bomb:" in out
    for content in ({NASTY: 1}, {"steps": [{NASTY: {}}]}, {"steps": [{"prune": {NASTY: 1, "output": NASTY}}]}):
        Path(name).write_text(json.dumps(content))
        code, out, err = lora_lab("run", name)
        clean(err)
        assert (code, out) == (1, "")
        assert err.count("\n") == 1
    Path(name).write_text(f"steps: [{NASTY}")
    code, out, err = lora_lab("run", name)
    clean(err)
    assert (code, err.count("\n")) == (1, 1)


def test_errors_and_notes_show_a_nasty_name_on_one_line(lora_lab, made):
    shutil.copytree(made / "peft0", NASTY)
    code, out, err = lora_lab("evaluate", NASTY)
    assert (code, out) == (1, "")
    clean(err)
    assert r"error: _p$\frac$q\x1b[31m[red]:bomb:\u202e\x9b#%&{}^~|`<b>\nerror: x: carries no record" in err
    assert err.count("\n") == err.endswith("\n") + err.startswith("\n")


def test_a_file_name_that_is_no_text_is_shown(lora_lab, made):
    name = b"\xff\xfe.safetensors".decode(errors="surrogateescape")
    shutil.copy(made / f"{NASTY}0.safetensors", name)
    code, out, err = lora_lab("inspect", name)
    assert (code, out) == (1, "")
    assert err.startswith(r"error: \udcff\udcfe.safetensors: ")


# LaTeX


def unlatexed(text):
    """What LaTeX shows of escaped text."""
    for command, sign in (("backslash", "\\"), ("asciitilde", "~"), ("asciicircum", "^")):
        text = text.replace(rf"\text{command}{{}}", f"\0{sign}")
    assert not re.search(r"(?<![\\\0])[#$%&~_^{}\\](?![#$%&_{}])", text), text
    return re.sub(r"\\([#$%&_{}])", r"\1", text).replace("\0", "")


@given(st.text(st.characters(categories=("L", "N", "P", "S", "Zs"))))
def test_latex_shows_what_was_given(text):
    assert unlatexed(escape.latex(text)) == text


def test_latex_escapes_all_ten():
    assert escape.latex(r"\~^#$%&_{}") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}\#\$\%\&\_\{\}"


# Model cards


def test_a_model_card_of_nasty_names_is_sound(lora_lab, made, tmp_path):
    names = [f"{NASTY}{i}.safetensors" for i in range(2)]
    base = "x: [y]\n---\n# own heading"
    for name in names:
        adapter = Adapter.load(made / name)
        adapter.config["base_model_name_or_path"] = base
        adapter.save(name)
    assert lora_lab("merge", *names, "-o", "m")[0] == 0
    card = (tmp_path / "m" / "README.md").read_text()
    _, front, body = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    found = yaml.safe_load(front)
    assert found == {"library_name": "peft", "base_model": base, "tags": ["lora", "merge", "lora-lab"]}
    clean(body)
    assert [line for line in body.splitlines() if line.startswith("#")] == ["# A merge by task-arithmetic"]
    entries = [line for line in body.splitlines() if line.startswith("* ")]
    assert len(entries) == 2
    for entry in entries:
        assert "<" not in entry
        assert not re.search(r"(?<!\\)[`|$]", entry)


def test_the_card_of_a_plain_merge_is_as_plain(lora_lab, made, tmp_path):
    for i in range(2):
        shutil.copytree(made / f"peft{i}", f"a{i}")
    assert lora_lab("merge", "a0", "a1", "-o", "m")[0] == 0
    card = (tmp_path / "m" / "README.md").read_text()
    assert "tags: [lora, merge, lora-lab]\n" in card
    assert re.search(r"^\* a0, sha256 [0-9a-f]{16}$", card, re.MULTILINE)


# Figures


def test_a_figure_draws_a_name_as_it_is():
    columns = {
        "adapter": [NASTY] * 2,
        "method": [None] * 2,
        "members": [[NASTY, "b"]] * 2,
        "indices": [[0, 1]] * 2,
        "t": [0.0, 1.0],
        "ratio": [None] * 2,
        "space": ["delta"] * 2,
    }
    for name in ("accuracy", "loss", "norm"):
        columns |= {name: [1.0, 2.0], f"{name}_low": [1.0, 2.0], f"{name}_high": [1.0, 2.0]}
    columns["method"] = [NASTY] * 2
    parameters = {"task": {"name": NASTY}, "split": "test", "points": 2, "spaces": ["delta"], "adapters": [{}, {}]}
    parameters["metrics"] = {name: {"about": name, "unit": "", "higher": True} for name in ("accuracy", "loss")}
    made = plots.figure([Result("interpolate", columns, parameters, {}, {"examples": 3})])
    titles = [ax.get_title() for ax in made.axes]
    assert titles[0].startswith(r" _p\$\frac")
    made.savefig(io.BytesIO(), format="svg")  # a formula would not parse
    for title in filter(None, titles):
        text = made.axes[0].title
        text.set_text(title)
        assert text._preprocess_math(title)[1] is False


def test_what_is_drawn_is_no_formula_and_not_hidden():
    assert escape.drawn({"_a$": ["$x$", 1, None, "_y"]}) == {r" _a\$": [r"\$x\$", 1, None, " _y"]}


# File names


@given(st.text())
def test_a_file_name_is_one(text):
    name = escape.file_name(text)
    assert 1 <= len(name) <= 100
    assert not set(name) & set('/\\:*?"<>|\0\n')
    assert name not in (".", "..")
    assert not name.startswith(".")


def test_labels_that_give_one_file_name_give_several(made):
    from types import SimpleNamespace

    from lora_lab.merging.merged import _file_names

    adapters = [SimpleNamespace(label=label, source=label) for label in ("a b", "a_b", "A_b")]
    assert _file_names(adapters) == ["a_b-0", "a_b-1", "A_b-2"]
    adapters = [SimpleNamespace(label=label, source=label) for label in ("..", "c")]
    assert _file_names(adapters) == ["adapter", "c"]


# What others print


def test_what_libraries_print_is_escaped_but_for_colours(capsys):
    from lora_lab.cli.terminal import escaping

    before = sys.stderr
    with escaping():
        print("a\x1b[1mb\x1b[0m\x1b[2J\x1b]0;title\x07\u202e\r", file=sys.stderr)
    assert sys.stderr is before
    assert capsys.readouterr().err == "a\x1b[1mb\x1b[0m\\x1b[2J\\x1b]0;title\\x07\\u202e\r\n"


@given(st.text())
def test_what_is_visible_has_no_control_character(text):
    shown = escape.visible(text)
    clean(shown.replace("\n", "x"))
    assert "\n" not in shown
    shown.encode()  # no lone surrogate


@given(st.recursive(st.none() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_visible_json_holds_the_same(value):
    text = escape.visible_json(json.dumps(value, ensure_ascii=False, indent=1))
    clean(text)
    assert json.loads(text) == value
