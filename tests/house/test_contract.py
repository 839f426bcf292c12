"""What an entry must carry: a throw-away one in each registry is used as a built-in one is."""

import ast
import json
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from making_adapters import random_adapter
from peft import LoraConfig

from lora_lab import plots
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.formats.layout import Content, Format, Layout, Part
from lora_lab.adapters.formats.registry import FORMATS
from lora_lab.adapters.groups import PLAYERS, by_label
from lora_lab.adapters.lowrank import combine
from lora_lab.analysis.coalitions.game import WORTHS
from lora_lab.analysis.lines.connectivity import BARRIERS, Barrier, Interpolate
from lora_lab.analysis.lines.curves.control_points import CURVES, CurveShape
from lora_lab.analysis.lines.landscape import Curve
from lora_lab.analysis.merge_tables.table import CompareMerges
from lora_lab.analysis.questions import Evaluate, Shapley, Sweep
from lora_lab.claims.statistics import STATISTICS, Statistic
from lora_lab.claims.verdicts import Value
from lora_lab.errors import OptionError
from lora_lab.games.estimators import ESTIMATORS, Estimator, antithetic
from lora_lab.geometry.nulls import NULLS, Null, in_every_module
from lora_lab.merging.kinds import MATRICES, UPDATES
from lora_lab.merging.merged import merge
from lora_lab.merging.methods import MERGES, Merge
from lora_lab.merging.paths import SPACES, Space
from lora_lab.merging.sources import Sources
from lora_lab.plots.registry import PLOTS, View
from lora_lab.pruning.entries import CRITERIA, Criterion, prune_weights
from lora_lab.pruning.modules import keep_modules
from lora_lab.pruning.patterns import KEEPS, Keep, choice_of, keep
from lora_lab.pruning.ranks import RANK_ORDERS, RankOrder, keep_ranks
from lora_lab.registry import Registry
from lora_lab.scoring.execution import Execution
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.tasks.kinds.registry import KINDS, TaskKind, from_record
from lora_lab.tasks.scores.metrics import METRICS, mean_of
from lora_lab.training.fit import train
from lora_lab.training.recipe import METHODS, Method, Recipe
from lora_lab.training.schedule import MASK_LAWS, RAMPS, MaskLaw, uniform

pytestmark = pytest.mark.usefixtures("few_digits", "quick_figures")

ROOT = Path(__file__).parents[2]
TARGETS = r"vit\.layers\.[0-3]\..*q_proj"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS)
    made = [random_adapter(Digits("relabel"), folder / f"s{i}", config, seed=i, scale=0.1) for i in (0, 1)]
    return [replace(adapter, record={"method": "lora", "seed": seed}) for seed, adapter in enumerate(made)]


