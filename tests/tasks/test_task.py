from importlib.resources import files

import numpy as np
import pytest
import torch

from lora_lab import tasks
from lora_lab.errors import FileError, LoraLabError, OptionError, TaskError
from lora_lab.tasks import task
from lora_lab.tasks.kinds import digits
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.tasks.task import Split


def test_splits_are_disjoint_and_hold_all_digits():
    sizes = {split: len(digits.images(split)[1]) for split in task.SPLITS}
    assert sizes == {"train": 1000, "validation": 297, "test": 500}
    pixels = torch.cat([digits.images(split)[0] for split in task.SPLITS]).flatten(1)
    assert len(pixels) == 1797
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    from sklearn.datasets import load_digits

    answers = torch.cat([digits.images(split)[1] for split in task.SPLITS])
    whole = load_digits()  # bit for bit, in another order
    shipped = sorted(zip(pixels.tolist(), answers.tolist(), strict=True))
    assert shipped == sorted(zip((whole.data / 8 - 1).tolist(), whole.target.tolist(), strict=True))


def test_examples_that_were_scored_first_can_be_trained_on_afterwards():
    digits.images.cache_clear()
    task = tasks.from_name("digits/relabel")
    with torch.inference_mode():
        examples = task.split("validation").inputs
    assert not any(tensor.is_inference() for tensor in examples.values())
    assert not any(tensor.is_inference() for tensor in digits.images("validation"))


def test_the_shipped_base_knows_its_digits():
    model = digits.load_base().eval()
    pixels, y = digits.images("test")
    assert sum(p.numel() for p in model.parameters()) == 203_082
    assert (model(pixel_values=pixels).logits.argmax(-1) == y).double().mean() > 0.95


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_a_task_scores_its_base_below_what_training_reaches(name):
    built = tasks.from_name(name)
    model = built.build_model()
    scores = built.score(model, "validation")
    assert len(scores) == 297
    assert scores.accuracy < 0.6
    assert scores.mean_loss == pytest.approx(scores.loss.mean())
    assert not any(p.requires_grad for p in model.parameters())
    assert tasks.from_record(built.record).name == name


def test_labels_are_as_described():
    y = digits.images("test")[1]
    expected = {"relabel": (3 * y + 4) % 10, "mod3": y % 3, "mod5": y % 5, "div2": y // 2, "identity": y, "invert": y}
    for name, labels in expected.items():
        assert torch.equal(Digits(name).split("test").inputs["labels"], labels), name
    turned = Digits("rot4").split("test")
    for i in (0, 1, 2, 3):
        k = int(turned.inputs["labels"][i])
        assert torch.equal(turned.inputs["pixel_values"][i], digits.images("test")[0][i].rot90(k, (1, 2)))


def test_a_head_is_seeded_by_the_task():
    one, two = Digits("mod3").build_model(), Digits("mod3").build_model()
    assert torch.equal(one.classifier.weight, two.classifier.weight)
    assert one.classifier.weight.shape == (3, 64)
    assert not torch.equal(
        Digits("mod5").build_model().classifier.weight, Digits("div2").build_model().classifier.weight
    )
    assert torch.equal(Digits("relabel").build_model().classifier.weight, digits.load_base().classifier.weight)


def test_scores_are_per_example_cross_entropy_and_do_not_hang_on_the_batches():
    built = Digits("relabel")
    model = built.build_model()
    scores = built.score(model, "validation")
    split = built.split("validation")
    logits = model(pixel_values=split.inputs["pixel_values"]).logits
    expected = torch.nn.functional.cross_entropy(logits, split.inputs["labels"], reduction="none")
    assert scores.loss == pytest.approx(expected.detach().numpy(), abs=1e-5)
    assert (scores.correct == (logits.argmax(-1) == split.inputs["labels"]).numpy()).all()


def test_a_label_out_of_range_is_named(monkeypatch):
    built = Digits("mod3")
    monkeypatch.setattr(built, "_load", lambda split: Split({"labels": torch.tensor([0, 7, 2])}))
    with pytest.raises(TaskError, match=r"label 7 in its test split .* labels go from 0 to 2"):
        built.split("test")


def test_a_model_that_gives_nan_is_refused():
    built = Digits("relabel")
    model = built.build_model()
    model.classifier.weight.data.fill_(np.nan)
    with pytest.raises(TaskError, match="not finite on 297 examples"):
        built.score(model, "validation")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("digits/relable", "unknown task 'digits/relable' .did you mean 'digits/relabel'"),
        ("missing.toml", "missing.toml: no such task file"),
    ],
)
def test_unknown_tasks_are_named(name, text):
    with pytest.raises(LoraLabError, match=text):
        tasks.from_name(name)


@pytest.mark.parametrize(
    ("content", "error", "text"),
    [
        ("kind = ", FileError, "not a TOML file"),
        ("base = 'x'", OptionError, "no kind of task; there are: text-classification"),
        ("kind = 'text-clasification'", OptionError, "did you mean 'text-classification'"),
        ("kind = 'text-classification'\nbaze = 'x'", OptionError, "unknown key in .*'baze' .did you mean 'base'"),
        ("kind = 'text-classification'\nbase = 'x'", OptionError, "no data, which a text-classification task needs"),
    ],
)
def test_a_task_file_that_is_wrong_says_where(tmp_path, content, error, text):
    path = tmp_path / "my.toml"
    path.write_text(content)
    with pytest.raises(error, match=text) as found:
        tasks.from_name(str(path))
    assert "my.toml" in str(found.value)


def test_an_unknown_split_or_device_is_refused():
    with pytest.raises(OptionError, match="did you mean 'test'"):
        Digits("relabel").split("tset")
    with pytest.raises(OptionError, match="device 'nonsense' is not to be had"):
        task.resolve_device("nonsense")


def test_the_command_lists_every_built_in_task_with_its_splits(lora_lab):
    code, out, err = lora_lab("tasks")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split()[1:5] for line in out.splitlines() if line.startswith("digits/")}
    assert set(rows) == set(tasks.TASKS)
    assert rows["digits/mod3"] == ["3", "1000", "297", "500"]


def test_the_base_is_made_anew_where_it_is_read_from(monkeypatch, capsys):
    places = []
    monkeypatch.setattr(digits, "train_base", digits.load_base)
    monkeypatch.setattr("lora_lab.files.streamed.write_safetensors", lambda path, *_: places.append(path))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    digits.main()
    assert places == [files("lora_lab").joinpath(digits.CHECKPOINT)]
    assert capsys.readouterr().out.startswith("digits_vit.safetensors: ")
