"""Accuracy with some layers off, as they are and rescaled: LoRA against CoTo, mean and spread over seeds."""

import sys
from pathlib import Path

from lora_lab import plots
from lora_lab.results.result import Result

HERE = Path(__file__).parent
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE

results = [Result.load(HERE / "results" / "stability.json")]
for name, kind in (
    ("stability", None),
    ("stability_p", "stability:p"),
    ("stability_layers", "stability:leave-one-out"),
):
    plots.save(plots.figure(results, kind=kind), OUT / f"{name}.pdf", OUT / f"{name}.png", force=True)