@pytest.fixture
def command(pair, lora_lab, tmp_path):
    """Runs a verb of the installed command on the pair, or on so many of it; gives what it prints, read as JSON."""

    def run(verb, *options, of=2):
        paths = [adapter.save(tmp_path / f"s{i}.safetensors", force=True) for i, adapter in enumerate(pair[:of])]
        code, out, err = lora_lab(verb, *paths, *options, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


ON_TASK = ("--task", "digits/relabel", "--split", "validation")


@pytest.fixture
def add(monkeypatch):
    """Puts an entry into a registry for the time of a test."""
    return lambda registry, entry: monkeypatch.setitem(registry.entries, "throwaway", entry)


def asked(question, adapters, *views):
    """The answer, its cost told before, and its figures drawn."""
    costs = []
    result = question.run(adapters, Digits("relabel"), Execution(confirm=costs.append))
    for view in views:
        assert plots.figure([result], kind=view).axes
    return result


def test_a_space(pair, add, command):
    add(SPACES, Space(lambda updates, weights: 2.0 * combine(updates, weights), needs_factors=False))
    question = Interpolate(points=3, spaces=("throwaway",), ratios=((1.0, 1.0),), split="validation")
    result = asked(question, pair, "interpolate", "interpolate:matrix", "interpolate:ratios")
    middle = result.rows(space="throwaway", t=0.5)[0]
    delta = Interpolate(points=3, spaces=("delta",), split="validation").run(pair, Digits("relabel"))
    assert middle["norm"] == pytest.approx(2 * delta.rows(t=0.5)[0]["norm"], rel=1e-5)
    told = command("interpolate", *ON_TASK, "--space", "throwaway", "--points", 3, "--ratios", "1:1")
    assert told["columns"] == result.columns


def test_a_barrier(pair, add, command):
    add(BARRIERS, Barrier(lambda L, t: L - L[0]))
    result = asked(Interpolate(points=3, spaces=("delta",), split="validation"), pair, "interpolate")
    found = [row for row in result.summary["barriers"] if row["barrier"] == "throwaway"]
    for row in found:
        curve = result.columns["loss"] if row["metric"] == "loss" else [1 - a for a in result.columns["accuracy"]]
        assert row["value"] == pytest.approx(max(each - curve[0] for each in curve))
    told = command("interpolate", *ON_TASK, "--space", "delta", "--points", 3)["summary"]["barriers"]
    assert [row for row in told if row["barrier"] == "throwaway"] == found != []


def test_a_curve(pair, add, command):
    add(CURVES, CurveShape(lambda t: (1 - t, 0.0, t)))  # a straight line, whatever the control point is
    question = Curve(points=3, shapes=("throwaway",), spaces=("delta",), steps=1, checks=1, split="validation")
    result = asked(question, pair, "curve", "curve:arc")
    line, curve = (result.rows(path=path)[1] for path in ("line", "throwaway"))
    assert curve["loss"] == pytest.approx(line["loss"], rel=1e-5)
    few = ("--shapes", "throwaway", "--spaces", "delta", "--points", 3, "--steps", 1, "--checks", 1)
    assert command("curve", *ON_TASK, *few)["columns"] == result.columns


def test_a_metric(pair, add, command, monkeypatch):
    add(METRICS, mean_of("correct", "twice", unit="x"))
    monkeypatch.setattr(Digits, "metrics", ("accuracy", "loss", "throwaway"))
    result = Evaluate(split="validation").run(pair[:1], Digits("relabel"))
    assert result.columns["throwaway"] == result.columns["accuracy"]
    assert result.parameters["metrics"]["throwaway"] == {"about": "twice", "unit": "x", "higher": True}
    assert command("evaluate", *ON_TASK, "--metric", "throwaway", of=1)["columns"]["throwaway"]


def test_a_worth_and_a_set_of_players_and_an_estimator(pair, add, command):
    add(WORTHS, lambda scores: scores.correct * 2.0)
    add(PLAYERS, by_label("throwaway", lambda name, place, block: f"half {int(place.layer) % 2}"))
    add(ESTIMATORS, Estimator(antithetic, bias=lambda n, options: "its name"))
    question = Shapley(players="throwaway", worth="throwaway", estimator="throwaway", samples=4, split="validation")
    result = asked(question, pair[:1], "shapley")
    (summary,) = result.summary["adapters"]
    assert {row["player"] for row in result.rows()} == {"half 0", "half 1"}
    assert (summary["estimator"], summary["bias"]) == ("throwaway", "its name")
    assert sum(row["value"] for row in result.rows()) == pytest.approx(summary["full"] - summary["empty"])
    words = [part for name in ("players", "worth", "estimator") for part in (f"--{name}", "throwaway")]
    assert command("shapley", *ON_TASK, *words, "--samples", 4, of=1)["columns"] == result.columns


def test_a_pattern_a_criterion_and_an_order_of_ranks(pair, add, command):
    add(KEEPS, Keep(lambda choice, argument: [name for name in choice.adapter.sites if argument in name], "PART"))
    assert keep(choice_of(pair[0]), "throwaway:layers.0") == ["vit.layers.0.attention.q_proj"]
    add(CRITERIA, Criterion(lambda tensor, generator: 1 / (1 + tensor.abs())))
    add(RANK_ORDERS, RankOrder(lambda update, generator: (update, list(range(update.rank)))))
    question = Sweep(
        kinds=("unstructured", "rank"), criteria=("throwaway",), sparsities=(0.5,), draws=2, split="validation"
    )
    result = asked(question, pair[:1], "sweep")
    assert {row["kind"] for row in result.rows(criterion="throwaway")} == {"unstructured", "rank"}
    assert all(row["draws"] == 1 for row in result.rows(criterion="throwaway"))
    assert plots.figure([result]).axes
    options = ("--unstructured", "--rank", "--criteria", "throwaway", "--sparsities", "0.5", "--draws", 2)
    assert command("sweep", *ON_TASK, *options, of=1)["columns"] == result.columns


@pytest.mark.parametrize(
    ("options", "by_hand"),
    [
        (["--keep", "throwaway:layers.0"], lambda whole: keep_modules(whole, [next(iter(whole.sites))])),
        (
            ["--method", "throwaway", "--sparsity", 0.5],
            lambda whole: prune_weights(whole, sparsity=0.5, by="throwaway").adapter,
        ),
        (["--rank", 1, "--rank-by", "throwaway"], lambda whole: keep_ranks(whole, {name: [0] for name in whole.sites})),
    ],
    ids=["pattern", "criterion", "order of ranks"],
)
def test_the_command_prunes_by_them(pair, add, command, tmp_path, options, by_hand):
    add(KEEPS, Keep(lambda choice, argument: [name for name in choice.adapter.sites if argument in name], "PART"))
    add(CRITERIA, Criterion(lambda tensor, generator: 1 / (1 + tensor.abs())))
    add(RANK_ORDERS, RankOrder(lambda update, generator: (update, list(range(update.rank)))))
    command("prune", *options, "-o", "small.safetensors", of=1)
    small, expected = Adapter.load(tmp_path / "small.safetensors"), by_hand(pair[0])
    assert small.sites.keys() == expected.sites.keys()
    for name, update in expected.updates.items():
        assert torch.equal(small.updates[name].delta(), update.delta())


def smallest(matrices, weights, *, scale=1.0):
    """The entry of the smallest size."""
    stack = torch.stack([weight * matrix for matrix, weight in zip(matrices, weights, strict=True)])
    return scale * stack.gather(0, stack.abs().argmin(0, keepdim=True))[0]


def first(updates, weights):
    """The first alone."""
    return updates[0]


@pytest.mark.parametrize("inner", [False, True])
def test_a_rule_is_a_merge_and_an_inner_rule(pair, add, command, tmp_path, inner):
    add(MERGES, Merge(smallest, MATRICES))
    method, options = ("knots", {"inner": "throwaway", "scale": 2.0}) if inner else ("throwaway", {"scale": 2.0})
    merged = merge(Sources(pair), method, options=options, heads="first", exact=True).adapter
    assert merged.record["merge"]["options"] == options
    settings = [part for name, value in options.items() for part in ("--set", f"{name}={value}")]
    command("merge", "--method", method, *settings, "--heads", "first", "--exact", "-o", "merged.safetensors")
    written = Adapter.load(tmp_path / "merged.safetensors")
    for name, update in merged.updates.items():
        assert torch.allclose(written.updates[name].delta(), update.delta(), atol=1e-6)
    if not inner:
        name = next(iter(merged.sites))
        deltas = [adapter.updates[name].delta() for adapter in pair]
        assert torch.allclose(merged.updates[name].delta(), smallest(deltas, [1, 1], scale=2.0), atol=1e-5)


def test_a_merge_in_a_comparison(pair, add):
    add(MERGES, Merge(first, UPDATES, data="labels", cost=lambda options, tasks: 100.0))
    costs = []
    question = CompareMerges(methods=("throwaway",), coefficients=(1.0,), ratios=((1.0, 1.0),))
    result = question.run(pair, [Digits("relabel")] * 2, Execution(confirm=costs.append))
    assert "throwaway" in {row["merge"] for row in result.rows()}
    assert costs
    assert plots.figure([result]).axes


def test_a_null(pair, add, command):
    add(NULLS, Null(in_every_module(lambda update, generator: -update), "nothing to speak of", random=False))
    asked = {"methods": ("cat",), "coefficients": (1.0,), "ratios": ((1.0, 1.0),), "nulls": ("throwaway",)}
    result = CompareMerges(**asked).run(pair, [Digits("relabel")] * 2)
    assert {row["null"] for row in result.summary["nulls"]} == {"throwaway"}
    assert plots.figure([result]).axes
    words = ("--methods", "cat", "--coefficients", "1", "--ratios", "1:1", "--nulls", "throwaway")
    told = command("compare-merges", "--task", "digits/relabel", *words)
    assert told["summary"]["nulls"] == json.loads(json.dumps(result.summary["nulls"]))


def doubled(tensors, factor):
    return {f"throwaway:{key}": tensor * (factor if "lora_B" in key else 1.0) for key, tensor in tensors.items()}


def test_a_format(pair, add, lora_lab, tmp_path):
    def read(raw):
        plain = {key.removeprefix("throwaway:"): tensor for key, tensor in raw.tensors.items()}
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": TARGETS}
        return Content(plain, config, Layout("throwaway"))

    def write(adapter):  # at a scale of 1, where PEFT's is alpha / r = 2
        return {"": Part(doubled(adapter.tensors, 2.0))}

    add(FORMATS, Format("a test's", lambda raw: any(k.startswith("throwaway:") for k in raw.tensors), read, write))
    path = pair[0].save(tmp_path / "own.safetensors", format="throwaway")
    again = Adapter.load(path)
    assert again.layout.format == "throwaway"
    for name, update in pair[0].updates.items():
        assert torch.equal(again.updates[name].delta(), update.delta())
    code, out, err = lora_lab("inspect", path, "--json")
    assert code == 0, err
    assert json.loads(out)["format"] == "throwaway"
    rewritten = Adapter.load(again.save(tmp_path / "again.safetensors"))  # in the format that it was read from
    assert rewritten.layout.format == "throwaway"
    with pytest.raises(OptionError, match="a format of lone files"):
        again.save(tmp_path / "folder")


def test_a_figure(pair, add, tmp_path, lora_lab):
    def drawn(results, panels):
        (ax,) = panels.grid(1, 1, 2.0)
        ax.plot(results[0].columns["t"], results[0].columns["norm"], label="norms")
        return [ax]

    add(PLOTS, View(drawn, "interpolate", "norms alone"))
    result = asked(Interpolate(points=3, spaces=("delta",), split="validation"), pair, "throwaway")
    assert plots.draw(result, "throwaway").lines[0].get_ydata() == pytest.approx(result.columns["norm"])
    result.save(tmp_path / "result.json")
    code, _, err = lora_lab("figure", "result.json", "--kind", "throwaway", "-o", "norms.pdf")
    assert code == 0, err
    assert (tmp_path / "norms.pdf").exists()


def test_every_registry_has_its_throwaway_entry():
    used = [globals()[name] for name in re.findall(r"^    add\((\w+),", Path(__file__).read_text(), re.M)]
    assert {registry.group for registry in used} == {registry.group for _, registry in registries()}


SHORT = {"steps": 2, "batch_size": 4, "rank": 2, "p0": 0.9, "target_modules": TARGETS}


def two_values(answer, where):
    return {(0,): Value(where["n"]), (1,): Value(2.0)}


def test_a_statistic_of_claims(add, lora_lab, tmp_path):
    add(STATISTICS, Statistic("one, two", two_values, None, ("n",)))
    rows = ["[testbed.small]", 'about = "x"', 'tasks = ["digits/relabel"]', "[testbed.small.recipe]", "steps = 1"]
    rows += ["rank = 2", f"target_modules = {json.dumps(TARGETS)}", "[[claim]]", 'name = "mine"', 'says = "y"']
    rows += ['source = "z"', 'statistic = "throwaway"', 'direction = "higher"', "least = 0.0", "where = { n = 1.0 }"]
    (tmp_path / "mine.toml").write_text("\n".join([*rows, 'treated = { method = "lora" }']))
    asked = ("--claims", "mine.toml", "--testbed", "small", "--seeds", 2, "--jobs", 1, "-o", "lab", "--json")
    code, out, err = lora_lab("reproduce", *asked)
    assert code == 0, err
    assert json.loads(out)["columns"]["of_treated"] == [1.5]


@pytest.mark.parametrize("constant", [False, True])
def test_a_training_method_its_law_and_its_ramp(add, lora_lab, tmp_path, constant):
    add(MASK_LAWS, MaskLaw(uniform, chances=(lambda p, groups: [p] * groups) if constant else None))
    add(RAMPS, lambda s: s * s)
    add(METHODS, Method("a law of one's own", law="throwaway", survival_scaled=constant))
    recipe = Recipe(method="throwaway", ramp="throwaway", **SHORT)
    adapter, result = train(Digits("relabel"), recipe)
    assert adapter.record["method"] == "throwaway"
    assert ("survival" in adapter.record) == constant
    assert result.columns["p"] == [
        0.9,
        0.9 if constant else pytest.approx(0.9 + 0.1 * 0.5**2),
    ]  # the ramp ends at ⌈0.75·2⌉ = 2 steps
    options = [part for name, value in SHORT.items() for part in (f"--{name.replace('_', '-')}", value)]
    words = ("--task", "digits/relabel", "--method", "throwaway", "--ramp", "throwaway")
    code, out, err = lora_lab("train", *words, *options, "-o", "a.safetensors", "--json")
    assert code == 0, err
    ((told),) = json.loads(out)
    assert told["columns"] == result.columns
    written = Adapter.load(tmp_path / "a.safetensors")
    assert written.record == adapter.record
    assert all(torch.equal(written.tensors[key], tensor) for key, tensor in adapter.tensors.items())
    assert (tmp_path / "a.train.pdf").exists()
    code, _, err = lora_lab("figure", "a.train.json", "-o", "run.pdf")
    assert code == 0, err
    assert (tmp_path / "run.pdf").exists()


class Described(Digits):
    """A digit task that is known by a description, as the ones of files are."""

    record = property(lambda self: {"kind": "throwaway", "labelling": self.labelling})


def test_a_kind_of_task(pair, add, lora_lab, tmp_path):
    add(KINDS, TaskKind(lambda keys, folder, where: Described(keys["labelling"]), 'kind = "throwaway"\n'))
    assert from_record({"kind": "throwaway", "labelling": "invert"}).name == Digits("invert").name
    assert lora_lab("tasks", "--example", "throwaway") == (0, 'kind = "throwaway"\n', "")
    assert "throwaway" in lora_lab("tasks")[1]
    (tmp_path / "mine.toml").write_text('kind = "throwaway"\nlabelling = "relabel"\n')
    options = [part for name, value in SHORT.items() for part in (f"--{name.replace('_', '-')}", value)]
    code, _, err = lora_lab("train", "--task", "mine.toml", *options, "-o", "a.safetensors")
    assert code == 0, err
    (tmp_path / "mine.toml").unlink()  # the adapter's record says it all
    code, out, err = lora_lab("evaluate", "a.safetensors", "--split", "validation", "--json")
    assert code == 0, err
    adapter = Adapter.load(tmp_path / "a.safetensors")
    assert json.loads(out)["columns"]["accuracy"][1] == adapter.record["metrics"]["validation"]["accuracy"]


OTHER_WORDS = {
    ("linear",): (
        "a kind of layer; mergekit's word for a method; matplotlib's for a scale",
        "adapters/adapter.py",
        "adapters/formats/peft/peft_format.py",
        "cli/studies/mergekit.py",
        "fusing/extract.py",
        "plots/sources/decompiling.py",
        "pruning/intruders.py",
    ),
    ("layer", "module"): ("parts of adapters, as rows name them", "geometry/intruders.py", "plots/views/places.py"),
    ("ties", "della", "breadcrumbs", "task_arithmetic"): ("mergekit's names of methods", "cli/studies/mergekit.py"),
    ("exact",): ("a finding on a checkpoint", "fusing/verify.py"),
    ("lora",): ("a kind of LyCORIS' updates", "adapters/formats/lycoris.py"),
    ("all",): (
        "a value of PEFT's bias; every merge",
        "adapters/formats/peft/peft_config.py",
        "analysis/merge_tables/sets.py",
    ),
    ("aligned",): ("the gauge in which factors are merged", "merging/rules/factors.py"),
    ("average",): ("how heads are merged", "adapters/whole.py"),
    ("accuracy", "loss"): (
        "metrics, as columns of results and keys of logs have them",
        "analysis/merge_tables/coefficients.py",
        "analysis/coalitions/sweep.py",
        "merging/validation/search.py",
        "plots/views/places.py",
        "plots/views/train.py",
        "training/trainer.py",
    ),
    ("rank",): ("a kind of pruning; an option of methods", "analysis/coalitions/sweep.py", "merging/merged.py"),
    ("module", "layer"): ("a level of tables", "geometry/intruders.py", "plots/views/places.py"),
    ("clip",): ("a model type of transformers", "tasks/kinds/images/clip.py"),
    ("train",): ("a split", "tasks/kinds/images/clip.py", "tasks/tables.py"),
    ("tuning",): ("a key of a record", "training/tuning.py"),
}
"""Words that are names of entries and mean something else in these files: what."""


def registries():
    """(module's file, registry) for each."""
    for path in sorted((ROOT / "lora_lab").rglob("*.py")):
        if not path.stem.startswith("__"):
            module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            assigned = {
                target.id
                for node in ast.parse(path.read_text()).body
                if isinstance(node, ast.Assign | ast.AnnAssign)
                for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
                if isinstance(target, ast.Name)
            }
            yield from ((path, getattr(module, name)) for name in assigned if isinstance(vars(module)[name], Registry))


def compared(path):
    """The texts that something is compared with in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        sides += [node.value] if isinstance(node, ast.MatchValue) else []
        for side in sides:
            parts = side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side]
            yield from (part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str))


def test_nothing_outside_of_a_registry_compares_with_the_name_of_an_entry():
    homes = {}
    for path, registry in registries():
        for name in registry:
            homes.setdefault(name, set()).add(path)
    allowed = {(file, word) for words, (_, *files) in OTHER_WORDS.items() for word in words for file in files}
    used = set()
    for path in [*(ROOT / "lora_lab").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]:
        file = str(path.relative_to(ROOT)).removeprefix("lora_lab/")
        for word in compared(path):
            if word in homes and path not in homes[word]:
                assert (file, word) in allowed, f"{file} compares with {word!r}, the name of an entry"
                used.add((file, word))
    assert {file for file, _ in used} == {file for file, _ in allowed}
