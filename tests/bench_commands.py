"""Whole commands on adapters of Llama-3-8B's shape, beside a floor: `python tests/bench.py --only commands`.

The floor is what reading, concatenating and writing take with torch and safetensors alone. Every command is a process
of its own on one thread; CPU seconds and peak memory are those of that process.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lora_lab import files

ADAPTERS, RANK, LAYERS = 4, 16, 32
LLAMA_8B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
LLAMA_70B = {
    "self_attn.q_proj": (8192, 8192),
    "self_attn.k_proj": (1024, 8192),
    "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192),
    "mlp.gate_proj": (28672, 8192),
    "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672),
}

FLOOR = """
import sys, torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
*inputs, output = sys.argv[1:]
parts = [load_file(path) for path in inputs]
made = {}
for key in list(parts[0]):
    made[key] = torch.cat([part.pop(key) for part in parts], dim=0 if ".lora_A." in key else 1)
save_file(made, output)
"""

READING = """
import sys, torch
from safetensors.torch import load_file
torch.set_num_threads(1)
for path in sys.argv[1:-1]:
    for tensor in load_file(path).values():  # which are mapped: only what is looked at is read
        tensor.view(torch.uint8).sum()
"""


@dataclass(frozen=True)
class Spent:
    """What a process took."""

    cpu_s: float
    wall_s: float
    peak_mib: float


def adapters(
    folder: Path,
    *,
    shapes: dict[str, tuple[int, int]] = LLAMA_8B,
    layers: int = LAYERS,
    rank: int = RANK,
    count: int = ADAPTERS,
    generator: torch.Generator | None = None,
) -> list[Path]:
    """PEFT folders of random bfloat16 adapters, whose singular values fall as 1/√k."""
    made = []
    for seed in range(count):
        generator = generator if count == 1 and generator else torch.Generator().manual_seed(seed)
        tensors = {}
        for layer in range(layers):
            for name, (rows, columns) in shapes.items():
                place = f"base_model.model.model.layers.{layer}.{name}"
                A = torch.randn(rank, columns, generator=generator) / columns**0.5
                B = torch.randn(rows, rank, generator=generator) / torch.arange(1, rank + 1) ** 0.5 / 100
                tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"] = A.bfloat16(), B.bfloat16()
        path = folder / f"adapter{seed}"
        path.mkdir()
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "meta-llama/Meta-Llama-3-8B",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": sorted(name.partition(".")[2] for name in shapes),
        }
        (path / "adapter_config.json").write_text(json.dumps(config))
        made.append(path)
    return made


def apart(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a function gives in a process of its own: the peak of every child counts what its parent ever held."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **options).result()


def large_adapter(folder: Path, layers: int, seed: int) -> Path:
    """A PEFT folder of a 70B model's shapes at rank 64, all layers alike."""
    generator = torch.Generator().manual_seed(seed)
    (one,) = adapters(folder, shapes=LLAMA_70B, layers=1, rank=64, count=1, generator=generator)
    layer = files.LazyTensors(one / "adapter_model.safetensors")
    names = {key.replace("layers.0.", f"layers.{i}."): key for i in range(layers) for key in layer}
    path = one.rename(folder / f"large{seed}")
    layer = files.LazyTensors(path / "adapter_model.safetensors")
    spec = {name: layer.spec[key] for name, key in names.items()}
    with files.streamed_writer(path / "adapter_model.safetensors", spec) as write:
        for name, key in names.items():
            write(name, layer[key])
    return path


def spent(command: Sequence[str], folder: Path) -> Spent:
    """What a command took in a process of its own on one thread; RuntimeError with what it said where it fails.

    Byte code of the sources is kept, as it is of what is installed.
    """
    began = time.perf_counter()
    with (folder / "said.txt").open("w+") as said:
        quiet = {"stdout": said, "stderr": said, "stdin": subprocess.DEVNULL}
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        child = subprocess.Popen(command, env={**environment, "OMP_NUM_THREADS": "1"}, **quiet)  # type: ignore[call-overload]
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        if child.returncode:
            raise RuntimeError(f"{' '.join(command)}: {said.read()}")
    return Spent(usage.ru_utime + usage.ru_stime, time.perf_counter() - began, usage.ru_maxrss / 1024)


def floor(inputs: Sequence[Path], folder: Path, script: str = FLOOR) -> Spent:
    """What reading, concatenating and writing take, or reading alone."""
    output = folder / "floor.safetensors"
    files = [str(path / "adapter_model.safetensors") for path in inputs]
    found = spent([sys.executable, "-c", script, *files, str(output)], folder)
    output.unlink(missing_ok=True)
    return found


def lora_lab(arguments: Sequence[str], folder: Path) -> Spent:
    """What `lora-lab …` takes; what it writes goes to a place of its own and is removed."""
    output = folder / "out"
    found = spent([str(Path(sys.executable).with_name("lora-lab")), *arguments, "-o", str(output)], folder)
    shutil.rmtree(output)
    return found


