import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from making_adapters import random_adapter
from peft import LoraConfig
from tiny_models import adapter as in_memory
from tiny_models import update

from lora_lab.adapters.initial import shared_start
from lora_lab.adapters.lowrank import LowRank
from lora_lab.analysis.merge_tables.coefficients import _best
from lora_lab.analysis.merge_tables.rows import measured
from lora_lab.analysis.merge_tables.sets import joined, merge_sets_of, specs_of, tried
from lora_lab.analysis.merge_tables.table import ALONE, BASE, ENSEMBLE, CompareMerges
from lora_lab.errors import MismatchError, OptionError
from lora_lab.merging.merged import merge
from lora_lab.merging.methods import MERGES
from lora_lab.merging.sources import Sources
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.execution import Execution
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.tasks.scores.judging import Judge, kept, share
from lora_lab.tasks.task import Scores, Split

pytestmark = pytest.mark.usefixtures("few_digits")

TASKS = ("identity", "mod3")
CONFIG = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "fc1"]}
METHODS = ["average", "ties", "knots:dare"]


class Few(Digits):
    """Every 5th example, and no test split until it is allowed."""

    def _load(self, split):
        inputs = super()._load(split).inputs
        return Split({name: tensor[::5] for name, tensor in inputs.items()})


def made(folder, labelling, method, seed, scale=0.05):
    task = Few(labelling)
    adapter = random_adapter(
        task, folder / f"{labelling}-{method}-{seed}", LoraConfig(**CONFIG), seed=seed, scale=scale
    )
    return replace(adapter, record={"task": task.record, "method": method, "seed": seed})


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    order = itertools.product(("lora", "coto"), (0, 1), TASKS)
    return [made(folder, labelling, method, seed + 2 * i) for i, (method, seed, labelling) in enumerate(order)]


def again(adapters):
    """Seeds as the records have them, the weights different."""
    order = list(itertools.product(("lora", "coto"), (0, 1), TASKS))
    return [replace(a, record={**a.record, "seed": seed}) for a, (_, seed, _) in zip(adapters, order, strict=True)]


def tasks_of(adapters):
    return [Few(a.record["task"]["name"].removeprefix("digits/")) for a in adapters]


@pytest.fixture(scope="module")
def sets(adapters):
    return again(adapters)


def compared(adapters, tasks, *, cache=None, progress=None, confirm=None, **options):
    return CompareMerges(**options).run(adapters, tasks, Execution(cache=cache, progress=progress, confirm=confirm))


@pytest.fixture(scope="module")
def result(sets):
    return compared(sets, tasks_of(sets), methods=METHODS, coefficients=[0.5, 2.0])


def test_sets_are_the_adapters_of_one_method_and_seed(sets):
    merge_sets = merge_sets_of(sets, tasks_of(sets), [])
    assert [(each.method, each.seed, each.members) for each in merge_sets] == [
        ("lora", 0, (0, 1)),
        ("lora", 1, (2, 3)),
        ("coto", 0, (4, 5)),
        ("coto", 1, (6, 7)),
    ]


def test_adapters_of_different_seeds_are_one_set_where_there_is_one_a_task(sets):
    mixed = [sets[0], sets[3]]
    assert [each.members for each in merge_sets_of(mixed, tasks_of(mixed), [])] == [(0, 1)]


def test_adapters_of_unknown_methods_are_never_summed_up_with_others(sets):
    """Seeds of one task without a method: each combination is a column of its own, as is each set by seed."""
    task = sets[0].record["task"]
    one_task = [replace(a, record={**a.record, "task": task}, source=f"s{i}") for i, a in enumerate(sets)]
    known, bare = one_task[:2], [replace(a, record={"task": a.record["task"]}) for a in one_task[2:5]]
    merge_sets = merge_sets_of([*known, *bare], [Few("identity")] * 5, [(1.0, 1.0)])
    assert [each.method for each in merge_sets] == ["lora", "s2 + s3", "s2 + s4", "s3 + s4"]
    unknown = [replace(a, record={**a.record, "method": None}) for a in sets[:4]]
    assert len({each.method for each in merge_sets_of(unknown, tasks_of(unknown), [])}) == 2


