import dataclasses
import functools
import shutil

import numpy as np
import pytest
import torch
from making_adapters import random_adapter
from peft import LoraConfig, PeftModel
from PIL import Image
from tiny_models import write_clip
from transformers import (
    AutoModelForImageClassification,
    CLIPModel,
    CLIPTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from lora_lab import tasks
from lora_lab.adapters.models.attached import attach, put_on
from lora_lab.analysis.lines.connectivity import Interpolate
from lora_lab.analysis.merge_tables import table
from lora_lab.analysis.questions import Shapley, Stability, Sweep
from lora_lab.errors import FileError, OptionError, TaskError
from lora_lab.files.trust import Origin
from lora_lab.scoring.changes import LayerMask
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.examples import examples_of
from lora_lab.scoring.models import TaskModels
from lora_lab.tasks import task
from lora_lab.tasks.choosing import task_of, tasks_of
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

COLOURS = ["blue", "green", "red"]  # in the order in which folders are read
RANDOM = LoraConfig(r=2, lora_alpha=4, target_modules=r".*\.(q_proj|v_proj)")
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Tiny random models: a CLIP with a tokenizer of letters; a ViT with three outputs, without a head, and in grey."""
    folder = tmp_path_factory.mktemp("bases")
    write_clip(folder / "clip")
    vision, size = {**SMALL, "image_size": 8, "patch_size": 4}, {"height": 8, "width": 8}
    config = ViTConfig(**vision, num_labels=3, initializer_range=0.3)
    ViTForImageClassification(config).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size=size).save_pretrained(folder / "vit")
    ViTModel(config).save_pretrained(folder / "bare")
    grey = ViTConfig(**vision, num_channels=1, num_labels=3)
    ViTForImageClassification(grey).save_pretrained(folder / "grey")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder a colour, 30 noisy pictures in each."""
    folder, draw = tmp_path_factory.mktemp("data") / "pictures", np.random.default_rng(0)
    for i in range(90):
        picture = draw.integers(0, 120, (10, 10, 3))
        picture[..., 2 - i % 3] += 110
        place = folder / COLOURS[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype(np.uint8)).save(place / f"{i:02}.png")
    return folder


@pytest.fixture
def built(tmp_path, bases, pictures, monkeypatch):
    """(Kind, lines to add) → the task; its file is at tmp_path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def build(kind, more="", *, base=None, data=None, name="my"):
        named = bases / (base or {"clip": "clip"}.get(kind, "vit"))
        keys = f'kind = "{kind}"\nbase = "{named}"\ndata = "{data or pictures}"\n'
        (tmp_path / f"{name}.toml").write_text(keys + more)
        return tasks.from_name(str(tmp_path / f"{name}.toml"))

    return build


def by_hand(base, clip, pixels, prompts):
    """Logits from CLIPModel's own features; one list of prompts a template."""
    tokenizer = CLIPTokenizer.from_pretrained(base)
    seen = clip.get_image_features(pixels).pooler_output
    classes = torch.stack(
        [
            torch.nn.functional.normalize(
                clip.get_text_features(**tokenizer(each, padding=True, return_tensors="pt")).pooler_output, dim=-1
            )
            for each in prompts
        ]
    ).mean(0)
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (seen, classes)]
    return clip.logit_scale.exp() * unit[0] @ unit[1].T


def grid(value):
    return np.full((10, 10), value, np.uint8)


# CLIP


@torch.no_grad()
def test_zero_shot_logits_are_those_of_clips_own_features(built, bases):
    plain = CLIPModel.from_pretrained(bases / "clip").eval()
    once = built("clip")
    pixels = once.split("test").inputs["pixel_values"]
    model = once.build_model()
    expected = by_hand(bases / "clip", plain, pixels, [[f"a photo of a {name}." for name in COLOURS]])
    torch.testing.assert_close(model(pixels).logits, expected)
    assert {name for name, _ in model.named_modules()} == {name for name, _ in plain.named_modules()}
    assert set(model.state_dict()) == set(plain.state_dict())
    labels = once.split("test").inputs["labels"]
    assert model(pixels, labels).loss == torch.nn.functional.cross_entropy(model(pixels).logits, labels)
    twice = built("clip", 'prompt = ["a {}", "the {}, the {}."]\n')
    expected = by_hand(
        bases / "clip", plain, pixels, [[p.replace("{}", n) for n in COLOURS] for p in ("a {}", "the {}, the {}.")]
    )
    torch.testing.assert_close(twice.build_model()(pixels).logits, expected)


