"""Merges at equal rank, their files' sizes, what nulls keep in the adapters' place, and what can be told of it all."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from making_adapters import random_adapter
from peft import LoraConfig
from safetensors.torch import load_file

from lora_lab.analysis.merge_tables.sets import specs_of
from lora_lab.analysis.merge_tables.table import ALONE, BASE, ENSEMBLE, CompareMerges
from lora_lab.analysis.merge_tables.verdicts import UNTOLD, NullScores, Outcomes, null_rows
from lora_lab.claims.asking import Answer
from lora_lab.claims.statistics import STATISTICS
from lora_lab.errors import MismatchError, OptionError, TunerError
from lora_lab.geometry.nulls import NULLS, null_adapter
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources
from lora_lab.merging.validation.search import EXACT, Grid, search
from lora_lab.merging.writing.export import save
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.execution import Execution
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.tasks.task import Split

pytestmark = pytest.mark.usefixtures("few_digits")

TASKS = ("identity", "mod3")
CONFIG = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "fc1"]}


class Few(Digits):
    """Every 5th example."""

    def _load(self, split):
        inputs = super()._load(split).inputs
        return Split({name: tensor[::5] for name, tensor in inputs.items()})


def made(folder, labelling, seed, **config):
    task = Few(labelling)
    adapter = random_adapter(
        task, folder / f"{labelling}-{seed}", LoraConfig(**{**CONFIG, **config}), seed=seed, scale=0.05
    )
    return replace(adapter, record={"task": task.record, "method": "lora", "seed": seed // 10})


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, few_digits):
    """Two sets of two tasks."""
    folder = tmp_path_factory.mktemp("tables")
    return [made(folder, labelling, 10 * seed + i) for seed in (0, 1) for i, labelling in enumerate(TASKS)]


def tasks_of(adapters):
    return [Few(a.record["task"]["name"].removeprefix("digits/")) for a in adapters]


def compared(adapters, *, cache=None, progress=None, confirm=None, **options):
    question = CompareMerges(**{"coefficients": (1.0,), **options})
    return question.run(adapters, tasks_of(adapters), Execution(cache=cache, progress=progress, confirm=confirm))


@pytest.fixture(scope="module")
def ranks(adapters):
    return compared(adapters, methods=("task-arithmetic", "ties", "tsv"), ranks=("largest", "sum", 1, EXACT))


def test_every_merge_is_of_the_rank_that_was_asked_for(ranks):
    found = {}
    for row in ranks.summary["sets"]:
        found.setdefault(row["merge"], set()).add((row["category"], row["rank"]))
    for name in ("task-arithmetic", "ties", "tsv"):
        assert found[name] == {("equal rank", 2)}
        assert found[f"{name} (sum)"] == {("equal rank", 4)}
        assert found[f"{name} (rank 1)"] == {("equal rank", 1)}
    assert found["task-arithmetic (exact)"] == {("exact", 4)}
    assert found["ties (exact)"] == {("exact", 64)}
    assert found[BASE] == found[ALONE] == found[ENSEMBLE] == {("reference", None)}


def test_claims_read_the_shares_and_scores_of_merges_with_numbers_of_their_examples(adapters):
    """Those of a score have its mean, over the tasks."""
    behind = {}
    on = Execution(by_example=lambda name, rows: behind.update({name: np.stack(rows)}))
    asked = CompareMerges(methods=("task-arithmetic",), coefficients=(1.0,))
    result = asked.run(adapters, tasks_of(adapters), on)
    sets = result.summary["sets"]
    assert sorted(behind) == ["scores 0", "scores 1", "sets 0", "sets 1"]
    means = behind["scores 0"].mean(1) + behind["scores 1"].mean(1)
    assert means == pytest.approx([row["accuracy"] for row in sets])
    answer, where = Answer(result, behind), {"merge": "task-arithmetic"}
    for name, cell in (("merged-score", "accuracy"), ("after-merging", "normalised")):
        values = STATISTICS[name].of(answer, where)
        wanted = {(row["seed"],): row[cell] for row in sets if row["merge"] == "task-arithmetic"}
        assert {unit: value.value for unit, value in values.items()} == wanted
        assert sorted(wanted) == [(0,), (1,)]
        assert {len(value.examples) for value in values.values()} == {2}
        for value in values.values():  # numbers of a share vary as it does about 0, those of a score are its own
            behind_it = sum(each.mean() for each in value.examples)
            assert behind_it == pytest.approx(value.value if cell == "accuracy" else 0.0, abs=1e-6)


@pytest.mark.parametrize("name", ["ties", "ties (exact)", "tsv (rank 1)", "task-arithmetic (sum)"])
def test_sizes_and_errors_are_those_of_the_file(adapters, ranks, name, tmp_path):
    method, _, rank = name.partition(" (")
    how = {"": {"rank": "largest"}, "exact)": {"exact": True}, "rank 1)": {"rank": 1}, "sum)": {"rank": "sum"}}[rank]
    merged = merge(Sources(adapters[:2]), method, **how)
    save(merged, tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    row = next(r for r in ranks.rows(merge=name) if r["set"] == "lora, seed 0")
    assert row["bytes"] == sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    assert row["cut_error"] == pytest.approx(merged.error, abs=1e-6)
    file = (tmp_path / "merged" / "adapter_model.safetensors").read_bytes()
    assert row["bytes"] == len(file) - 8 - int.from_bytes(file[:8], "little")


def test_the_ensemble_and_routing_take_the_files_of_all(adapters, ranks):
    size = sum(t.numel() * t.itemsize for a in adapters[:2] for t in a.tensors.values())
    for name in (ALONE, ENSEMBLE):
        assert {row["bytes"] for row in ranks.summary["by_method"] if row["merge"] == name} == {size}
    assert {row["bytes"] for row in ranks.summary["by_method"] if row["merge"] == BASE} == {0}


def test_half_precision_is_half_the_size(adapters):
    half = [
        replace(a, tensors={key: tensor.to(torch.bfloat16) for key, tensor in a.tensors.items()}) for a in adapters[:2]
    ]
    sizes = [
        next(r["bytes"] for r in compared(given, methods=("ties",)).rows(merge="ties"))
        for given in (half, adapters[:2])
    ]
    assert sizes[1] == 2 * sizes[0]


def test_the_base_alone_has_the_head_of_each_task(ranks):
    for labelling in TASKS:
        own = score(Few(labelling), None)
        for row in ranks.rows(merge=BASE, task=f"digits/{labelling}"):
            assert row["accuracy"] == pytest.approx(own.accuracy)
            assert row["loss"] == pytest.approx(own.mean_loss, abs=1e-5)


def test_one_rank_joins_sums_and_others_stay(adapters):
    found = compared(adapters[:2], methods=("cat", "average"), ranks=("largest", EXACT))
    assert found.parameters["merges"] == ["cat", "cat (exact)"]
    assert found.parameters["stands_for"] == {"cat": ["average"], "cat (exact)": ["average"]}
    assert [spec.name for spec in specs_of(["ties"], {}, ("sum", 3, "sum"))] == ["ties", "ties (rank 3)"]


def test_a_search_scores_what_will_be_written(adapters):
    sources = Sources(adapters[:2], tasks=tasks_of(adapters[:2]))
    for rank, how in ((None, {}), (1, {"rank": 1}), (EXACT, {"exact": True})):
        (trial,) = search(sources, "ties", {"coefficient": Grid((0.7,))}, rank=rank).trials
        written = merge(sources, "ties", coefficient=0.7, **how).adapter
        losses = [score(Few(labelling), written, "validation").mean_loss for labelling in TASKS]
        assert trial["loss"] == pytest.approx(np.mean(losses), abs=1e-5)


NULLED = {"methods": ("task-arithmetic", "ties"), "nulls": ("spectrum", "negative"), "draws": 3, "replaced": ("all",)}


@pytest.fixture(scope="module")
def nulled(adapters):
    return compared(adapters[:2], **NULLED)


@pytest.mark.parametrize("replaced", ["others", "all"])
def test_a_null_stands_where_the_adapter_stood(adapters, replaced):
    """By hand: for each kept adapter a merge of its own, scored on its task alone."""
    pair, tasks = adapters[:2], tasks_of(adapters[:2])
    found = compared(pair, methods=("ties",), nulls=("spectrum",), draws=1, replaced=(replaced,))
    shares = []
    for k, task in enumerate(tasks):
        given = [
            a if replaced == "others" and i == k else null_adapter(a, "spectrum", 0, 0, i) for i, a in enumerate(pair)
        ]
        merged = merge(Sources(given), "ties", rank="largest").adapter
        shares.append(score(task, merged).accuracy / score(task, pair[k]).accuracy)
    (row,) = found.summary["nulls"]
    assert row["normalised"] == row["normalised_low"] == row["normalised_high"] == pytest.approx(np.mean(shares))
    (real,) = [r["normalised"] for r in found.summary["by_method"] if r["merge"] == "ties"]
    assert row["of_adapters"] == pytest.approx(real)
    assert (row["sets"], row["draws"]) == (1, 1)


def test_too_few_draws_and_a_null_that_is_not_drawn_have_no_p_value_and_say_why(nulled):
    why = {row["null"]: row["why"] for row in nulled.summary["nulls"]}
    assert why == {
        "spectrum": "3 draws cannot give a p-value below 0.25; at least 20 are needed",
        "negative": "negative is one adapter, and none of many",
    }
    assert all(row["p"] is row["p_holm"] is row["verdict"] is None for row in nulled.summary["nulls"])
    assert {row["draws"] for row in nulled.summary["nulls"] if row["null"] == "negative"} == {1}
    assert all(row["p_nulls"] is None for row in nulled.summary["by_method"])


def test_twenty_draws_give_a_p_value(adapters):
    found = compared(adapters[:2], methods=("cat",), nulls=("gaussian",), draws=20, replaced=("all",))
    (row,) = found.summary["nulls"]
    assert row["p"] in [pytest.approx(k / 21) for k in range(1, 22)]
    assert row["p"] + row["p_below"] >= 1 + 1 / 21 - 1e-9  # ties count in both
    assert row["why"] is None
    (whole,) = [r for r in found.summary["by_method"] if r["merge"] == "cat"]
    assert whole["p_nulls"] == row["p"] == row["p_holm"]


def test_the_cost_is_told_and_a_killed_run_of_nulls_goes_on(adapters, tmp_path):
    options = {"methods": ("ties",), "nulls": ("permuted",), "draws": 1}
    costs = []
    whole = compared(adapters[:2], confirm=costs.append, **options)
    # adapters on two splits, bases and ensembles; the merge: validation, test; 2 × 1 draws of it: the same
    assert costs[0].variants == 2 * 2 + 2 * 2 + 2 * 3 + 2 * 2 * 2
    assert whole.provenance["evaluations"] == 2 * 2 + 2 * 2 + 2 * 2 + 2 * 2 * 2

    def kill(done, total):
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compared(adapters[:2], cache=tmp_path, progress=kill, **options)
    resumed = compared(adapters[:2], cache=tmp_path, **options)
    assert resumed.columns == whole.columns
    assert resumed.summary == whole.summary
    assert resumed.provenance["evaluations"] == whole.provenance["evaluations"] - 15


def test_draws_are_merged_once_for_all_coefficients(adapters, monkeypatch):
    from lora_lab.merging.validation import search as searching

    counted = []
    monkeypatch.setattr(searching, "merge", lambda *a, **k: counted.append(1) or merge(*a, **k))
    compared(adapters[:2], coefficients=(0.3, 0.5, 2.0), methods=("cat",), nulls=("permuted",), draws=2)
    # the adapters once; draws of all once each, of others for each kept one, and again for the best coefficient
    assert len(counted) <= 1 + 2 + 2 * 2 * 2


@pytest.mark.parametrize("replaced", ["others", "all"])
def test_quick_nulls_take_the_coefficient_that_the_adapters_chose(adapters, replaced):
    """By hand at that coefficient, which the null would not have chosen; and no other one is asked for."""
    pair, tasks, grid, costs = adapters[:2], tasks_of(adapters[:2]), (0.2, 1.0, 2.0, 30.0), []
    asked = {"methods": ("ties",), "nulls": ("spectrum",), "draws": 2, "replaced": (replaced,), "coefficients": grid}
    found = compared(pair, quick_nulls=True, confirm=costs.append, **asked)
    (curve,) = found.summary["curves"]
    best = curve["coefficient"][int(np.argmax(curve["normalised"]))]
    shares = []
    for draw in range(2):
        for k, task in enumerate(tasks):
            given = [
                a if replaced == "others" and i == k else null_adapter(a, "spectrum", 0, draw, i)
                for i, a in enumerate(pair)
            ]
            merged = merge(Sources(given), "ties", rank="largest").adapter
            scaled = merged.with_updates({name: best * each for name, each in merged.updates.items()}, source="scaled")
            shares.append(score(task, scaled).accuracy / score(task, pair[k]).accuracy)
    (row,) = found.summary["nulls"]
    assert row["normalised"] == pytest.approx(np.mean(shares))
    alone = compared(pair, **{**asked, "nulls": ()})
    assert alone.summary["by_method"] == found.summary["by_method"]
    assert found.provenance["evaluations"] == alone.provenance["evaluations"] + 2 * 2  # draws × tasks
    assert costs[0].variants >= found.provenance["evaluations"]


def test_all_are_compared_with_the_merge_that_is_named(adapters):
    methods = {"methods": ("cat", "ties", "average"), "ranks": ("largest", "exact")}
    first, other = compared(adapters, **methods), compared(adapters, against="ties", **methods)
    assert (first.parameters["reference"], other.parameters["reference"]) == ("cat", "ties")
    with_first, with_other = (
        {row["merge"]: row for row in found.summary["by_method"] if row["category"] != "reference"}
        for found in (first, other)
    )
    assert with_other["cat"]["difference"] == pytest.approx(-with_first["ties"]["difference"])
    assert with_other["cat"]["p"] == pytest.approx(with_first["ties"]["p"])
    assert with_other["ties"]["difference"] is None
    assert with_other["ties (exact)"]["p_holm"] is not None
    # one that is in the table under another name is found there
    assert compared(adapters[:2], against="average", **methods).parameters["reference"] == "cat"
    with pytest.raises(OptionError, match=r"merge to compare with.*'tie'.*did you mean 'ties'"):
        CompareMerges(against="tie", methods=("cat", "ties")).check(adapters)


def test_a_null_that_cannot_be_merged_is_left_out_and_says_why(adapters, monkeypatch):
    def refuse(updates, generator):
        raise MismatchError("not today")

    monkeypatch.setitem(NULLS.entries, "refusing", replace(NULLS["gaussian"], make=refuse))
    found = compared(adapters[:2], methods=("cat",), nulls=("refusing",), draws=2, replaced=("all",))
    assert [(row["merge"], row["why"]) for row in found.summary["skipped"]] == [("cat, refusing", "not today")]
    assert found.rows(merge="cat")
    assert found.summary["nulls"] == []


def test_what_has_no_nulls_and_no_such_rank_is_refused_before_anything_is_computed(adapters, tmp_path):
    dora = made(tmp_path, "mod3", 1, use_dora=True)
    with pytest.raises(TunerError, match="no ΔW from the factors alone"):
        CompareMerges(nulls=("gaussian",)).check([adapters[0], dora])
    costs = []
    with pytest.raises(
        OptionError, match="a rank of 65 was asked for; the modules of these adapters have ranks up to 64"
    ):
        compared(adapters[:2], ranks=(65,), confirm=costs.append)
    assert not costs
    for options, told in (
        ({"ranks": (0,)}, "rank is 0; it must be at least 1"),
        ({"ranks": ("some",)}, "there are: largest, sum, exact"),
        ({"nulls": ("gauss",)}, "did you mean 'gaussian'"),
        ({"draws": 0}, "draws is 0; it must be at least 1"),
        ({"replaced": ("one",)}, "unknown what is replaced 'one'; there are: others, all"),
    ):
        with pytest.raises(OptionError, match=told):
            CompareMerges(**options)
    with pytest.raises(OptionError, match="no rank is given"):
        CompareMerges(ranks=()).check(adapters[:2])


def test_seeds_of_one_task_keep_each_of_them_in_turn(adapters, tmp_path):
    seeds = [made(tmp_path, "identity", 10 * seed) for seed in (0, 1)]
    found = compared(seeds, methods=("cat",), ratios=((1.0, 1.0),), nulls=("permuted",), draws=1, replaced=("others",))
    (row,) = found.summary["nulls"]
    accuracies = []
    for kept in (0, 1):
        given = [a if i == kept else null_adapter(a, "permuted", 0, 0, i) for i, a in enumerate(seeds)]
        merged = merge(Sources(given, [0.5, 0.5]), "cat", rank="largest").adapter
        accuracies.append(score(Few("identity"), merged).accuracy)
    own = np.mean([score(Few("identity"), seed).accuracy for seed in seeds])
    assert row["normalised"] == pytest.approx(np.mean(accuracies) / own)


def outcomes(*shares, n=200):
    """Outcomes of a merge over sets of one task: the first so many right."""
    return [[(np.arange(n) < share * n).astype(float)] for share in shares]


def test_verdicts_of_merges_are_words():
    told = Outcomes()
    table = {"first": (0.5, 0.52), "same": (0.51, 0.5), "better": (0.9, 0.92), "worse": (0.1, 0.12)}
    for s in range(2):
        told.members.append((2 * s, 2 * s + 1))
        for merge_name, shares in table.items():
            told.add(merge_name, outcomes(*shares)[s])
    found = told.compared("first")
    assert {name: row["verdict"] for name, row in found.items()} == {
        "same": UNTOLD,
        "better": "ahead",
        "worse": "behind",
    }
    assert found["better"]["difference"] == pytest.approx(0.4)
    assert found["better"]["difference_low"] < 0.4 < found["better"]["difference_high"]
    assert found["worse"]["p_holm"] >= found["worse"]["p"]


def test_a_merge_that_lacks_a_set_is_compared_over_the_others():
    told = Outcomes()
    for s in range(3):
        told.members.append((s,))
        told.add("first", outcomes(0.5)[0])
        if s < 2:
            told.add("part", outcomes(0.6)[0])
    assert told.compared("first")["part"]["difference"] == pytest.approx(0.1)
    assert told.compared("part").keys() == {"first"}
    assert told.compared("neither") == {}


def test_draws_of_sets_are_averaged_by_their_numbers():
    draws = np.linspace(0.1, 0.3, 39)
    sets = [
        NullScores(("lora", None), "ties", "gaussian", "all", real, tuple(d))
        for real, d in ((0.8, draws), (0.1, 0.5 - draws))
    ]
    (row,) = null_rows(sets, {"gaussian": True})
    assert row["of_adapters"] == pytest.approx(0.45)
    assert row["normalised"] == row["normalised_low"] == row["normalised_high"] == pytest.approx(0.25)
    assert (row["p"], row["p_below"], row["verdict"]) == (1 / 40, 1.0, "above the null")
    flipped = [replace(each, of_adapters=-each.of_adapters) for each in sets]
    (row,) = null_rows(flipped, {"gaussian": True})
    assert (row["p"], row["p_below"], row["verdict"]) == (1.0, 1 / 40, "below the null")


def test_the_table_for_papers_has_sizes_and_verdicts(nulled):
    lines = nulled.to_latex().splitlines()
    assert lines[3].startswith("merge & bytes & cut error & accuracy")
    assert any(word in lines[-3] for word in (UNTOLD, "ahead", "behind"))
    assert "p (nulls)" not in lines[3]  # nobody has one


def test_what_looks_at_data_meets_nulls_too(adapters):
    options = {"regmean": {"examples": 8}}
    found = compared(adapters[:2], methods=("regmean",), options=options, nulls=("negative",), replaced=("others",))
    assert not found.summary["skipped"]
    (row,) = found.summary["nulls"]
    assert 0 < row["normalised"] != row["of_adapters"]
