"""What a GPU gives, in one table: `python tests/gpu.py --json gpu.json` (about five minutes on one card).

Scoring, training steps, coalitions that go through passes together against one after another, and merges. Every row is
printed, and written into the JSON, as soon as it is there, so that a time limit loses nothing; rows for which there
are no minutes left are named. `--cpu` runs all of it at tiny sizes, which says nothing of speed.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from making_adapters import random_adapter
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from lora_lab.adapters.adapter import Adapter, from_updates
from lora_lab.adapters.groups import players
from lora_lab.adapters.lowrank import LowRank
from lora_lab.analysis.coalitions.game import Game
from lora_lab.merging.merged import merge
from lora_lab.merging.sources import Sources
from lora_lab.results.result import versions
from lora_lab.scoring.evaluator import Evaluator
from lora_lab.scoring.execution import Execution
from lora_lab.scoring.models import TaskModels
from lora_lab.tasks.task import Split, Task
from lora_lab.training.coto import Switches
from lora_lab.training.schedule import Schedule

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    layers: int = 12
    width: int = 768
    tokens: int = 64
    examples: int = 200
    coalitions: int = 200
    at_once: tuple[int, ...] = (4, 16, 64)
    steps: int = 30
    rank: int = 16
    blocks: int = 32
    """Of the merged adapters."""
    linears: dict[str, tuple[int, int]] = field(
        default_factory=lambda: {
            "self_attn.q_proj": (4096, 4096),
            "self_attn.k_proj": (1024, 4096),
            "self_attn.v_proj": (1024, 4096),
            "self_attn.o_proj": (4096, 4096),
            "mlp.gate_proj": (14336, 4096),
            "mlp.up_proj": (14336, 4096),
            "mlp.down_proj": (4096, 14336),
        }
    )


TINY = Sizes(2, 32, 8, 6, 4, (2,), 2, 2, 2, {"self_attn.q_proj": (32, 16), "mlp.up_proj": (48, 16)})


class Texts(Task):
    """A random BERT on random texts."""

    labels = 2
    batch_size = 200

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        self.sizes, self.kind = sizes, dtype
        self.name = self.about = self.base = f"bert-{sizes.layers}x{sizes.width}-{dtype}"

    @property
    def record(self) -> dict[str, Any]:
        return {"name": self.name}

    def build_model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        width = self.sizes.width
        shape = BertConfig(
            vocab_size=1000,
            hidden_size=width,
            num_hidden_layers=self.sizes.layers,
            num_attention_heads=max(1, width // 64),
            intermediate_size=4 * width,
        )
        return BertForSequenceClassification(shape).requires_grad_(False).eval().to(self.kind)

    def _load(self, split: str) -> Split:
        shape = self.sizes.examples, self.sizes.tokens
        tokens = torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(0))
        return Split({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[:, 0] % 2})


class Bench:
    """The rows, on one device."""

    def __init__(self, sizes: Sizes, device: torch.device, folder: Path) -> None:
        self.sizes, self.device, self.folder = sizes, device, folder
        self._alone: dict[tuple[torch.dtype, bool], tuple[float, Any]] = {}

    def rows(self) -> Iterator[tuple[str, Callable[[], Row]]]:
        """(Name, what measures it), the most wanted first."""
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            name = str(dtype).removeprefix("torch.")
            for share in (False, True):
                how = "shared" if share else "whole passes"
                yield f"coalitions {name}, one by one, {how}", functools.partial(self.one_by_one, dtype, share)
            for at_once in (None, *self.sizes.at_once):
                title = f"coalitions {name}, {at_once or 'as many as pay'} at once"
                yield title, functools.partial(self.together, dtype, at_once)
        for method in ("ties", "task-arithmetic"):
            yield f"merge {method}, 4 of rank {self.sizes.rank}", functools.partial(self.merged, method)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            yield f"scoring {name}", functools.partial(self.scored, dtype)
            for coto in (False, True):
                title = f"training step {name}, {'CoTo' if coto else 'LoRA'}"
                yield title, functools.partial(self.trained, dtype, coto)
        yield (
            "coalitions bfloat16, compiled",
            functools.partial(self.together, torch.bfloat16, max(2, self.sizes.at_once[-1] // 2), compiled=True),
        )

    def one_by_one(self, dtype: torch.dtype, share: bool) -> Row:
        """Coalitions of blocks, each with passes of its own."""
        seconds, (worths, _) = self._asked(dtype, 0, share=share)
        self._alone[dtype, share] = seconds, worths
        return {"seconds": seconds}

    def together(self, dtype: torch.dtype, at_once: int | None, *, compiled: bool = False) -> Row:
        """The same, several a pass, and how many times faster that is."""
        seconds, (worths, apart) = self._asked(dtype, at_once, share=True, compiled=compiled)
        row: Row = {"seconds": seconds, "one after another since": apart}
        for share, title in ((False, "faster than whole passes"), (True, "faster than shared")):
            if (dtype, share) in self._alone:
                alone, expected = self._alone[dtype, share]
                row[title] = alone / seconds
                row["largest difference"] = float(np.abs(worths - expected).max())
        return row

    def _asked(
        self, dtype: torch.dtype, at_once: int | None, *, share: bool, compiled: bool = False
    ) -> tuple[float, tuple[Any, str | None]]:
        task = Texts(self.sizes, dtype)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"])
        adapter = self._adapter(task, config)
        # on a CPU nothing is at once by itself
        on = Execution(
            self.device,
            coalitions_at_once=2 if at_once is None and self.device.type == "cpu" else at_once,
            compile="aot_eager" if compiled and self.device.type == "cpu" else compiled,
        )
        build = functools.partial(TaskModels, share=share)
        game = Game(Evaluator([adapter], task, on, build=build), players(adapter), worth="loss")
        shape = self.sizes.coalitions, len(players(adapter))
        coalitions = np.random.default_rng(0).random(shape) < 0.5
        first = np.random.default_rng(1).random((8, shape[1])) < 0.5
        first[0] = False
        game(first)  # builds the model, finds what can go together, and compiles
        seconds, worths = timed(self.device, lambda: game(coalitions))
        return seconds, (worths, game.evaluator.effort.apart)

    def _adapter(self, task: Task, config: LoraConfig) -> Adapter:
        place = self.folder / task.name
        return Adapter.load(place) if place.exists() else random_adapter(task, place, config, scale=0.02)

    @torch.inference_mode()
    def scored(self, dtype: torch.dtype) -> Row:
        """A pass over the examples."""
        task = Texts(self.sizes, dtype)
        model = task.build_model().to(self.device)
        task.score(model)
        seconds, scores = timed(self.device, lambda: task.score(model))
        return {"seconds": seconds, "examples/s": len(scores) / seconds, "loss": scores.mean_loss}

    def trained(self, dtype: torch.dtype, coto: bool) -> Row:
        """Steps of 16 examples with AdamW; the median after three."""
        task, steps = Texts(self.sizes, dtype), self.sizes.steps
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"])
        model = get_peft_model(task.build_model().to(self.device), config).train()  # type: ignore[arg-type]
        leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(leaves, lr=1e-4, fused=True)
        scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        batch = {name: tensor[:16].to(self.device) for name, tensor in task.split("train").inputs.items()}
        losses, times = [], []

        def step() -> None:
            optimizer.zero_grad()
            loss = model(**batch).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(float(loss))

        with Switches(model) as switches:
            for at in range(steps):
                if coto:
                    switches.draw(Schedule(), at, steps, seed=0)
                times.append(timed(self.device, step)[0])
        if not np.isfinite(losses).all():
            raise ValueError(f"the loss is {losses[-1]}")
        return {"seconds": float(np.mean(times[min(3, steps - 1) :])), "loss": losses[-1]}

    def merged(self, method: str) -> Row:
        """All linear layers of four adapters, cut to their rank."""
        shapes = {f"model.layers.{i}.{n}": s for i in range(self.sizes.blocks) for n, s in self.sizes.linears.items()}
        like = Adapter({}, {"peft_type": "LORA", "r": self.sizes.rank}, {})
        made = []
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            updates = {name: self._update(shape, generator) for name, shape in shapes.items()}
            made.append(from_updates(updates, like=like, source=f"a{seed}"))
        work = functools.partial(merge, Sources(made, place=self.device), method, rank=self.sizes.rank)
        return {"seconds": timed(self.device, work)[0], "linears": len(shapes)}

    def _update(self, shape: tuple[int, int], generator: torch.Generator) -> LowRank:
        A = torch.randn(self.sizes.rank, shape[1], generator=generator) / shape[1] ** 0.5
        return LowRank(A, torch.randn(shape[0], self.sizes.rank, generator=generator) / self.sizes.rank)


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call on the device, and what it gave."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    found = work()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, found


def measured(device: torch.device, work: Callable[[], Row]) -> Row:
    """A row with its peak memory; what went wrong in its place."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        row = work()
    except Exception as error:  # the other rows are wanted all the same
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    if device.type == "cuda":
        row["peak MiB"] = torch.cuda.max_memory_allocated(device) / 2**20
    return row


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Print the table; everything that was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="run the logic at tiny sizes on the CPU")
    parser.add_argument("--json", type=Path, help="write every row there")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--minutes", type=float, default=7.5, help="start no row after so many")
    chosen = parser.parse_args(given)
    if not chosen.cpu and not torch.cuda.is_available():
        parser.error("there is no GPU; --cpu runs the logic at tiny sizes")
    warnings.simplefilter("ignore")
    device = torch.device("cpu" if chosen.cpu else "cuda")
    card = "CPU, tiny sizes" if chosen.cpu else torch.cuda.get_device_name(device)
    found: dict[str, Any] = {"card": card, "versions": versions(), "rows": {}}
    print(f"on {card}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name, work in Bench(TINY if chosen.cpu else Sizes(), device, Path(folder)).rows():
            if chosen.only not in name:
                continue
            late = time.monotonic() - began > 60 * chosen.minutes
            row = {"left out": f"after {chosen.minutes} minutes"} if late else measured(device, work)
            found["rows"][name] = row
            told = ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
            print(f"{name:<48} {told}", flush=True)
            if chosen.json:
                chosen.json.write_text(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