COMMANDS: tuple[tuple[str, tuple[str, ...], int, str, float], ...] = (
    ("exact sum", ("merge",), 4, "× floor", 1.5),
    ("task-arithmetic to rank 16", ("merge", "--rank", "16"), 4, "× floor", 2),
    ("prune --rank 8", ("prune", "--rank", "8"), 1, "× floor of one", 1.5),
    ("prune --energy 0.9", ("prune", "--energy", "0.9"), 1, "× floor of one", 1.5),
    ("knots", ("merge", "--method", "knots"), 4, "× floor", 15),
    ("core-space", ("merge", "--method", "core-space"), 4, "× floor", 15),
    ("tsv", ("merge", "--method", "tsv"), 4, "× floor", 15),
    ("iso-c", ("merge", "--method", "iso-c"), 4, "× floor", 15),
    ("compare two", ("compare",), 2, "× reading", 2),
    ("compare", ("compare",), 4, "× floor", 2),
    ("ties", ("merge", "--method", "ties"), 4, "CPU s", 300),
    ("dare", ("merge", "--method", "dare"), 4, "CPU s", 300),
    ("della", ("merge", "--method", "della"), 4, "CPU s", 300),
    ("breadcrumbs", ("merge", "--method", "breadcrumbs"), 4, "CPU s", 300),
)
"""Title, verb and options, how many adapters, what the goal counts, the goal."""


def bench_commands(folder: Path, *, repeats: int = 3, layers: int = LAYERS, only: Sequence[str] = ()) -> None:
    """Print the rows; with fewer layers, times are scaled up from them (one layer is 1/32 of the work)."""
    folder = folder / "commands"
    folder.mkdir()
    made = apart(adapters, folder, layers=layers)
    floors = {}
    for count, script in ((1, FLOOR), (2, READING), (ADAPTERS, FLOOR)):
        runs = [floor(made[:count], folder, script) for _ in range(repeats)]
        floors[count] = Spent(
            *(statistics.median(getattr(run, name) for run in runs) for name in Spent.__annotations__)
        )
        print(f"{'reading' if script is READING else 'floor'} of {count}: {_told(floors[count])}", flush=True)
    for title, (verb, *options), count, unit, goal in COMMANDS:
        if only and title not in only:
            continue
        found = lora_lab([verb, *map(str, made[:count]), *options], folder)
        by_floor = found.cpu_s / floors[count].cpu_s
        own = found.cpu_s - floors[count].cpu_s  # beyond what hardly hangs on the number of layers
        value = by_floor if "×" in unit else floors[count].cpu_s + own * LAYERS / layers
        memory = found.peak_mib / floors[count].peak_mib
        print(
            f"{title:<30} {_told(found)} {value:7.1f} {unit} (at most {goal:g}); memory {memory:.2f} × floor",
            flush=True,
        )


LARGE: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("70B rank 64: exact sum", ("merge",), 4),
    ("70B rank 64: to rank 64", ("merge", "--rank", "64"), 4),
    ("70B rank 64: prune --rank 32", ("prune", "--rank", "32"), 1),
    ("70B rank 64: convert --to mlx", ("convert", "--to", "mlx"), 1),
)
"""Title, verb and options, how many adapters: what is measured is memory, beyond that of importing torch."""


def bench_memory(folder: Path, *, layers: int = 80, only: Sequence[str] = ()) -> None:
    """Print peaks of memory by the size of the largest input, which may be 2 at the most; fewer layers are smaller."""
    wanted = [row for row in LARGE if not only or row[0] in only]
    if not wanted:
        return
    folder = folder / "large"
    folder.mkdir()
    made = [apart(large_adapter, folder, layers, seed) for seed in range(max(count for _, _, count in wanted))]
    size = max((path / "adapter_model.safetensors").stat().st_size for path in made) / 2**20
    torch_alone = spent([sys.executable, "-c", "import torch"], folder).peak_mib
    for title, (verb, *options), count in wanted:
        found = lora_lab([verb, *map(str, made[:count]), *options], folder)
        own = found.peak_mib - torch_alone
        print(
            f"{title:<30} {_told(found)} {own:7.0f} MiB of its own, {own / size:.2f} × a file (at most 2)", flush=True
        )


def _told(found: Spent) -> str:
    return f"{found.cpu_s:8.2f} CPU s {found.wall_s:8.2f} s {found.peak_mib:7.0f} MiB"


def main() -> None:
    """`python tests/bench_commands.py [LAYERS] [TITLE …]`."""
    import tempfile

    layers = int(sys.argv[1]) if len(sys.argv) > 1 else LAYERS
    with tempfile.TemporaryDirectory() as name:
        if not sys.argv[2:] or {row[0] for row in COMMANDS} & set(sys.argv[2:]):
            bench_commands(Path(name), layers=layers, repeats=3, only=sys.argv[2:])
        if set(sys.argv[2:]) & {row[0] for row in LARGE}:  # which takes 15 GB of the disk at 80 layers
            bench_memory(Path(name), layers=layers, only=sys.argv[2:])


if __name__ == "__main__":
    main()