def test_clip_learns_colours_and_its_adapter_remembers_the_task(built, bases, tmp_path):
    clip = built("clip", "learning_rate = 1e-2\nsteps = 40\nrank = 4\n")
    assert clip.classes == COLOURS
    assert {split: len(clip.split(split)) for split in task.SPLITS} == {"train": 63, "validation": 9, "test": 18}
    adapter, log = train(clip, Recipe(method="coto"))
    assert score(clip, None).accuracy < 0.6
    assert score(clip, adapter).accuracy > 0.9
    layers = [f"{tower}_model.encoder.layers.{i}" for tower in ("text", "vision") for i in range(2)]
    assert {name: len(own) for name, own in log.parameters["groups"].items()} == dict.fromkeys(layers, 3)
    again = task_of(adapter)
    assert again.record == clip.record
    assert (score(again, adapter).loss == score(clip, adapter).loss).all()
    # what it learned is portable: PEFT on the plain model gives the same logits
    adapter.save(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(CLIPModel.from_pretrained(bases / "clip"), tmp_path / "adapter").eval()
    pixels = clip.split("test").inputs["pixel_values"]
    with torch.no_grad():
        found = put_on(clip.build_model(), adapter).model(pixels).logits
        prompts = [[f"a photo of a {name}." for name in COLOURS]]
        torch.testing.assert_close(found, by_hand(bases / "clip", plain.base_model.model, pixels, prompts))


def test_a_clip_that_an_adapter_is_taken_off_is_bit_for_bit_as_it_was(built, tmp_path):
    clip = built("clip")
    adapter = random_adapter(clip, tmp_path / "a", RANDOM, scale=0.3)
    model, pixels = clip.build_model(), clip.split("test").inputs["pixel_values"]
    with torch.no_grad():
        before = model(pixels).logits
        with attach(model, adapter) as attached:
            assert not torch.equal(attached.model(pixels).logits, before)
        assert torch.equal(model(pixels).logits, before)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), clip.build_model().buffers(), strict=True))


