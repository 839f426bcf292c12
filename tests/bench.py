"""Speed, as ratios measured side by side in one run: `make bench`.

Every pair is timed alternately, several times, in CPU seconds of this process on one thread; the table gives the
medians and the median of the ratios. Absolute times say more about the machine than about the code.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_commands import bench_commands
from bench_curves import steps_of_a_curve
from bench_estimators import bench_estimators
from bench_merging import bench_merging
from bench_workers import bench_workers
from making_adapters import random_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    get_wsd_schedule,
)

from lora_lab.adapters.adapter import Adapter
from lora_lab.adapters.groups import players
from lora_lab.adapters.models.attached import attach
from lora_lab.analysis.coalitions.game import Game
from lora_lab.analysis.lines.points import LineModels, MixPoint
from lora_lab.analysis.measured import scored
from lora_lab.analysis.questions import Shapley
from lora_lab.games.coalitions import all_coalitions
from lora_lab.merging.paths import Paths
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.models import TaskModels
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.tasks.task import Split, Task
from lora_lab.training.fit import train
from lora_lab.training.recipe import Recipe


def side_by_side(ours: Callable[[], float], theirs: Callable[[], float], repeats: int) -> tuple[float, float, float]:
    """Median seconds of both and the median ratio ours / theirs, runs alternating."""
    pairs = [(ours(), theirs()) for _ in range(repeats)]
    ratio = statistics.median(a / b for a, b in pairs)
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), ratio


def cpu(work: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


class Random(Task):
    """A BERT on random tokens; 6 × 384 is the shape of MiniLM."""

    labels = 2
    steps, train_batch_size, learning_rate = 6, 16, 1e-4

    record: dict[str, Any] = {"name": "bench"}  # noqa: RUF012 (never changed)

    def __init__(self, layers: int = 6, width: int = 384) -> None:
        self.name = self.about = self.base = f"bert-{layers}x{width}"
        self.layers, self.width = layers, width

    def build_model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=1000,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 32,
            intermediate_size=4 * self.width,
        )
        return BertForSequenceClassification(config).requires_grad_(False).eval()

    def _load(self, split: str) -> Split:
        tokens = torch.randint(
            0, 1000, (96 if split == "train" else 16, 32), generator=torch.Generator().manual_seed(0)
        )
        return Split({"input_ids": tokens, "labels": tokens[:, 0] % 2})


def plain_loop(task: Task, recipe: Recipe) -> float:
    """The same training, written by hand: CPU seconds of its steps."""
    recipe = recipe.for_task(task)
    torch.manual_seed(0)
    options = {"r": recipe.rank, "lora_alpha": recipe.alpha, "target_modules": recipe.target_modules}
    model = get_peft_model(task.build_model(), LoraConfig(**options)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    warmup, decay = round(recipe.warmup * recipe.steps), max(1, round((1 - recipe.stage) * recipe.steps))
    schedule = get_wsd_schedule(optimizer, warmup, decay, recipe.steps, decay_type="linear")
    inputs = task.split("train").inputs
    n, order = len(inputs["labels"]), []
    began = time.process_time()
    for _ in range(recipe.steps):
        if len(order) < recipe.batch_size:
            order = torch.randperm(n).tolist()
        chosen, order = order[: recipe.batch_size], order[recipe.batch_size :]
        model(**{name: tensor[chosen] for name, tensor in inputs.items()}).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return time.process_time() - began


def our_loop(task: Task, recipe: Recipe) -> float:
    """CPU seconds of the steps of our own training."""
    return float(train(task, recipe)[1].summary["cpu_s"])


def naive_curve(model: torch.nn.Module, task: Task, adapters: list[Adapter], folders: list[Any], weights: Any) -> None:
    """A curve as PEFT alone would walk it: a new adapter for every point."""
    wrapped = PeftModel.from_pretrained(model, folders[0], adapter_name="a")
    wrapped.load_adapter(folders[1], adapter_name="b")
    for point in weights:
        wrapped.add_weighted_adapter(["a", "b"], list(point), "point", combination_type="cat")
        wrapped.set_adapter("point")
        task.score(wrapped)
        wrapped.delete_adapter("point")


def report(name: str, wanted: str, found: tuple[float, float, float]) -> None:
    """A row of the table."""
    ours, theirs, ratio = found
    print(f"{name:<66} {ours:9.3f} s {theirs:9.3f} s {ratio:8.3f}  {wanted}", flush=True)


def bench_curves(repeats: int, folder: Any) -> None:
    """An 11-point curve against bare forward passes, and against PEFT's own way."""
    task = Digits("relabel")
    adapters = [train(task, Recipe(method="lora", seed=s, steps=30))[0] for s in (0, 1)]
    folders = [adapter.save(folder / str(i)) for i, adapter in enumerate(adapters)]
    batches = task.batches("test", torch.device("cpu"))

    @torch.inference_mode()
    def bare(model: torch.nn.Module) -> None:
        for _ in range(11):
            for batch in batches:
                model(pixel_values=batch["pixel_values"])

    weights = [(1 - t / 10, t / 10) for t in range(11)]
    corner = adapters[0].with_updates({name: -update for name, update in adapters[0].updates.items()}, source="c")
    plane = [(0.2 + t / 20, 0.5 - t / 10, 0.3 + t / 20) for t in range(11)]
    for what, given, places, space in (
        ("11-point curve (factors)", adapters, weights, "factors"),
        ("11-point curve (delta)", adapters, weights, "delta"),
        ("11 points of a plane", [*adapters, corner], plane, "delta"),
    ):
        points = [MixPoint(w, space) for w in places]

        def ours(points: list[MixPoint] = points, given: Any = given) -> float:
            return cpu(lambda: scored(Evaluator(given, task, build=LineModels), points, ()))

        with attach(task.build_model(), adapters[0]) as attached:
            attached.set(Paths(given).mix(places[4], space))  # as many columns as most points have
            model = attached.model
            bare(model)
            found = side_by_side(ours, lambda model=model: cpu(lambda: bare(model)), repeats)
        report(f"{what} / 11 bare forward passes", "at most 1.15", found)
    for space in ("factors", "delta"):
        timed = [functools.partial(cpu, steps) for steps in steps_of_a_curve(adapters, task, space)]
        report(f"training a curve ({space}) / the same model", "at most 1.15", side_by_side(*timed, repeats))

    points = [MixPoint(w, "delta") for w in weights]
    found = side_by_side(
        lambda: cpu(lambda: scored(Evaluator(adapters, task, build=LineModels), points, ())),
        lambda: cpu(lambda: naive_curve(task.build_model(), task, adapters, folders, weights)),
        repeats,
    )
    report("11-point ΔW curve / PEFT add_weighted_adapter per point", "below 1", found)


