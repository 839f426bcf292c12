"""Merging, timed in processes of its own so that peak memory can be told: `python tests/bench.py --only merging`.

Called with the name of a job and its numbers, it prints {"cpu_s", "peak_mib", …} of that job alone.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_commands import ADAPTERS, LAYERS, LLAMA_8B, RANK
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lora_lab.adapters.adapter import Adapter, from_updates
from lora_lab.adapters.cutting import factored
from lora_lab.adapters.lowrank import LowRank, combine
from lora_lab.merging.merged import merge
from lora_lab.merging.methods import rule_of
from lora_lab.merging.rules.elementwise import magnitude, ties
from lora_lab.merging.rules.subspaces import knots
from lora_lab.merging.sources import Sources

LARGE = (4096, 14336)


def factors(rows: int, columns: int, seed: int) -> LowRank:
    """A random update of rank 16."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(RANK, columns, generator=generator) / columns**0.5
    return LowRank(A, torch.randn(rows, RANK, generator=generator) / RANK)


def ours_svd(rows: int, columns: int) -> Callable[[], object]:
    """The sum of four, cut to rank 16 through small cores."""
    updates = [factors(rows, columns, seed) for seed in range(ADAPTERS)]
    return lambda: combine(updates, [1.0] * ADAPTERS).truncate(RANK)


def ours_ties(rows: int, columns: int) -> Callable[[], object]:
    """TIES of four on ΔW, cut to rank 16."""
    updates = [factors(rows, columns, seed) for seed in range(ADAPTERS)]
    return lambda: factored(ties((u.delta() for u in updates), [1.0] * ADAPTERS, density=0.2), RANK)


def peft(rows: int, columns: int, kind: str) -> Callable[[], object]:
    """PEFT's add_weighted_adapter of four on one linear layer."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(columns, rows, bias=False)

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["lin"], init_lora_weights=False)
    model = get_peft_model(One(), config, adapter_name="a0")  # type: ignore[arg-type]
    names = [f"a{i}" for i in range(ADAPTERS)]
    for name in names[1:]:
        model.add_adapter(name, config)
    options: dict[str, Any] = {"combination_type": kind, "svd_rank": RANK, "density": 0.2}
    return lambda: model.add_weighted_adapter(names, [1.0] * ADAPTERS, "merged", **options)  # type: ignore[operator]


def peft_svd(rows: int, columns: int) -> Callable[[], object]:
    """PEFT's SVD merge."""
    return peft(rows, columns, "svd")


def peft_ties(rows: int, columns: int) -> Callable[[], object]:
    """PEFT's ties_svd merge."""
    return peft(rows, columns, "ties_svd")


def ours_knots(rows: int, columns: int) -> Callable[[], object]:
    """KnOTS with magnitude trimming inside, in factor space."""
    updates = [factors(rows, columns, seed) for seed in range(ADAPTERS)]
    magnitude = rule_of("magnitude")

    def merged() -> object:
        shared = knots(updates)
        return shared.back(magnitude(shared.cores, [1.0] * ADAPTERS))

    return merged


def dense_knots(rows: int, columns: int) -> Callable[[], object]:
    """The same from its definition: a dense SVD of the stacked ΔW in float64."""
    deltas = [factors(rows, columns, seed).delta().double() for seed in range(ADAPTERS)]

    def run() -> Tensor:
        U, S, Vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
        parts = (S[:, None] * Vh).split(columns, dim=1)
        return U @ magnitude(parts, [1.0] * ADAPTERS)

    return run


def llama(method: str, rank: int | None) -> Callable[[], object]:
    """All 224 linear layers of a Llama-3-8B-shaped set of four adapters."""
    shapes = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in LLAMA_8B.items()}
    empty = Adapter({}, {"peft_type": "LORA", "r": RANK}, {})
    adapters = [
        from_updates({n: factors(*shape, seed=s) for n, shape in shapes.items()}, like=empty, source=f"a{s}")
        for s in range(ADAPTERS)
    ]
    return lambda: merge(Sources(adapters), method, rank=rank)