@pytest.mark.parametrize(
    ("more", "towers", "types"),
    [
        ("", {"text_model", "vision_model"}, {"q_proj", "k_proj", "v_proj"}),
        ('encoders = "vision"\n', {"vision_model"}, {"q_proj", "k_proj", "v_proj"}),
        ('encoders = "text"\ntarget_modules = ["q_proj", "fc1"]\n', {"text_model"}, {"q_proj", "fc1"}),
        (
            'encoders = "text"\ntarget_modules = "all-linear"\n',
            {"text_model"},
            {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
        ),
        ("encoders = 'vision'\ntarget_modules = '.*1.*fc2'\n", {"vision_model"}, {"fc2"}),
    ],
)
def test_adapters_go_into_the_encoders_that_are_asked_for(built, tmp_path, more, towers, types):
    clip = built("clip", more)
    adapter = random_adapter(clip, tmp_path / "a", LoraConfig(r=1, target_modules=clip.target_modules), scale=0.1)
    assert {name.split(".")[0] for name in adapter.sites} == towers
    assert {name.split(".")[-1] for name in adapter.sites} == types


def test_targets_on_the_command_line_keep_to_the_encoders(built):
    clip = built("clip", 'encoders = "text"\n')
    adapter, _ = train(clip, Recipe(method="lora", steps=1, target_modules=["fc1"]))
    assert {name.split(".")[0] for name in adapter.sites} == {"text_model"}
    assert {name.split(".")[-1] for name in adapter.sites} == {"fc1"}


def test_names_of_classes_count_where_scores_are_kept(built, pictures, tmp_path):
    before = examples_of(built("clip"), "test")
    assert examples_of(built("clip"), "test") == before
    other = built("clip", 'labels = ["x", "y", "z"]\n')
    assert examples_of(other, "test")[3] != before[3]


def test_shots_are_drawn_a_class_and_more_of_them_add_to_fewer(built):
    def chosen(more):
        clip = built("clip", more)
        assert len(clip.split("test")) == 18
        inputs = clip.split("train").inputs
        return inputs["labels"].tolist(), {pixels.numpy().tobytes() for pixels in inputs["pixel_values"]}

    labels, two = chosen("shots = 2\n")
    assert sorted(labels) == [0, 0, 1, 1, 2, 2]
    assert two < chosen("shots = 5\n")[1]
    assert len(chosen("shots = 1000\n")[0]) == 63
    assert chosen("shots = 2\n")[1] == two != chosen("shots = 2\nsplit_seed = 1\n")[1]


def test_limits_of_a_folder_of_classes_draw_from_all_of_them(built, pictures, tmp_path):
    for split in ("train", "test"):
        for colour in COLOURS:
            shutil.copytree(pictures / colour, tmp_path / "both" / split / colour)
    limited = built("clip", "limit = 12\n", data="both")
    assert set(limited.split("test").inputs["labels"].tolist()) == {0, 1, 2}


def test_names_from_a_dataset_have_spaces_in_prompts(built, pictures, tmp_path):
    for colour in COLOURS:
        shutil.copytree(pictures / colour, tmp_path / "named" / f"very_{colour}")
    assert built("clip", data="named").classes == [f"very {colour}" for colour in COLOURS]
    assert built("clip", 'labels = ["a_b", "c", "d"]\n').classes == ["a_b", "c", "d"]


def test_every_question_can_be_put_to_clip(built, tmp_path):
    clip = built("clip")
    adapters = [random_adapter(clip, tmp_path / str(i), RANDOM, seed=i, scale=0.3) for i in range(2)]
    full, empty = score(clip, adapters[0]), score(clip, None)
    found = Shapley(players="encoder-type-layer", worth="loss").run(adapters[:1], clip)
    players = {row["player"] for row in found.rows()}
    assert players == {f"{e}_model.{t}.{i}" for e in ("text", "vision") for t in ("q_proj", "v_proj") for i in range(2)}
    assert sum(row["value"] for row in found.rows()) == pytest.approx(empty.mean_loss - full.mean_loss, abs=1e-5)
    assert found.summary["adapters"][0]["engine"]["why_not_shared"] is None
    line = Interpolate(points=3).run(adapters, clip)
    ends = [row for row in line.rows(space="delta") if row["t"] in (0, 1)]
    assert ends[0]["loss"] == pytest.approx(full.mean_loss, abs=1e-5)
    steady = Stability(samples=4).run(adapters[:1], clip)
    (row,) = steady.rows(family="k-of-G", label="0", rescaled=False)
    assert row["loss"] == pytest.approx(empty.mean_loss, abs=1e-6)
    swept = Sweep(sparsities=(0.0, 1.0), draws=1).run(adapters[:1], clip)
    assert {row["label"] for row in swept.rows(kind="structured")} >= {"even", "odd", "type:q_proj"}


def test_shared_prefixes_of_both_encoders_are_bitwise_plain_passes(built, tmp_path):
    clip = built("clip", "limit = 30\n")
    clip.batch_size = 10
    adapter = random_adapter(clip, tmp_path / "a", RANDOM, scale=0.3)
    masks = [LayerMask(tuple(float(on) for on in mask)) for mask in np.random.default_rng(0).random((40, 8)) < 0.6]
    shared, plain = (
        Evaluator([adapter], clip, split="train", build=functools.partial(TaskModels, share=share))
        for share in (True, False)
    )
    pairs = zip(shared.scores(masks, logits=True), plain.scores(masks, logits=True), strict=True)
    assert all((a.logits == b.logits).all() for a, b in pairs)
    assert shared.effort.why_not is None
    assert shared.effort.computed < 0.9 * plain.effort.computed


def test_adapters_of_two_clip_tasks_are_merged_and_compared(built, bases, pictures, tmp_path):
    rows = [f"{path},{path.parent.name in ('red', 'blue')}" for path in sorted(pictures.rglob("*.png"))]
    (tmp_path / "warm.csv").write_text(
        "\n".join(["image,label", *[r.replace("True", "mixed").replace("False", "green") for r in rows]])
    )
    both = [built("clip", "limit = 24\n", name="a"), built("clip", "limit = 24\n", data="warm.csv", name="b")]
    adapters = []
    for i, each in enumerate(both):
        adapter = random_adapter(each, tmp_path / each.name, RANDOM, seed=i, scale=0.3)
        record = {"task": each.record, "method": "lora", "seed": 0}
        adapters.append(dataclasses.replace(adapter, record=record, origin=Origin(own=True)))
    recorded = tasks_of(adapters)
    assert [each.name for each in recorded] == ["clip/pictures", "clip/warm"]
    found = table.CompareMerges(methods=("average", "ties", "regmean"), coefficients=(0.5,)).run(adapters, recorded)
    assert found.summary["skipped"] == []
    alone = {row["task"]: row["accuracy"] for row in found.rows(merge=table.ALONE)}
    assert alone == {each.name: score(each, a).accuracy for each, a in zip(recorded, adapters, strict=True)}
    assert {row["merge"] for row in found.rows()} == {
        table.BASE,
        table.ALONE,
        table.ENSEMBLE,
        "average",
        "ties",
        "regmean",
    }


# Classifiers


@pytest.mark.parametrize(("head", "base"), [("frozen", "vit"), ("trained", "bare"), ("probe", "bare")])
def test_a_classifier_trains_and_its_adapter_loads_in_peft(built, bases, tmp_path, head, base):
    images = built("image-classification", f'head = "{head}"\n', base=base)
    assert images.labels == 3
    adapter, _ = train(images, Recipe(method="lora", steps=40, learning_rate=1e-2, rank=2))
    assert score(images, adapter).accuracy > 0.9
    assert score(images, adapter).mean_loss < score(images, None).mean_loss
    assert not any("classifier" in name for name in adapter.sites)
    assert len(adapter.sites) == 12
    assert len(adapter.others) == (2 if head == "trained" else 0)
    assert (score(task_of(adapter), adapter).loss == score(images, adapter).loss).all()
    adapter.save(tmp_path / "adapter")
    plain = AutoModelForImageClassification.from_pretrained(bases / base, num_labels=3)
    if head == "probe":
        plain.load_state_dict(images.build_model().state_dict())
    plain = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        pixels = images.split("test").inputs["pixel_values"]
        torch.testing.assert_close(put_on(images.build_model(), adapter).model(pixels).logits, plain(pixels).logits)


def test_a_probe_is_a_logistic_regression_that_is_fitted_once(built, monkeypatch):
    images = built("image-classification", 'head = "probe"\n')
    assert score(images, None).accuracy > 0.9
    again = built("image-classification", 'head = "probe"\n')
    monkeypatch.setattr(again, "_features", None)  # not asked for any more
    assert (score(again, None).loss == score(images, None).loss).all()
    data = images.split("train")
    weight = images.build_model().classifier.weight.requires_grad_()
    model = images.build_model()
    model.classifier.weight = torch.nn.Parameter(weight.detach())
    loss = torch.nn.functional.cross_entropy(model(data.inputs["pixel_values"]).logits, data.inputs["labels"])
    (gradient,) = torch.autograd.grad(loss, model.classifier.weight)
    # stationary: C Σ loss + ½‖W‖² with C = 1
    torch.testing.assert_close(len(data) * gradient, -weight.detach(), atol=2e-2, rtol=0)


def test_a_head_of_another_number_of_labels_is_refused_or_replaced(built, pictures, tmp_path):
    for colour in COLOURS[:2]:
        shutil.copytree(pictures / colour, tmp_path / "two" / colour)
    with pytest.raises(TaskError, match="has 3 outputs and the data 2 labels; head ="):
        built("image-classification", data="two").build_model()
    assert built("image-classification", 'head = "trained"\n', data="two").build_model().classifier.out_features == 2


def test_a_base_of_one_channel_without_a_processor_sees_grey(built):
    inputs = built("image-classification", base="grey").split("test").inputs["pixel_values"]
    assert inputs.shape == (18, 1, 8, 8)
    assert -1 <= inputs.min() < -0.5 < inputs.max() <= 1


@pytest.mark.parametrize(
    ("kind", "base"), [("clip", "clip"), ("image-classification", "vit"), ("image-classification", "bare")]
)
def test_images_can_be_of_another_size(built, kind, base):
    images = built(kind, "image_size = 12\nlimit = 20\n", base=base)
    assert images.split("test").inputs["pixel_values"].shape[1:] == (3, 12, 12)
    assert len(images.score(images.build_model())) == 18


# Data


def test_folders_paths_and_bytes_are_the_same_pictures(built, pictures, tmp_path):
    import datasets

    paths = sorted(pictures.rglob("*.png"))
    (tmp_path / "sub").symlink_to(pictures)
    lines = [f"sub/{path.relative_to(pictures)},{path.parent.name}" for path in paths]
    (tmp_path / "paths.csv").write_text("\n".join(["picture,colour", *lines]) + "\n")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=COLOURS)})
    rows = {"image": [str(path) for path in paths], "label": [COLOURS.index(path.parent.name) for path in paths]}
    datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "images.parquet"))
    folder = built("clip")
    csv = built("clip", 'image = "picture"\nlabel = "colour"\n', data="paths.csv")
    parquet = built("clip", data="images.parquet")
    for split in task.SPLITS:
        expected = folder.split(split).inputs
        for other in (csv, parquet):
            assert torch.equal(other.split(split).inputs["pixel_values"], expected["pixel_values"])
            assert torch.equal(other.split(split).inputs["labels"], expected["labels"])
    assert csv.classes == parquet.classes == COLOURS


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("path/to/pictures", "pictures"),
        ("path/to/table.v2.csv", "table.v2"),
        ("owner/set", "set"),
        ({"train": "set/train.csv", "test": "set/test.csv"}, "set"),
        ({"train": "a/x.csv", "test": "b/y.csv"}, "x"),
    ],
)
def test_a_task_without_a_file_is_named_after_its_data(data, name):
    assert tasks.from_record({"kind": "clip", "base": "b", "data": data}).name == f"clip/{name}"