def bench_training(repeats: int) -> None:
    """CoTo against LoRA, and our Trainer against a loop written by hand."""
    task = Digits("relabel")
    lora = Recipe(method="lora")
    our_loop(task, Recipe(method="coto", steps=10))
    for optimizer, goal in (("adamw_torch", "at most 0.8"), ("adamw_torch_fused", "")):
        pair = [Recipe(method=method, optimizer=optimizer) for method in ("coto", "lora")]
        found = side_by_side(lambda p=pair: our_loop(task, p[0]), lambda p=pair: our_loop(task, p[1]), repeats)
        report(f"digits: CoTo / LoRA training, 300 steps, {optimizer}", goal, found)
    found = side_by_side(lambda: our_loop(task, lora), lambda: plain_loop(task, lora), repeats)
    report("digits: our LoRA training / a loop written by hand", "at most 1.35", found)
    bert = Random()
    recipe = Recipe(method="lora", target_modules=["query", "key", "value"])
    found = side_by_side(lambda: our_loop(bert, recipe), lambda: plain_loop(bert, recipe), repeats)
    report("BERT 6×384: our LoRA training / a loop written by hand", "at most 1.05", found)
    found = side_by_side(
        lambda: our_loop(bert, Recipe(method="coto", target_modules=["query", "key", "value"])),
        lambda: our_loop(bert, recipe),
        repeats,
    )
    report("BERT 6×384: CoTo / LoRA training", "", found)


