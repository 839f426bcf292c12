"""What `import lora_lab as ll` gives, and that each of its functions is the library's own answer."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import lora_lab as ll
from lora_lab import tasks
from lora_lab.adapters.files.reading import inspect
from lora_lab.analysis.lines.connectivity import Interpolate
from lora_lab.analysis.lines.landscape import Curve, Layerwise, Plane, Sharpness
from lora_lab.analysis.questions import Evaluate, Shapley, Stability, Sweep
from lora_lab.api import given
from lora_lab.errors import LoraLabError, MismatchError, OptionError, TrustError
from lora_lab.merging.sources import Sources
from lora_lab.pruning.entries import prune_weights
from lora_lab.pruning.ranks import prune_rank
from lora_lab.training.fit import train

NAMES = ["Adapter", "CoToCallback", "Execution", "LoraLabError", "LowRank", "Metric", "Recipe", "Result", "Schedule"]
NAMES += [
    "Task",
    "checkpoints",
    "compare",
    "compare_merges",
    "convert",
    "curve",
    "evaluate",
    "extract",
    "figure",
    "fuse",
    "inspect",
    "interpolate",
]
NAMES += [
    "layerwise",
    "load",
    "merge",
    "plane",
    "prune",
    "record",
    "report",
    "reproduce",
    "shapley",
    "sharpness",
    "stability",
    "sweep",
    "task",
    "train",
    "verify",
]
QUIET = {"progress": False}
SHORT = {"seed": 1, "steps": 6, "batch_size": 8, "target_modules": ["q_proj", "fc1"]}

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.fixture(scope="module")
def pair(tmp_path_factory, few_digits):
    """Two adapters of a few steps, and their files."""
    folder = tmp_path_factory.mktemp("face")
    adapters = [ll.train("digits/relabel", **{**SHORT, "seed": seed}, **QUIET) for seed in (0, 1)]
    return adapters, [adapter.save(folder / f"{adapter.label}.safetensors") for adapter in adapters]


def numbers(result):
    """All of a result but its provenance."""
    return json.dumps([result.kind, result.columns, result.summary, result.parameters])


def test_the_public_names_are_these():
    assert ll.__all__ == NAMES
    assert dir(ll) == NAMES
    with pytest.raises(AttributeError, match="'lora_lab' has no attribute 'nonsense'"):
        _ = ll.nonsense


def test_the_import_loads_neither_torch_nor_numpy():
    code = (
        "import sys, lora_lab as ll; print({'torch', 'numpy', 'rich', 'pydantic'} & set(sys.modules), len(dir(ll)));"
        "ll.LowRank; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"set() {len(NAMES)}", "True False"]


def test_training_gives_the_adapter_of_the_recipe(pair):
    recipe = ll.Recipe(method="coto", **SHORT)
    adapter, _ = train(tasks.from_name("digits/relabel"), recipe)
    made = pair[0][1]
    assert adapter.record["recipe"] == made.record["recipe"]
    assert all(torch.equal(adapter.tensors[key], made.tensors[key]) for key in adapter.tensors)


@pytest.mark.parametrize(
    ("function", "question", "options"),
    [
        (ll.interpolate, Interpolate, {"points": 2, "spaces": ["delta"], "split": "validation"}),
        (ll.stability, Stability, {"samples": 2, "every": False, "examples": 20, "players": "type", "rescale": False}),
        (ll.shapley, Shapley, {"samples": 2, "players": "type", "examples": 20, "estimator": "permutation"}),
        (ll.plane, Plane, {"base": True, "points": 2, "examples": 20}),
        (ll.curve, Curve, {"points": 3, "steps": 1, "checks": 1, "spaces": ["delta"], "shapes": ["bezier"]}),
        (ll.sharpness, Sharpness, {"examples": 8, "iterations": 2, "probes": 2}),
        (ll.layerwise, Layerwise, {"points": 2, "examples": 20, "players": "type"}),
        (ll.sweep, Sweep, {"kinds": "rank", "draws": 1, "examples": 20}),
        (ll.evaluate, Evaluate, {"split": "validation", "base": False}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_question_has_one_answer_however_adapters_and_tasks_are_given(pair, function, question, options):
    adapters, paths = pair
    task = ll.task("digits/relabel")
    listed = {name: (value,) if name in ("kinds",) else value for name, value in options.items()}
    wanted = question(**listed).run(adapters, [task] * 2 if function is ll.evaluate else task)
    given = [(paths, None), ([adapters[0], str(paths[1])], "digits/relabel")]
    for several, on in given:
        assert numbers(function(several, on, **options, **QUIET)) == numbers(wanted)


def test_files_of_one_name_are_told_apart_in_every_answer(pair, tmp_path):
    places = [tmp_path / run / "last.safetensors" for run in ("one", "two")]
    for adapter, place in zip(pair[0], places, strict=True):
        place.parent.mkdir()
        adapter.save(place)
    own = {"task": "digits/relabel", "examples": 10, "progress": False}
    rows = ll.evaluate(places, base=False, **own).rows()
    assert [row["adapter"] for row in rows] == ["one/last", "two/last"]
    rows = ll.interpolate(places, points=2, spaces=("delta",), **own).rows()
    assert {tuple(row["members"]) for row in rows} == {("one/last", "two/last")}


def test_one_adapter_needs_no_list(pair):
    options = {"samples": 2, "players": "type", "examples": 20, **QUIET}
    assert ll.shapley(pair[1][0], **options).columns == ll.shapley([pair[1][0]], **options).columns


def test_merges_and_prunings_are_those_of_their_rooms(pair):
    from lora_lab.merging.merged import merge

    adapters, paths = pair
    merged = ll.merge(paths, "ties", density=0.2, weights=[1, 0.5], coefficient=2.0, rank=3, **QUIET)
    wanted = merge(Sources(adapters, [1, 0.5]), "ties", options={"density": 0.2}, coefficient=2.0, rank=3).adapter
    assert all(torch.equal(merged.tensors[key], tensor) for key, tensor in wanted.tensors.items())
    assert merged.record["merge"]["error"] == wanted.record["merge"]["error"]
    for made, reference in [
        (ll.prune(paths[0], rank=2), prune_rank(adapters[0], rank=2)),
        (ll.prune(paths[0], energy=0.5, by="units"), prune_rank(adapters[0], energy=0.5, by="units")),
        (
            ll.prune(paths[0], sparsity=0.5, seed=3, by="random"),
            prune_weights(adapters[0], sparsity=0.5, seed=3, by="random"),
        ),
    ]:
        assert all(torch.equal(made.tensors[key], tensor) for key, tensor in reference.adapter.tensors.items())
    assert {name.split(".")[2] for name in ll.prune(paths[0], keep="even").sites} == {"0", "2", "4"}


def test_a_pattern_by_shapley_values_keeps_the_players_with_the_highest(pair):
    adapters, paths = pair
    options = {"players": "type", "samples": 2, "examples": 20}
    question = Shapley(split="validation", **options)
    values = question.values(adapters[0], ll.task("digits/relabel"))
    kept = ll.prune(paths[0], keep="top-shapley:1", **options)
    assert {name.rpartition(".")[2] for name in kept.sites} == {max(values, key=values.get)}
    told = []
    on = ll.Execution(device="cpu", progress=lambda *done: told.append(done))
    again = ll.prune(paths[0], keep="top-shapley:1", on=on, **options)
    assert told
    assert set(again.sites) == set(kept.sites)


def test_merges_are_compared_on_the_tasks_of_their_adapters(pair):
    adapters, paths = pair
    options = {"methods": "ties", "coefficients": [1.0], "ratios": [[1, 1]]}
    assert numbers(ll.compare_merges(adapters, **options, **QUIET)) == numbers(
        ll.compare_merges(paths, ["digits/relabel"] * 2, **options, **QUIET)
    )


def test_a_result_is_drawn_from_itself_or_its_file(pair, tmp_path):
    result = ll.interpolate(pair[0], points=2, **QUIET)
    path = result.save(tmp_path / "line.json")
    assert ll.figure(path).get_gid() == ll.figure([result]).get_gid() == ll.figure(result).get_gid()
    assert ll.figure(result, metric="loss", width="single").get_gid() != ll.figure(result).get_gid()


def test_a_bar_is_shown_unless_it_is_switched_off_or_somebody_else_is_told(pair, monkeypatch, capsys):
    shown, told = [], []
    monkeypatch.setattr(given, "bar", lambda what: shown.append(what) or pytest.MonkeyPatch.context())
    options = {"split": "validation", "base": False}
    on = ll.Execution(progress=lambda done, total: told.append((done, total)))
    ll.evaluate(pair[0], on=on, **options)
    assert told == [(1, 2), (2, 2)]
    ll.evaluate(pair[0], **options, **QUIET)
    assert not shown
    monkeypatch.undo()
    ll.evaluate(pair[0], **options)
    assert not capsys.readouterr().out


def test_a_bar_counts_on_the_console_that_it_is_given():
    import io

    from rich.console import Console

    from lora_lab.progress import bar

    screen = io.StringIO()
    with bar("a\x1bb", Console(file=screen, force_terminal=True, width=80)) as report:
        report(1, 4)
    assert r"a\x1bb" in screen.getvalue()
    assert "1/4" in screen.getvalue()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda a: ll.interpolate(a, pionts=3),
            OptionError,
            "unknown option of Interpolate 'pionts' .did you mean 'points'",
        ),
        (lambda a: ll.interpolate(a, spaces="dleta"), OptionError, "unknown space 'dleta' .did you mean 'delta'"),
        (
            lambda a: ll.train("digits/relabel", sede=1),
            OptionError,
            "unknown option of Recipe 'sede' .did you mean 'seed'",
        ),
        (lambda a: ll.merge(a, "tise"), OptionError, "'tise' .did you mean 'ties'"),
        (
            lambda a: ll.merge(a, "ties", densty=0.1),
            OptionError,
            "unknown option of ties 'densty' .did you mean 'density'",
        ),
        (lambda a: ll.prune(a[0]), OptionError, "in one way: keep, sparsity, rank"),
        (lambda a: ll.prune(a[0], rank=2, keep="even"), OptionError, "in one way: keep, sparsity, rank"),
        (lambda a: ll.prune(a[0], rank=2, criterion="x"), OptionError, "unknown option of pruning by rank 'criterion'"),
        (lambda a: ll.evaluate(a, ["digits/relabel"] * 3), OptionError, "2 adapters and 3 tasks"),
        (lambda a: ll.evaluate([]), OptionError, "no adapter was given"),
        (lambda a: ll.task("digits/rleabel"), OptionError, "did you mean 'digits/relabel'"),
        (lambda a: ll.load("nowhere.safetensors"), LoraLabError, "nowhere.safetensors"),
        (lambda a: ll.shapley(dataclasses.replace(a[0], record={})), MismatchError, "carries no record of its task"),
        (lambda a: ll.shapley(None), OptionError, "^`adapters` is None; an adapter, what `load` reads, or a list of"),
        (
            lambda a: ll.shapley([3, *a]),
            OptionError,
            r"^`adapters` is \[3, .*…; an adapter, what `load` reads, or a list of them is needed",
        ),
        (
            lambda a: ll.evaluate(a, [3, 4]),
            OptionError,
            r"^`task` is \[3, 4\]; a task, the name of one, a task file, or a list",
        ),
        (lambda a: ll.shapley(a, samples="3"), OptionError, "^samples is '3'; a whole number is needed"),
        (lambda a: ll.shapley(a, samples=2.5), OptionError, "^samples is 2.5; a whole number is needed"),
        (lambda a: ll.shapley(a, samples=True), OptionError, "^samples is True; a whole number is needed"),
        (lambda a: ll.shapley(a, players=3), OptionError, "^player is 3; a text or a mapping of names is needed"),
        (lambda a: ll.shapley(a, options=["nodes"]), OptionError, "; a mapping of names is needed"),
        (lambda a: ll.shapley(a, estimator="owen", options={"node": 3}), OptionError, "of owen 'node' .did you mean"),
        (lambda a: ll.shapley(a, options={"nodes": 3}), OptionError, "the default estimator has no options to set"),
        (lambda a: ll.stability(a, grid=0.5), OptionError, r"^probability p is 0.5; a list .a number each. is needed"),
        (lambda a: ll.stability(a, grid=["0.5"]), OptionError, r"'0.5'.*a list .a number each. is needed"),
        (lambda a: ll.evaluate(a, base="yes"), OptionError, "^base is 'yes'; True or False is needed"),
        (
            lambda a: ll.interpolate(a, ratios=["1:2"]),
            OptionError,
            "'1:2'.*a list .a list .a number each. each. is needed",
        ),
        (lambda a: ll.interpolate(a, ratios=[(0, 0)]), OptionError, "ratio '0:0': weights of 0 or more are needed"),
        (lambda a: ll.interpolate(a, ratios=[(2, -1)]), OptionError, "ratio '2:-1': weights of 0 or more are needed"),
        (lambda a: ll.interpolate(a, ratios=[(1, math.nan)]), OptionError, "ratio '1:nan': weights of 0 or more"),
        (lambda a: ll.compare_merges(a, ratios=[(1, math.nan)]), OptionError, "ratio 1:nan: weights of 0 or more"),
        (lambda a: ll.compare_merges(a, coefficients=1.0), OptionError, "^coefficient is 1.0; a list .a number each."),
        (lambda a: ll.merge(a, coefficient="x"), OptionError, "^the coefficient is 'x'; a number is needed"),
        (lambda a: ll.train("digits/relabel", steps="2"), OptionError, "^steps is '2'; a whole number is needed"),
        (lambda a: ll.train("digits/relabel", method=3), OptionError, "^`method` is 3; a text is needed"),
        (lambda a: ll.train(None), OptionError, "^`task` is None; a task, the name of one or a task file is needed"),
        (lambda a: ll.load(3), OptionError, "^`path` is 3; a text or a path is needed"),
        (lambda a: ll.load("a", alpha="8"), OptionError, "^`alpha` is '8'; a number is needed"),
        (lambda a: ll.inspect("a", config=[]), OptionError, r"^`config` is \[\]; a text or a path is needed"),
        (lambda a: ll.task(3), OptionError, "^`name` is 3; a text or a path is needed"),
        (lambda a: ll.figure(3), OptionError, "^`results` is 3; a result, its file, or a list of them is needed"),
        (lambda a: ll.figure([], width=3), OptionError, "^`width` is 3; a text is needed"),
        (lambda a: ll.prune(a), OptionError, "^`adapter` is .*; an adapter or what `load` reads is needed"),
        (lambda a: ll.prune(a[0], rank="2"), OptionError, "^rank is '2'; a whole number is needed"),
        (lambda a: ll.prune(a[0], sparsity="half"), OptionError, "^`sparsity` is 'half'; a number is needed"),
        (lambda a: ll.prune(a[0], energy="1"), OptionError, "^energy is '1'; a number is needed"),
        (lambda a: ll.prune(a[0], rank=2, seed=0.5), OptionError, "^`seed` is 0.5; a whole number is needed"),
        (lambda a: ll.prune(a[0], sparsity=0.5, by=3), OptionError, "^`by` is 3; a text is needed"),
        (lambda a: ll.prune(a[0], keep=3), OptionError, "^`keep` is 3; a text is needed"),
        (lambda a: ll.prune(a[0], keep="even", seed="0"), OptionError, "^seed is '0'; a whole number is needed"),
        (lambda a: ll.merge(a, "ties", density="0.2"), OptionError, "^density is '0.2'; a number is needed"),
        (lambda a: ll.merge(a, "dare", seed=0.5), OptionError, "^seed is 0.5; a whole number is needed"),
        (lambda a: ll.merge(a, "fisher", normalize="no"), OptionError, "^normalize is 'no'; True or False is needed"),
        (lambda a: ll.merge(a, rank=[2]), OptionError, r"^rank is \[2\]; a whole number or a text is needed"),
        (lambda a: ll.merge(a, weights=["1", 2]), OptionError, r"^`weights` is \['1', 2\]; a Weights or a list"),
        (lambda a: ll.merge(a, base=3), OptionError, "^`base` is 3; a text is needed"),
        (lambda a: ll.merge(a, 3), OptionError, "^`method` is 3; a text is needed"),
        (lambda a: ll.interpolate(a, points=None), OptionError, "^points is None; a whole number is needed"),
        (lambda a: ll.interpolate(a, points=np.int64(1)), OptionError, "^points is 1; it must be at least 2"),
        (lambda a: ll.interpolate(a, on="cuda"), OptionError, "^`on` is 'cuda'; an Execution is needed"),
        (lambda a: ll.evaluate(a, progress="no"), OptionError, "^`progress` is 'no'; True or False is needed"),
        (lambda a: ll.sweep(a, trust_record="no"), OptionError, "^`trust_record` is 'no'; True or False is needed"),
        (lambda a: ll.compare_merges(a, options={"ties": 3}), OptionError, "'ties': 3}; a mapping of names is needed"),
        (lambda a: ll.Schedule(p0="0.1"), OptionError, "^p0 is '0.1'; a number is needed"),
        (lambda a: ll.Execution(workers=2), OptionError, "^`workers` is 2; what `open_workers` gives is needed"),
        (lambda a: ll.Execution(device=0), OptionError, "^`device` is 0; a device or a text is needed"),
        (lambda a: ll.Execution(device="cdua").place(), OptionError, "^device 'cdua' is not to be had here"),
        (lambda a: ll.Execution(cache="out"), OptionError, "^`cache` is 'out'; a Path is needed"),
        (lambda a: ll.Execution(progress=True), OptionError, "^`progress` is True; a function is needed"),
    ],
)
def test_what_does_not_fit_is_told_by_name(pair, call, error, text):
    with pytest.raises(error, match=text) as raised:
        call(pair[0])
    assert len(str(raised.value)) < 400


def test_a_record_from_elsewhere_may_do_what_it_may_on_the_command_line(pair, tmp_path):
    record = {"task": {"kind": "clip", "base": "x", "data": "y", "trust_remote_code": True}}
    foreign = dataclasses.replace(pair[0][0], record=record, origin=inspect(pair[1][0]).adapter.origin)
    foreign = dataclasses.replace(foreign, origin=dataclasses.replace(foreign.origin, own=False))
    for function in (ll.evaluate, ll.shapley, ll.interpolate, ll.stability, ll.sweep):
        with pytest.raises(TrustError, match="asks for trust_remote_code"):
            function([foreign, foreign], **QUIET)
