"""Coalitions that go through passes together against one after another, on one thread of a CPU.

`python tests/bench_together.py` prints a row for each number at once: the medians of CPU seconds, and the median ratio.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import Random, cpu
from making_adapters import random_adapter
from peft import LoraConfig

from lora_lab.adapters.groups import players
from lora_lab.analysis.coalitions.game import Game
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Execution
from lora_lab.scoring.models import TaskModels
from lora_lab.tasks.kinds.digits import Digits
from lora_lab.tasks.task import Task

_AT_ONCE = (2, 4, 8, 16, 32)


def seconds(task: Task, adapter: Any, coalitions: Any, *, examples: int, at_once: int, share: bool) -> float:
    """CPU seconds of asking for these, the model being there."""
    on = Execution("cpu", coalitions_at_once=at_once)
    build = functools.partial(TaskModels, share=share)
    game = Game(Evaluator([adapter], task, on, examples=examples, build=build), players(adapter))
    game.evaluator.layout  # noqa: B018 (builds the model)
    spent = cpu(lambda: game(coalitions))
    assert game.evaluator.effort.apart is None, game.evaluator.effort.apart
    return spent


def rows(name: str, task: Task, adapter: Any, count: int, examples: int, repeats: int) -> None:
    """A row for each number at once, with shared prefixes and without."""
    coalitions = np.unique(np.random.default_rng(0).random((count, len(players(adapter)))) < 0.5, axis=0)
    for share in (True, False):
        asked = functools.partial(seconds, task, adapter, coalitions, examples=examples, share=share)
        for at_once in _AT_ONCE:
            pairs = [(asked(at_once=0), asked(at_once=at_once)) for _ in range(repeats)]
            alone, together = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(b / a for a, b in pairs)
            what = f"{name}, {len(coalitions)} × {examples} examples, {'shared' if share else 'whole passes'}"
            print(f"{what:<68} {at_once:3d} {alone:8.3f} s {together:8.3f} s {ratio:7.2f}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--examples", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--coalitions", type=int, default=64)
    parser.add_argument("--only", choices=["digits", "bert"])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{'one thread, CPU seconds, medians':<68}   K    alone     together   ratio")
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, tuple[str, Task, str]] = {
            "digits": ("digits ViT", Digits("relabel"), r".*(q_proj|v_proj|fc1)"),
            "bert": ("BERT 12×384, 32 tokens", Random(12, 384), r".*(query|key|value)"),
        }
        for key in [chosen.only] if chosen.only else made:
            name, task, targets = made[key]
            config = LoraConfig(r=8, lora_alpha=16, target_modules=targets)
            adapter = random_adapter(task, Path(folder) / key, config, scale=0.02)
            for examples in chosen.examples:
                rows(name, task, adapter, chosen.coalitions, examples, chosen.repeats)


if __name__ == "__main__":
    main()
