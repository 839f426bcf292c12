"""What lies behind the numbers of results: an answer's file beside it, and columns that vary as the numbers do."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from making_adapters import random_adapter
from making_measured import measured, places
from peft import LoraConfig

from lora_lab.analysis.coalitions import balance
from lora_lab.analysis.lines.connectivity import BARRIERS
from lora_lab.analysis.merge_tables.rows import by_example
from lora_lab.claims import asking
from lora_lab.claims.asking import QUESTIONS, Asking, answer
from lora_lab.claims.statistics import STATISTICS
from lora_lab.claims.verdicts import difference
from lora_lab.errors import FileError
from lora_lab.results.stats import student
from lora_lab.scoring.execution import Execution
from lora_lab.tasks.kinds.digits import Digits

pytestmark = pytest.mark.usefixtures("few_digits")

OPTIONS = {
    "evaluate": {},
    "interpolate": {"points": 3, "spaces": ["factors"], "ratios": [[1, 1]]},
    "stability": {"samples": 2, "every": False, "grid": [0.5], "players": "layer"},
    "sweep": {"kinds": ["unstructured"], "sparsities": [0.5], "draws": 2},
    "shapley": {},
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    task, folder = Digits("relabel"), tmp_path_factory.mktemp("adapters")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=r"vit\.layers\.[0-2]\..*(q_proj|fc1)")
    made = [random_adapter(task, folder / str(seed), config, seed=seed, scale=0.28) for seed in range(2)]
    paths = [folder / f"s{seed}.safetensors" for seed in range(2)]
    for i, (each, path) in enumerate(zip(made, paths, strict=True)):
        replace(each, record={"task": task.record, "method": "lora", "seed": i}).save(path)
    return paths


@pytest.fixture(scope="module")
def ask(adapters, tmp_path_factory):
    """Verb → its answer about the adapters; the second time the one that lies there."""
    folder = tmp_path_factory.mktemp("answers")
    task = Digits("relabel")
    return lambda verb: answer(
        Asking(folder / f"{verb}.json", verb, OPTIONS[verb], adapters, [task.spec] * 2), [task] * 2, Execution()
    )


@pytest.mark.parametrize("verb", OPTIONS)
def test_behind_every_row_lie_numbers_of_the_examples_whose_mean_it_is(ask, verb):
    found = ask(verb)
    assert found.by_example
    for table in {"rows"} & set(found.by_example):
        wanted = [row["accuracy"] for row in found.result.rows()]
        assert found.by_example[table].mean(1) == pytest.approx(wanted, abs=1e-6)
        assert found.by_example[table].shape[1] == 100
    again = ask(verb)
    assert again.result == found.result
    assert {name: rows.tolist() for name, rows in again.by_example.items()} == {
        name: rows.tolist() for name, rows in found.by_example.items()
    }
    assert "by_example" not in found.result.columns


def test_numbers_of_examples_that_are_not_there_or_of_another_run_are_made_again(adapters, tmp_path, monkeypatch):
    task = Digits("relabel")
    asking_of = Asking(tmp_path / "a.json", "evaluate", {}, adapters, [task.spec] * 2)
    asked = asking_of, [task] * 2, Execution(cache=tmp_path / "kept")
    first, beside = answer(*asked), tmp_path / "a.examples.safetensors"
    kept = beside.read_bytes()
    beside.unlink()
    assert answer(*asked).by_example["rows"].tolist() == first.by_example["rows"].tolist()
    assert beside.read_bytes() == kept
    beside.write_bytes(kept[:-4])
    answer(*asked)
    assert beside.read_bytes() == kept
    asking._write(beside, "another", {"rows": np.zeros((3, 100), np.float32)})
    with pytest.raises(FileError, match="numbers of other examples than those of the result beside it"):
        asking._read(beside, "this", ["rows"])
    answer(*asked)
    assert beside.read_bytes() == kept
    monkeypatch.setattr(QUESTIONS["evaluate"].made({}).__class__, "run", None)
    answer(*asked)  # which asks nothing


def test_claims_about_scores_barriers_and_keep_sets_are_paired(ask):
    for name, verb, where in (
        ("task-score", "evaluate", {}),
        ("on-line", "interpolate", {"space": "factors", "t": 0.5}),
        ("line-barrier", "interpolate", {"space": "factors", "barrier": "entezari"}),
        ("worst-keep-set", "stability", {"family": "half or more kept", "rescaled": False}),
        ("after-pruning", "sweep", {"kind": "unstructured", "criterion": "magnitude", "label": "0.5"}),
        ("shapley-variation", "shapley", {}),
    ):
        values = STATISTICS[name].of(ask(verb), where)
        assert values, name
        assert all(len(each.examples) == 1 for each in values.values()), name
        assert difference(values, None).paired is True, name
        if name == "task-score":
            for each in values.values():  # a column's spread tells what the interval does
                (column,) = each.examples
                assert student(100) * column.std(ddof=1) / 10 == pytest.approx(each.half, rel=0.1)


def test_a_number_that_an_answer_does_not_have_is_none(ask):
    """As of an encoder, which has no loss on texts beside its task."""
    for name in ("forgetting", "drift"):
        assert STATISTICS[name].of(ask("evaluate"), {}) == {}


def without_each(statistic, columns):
    """Jackknife: statistic of columns [rows, n] without each example → its variance."""
    n = columns.shape[1]
    found = np.array([statistic(np.delete(columns, i, axis=1)) for i in range(n)])
    return (n - 1) / n * float(((found - found.mean()) ** 2).sum())


def of_mean(column):
    return float(np.var(column, ddof=1)) / len(column)


@pytest.mark.parametrize("name", BARRIERS)
def test_a_barrier_varies_by_its_examples_as_its_jackknife_says(name):
    generator, t = np.random.default_rng(0), np.linspace(0, 1, 5)
    chance = np.array([0.95, 0.7, 0.4, 0.7, 0.85])[:, None]
    right = generator.random((5, 300)) < chance
    found = measured({"correct": right}, "accuracy")
    column = BARRIERS[name].by_example(found, places(5), "accuracy", t)
    sign = 1 if BARRIERS[name].itself else -1
    wanted = without_each(lambda x: BARRIERS[name](sign * x.mean(1, keepdims=True), t).max(), right.astype(float))
    assert of_mean(column) == pytest.approx(wanted, rel=0.02)


def test_a_barrier_of_none_varies_by_the_points_between_the_ends():
    generator, t = np.random.default_rng(1), np.linspace(0, 1, 3)
    right = generator.random((3, 200)) < np.array([0.5, 0.9, 0.5])[:, None]
    column = BARRIERS["entezari"].by_example(measured({"correct": right}, "accuracy"), places(3), "accuracy", t)
    wanted = -(right[1] - (right[0].astype(float) + right[2]) / 2)
    assert column - column.mean() == pytest.approx(wanted - wanted.mean(), abs=1e-6)


def test_the_balance_of_values_varies_by_its_examples_as_its_jackknife_says():
    values = np.random.default_rng(2).normal([[0.3], [0.1], [0.6], [0.2]], 1.0, (4, 400))
    found = balance.behind(values.mean(1), values)
    for name, column in found.items():
        wanted = without_each(lambda x, name=name: balance.balance(x.mean(1))[name], values)
        assert of_mean(column) == pytest.approx(wanted, rel=0.05), name
    assert balance.behind(values.mean(1), None) == {}


def test_the_share_that_a_merge_keeps_varies_by_the_examples_of_each_task_as_its_jackknife_says():
    generator = np.random.default_rng(3)
    own = [generator.random(n) < 0.9 for n in (200, 300)]
    merged = [each & (generator.random(len(each)) < keep) for each, keep in zip(own, (0.7, 0.5), strict=True)]
    judge = SimpleNamespace(shares=True, outcomes=lambda scores: scores)
    columns = by_example(merged, own, [judge, judge])
    for column, s, o in zip(columns, merged, own, strict=True):
        wanted = without_each(lambda x: x[0].mean() / x[1].mean() / 2, np.stack([s, o]).astype(float))
        assert of_mean(column) == pytest.approx(wanted, rel=0.02)
    assert by_example(merged, own, [judge, SimpleNamespace(shares=False)]) == []
