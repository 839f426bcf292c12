"""One worker against two, wall seconds: `python tests/bench.py --only workers`."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from making_adapters import random_adapter
from peft import LoraConfig

from lora_lab.adapters.groups import players
from lora_lab.analysis.coalitions.game import Game
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Execution
from lora_lab.scoring.sharing.workers import Workers, open_workers
from lora_lab.tasks.kinds.digits import Digits

COALITIONS = 1000


def bench_workers(repeats: int, folder: Path) -> None:
    """Coalitions of 24 modules of a digits adapter: here, with one worker and with two, which are there already."""
    task = Digits("relabel")
    config = LoraConfig(r=4, target_modules=r"vit\..*\.(q_proj|k_proj|v_proj|fc1)")
    adapter = random_adapter(task, folder / "workers", config, scale=0.05)
    coalitions = np.unique(np.random.default_rng(0).random((COALITIONS, 24)) < 0.5, axis=0)

    def wall(workers: Workers | None) -> float:
        game = Game(Evaluator([adapter], task, Execution(workers=workers)), players(adapter, "module"))
        game.cost(coalitions)  # the model is built, and the workers are there
        if workers:
            workers.map(game.evaluator._setup, [_nothing] * workers.size)
        began = time.perf_counter()
        game(coalitions)
        return time.perf_counter() - began

    found: dict[int, list[float]] = {0: [], 1: [], 2: []}
    started: dict[int, float] = {}
    for _ in range(repeats):
        found[0].append(wall(None))
        for count in (1, 2):
            began = time.perf_counter()
            with open_workers(ray=f"local:{count}") as workers:
                started[count] = time.perf_counter() - began
                found[count].append(wall(workers))
    here, one, two = (statistics.median(found[count]) for count in (0, 1, 2))
    print(
        f"{len(coalitions)} coalitions, wall seconds on {os.cpu_count()} cores, {torch.get_num_threads()} thread each"
    )
    print(f"  here {here:.1f}, one worker {one:.1f}, two {two:.1f}: two are {one / two:.2f} times as fast as one")
    print(f"  all: {found}; load average {os.getloadavg()[0]:.1f}; a cluster starts in {started[2]:.1f} s", flush=True)


def _nothing(evaluator: Evaluator) -> None:
    """Builds the model, and keeps the worker busy until the other one has come, too."""
    assert evaluator.layout.blocks
    time.sleep(5)
