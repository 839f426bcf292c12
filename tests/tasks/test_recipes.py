"""Ready files for published set-ups, on tiny random models of the same architectures and tables of the same columns."""

import runpy
import shutil
import sys

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pictures
from tiny_language import write_causal
from tiny_models import write_clip

from lora_lab import tasks
from lora_lab.claims.claims import read
from lora_lab.claims.reproduce import Reproduce
from lora_lab.files.disk import read_json
from lora_lab.files.toml import read_toml
from lora_lab.scoring.evaluate import score
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

FOLDERS = ("clip", "knots", "commonsense", "math")
PUBLISHED = {"clip": (2, 1.0), "knots": (16, 16.0), "commonsense": (32, 64.0), "llama-2-7b": (8, 16.0)}
PUBLISHED["llama-3.2-3b"] = (32, 64.0)
"""Set-up → rank and α."""
BEDS = {"clip": "clip-11", "knots": "knots-8", "commonsense": "commonsense", "llama-2-7b": "math"}
BEDS["llama-3.2-3b"] = "peft"

IMAGES = {
    "ILSVRC/imagenet-1k": ("train", "validation", "test"),
    "flwrlabs/caltech101": ("train",),
    "tanganke/dtd": ("train", "test"),
    "tanganke/eurosat": ("train", "test", "contrast"),
    "HuggingFaceM4/FGVC-Aircraft": ("train", "validation", "test"),
    "ethz/food101": ("train", "validation"),
    "dpdl-benchmark/oxford_flowers102": ("train", "validation", "test"),
    "timm/oxford-iiit-pet": ("train", "test"),
    "tanganke/stanford_cars": ("train", "test"),
    "tanganke/sun397": ("train", "test"),
    "tanganke/gtsrb": ("train", "test", "contrast"),
    "tanganke/resisc45": ("train", "test"),
    "ylecun/mnist": ("train", "test"),
    "ufldl-stanford/svhn": ("train", "test", "extra"),
}
"""Repository → its splits on the hub."""
CHOICES = {"label": ["A", "B", "C"], "text": ["red", "green", "blue"]}
QUESTIONS = {
    "google/boolq": {"question": "is grass green", "answer": True, "passage": "the grass is green"},
    "ybisk/piqa": {"goal": "the colour of blood", "sol1": "red", "sol2": "blue", "label": 0},
    "allenai/social_i_qa": {
        "context": "one plus one",
        "question": "what equals?",
        "answerA": "one",
        "answerB": "two",
        "answerC": "three",
        "label": "2",
    },
    "Rowan/hellaswag": {"ctx": "the sky is", "endings": ["red", "green", "blue", "four"], "label": "2"},
    "allenai/winogrande": {"sentence": "the _ is blue", "option1": "sky", "option2": "grass", "answer": "1"},
    "allenai/ai2_arc": {"question": "colour of grass?", "choices": CHOICES, "answerKey": "B"},
    "allenai/openbookqa": {"question_stem": "colour of sky?", "choices": CHOICES, "answerKey": "C"},
    "meta-math/MetaMathQA": {"query": "one plus two", "response": "three #### 3 The answer is: 3", "type": "GSM"},
    "openai/gsm8k": {"question": "two plus two", "answer": "four\n#### 4"},
}
"""Repository → a row as the hub has them."""
RIGHT = {"boolq": "yes", "piqa": "red", "siqa": "two", "hellaswag": "blue", "winogrande": "sky"}
RIGHT |= {"arc-easy": "green", "arc-challenge": "green", "openbookqa": "blue"}


def of_hub(repository, *_, **__):
    """A dataset with the rows' columns, and the splits that are needed."""
    row = QUESTIONS[repository]
    rows = [row] * (60 if repository.startswith("meta-math") else 12)
    splits = ("train",) if repository.startswith("meta-math") else ("train", "validation", "test")
    return DatasetDict({split: Dataset.from_list(rows) for split in splits})


@pytest.fixture(scope="module")
def place(tmp_path_factory, request):
    """A copy of the recipes with their tables, bases of the same architectures, and images under the hub's names."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(request.config.rootpath / "figures" / "recipes", folder / "recipes")
    write_causal(folder)
    write_clip(folder / "clip", longest=77)
    draw = np.random.default_rng(0)
    for repository, splits in IMAGES.items():
        label = "variant" if "Aircraft" in repository else "label"
        names = [f"{i}" for i in range(43)] if "gtsrb" in repository else ["red", "green", "blue"]
        features = Features({"image": Image(), label: ClassLabel(names=names), "more": Value("string")})
        n = 60 if "validation" not in splits else 20
        rows = {
            "image": [Pictures.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(n)],
            label: [i % len(names) for i in range(n)],
            "more": [""] * n,
        }
        made = Dataset.from_dict(rows, features=features)
        hidden = Dataset.from_dict({**rows, label: [-1] * n}, features=features)
        unlabelled = repository.startswith("ILSVRC")
        DatasetDict({s: hidden if unlabelled and s == "test" else made for s in splits}).save_to_disk(
            folder / "hub" / repository
        )
    for i in range(24):
        where = (
            folder / "recipes" / "data" / "ucf101" / ("test" if i % 4 == 0 else "train") / ("Archery", "Bowling")[i % 2]
        )
        where.mkdir(parents=True, exist_ok=True)
        Pictures.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(where / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.load_dataset", of_hub)
        patch.setattr(sys, "argv", ["tables.py"])
        runpy.run_path(str(folder / "recipes" / "tables.py"), run_name="__main__")
    return folder


def files(folder):
    return [path for name in FOLDERS for path in sorted((folder / name).glob("*.toml"))]


def set_up(path):
    return path.stem if path.parent.name == "math" else path.parent.name


def built(place, path):
    """The task of a file with a tiny base, the hub's data as a folder, and short answers."""
    keys = read_toml(path, "a task file")
    keys["base"] = str(place / ("clip" if keys["kind"] == "clip" else "llama"))
    if isinstance(keys["data"], str) and keys["data"] in IMAGES:
        keys["data"] = str(place / "hub" / keys["data"])
    keys.pop("data_config", None)
    if keys["kind"] == "generation":
        keys["max_new_tokens"] = 16
    return tasks.from_record(keys, base=path.parent, where=str(path))