JOBS: dict[str, Callable[[], Callable[[], object]]] = {
    f"{job.__name__} {rows} {columns}": lambda job=job, rows=rows, columns=columns: job(rows, columns)  # type: ignore[misc]
    for job in (ours_svd, ours_ties, peft_svd, peft_ties, ours_knots, dense_knots)
    for rows, columns in ((2048, 2048), (4096, 4096), LARGE)
} | {"llama task-arithmetic": lambda: llama("task-arithmetic", RANK)}


def measured(job: str) -> dict[str, float]:
    """CPU seconds and peak memory of a job, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, job], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def pair(title: str, goal: str, ours: str, theirs: str, *, repeats: int = 3) -> tuple[float, float]:
    """A row: medians of both, how many times faster, and the memory beside it; theirs is run once, it is slow."""
    other = measured(theirs)
    own = [measured(ours) for _ in range(repeats)]
    mine = statistics.median(each["cpu_s"] for each in own)
    peak = statistics.median(each["peak_mib"] for each in own)
    print(
        f"{title:<66} {mine:9.4f} s {other['cpu_s']:9.3f} s {other['cpu_s'] / mine:7.0f}×  {goal}; "
        f"{peak:.0f} against {other['peak_mib']:.0f} MiB beyond the inputs",
        flush=True,
    )
    return mine, other["cpu_s"]


def bench_merging(large: bool = True) -> None:
    """Print the rows; `large` includes 4096 × 14336, where PEFT takes many minutes."""
    sizes = [(2048, 2048), (4096, 4096), *([LARGE] if large else [])]
    for rows, columns in sizes:
        at = f"{rows} {columns}"
        pair(f"SVD merge of 4, rank 16, {rows} × {columns}: PEFT / ours", "≥ 500", f"ours_svd {at}", f"peft_svd {at}")
    for rows, columns in ((2048, 2048), (4096, 4096)):
        at = f"{rows} {columns}"
        title = f"KnOTS of 4, rank 16, {rows} × {columns}: dense / ours"
        pair(title, "≥ 500", f"ours_knots {at}", f"dense_knots {at}")
    whole = measured("llama task-arithmetic")
    print(
        f"{'task arithmetic to rank 16, 224 linears of Llama-3-8B, 4 adapters':<66} {whole['cpu_s']:9.3f} s "
        f"at most 10 s and 2048 MiB; {whole['rss_mib']:.0f} MiB in all, inputs and torch included",
        flush=True,
    )
    counts = {shape: list(LLAMA_8B.values()).count(shape) * LAYERS for shape in LLAMA_8B.values()}
    same_size = {(1024, 4096): (2048, 2048), (14336, 4096): LARGE}  # as many entries
    found = {}
    for rows, columns in {same_size.get(shape, shape) for shape in counts}:
        at = f"{rows} {columns}"
        if large or (rows, columns) != LARGE:
            title = f"TIES of 4 to rank 16, {rows} × {columns}: PEFT ties_svd / ours"
            found[rows, columns] = pair(title, "", f"ours_ties {at}", f"peft_ties {at}", repeats=1)
    if large:
        sums = [sum(n * found[same_size.get(shape, shape)][who] for shape, n in counts.items()) for who in (0, 1)]
        title = "TIES to rank 16 on all 224, extrapolated from one module of each size"
        print(f"{title:<66} {sums[0]:9.0f} s {sums[1]:9.0f} s {sums[1] / sums[0]:7.0f}×", flush=True)


def _timed(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    """One job, as JSON."""
    torch.set_num_threads(1)
    torch.linalg.svd(torch.linalg.qr(torch.rand(64, 8)).R)  # libraries that are loaded on first use
    work = JOBS[sys.argv[1]]()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    work()
    elapsed, after = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.argv[1].startswith("ours") and elapsed < 1:  # one of hundreds of modules: a later call is the typical one
        elapsed = statistics.median(_timed(work) for _ in range(15))
    print(json.dumps({"cpu_s": elapsed, "peak_mib": (after - before) / 1024, "rss_mib": after / 1024}))


if __name__ == "__main__":
    main()
