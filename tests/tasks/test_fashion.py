"""The Fashion-MNIST testbed from small made-up images: tables, tasks, base."""

import gzip
import io
import struct

import fashion
import fashion_bases
import numpy as np
import pytest
import torch
from PIL import Image

from lora_lab import tasks


def packed(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def package(tmp_path):
    """80 training and 40 test images of noise, all classes in turn."""
    draw = np.random.default_rng(1)
    place = tmp_path / "package" / "usr" / "share"
    place.mkdir(parents=True)
    for name, count in (("train", 80), ("t10k", 40)):
        (place / f"{name}-images-idx3-ubyte.gz").write_bytes(packed(draw.integers(0, 256, (count, 28, 28))))
        (place / f"{name}-labels-idx1-ubyte.gz").write_bytes(packed(np.arange(count) % 10))
    return tmp_path / "package"


@pytest.fixture
def built(package, tmp_path, capsys):
    folder = tmp_path / "data" / "fashion"
    assert fashion.build(folder, lambda place: package, steps={"vit": 2, "clip": 2}, batch=16)
    return folder


def rows(path):
    from pyarrow import parquet

    return parquet.read_table(path).to_pydict()


def images(path):
    return np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in rows(path)["image"]])


def test_all_folders_have_the_same_images_each_changed_in_its_way(built, package):
    whole, classes = fashion.read(package, "train")
    for split, count in (("train", 64), ("validation", 16), ("test", 40)):
        upright = images(built / "upright" / f"{split}.parquet")
        assert upright.shape == (count, 28, 28)
        rotated = images(built / "rotated" / f"{split}.parquet")
        assert (rotated[:, 0] == upright[:, :, -1]).all()  # counter-clockwise: the right column comes to the top
        assert (rotated[:, -1] == upright[:, :, 0]).all()
        assert (images(built / "inverted" / f"{split}.parquet").astype(int) == 255 - upright.astype(int)).all()
        turns = rows(built / "turned" / f"{split}.parquet")["turns"]
        turned = images(built / "turned" / f"{split}.parquet")
        assert set(turns) == {0, 1, 2, 3}
        for image, found, k in zip(upright, turned, turns, strict=True):
            sides = {0: image[0], 1: image[:, -1], 2: image[-1, ::-1], 3: image[::-1, 0]}
            assert (found[0] == sides[k]).all()
    parts = [images(built / "upright" / f"{split}.parquet") for split in ("train", "validation")]
    drawn = {image.tobytes() for part in parts for image in part}
    assert len(drawn) == 80  # no image is in both splits
    of = {image.tobytes(): fashion.CLASSES[y] for image, y in zip(whole, classes, strict=True)}
    assert [of[image.tobytes()] for image in parts[0]] == rows(built / "upright" / "train.parquet")["class"]


def test_every_column_says_what_its_task_asks(built):
    found = rows(built / "upright" / "train.parquet")
    told = {name: set(zip(found["class"], found[name], strict=True)) for name in ("superclass", "half", "mod3", "pair")}
    assert set(found["class"]) == set(fashion.CLASSES)
    assert all(len(pairs) == 10 for pairs in told.values())  # each is a function of the class
    tops = {name for name, kind in told["superclass"] if kind == "top"}
    assert tops == {"T-shirt", "pullover", "coat", "shirt"}
    assert {name for name, kind in told["superclass"] if kind == "shoe"} == {"sandal", "sneaker", "ankle boot"}
    assert sorted(half for _, half in told["half"]) == [0] * 5 + [1] * 5
    halves = dict(told["half"])
    assert halves["coat"] != halves["pullover"]
    assert dict(told["mod3"])["sneaker"] == 1  # class 7
    assert dict(told["pair"])["sneaker"] == 3


def test_a_second_run_writes_the_same_and_keeps_the_base(built, package, capsys):
    before = {path: path.read_bytes() for path in built.rglob("*") if path.is_file()}
    stamps = [(built / base / "model.safetensors").stat().st_mtime_ns for base in ("vit", "clip")]
    assert fashion.build(built, lambda place: package, steps={"vit": 3, "clip": 3}, batch=16)
    assert {path: path.read_bytes() for path in built.rglob("*") if path.is_file()} == before
    assert [(built / base / "model.safetensors").stat().st_mtime_ns for base in ("vit", "clip")] == stamps
    assert "vit: there already, and kept" in capsys.readouterr().out