def test_tables_hold_the_right_answers(place):
    found = {}
    for path in (place / "recipes" / "data" / "commonsense").glob("*.jsonl"):
        rows = Dataset.from_json(str(path))
        found[path.stem] = rows[0]["choices"][rows[0]["answer"]]
        assert set(rows.column_names) == {"question", "choices", "answer"}
        assert len(rows) == (96 if path.stem in ("train", "all") else 12)
    assert {name: found[name] for name in RIGHT} == RIGHT
    assert set(found) == {*RIGHT, "train", "all"}


def test_every_recipe_trains_and_is_scored(place):
    """Two steps and an evaluation each, with the recipe of its testbed: about a third of a second a file."""
    _, beds = read(place / "recipes" / "testbeds.toml")
    paths = files(place / "recipes")
    assert len(paths) == 11 + 8 + 9 + 2
    for path in paths:
        task, name = built(place, path), set_up(path)
        rank, alpha = PUBLISHED[name]
        on_cpu = {"bf16": False, "batch_size": 2, "steps": 2}
        adapter, _ = train(task, Recipe(**{"method": "coto", **beds[BEDS[name]].recipe, **on_cpu}))
        assert {module.A.shape[0] for module in adapter.updates.values()} == {rank}, path
        assert {adapter.config["r"], adapter.config["lora_alpha"]} == {rank, alpha}, path
        model = task.build_model()
        encoders = (
            ("text_model.", "vision_model.") if name == "clip" else ("vision_model.",) if name == "knots" else ("",)
        )
        targets = wanted(name)
        expected = {
            module
            for module, _ in model.named_modules()
            if module.startswith(encoders) and ".layers." in module and module.rpartition(".")[2] in targets
        }
        assert set(adapter.updates) == expected, path
        assert len(expected) == 2 * len(targets) * len(encoders), path
        scores = score(task, adapter)
        assert np.isfinite(scores.loss).all(), path
        task.split("validation")


def wanted(name):
    attention = ("q_proj", "k_proj", "v_proj")
    return {
        "clip": attention,
        "knots": (*attention, "out_proj"),
        "commonsense": (*attention, "up_proj", "down_proj"),
        "llama-2-7b": (*attention, "o_proj", "gate_proj", "up_proj", "down_proj"),
        "llama-3.2-3b": ("q_proj", "v_proj"),
    }[name]


def test_few_shots_are_read_alone(place, monkeypatch):
    """Of a table with a million images, sixteen a class may be in memory."""
    task = built(place, place / "recipes" / "clip" / "dtd.toml")
    read_images = []
    monkeypatch.setattr(type(task), "_cells", lambda _, rows, name: read_images.append((name, len(rows))) or rows[name])
    task.settings = type(task.settings)(**{**vars(task.settings), "shots": 2})
    assert len(task.split("train")) == 6
    assert ("image", 6) in read_images
    assert all(count == 6 for name, count in read_images if name == "image")


def test_testbeds_plan_what_their_files_say(place, request):
    own, _ = read()
    where = request.config.rootpath / "figures" / "recipes"
    claims, beds = read(where / "testbeds.toml")
    assert claims == own
    for bed in beds.values():
        plan = Reproduce(testbed=bed.name, file=where / "testbeds.toml").plan()
        assert list(plan.trainings())
        for name in bed.tasks + bed.merged:
            assert tasks.from_name(name).settings.rank, name
    named = {name for bed in beds.values() for name in bed.tasks + bed.merged}
    alone = {str(path) for path in (where / "commonsense").glob("*.toml") if path.stem != "all"}
    assert named | alone == {str(path) for path in files(where)}


def test_the_page_trains_with_the_recipes_of_the_testbeds(place, lora_lab):
    """Every command is one that there is, with options that there are; α, warm-up and the like as in testbeds.toml."""
    page = (place / "recipes" / "README.md").read_text()
    _, beds = read(place / "recipes" / "testbeds.toml")
    commands = [line.split("#")[0].split()[1:] for line in page.splitlines() if line.startswith("    lora-lab ")]
    assert {words[0] for words in commands} == {
        "reproduce",
        "train",
        "interpolate",
        "sweep",
        "evaluate",
        "compare-merges",
    }
    helps = {verb: lora_lab(verb, "--help")[1] for verb in {words[0] for words in commands}}
    for words in commands:
        for option in (word for word in words if word.startswith("--")):
            assert option in helps[words[0]], (words[0], option)
    trained = set()
    for words in (words for words in commands if words[0] == "train"):
        given = {name[2:].replace("-", "_"): value for name, value in zip(words, [*words[1:], ""], strict=True)}
        path = place / "recipes" / given["task"]
        assert path.exists()
        trained.add(set_up(path))
        recipe = dict(beds[BEDS[set_up(path)]].recipe)
        if more := recipe.pop("peft_config", None):
            assert read_json(place / "recipes" / given["peft_config"]) == more
        for name, value in recipe.items():
            assert name in given, (given["task"], name)
            assert value is True or float(given[name]) == value, (given["task"], name)
    assert trained == set(BEDS)