def test_a_set_that_cannot_be_told_is_refused_by_name(sets):
    odd = [sets[0], sets[1], sets[2]]
    with pytest.raises(MismatchError, match="cannot be told which adapters belong together"):
        merge_sets_of(odd, tasks_of(odd), [])


def test_alone_is_the_adapter_on_its_own_task(sets, result):
    for index in (0, 3):
        (row,) = [r for r in result.rows(merge=ALONE) if r["adapter"].endswith(sets[index].label)]
        own = score(tasks_of(sets)[index], sets[index])
        assert row["accuracy"] == pytest.approx(own.accuracy)
        assert row["loss"] == pytest.approx(own.mean_loss, abs=1e-5)
        assert row["normalised"] == 1.0
        assert row["normalised_low"] == row["normalised_high"] == 1.0


def test_a_merge_is_scored_as_the_merged_adapter_itself_on_each_task(sets, result):
    sources = Sources(sets[:2], tasks=tasks_of(sets[:2]))
    (curve,) = [c for c in result.summary["curves"] if (c["set"], c["merge"]) == ("lora, seed 0", "ties")]
    assert curve["coefficient"] == [0.5, 1.0, 2.0]
    for i, coefficient in enumerate(curve["coefficient"]):
        merged = merge(sources, "ties", coefficient=coefficient, rank="largest").adapter
        own = [score(Few(labelling), merged, "validation") for labelling in TASKS]
        assert curve["accuracy"][i] == pytest.approx(np.mean([s.accuracy for s in own]))
        assert curve["loss"][i] == pytest.approx(np.mean([s.mean_loss for s in own]), abs=1e-5)
    for labelling in TASKS:
        (row,) = result.rows(set="lora, seed 0", merge="ties", chosen=True, task=f"digits/{labelling}")
        merged = merge(sources, "ties", coefficient=row["coefficient"], rank="largest").adapter
        own = score(Few(labelling), merged)
        assert row["accuracy"] == pytest.approx(own.accuracy)
        assert row["loss"] == pytest.approx(own.mean_loss, abs=1e-5)


def test_the_coefficient_is_chosen_on_validation_and_reported_on_test(result):
    assert len(result.summary["curves"]) == 4 * len(METHODS)
    for curve in result.summary["curves"]:
        ranked = [(round(n, 9), -loss) for n, loss in zip(curve["normalised"], curve["loss"], strict=True)]
        best = curve["coefficient"][ranked.index(max(ranked))]
        tested = result.rows(set=curve["set"], merge=curve["merge"])
        assert {row["coefficient"] for row in tested if row["chosen"]} == {best}
        assert {row["coefficient"] for row in tested} == {best, 1.0}


def test_the_ensemble_averages_logits_under_each_head(sets, result):
    logits = []
    for adapter in sets[:2]:
        bare = replace(adapter, record={})
        logits.append(_logits(Few("mod3"), bare))
    labels = Few("mod3").split("test").inputs["labels"]
    expected = Scores.of(sum(logits) / 2, labels)
    (row,) = result.rows(set="lora, seed 0", merge=ENSEMBLE, task="digits/mod3")
    assert row["accuracy"] == pytest.approx(expected.accuracy)
    assert row["loss"] == pytest.approx(expected.mean_loss, abs=1e-5)


def _logits(task, adapter):
    import torch

    from lora_lab.adapters.models.attached import attach

    with attach(task.build_model(), adapter) as attached, torch.inference_mode():
        return attached.model(pixel_values=task.split("test").inputs["pixel_values"]).logits


def test_every_number_on_the_test_split_has_an_interval_around_it(result):
    for row in result.rows():
        assert row["lost"] is None
        for key in ("accuracy", "normalised"):
            assert row[f"{key}_low"] <= row[key] <= row[f"{key}_high"]
    for row in result.summary["sets"]:
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]


def test_seeds_of_a_method_are_summed_up(result):
    (row,) = [r for r in result.summary["by_method"] if (r["method"], r["merge"]) == ("lora", "ties")]
    values = [
        r["accuracy"] for r in result.summary["sets"] if r["method"] == "lora" and r["merge"] == "ties" and r["chosen"]
    ]
    assert row["sets"] == 2
    assert row["accuracy"] == pytest.approx(np.mean(values))
    assert row["accuracy_spread"] == pytest.approx(np.std(values, ddof=1))