def test_a_base_that_is_cut_off_leaves_nothing(tmp_path):
    def make(place):
        place.mkdir()
        (place / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fashion.kept(tmp_path / "data" / "vit", make)
    assert not list((tmp_path / "data").iterdir())


def test_the_base_hangs_on_the_images_and_steps_alone(package, capsys):
    made, _ = fashion.read(package, "train")
    torch.rand(3)
    first = fashion_bases.vit(made, 2, 16).state_dict()
    second = fashion_bases.vit(made, 2, 16).state_dict()
    other = fashion_bases.vit(made, 3, 16).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert "vit: step 2 of 2, loss " in capsys.readouterr().out


def test_what_sees_all_patches_is_the_model_itself():
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(**fashion_bases.VISION), add_pooling_layer=False).eval()
    seen = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        whole = model(seen).last_hidden_state[:, 0]
        assert torch.allclose(fashion_bases.first_of(model, seen, 16), whole, atol=1e-5)
        assert not torch.allclose(fashion_bases.first_of(model, seen, 10), whole, atol=1e-2)


def test_views_are_parts_of_their_images():
    left = torch.full((64, 1, 28, 28), -1.0)
    left[..., :14] = 1
    parts = fashion_bases.view(left)
    assert parts.shape == left.shape
    assert parts.min() >= -1
    assert parts.max() <= 1
    assert (parts[..., 0, 0] > parts[..., 0, -1]).any()
    assert (parts[..., 0, 0] < parts[..., 0, -1]).any()  # mirrored
    assert torch.allclose(parts[:, :, 0], parts[:, :, -1], atol=1e-4)  # but never turned


def test_the_contrast_is_by_hand():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    # row 0: its pair, row 2, at cosine 1; rows 1 and 3 at cosine 0
    expected = -np.log(np.exp(5) / (np.exp(5) + 2))
    assert fashion_bases.contrast(vectors).item() == pytest.approx(expected, rel=1e-5)


def test_every_task_file_loads_and_has_a_probe_of_its_own(built, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    labels = {"rotation": 4, "superclass": 5, "halves": 2, "mod3": 3, "pairs": 5}
    for name in fashion.TASKS:
        task = tasks.from_name(str(built / f"{name}.toml"))
        assert task.labels == labels.get(name, 10)
        assert [len(task.split(split)) for split in ("train", "validation", "test")] == [64, 16, 40]
    task = tasks.from_name(str(built / "halves.toml"))
    pixels = task.split("train").inputs["pixel_values"]
    assert torch.equal(pixels, fashion_bases.pixels(images(built / "upright" / "train.parquet")))
    model = task.build_model()
    assert model.classifier.out_features == 2
    assert model.classifier.weight.abs().sum() > 0


def test_the_two_tower_model_knows_words_but_only_captions_were_trained(built):
    task = tasks.from_name(str(built / "few-shot.toml"))
    assert task.classes == sorted(fashion.CLASSES)
    assert len(task.split("train")) == 64  # there are no 16 of a class here
    tokens = task.tokenizer(["a photo of a ankle boot", "a photo of a boat"])["input_ids"]
    assert len(set(tokens[0])) == len(tokens[0]) - 1 == 7  # no unknown word, "a" twice, both ends
    assert 1 in tokens[1]
    assert 1 not in tokens[0]
    model = task.build_model()
    # the text tower reads a prompt at its end: another class is another vector, the padding after it none
    logits = model(task.split("test").inputs["pixel_values"]).logits
    assert logits.shape == (40, 10)
    assert logits.std(1).min() > 0


def test_what_is_no_such_package_is_told_in_a_line(package, tmp_path, capsys):
    (file,) = package.rglob("t10k-labels-*")
    for content in (b"no gzip", gzip.compress(b"\x00\x00\x08\x03\x00"), packed(np.arange(39) % 10)):
        file.write_bytes(content)
        assert not fashion.build(tmp_path / "out", lambda place: package)
        said = capsys.readouterr().out
        assert said.startswith(f"{tmp_path / 'out'}: not built, dataset-fashion-mnist cannot be had (")
        assert said.count("\n") == 1
    file.unlink()
    assert not fashion.build(tmp_path / "out", lambda place: package)
    assert "(0 files t10k-labels-idx1-ubyte.gz in it)" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
