"""Tasks of lm-evaluation-harness on a tiny random Llama: its own numbers, keys, trust, and training on its examples."""

import functools
import json

import numpy as np
import pytest
import torch
from making_adapters import random_adapter
from peft import LoraConfig
from tiny_language import tokenizer, write_causal

from lora_lab import tasks
from lora_lab.adapters.models.attached import put_on
from lora_lab.analysis.questions import Evaluate
from lora_lab.errors import LoraLabWarning, OptionError, TaskError, TrustError
from lora_lab.files.trust import Origin, Reach, judged
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.examples import TaskSpec
from lora_lab.scoring.execution import Execution
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

pytest.importorskip("lm_eval")

CHOICES = [
    {"question": "the colour of grass", "choices": ["red and blue", "green"], "answer": 1},
    {"question": "one plus two", "choices": ["one", "two and a red sky", "three", "four"], "answer": 2},
    {"question": "what is the colour of the sky and of blood", "choices": ["blue", "green", "a red"], "answer": 0},
    {"question": "blood", "choices": ["sky", "red"], "answer": 1},
    {"question": "one plus one", "choices": ["two", "red"], "answer": 0},
]
SUMS = [{"question": "one plus one", "answer": "two"}, {"question": "two and two", "answer": "four"}]


def yaml(folder, name, rows, **keys):
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    splits = {"test_split": "test", "validation_split": "validation", "training_split": "train"}
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(data) for split in ("train", "validation", "test")}},
        **splits,
        "doc_to_text": "what {{question}} ?",
        **keys,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(content))  # JSON is YAML


MEAN = {"aggregation": "mean", "higher_is_better": True}


