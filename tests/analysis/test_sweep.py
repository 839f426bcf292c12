import itertools
from dataclasses import replace

import numpy as np
import pytest
from peft import LoHaConfig
from test_game import TARGETS, random_adapter

from lora_lab.analysis.questions import Shapley, Sweep
from lora_lab.errors import OptionError, TunerError
from lora_lab.pruning.entries import prune_weights
from lora_lab.pruning.modules import keep_modules
from lora_lab.pruning.patterns import choice_of, keep
from lora_lab.pruning.ranks import prune_rank
from lora_lab.scoring.changes import Replacement
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Execution
from lora_lab.scoring.models import TaskModels
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.tasks.task import Split

pytestmark = pytest.mark.usefixtures("few_digits")

OPTIONS = {"split": "validation", "examples": 80, "draws": 3, "sparsities": (0.0, 0.5, 1.0)}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    made = [random_adapter(folder / f"s{seed}", seed=seed, scale=0.1) for seed in (0, 1)]
    return [replace(adapter, record={"method": "lora", "seed": seed}) for seed, adapter in enumerate(made)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def result(adapters, cache):
    return Sweep(**OPTIONS).run(adapters, Digits("relabel"), Execution(cache=cache))


def own(adapter):
    """The same examples, scored by another path."""
    evaluator = Evaluator([adapter], Digits("relabel"), split="validation", examples=80)
    keys = map(str, itertools.count())
    return lambda other: evaluator.scores([Replacement(next(keys), lambda _: other)])[0]


def test_patterns_are_the_adapter_without_the_others(adapters, result):
    scored = own(adapters[0])
    for criterion in ("top-shapley", "top-gates", "top-taylor", "top-drop"):
        (chosen,) = result.rows(adapter="s0", kind="structured", criterion=criterion)
        assert chosen["kept"] == 0.5
    for label in ("even", "middle", "type:fc1", "top-norm:2"):
        (row,) = result.rows(adapter="s0", kind="structured", label=label)
        kept = keep_modules(adapters[0], keep(choice_of(adapters[0]), label), source=label)
        assert row["loss"] == pytest.approx(scored(kept).mean_loss, abs=1e-5)
        assert row["kept"] == pytest.approx(len(kept.sites) / 12)


def test_named_patterns_alone_are_the_rows_of_all_with_these_names(adapters, cache, result):
    few = Sweep(**OPTIONS, kinds=("structured",), patterns=("every-other", "random"))
    rows = few.run(adapters, Digits("relabel"), Execution(cache=cache)).rows()
    labels = ("even", "random:2", "random:1")
    assert [row["label"] for row in rows] == [*labels, *labels]
    assert rows == [row for row in result.rows(kind="structured") if row["label"] in labels]
    with pytest.raises(OptionError, match="unknown pattern of s0 'high'; there are: all, even, odd, type, top-norm"):
        replace(few, patterns=("high",)).run([keep_low(adapters[0])], Digits("relabel"))


def keep_low(adapter):
    """Its first two layers, which have no thirds."""
    kept = [name for name in adapter.sites if ".0." in name or ".1." in name]
    return keep_modules(adapter, kept, source="s0")


def test_layers_by_values_are_those_of_the_validation_split(adapters, result):
    question = Shapley(split="validation", examples=80, estimator="drop")
    values = question.values(adapters[0], Digits("relabel"))
    layers = sorted(values, key=values.get)[-2:]
    kept = [name for layer in layers for name, _ in choice_of(adapters[0]).players.units[layer]]
    evaluator = Evaluator([adapters[0]], Digits("relabel"), split="validation", examples=80)
    (row,) = result.rows(adapter="s0", criterion="top-drop")
    assert row["loss"] == pytest.approx(evaluator.scores([evaluator.keeping(kept)])[0].mean_loss, abs=1e-6)


def test_adapters_without_gates_have_no_rows_that_need_them(tmp_path):
    made = random_adapter(tmp_path / "a", LoHaConfig(r=2, target_modules=TARGETS))
    rows = Sweep(**OPTIONS, kinds=("structured",)).run([made], Digits("relabel")).rows()
    found = {row["criterion"] for row in rows}
    assert {"top-shapley", "top-drop"} <= found
    assert not {"top-gates", "top-taylor"} & found


def test_sparsities_and_ranks_are_the_pruned_adapters(adapters, result):
    scored = own(adapters[1])
    (row,) = result.rows(adapter="s1", criterion="magnitude", label="0.5")
    half = prune_weights(adapters[1], sparsity=0.5).adapter
    assert row["loss"] == pytest.approx(scored(half).mean_loss, abs=1e-5)
    (row,) = result.rows(adapter="s1", kind="rank", criterion="svd", label="1")
    assert row["loss"] == pytest.approx(scored(prune_rank(adapters[1], rank=1).adapter).mean_loss, abs=1e-5)


def test_nothing_pruned_is_the_adapter_and_everything_pruned_the_base(adapters, result):
    for criterion in ("magnitude", "random"):
        (none,) = result.rows(adapter="s0", criterion=criterion, label="0", kind="unstructured")
        (everything,) = result.rows(adapter="s0", kind="structured", label="all")
        assert none["loss"] == pytest.approx(everything["loss"], abs=1e-5)
        (gone,) = result.rows(adapter="s0", criterion=criterion, label="1", kind="unstructured")
        evaluator = Evaluator([adapters[0]], Digits("relabel"), split="validation", examples=80)
        assert gone["loss"] == pytest.approx(evaluator.scores([evaluator.keeping([])])[0].mean_loss, abs=1e-5)


def test_random_controls_are_means_over_draws_with_wider_intervals(result):
    (random,) = result.rows(adapter="s0", criterion="random", label="0.5")
    assert random["draws"] == 3
    assert random["loss_spread"] > 0
    (layers,) = result.rows(adapter="s0", kind="structured", label="random:2")
    assert layers["draws"] == 3
    for row in result.rows():
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]