def test_every_mode_of_picture_is_converted(built, tmp_path):
    colour = np.stack([grid(200), grid(100), grid(50)], -1)
    opaque = np.concatenate([colour, grid(255)[..., None]], -1)
    palette = Image.fromarray(colour).convert("P")
    palette.info["transparency"] = b"\x00\x10"
    same = {
        "rgb.png": Image.fromarray(colour),
        "rgba.png": Image.fromarray(opaque),
        "grey.png": Image.fromarray(grid(120)),
        "deep.png": Image.fromarray(grid(120).astype(np.uint16) * 257),
        "black.png": Image.fromarray(grid(0)).convert("1"),
    }
    for name, picture in same.items():
        picture.save(tmp_path / name)
    palette.save(tmp_path / "palette.png", transparency=b"\x00\x10")
    turned = Image.fromarray(np.concatenate([colour[:5], 0 * colour[5:]]))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "turned.png", exif=exif)
    names = [*same, "palette.png", "turned.png"]
    (tmp_path / "modes.csv").write_text("\n".join(["image,label", *[f"{name},0" for name in names]]))
    (tmp_path / "dev.csv").write_text("image,label\nrgb.png,1\n")
    splits = f'data = {{train = "{tmp_path}/modes.csv", validation = "dev.csv", test = "dev.csv"}}\n'
    path = tmp_path / "my.toml"
    built("image-classification")
    path.write_text(
        "\n".join(line for line in path.read_text().splitlines() if not line.startswith("data")) + f"\n{splits}"
    )
    rgb, rgba, grey, deep, black, palette, turned = tasks.from_name(str(path)).split("train").inputs["pixel_values"]
    assert torch.equal(rgb, rgba)
    assert torch.equal(grey, deep)
    assert torch.equal(grey[0], grey[2])
    torch.testing.assert_close(black, torch.full_like(black, -1))
    torch.testing.assert_close(palette, rgb, atol=0.2, rtol=0)
    assert turned[:, 0].max() < turned[:, -1].min()