@pytest.fixture
def folder(tmp_path):
    write_causal(tmp_path)
    mine = tmp_path / "mine"
    mine.mkdir()
    yaml(
        mine,
        "capitals",
        CHOICES,
        output_type="multiple_choice",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        metric_list=[{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
        metadata={"version": 1.0},
    )
    yaml(
        mine,
        "sums",
        SUMS,
        output_type="generate_until",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["?"], "do_sample": False, "max_gen_toks": 4},
        metric_list=[{"metric": "exact_match", **MEAN}],
        filter_list=[
            {"name": name, "filter": [{"function": "regex", "regex_pattern": p}, {"function": "take_first"}]}
            for name, p in (("first", "^ ?(\\w+)"), ("four", "(four)"))
        ],
        metadata={"version": 2.0},
    )
    return tmp_path


def build(folder, *names, **keys):
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    lines += ['kind = "lm-eval"', 'base = "llama"', f"tasks = {json.dumps(names)}"]
    if "include" not in keys:
        lines.append('include = "mine"')
    (folder / "my.toml").write_text("\n".join(lines) + "\n")
    return tasks.from_name(str(folder / "my.toml"))


def adapter_of(task, folder, **options):
    return random_adapter(
        task,
        folder / "a",
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
        **{"seed": 0, "scale": 1.0, **options},
    )


def own(model, folder, *names, **options):
    """What the harness says by itself: {task: metric → values of its examples in their order}."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "mine"), include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=tokenizer(bos=True), batch_size=1)
    told = lm_eval.simple_evaluate(
        lm, tasks=list(names), task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )
    found = {}
    for name, samples in told["samples"].items():
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            for metric in sample["metrics"]:
                key = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                found.setdefault(name, {}).setdefault(key, []).append(sample[metric])
    return found, told["results"]


@pytest.mark.parametrize("keys", [{}, {"num_fewshot": 2}, {"num_fewshot": 1, "fewshot_seed": 7, "limit": 3}])
def test_every_example_has_the_harness_s_own_results(folder, keys):
    task = build(folder, "capitals", **keys)
    adapter = adapter_of(task, folder)
    found = score(task, adapter)
    options = {"num_fewshot": keys.get("num_fewshot"), "limit": keys.get("limit")}
    worn = put_on(task.build_model(), adapter).model
    wanted, results = own(worn, folder, "capitals", fewshot_random_seed=keys.get("fewshot_seed", 1234), **options)
    assert {name: values.tolist() for name, values in found.columns.items()} == wanted["capitals"]
    assert len(found) == keys.get("limit", 5)
    assert task.metrics == ["acc", "acc_norm"]
    for name in task.metrics:
        assert found[name].dtype == np.bool_
        assert task.metric(name).value(found.columns) == results["capitals"][f"{name},none"]


def test_accuracy_by_hand(folder):
    task = build(folder, "capitals")
    model = task.build_model()
    plain = tokenizer(bos=True)
    right = []
    for row in CHOICES:
        given = plain(f"what {row['question']} ?")["input_ids"]
        sums = []
        for choice in row["choices"]:
            said = tokenizer()(choice)["input_ids"]
            logs = model(torch.tensor([given + said])).logits[0].log_softmax(-1)
            sums.append(sum(logs[len(given) - 1 + i, token].item() for i, token in enumerate(said)))
        right.append(int(np.argmax(sums)) == row["answer"])
    assert score(task, None)["acc"].tolist() == right
    assert 0 < sum(right) < len(right)


def test_of_several_tasks_a_metric_is_the_mean_of_their_means(folder):
    yaml(
        folder / "mine",
        "few",
        CHOICES[:2],
        output_type="multiple_choice",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        metric_list=[{"metric": "acc", **MEAN}],
    )
    task = build(folder, "capitals", "few", "sums", metric="few:acc")
    assert task.metrics[0] == "few:acc"
    assert set(task.metrics) == {
        "few:acc", "capitals:acc", "capitals:acc_norm", "sums:exact_match,first", "sums:exact_match,four",
    }  # fmt: skip
    found = score(task, None)
    wanted, results = own(task.build_model(), folder, "capitals", "few", "sums")
    assert found["task"].tolist() == [0] * 5 + [1] * 2 + [2] * 2
    for name in task.metrics:
        one, metric = name.split(":")
        key = metric if "," in metric else f"{metric},none"
        assert task.metric(name).value(found.columns) == pytest.approx(results[one][key]), name
    two = build(folder, "capitals", "few")
    assert two.metrics[0] == "acc"
    both = score(two, None)
    assert two.metric("acc").value(both.columns) == pytest.approx(
        (np.mean(wanted["capitals"]["acc"]) + np.mean(wanted["few"]["acc"])) / 2
    )
    low, high = two.metric("acc").estimate(both.columns, seed=0)[1:]
    assert 0 <= low < high <= 1


def test_generated_answers_and_filters(folder):
    task = build(folder, "sums")
    adapter = adapter_of(task, folder)
    found = score(task, adapter)
    wanted, _ = own(put_on(task.build_model(), adapter).model, folder, "sums")
    assert {name: values.tolist() for name, values in found.columns.items()} == wanted["sums"]
    assert task.metrics == ["exact_match,first", "exact_match,four"]


def test_it_is_trained_on_the_harness_s_examples_and_evaluated(folder):
    task = build(folder, "sums")
    adapter, result = train(
        task,
        Recipe(steps=50, learning_rate=3e-2, rank=4, batch_size=2, target_modules=["q_proj", "v_proj", "down_proj"]),
    )
    assert result.summary["validation"]["exact_match,first"] == 1
    told = Evaluate().run([adapter], task)
    assert told.rows(adapter=adapter.label)[0]["exact_match,first"] == 1
    inputs = task.training_split().inputs
    assert [tokenizer().decode(row[row >= 0]) for row in inputs["labels"]] == ["two </s>", "four </s>"]
    assert "include" not in adapter.record["task"]


def test_layers_are_switched_and_what_is_kept_under_counts_all(folder):
    task = build(folder, "capitals")
    adapter = adapter_of(task, folder)
    evaluator = Evaluator([adapter], task)
    off, on = evaluator.scores([evaluator.keeping([]), evaluator.keeping(evaluator.names)])
    assert off["acc"].tolist() == score(task, None)["acc"].tolist()
    assert on["acc_norm"].tolist() == score(task, adapter)["acc_norm"].tolist()
    assert evaluator.effort.why_not.startswith("lm-evaluation-harness asks the model in batches of its own")
    runs = [evaluator.run_of("test")]

    def again(**keys):
        runs.append(Evaluator([adapter], build(folder, "capitals", **keys)).run_of("test"))

    again()
    assert runs[1] == runs.pop(0)
    again(num_fewshot=1)
    again(num_fewshot=1, fewshot_seed=3)
    content = json.loads((folder / "mine" / "capitals.yaml").read_text())
    (folder / "mine" / "capitals.yaml").write_text(json.dumps({**content, "metadata": {"version": 1.1}}))
    again()
    (folder / "mine" / "capitals.yaml").write_text(json.dumps(content))
    (folder / "mine" / "code.py").write_text("")
    again()
    (folder / "mine" / "code.py").unlink()
    rows = [{**CHOICES[0], "answer": 0}, *CHOICES[1:]]
    (folder / "mine" / "capitals.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    again()
    assert len(set(runs)) == len(runs) == 6


def test_workers_build_it_again(folder):
    task = build(folder, "capitals", num_fewshot=1)
    again = TaskSpec.of(task).task()
    assert all(torch.equal(again.split("test").inputs[n], t) for n, t in task.split("test").inputs.items())
    assert (score(again, None)["acc"] == score(task, None)["acc"]).all()


@pytest.mark.parametrize(
    ("names", "keys", "told"),
    [
        (["capital"], {}, "'capital' (did you mean 'capitals'?)"),
        (["capitals"], {"metric": "ac"}, "'ac' (did you mean 'acc'?)"),
        (["../capitals"], {}, "'../capitals' in tasks is no name of a task"),
        ([], {}, "tasks is []; a list of names of tasks is needed"),
        (["capitals", "capitals"], {}, "a task is named twice in tasks"),
        (["capitals"], {"data": "x.csv"}, "data has no use here, since the harness brings its tasks' data"),
        (["capitals"], {"include": "none"}, "include = 'none' is no folder"),
        (["capitals"], {"num_fewshot": -1}, "num_fewshot is -1; a whole number of at least 0 is needed"),
    ],
)
def test_what_is_refused(folder, names, keys, told, monkeypatch):
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.chdir(folder)
    with pytest.raises((OptionError, TaskError)) as found:
        _ = build(folder, *names, **keys).metrics
    assert told in str(found.value)
    assert "\n" not in str(found.value)


def test_metrics_that_are_no_means_are_left_out_and_missing_splits_and_data_are_told(folder):
    keys = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    f1 = {"metric": "f1", "aggregation": "f1", "higher_is_better": True}
    yaml(folder / "mine", "two", CHOICES, metric_list=[{"metric": "acc", **MEAN}, f1], validation_split=None, **keys)
    with pytest.warns(LoraLabWarning, match="f1 of two is no mean over examples, and is left out"):
        assert build(folder, "two").metrics == ["acc"]
    with pytest.raises(TaskError, match="lm-eval's two has no validation split; test is what it scores"):
        build(folder, "two").split("validation")
    yaml(folder / "mine", "two", CHOICES, metric_list=[f1], **keys)
    with pytest.raises(TaskError, match=r"no metric of lm-eval's two is a mean over examples \(f1\)"):
        _ = build(folder, "two").metrics
    (folder / "mine" / "two.jsonl").unlink()
    with pytest.raises(TaskError, match="task my: lm-eval's two: FileNotFoundError") as found:
        build(folder, "two").split("test")
    assert "\n" not in str(found.value)


def test_code_from_a_record_never_runs(folder):
    mark = folder / "ran"
    (folder / "mine" / "code.py").write_text(f"open({str(mark)!r}, 'w')\ndef text(doc): return 'x'\n")
    text = (folder / "mine" / "capitals.yaml").read_text()
    (folder / "mine" / "capitals.yaml").write_text(text.replace('"what {{question}} ?"', "!function code.text"))
    record = {"kind": "lm-eval", "base": "llama", "tasks": ["capitals"], "include": "mine"}
    with pytest.raises(TrustError, match="asks for include, which only you can allow"):
        judged(record, Origin(folder=str(folder)), {"base_model_name_or_path": "llama"}, "adapter")
    for reach in (Reach(folder=str(folder), quotes=False), Reach(quotes=False)):  # consent gives it no folder of code
        with pytest.raises(TrustError, match=r"names the folder .*, whose code would run"):
            _ = tasks.from_record(record, base=folder, reach=reach).metrics
    assert not mark.exists()
    assert build(folder, "capitals").split("test")  # the user's own file
    assert mark.exists()


def test_several_at_once_give_what_single_ones_do(folder):
    task = build(folder, "capitals")
    adapter = random_adapter(
        task, folder / "a", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), seed=0, scale=1.0
    )
    alone, together = (Evaluator([adapter], task, Execution(coalitions_at_once=k)) for k in (0, 4))
    names = alone.names
    masks = [alone.keeping(names[i:]) for i in range(len(names) + 1)]
    found = [evaluator.scores(masks) for evaluator in (alone, together)]
    for one, other in zip(*found, strict=True):
        for name, values in one.columns.items():
            assert np.allclose(values, other[name], atol=1e-4), name
    assert any(not np.array_equal(found[0][0]["acc"], one["acc"]) for one in found[0])
    (batch,) = task.batches("test", torch.device("cpu"))
    twice = {name: tensor.repeat(2, *[1] * (tensor.ndim - 1)) for name, tensor in batch.items()}
    with pytest.raises(TaskError, match="the harness asks in an order of its own, so one model at a time"):
        task.judge(task.build_model(), twice)
