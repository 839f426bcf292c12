"""Accuracy and ‖ΔW‖ along the line between adapters: LoRA against CoTo, mean and spread over pairs of seeds."""

import sys
from pathlib import Path

from lora_lab import plots
from lora_lab.results.result import Result

HERE = Path(__file__).parent
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE

results = [Result.load(HERE / "results" / f"interpolation_{method}.json") for method in ("lora", "coto")]
for name, kind in (("interpolation", None), ("mixtures", "interpolate:ratios"), ("barriers", "interpolate:matrix")):
    plots.save(plots.figure(results, kind=kind), OUT / f"{name}.pdf", OUT / f"{name}.png", force=True)