def test_equal_seeds_give_equal_results_and_another_bootstrap_only_other_intervals(sets):
    one, two, other = (
        compared(sets[:2], tasks_of(sets[:2]), methods=["average"], coefficients=[1.0], seed=seed) for seed in (0, 0, 1)
    )
    assert one.columns == two.columns
    assert one.columns["accuracy"] == other.columns["accuracy"]
    assert one.columns["normalised_low"] != other.columns["normalised_low"]
    assert one.columns["accuracy_low"] == other.columns["accuracy_low"]  # of one task's accuracy no bootstrap is needed


def test_a_killed_run_goes_on_where_it_was(sets, tmp_path):
    options = {"methods": ["average", "ties"], "coefficients": [0.5], "cache": tmp_path}

    def kill(done, total):
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compared(sets[:2], tasks_of(sets[:2]), progress=kill, **options)
    resumed = compared(sets[:2], tasks_of(sets[:2]), **options)
    whole = compared(sets[:2], tasks_of(sets[:2]), **{**options, "cache": None})
    assert resumed.columns == whole.columns
    assert resumed.provenance["evaluations"] == whole.provenance["evaluations"] - 9


def test_a_finer_grid_computes_only_what_is_new(sets, tmp_path):
    options = {"methods": ("average",), "cache": tmp_path}
    first, second = (
        compared(sets[:2], tasks_of(sets[:2]), coefficients=grid, **options) for grid in ((1.0,), (1.0, 0.5))
    )
    assert (
        first.provenance["evaluations"] == 2 * 2 + 2 * 2 + 2 * 2
    )  # adapters; bases, ensembles; the merge: on two tasks
    chosen = {row["coefficient"] for row in second.rows(merge="average")}
    assert second.provenance["evaluations"] == 2 + 2 * (0.5 in chosen)


def test_other_training_data_are_another_question_to_methods_that_look_at_them(sets, tmp_path):
    """With a journal of what was merged before, as with none."""

    def relabelled():
        tasks = tasks_of(sets[:2])
        for task in tasks:
            inputs = task.split("train").inputs
            task._splits["train"] = Split({**inputs, "pixel_values": inputs["pixel_values"].flip(-1) * 3})
        return tasks

    asked = {"methods": ("regmean",), "coefficients": (1.0,), "options": {"regmean": {"examples": 32}}}
    first = compared(sets[:2], tasks_of(sets[:2]), cache=tmp_path, **asked)
    second = compared(sets[:2], relabelled(), cache=tmp_path, **asked)
    afresh = compared(sets[:2], relabelled(), **asked)
    assert second.columns == afresh.columns != first.columns
    assert second.provenance["run"] == afresh.provenance["run"] != first.provenance["run"]
    ids = {CompareMerges(methods=("ties",)).run_id(sets[:2], tasks) for tasks in (tasks_of(sets[:2]), relabelled())}
    assert len(ids) == 1


def test_another_content_of_the_base_that_is_given_is_another_question(sets, tmp_path):
    question, ids = CompareMerges(methods=("ties",), base_name=str(tmp_path)), set()
    for content in ("first", "second"):
        (tmp_path / "model.safetensors").write_text(content)
        ids.add(question.run_id(sets[:2], tasks_of(sets[:2])))
    assert len(ids) == 2


def test_progress_ends_at_its_total_and_the_cost_is_told_first(sets):
    told = []
    compared(
        sets[:2],
        tasks_of(sets[:2]),
        methods=["average", "fisher"],
        options={"fisher": {"examples": 8}},
        coefficients=[1.0],
        progress=lambda done, total: told.append((done, total)),
        confirm=lambda cost: told.append(cost),
    )
    assert told[0].variants == told[1][1]
    assert told[0].seconds > 0
    assert told[-1][0] <= told[-1][1]


