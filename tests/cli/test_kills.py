"""Runs that are ended from outside, at any moment, lose nothing: run again, they come to the same end."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from journals import entries
from making_adapters import random_adapter
from making_checkpoints import QV, train, write_base
from making_processes import finished, started
from peft import LoraConfig
from safetensors import safe_open

import lora_lab as ll
from lora_lab.cli.verbs import VERBS
from lora_lab.results.result import Result, fingerprint
from lora_lab.tasks.kinds.digits import Digits

ENDED = "error: interrupted; nothing half-written was left"
RUNS = {
    "interpolate": ["a.safetensors", "b.safetensors", "--points", 3, "--ratios", "0:1"],
    "plane": ["a.safetensors", "b.safetensors", "--base", "--points", 3],
    "curve": ["a.safetensors", "b.safetensors", "--points", 3, "--steps", 4, "--checks", 2, "--spaces", "delta"],
    "sharpness": ["a.safetensors", "--examples", 8, "--iterations", 2, "--probes", 2],
    "stability": ["a.safetensors", "--samples", 2, "--examples", 40, "--p", "0.5"],
    "shapley": ["a.safetensors", "--examples", 40, "--estimator", "exact"],
    "sweep": ["a.safetensors", "--examples", 40, "--sparsities", "0.5", "--draws", 1],
    "compare-merges": ["a.safetensors", "b.safetensors", "--methods", "average", "--coefficients", "1", "--latex"],
    "evaluate": ["a.safetensors", "-o", "out/evaluate.json"],
    "merge": ["a.safetensors", "b.safetensors", "--method", "ties", "-o", "out/merged"],
    "prune": ["a.safetensors", "--rank", 1, "-o", "out/pruned"],
    "convert": ["a.safetensors", "--to", "mlx", "-o", "out/converted"],
    "in place": ["out/own.safetensors", "--rank", 1, "--in-place"],
    "fuse": ["base", "l", "-o", "out/fused", "--max-shard-size", "0.000003"],
    "extract": ["base", "tuned", "--rank", 2, "-o", "out/extracted"],
    "compare": ["a.safetensors", "b.safetensors", "--csv", "--figure"],
    "run": ["recipe.yaml"],
    "checkpoints": ["runs/a", "runs/b", "--examples", 20, "--spaces", "delta"],
    "record": ["out/own.safetensors", "--method", "lora", "--seed", 3],
    "report": ["line.json", "-o", "out/report.html"],
    "train": ["--steps", 6, "--batch-size", 8, "-o", "out/trained.safetensors"],
    "figure": ["line.json", "-o", "out/line.pdf", "-o", "out/line.svg"],
}
READING = ("verify", "inspect", "tasks", "schema", "doctor")
MANY = ("quickstart", "reproduce")
"""Verbs that write nothing, and those that do what others of these do, several times."""
REPLACED = ("evaluate", "merge", "prune", "convert", "fuse", "extract", "figure", "report")
"""Verbs that are told to replace what is there; the others find their result again."""
RECIPE = """
steps:
  - merge: {adapters: [a.safetensors, b.safetensors], method: ties, output: out/merged}
  - prune: {adapter: out/merged, rank: 1, output: out/small.safetensors}
  - fuse: {base: base, adapters: l, output: out/fused}
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder, task = tmp_path_factory.mktemp("inputs"), Digits("relabel")
    for seed, name in enumerate("ab"):
        config = LoraConfig(r=2, lora_alpha=4, target_modules=r"vit\.layers\.[0-1]\..*fc1")
        made = random_adapter(task, folder / f"from-{name}", config, seed=seed, scale=0.06)
        record = {"task": task.record, "method": "lora", "seed": seed}
        type(made)(made.tensors, made.config, made.sites, record, "a").save(folder / f"{name}.safetensors")
        type(made)(made.tensors, made.config, made.sites, record, "a").save(folder / "runs" / name / "checkpoint-5")
        shutil.rmtree(folder / f"from-{name}")
    shutil.copy(Path(__file__).parents[2] / "figures" / "results" / "interpolation_lora.json", folder / "line.json")
    base = write_base("llama", folder / "base", torch.bfloat16)
    train("llama", base, folder / "l", LoraConfig(r=2, target_modules=QV))
    ll.fuse(base, folder / "l", folder / "tuned", progress=False)
    (folder / "out").mkdir()
    shutil.copy(folder / "a.safetensors", folder / "out" / "own.safetensors")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def place(inputs, folder):
    shutil.copytree(inputs, folder, dirs_exist_ok=True)
    return folder