@pytest.mark.parametrize(
    ("kind", "more", "error", "text"),
    [
        ("clip", 'image = "img"', TaskError, "no column 'img'; there are: image, label"),
        ("clip", 'labels = ["a", "b"]', TaskError, "label 2 in its train split .* labels go from 0 to 1"),
        ("image-classification", 'labels = ["a", "b"]', TaskError, "label 2 in its train split"),
        ("clip", 'prompt = "a photo"', OptionError, "prompt 'a photo' has no {} for the name of a class"),
        ("clip", "prompt = []", OptionError, "prompt is empty"),
        ("clip", 'encoders = "visoin"', OptionError, "unknown encoders in .*did you mean 'vision'"),
        ("clip", "shots = 0", OptionError, "shots is 0; a whole number of at least 1"),
        ("clip", "image_size = -3", OptionError, "image_size is -3; a whole number of at least 1"),
        ("clip", "image = 3", OptionError, "image is 3; the name of a column"),
        ("image-classification", 'head = "prob"', OptionError, "unknown head in .*did you mean 'probe'"),
        ("image-classification", 'prompt = "a {}"', OptionError, "unknown key in .* 'prompt'"),
    ],
)
def test_what_does_not_fit_is_named(built, kind, more, error, text):
    with pytest.raises(error, match=text) as caught:
        built(kind, more + "\n").split("train")
    assert "\n" not in str(caught.value)


