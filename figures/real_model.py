"""MiniLM on verb categories: LoRA and CoTo at their own best learning rates, their lines, and with layers off."""

import sys
from pathlib import Path

from lora_lab import plots
from lora_lab.results.result import Result

HERE = Path(__file__).parent
OUT = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE

for name, width in (("rates", "single"), ("line", "double"), ("stability", "double")):
    files = sorted((HERE / "results").glob(f"minilm_{name}*.json"), reverse=True)  # LoRA first
    figure = plots.figure([Result.load(file) for file in files], width=width)
    plots.save(figure, OUT / f"minilm_{name}.pdf", OUT / f"minilm_{name}.png", force=True)