def bench_sharing(repeats: int, folder: Any) -> None:
    """Coalitions with shared prefixes against one whole pass each."""
    task = Random(12, 384)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "key", "value"])
    adapter = random_adapter(task, folder / "wide", config, scale=0.02)
    shorten = np.random.default_rng(0).random((200, 12)) < 0.5
    report_sharing(
        "BERT 12×384: 200 random coalitions, shared / one pass each", "at most 0.5", task, adapter, shorten, repeats
    )
    name = "BERT 12×384: all 4096 coalitions, shared / one pass each"
    report_sharing(name, "at most 0.25", task, adapter, all_coalitions(12), 1)


SHAPES = ("ViT 6×384", "BERT 6×384", "Llama 6×384")


class Shape(Random):
    """A random model of a kind that people use, with examples of random content."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.name = self.about = self.base = self.kind = kind

    def build_model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        common = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        if self.kind.startswith("ViT"):
            config = ViTConfig(**common, image_size=96, patch_size=16, num_labels=2)
            return ViTForImageClassification(config).requires_grad_(False).eval()
        if self.kind.startswith("BERT"):
            return BertForSequenceClassification(BertConfig(vocab_size=1000, **common)).requires_grad_(False).eval()
        config = LlamaConfig(vocab_size=1000, **common, num_labels=2, pad_token_id=0)
        return LlamaForSequenceClassification(config).requires_grad_(False).eval()

    def _load(self, split: str) -> Split:
        made = super()._load(split)
        if self.kind.startswith("ViT"):
            labels = made.inputs["labels"]
            pixels = torch.randn(len(labels), 3, 96, 96, generator=torch.Generator().manual_seed(0))
            return Split({"pixel_values": pixels, "labels": labels})
        return made


def bench_models(repeats: int, folder: Any) -> None:
    """A training step of LoRA and CoTo on three architectures, and examples a second of a sweep of coalitions."""
    for kind in SHAPES:
        task = Shape(kind)
        pair = [Recipe(method=method, target_modules="all-linear", steps=8) for method in ("coto", "lora")]
        found = side_by_side(
            lambda t=task, p=pair: our_loop(t, p[0]), lambda t=task, p=pair: our_loop(t, p[1]), repeats
        )
        report(f"{kind}, all-linear: CoTo / LoRA training, 8 steps of 16", "at most 1", found)
    for kind in SHAPES:
        task = Shape(kind)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        adapter = random_adapter(task, folder / kind.partition(" ")[0], config, scale=0.02)
        coalitions = np.random.default_rng(0).random((64, len(players(adapter)))) < 0.5
        name = f"{kind}: 64 coalitions shared / a bare pass of the base each"
        model, batches = task.build_model(), task.batches("test", torch.device("cpu"))

        @torch.inference_mode()
        def bare(model: torch.nn.Module = model, batches: Any = batches) -> None:
            for _ in range(64):
                for batch in batches:
                    model(**{key: tensor for key, tensor in batch.items() if key != "labels"})

        def ours(task: Task = task, adapter: Adapter = adapter, coalitions: Any = coalitions) -> float:
            game = Game(Evaluator([adapter], task), players(adapter))
            game.cost(coalitions[:1])  # builds the model
            return cpu(lambda: game(coalitions))

        found = side_by_side(ours, lambda b=bare: cpu(b), repeats)
        report(name, "", found)
        examples = 64 * len(task.split("test"))
        print(f"  {examples / found[0]:.0f} examples/s of a CPU, bare passes {examples / found[1]:.0f}", flush=True)


class Smol(Random):
    """SmolLM2-135M's shape with random weights: the same work as the real one."""

    def __init__(self) -> None:
        super().__init__()
        self.name = self.about = self.base = "llama-30x576"

    def build_model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1000,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            num_labels=2,
            pad_token_id=0,
        )
        return LlamaForSequenceClassification(config).requires_grad_(False).eval()