def test_adapters_of_one_method_are_summed_up(result):
    rows = result.rows(kind="structured", label="even")
    (found,) = [r for r in result.summary["by_method"] if r["label"] == "even"]
    assert found["adapters"] == 2
    assert found["loss"] == pytest.approx(np.mean([row["loss"] for row in rows]))
    assert found["loss_spread"] == pytest.approx(np.std([row["loss"] for row in rows], ddof=1))


def test_adapters_without_a_recorded_method_are_never_pooled(adapters, cache):
    bare = [replace(adapter, record={}) for adapter in adapters]
    options = {**OPTIONS, "sparsities": (0.5,), "draws": 2, "kinds": ("structured",), "criteria": ()}
    found = Sweep(**options).run([adapters[0], *bare], Digits("relabel"), Execution(cache=cache)).summary["by_method"]
    assert {row["adapters"] for row in found} == {1}
    assert len({row["method"] for row in found}) == 3


def test_a_second_sweep_costs_nothing_and_says_the_same(adapters, cache, result, monkeypatch):
    monkeypatch.setattr(TaskModels, "batches", lambda *a, **k: pytest.fail("computed again"))
    again = Sweep(**OPTIONS).run(adapters, Digits("relabel"), Execution(cache=cache))
    assert again.columns == result.columns


def test_tuners_without_ranks_are_swept_without(tmp_path):
    loha = random_adapter(tmp_path / "l", LoHaConfig(r=2, target_modules=TARGETS), scale=0.3)
    with pytest.raises(OptionError, match="at sparsity 1 nothing of LOHA is left"):
        Sweep(**OPTIONS).run([loha], Digits("relabel"))
    with pytest.raises(TunerError, match="LOHA"):
        Sweep(kinds=["unstructured"], sparsities=(0.5,), criteria=["delta-magnitude"], draws=1).check([loha])
    options = {**OPTIONS, "sparsities": (0.0, 0.5)}
    found = Sweep(**options).run([loha], Digits("relabel"))
    assert {row["kind"] for row in found.rows()} == {"structured", "unstructured"}
    with pytest.raises(TunerError, match="LOHA"):
        Sweep(kinds=["rank"], **options).run([loha], Digits("relabel"))


def test_whole_scores_are_those_of_evaluate(adapters):
    found = Sweep(kinds=["structured"], split="validation", draws=1).run(adapters[:1], Digits("relabel"))
    (row,) = found.rows(label="all")
    assert row["accuracy"] == score(Digits("relabel"), adapters[0], "validation").accuracy


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kinds": ["structred"]}, r"did you mean 'structured'\?"),
        ({"criteria": ["magnitud"]}, r"did you mean 'magnitude'\?"),
        ({"sparsities": (0.5, 1.2)}, "sparsity is 1.2; it must be from 0 to 1"),
        ({"draws": 0}, "draws is 0; it must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(adapters, options, text):
    base = {"kinds": ["structured"], "criteria": ["random"], "sparsities": (0.5,), "draws": 1}
    with pytest.raises(OptionError, match=text):
        Sweep(**{**base, **options}).check(adapters)


def test_an_answer_by_shapley_values_hangs_on_the_validation_split_too(adapters):
    """They choose the layers there; other kinds of pruning do not look at it."""

    def runs(**options):
        changed = Digits("relabel")
        inputs = changed.split("validation").inputs
        changed._splits["validation"] = Split({**inputs, "labels": inputs["labels"].flip(0)})
        return {Sweep(split="test", **options).run_id(adapters, task) for task in (Digits("relabel"), changed)}

    assert len(runs()) == 2
    assert len(runs(kinds=("rank",))) == 1