def test_a_method_that_cannot_merge_is_left_out_and_says_why(sets, tmp_path):
    task = Few("mod3")
    wide = random_adapter(task, tmp_path / "wide", LoraConfig(**{**CONFIG, "r": 3}), scale=0.05)
    wide = replace(wide, record={"task": task.record, "method": "lora", "seed": 0})
    result = compared(
        [sets[0], wide], [Few("identity"), task], methods=["factor-average", "average"], coefficients=[1.0]
    )
    assert [(row["merge"], row["set"]) for row in result.summary["skipped"]] == [("factor-average", "lora, seed 0")]
    assert "ranks 2, 3" in result.summary["skipped"][0]["why"]
    assert result.rows(merge="average")
    assert not result.rows(merge="factor-average")
    with pytest.raises(OptionError, match="no method can merge these"):
        compared([sets[0], wide], [Few("identity"), task], methods=["factor-average"])


def test_seeds_of_one_task_are_merged_in_every_combination_of_every_ratio(tmp_path):
    seeds = [made(tmp_path, "identity", "lora", seed) for seed in (0, 1, 2)]
    tasks = [Few("identity")] * 3
    result = compared(seeds, tasks, methods=["average"], coefficients=[1.0], ratios=[(0, 1), (1, 2), (1, 1, 1)])
    sums = {(row["ratio"], row["merge"]): row["sets"] for row in result.summary["by_method"]}
    assert sums == {
        ("0:1", BASE): 3,
        ("0:1", ALONE): 3,
        ("1:2", ENSEMBLE): 3,
        ("1:2", "average"): 3,
        ("1:1:1", ENSEMBLE): 1,
        ("1:1:1", "average"): 1,
    }
    (row,) = result.rows(ratio="1:1:1", merge="average")
    mean = merge(Sources(seeds), "average").adapter
    own = score(Few("identity"), mean)
    assert row["accuracy"] == pytest.approx(own.accuracy)
    alone = np.mean([score(Few("identity"), seed).accuracy for seed in seeds])
    assert row["normalised"] == pytest.approx(own.accuracy / alone)


def test_a_ratio_given_twice_is_two_sets_of_the_same_numbers(tmp_path):
    seeds, ratios = [made(tmp_path, "identity", "lora", seed) for seed in (0, 1)], ((1.0, 1.0), (1.0, 1.0))
    result = compared(seeds, [Few("identity")] * 2, methods=("average",), coefficients=(1.0,), ratios=ratios)
    first, second = result.rows(merge="average", chosen=True)
    assert first == second
    assert result.provenance["evaluations"] == 2 * 2 + 1 + 2  # adapters on two splits, ensemble, merge on two splits


def test_each_source_brings_its_own_head(tmp_path):
    config = LoraConfig(**CONFIG, modules_to_save=["classifier"])
    found = []
    for labelling in TASKS:
        task = Few(labelling)
        adapter = random_adapter(task, tmp_path / labelling, config, scale=0.05)
        assert adapter.others
        found.append(replace(adapter, record={"task": task.record, "method": "lora", "seed": 0}))
    tasks = [Few(labelling) for labelling in TASKS]
    result = compared(found, tasks, methods=["average"], coefficients=[1.0])
    merged = merge(Sources(found), "average", heads="keep-own")
    for (label, heads), adapter, task in zip(merged.heads.items(), found, tasks, strict=True):
        assert adapter.label == label
        whole = replace(
            merged.adapter,
            tensors={**merged.adapter.tensors, **heads},
            config={**merged.adapter.config, "modules_to_save": ["classifier"]},
        )
        (row,) = result.rows(merge="average", task=task.name)
        assert row["loss"] == pytest.approx(score(task, whole).mean_loss, abs=1e-5)


def test_names_stand_for_merges_with_their_options():
    specs = specs_of(["all"], {"ties": {"density": 0.4}})
    assert len(specs) == len(MERGES)
    assert {spec.name: spec.options for spec in specs}["ties"] == {"density": 0.4}
    assert [(spec.method, spec.options) for spec in specs_of(["knots:dare"], {})] == [("knots", {"inner": "dare"})]
    with pytest.raises(OptionError, match="did you mean 'ties'"):
        specs_of(["tise"], {})
    with pytest.raises(OptionError, match="not among the methods"):
        specs_of(["ties"], {"dare": {"density": 0.4}})
    with pytest.raises(OptionError, match="did you mean 'density'"):
        specs_of(["ties"], {"ties": {"denstiy": 0.4}})