def test_pictures_that_cannot_be_read_are_named(built, tmp_path):
    (tmp_path / "no.png").write_text("not a picture")
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00")
    for name, why in (
        ("no.png", "cannot be read as an image"),
        ("half.png", "cannot be read"),
        ("gone.png", "missing"),
    ):
        (tmp_path / "data.csv").write_text("image,label\n" + f"{name},red\n" * 10)
        with pytest.raises(FileError, match=rf"{name}: .*{why}"):
            built("clip", data="data.csv").split("train")
    (tmp_path / "data.csv").write_text("image,label\n" + "3,red\n" * 10)
    with pytest.raises(TaskError, match="image 0 of its train split is a int; a picture or the path of one"):
        built("clip", data="data.csv").split("train")


def test_one_that_cannot_be_read_in_a_folder_is_named(built, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "folder" / name).mkdir(parents=True)
        (tmp_path / "folder" / name / f"{name}.png").write_text("no picture")
    with pytest.raises(FileError, match=r"folder/./.\.png: cannot be read as an image"):
        built("clip", "labels = ['a', 'b']\n", data="folder").split("train")


def test_numbers_without_names_make_no_prompts(built, pictures, tmp_path):
    lines = [f"{path},{COLOURS.index(path.parent.name)}" for path in sorted(pictures.rglob("*.png"))]
    (tmp_path / "numbers.csv").write_text("\n".join(["image,label", *lines]))
    with pytest.raises(TaskError, match="the labels are numbers; prompts need the classes' names"):
        built("clip", data="numbers.csv").build_model()
    assert built("clip", f"labels = {COLOURS}\n", data="numbers.csv").labels == 3
    assert built("image-classification", 'head = "trained"\n', data="numbers.csv", base="bare").labels == 3


def test_a_base_that_is_no_clip_is_named(built):
    with pytest.raises(TaskError, match="is a vit model, not a clip"):
        built("clip", base="vit").build_model()


def test_a_processor_that_does_not_fit_the_base_is_named(built, bases, tmp_path):
    shutil.copytree(bases / "grey", tmp_path / "grey")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "grey")
    with pytest.raises(TaskError, match=r"image processor of .*grey' fails: mean must have 1 elements"):
        built("image-classification", base=tmp_path / "grey").split("test")
    (tmp_path / "grey" / "preprocessor_config.json").write_text("{")
    with pytest.raises(TaskError, match="grey' cannot be loaded"):
        built("image-classification", base=tmp_path / "grey").split("test")