def bench_arithmetic(repeats: int, folder: Any) -> None:
    """A Shapley run of 30 blocks against README's formula: C (1 − s) n t / v, v of bare passes with the adapter on."""
    task = Smol()
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    adapter = random_adapter(task, folder / "smol", config, scale=0.02)
    (batch,) = task.batches("test", torch.device("cpu"))
    asked: list[dict[str, Any]] = []

    def run() -> float:
        began = time.process_time()
        found = Shapley(estimator="antithetic", samples=5).run([adapter], task).summary["adapters"][0]
        asked.append({**found["engine"], "evaluations": found["evaluations"]})
        return time.process_time() - began

    def predicted() -> float:
        with attach(task.build_model(), adapter) as attached, torch.inference_mode():
            task.logits(attached.model, batch)
            a_pass = cpu(lambda: [task.logits(attached.model, batch) for _ in range(10)]) / 10
        asked[-1]["tokens_per_s"] = batch["input_ids"].numel() / a_pass
        return float(a_pass * asked[-1]["block_evaluations"] / 30)

    found = side_by_side(run, predicted, repeats)
    report("Llama 30×576: Shapley values, 5 orders / the formula's prediction", "about 1", found)
    last = asked[-1]
    saved = 1 - last["block_evaluations"] / last["naive_block_evaluations"]
    speed = f"v = {last['tokens_per_s']:.0f} tokens/s of a core"
    print(f"  C = {last['evaluations']}, s = {saved:.3f}, {speed}", flush=True)


def report_sharing(name: str, goal: str, task: Task, adapter: Adapter, coalitions: Any, repeats: int) -> None:
    """Two rows: against plain passes (of up to 256 coalitions, scaled up), and against the same blocks bare."""
    computed, kept = [], []

    def asked(rows: Any, share: bool) -> float:
        build = functools.partial(TaskModels, share=share)
        game = Game(Evaluator([adapter], task, build=build), players(adapter))
        game.cost(rows[:1])  # builds the model
        seconds = cpu(lambda: game(rows))
        if share:
            computed.append(game.evaluator.effort.computed)
            kept.append(game.evaluator.effort.kept_bytes)
        return seconds

    subset = coalitions[:: max(1, len(coalitions) // 256)]
    times = len(coalitions) / len(subset)
    found = side_by_side(lambda: asked(coalitions, True), lambda: times * asked(subset, False), repeats)
    report(name, goal, found)
    share = computed[0] / (12 * len(coalitions))
    report(
        "  the same, to bare passes over the same blocks", "at most 1.1", (found[0], found[1] * share, found[2] / share)
    )
    print(f"  {share:.2f} of the blocks; activations kept: {kept[0] / 2**20:.1f} MiB", flush=True)


BENCHES = ("curves", "training", "sharing", "estimators", "merging", "models", "arithmetic", "workers", "commands")


def main() -> None:
    """Print the table."""
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=BENCHES)
    parser.add_argument("--keep", type=Path, help="folder for the large games of `estimators`, half an hour's")
    parser.add_argument("--data", type=Path, help="what `make data` wrote, for the games of MiniLM")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{'one thread, CPU seconds, medians':<66} {'ours':>11} {'other':>11} {'ratio':>8}  goal")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        benches = {
            "curves": lambda: bench_curves(chosen.repeats, folder),
            "training": lambda: bench_training(chosen.repeats),
            "sharing": lambda: bench_sharing(chosen.repeats, folder),
            "estimators": lambda: bench_estimators(folder, chosen.keep, chosen.data),
            "merging": bench_merging,
            "models": lambda: bench_models(chosen.repeats, folder),
            "arithmetic": lambda: bench_arithmetic(chosen.repeats, folder),
            "workers": lambda: bench_workers(chosen.repeats, folder),
            "commands": lambda: bench_commands(folder, repeats=chosen.repeats),
        }
        for each in [chosen.only] if chosen.only else benches:
            benches[each]()


if __name__ == "__main__":
    main()
