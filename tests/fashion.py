"""Fashion-MNIST as a testbed (`make data`): tables of images, eight tasks, and a base that is pre-trained here.

The images are Zalando's (Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747; MIT licence): 70,000 of 28 × 28 grey pixels in
ten classes, as Debian's package dataset-fashion-mnist carries them. None is in this repository. What is written:

* upright, rotated, inverted, turned: a folder each with a table a split (parquet: PNG images, a column a labelling).
  2,000 training and 500 validation images are drawn from the package's training images, 1,000 test images from its
  test images, all by one seed; the four folders have the same images.
* vit: a vision transformer, pre-trained without labels on the training images by SimCLR (Chen et al. 2020,
  arXiv:2002.05709). It is made once, in some minutes of a core, and kept.
* NAME.toml: a task each, with a head of its own: a probe that is fitted to the base and frozen.
* clip: a two-tower model, trained on the training images with captions that name the superclass, or the class where it
  is one of `CAPTIONED`. The other classes' names are words that it has never seen.
* few-shot.toml: all ten classes by their names in words, from 16 images each.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from corpora import MissingError, from_debian
from fashion_bases import Images, Labels, save_two_towers, vit
from PIL import Image

from lora_lab.files.disk import replacing, write_bytes

PACKAGE = "dataset-fashion-mnist"
SIZES = {"train": 2000, "validation": 500, "test": 1000}
CLASSES = (
    "T-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
KINDS = ("top", "trousers", "top", "dress", "top", "shoe", "top", "shoe", "bag", "shoe")
"""The class's superclass."""
HALVES = (0, 0, 1, 1, 0, 0, 1, 1, 1, 0)
"""An arbitrary halving, across what looks alike."""

CAPTIONED = ("T-shirt", "trousers", "dress", "sandal", "bag")