def begun(verb, folder, *more, fatal=None):
    return started(folder, verb.replace("in place", "prune"), *RUNS[verb], *more, fatal=fatal)


def bits(path):
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    return {key: (str(t.dtype), t.flatten().view(torch.uint8).tolist()) for key, t in tensors.items()}


def numbers(folder):
    """File → what it says, without when and how long; weights by their bits, hidden files and figures by size alone."""
    found = {}
    for path in sorted((folder / "out").rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            found[name] = bits(path)
        elif path.suffix == ".json" and "lora-lab result" not in path.read_text():
            found[name] = path.read_text()
        elif path.suffix == ".json":
            result = Result.load(path)
            summary = {key: value for key, value in result.summary.items() if not key.endswith("_s")}
            for of_adapter in summary.get("adapters", []):
                of_adapter.pop("engine", None)  # what this run computed; a killed one has left the rest
            found[name] = fingerprint([result.kind, result.columns, summary])
        elif path.suffix == ".sqlite":
            found[name] = sorted(entries(path))
        elif path.suffix in (".pdf", ".png", ".svg"):
            found[name] = path.stat().st_size > 1000
        else:
            found[name] = None
    return found


SLOW = [pytest.param(verb, marks=pytest.mark.slow) for verb in ("stability", "sweep", "compare-merges")]


@pytest.mark.parametrize("verb", ["interpolate", "shapley", "checkpoints", *SLOW])
def test_a_run_killed_between_result_and_figure_draws_it_when_run_again(inputs, tmp_path, verb):
    folder = place(inputs, tmp_path)
    finished(begun(verb, folder, fatal=("plots.registry", "save")), folder, -signal.SIGKILL)
    result, figures = folder / "out" / f"{verb}.json", [folder / "out" / f"{verb}.{end}" for end in ("pdf", "png")]
    assert result.exists()
    assert not any(path.exists() for path in figures)
    before = result.read_bytes()
    err = finished(begun(verb, folder), folder)
    assert "this very result is there already" in err
    assert result.read_bytes() == before
    assert all(path.stat().st_size > 1000 for path in figures)
    assert not [path for path in (folder / "out").iterdir() if path.suffix == ".part"]


def test_another_figure_than_the_results_is_drawn_again(inputs, tmp_path):
    folder = place(inputs, tmp_path)
    finished(begun("interpolate", folder), folder)
    figures = [folder / "out" / f"interpolate.{end}" for end in ("pdf", "png")]
    drawn = [path.read_bytes() for path in figures]
    figures[0].write_bytes(drawn[1])  # a figure of ours, of another kind
    figures[1].write_bytes(drawn[1][:-9])
    finished(begun("interpolate", folder), folder)
    assert [path.read_bytes() for path in figures] == drawn


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_end_is_an_interrupt(inputs, tmp_path, number):
    folder = place(inputs, tmp_path)
    process = begun("shapley", folder, "--players", "rank")
    while len(entries(folder / "out" / ".outcomes")) < 3:
        assert process.is_alive(), (folder / "err.txt").read_text()
        time.sleep(0.01)
    os.kill(process.pid, number)
    assert finished(process, folder, 128 + number).splitlines()[-1] == ENDED
    assert {path.name for path in folder.glob("out/*")} == {".outcomes", "own.safetensors"}
    assert [path.suffix for path in folder.glob("out/.outcomes/*")] == [".sqlite"]


def killed_and_run_again(inputs, folder, verb, share, whole):
    """Kill a run after a share of the time that it takes, and run it to its end."""
    place(inputs, folder)
    process = begun(verb, folder)
    process.join(share * whole)
    process.kill()
    process.join()
    more = ["--force"] if verb in REPLACED else []
    finished(begun(verb, folder, *more), folder)


def undisturbed(inputs, folder, verb):
    place(inputs, folder)
    began = time.monotonic()
    finished(begun(verb, folder), folder)
    return numbers(folder), time.monotonic() - began


@pytest.mark.parametrize(("verb", "share"), [("compare-merges", 0.93), ("shapley", 0.6), ("train", 0.8)])
def test_a_run_killed_at_any_moment_comes_to_the_same_end(inputs, tmp_path, verb, share):
    expected, whole = undisturbed(inputs, tmp_path / "whole", verb)
    killed_and_run_again(inputs, tmp_path / "killed", verb, share, whole)
    assert numbers(tmp_path / "killed") == expected


# What is written takes its place in one step, or not at all.

REPLACE = ("files.workplace", "_exchange"), ("files.workplace", "_put")


@pytest.mark.parametrize(
    ("verb", "fatal"),
    [
        ("in place", REPLACE[1]),
        ("extract", REPLACE[1]),
        ("extract", ("fusing.extract", "_adapter")),
        ("convert", REPLACE[1]),
        ("compare", ("plots.registry", "save")),
        ("fuse", REPLACE[1]),
        ("fuse", ("fusing.fuse", "copied")),
        ("run", REPLACE[1]),
        ("checkpoints", REPLACE[1]),
        ("record", REPLACE[1]),
        ("report", REPLACE[1]),
    ],
)
def test_a_run_killed_as_it_writes_leaves_what_was_there_and_goes_on(inputs, tmp_path, verb, fatal):
    expected, _ = undisturbed(inputs, tmp_path / "whole", verb)
    folder = place(inputs, tmp_path / "killed")
    before = numbers(folder)
    finished(begun(verb, folder, fatal=fatal), folder, -signal.SIGKILL)
    assert {name: what for name, what in numbers(folder).items() if not hidden(name)}.items() >= before.items()
    finished(begun(verb, folder), folder)
    assert numbers(folder) == expected


STEPS = {
    "merge": "{adapters: [a.safetensors, b.safetensors], method: ties, output: out/merged}",
    "fuse": "{base: base, adapters: l, output: out/fused}",
    "evaluate": "{adapters: a.safetensors, csv: true, output: out/e.json}",
    "convert": "{adapter: l, to: mlx, output: out/c}",
}


@pytest.mark.parametrize("verb", STEPS)
def test_a_step_killed_before_its_state_is_written_knows_its_output_again(inputs, tmp_path, verb):
    folder = place(inputs, tmp_path)
    (folder / "recipe.yaml").write_text(f"steps: [{{{verb}: {STEPS[verb]}}}]")
    finished(begun("run", folder, fatal=("cli.studies.run", "_peak")), folder, -signal.SIGKILL)
    made = numbers(folder)
    if verb == "merge":  # the step may even be another one by then
        (folder / "recipe.yaml").write_text(f"steps: [{{{verb}: {STEPS[verb].replace('ties', 'average')}}}]")
        finished(begun("run", folder, fatal=("merging.writing.export", "save")), folder, -signal.SIGKILL)
        assert numbers(folder) == made
        (folder / "recipe.yaml").write_text(f"steps: [{{{verb}: {STEPS[verb]}}}]")
    finished(begun("run", folder, "--dry-run"), folder)
    assert "its last run did not end" in (folder / "out.txt").read_text()
    finished(begun("run", folder), folder)
    assert numbers(folder) == made
    finished(begun("run", folder), folder)
    assert "up to date" in (folder / "out.txt").read_text()


def test_what_came_to_an_outputs_place_from_elsewhere_stays_though_the_step_was_cut_off(inputs, tmp_path):
    folder = place(inputs, tmp_path)
    (folder / "recipe.yaml").write_text(f"steps: [{{merge: {STEPS['merge']}}}]")
    finished(begun("run", folder, fatal=("merging.writing.export", "save")), folder, -signal.SIGKILL)
    finished(started(folder, "merge", "a.safetensors", "b.safetensors", "-o", "out/merged"), folder)
    there = numbers(folder)
    for _ in range(2):
        assert "out/merged: exists already" in finished(begun("run", folder), folder, 1)
        assert numbers(folder) == there


def test_every_verb_that_writes_is_killed():
    assert {*RUNS, *READING, *MANY} == {*VERBS, "in place"}


def hidden(name):
    return any(part.startswith(".") for part in Path(name).parts)


@pytest.mark.parametrize(("verb", "output"), [("convert", "converted"), ("fuse", "fused"), ("extract", "extracted")])
def test_a_folder_that_is_replaced_is_one_or_the_other(inputs, tmp_path, verb, output):
    folder = place(inputs, tmp_path)
    finished(begun(verb, folder), folder)
    (folder / "out" / output).rename(folder / "first")
    shutil.copytree(folder / "first", folder / "out" / output)
    made = numbers(folder)
    other = {"convert": ["--dtype", "bf16"], "fuse": ["--coefficients", "2"], "extract": ["--energy", "0.5"]}[verb]
    finished(begun(verb, folder, *other, "--force", fatal=REPLACE[0]), folder, -signal.SIGKILL)
    assert {name: what for name, what in numbers(folder).items() if not hidden(name)} == made
    finished(begun(verb, folder, *other, "--force"), folder)
    there = numbers(folder)
    assert there.keys() == made.keys()
    assert there != made


def test_verify_and_inspect_write_nothing(inputs, tmp_path):
    folder = place(inputs, tmp_path)
    there = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    finished(started(folder, "verify", "base", "l", "tuned"), folder)
    finished(started(folder, "inspect", "l", "a.safetensors"), folder)
    left = {path.relative_to(folder) for path in folder.rglob("*")}
    assert sorted(left - {Path("out.txt"), Path("err.txt")}) == there


@pytest.mark.slow
@pytest.mark.parametrize("verb", RUNS)
def test_runs_killed_at_random_moments_come_to_the_same_end(inputs, tmp_path, verb):
    expected, whole = undisturbed(inputs, tmp_path / "whole", verb)
    drawn = random.Random(verb)
    for i in range(3):
        folder = tmp_path / str(i)
        killed_and_run_again(inputs, folder, verb, drawn.uniform(0.2, 1.0), whole)
        assert numbers(folder) == expected, (verb, i)


# Workers end with the process that they work for.


def when_there(process, folder, pattern, count=1):
    deadline = time.monotonic() + 120
    while len(list(folder.glob(pattern))) < count:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(processes, within):
    left = psutil.wait_procs(processes, timeout=within)[1]
    return not [each for each in left if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def test_trainings_side_by_side_end_with_their_parent_and_write_no_more(tmp_path):
    options = ["--seeds", "0-1", "--steps", 100_000, "--save-every", 20, "--jobs", 2, "-o", "runs"]
    process = started(tmp_path, "train", *options)
    when_there(process, tmp_path, "runs/*.checkpoints/checkpoint-20", 2)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.join()
    assert gone(workers, within=3)
    written = sorted(tmp_path.rglob("*"))
    time.sleep(1)
    assert sorted(tmp_path.rglob("*")) == written


@pytest.mark.slow
def test_workers_of_a_private_cluster_end_with_the_command(inputs, tmp_path):
    folder = place(inputs, tmp_path)
    options = ["--players", "rank", "--samples", 5000, "--yes", "--ray", "local:2"]
    process = started(folder, "shapley", "a.safetensors", *options)
    when_there(process, folder, "out/.outcomes/*.sqlite")
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) > 2
    process.kill()
    process.join()
    assert gone(workers, within=10)