def test_names_of_one_line_are_one_row(sets):
    """Average at c is task arithmetic at c / Σw; cat is task arithmetic."""
    specs = specs_of(["average", "ties", "cat", "task-arithmetic"], {})
    kept, stands_for = joined(specs)
    assert [spec.name for spec in kept] == ["average", "ties"]
    assert stands_for == {"average": ["cat", "task-arithmetic"]}
    assert joined(specs[:2]) == (specs[:2], {})
    scaled = specs_of(["task-arithmetic", "average"], {"average": {"scale": 2.0}})
    assert joined(scaled) == (scaled, {})
    pair = sets[:2]
    found = compared(pair, tasks_of(pair), methods=["task-arithmetic", "average", "cat"], coefficients=[2.0])
    alone = compared(pair, tasks_of(pair), methods=["average"], coefficients=[2.0])
    assert found.parameters["merges"] == ["task-arithmetic"]
    assert found.parameters["stands_for"] == {"task-arithmetic": ["average", "cat"]}
    (curve,), (other,) = found.summary["curves"], alone.summary["curves"]
    assert curve["coefficient"] == [0.5, 1.0, 2.0]  # 0.5 and 1 are average at 1 and at 2
    assert curve["loss"][:2] == pytest.approx(other["loss"], rel=1e-4)
    everything = {"methods": ["task-arithmetic", "average", "cat"], "coefficients": [2.0]}
    assert found.provenance["run"] == CompareMerges(**everything).run_id(pair, tasks_of(pair))
    assert found.provenance["run"] != alone.provenance["run"]


@pytest.mark.parametrize("method", ["average", "task-arithmetic"])
def test_a_sum_that_stands_for_another_name_is_tried_where_that_one_is_at_one(sets, method):
    merge_sets = merge_sets_of(sets, tasks_of(sets), [])
    other = {"average": "task-arithmetic", "task-arithmetic": "average"}[method]
    specs, stands_for = joined(specs_of([method, other, "ties"], {}))
    found = tried(specs, merge_sets, stands_for)
    assert [spec.also for spec in found] == [(2.0,) if method == "average" else (0.5,), ()]


class _Watched(dict):
    """Sites that tell in which order they are asked for."""

    def __init__(self, sites, asked):
        super().__init__(sites)
        self._asked = asked

    def __getitem__(self, name):
        self._asked.append(name)
        return super().__getitem__(name)


def test_adapters_that_began_alike_are_told_by_their_rows(sets):
    """Noise of half the size beside a common A: cosine 1 / 1.25, against 0 of independent ones."""
    shapes = {f"layers.{i}.q": (6, 64) for i in range(4)}

    def trained(seed):
        own = torch.Generator().manual_seed(seed)
        start = {n: torch.randn(8, s[1], generator=torch.Generator().manual_seed(7)) for n, s in shapes.items()}
        made = {
            n: LowRank(A + 0.5 * torch.randn(A.shape, generator=own), torch.randn(6, 8, generator=own))
            for n, A in start.items()
        }
        return in_memory(made)

    alike = [trained(seed) for seed in range(3)]
    apart = [in_memory({n: update(8, s, 10 * i + j) for j, (n, s) in enumerate(shapes.items())}) for i in range(3)]
    found = shared_start(alike)
    assert found["shared"] is True
    assert found["cosine"] == pytest.approx(0.8, abs=0.04)
    assert found["z"] == pytest.approx(found["cosine"] * math.sqrt(8 * 64))
    separate = shared_start(apart)
    assert separate["shared"] is False
    assert abs(separate["z"]) < 2
    assert shared_start([alike[0], alike[1], apart[0]])["shared"] is None
    other_rank = in_memory({n: update(4, s, 0) for n, s in shapes.items()})
    assert shared_start([alike[0], other_rank]) == {"cosine": None, "z": None, "shared": None}
    asked = []
    seen = [replace(a, sites=_Watched(a.sites, asked)) for a in alike[:2]]
    assert shared_start(seen) == shared_start(alike[:2])
    assert list(dict.fromkeys(asked)) == sorted(shapes)  # sums are rounded, so that their order counts
    told = compared(sets[:2], tasks_of(sets[:2]), methods=["cat"], coefficients=[1.0])
    (row,) = told.summary["shared_initial_A"]
    assert row["shared"] is False


