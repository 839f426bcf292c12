"""Recipes: steps that are checked before any is run, run when something has changed, and left alone otherwise."""

import json
import time
from dataclasses import replace

import pytest
import torch
import yaml
from making_adapters import lora, random_adapter, write
from peft import LoraConfig
from safetensors.torch import save_file
from tiny_models import write_bert

from lora_lab import tasks
from lora_lab.adapters.adapter import Adapter
from lora_lab.cli.studies import recipes
from lora_lab.cli.studies import run as verb
from lora_lab.files.trust import Origin

STEPS = """
steps:
  - merge:
      adapters: [a, b]
      method: ties
      set: {density: 0.5}
      weights: [1, 0.5]
      output: merged
  - prune: {adapter: merged, rank: 2, uniform_rank: true, output: small.safetensors}
"""


@pytest.fixture
def recipe(tmp_path):
    for seed, name in enumerate("ab"):
        write(tmp_path / name, lora(seed=seed), target_modules=["q_proj"])
    (tmp_path / "r.yaml").write_text(STEPS)
    return tmp_path / "r.yaml"


@pytest.fixture
def run(lora_lab, recipe):
    def run(*options):
        code, out, err = lora_lab("run", "r.yaml", "--json", *options)
        assert code == 0, err
        return [step["run"] for step in json.loads(out)["steps"]]

    return run


def test_a_recipe_gives_what_its_verbs_give(run, recipe, lora_lab, tmp_path):
    assert run("--dry-run") == ["not run yet", "merged is made anew"]
    assert not (tmp_path / "merged").exists()
    assert run() == ["not run yet", "not run yet"]
    merge = ("merge", "a", "b", "--method", "ties", "--set", "density=0.5", "--weights", "1,0.5", "-o", "m")
    assert lora_lab(*merge)[0] == 0
    assert lora_lab("prune", "m", "--rank", "2", "--uniform-rank", "-o", "s.safetensors")[0] == 0
    made, wanted = (Adapter.load(tmp_path / name) for name in ("small.safetensors", "s.safetensors"))
    assert made.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(made.tensors[key], tensor) for key, tensor in wanted.tensors.items())


def test_only_what_has_changed_is_run_again(run, recipe, tmp_path):
    run()
    assert run() == [None, None]
    recipe.write_text(STEPS.replace("rank: 2", "rank: 1"))
    assert run() == [None, "its options have changed"]
    write(tmp_path / "b", lora(seed=7), target_modules=["q_proj"])
    assert run("--dry-run") == ["b has changed", "merged is made anew"]
    assert run() == ["b has changed", "merged has changed"]
    (tmp_path / "small.safetensors").unlink()
    assert run() == [None, "small.safetensors is not there"]
    # the same bytes again: what hangs on them is left alone
    assert run("--force") == ["asked for", "asked for"]
    (tmp_path / "r.state.json").write_text((tmp_path / "r.state.json").read_text().replace('"wrote": "', '"wrote": "0'))
    assert run("--dry-run") == ["not run yet", "merged is made anew"]  # a state that was edited is none


@pytest.fixture
def reasons(lora_lab, recipe):
    def reasons(step, *options):
        recipe.write_text(f"steps: [{step}]")
        code, out, err = lora_lab("run", "r.yaml", "--json", *options)
        assert code == 0, err
        return [step["run"] for step in json.loads(out)["steps"]]

    return reasons


def test_the_configuration_beside_a_lone_file_is_one_of_its_inputs(reasons, tmp_path):
    lone, config = tmp_path / "lone" / "x.safetensors", tmp_path / "lone" / "adapter_config.json"
    lone.parent.mkdir()
    save_file(lora(), lone)
    config.write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    step = "{convert: {adapter: lone/x.safetensors, dtype: float32, output: y}}"
    assert reasons(step) == ["not run yet"]
    assert reasons(step) == [None]
    config.write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 8}')
    assert reasons(step) == ["lone/adapter_config.json has changed"]
    config.unlink()
    assert reasons(step, "--dry-run") == ["lone/adapter_config.json has changed"]


