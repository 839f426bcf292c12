"""Speed, as ratios measured side by side in one run: `make bench`.

Every pair is timed alternately, several times, in CPU seconds of this process on one thread; the table gives the
medians and the median of the ratios. Absolute times say more about the machine than about the code.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, get_wsd_schedule

from lora_lab.adapter import Adapter
from lora_lab.attach import attach
from lora_lab.connect import Point, evaluate
from lora_lab.digits import Digits
from lora_lab.mix import Mixer
from lora_lab.recipe import Recipe
from lora_lab.task import Split, Task
from lora_lab.train import train


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
    """A BERT of 6 × 384, the shape of MiniLM, on random tokens."""

    name = about = base = "bert-6x384"
    labels = 2
    steps, train_batch_size, learning_rate = 6, 16, 1e-4

    record: dict[str, Any] = {"name": "bench"}  # noqa: RUF012 (never changed)

    def build_model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=1000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
        return BertForSequenceClassification(config).requires_grad_(False).eval()

    def _load(self, split: str) -> Split:
        tokens = torch.randint(0, 1000, (96 if split == "train" else 4, 32), generator=torch.Generator().manual_seed(0))
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
    recipe = Recipe(method="lora", steps=30)
    adapters = [train(task, Recipe(method="lora", seed=s, steps=recipe.steps))[0] for s in (0, 1)]
    folders = [adapter.save(folder / str(i)) for i, adapter in enumerate(adapters)]
    batches = task.batches("test", torch.device("cpu"))

    @torch.inference_mode()
    def bare(model: torch.nn.Module) -> None:
        for _ in range(11):
            for batch in batches:
                model(pixel_values=batch["pixel_values"])

    weights = [(1 - t / 10, t / 10) for t in range(11)]
    for space in ("factors", "delta"):
        points = [Point(w, space) for w in weights]

        def ours(points: list[Point] = points) -> float:
            return cpu(lambda: evaluate(Mixer(adapters), task, points))

        with attach(task.build_model(), adapters[0]) as attached:
            if space == "delta":  # as many columns as most points of the curve have
                attached.set(Mixer(adapters).mix(weights[5], "delta"))
            model = attached.model
            bare(model)
            found = side_by_side(ours, lambda model=model: cpu(lambda: bare(model)), repeats)
        report(f"11-point curve ({space}) / 11 bare forward passes", "at most 1.15", found)

    points = [Point(w, "delta") for w in weights]
    found = side_by_side(
        lambda: cpu(lambda: evaluate(Mixer(adapters), task, points)),
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


def main() -> None:
    """Print the table."""
    import tempfile
    from pathlib import Path

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["curves", "training"])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{'one thread, CPU seconds, medians':<66} {'ours':>11} {'other':>11} {'ratio':>8}  goal")
    if chosen.only != "training":
        with tempfile.TemporaryDirectory() as folder:
            bench_curves(chosen.repeats, Path(folder))
    if chosen.only != "curves":
        bench_training(chosen.repeats)


if __name__ == "__main__":
    main()