def test_the_latex_table_has_a_line_for_each_merge_and_columns_for_each_method(result):
    lines = result.to_latex().splitlines()
    assert lines[0] == r"\begin{tabular}{lrrrrrrrrrr}"  # two columns once, and four for each of two methods
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert [line.partition(" & ")[0] for line in body] == [BASE, ALONE, ENSEMBLE, *METHODS]
    assert all(line.count("&") == 10 and line.endswith(r"\\") for line in body)
    assert r"\pm" in body[0]


def test_too_few_adapters_and_impossible_ratios_are_refused(sets):
    with pytest.raises(OptionError, match="two adapters or more"):
        merge_sets_of(sets[:1], tasks_of(sets[:1]), [])
    same = [sets[0], sets[2]]
    with pytest.raises(OptionError, match="ratio"):
        merge_sets_of(same, tasks_of(same), [(-1.0, 2.0)])
    with pytest.raises(OptionError, match="nothing to merge"):
        merge_sets_of(same, tasks_of(same), [(1.0, 1.0, 1.0)])


def test_a_result_survives_the_file(result, tmp_path):
    result.save(tmp_path / "compare.json")
    assert type(result).load(tmp_path / "compare.json").columns == result.columns


def test_an_adapter_that_is_never_right_has_no_share_of_its_accuracy():
    assert np.isnan(share(np.array([0.2, 0.0]), np.array([0.0, 0.0]))).all()
    assert share(np.array([[0.2, 0.1]]), np.array([0.4, 0.1])).tolist() == [[0.5, 1.0]]
    wrong = Scores.judged(np.ones(40), np.zeros(40, bool), np.zeros(40))
    right = Scores.judged(np.ones(40), np.arange(40) % 2 == 0, np.zeros(40))
    by = [Judge(Few("mod3"), Few("mod3").split("test"), (), right)]
    never = kept(by, np.array([[0.1], [0.3]]), np.array([0.0]))
    assert _best([0.5, 1.0], never.tolist(), [1.0, 2.0]) == 1.0
    (row,), whole = measured({}, [("t", "a")], [[right]], [[wrong]], by, 0)
    for cells in (row, whole):
        assert cells["accuracy"] == 0.5
        assert cells["accuracy_low"] < 0.5 < cells["accuracy_high"]
        assert all(np.isnan(cells[f"normalised{end}"]) for end in ("", "_low", "_high"))
    rarely = Scores.judged(np.ones(40), np.arange(40) == 0, np.zeros(40))  # many resamples miss the one right answer
    (row,), _ = measured({}, [("t", "a")], [[rarely]], [[rarely]], by, 0)
    assert (row["normalised_low"], row["normalised"], row["normalised_high"]) == (1.0, 1.0, 1.0)


def test_the_question_is_its_record_and_its_checks(sets):
    question = CompareMerges(methods=("average",), coefficients=(1.0,), ratios=((1.0, 2.0),))
    told = question.run(sets[:2], tasks_of(sets[:2]))
    names = ("options", "coefficients", "ratios", "base_name", "split", "seed")
    assert {name: told.parameters[name] for name in names} == {name: question.record[name] for name in names}
    assert question.record["ratios"] == ["1:2"]
    assert told.provenance["run"] == question.run_id(sets[:2], tasks_of(sets[:2]))
    with pytest.raises(OptionError, match="coefficient is inf"):
        CompareMerges(coefficients=(math.inf,))
    with pytest.raises(OptionError, match="did you mean 'ties'"):
        CompareMerges(methods=("tise",)).check(sets[:2])


def test_on_some_examples_every_model_is_scored_on_these_alone(sets):
    """The whole of the numbers are those of a task whose splits are the drawn examples."""

    class Drawn(Few):
        def _load(self, split):
            return super()._load(split).subset(9)

    pair = sets[:2]
    drawn = compared(pair, tasks_of(pair), methods=["average"], coefficients=[0.5], examples=9)
    alone = compared(
        pair,
        [Drawn(t.record["name"].removeprefix("digits/")) for t in tasks_of(pair)],
        methods=["average"],
        coefficients=[0.5],
    )
    for name, values in drawn.columns.items():
        assert list(values) == list(alone.columns[name]), name
    assert drawn.provenance["examples"] == 9
    assert drawn.provenance["run"] != alone.provenance["run"]