def test_weights_in_a_file_and_places_at_home_are_inputs(reasons, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.json").write_text('{"default": [1, 1]}')
    step = "{merge: {adapters: [~/a, b], weights: w.json, output: m}}"
    assert reasons(step) == ["not run yet"]
    assert reasons(step) == [None]
    (tmp_path / "w.json").write_text('{"default": [1, 2]}')
    assert reasons(step) == ["w.json has changed"]
    write(tmp_path / "a", lora(seed=9))
    assert reasons(step) == [f"{tmp_path / 'a'} has changed"]
    (tmp_path / "w.json").unlink()
    assert reasons(step, "--dry-run") == ["w.json has changed"]  # and is no longer there


def test_what_lies_elsewhere_in_a_folder_is_a_change(reasons, tmp_path):
    for part in ("unet", "text_encoder"):
        write(tmp_path / "pipe" / part, lora())
    step = "{convert: {adapter: pipe, dtype: float32, output: y}}"
    assert reasons(step) == ["not run yet"]
    (tmp_path / "pipe" / "unet").rename(tmp_path / "pipe" / "transformer")
    (tmp_path / "pipe" / "text_encoder").rename(tmp_path / "pipe" / "text_encoder_2")
    assert reasons(step) == ["pipe has changed"]


def test_what_changes_while_a_step_is_run_is_read_again(reasons, tmp_path, monkeypatch):
    step = "{merge: {adapters: [a, b], output: m}}"

    def changing(*arguments, run=verb._run, **options):
        ran = run(*arguments, **options)
        write(tmp_path / "a", lora(seed=11))
        return ran

    monkeypatch.setattr(verb, "_run", changing)
    assert reasons(step) == ["not run yet"]
    assert reasons(step, "--dry-run") == ["a has changed"]


@pytest.mark.parametrize("named", ["given", "recorded"])
def test_scores_are_stale_where_the_data_or_the_base_of_their_task_is_another(reasons, tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    write_bert(tmp_path / "base", tmp_path / "vocab.txt", ["good", "bad"])
    rows = [f"{word},{label}" for word, label in (("good", 1), ("bad", 0)) for _ in range(20)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]))
    keys = 'kind = "text-classification"\nbase = "base"\ndata = "rows.csv"\ntext = "text"\nlabel = "label"\n'
    (tmp_path / "t.toml").write_text(keys)
    task = tasks.from_name("t.toml")
    config = LoraConfig(r=1, target_modules=["query"])
    made = random_adapter(task, tmp_path / "trained", config, scale=0.1)
    replace(made, record={"task": task.record}, origin=Origin(own=True)).save(tmp_path / "own")
    adapter = "trained, task: t.toml" if named == "given" else "own"
    step = f"{{evaluate: {{adapters: {adapter}, output: e.json}}}}"
    assert reasons(step) == ["not run yet"]
    assert reasons(step) == [None]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows, "bad good,1", "good bad,0"]))
    assert reasons(step) == ["the data or the base model of its task has changed"]
    assert reasons(step) == [None]
    write_bert(tmp_path / "base", tmp_path / "vocab.txt", ["good", "bad"], initializer_range=0.3)
    assert reasons(step, "--dry-run") == ["the data or the base model of its task has changed"]


def test_an_output_that_the_recipe_did_not_write_stays(run, recipe, lora_lab, tmp_path):
    write(tmp_path / "merged", lora(seed=3))
    before = (tmp_path / "merged" / "adapter_model.safetensors").read_bytes()
    code, _, err = lora_lab("run", "r.yaml")
    assert code == 1
    assert "merged: exists already" in err
    assert (tmp_path / "merged" / "adapter_model.safetensors").read_bytes() == before


def test_what_is_written_holds_the_recipe_that_makes_it_again(run, recipe, lora_lab, tmp_path):
    run()
    (step,) = Adapter.load(tmp_path / "merged").record["recipe"]["steps"]
    assert step["merge"] == {
        "adapters": ["a", "b"],
        "method": "ties",
        "set": ["density=0.5"],
        "weights": ["1,0.5"],
    }
    other = tmp_path / "again.yaml"
    other.write_text(json.dumps({"steps": [{"merge": {**step["merge"], "output": "again"}}]}))
    code, _, err = lora_lab("run", "again.yaml")
    assert code == 0, err
    first, again = (Adapter.load(tmp_path / name).tensors for name in ("merged", "again"))
    assert all(torch.equal(again[key], tensor) for key, tensor in first.items())