Column = Callable[[Labels, Labels], list[Any]]
"""(Classes, quarter turns) → a column of labels."""
COLUMNS: dict[str, Column] = {
    "class": lambda y, turns: [CLASSES[i] for i in y],
    "superclass": lambda y, turns: [KINDS[i] for i in y],
    "half": lambda y, turns: [HALVES[i] for i in y],
    "mod3": lambda y, turns: (y % 3).tolist(),
    "pair": lambda y, turns: (y // 2).tolist(),
    "turns": lambda y, turns: turns.tolist(),
}


def _turned(images: Images, turns: Labels) -> Images:
    return np.stack([np.rot90(image, k) for image, k in zip(images, turns, strict=True)])


FOLDERS: dict[str, Callable[[Images, Labels], Images]] = {
    "upright": lambda images, turns: images,
    "rotated": lambda images, turns: np.rot90(images, axes=(1, 2)),
    "inverted": lambda images, turns: 255 - images,
    "turned": _turned,
}
"""(Images, quarter turns counter-clockwise) → the images of a folder."""

TASKS = {
    "identity": ("upright", "class", "which of the ten classes"),
    "rotated": ("rotated", "class", "the same of images turned by 90°"),
    "inverted": ("inverted", "class", "the same of negatives"),
    "rotation": ("turned", "turns", "by how many quarter turns the image is turned"),
    "superclass": ("upright", "superclass", "tops, trousers, dresses, shoes or bags"),
    "halves": ("upright", "half", "an arbitrary halving of the classes, across what looks alike"),
    "mod3": ("upright", "mod3", "the class's number mod 3"),
    "pairs": ("upright", "pair", "the class's number // 2"),
}
"""Name → folder of images, column of labels, what is asked."""


STEPS = {"vit": 600, "clip": 300}
"""Of the bases' trainings."""


def build(folder: Path, fetch: Callable[[Path], Path], *, steps: Mapping[str, int] = STEPS, batch: int = 256) -> bool:
    """Write tables, base and task files; False, and a line that says why, where the images cannot be had."""
    try:
        with tempfile.TemporaryDirectory() as place:
            found = fetch(Path(place))
            train, test = (read(found, name) for name in ("train", "t10k"))
    except (MissingError, OSError, tarfile.TarError, ValueError, struct.error) as error:
        print(f"{folder}: not built, {PACKAGE} cannot be had ({str(error).partition(chr(10))[0]})")
        return False
    tables(folder, train, test)
    for name in TASKS:
        write_bytes(folder / f"{name}.toml", task_file(name).encode())
    write_bytes(folder / "few-shot.toml", few_shot().encode())
    print(
        f"{folder}: {len(TASKS) + 1} tasks, {', '.join(f'{size} {split}' for split, size in SIZES.items())} images each"
    )
    kept(folder / "vit", lambda place: vit(train[0], steps["vit"], batch).save_pretrained(place))
    names = [{name, kind} if name in CAPTIONED else {kind} for name, kind in zip(CLASSES, KINDS, strict=True)]
    captions = [sorted(each) for each in names]
    kept(folder / "clip", lambda place: save_two_towers(place, *train, captions, CLASSES, steps["clip"], batch))
    return True


# Tables and task files.


def read(package: Path, name: str) -> tuple[Images, Labels]:
    """Images and classes of a part of the package; ValueError where they are not what they should be."""
    content = []
    for part, axes in (("images", 3), ("labels", 1)):
        file = f"{name}-{part}-idx{axes}-ubyte.gz"
        places = list(package.rglob(file))
        if len(places) != 1:
            raise ValueError(f"{len(places)} files {file} in it")
        content.append(idx(places[0].read_bytes(), axes))
    images, labels = content[0], content[1].astype(np.int64)
    if len(images) != len(labels) or labels.max() >= len(CLASSES):
        raise ValueError(f"{name}: {len(images)} images and {len(labels)} labels from 0 to {labels.max()}")
    return images, labels


def idx(packed: bytes, axes: int) -> Images:
    """The array of bytes of a gzipped IDX file: 0, 0, 8, number of axes, their lengths (big-endian), the values."""
    content = gzip.decompress(packed)
    zeros, kind, found, *shape = struct.unpack_from(f">HBB{axes}I", content)
    if (zeros, kind, found) != (0, 8, axes) or len(content) != 4 + 4 * axes + np.prod(shape, dtype=np.int64):
        raise ValueError(f"no IDX file of bytes in {axes} axes")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def tables(folder: Path, train: tuple[Images, Labels], test: tuple[Images, Labels]) -> None:
    """A table for every folder and split; smaller parts than `SIZES` are shared in their proportions."""
    draw = np.random.default_rng(0)
    order, of_test = draw.permutation(len(train[0])), draw.permutation(len(test[0]))
    first = min(SIZES["train"], len(order) * SIZES["train"] // (SIZES["train"] + SIZES["validation"]))
    drawn = {
        "train": (train, order[:first]),
        "validation": (train, order[first : first + SIZES["validation"]]),
        "test": (test, of_test[: SIZES["test"]]),
    }
    for split, ((images, classes), rows) in drawn.items():
        turns = draw.integers(0, 4, len(rows))
        for name, change in FOLDERS.items():
            columns = sorted({column for of, column, _ in TASKS.values() if of == name})
            labels = {column: COLUMNS[column](classes[rows], turns) for column in columns}
            write_bytes(folder / name / f"{split}.parquet", table(change(images[rows], turns), labels))


def table(images: Images, labels: Mapping[str, list[Any]]) -> bytes:
    """A parquet file of the images, as PNG, and their labels."""
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"image": [png(image) for image in images], **labels}), file)
    return file.getvalue()


def png(image: Images) -> bytes:
    """The image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(file, "PNG")
    return file.getvalue()


def task_file(name: str) -> str:
    """The TOML file of a task."""
    folder, column, about = TASKS[name]
    keys = {
        "kind": "image-classification",
        "base": "vit",
        "label": column,
        "head": "probe",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
        "rank": 4,
        "learning_rate": 3e-3,
        "batch_size": 32,
        "steps": 150,
    }
    return written(name, about, keys, folder)


def few_shot() -> str:
    """The TOML file of the two-tower model's task: adapters on q, k and v of both encoders, as in the paper of CoTo."""
    keys = {
        "kind": "clip",
        "base": "clip",
        "label": "class",
        "prompt": "a photo of a {}",
        "shots": 16,
        "rank": 2,
        "learning_rate": 3e-3,
        "batch_size": 32,
        "steps": 200,
    }
    return written("few-shot", "which of the ten classes, from 16 images of each", keys, "upright")


def written(name: str, about: str, keys: Mapping[str, Any], folder: str) -> str:
    """A task file of these keys on the tables of a folder."""
    lines = [f"# Fashion-MNIST: {about}. Written by `make data`: lora-lab train --task {name}.toml"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    lines += ["[data]", *(f'{split} = "{folder}/{split}.parquet"' for split in SIZES)]
    return "\n".join(lines) + "\n"


def kept(place: Path, make: Callable[[Path], object]) -> None:
    """The folder that `make` fills, whole or not at all; one that is there stays as it is."""
    if place.exists():
        print(f"{place}: there already, and kept")
        return
    with replacing(place) as beside:
        make(beside)
    print(f"{place}: made")


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "data/fashion")
    sys.exit(0 if build(target, partial(from_debian, [PACKAGE])) else 1)
