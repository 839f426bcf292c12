"""Shapley values of every layer over seeds, and of every type and layer of one adapter of each method."""

import sys
from pathlib import Path

from lora_lab import plots
from lora_lab.results.result import Result

HERE = Path(__file__).parent
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE

for name, source, kind in (
    ("shapley", "shapley", "shapley:bars"),
    ("shapley_map", "shapley_type_layer", "shapley:heatmap"),
    ("shapley_convergence", "shapley_type_layer", "shapley:convergence"),
):
    result = Result.load(HERE / "results" / f"{source}.json")
    plots.save(plots.figure([result], kind=kind), OUT / f"{name}.pdf", OUT / f"{name}.png", force=True)