def test_a_merge_in_mergekits_words(recipe, lora_lab, tmp_path):
    recipe.write_text(
        """
merge_method: ties
base_model: some/base
models:
  - model: some/base+a
    parameters: {weight: 1.0, density: 0.5}
  - model: b
    parameters: {weight: 0.5, density: 0.5}
parameters: {lambda: 0.7}
dtype: float32
output: kit
"""
    )
    assert lora_lab("run", "r.yaml")[0] == 0
    ties = ("--method", "ties", "--set", "density=0.5", "--set", "scope=module", "--weights", "1,0.5")
    merge = ("merge", "a", "b", *ties)
    assert lora_lab(*merge, "--coefficient", "0.7", "--dtype", "float32", "-o", "ours")[0] == 0
    kit, ours = (Adapter.load(tmp_path / name).tensors for name in ("kit", "ours"))
    assert all(torch.equal(kit[key], tensor) for key, tensor in ours.items())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "a recipe is a mapping with 'steps', and this is a NoneType"),
        ("steps: [", "line 1: not YAML"),
        ("steps: []", "must list at least one step"),
        ("step: []", "unknown key in r.yaml 'step' (did you mean 'steps'"),
        ("steps: [{merg: {}}]", "unknown verb in step 1 of r.yaml 'merg' (did you mean 'merge'"),
        ("steps: [{merge: {adapters: [a, b]}}]", "step 1 (merge) needs 'output'"),
        ("steps: [{prune: {adapter: a, rnk: 2, output: x}}]", "step 1 (prune) 'rnk' (did you mean 'rank'"),
        ("steps: [{prune: {adapter: a, rank: two, output: x}}]", "step 1 (prune): invalid value for '--rank'"),
        ("steps: [{prune: {adapter: a, rank: 0, output: x}}]", "step 1 (prune): --rank is 0; it must be at least 1"),
        ("steps: [{prune: {rank: 2, output: x}}]", "step 1 (prune): missing argument '"),
        ("steps: [{prune: {adapter: a, force: true, rank: 1, output: x}}]", "step 1 (prune) 'force'"),
        (
            "steps: [{prune: {adapter: x, rank: 1, output: y}}, {prune: {adapter: a, rank: 1, output: x}}]",
            "step 1 (prune) reads x, which step 2 (prune) only makes later",
        ),
        (
            "steps: [{prune: {adapter: a, rank: 1, output: x}}, {prune: {adapter: b, rank: 1, output: ./x}}]",
            "step 2 (prune) writes ./x, as step 1 (prune) does",
        ),
        (
            "{merge_method: ties, models: [{model: a, parameters: {density: 0.1}}, {model: b}]}",
            "density is not the same for all models",
        ),
        ("{merge_method: ties, models: [{model: a}], slices: []}", "unknown key in r.yaml 'slices'"),
        ("{merge_method: ties, models: [{model: a}], parameters: {normalize: false}}", "ties has normalize true here"),
        ("{merge_method: dare_ties, models: [{model: a}]}", "dare_ties has normalize true here"),
        ("{merge_method: ties, models: [{model: a, parameters: {weight: -1}}]}", "of a weight below 0"),
        ("{merge_method: della_linear, models: [{model: a}]}", "unknown merge_method in r.yaml 'della_linear'"),
        ("{merge_method: ties, models: [{model: a, parameters: 5}]}", "'parameters' is a mapping"),
        ("{merge_method: ties, models: [{model: a}], parameters: [1]}", "'parameters' is a mapping"),
        ("steps: [{merge: {adapters: [a, b], output: o, output: p}}]", "'output' is given twice"),
        ("steps: [{merge: {adapters: [a, b], set: &s {x: *s}, output: o}}]", "an anchor within itself"),
        ("steps: [{merge: {adapters: &l [a, *l], output: o}}]", "an anchor within itself"),
        (f"steps: [{{prune: {{adapter: a, rank: 1{'0' * 5000}, output: o}}}}]", "4300 digits"),
        ("steps: [{merge: {adapters: [a, null], output: o}}]", "adapters has None; a path or a hub id is needed"),
        ("steps: [{merge: {adapters: {a: b}, output: o}}]", "adapters has {'a': 'b'}; a path or a hub id is needed"),
        ("steps: [{merge: {adapters: [a, b], output: r.yaml}}]", "r.yaml, which is the recipe's own"),
        ("steps: [{evaluate: {adapters: a, output: ./r.state.json}}]", "r.state.json, which is the recipe's own"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_a_recipe_that_cannot_be_is_one_line_and_nothing_is_run(recipe, lora_lab, tmp_path, text, told):
    recipe.write_text(text)
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = lora_lab("run", "r.yaml")
    assert code == 1
    assert out == ""
    (line,) = err.strip().splitlines()
    assert told in line
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_anchors_that_repeat_each_other_are_refused_at_once(recipe, lora_lab):
    lists = ["&a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lists += [f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    recipe.write_text(f"steps: [{{merge: {{adapters: [a, b], set: {{x: [{', '.join(lists)}]}}, output: o}}}}]")
    start = time.process_time()
    code, _, err = lora_lab("run", "r.yaml")
    assert time.process_time() - start < 3
    assert code == 1
    assert "anchors that repeat more than" in err
    recipe.write_text(
        "steps: [{merge: {adapters: &two [a, b], weights: [1, 2], output: o}}, {merge: {adapters: *two, output: p}}]"
    )
    assert lora_lab("run", "r.yaml", "--dry-run")[0] == 0


def test_values_are_never_taken_for_options(recipe, lora_lab, tmp_path):
    write(tmp_path / "--force", lora(seed=5), target_modules=["q_proj"])
    write(tmp_path / "o", lora(seed=3))
    before = (tmp_path / "o" / "adapter_model.safetensors").read_bytes()
    recipe.write_text(
        "steps: [{merge: {adapters: [a, --force], output: p}}, {merge: {adapters: [a, -o, b], output: q}}]"
    )
    code, _, err = lora_lab("run", "r.yaml")
    assert code == 1
    assert "-o: no such file or folder" in err
    assert (tmp_path / "p").exists()
    assert not (tmp_path / "q").exists()
    assert (tmp_path / "o" / "adapter_model.safetensors").read_bytes() == before


def test_a_state_that_lora_lab_did_not_write_stays(recipe, lora_lab, tmp_path):
    (tmp_path / "r.state.json").write_text('{"mine": 1}')
    code, _, err = lora_lab("run", "r.yaml")
    assert code == 1
    assert "r.state.json: not written by lora-lab, not replaced" in err
    assert (tmp_path / "r.state.json").read_text() == '{"mine": 1}'
    assert not (tmp_path / "merged").exists()


def words_of(recipe, text):
    recipe.write_text(text)
    return [step.words() for step in recipes.read(recipe)]


def test_numbers_and_names_are_read_as_they_are_written(recipe):
    text = (
        "steps: [{merge: {adapters: [010, 2024-1-1], weights: [11:0, 5:1], set: {density: 1e-1, seed: 1}, output: o}}]"
    )
    (words,) = words_of(recipe, text)
    assert words == [
        "merge", "--weights=11:0", "--weights=5:1", "--set=density=0.1", "--set=seed=1", "--output=o", "--", "010",
        "2024-1-1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("merge_method: ties", "--method=ties --weights=1.0,0.123456789 --set=density=1.0 --set=scope=module"),
        ("merge_method: linear", "--method=average --weights=1.0,0.123456789"),
        (
            "{merge_method: linear, parameters: {normalize: false}}",
            "--method=task-arithmetic --weights=1.0,0.123456789",
        ),
        (
            "{merge_method: task_arithmetic, parameters: {normalize: true}}",
            "--method=average --weights=1.0,0.123456789",
        ),
        (
            "{merge_method: dare_ties, parameters: {normalize: true}}",
            "--method=dare-ties --weights=1.0,0.123456789 --set=density=1.0",
        ),
        (
            "{merge_method: della, parameters: {density: 0.5, epsilon: 0.1, lambda: 2}}",
            "--method=della --weights=1.0,0.123456789 --coefficient=2 --set=density=0.5 --set=window=0.2",
        ),
        (
            "merge_method: breadcrumbs",
            "--method=breadcrumbs --weights=1.0,0.123456789 --set=density=1.0 --set=gamma=0.0",
        ),
    ],
)
def test_mergekits_methods_keep_its_defaults(recipe, text, wanted):
    content = {
        **yaml.safe_load(text),
        "models": [{"model": "a"}, {"model": "b", "parameters": {"weight": 0.123456789}}],
    }
    (words,) = words_of(recipe, json.dumps(content))
    assert words == ["merge", *wanted.split(), "--output=merged", "--", "a", "b"]


def test_a_recipe_names_no_task_with_a_folder_of_code(lora_lab, tmp_path):
    (tmp_path / "my.toml").write_text('kind = "lm-eval"\nbase = "b"\ntasks = ["a"]\ninclude = "mine"\n')
    (tmp_path / "r.yaml").write_text("steps:\n  - evaluate: {adapters: [a], task: my.toml, output: x.json}\n")
    code, out, err = lora_lab("run", "r.yaml")
    assert (code, out) == (1, "")
    assert "names the task my.toml, whose include is a folder of code; that runs only where you name the file" in err
    assert len(err.splitlines()) == 1
